"""Whether all that a run names is there and goes together: prompts, recipes, models."""

from collections.abc import Callable
from pathlib import Path

from recllm.adapters import AdapterRecipe, check_places, load_adapter
from recllm.collaborative import encoder_name
from recllm.errors import RecllmError
from recllm.likelihood import first_token
from recllm.lm import check_layers, is_causal, load_config, load_tokenizer, model_folder, not_causal, skeleton
from recllm.prompts import Prompt, compile_prompt, load_prompt
from recllm.recipes import find_recipe
from recllm.runs import PROMPTS, ModelSettings, Run

Say = Callable[[str], None]


def check_names(run: Run, say: Say, *, kept: bool = False, adapter_kept: bool | None = None) -> None:
    """Read the prompts and recipes that a run names and fetch its models, so that a mistake is told before any work.

    Args:
        run: the run.
        say: gets lines of what is fetched.
        kept: read the copies in the run's folder, where it has them.
        adapter_kept: likewise of the adapter's recipe; as `kept` when not given.

    Raises:
        RecllmError: an unknown name or key, an encoder where a causal model is needed, or a control that cannot be.
    """
    adapter = None
    if run.adapter.recipe != "none":
        own = kept if adapter_kept is None else adapter_kept
        adapter = load_adapter(run.adapter, run.adapter_file if own else None)
        if run.control.language_model == "random" and adapter.quantization is not None:
            raise RecllmError(
                "control.language_model = random draws weights in full precision, and the recipe "
                f"'{run.adapter.recipe}' quantises them. Take one that does not, such as --set adapter.recipe=lora."
            )
    for key, task in PROMPTS.items():
        prompt = load_prompt(run.prompt_file(key) if kept else getattr(run.prompt, key), task=task)
        _say_what_is_read(run, key, prompt, say)
    for recipe in run.export.recipes:
        find_recipe("export", recipe)
    model_folder(encoder_name(run), say)
    if run.model.likelihood is not None:
        folder = model_folder(run.model.likelihood, say)
        if not is_causal(load_config(folder)):
            raise RecllmError(
                f"'{run.model.likelihood}' is an encoder, which says no word's likelihood. Name a causal model as "
                "model.likelihood, or leave it out."
            )
        prompt = load_prompt(run.prompt_file("likelihood") if kept else run.prompt.likelihood, task="item")
        first_token(compile_prompt(prompt, load_tokenizer(folder), ended=False))
    if run.model.name != "none":
        _check_language_model(run, adapter, model_folder(run.model.name, say))


def _check_language_model(run: Run, adapter: AdapterRecipe | None, folder: Path) -> None:
    causal = is_causal(load_config(folder))
    if run.model.task == "next_item" and not causal:
        raise not_causal(run.model.name)
    if run.model.rows_together > 1 and not causal:
        raise RecllmError(
            f"'{run.model.name}' is an encoder, which looks both ways: its rows cannot share a history. Leave "
            "model.rows_together at 1."
        )
    check_layers(folder, run.model.layers)
    if adapter is not None:
        check_places(skeleton(folder, run.model.layers), adapter)


def _say_what_is_read(run: Run, key: str, prompt: Prompt, say: Say) -> None:
    """Say what rules how far back a run reads, where its prompt and `model.max_history` differ."""
    read, own = run.model.max_history, run.prompt.next_item.endswith(".toml")
    asked = read != ModelSettings.model_fields["max_history"].default
    if key == run.model.task == "relevance" and run.model.name != "none" and asked and read > prompt.max_history:
        say(
            f"model.max_history = {read} is cut to {prompt.max_history}, the max_history of the prompt "
            f"'{run.prompt.relevance}'. To read more, name a copy of the prompt with another one as prompt.relevance."
        )
    if key != "next_item" or run.model.task != "next_item" or run.model.name == "none" or not own:
        return
    if "max_history" in prompt.model_fields_set and prompt.max_history != read:
        say(
            f"{run.prompt.next_item}: max_history = {prompt.max_history} is for previews; the run reads the last "
            f"{read} items (--set model.max_history={prompt.max_history})"
        )

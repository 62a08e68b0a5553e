"""The sequence models of a run: trained once, kept in the run's folder, loaded again for the next stage."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from recllm.adapters import AdapterRecipe, load_adapter, merge
from recllm.checkpoints import load_trained
from recllm.collaborative import Collaborative
from recllm.encoding import Encode, SequenceScorer
from recllm.errors import RecllmError
from recllm.files import read_json, write_json
from recllm.heads import borrowed_heads
from recllm.histories import HistoryFormat, item_token_history, text_history
from recllm.lean import round_frozen
from recllm.likeness import LikenessRidge
from recllm.lm import BaseModel, LanguageBody, load_base, model_folder, next_item_model
from recllm.neighbours import Neighbours
from recllm.prompts import compile_prompt, load_prompt
from recllm.runs import Run
from recllm.sequence import LightBody, NextItemModel
from recllm.tasks import Task
from recllm.vectors import ItemFeatures

Say = Callable[[str], None]
ITEM_STRIDE = 10
"""The longest stride of a next-item model's histories where none is given; of short ones it is half of what is read."""


def stretches(run: Run, task: Task) -> int:
    """Into how many stretches the sequence models of a run cut the training time; 0 where it has none."""
    return 0 if task.time is None else run.recency.drift


def learnt_width(run: Run) -> int:
    """Width of the vector that a run's sequence models learn of each item; 0 where a control is to know no events."""
    return run.model.learnt_width if run.control.factors == "own" else 0


def light_model(run: Run, task: Task, features: ItemFeatures) -> tuple[NextItemModel, HistoryFormat]:
    """The light sequence model, untrained."""
    settings = run.light
    torch.manual_seed(run.seed)
    body = LightBody(
        settings.width,
        settings.layers,
        settings.heads,
        settings.max_history,
        settings.dropout,
        relative=settings.relative_positions,
        gated=settings.gated,
    )
    model = NextItemModel(
        body,
        features,
        width=settings.width,
        head_width=settings.width,
        warm=task.warm,
        token_scale=1.0,
        factor_dropout=settings.factor_dropout,
        counts=task.item_counts,
        negatives=settings.negatives,
        repeats=task.repeats,
        drift=stretches(run, task),
        learnt=learnt_width(run),
    )
    return model, HistoryFormat((), (), settings.max_history, 1)


def language_history(run: Run, task: Task, base: BaseModel) -> HistoryFormat:
    """How the language model reads a history."""
    prompt = load_prompt(run.prompt_file("next_item"), task="next_item")
    prompt.check_against(task.dataset.catalog)
    compiled = compile_prompt(prompt, base.tokenizer)
    limit = run.model.max_history
    stride = run.model.history_stride or max(1, min(ITEM_STRIDE, limit // 2))
    positions = getattr(base.model.config, "max_position_embeddings", None)
    if run.model.history == "items":
        if positions is not None and len(compiled.start) + limit > positions:
            raise RecllmError(
                f"model.max_history is {limit}, and '{run.model.name}' reads {positions} tokens, {len(compiled.start)} "
                f"of them before the history. Take at most --set model.max_history={positions - len(compiled.start)}."
            )
        return item_token_history(compiled.start, limit, stride)
    texts = compiled.encode_items(task.dataset.catalog)
    longest = max((len(text) for text in texts if text is not None), default=0)
    if positions is not None and len(compiled.start) + longest > positions:
        over = len(compiled.start) + longest - positions
        raise RecllmError(
            f"'{run.model.name}' reads {positions} tokens, and the longest item alone, with the {len(compiled.start)} "
            f"before the history, takes {over} more. In {run.prompt_file('next_item')} lower max_item_tokens "
            f"({prompt.max_item_tokens}) by {over}."
        )
    return text_history(compiled.start, texts, limit, stride, positions)


def in_full_precision(recipe: AdapterRecipe | None) -> AdapterRecipe | None:
    """The recipe over a base model that is not quantised: what merging and scoring take."""
    return None if recipe is None else recipe.in_full_precision()


def adapter_recipe(run: Run) -> AdapterRecipe | None:
    """The run's adapter, or None for a frozen model without one."""
    return None if run.adapter.recipe == "none" else load_adapter(run.adapter, run.adapter_file)


def own_base(run: Run, recipe: AdapterRecipe | None, say: Say) -> BaseModel:
    """The run's language model before any training: pretrained, unless the run is a control."""
    drawn_by = run.seed if run.control.language_model == "random" else None
    return load_base(model_folder(run.model.name, say), recipe, run.model.layers, drawn_by=drawn_by)


def language_model(
    run: Run, task: Task, features: ItemFeatures, recipe: AdapterRecipe | None, say: Say
) -> tuple[NextItemModel, HistoryFormat, BaseModel]:
    """The next-item language model with the adapter of `recipe`, untrained."""
    base = own_base(run, recipe, say)
    history = language_history(run, task, base)
    torch.manual_seed(run.seed)
    model = next_item_model(
        base,
        recipe,
        features,
        task.item_counts,
        history,
        run.model,
        repeats=task.repeats,
        drift=stretches(run, task),
        learnt=learnt_width(run),
    )
    return model, history, base


def load_light(run: Run, task: Task, features: ItemFeatures) -> tuple[NextItemModel, HistoryFormat] | None:
    """The trained light model, or None where the run has none."""
    path = run.folder / "light" / "model.safetensors"
    if not path.is_file():
        return None
    model, history = light_model(run, task, features)
    load_trained(model, path)
    return model.eval(), history


def load_language(run: Run, task: Task, features: ItemFeatures) -> tuple[NextItemModel, HistoryFormat] | None:
    """The trained language model with its adapter merged, or None where the run has none.

    A model that was trained over a quantised base is merged over the same base in full precision.
    """
    path = run.folder / "lm" / "model.safetensors"
    if not path.is_file():
        return None
    model, history, _ = language_model(run, task, features, in_full_precision(adapter_recipe(run)), lambda _: None)
    load_trained(model, path)
    return merged(model).eval(), history


def merged(model: NextItemModel) -> NextItemModel:
    """The same model with its adapter folded into the base weights."""
    assert isinstance(model.body, LanguageBody)
    model.body.model = merge(model.body.model)
    return model


def torch_encode(model: NextItemModel, *, bf16: bool = False) -> Encode:
    """Read ids with a torch model, in bf16 or float32; its table of input vectors is made once.

    With `bf16` the linear layers of the body are rounded for good, once in place of at every pass.
    """
    with torch.inference_mode():
        table = model.eval().table()
    if bf16:
        round_frozen(model.body.requires_grad_(False), torch.bfloat16)
    device = table.device

    @torch.inference_mode()
    def encode(*given: NDArray[np.int64]) -> NDArray[np.float32]:
        ids, ends, *asked = (torch.from_numpy(value).to(device) for value in given)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
            vectors = model.encode(ids, ends, table, *asked)
        return vectors.float().cpu().numpy()

    return encode


def lenders(run: Run, parts: Collaborative) -> Neighbours | LikenessRidge | None:
    """What tells new items' heads; nothing where a control takes items' text from the model, for text finds the like.

    The means of neighbours are for runs from before there was regression, and where it knows a part of the items.
    """
    if run.control.text != "own":
        return None
    told = parts.ridge if parts.ridge is not None and parts.ridge.whole else None
    return told or parts.neighbours or parts.ridge


def sequence_scorer(
    model: NextItemModel,
    history: HistoryFormat,
    task: Task,
    lender: Neighbours | LikenessRidge | None,
    *,
    bf16: bool = False,
) -> SequenceScorer:
    """A trained next-item model as a scorer; in float32, unless `bf16` trades digits for speed."""
    encode, time = torch_encode(model, bf16=bf16), task.time if model.drift is not None else None
    heads = borrowed_heads(model, lender)
    return SequenceScorer(encode, history, task.index, heads.items, heads.bias, heads.new, time=time)


def save_stage(folder: Path, facts: dict[str, object]) -> None:
    """Mark a stage as done."""
    write_json(folder / "done.json", facts)


def stage_done(folder: Path) -> bool:
    """Whether a stage was finished."""
    return (folder / "done.json").is_file() and isinstance(read_json(folder / "done.json"), dict)

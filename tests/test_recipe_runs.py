"""Every recipe of adapters/ trains, resumes to the same bits, merges and exports; the table of docs/adapters.md.

`python -m pytest tests/test_recipe_runs.py --write-docs` writes the table anew.
"""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaModel, TrainerCallback, TrainerState

from recllm import loop
from recllm.adalora import RankBudget, adalora_of
from recllm.adapters import attach, load_adapter
from recllm.bottleneck import Bottleneck
from recllm.checkpoints import load_trained, save_trained, trained_values
from recllm.errors import RecllmError
from recllm.eva import start_from_data
from recllm.examples import Examples, NextItemCollator
from recllm.export import SequenceGraph
from recllm.graphscorer import onnx_encode
from recllm.histories import item_token_history
from recllm.lm import load_base, next_item_model
from recllm.ranking import ItemIndex
from recllm.recipes import recipe_names
from recllm.runs import AdapterSettings, ModelSettings
from recllm.sessions import open_session
from recllm.tracing import write_graph
from recllm.trained import in_full_precision, merged, torch_encode
from recllm.vectors import ItemFeatures
from recllm.windows import Windows

ITEMS = 24
STEPS = 10
HISTORY = item_token_history([5, 6], 6, 1)
CYCLES = [np.arange(start, start + 18, 2) % ITEMS for start in range(ITEMS)]
RECIPES = recipe_names("adapters")
DOCS = Path(__file__).parents[1] / "docs" / "adapters.md"
MERGES, EXPORTS = 1e-5, 1e-4
SMOLLM2 = {
    "vocab_size": 64,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}
LAYERS = 30
RATES = {"ia3": 5e-2, "vera": 5e-2, "ln_tuning": 1e-2}
BYTES = 16
"""Of a trained parameter in float32: itself, its gradient, and AdamW's two moments."""


@pytest.fixture(scope="module")
def folder(resized_lm):
    """A random model whose layers hold whole blocks of every recipe."""
    return resized_lm(hidden_size=64, intermediate_size=64, num_key_value_heads=4, head_dim=16)


def recipe_of(name):
    return load_adapter(AdapterSettings(recipe=name))


def model_of(folder, recipe):
    random = np.random.default_rng(0)
    text, factors = random.normal(size=(ITEMS, 6)), random.normal(size=(ITEMS, 4))
    features = ItemFeatures(ItemIndex(map(str, range(ITEMS))), text.astype(np.float32), factors.astype(np.float32))
    base = load_base(folder, recipe)
    torch.manual_seed(0)
    settings = ModelSettings(head_width=16, factor_dropout=0.2)
    return next_item_model(base, recipe, features, np.ones(ITEMS, dtype=bool), HISTORY, settings)


def train(model, place, *, rate, resume=False):
    stage = loop.Stage(
        "lm",
        model,
        Examples(Windows(CYCLES, 6, epochs=4, seed=0).all()),
        Examples([window[-7:] for window in CYCLES[:6]]),
        collator=NextItemCollator(HISTORY),
        valid_collator=NextItemCollator(HISTORY, last_only=True),
        arguments={
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-2,
            "max_steps": STEPS,
            "eval_steps": STEPS // 2,
            "seed": 0,
        },
        compute_metrics=loop.ranking_metrics,
        adapter_learning_rate=rate,
    )
    start_from_data(stage)
    loop.fit(stage, folder=place, say=lambda _: None, resume=resume)
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


class Killed(Exception):
    """Stands for a machine that goes away."""


class Kill(TrainerCallback):
    """Ends the process's work in the middle of an accumulation, two steps behind the first checkpoint."""

    def on_substep_end(self, args, state, control, **_):
        if state.global_step == STEPS // 2 + 2:
            raise Killed


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains_resumes_merges_and_exports(name, folder, tmp_path, monkeypatch):
    recipe, rate = recipe_of(name), RATES.get(name, 5e-3)
    begun = {key: value.detach().clone() for key, value in model_of(folder, recipe).named_parameters()}
    model = model_of(folder, recipe)
    straight = train(model, tmp_path / "straight", rate=rate)
    changed = [key for key, value in straight.items() if not torch.equal(value, begun[key])]
    assert {key.split(".")[0] for key in changed} >= {"body", "query"}
    assert all(torch.equal(begun[key], value) for key, value in model.named_parameters() if key not in straight)

    with monkeypatch.context() as patch:
        trainer = loop.OrderedTrainer
        patch.setattr(
            loop, "OrderedTrainer", lambda callbacks, **given: trainer(callbacks=[*callbacks, Kill()], **given)
        )
        with pytest.raises(Killed):
            train(model_of(folder, recipe), tmp_path / "killed", rate=rate)
    torch.rand(7)  # another random state than the one that was left
    resumed = train(model_of(folder, recipe), tmp_path / "killed", rate=rate, resume=True)
    assert all(torch.equal(straight[key], resumed[key]) for key in straight)

    save_trained(trained_values(model), tmp_path / "model.safetensors")
    loaded = model_of(folder, in_full_precision(recipe))
    load_trained(loaded, tmp_path / "model.safetensors")
    ids, ends = np.array([[0, 1, 7, 9, 11], [0, 1, 3, 3, 20]]), np.array([[2, 3, 4], [4, 3, 2]])
    before = torch_encode(loaded)(ids, ends)
    whole = merged(loaded)
    after = torch_encode(whole)(ids, ends)
    assert any(isinstance(module, Bottleneck) for module in whole.modules()) is (recipe.tuner == "bottleneck")
    assert np.abs(before - after).max() <= MERGES * np.abs(before).max()

    example = {
        "ids": (torch.from_numpy(ids), ("batch", "length")),
        "ends": (torch.from_numpy(ends), ("batch", "ends")),
        "table": (torch.randn(11, 64), ("rows",)),
    }
    write_graph(SequenceGraph(whole), example, tmp_path / "lm.onnx", ("vectors",), 23)
    with torch.no_grad():
        table = whole.table().numpy()
    exported = onnx_encode(open_session(tmp_path / "lm.onnx", threads=1), table)(ids, ends)
    assert np.abs(exported - after).max() <= EXPORTS * np.abs(after).max()


def test_the_budget_of_ranks_falls_to_its_target(folder, tmp_path):
    model = model_of(folder, recipe_of("adalora"))
    train(model, tmp_path, rate=5e-3)
    pattern = adalora_of(model).peft_config["default"].rank_pattern
    left, places = sum(sum(ranks) for ranks in pattern.values()), len(pattern)
    assert left / places == pytest.approx(16, abs=0.5)
    zeros = [int((value == 0).sum()) for key, value in model.named_parameters() if "lora_E" in key]
    assert sum(zeros) == places * 24 - left


def test_a_budget_without_room_is_refused(folder, tmp_path):
    recipe = recipe_of("adalora")
    for keys, message in (
        ({"target_r": 24}, r"init_r = 24 ranks and shall keep target_r = 24"),
        ({"tinit": 5, "tfinal": 5}, r"tinit = 5 and tfinal = 5 leave none of the 10 steps"),
    ):
        changed = recipe.model_copy(update={"config": recipe.config | keys})
        with pytest.raises(RecllmError, match=message):
            train(model_of(folder, changed), tmp_path, rate=5e-3)


def test_overflowing_gradients_do_not_end_the_budget(folder, tmp_path, monkeypatch):
    model = model_of(folder, recipe_of("adalora"))
    step = loop.RankBudget.on_optimizer_step

    def overflowing(self, args, state, control, model=None, **given):
        if state.global_step == 0:
            for value in model.parameters():
                if value.grad is not None:
                    value.grad.fill_(torch.inf)
        step(self, args, state, control, model=model, **given)

    monkeypatch.setattr(loop.RankBudget, "on_optimizer_step", overflowing)
    train(model, tmp_path, rate=5e-3)
    pattern = adalora_of(model).peft_config["default"].rank_pattern
    assert sum(sum(ranks) for ranks in pattern.values()) / len(pattern) == pytest.approx(16, abs=0.5)


def test_an_encoder_whose_pooling_layer_has_no_part_in_the_loss_has_a_budget(tiny_encoder_folder, tmp_path):
    base = load_base(tiny_encoder_folder)
    body = attach(base.model, recipe_of("adalora")).train()
    assert any("pooler" in name for name, value in body.named_parameters() if value.requires_grad)
    budget, state = RankBudget(STEPS), TrainerState(global_step=0)
    budget.on_train_begin(SimpleNamespace(output_dir=tmp_path), state, None, model=body)
    body(input_ids=torch.arange(8)[None]).last_hidden_state.sum().backward()
    budget.on_optimizer_step(None, state, None, model=body)
    assert len(adalora_of(body).rankallocator.ipt) == sum("lora_" in name for name, _ in body.named_parameters())


@pytest.mark.parametrize("start", [True, "gaussian", "orthogonal", "pissa", "olora", "eva", "loftq"])
def test_lora_starts_in_the_ways_of_peft_and_still_merges(start, folder, tmp_path):
    recipe = recipe_of("qlora" if start == "loftq" else "lora")
    changed: dict = {"config": recipe.config | {"init_lora_weights": start}}
    if start == "loftq":
        changed["quantization"] = recipe.quantization | {"bnb_4bit_compute_dtype": "float32"}
    recipe = recipe.model_copy(update=changed)
    model = model_of(folder, recipe)
    train(model, tmp_path, rate=5e-3)
    save_trained(trained_values(model), tmp_path / "model.safetensors")
    loaded = model_of(folder, in_full_precision(recipe))
    load_trained(loaded, tmp_path / "model.safetensors")
    ids, ends = np.array([[0, 1, 7, 9, 11]]), np.array([[2, 3, 4]])
    before, trained = torch_encode(loaded)(ids, ends), torch_encode(model)(ids, ends)
    assert np.allclose(before, trained, atol=1e-4)
    assert np.allclose(torch_encode(merged(loaded))(ids, ends), before, atol=1e-4)


@pytest.mark.parametrize("start", ["corda", "lora_ga"])
def test_a_start_that_cannot_be_served_is_refused_with_the_reason(start):
    with pytest.raises(RecllmError, match=rf"init_lora_weights = '{start}' is not supported: it .*'(pissa|eva)'"):
        load_adapter(AdapterSettings.model_validate({"recipe": "lora", "init_lora_weights": start}))


@pytest.mark.parametrize("given", [{"recipe": "adalora"}, {"recipe": "lora", "eva_config": {"rho": 2.0}}])
def test_eva_keeps_the_same_rank_everywhere(given):
    with pytest.raises(RecllmError, match="'eva' is for the tuner 'lora' without an eva_config"):
        load_adapter(AdapterSettings.model_validate(given | {"init_lora_weights": "eva"}))


@pytest.mark.parametrize("tuner", ["prompt_tuning", "prefix_tuning", "p_tuning"])
def test_learnt_tokens_are_refused_with_the_reason(tuner, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(f'tuner = "{tuner}"\n[config]\nnum_virtual_tokens = 4\n', encoding="utf-8")
    with pytest.raises(RecllmError, match=rf"'{tuner}' is not supported: it puts learnt tokens before the prompt"):
        load_adapter(AdapterSettings(recipe=str(path)))


def trained_parameters(name):
    """Of a recipe on SmolLM2-135M: of two layers of its shape, and what each further one adds."""
    recipe = in_full_precision(recipe_of(name))
    counts = []
    for layers in (2, 3):
        model = attach(LlamaModel(LlamaConfig(num_hidden_layers=layers, **SMOLLM2)), recipe)
        counts.append(sum(value.numel() for value in model.parameters() if value.requires_grad))
    return counts[0] + (LAYERS - 2) * (counts[1] - counts[0])


def table():
    lines = [
        "| recipe | tuner | trained on SmolLM2-135M | weights, gradients, AdamW | resumes | merged | exported |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in RECIPES:
        recipe = recipe_of(name)
        count = trained_parameters(name)
        merges = "stays beside" if recipe.tuner == "bottleneck" else f"within {MERGES:.0e}"
        memory = f"{count * BYTES / 2**20:.1f} MiB"
        cells = [f"`{name}`", recipe.tuner, f"{count:,}", memory, "same bits", merges, f"within {EXPORTS:.0e}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def test_the_table_of_the_docs_is_what_these_tests_found(request):
    begin, end = "<!-- recipes -->\n", "\n<!-- /recipes -->"
    text = DOCS.read_text(encoding="utf-8")
    head, rest = text.split(begin)
    shown, tail = rest.split(end)
    if request.config.getoption("--write-docs"):
        DOCS.write_text(head + begin + table() + end + tail, encoding="utf-8")
        return
    assert shown == table(), "write it anew: python -m pytest tests/test_recipe_runs.py --write-docs"

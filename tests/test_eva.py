"""EVA: LoRA's A starts with the directions that the layers' inputs vary in, and B with zero."""

import numpy as np
import pytest
import torch

from recllm import eva
from recllm.collaborative import load_collaborative
from recllm.errors import RecllmError
from recllm.eva import start_from_data
from recllm.judging import relevance_stage
from recllm.loop import Stage
from recllm.nextitem import language_stage
from recllm.runs import load_run
from recllm.tasks import prepare


@pytest.fixture
def staged(tiny_run):
    """The stages of the tiny run, with EVA and without."""
    run = load_run(tiny_run)
    task = prepare(run)
    features = load_collaborative(run, task).features

    def stage(*overrides, judges=False) -> Stage:
        keys = ["model.task=relevance", "model.rows_together=4"] if judges else []
        made = load_run(tiny_run, [*keys, *overrides])
        return (relevance_stage if judges else language_stage)(made, task, features, lambda _: None)

    return stage


def matrices(stage, letter):
    return {name: own for name, own in stage.model.named_parameters() if f"lora_{letter}" in name}


@pytest.mark.parametrize("judges", [False, True])
def test_a_spans_what_the_first_layer_reads(staged, judges):
    stage = staged("adapter.init_lora_weights=eva", "adapter.r=3", judges=judges)
    layer = next(module for name, module in stage.model.named_modules() if name.endswith("layers.0.self_attn.q_proj"))
    before, rank = layer.lora_A["default"].weight.detach().clone(), layer.r["default"]
    start_from_data(stage)
    found = layer.lora_A["default"].weight.detach()
    assert found.shape == before.shape == (rank, before.shape[1])
    assert not torch.allclose(found, before)
    torch.testing.assert_close(found @ found.T, torch.eye(rank), atol=1e-4, rtol=0)
    assert all(not value.any() for value in matrices(stage, "B").values())
    seen = []
    handle = layer.register_forward_hook(lambda _, given, __: seen.append(given[0].detach()))
    places = []
    stage.model.eval()
    with torch.inference_mode():
        for batch in eva.first_batches(stage):
            stage.model(**batch)
            lengths = torch.from_numpy(eva.lengths_of(batch))
            places.append(torch.arange(batch["ids"].shape[1]) < lengths[:, None])
    handle.remove()
    inputs = torch.cat([hidden[mask] for hidden, mask in zip(seen, places, strict=True)])
    kept = (inputs @ found.T).square().sum() / inputs.square().sum()
    chance = (inputs @ torch.linalg.qr(torch.randn(before.shape[1], rank))[0]).square().sum() / inputs.square().sum()
    assert kept > 1.5 * chance


def test_other_starts_stay_as_they_are(staged):
    stage = staged()
    before = {name: own.detach().clone() for name, own in stage.model.named_parameters()}
    start_from_data(stage)
    assert all(torch.equal(own, before[name]) for name, own in stage.model.named_parameters())


def test_the_start_is_the_same_every_time(staged):
    starts = []
    for seed in (0, 1):
        stage = staged("adapter.init_lora_weights=eva")
        torch.manual_seed(seed)
        start_from_data(stage)
        starts.append({name: own.detach().numpy().copy() for name, own in matrices(stage, "A").items()})
    assert all(np.array_equal(starts[0][name], value) for name, value in starts[1].items())


def test_directions_that_do_not_settle_are_an_error(staged, monkeypatch):
    monkeypatch.setattr(eva, "PASSES", 3)
    stage = staged("adapter.init_lora_weights=eva")
    read, random = stage.model.forward, torch.Generator().manual_seed(0)

    def other_words_every_time(ids, **given):
        return read(ids=torch.randint(0, 9, ids.shape, generator=random), **given)

    monkeypatch.setattr(stage.model, "forward", other_words_every_time)
    stage.model.body.model.active_peft_config.eva_config.tau = 1.1  # no cosine is as large
    with pytest.raises(RecllmError, match="EVA's directions have not settled after 3 passes over 16 batches"):
        start_from_data(stage)

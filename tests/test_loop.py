"""The training loop: resuming is exact, checkpoints hold what trains, a loss that is no number stops it."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from recllm import loop, nextitem, recovery
from recllm.adapters import AdapterRecipe
from recllm.checkpoints import WEIGHTS, last_checkpoint, load_trained, save_trained, trained_values
from recllm.devices import check_precision, fast_bf16, precision_keys
from recllm.errors import RecllmError
from recllm.examples import Examples, NextItemCollator, WholeBatches, collate_counted
from recllm.histories import HistoryFormat, item_token_history
from recllm.lm import load_base, next_item_model
from recllm.loop import Stage, fit
from recllm.ranking import ItemIndex
from recllm.runs import ModelSettings
from recllm.sequence import IGNORED, LightBody, NextItemModel
from recllm.vectors import ItemFeatures
from recllm.windows import Windows

ITEMS = 24
LORA = AdapterRecipe(tuner="lora", config={"r": 2, "lora_dropout": 0.2, "target_modules": "all-linear"})
LIGHT_HISTORY = HistoryFormat((), (), 6, 1)
LM_HISTORY = item_token_history([5, 6], 6, 1)
CYCLES = [np.arange(start, start + 18, 2) % ITEMS for start in range(ITEMS)]


def item_features():
    random = np.random.default_rng(0)
    text, factors = random.normal(size=(ITEMS, 6)), random.normal(size=(ITEMS, 4))
    return ItemFeatures(ItemIndex(map(str, range(ITEMS))), text.astype(np.float32), factors.astype(np.float32))


def light(_folder=None):
    """A light model with every kind of dropout on."""
    torch.manual_seed(0)
    warm = np.ones(ITEMS, dtype=bool)
    body = LightBody(16, layers=1, heads=2, positions=6, dropout=0.2)
    return NextItemModel(body, item_features(), width=16, head_width=16, warm=warm, token_scale=1.0, factor_dropout=0.2)


def language(folder):
    """The tiny language model with an adapter, dropout on."""
    base = load_base(folder)
    torch.manual_seed(0)
    settings = ModelSettings(head_width=16, factor_dropout=0.2)
    return next_item_model(base, LORA, item_features(), np.ones(ITEMS, dtype=bool), LM_HISTORY, settings)


def train(
    model,
    folder,
    *,
    history=LIGHT_HISTORY,
    resume=False,
    scorer="light",
    patience=None,
    say=lambda _: None,
    **arguments,
):
    windows = Windows(CYCLES, 6, epochs=2, seed=0)
    given = {"per_device_train_batch_size": 8, "learning_rate": 3e-3, "eval_steps": 4, "logging_steps": 1, "seed": 0}
    stage = Stage(
        scorer,
        model,
        Examples(windows.all()),
        Examples([window[-7:] for window in CYCLES[:6]]),
        collator=NextItemCollator(history),
        valid_collator=NextItemCollator(history, last_only=True),
        arguments=given | arguments,
        compute_metrics=loop.ranking_metrics,
        patience=patience,
    )
    fit(stage, folder=folder, say=say, resume=resume)
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


class Killed(Exception):
    """Stands for a machine that goes away."""


class Kill(TrainerCallback):
    """Ends the process's work right after the checkpoint of a step."""

    def __init__(self, step):
        self.step = step

    def on_save(self, args, state, control, **_):
        if state.global_step == self.step:
            raise Killed


@pytest.mark.parametrize("kind", ["light", "lm"])
def test_a_killed_and_resumed_training_equals_the_uninterrupted_one(kind, tiny_lm_folder, tmp_path, monkeypatch):
    make, history = (light, LIGHT_HISTORY) if kind == "light" else (language, LM_HISTORY)
    straight = train(make(tiny_lm_folder), tmp_path / "straight", history=history, max_steps=12)
    killed_at(4, monkeypatch, lambda: train(make(tiny_lm_folder), tmp_path / "killed", history=history, max_steps=12))
    assert last_checkpoint(tmp_path / "killed" / "checkpoints" / "light").endswith("checkpoint-4")
    torch.rand(7)  # another random state than the one that was left
    resumed = train(make(tiny_lm_folder), tmp_path / "killed", history=history, max_steps=12, resume=True)
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    losses = [
        {line["step"]: line["loss"] for line in lines(tmp_path / name) if "loss" in line}
        for name in ("straight", "killed")
    ]
    assert losses[0] == losses[1]
    assert sorted(losses[1]) == list(range(1, 13))


def test_dropout_was_on_in_the_test_above(tmp_path):
    given = train(light(), tmp_path / "one", max_steps=4), train(light(), tmp_path / "two", max_steps=4, seed=1)
    assert any(not torch.equal(given[0][name], given[1][name]) for name in given[0])


def test_a_checkpoint_holds_only_what_trains(tiny_lm_folder, tmp_path):
    model = language(tiny_lm_folder)
    frozen = {name: value.clone() for name, value in model.named_parameters() if not value.requires_grad}
    trained = train(model, tmp_path, history=LM_HISTORY, max_steps=4)
    weights = load_file(tmp_path / "checkpoints" / "light" / "checkpoint-4" / WEIGHTS)
    assert weights.keys() == trained.keys()
    assert {name.split(".")[0] for name in weights} == {
        "body",
        "tokens",
        "heads",
        "query",
        "bias",
        "cold_bias",
        "log_scale",
    }
    assert all("lora_" in name for name in weights if name.startswith("body."))
    assert frozen
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in frozen.items())
    fresh = dict(language(tiny_lm_folder).named_parameters())
    assert all(not torch.equal(fresh[name], trained[name]) for name in trained)


def test_rows_that_fill_up_a_batch_teach_nothing():
    windows = Examples([np.arange(place, place + 4) for place in range(5)])
    filled = WholeBatches(windows, 4)
    assert len(filled) == 8
    rows = [filled[place] for place in range(4, 8)]
    assert [counts for _, counts in rows] == [True, False, False, False]
    plain, counted = NextItemCollator(LIGHT_HISTORY), collate_counted(NextItemCollator(LIGHT_HISTORY), rows)
    assert counted["labels"].tolist() == [[5, 6, 7], *[[IGNORED] * 3] * 3]
    model = light().eval()
    few = model(**plain([windows[4]]))["loss"]
    assert float(model(**counted, num_items_in_batch=3)["loss"].detach()) == pytest.approx(float(few.detach()))
    assert len(WholeBatches(windows, 1)) == 5


def test_two_learning_rates(tiny_lm_folder, tmp_path, monkeypatch):
    found = []

    class Watching(loop.OrderedTrainer):
        def create_optimizer(self, model=None):
            optimizer = super().create_optimizer(model)
            names = {id(value): name for name, value in self.model.named_parameters()}
            found.extend(
                (names[id(value)], group["lr"], group["weight_decay"])
                for group in optimizer.param_groups
                for value in group["params"]
            )
            return optimizer

    monkeypatch.setattr(loop, "OrderedTrainer", Watching)
    model = language(tiny_lm_folder)
    windows = Examples(Windows(CYCLES, 6, epochs=1, seed=0).all())
    stage = Stage(
        "lm",
        model,
        windows,
        windows,
        collator=NextItemCollator(LM_HISTORY),
        valid_collator=NextItemCollator(LM_HISTORY, last_only=True),
        arguments={"learning_rate": 1e-2, "weight_decay": 0.1, "max_steps": 1, "eval_steps": 1},
        compute_metrics=loop.ranking_metrics,
        adapter_learning_rate=1e-3,
    )
    fit(stage, folder=tmp_path, say=lambda _: None)
    rates = {name: rate for name, rate, _ in found}
    decays = {name: decay for name, _, decay in found}
    assert set(rates) == {name for name, value in model.named_parameters() if value.requires_grad}
    assert all(rate == (1e-3 if name.startswith("body.") else 1e-2) for name, rate in rates.items())
    assert decays["query.weight"] == 0.1
    assert decays["query.bias"] == 0.0


def test_the_metrics_file_has_every_step_and_every_validation(tmp_path):
    train(light(), tmp_path, max_steps=8, scorer="mine")
    found = lines(tmp_path)
    assert [line["step"] for line in found if "loss" in line] == list(range(1, 9))
    assert [line["step"] for line in found if "eval_ndcg@10" in line] == [4, 8]
    assert {line["scorer"] for line in found} == {"mine"}
    assert all(0 <= line["eval_hit_rate@10"] <= 1 for line in found if "eval_ndcg@10" in line)


def test_the_best_weights_stay(tmp_path, monkeypatch):
    """The figure falls from validation to validation, so the first checkpoint is the best."""
    figures = iter([0.9, 0.5, 0.4])
    monkeypatch.setattr(loop, "ranking_metrics", lambda _: {"ndcg@10": next(figures)})
    kept = train(light(), tmp_path, max_steps=12)
    best = load_file(tmp_path / "checkpoints" / "light" / "checkpoint-4" / WEIGHTS)
    assert all(torch.equal(kept[name], best[name]) for name in best)


def test_patience_stops_early(tmp_path, monkeypatch):
    figures = iter([0.9, 0.8, 0.7, 0.6])
    monkeypatch.setattr(loop, "ranking_metrics", lambda _: {"ndcg@10": next(figures)})
    train(light(), tmp_path, eval_steps=1, patience=2)
    assert max(line["step"] for line in lines(tmp_path)) == 3


def killed_at(step, monkeypatch, train_it):
    """Run `train_it`, whose process ends right after the checkpoint of a step."""
    with monkeypatch.context() as patch:
        trainer = loop.OrderedTrainer
        patch.setattr(
            loop, "OrderedTrainer", lambda callbacks, **given: trainer(callbacks=[*callbacks, Kill(step)], **given)
        )
        with pytest.raises(Killed):
            train_it()


def counted(figures, monkeypatch):
    """Validations have the `figures` of their steps; lists of the steps that were validated, and of those done."""
    step, done, train_on = [], [], loop.train_on

    class Counting(loop.OrderedTrainer):
        def evaluate(self, *given, **named):
            step.append(self.state.global_step)
            return super().evaluate(*given, **named)

    monkeypatch.setattr(loop, "OrderedTrainer", Counting)
    monkeypatch.setattr(loop, "ranking_metrics", lambda _: {"ndcg@10": figures[step[-1]]})
    monkeypatch.setattr(loop, "train_on", lambda *given, **named: done.append(train_on(*given, **named)) or done[-1])
    return step, done


@pytest.mark.parametrize("step_of_death", [4, 5], ids=["on the way", "at the stop itself"])
def test_a_resumed_run_stops_early_where_the_uninterrupted_one_does(step_of_death, tmp_path, monkeypatch):
    figures = {1: 0.5, 2: 0.9, 3: 0.8, 4: 0.7, 5: 0.6, 6: 0.5, 7: 0.4}
    step, done = counted(figures, monkeypatch)

    def run(folder, resume=False):
        train(light(), folder, eval_steps=1, patience=3, resume=resume)

    run(tmp_path / "straight")
    killed_at(step_of_death, monkeypatch, lambda: run(tmp_path / "killed"))
    run(tmp_path / "killed", resume=True)
    assert max(step) == 5
    straight, killed = (
        [(line["step"], line["loss"]) for line in lines(tmp_path / name) if "loss" in line]
        for name in ("straight", "killed")
    )
    assert [step for step, _ in straight] == [1, 2, 3, 4, 5]
    assert killed == straight
    assert done == [5, 5]


@pytest.mark.parametrize("best", [True, False])
@pytest.mark.parametrize("ends", ["max_steps", "patience"])
def test_a_training_that_was_killed_behind_its_end_takes_no_further_step(best, ends, tmp_path, monkeypatch):
    figures = {1: 0.9, 2: 0.8, 3: 0.7, 4: 0.6}
    keys = {"max_steps": 3} if ends == "max_steps" else {"patience": 2}
    step, done = counted(figures, monkeypatch)

    def run(folder, resume=False):
        own = {"eval_steps": 1, "load_best_model_at_end": best, "lr_scheduler_type": "constant"}
        return train(light(), folder, resume=resume, **own, **keys)

    whole = run(tmp_path / "straight")
    killed_at(3, monkeypatch, lambda: run(tmp_path / "killed"))
    again = run(tmp_path / "killed", resume=True)
    assert done == [3, 3]
    assert max(step) == 3
    assert all(torch.equal(again[name], value) for name, value in whole.items())


def test_a_checkpoint_that_was_cut_off_is_passed_over(tmp_path, monkeypatch):
    straight = train(light(), tmp_path / "straight", max_steps=12)
    killed_at(8, monkeypatch, lambda: train(light(), tmp_path / "killed", max_steps=12))
    checkpoints = tmp_path / "killed" / "checkpoints" / "light"
    (checkpoints / "checkpoint-8" / "trainer_state.json").unlink()
    with (tmp_path / "killed" / "metrics.jsonl").open("a", encoding="utf-8") as stream:
        stream.write('{"scorer": "light", "st')
    assert last_checkpoint(checkpoints).endswith("checkpoint-4")
    resumed = train(light(), tmp_path / "killed", max_steps=12, resume=True)
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    steps = [line["step"] for line in lines(tmp_path / "killed") if "loss" in line]
    assert steps == list(range(1, 13))


def test_a_stage_is_validated_several_times_where_nothing_is_said(tmp_path):
    windows = Windows(CYCLES, 6, epochs=8, seed=0).all()
    stage = Stage(
        "light",
        light(),
        Examples(windows),
        Examples(windows[:4]),
        collator=NextItemCollator(LIGHT_HISTORY),
        valid_collator=NextItemCollator(LIGHT_HISTORY, last_only=True),
        arguments={"per_device_train_batch_size": 8, "learning_rate": 1e-3, "report_to": "tensorboard"},
        compute_metrics=loop.ranking_metrics,
    )
    fit(stage, folder=tmp_path, say=lambda _: None)
    assert 8 <= len([line for line in lines(tmp_path) if "eval_ndcg@10" in line]) <= 11
    assert list((tmp_path / "tensorboard" / "light").glob("events.out.tfevents.*"))
    assert not list((tmp_path / "checkpoints").rglob("events.out.tfevents.*"))


def test_a_loss_that_stays_no_number_stops_with_the_way_out_and_the_batch(tmp_path):
    model, said = light(), []
    with torch.no_grad():
        model.query.weight.fill_(torch.nan)
    with pytest.raises(
        RecllmError, match=r"The loss of 'light' is nan at step 1, at half the learning rate too\. .*--overwrite"
    ) as error:
        train(model, tmp_path, say=said.append)
    assert any("Going back to the last good checkpoint, with half the learning rate" in line for line in said)
    (kept,) = tmp_path.glob("*.safetensors")
    assert kept.name == "no-number-light-step-1-process-0.safetensors"
    assert str(kept) in str(error.value)
    batch = load_file(kept)
    assert batch["ids"].shape[0] == 8
    assert {"ids", "ends", "labels", "seen"} <= batch.keys()


class OnceNoNumber(NextItemModel):
    """A light model whose loss is no number in one step, the first time that it comes to it."""

    at, steps = 6, 0

    def forward(self, ids, ends, labels, seen, num_items_in_batch=None, **_):
        result = super().forward(ids, ends, labels, seen, num_items_in_batch)
        if self.training:
            self.steps += 1
            if self.steps == self.at:
                result["loss"] = result["loss"] * torch.nan
        return result


def once_no_number():
    model = light()
    model.__class__ = OnceNoNumber
    return model


def rates(folder):
    return {line["step"]: line["learning_rate"] for line in lines(folder) if "learning_rate" in line}


def test_after_one_loss_that_is_no_number_training_goes_back_with_half_the_rate(tmp_path):
    said = []
    weights = train(once_no_number(), tmp_path / "once", max_steps=12, say=said.append)
    train(light(), tmp_path / "straight", max_steps=12)
    assert all(torch.isfinite(value).all() for value in weights.values())
    assert sum("step 6" in line for line in said) == 1
    found, straight = rates(tmp_path / "once"), rates(tmp_path / "straight")
    assert sorted(found) == list(range(1, 13))
    for step, rate in found.items():
        assert rate == pytest.approx(straight[step] * (1.0 if step <= 4 else 0.5))


def test_half_the_rate_stays_after_a_kill(tmp_path, monkeypatch):
    straight = train(once_no_number(), tmp_path / "straight", max_steps=12)
    killed_at(8, monkeypatch, lambda: train(once_no_number(), tmp_path / "killed", max_steps=12))
    resumed = train(light(), tmp_path / "killed", max_steps=12, resume=True)
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    assert rates(tmp_path / "killed") == rates(tmp_path / "straight")


class Cramped(NextItemModel):
    """A light model on a device that has memory for five rows."""

    def forward(self, ids, ends, labels, seen, num_items_in_batch=None, **_):
        if self.training and len(ids) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().forward(ids, ends, labels, seen, num_items_in_batch)


def without_dropout(kind):
    torch.manual_seed(0)
    warm = np.ones(ITEMS, dtype=bool)
    body = LightBody(16, layers=1, heads=2, positions=6, dropout=0.0)
    return kind(body, item_features(), width=16, head_width=16, warm=warm, token_scale=1.0)


def test_out_of_memory_halves_the_micro_batch_and_keeps_the_losses(tmp_path):
    said = []
    train(without_dropout(NextItemModel), tmp_path / "roomy", per_device_train_batch_size=16)
    train(without_dropout(Cramped), tmp_path / "cramped", per_device_train_batch_size=16, say=said.append)
    assert [line for line in said if "Out of memory" in line] == [
        "Out of memory with 16 rows at once: going on with 8, and the same rows in a step",
        "Out of memory with 8 rows at once: going on with 4, and the same rows in a step",
    ]
    losses = [[line["loss"] for line in lines(tmp_path / name) if "loss" in line] for name in ("roomy", "cramped")]
    assert len(losses[0]) > 3
    assert np.allclose(losses[0], losses[1], atol=1e-5)


class CrampedWhileValidating(NextItemModel):
    """A light model on a device that has memory for a whole batch, and for four validation rows."""

    def forward(self, ids, ends, labels, seen, num_items_in_batch=None, **_):
        if not self.training and len(ids) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().forward(ids, ends, labels, seen, num_items_in_batch)


def test_out_of_memory_while_validating_leaves_the_training_as_it_is(tmp_path):
    said, keys = [], {"per_device_train_batch_size": 16, "per_device_eval_batch_size": 16}
    plain = train(without_dropout(NextItemModel), tmp_path / "roomy", **keys)
    found = train(without_dropout(CrampedWhileValidating), tmp_path / "cramped", **keys, say=said.append)
    assert [line for line in said if "memory" in line] == [
        "Out of memory while validating 16 rows at once: going on with 8",
        "Out of memory while validating 8 rows at once: going on with 4",
    ]
    assert all(torch.equal(plain[name], found[name]) for name in plain)


def test_a_single_validation_row_that_does_not_fit_is_one_message(tmp_path):
    class Tiny(NextItemModel):
        def forward(self, **given):
            if not self.training:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return super().forward(**given)

    with pytest.raises(RecllmError, match=r"while validating a single row\. Take .* \(light\.max_history\)"):
        train(without_dropout(Tiny), tmp_path)


@pytest.mark.parametrize(("rows", "found"), [(16, [8, 4, 2, 1]), (12, [6, 3, 1]), (5, [1])])
def test_micro_batches_divide_a_batch_evenly(rows, found):
    adjusted, given = recovery.UNCHANGED, {"per_device_train_batch_size": rows, "per_device_eval_batch_size": 32}
    for fewer in found:
        adjusted = recovery._smaller(adjusted, rows, 1, "lm", lambda _: None)
        divided = recovery.divided(given, adjusted)
        assert divided["per_device_train_batch_size"] == fewer
        assert fewer * divided["gradient_accumulation_steps"] == rows


def test_a_single_row_that_does_not_fit_is_one_message(tmp_path):
    class Tiny(NextItemModel):
        def forward(self, **given):
            raise torch.OutOfMemoryError("CUDA out of memory.")

    for scorer, way in (("light", "light.max_history"), ("lm", "model.max_history")):
        with pytest.raises(RecllmError, match=rf"Out of memory with a single row\. Take shorter histories \({way}\)"):
            train(without_dropout(Tiny), tmp_path, per_device_train_batch_size=2, scorer=scorer)


def damaged(checkpoint, file):
    data = bytearray((checkpoint / file).read_bytes())
    data[len(data) // 2] ^= 1
    (checkpoint / file).write_bytes(data)


@pytest.mark.parametrize("file", ["optimizer.pt", WEIGHTS, "rng_state.pth", "sha256.json"])
def test_a_damaged_checkpoint_is_passed_over_and_told(file, tmp_path, monkeypatch):
    straight, said = train(light(), tmp_path / "straight", max_steps=12), []
    killed_at(8, monkeypatch, lambda: train(light(), tmp_path / "killed", max_steps=12))
    damaged(tmp_path / "killed" / "checkpoints" / "light" / "checkpoint-8", file)
    resumed = train(light(), tmp_path / "killed", max_steps=12, resume=True, say=said.append)
    assert any("The checkpoint checkpoint-8 is damaged (" in line for line in said)
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_a_damaged_best_checkpoint_is_forgotten_and_told(tmp_path, monkeypatch):
    figures = iter([0.9, 0.5, 0.4])
    monkeypatch.setattr(loop, "ranking_metrics", lambda _: {"ndcg@10": next(figures)})
    killed_at(8, monkeypatch, lambda: train(light(), tmp_path, max_steps=12))
    checkpoints, said = tmp_path / "checkpoints" / "light", []
    damaged(checkpoints / "checkpoint-4", WEIGHTS)
    kept = train(light(), tmp_path, max_steps=12, resume=True, say=said.append)
    assert any(line.startswith("The best checkpoint, checkpoint-4, is damaged or gone") for line in said)
    last = load_file(checkpoints / "checkpoint-12" / WEIGHTS)
    assert all(torch.equal(kept[name], last[name]) for name in last)


@pytest.mark.parametrize("key", ["gradient_checkpointing", "activation_checkpointing"])
def test_activations_computed_twice_give_the_same_weights(key, tiny_lm_folder, tmp_path):
    plain = train(language(tiny_lm_folder), tmp_path / "plain", history=LM_HISTORY, max_steps=4)
    model, calls = language(tiny_lm_folder), []
    layer = model.body.model.base_model.model.layers[0]
    layer.self_attn.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    twice = train(model, tmp_path / "twice", history=LM_HISTORY, max_steps=4, **{key: True})
    assert all(torch.equal(plain[name], twice[name]) for name in plain)
    assert calls.count(True) >= 8  # each of four steps reads the layer again on its way back


def test_a_light_scorer_has_no_activations_to_compute_twice(tmp_path):
    with pytest.raises(RecllmError, match=r"train\.gradient_checkpointing is for language models"):
        train(light(), tmp_path, gradient_checkpointing=True)


@pytest.mark.filterwarnings("default")  # torch's compiler asks itself for what it calls deprecated
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiled_layers_resume_exactly(tiny_lm_folder, tmp_path, monkeypatch):
    keys = {"history": LM_HISTORY, "max_steps": 6, "torch_compile": True}
    straight = train(language(tiny_lm_folder), tmp_path / "straight", **keys)
    killed_at(4, monkeypatch, lambda: train(language(tiny_lm_folder), tmp_path / "killed", **keys))
    assert last_checkpoint(tmp_path / "killed" / "checkpoints" / "light").endswith("checkpoint-4")
    resumed = train(language(tiny_lm_folder), tmp_path / "killed", **keys, resume=True)
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # Dynamo looks at every input's
def test_compiling_is_trainers_key_and_changes_no_loss(tiny_lm_folder, tmp_path):
    def undropped():
        model = language(tiny_lm_folder)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        return model

    plain = train(undropped(), tmp_path / "plain", history=LM_HISTORY, max_steps=4)
    compiled = train(undropped(), tmp_path / "made", history=LM_HISTORY, max_steps=4, torch_compile_backend="aot_eager")
    for name, value in plain.items():
        torch.testing.assert_close(compiled[name], value, atol=1e-5, rtol=1e-4)


def test_every_validation_has_a_checkpoint(tmp_path):
    with pytest.raises(RecllmError, match=r"train.eval_steps = 4 and train.save_steps = 8: the best validation would"):
        train(light(), tmp_path, save_steps=8)
    rows = Examples(CYCLES)
    collators = {"collator": NextItemCollator(LIGHT_HISTORY), "valid_collator": NextItemCollator(LIGHT_HISTORY)}
    own = {"arguments": {"per_device_train_batch_size": 4, "save_steps": 3}, "compute_metrics": loop.ranking_metrics}
    assert Stage("light", light(), rows, rows, **collators, **own).options(tmp_path)["eval_steps"] == 3


def test_the_lowest_loss_is_the_best_one_where_the_run_file_asks_for_it(tmp_path, monkeypatch):
    kept = train(light(), tmp_path, max_steps=12, metric_for_best_model="loss")
    losses = {line["step"]: line["eval_loss"] for line in lines(tmp_path) if "eval_loss" in line}
    assert min(losses, key=losses.get) == 12
    assert torch.equal(kept["bias"], load_file(tmp_path / "checkpoints" / "light" / "checkpoint-12" / WEIGHTS)["bias"])


def test_a_step_without_a_label_has_no_loss():
    window = NextItemCollator(LIGHT_HISTORY)([CYCLES[0][:3]])
    window["labels"][:] = -100
    assert light()(**window, num_items_in_batch=torch.tensor(0))["loss"].item() == 0.0


@pytest.mark.parametrize(
    ("windows", "valid", "words"), [([], [[1, 2]], "nothing to learn from"), ([[1, 2]], [], "cannot be validated")]
)
def test_nothing_to_train_or_to_validate_on_is_said(windows, valid, words):
    with pytest.raises(RecllmError, match=rf"'light' .*{words}"):
        nextitem._stage("light", light(), LIGHT_HISTORY, windows, {}, valid)


def test_what_trainer_refuses_is_one_message(tmp_path):
    with pytest.raises(RecllmError, match=r"Trainer refuses the keys in \[train\]: never is not a valid"):
        train(light(), tmp_path, eval_strategy="never")


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"eval_strategy": "no"}, r"train\.eval_strategy = 'no' leaves no validation and checkpoint"),
        ({"eval_strategy": "epoch"}, r"train\.eval_strategy = 'epoch' is not supported.*below 1 as a share"),
        ({"save_strategy": "no"}, r"train\.save_strategy = 'no' leaves no validation and checkpoint"),
        ({"eval_strategy": "no", "load_best_model_at_end": False, "patience": 2}, "no train.early_stopping_patience"),
        ({"metric_for_best_model": "ndgc@10"}, r"Unknown train\.metric_for_best_model 'ndgc@10'.*ndcg@10"),
    ],
    ids=str,
)
def test_a_best_step_that_cannot_be_told_is_refused(keys, words, tmp_path):
    with pytest.raises(RecllmError, match=words):
        train(light(), tmp_path, **keys)
    assert not list(tmp_path.iterdir())


def test_the_last_step_may_be_taken(tmp_path):
    train(light(), tmp_path, eval_strategy="no", load_best_model_at_end=False)
    assert not [line for line in lines(tmp_path) if any(key.startswith("eval") for key in line)]


def test_weights_of_another_run_are_refused(tmp_path):
    save_trained(trained_values(light()), tmp_path / "light.safetensors")
    values = trained_values(light()) | {"cold_bias": torch.tensor(0.5)}  # a scalar, as it once was
    save_trained(values, tmp_path / "old.safetensors")
    old = light()
    load_trained(old, tmp_path / "old.safetensors")
    assert old.cold_bias.tolist() == [0.5]
    other = light()
    other.bias.requires_grad_(False)
    with pytest.raises(RecllmError, match=r"does not fit this run: 'bias' is in one of them only"):
        load_trained(other, tmp_path / "light.safetensors")
    wide = light()
    wide.query = torch.nn.Linear(16, 20)
    with pytest.raises(RecllmError, match=r"does not fit this run: 'query\.bias' has the shape"):
        load_trained(wide, tmp_path / "light.safetensors")


def test_no_checkpoint_starts_from_the_beginning(tmp_path):
    assert last_checkpoint(tmp_path / "nowhere") is None
    found = train(light(), tmp_path / "a", max_steps=4, resume=True)
    shutil.rmtree(tmp_path / "a")
    again = train(light(), tmp_path / "a", max_steps=4)
    assert all(torch.equal(found[name], again[name]) for name in found)


def test_labels_of_training_and_validation():
    windows = [np.array([4, 6, 8, 10]), np.array([1, 3])]
    training = NextItemCollator(LM_HISTORY)(windows)
    assert training["labels"].tolist() == [[6, 8, 10], [3, IGNORED, IGNORED]]
    assert training["ids"].tolist() == [[0, 1, 6, 8, 10], [0, 1, 3, 0, 0]]
    assert training["ends"].tolist() == [[2, 3, 4], [2, 0, 0]]
    assert NextItemCollator(LM_HISTORY, last_only=True)(windows)["labels"].tolist() == [
        [IGNORED, IGNORED, 10],
        [3, IGNORED, IGNORED],
    ]


def test_precision_by_name():
    assert precision_keys("fp32") == {"bf16": False, "fp16": False}
    assert precision_keys("bf16") == {"bf16": True, "fp16": False}
    assert precision_keys("auto")["bf16"] is fast_bf16()


def test_fp16_is_refused_where_gradients_cannot_be_scaled(monkeypatch):
    monkeypatch.setattr("recllm.devices.on_cpu", lambda: True)
    check_precision(precision_keys("bf16"))
    with pytest.raises(RecllmError, match=r"fp16 needs an accelerator.*train\.precision = \"bf16\""):
        check_precision(precision_keys("fp16"))
    monkeypatch.setattr("recllm.devices.on_cpu", lambda: False)
    check_precision(precision_keys("fp16"))

"""Next item: what the stages are made of, what chooses their checkpoints, and what they start from."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from recllm import nextitem
from recllm.askedat import PARTS, TrainingTime
from recllm.collaborative import load_collaborative
from recllm.data import Query
from recllm.histories import HistoryFormat
from recllm.nextitem import language_stage, light_stage
from recllm.ranking import ItemIndex
from recllm.runs import load_run
from recllm.sequence import LightBody, NextItemModel
from recllm.tasks import prepare
from recllm.vectors import ItemFeatures

HISTORY = HistoryFormat((), (), 3, 1)


def silent(_):
    return None


@pytest.fixture(scope="module")
def staged(tiny_run):
    """Makes a stage of the tiny run with keys changed, of which nothing is written."""
    task = prepare(load_run(tiny_run))
    features = load_collaborative(load_run(tiny_run), task).features

    def made(kind, *overrides):
        run = load_run(tiny_run, list(overrides))
        more = () if kind is light_stage else (silent,)
        return kind(run, task, features, *more, store=False)

    return made


def task_of(*rows):
    """What is validated: histories and targets of the items a, b, c, and `new`, which has no event."""
    valid = [SimpleNamespace(query=Query(tuple(history)), item_id=target) for history, target in rows]
    warm = np.array([True, True, True, False])
    return SimpleNamespace(index=ItemIndex(["a", "b", "c", "new"]), warm=warm, split=SimpleNamespace(valid=valid))


def test_validation_rows_have_a_history_that_is_read_and_a_target_with_events():
    task = task_of(("ab", "c"), ("", "a"), (["a", "new"], "b"), ("abc", "new"), ("abcab", "c"), (["gone"], "a"))
    found = nextitem._validation_windows(task, HISTORY, 0, None)
    assert [row.tolist() for row in found] == [[0, 1, 2], [0, 3, 1], [2, 0, 1, 2]]


def test_validation_rows_say_when_they_are_asked_where_time_counts():
    task = task_of(("ab", "c"), ("", "a"), ("c", "b"))
    for row, at in zip(task.split.valid, (20, 30, None), strict=True):
        row.query = replace(row.query, at=at)
    task.time = TrainingTime(np.array([10, 20, 30, 40]))
    found = nextitem._validation_windows(task, HISTORY, 0, None, timed=True)
    assert [row[:, 0].tolist() for row in found] == [[0, 1, 2], [2, 1]]
    assert [row[-1, 1] for row in found] == [PARTS // 4, PARTS]


def test_some_validation_rows_are_drawn_by_the_seed_and_stay_in_order():
    task = task_of(*(("ab" * size, "c") for size in range(1, 31)))
    history = replace(HISTORY, limit=60)

    def sizes(seed, limit):
        return [len(row) for row in nextitem._validation_windows(task, history, seed, limit)]

    assert len(sizes(0, 30)) == len(sizes(0, None)) == 30
    some = sizes(0, 12)
    assert len(set(some)) == 12
    assert some == sorted(some)
    assert some == sizes(0, 12) != sizes(1, 12)


def test_items_that_cannot_be_written_are_left_out_of_what_is_learnt():
    sequences = [np.array([0, 1, 2, 1]), np.array([1])]
    texts = replace(HISTORY, texts=((5,), None, (6, 7)))
    assert [row.tolist() for row in nextitem._readable(sequences, texts)] == [[0, 2], []]
    assert nextitem._readable(sequences, HISTORY) is sequences
    timed = [np.array([[0, 5], [1, 6], [2, 7], [1, 8]])]
    assert [row.tolist() for row in nextitem._readable(timed, texts)] == [[[0, 5], [2, 7]]]


def model_of(seed, head_width=8, drift=3, learnt=2):
    random = np.random.default_rng(0)
    vectors = random.normal(size=(4, 6)).astype(np.float32)
    torch.manual_seed(seed)
    body = LightBody(8, layers=1, heads=2, positions=3, dropout=0.0)
    features = ItemFeatures(ItemIndex("abcd"), vectors, vectors[:, :2])
    warm = np.ones(4, dtype=bool)
    widths = {"width": 8, "head_width": head_width, "drift": drift, "learnt": learnt}
    model = NextItemModel(body, features, warm=warm, token_scale=1.0, **widths)
    with torch.no_grad():
        for value in (model.bias, model.log_scale, model.cold_bias, *([model.drift.ends] if drift else [])):
            value.normal_()
    return model


def weights(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def test_the_item_side_of_the_light_scorer_is_taken_over_and_nothing_else():
    model, light = model_of(1), model_of(2)
    before, wanted = weights(model), weights(light)
    nextitem._start_from(model, light, pytest.fail)
    items = {
        name for name in before if name.startswith(("heads.", "bias", "log_scale", "cold_bias", "drift", "learnt"))
    }
    assert len(items) > 6
    for name, value in weights(model).items():
        assert torch.equal(value, wanted[name] if name in items else before[name]), name


@pytest.mark.parametrize(("drift", "lights"), [(0, 3), (3, 0)])
def test_where_one_of_both_knows_no_time_the_rest_is_taken_over(drift, lights):
    model, light = model_of(1, drift=drift), model_of(2, drift=lights)
    before = weights(model)
    nextitem._start_from(model, light, pytest.fail)
    assert torch.equal(model.bias, light.bias)
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items() if name.startswith("drift"))


def test_heads_of_another_width_start_anew(staged):
    model, said = model_of(1), []
    before = weights(model)
    nextitem._start_from(model, model_of(2, head_width=6), said.append)
    width = model.query.out_features
    assert said == [
        f"The items' heads do not start from the light scorer's: model.head_width is {width}, light.width 6"
    ]
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())
    for asked in (True, False):
        stage = staged(language_stage, f"model.heads_from_light={str(asked).lower()}")
        assert bool(stage.model.bias.any()) is asked


def test_the_light_scorer_trains_by_its_own_keys(staged):
    keys = {"learning_rate": 0.02, "weight_decay": 0.3, "per_device_train_batch_size": 5}
    stage = staged(light_stage, *(f"light.{key}={value}" for key, value in keys.items()), "light.max_history=3")
    assert {key: stage.arguments[key] for key in keys} == keys
    assert max(len(stage.train[row]) for row in range(len(stage.train))) == 4  # three are read, and one is the last
    assert stage.arguments["report_to"] == "none"
    assert staged(light_stage, "train.report_to=tensorboard").arguments["report_to"] == "tensorboard"


def test_the_language_model_trains_by_its_keys_and_those_that_are_trainers_own(staged):
    keys = ["learning_rate=0.03", "head_learning_rate=0.02", "warmup_steps=7", "early_stopping_patience=4"]
    stage = staged(language_stage, *(f"train.{key}" for key in keys), "seed=5")
    assert (stage.adapter_learning_rate, stage.arguments["learning_rate"], stage.patience) == (0.03, 0.02, 4)
    assert (stage.arguments["warmup_steps"], stage.arguments["seed"]) == (7, 5)
    assert staged(language_stage).arguments["warmup_steps"] == 0.05


def test_recent_windows_are_one_of_every_user_and_epoch(staged):
    keys = ["model.max_history=3", "train.num_train_epochs=2"]
    assert len(staged(language_stage, *keys, "train.recent_windows=true").train) == 2 * 40
    assert len(staged(language_stage, *keys).train) > 3 * 40


def test_windows_of_like_length_fill_the_batches_of_all_devices(monkeypatch):
    monkeypatch.setattr(nextitem, "process_state", lambda: SimpleNamespace(num_processes=3))
    assert nextitem._batch(4) == 12


@pytest.mark.parametrize(
    ("resume", "begun", "warm", "done"),
    [
        (True, True, True, []),  # its checkpoint has its start already
        (True, False, True, ["start"]),
        (False, True, True, ["start"]),
        (True, False, False, ["start", "start_from_data"]),
    ],
)
def test_a_start_is_made_where_there_is_no_checkpoint_to_go_on_from(
    resume, begun, warm, done, tiny_run, tmp_path, monkeypatch
):
    calls = []
    monkeypatch.setattr(nextitem, "language_stage", lambda *_: SimpleNamespace(scorer="lm", trained=1, model=None))
    monkeypatch.setattr(nextitem, "has_checkpoint", lambda *_: begun)
    monkeypatch.setattr(nextitem, "start", lambda *_: calls.append("start") or warm)
    monkeypatch.setattr(nextitem, "start_from_data", lambda _: calls.append("start_from_data"))
    monkeypatch.setattr(nextitem, "_train", lambda *_, **__: calls.append("train"))
    run = load_run(tiny_run / "run.toml", ["name=next", f"output={tmp_path}"])
    parts = SimpleNamespace(features=None)
    nextitem.train_language(run, SimpleNamespace(index=None), parts, resume=resume, say=silent)
    assert calls == [*done, "train"]

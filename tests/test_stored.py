"""Stored windows: the same ones in the same order, read from a file, which is written once."""

import pickle

import numpy as np
import pytest

from recllm import stored
from recllm.collaborative import load_collaborative
from recllm.loop import fit
from recllm.nextitem import light_stage
from recllm.runs import load_run
from recllm.stored import StoredWindows, training_windows
from recllm.tasks import prepare
from recllm.windows import Windows

SEQUENCES = [np.arange(start, start + 9 + start % 7) for start in range(40)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RECLLM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def _all_are_many(monkeypatch):
    monkeypatch.setattr(stored, "STORED_FROM", 1)
    monkeypatch.setattr(stored, "IN_BATCH", 7)


def files(tmp_path):
    return sorted((tmp_path / "cache" / "windows").glob("*"))


@pytest.mark.usefixtures("_all_are_many")
@pytest.mark.parametrize("at_least", [0, 500])
def test_stored_windows_are_those_in_memory(tmp_path, at_least):
    windows = Windows(SEQUENCES, 4, epochs=3, seed=1, batch=8)
    found, expected = training_windows(windows, at_least), windows.all(at_least)
    assert isinstance(found, StoredWindows)
    assert len(found) == len(expected) > 7
    assert all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))
    assert found[3].dtype == np.int64
    assert [row.tolist() for row in found[5:9]] == [row.tolist() for row in expected[5:9]]
    again = pickle.loads(pickle.dumps(found))
    assert np.array_equal(again[-1], expected[-1])
    assert [path.suffix for path in files(tmp_path)] == [".arrow"]


@pytest.mark.usefixtures("_all_are_many")
def test_stored_windows_keep_their_times(tmp_path):
    timed = [np.stack([row, row * 1000 + 7], axis=1) for row in SEQUENCES]
    windows = Windows(timed, 4, epochs=3, seed=1, batch=8)
    found, expected = training_windows(windows), windows.all()
    assert isinstance(found, StoredWindows)
    assert all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))
    assert found[0].shape[1] == 2
    plain = Windows(SEQUENCES, 4, epochs=3, seed=1, batch=8).all()
    assert all(np.array_equal(one[:, 0], other) for one, other in zip(expected, plain, strict=True))  # cut alike
    flat = Windows([row.ravel() for row in timed], 4, epochs=3, seed=1, batch=8)
    training_windows(flat)
    assert len(files(tmp_path)) == 2


@pytest.mark.usefixtures("_all_are_many")
def test_the_same_windows_are_written_once(tmp_path, monkeypatch):
    training_windows(Windows(SEQUENCES, 4, epochs=3, seed=1))
    written = files(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(stored, "_write", lambda *_: pytest.fail("written again"))
        training_windows(Windows([row.copy() for row in SEQUENCES], 4, epochs=3, seed=1))
    others = [
        Windows(SEQUENCES, 4, epochs=3, seed=2),
        Windows(SEQUENCES, 5, epochs=3, seed=1),
        Windows(SEQUENCES, 4, epochs=2, seed=1),
        Windows(SEQUENCES, 4, epochs=3, seed=1, recent=True),
        Windows(SEQUENCES, 4, epochs=3, seed=1, batch=2),
        Windows([*SEQUENCES[:-1], SEQUENCES[-1] + 1], 4, epochs=3, seed=1),
        Windows([np.concatenate(SEQUENCES[:2]), *SEQUENCES[2:]], 4, epochs=3, seed=1),
    ]
    for windows in others:
        training_windows(windows)
    assert len(files(tmp_path)) == len(written) + len(others)
    monkeypatch.setattr(stored, "CUTTING", -1)
    training_windows(others[0])
    assert len(files(tmp_path)) == len(written) + len(others) + 1


@pytest.mark.usefixtures("_all_are_many")
def test_a_plan_writes_no_windows(tmp_path):
    assert isinstance(training_windows(Windows(SEQUENCES, 4, epochs=3, seed=1), store=False), list)
    assert not files(tmp_path)


def test_few_windows_stay_in_memory(tmp_path):
    windows = Windows(SEQUENCES, 4, epochs=3, seed=1)
    assert isinstance(training_windows(windows), list)
    assert not files(tmp_path)
    recent = Windows(SEQUENCES, 4, epochs=3, seed=1, recent=True)
    assert recent.about == len(recent.all())
    assert len(windows.all()) / 2 < windows.about < 2 * len(windows.all())


def test_a_stage_learns_the_same_from_a_file(tiny_run, tmp_path, monkeypatch):
    run = load_run(tiny_run, ["light.num_train_epochs=2"])
    task = prepare(run)
    features = load_collaborative(run, task).features
    weights = []
    for many in (False, True):
        if many:
            monkeypatch.setattr(stored, "STORED_FROM", 1)
        stage = light_stage(run, task, features)
        fit(stage, folder=tmp_path / str(many), say=lambda _: None)
        weights.append({name: value.detach().clone() for name, value in stage.model.named_parameters()})
    assert files(tmp_path)
    assert all(np.array_equal(weights[0][name], value) for name, value in weights[1].items())

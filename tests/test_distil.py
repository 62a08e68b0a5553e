"""Distillation: the student learns what the teacher says of histories, and a teacher that knows the test is refused."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest

from recllm import distil
from recllm.collaborative import load_collaborative
from recllm.data import Query
from recllm.distil import FILE, LEFT_OUT, TransferHistories, check_teacher, taught_windows
from recllm.errors import RecllmError
from recllm.examples import Examples, NextItemCollator, WholeBatches, collate_counted
from recllm.fusion import FusedScorer, Fusion
from recllm.histories import HistoryFormat
from recllm.outcome import evaluate_run
from recllm.planning import plan_run
from recllm.ranking import ItemIndex
from recllm.runs import ENVIRONMENT, load_run, write_run
from recllm.scoring import known_scores, scorer_makers
from recllm.sequence import IGNORED, LightBody, NextItemModel
from recllm.tasks import LEARNT_BEFORE, keep_learnt, prepare
from recllm.train import train_run
from recllm.vectors import ItemFeatures
from recllm.windows import Taught, with_taught


def silent(_):
    return None


def override(key, value):
    return f"{key}={json.dumps(value if isinstance(value, int | float) else str(value))}"


@pytest.fixture
def student(tiny_run, tmp_path, monkeypatch):
    """A run that learns from `tiny_run`, not yet trained."""
    monkeypatch.setenv("RECLLM_CACHE", str(tiny_run.parent / "cache"))

    def run(**keys):
        keys = {
            "name": "student",
            "output": tmp_path,
            "model.name": "none",
            "light.teacher": tiny_run,
            "model.item_encoder": load_run(tiny_run).model.name,
        } | keys
        return load_run(tiny_run / "run.toml", [override(key, value) for key, value in keys.items()])

    return run


def test_transfer_histories_are_whole_first_and_then_with_parts_left_out():
    sequences = [np.arange(start, start + size) for start, size in ((0, 9), (100, 1), (200, 0), (300, 40))]
    found = list(TransferHistories(sequences, 50, seed=0))
    assert len(found) == 50
    assert sorted(read.tolist() for read, _ in found[:3]) == [rows.tolist() for rows in sequences if len(rows)]
    assert all(len(left) == 0 for _, left in found[:3])
    for read, left in found:
        assert len(read)
        whole = next(rows for rows in sequences if len(rows) and rows[0] == min([*read, *left]))
        assert sorted([*read, *left]) == whole.tolist()
        assert read.tolist() == sorted(read.tolist())  # in the order of the history
    shares = [len(left) / (len(read) + len(left)) for read, left in found[3:] if len(read) + len(left) == 40]
    assert 0.1 < np.mean(shares) < 0.4
    assert max(shares) < LEFT_OUT + 0.2
    assert [read.tolist() for read, _ in TransferHistories(sequences, 50, seed=0)] == [
        read.tolist() for read, _ in found
    ]
    assert list(TransferHistories([np.zeros(0, dtype=np.int64)], 5, seed=0)) == []


def test_what_is_taught_is_the_softmax_of_the_teachers_scores(student, tiny_run):
    run = student(**{"light.taught": 60, "light.taught_weight": 0.5, "light.max_history": 4})
    task = prepare(run)
    said = []
    rows = taught_windows(run, task, said.append)
    assert len(rows) == 60
    (scale,) = (float(line.split("softmax of ")[1].split()[0]) for line in said if "softmax" in line)
    teacher = load_run(tiny_run)
    parts = load_collaborative(teacher, task)
    fusion = Fusion.load(teacher.folder / "fusion.json")
    made = scorer_makers(teacher, task, parts)
    fused = FusedScorer({name: made[name]() for name in fusion.names}, fusion, task.split.train.item_counts())
    histories = list(TransferHistories(task.sequences(), 60, run.seed))
    for row, (read, left) in list(zip(rows, histories, strict=True))[::7]:
        query = next(iter(task.split.train.histories().values()))
        query = type(query)(tuple(task.index.ids[item] for item in read))
        (scores,) = fused.score([query], task.index)
        scores[[*read, *left]] = np.nan
        scores[~task.warm] = np.nan
        assert row.window[-1] == row.items[0] == np.nanargmax(scores)
        assert row.window[:-1].tolist() == read[-4:].tolist()
        assert sorted([*row.window[:-1], *row.hidden]) == sorted([*read, *left])
        assert not set(row.items[row.shares > 0]) & {*read.tolist(), *left.tolist()}
        assert row.shares.sum() == pytest.approx(0.5, rel=1e-5)
        odds = np.exp(scale * (scores - np.nanmax(scores))).astype(np.float64)
        expected = 0.5 * odds / np.nansum(odds)
        known = row.shares > 0
        assert row.shares[known] == pytest.approx(expected[row.items[known]], abs=1e-5)
    before = (run.folder / FILE).stat().st_mtime_ns
    again = taught_windows(run, task, said.append)
    assert (run.folder / FILE).stat().st_mtime_ns == before
    assert all(np.array_equal(one.items, two.items) for one, two in zip(rows, again, strict=True))


def test_a_teacher_is_asked_by_its_own_validation_whatever_rows_its_student_has(student, tiny_run, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "teacher")
    scores = tmp_path / "teacher" / "scores"
    wanted = {path.name: np.load(path) for path in scores.glob("*.npy") if "as-new" not in path.name}
    said = {}
    for name, rows in (("all", None), ("few", 5)):
        shutil.rmtree(scores, ignore_errors=True)  # as a search does that keeps its trials small
        keys = {"data.test_rows": rows} if rows else {}
        run = student(name=name, **keys, **{"light.teacher": tmp_path / "teacher", "light.taught": 20})
        task = prepare(run)
        # Rows that the student started from are not validated by it.
        task = replace(task, split=replace(task.split, valid=task.split.valid[3:])) if rows else task
        lines = []
        taught_windows(run, task, lines.append)
        (said[name],) = (line.split("softmax of ")[1] for line in lines if "softmax" in line)
        found = {path.name: np.load(path) for path in scores.glob("*.npy")}
        assert {name: own.shape for name, own in found.items()} == {name: own.shape for name, own in wanted.items()}
    assert said["all"] == said["few"]


def test_what_a_teacher_has_from_before_is_not_measured(student, tiny_run, tmp_path):
    """Its own training part is the student's; what it started from may have known more."""
    shutil.copytree(tiny_run, tmp_path / "taught")
    task, lines = prepare(load_run(tiny_run)), []
    row = task.split.test[0]
    before = pl.DataFrame({"user_id": [row.query.user_id], "item_id": [row.item_id]})
    before.write_parquet(tmp_path / "taught" / LEARNT_BEFORE)
    run = student(**{"light.teacher": tmp_path / "taught"})
    found = prepare(run, lines.append)
    assert len(found.split.test) == len(task.split.test) - 1
    assert lines[-1:] == [f"0 validation and 1 test rows are left out: '{tmp_path / 'taught'}' has learnt them"]
    keep_learnt(run, found)
    assert pl.read_parquet(run.folder / LEARNT_BEFORE).equals(before)


def test_a_batch_of_taught_windows_bars_what_is_hidden(student):
    run = student(**{"light.taught": 30, "light.max_history": 3})
    rows = taught_windows(run, prepare(run), silent)[-8:]
    batch = NextItemCollator(HistoryFormat((), (), 3, 1))(rows)
    assert (batch["labels"] != IGNORED).sum(1).tolist() == [1] * 8
    for place, row in enumerate(rows):
        assert batch["labels"][place][batch["labels"][place] != IGNORED].tolist() == [row.items[0]]
        assert [item for item in batch["hidden"][place].tolist() if item != IGNORED] == row.hidden.tolist()
    assert batch["taught"].shape == batch["shares"].shape


@pytest.mark.parametrize("tail", ["events", "taught"])
def test_rows_that_fill_up_the_batches_of_several_processes_teach_nothing(tail):
    """Two processes with two rows each; what is left over fills no round."""
    none = np.zeros(0, dtype=np.int64)
    taught = [
        Taught(np.array([place, place + 1]), none, np.array([place + 1, 9]), np.array([0.7, 0.3], dtype=np.float32))
        for place in range(4)
    ]
    windows = [np.arange(place, place + 3) for place in range(5)]
    rows = with_taught(windows, taught, passes=1, batch=4, seed=1) if tail == "events" else [*windows[:4], taught[0]]
    filled = WholeBatches(Examples(rows), 4)
    random = np.random.default_rng(0)
    features = ItemFeatures(
        ItemIndex(map(str, range(12))),
        random.normal(size=(12, 6)).astype(np.float32),
        random.normal(size=(12, 4)).astype(np.float32),
    )
    body = LightBody(8, layers=1, heads=2, positions=4, dropout=0.0)
    model = NextItemModel(body, features, width=8, head_width=8, warm=np.ones(12, dtype=bool), token_scale=1.0)
    collator = NextItemCollator(HistoryFormat((), (), 4, 1))
    losses = []
    for start in range(0, len(filled), 2):
        part = [filled[place] for place in range(start, start + 2)]
        losses.append(float(model(**collate_counted(collator, part), num_items_in_batch=1)["loss"].detach()))
    assert np.isfinite(losses).all()
    assert losses[-1] == 0.0  # the last process has nothing that counts
    alone = float(model(**collator(rows[-1:]), num_items_in_batch=1)["loss"].detach())
    assert losses[-2] == pytest.approx(alone, rel=1e-5)


def test_a_student_goes_on_without_its_teacher(student, tiny_run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_run, copy)
    run = student(**{"light.taught": 40, "light.teacher": copy})
    task = prepare(run)
    before = taught_windows(run, task, silent)
    shutil.rmtree(copy)
    again = taught_windows(run, task, silent)
    assert [row.items.tolist() for row in again] == [row.items.tolist() for row in before]
    write_run(run, run.folder / "run.toml")
    with pytest.raises(RecllmError, match="There is no run file"):
        train_run(run, overwrite=True, say=silent)
    assert (run.folder / FILE).is_file()  # told before anything is deleted
    train_run(run, resume=True, say=silent)
    assert (run.folder / "light" / "model.safetensors").is_file()


def test_a_student_learns_what_its_teacher_knows(student):
    """With one pass over the events, too few to learn them, and many histories of the teacher."""
    figures = {}
    for name in ("alone", "taught"):
        run = student(name=name, **{"light.num_train_epochs": 1, "light.taught_weight": 8.0, "light.taught": 6000})
        if name == "alone":
            run = run.model_copy(update={"light": run.light.model_copy(update={"teacher": None})})
        task = train_run(run, say=silent)
        scores = known_scores(run, task, load_collaborative(run, task), silent)["test"]
        figures[name] = evaluate_run(run, task, scores).interval("light", "NDCG@10")[0]
    assert figures["taught"] > 0.9
    assert figures["alone"] < figures["taught"] - 0.1


def test_a_plan_counts_the_taught_windows(student):
    plans = {taught: plan_run(student(**{"light.taught": taught}), silent) for taught in (64, 640)}
    few, many = (plan.costs[0] for plan in plans.values())
    assert many.rows - few.rows == 20 * (640 - 64)
    assert not list((student().folder.parent).rglob(FILE))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"data.split": "temporal"}, r"data\.split is 'temporal' here and 'leave-last-out' in light\.teacher"),
        (
            {"data.min_events": 6},
            r"data\.min_events is 6 here and 4 .* learnt from the rows that this run is measured on",
        ),
        ({"data.duplicates": "last"}, r"data\.duplicates is 'last' here and 'first' in light\.teacher"),
        ({"data.like_at": 3.0}, r"data\.like_at is 3\.0 here and 4\.0 in light\.teacher"),
        ({"light.teacher": "nowhere"}, r"no run file"),
        ({"name": "tiny", "output": "OUTPUT"}, r"light\.teacher is this run itself"),
        ({"model.task": "relevance"}, r"light\.teacher is for model\.task = 'next_item'"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(student, tiny_run, keys, message):
    keys = {key: tiny_run.parent if value == "OUTPUT" else value for key, value in keys.items()}
    with pytest.raises(RecllmError, match=message):
        check_teacher(student(**keys))


def test_the_seed_of_shots_has_to_be_the_teachers(student, tiny_run, tmp_path):
    """Which rows of a set's own training part are learnt from is drawn by it; the last events are the same by any."""
    assert check_teacher(student(seed=1)).folder == tiny_run
    folder = shutil.copytree(tiny_run, tmp_path / "few")
    text = (folder / "run.toml").read_text(encoding="utf-8")
    text = text.replace('split = "leave-last-out"', 'split = "given"\nshots = 8')
    (folder / "run.toml").write_text(text, encoding="utf-8")
    keys = {"data.split": "given", "data.shots": 8, "light.teacher": folder}
    assert check_teacher(student(**keys)).folder == folder
    with pytest.raises(RecllmError, match=r"data\.seed is 1 here and 0 in light\.teacher"):
        check_teacher(student(seed=1, **keys))


def test_an_unfinished_teacher_is_refused(student, tiny_run, tmp_path):
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "run.toml").write_text((tiny_run / "run.toml").read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(
        RecllmError, match=r"begun' is not trained to its end. Go on with it first: recllm train .*begun --resume"
    ):
        check_teacher(student(**{"light.teacher": tmp_path / "begun"}))


def test_a_teacher_of_other_data_is_refused(student, tiny_run, tmp_path):
    copy = tmp_path / "other"
    shutil.copytree(tiny_run, copy)
    environment = json.loads((copy / "environment.json").read_text(encoding="utf-8"))
    environment["data"]["interactions"] = "0" * 64
    (copy / "environment.json").write_text(json.dumps(environment), encoding="utf-8")
    run = student(**{"light.teacher": copy})
    with pytest.raises(RecllmError, match=r"interactions of .* are not those that .*other was trained on"):
        taught_windows(run, prepare(run), silent)


def test_a_teacher_over_other_weights_is_not_asked(student, tiny_run, tmp_path):
    folder = shutil.copytree(tiny_run, tmp_path / "moved")
    facts = json.loads((folder / ENVIRONMENT).read_text(encoding="utf-8"))
    facts["models"] = dict.fromkeys(facts["models"], "0" * 16)
    (folder / ENVIRONMENT).write_text(json.dumps(facts), encoding="utf-8")
    run = student(**{"light.teacher": folder})
    with pytest.raises(RecllmError, match=r"has other weights now .* than those that .*moved was trained over"):
        taught_windows(run, prepare(run), silent)
    assert not (run.folder / FILE).is_file()


@pytest.mark.parametrize("new", [np.nan, 9.0, 90.0])
def test_a_teachers_scores_are_scaled_by_items_with_events_alone(new, monkeypatch):
    """Nothing is taught of other items, however high their scores are."""
    index, random = ItemIndex(["a", "b", "c", "new"]), np.random.default_rng(0)
    scores = np.column_stack([random.normal(size=(50, 3)), np.full(50, new)]).astype(np.float32)
    likely = np.exp(2.0 * scores[:, :3]) / np.exp(2.0 * scores[:, :3]).sum(1, keepdims=True)
    targets = [random.choice(3, p=row) for row in likely]
    rows = [
        SimpleNamespace(query=Query(()), item_id=index.ids[3 if place < 5 else item])
        for place, item in enumerate(targets)
    ]
    task = SimpleNamespace(index=index, warm=np.array([True, True, True, False]), repeats=True)
    protocol = SimpleNamespace(examples=lambda _: rows, fuse=lambda _, given, __: given["own"])
    monkeypatch.setattr(distil, "prepare", lambda _: task)
    monkeypatch.setattr(distil, "evaluation_protocol", lambda *_: protocol)
    monkeypatch.setattr(distil, "load_collaborative", lambda *_: None)
    monkeypatch.setattr(distil, "known_scores", lambda *_: {"valid": {"own": scores}})
    assert distil._scale(SimpleNamespace(seed=0), None, silent) == pytest.approx(2.0, rel=0.4)

"""The task of a run: read, split and indexed in one order, checked before anything trains."""

import json
from contextlib import nullcontext

import numpy as np
import polars as pl
import pytest

from recllm.errors import RecllmError
from recllm.resuming import check_same_data
from recllm.runs import Run
from recllm.tasks import prepare


@pytest.fixture
def folder(checkerboard, tmp_path):
    data = tmp_path / "board"
    data.mkdir()
    checkerboard.interactions.frame.write_csv(data / "interactions.csv")
    checkerboard.catalog.frame.write_csv(data / "items.csv")
    return data


def task_of(folder, **data):
    return prepare(Run.model_validate({"name": "x", "data": {"name": str(folder)} | data}))


def test_the_catalogues_order_is_everywhere(folder, checkerboard):
    task = task_of(folder)
    assert task.index.ids == checkerboard.catalog.ids
    counts = task.split.train.item_counts()
    assert task.item_counts.tolist() == [counts.get(item, 0) for item in task.index.ids]
    histories = task.split.train.histories()
    assert len(task.sequences()) == len(histories) == 40
    assert [task.index.ids[row] for row in task.sequences()[3]] == list(histories["u3"].history)
    assert task.fingerprints() == {
        "interactions": task.dataset.interactions.fingerprint(),
        "catalog": checkerboard.catalog.fingerprint(),
    }


def test_what_comes_next_is_held_out(folder):
    task = task_of(folder)
    assert len(task.split.valid) == len(task.split.test) == 40
    for example in [*task.split.valid, *task.split.test]:
        last = int(example.query.history[-1])
        assert example.item_id == str((last + 2) % 24)
        assert last % 2 == int(example.query.user_id[1:]) % 2


def test_cold_items_have_no_training_event(folder):
    task = task_of(folder, split="cold-items", cold_share=0.2)
    cold = task.index.rows(task.split.cold_items)
    assert 0 < len(cold) < 24
    assert not task.warm[cold].any()
    slices = task.slices(task.split.test)
    targets = task.index.rows(example.item_id for example in task.split.test)
    assert np.array_equal(slices["cold item"], np.isin(targets, cold))


def test_another_seed_makes_other_items_cold(folder):
    def cold(seed):
        data = {"name": str(folder), "split": "cold-items", "cold_share": 0.3}
        return prepare(Run.model_validate({"name": "x", "seed": seed, "data": data})).split.cold_items

    assert cold(1) == cold(1)
    assert len({cold(seed) for seed in range(4)}) > 1


def test_a_split_that_leaves_nothing_says_what_to_change(folder):
    with pytest.raises(RecllmError, match=r"No user has 99 events.*lower data\.min_events to 3"):
        task_of(folder, min_events=99)


def test_a_test_part_alone_is_not_enough(folder, checkerboard):
    """Three events a user: none has the four warm ones that validation asks for."""
    checkerboard.interactions.frame.filter(pl.col("seq") < 3).write_csv(folder / "interactions.csv")
    with pytest.raises(
        RecllmError, match=r"leaves 0 validation and \d+ test events\. Bring .* lower data\.min_events \(now 4\)"
    ):
        task_of(folder, split="cold-items")


def test_a_given_split_may_know_items_that_the_catalogue_has_not_but_not_only_such(folder):
    rows = {
        part: [{"user_id": part, "item_id": item, "label": 1, "history": ["1", "2", "gone"]} for item in ("3", "4")]
        for part in ("train", "valid", "test")
    }
    for part, own in rows.items():
        pl.DataFrame(own).write_ndjson(folder / f"{part}.jsonl")
    values, said = {"name": "x", "data": {"name": str(folder), "split": "given"}}, []
    task = prepare(Run.model_validate(values), said.append)
    assert said[-1:] == ["1 of 5 items of the given split are not in the catalogue ('gone', …)"]
    ids = np.array(task.index.ids)
    assert [ids[own].tolist() for own in task.sequences()] == [["1", "2", "3", "4"]]
    for part, own in rows.items():
        pl.DataFrame([row | {"item_id": "X", "history": ["Y"]} for row in own]).write_ndjson(folder / f"{part}.jsonl")
    with pytest.raises(RecllmError, match=r"has none of the given split's 2 items, such as 'X'; its own are like '0'"):
        prepare(Run.model_validate(values))


def test_rows_of_a_given_split_are_a_part_of_what_was_read(folder):
    for part in ("train", "valid", "test"):
        rows = [{"user_id": part, "item_id": item, "label": 1, "history": ["1", "2"]} for item in ("3", "4", "5")]
        pl.DataFrame(rows).write_ndjson(folder / f"{part}.jsonl")
    before = task_of(folder, split="given").fingerprints()
    assert task_of(folder, split="given").fingerprints() == before
    pl.DataFrame(rows[::-1]).write_ndjson(folder / "test.jsonl")  # scores are kept by place
    after = task_of(folder, split="given").fingerprints()
    assert [name for name in before if before[name] != after[name]] == ["given rows"]
    run = Run.model_validate({"name": "x", "output": str(folder), "data": {"name": "board"}})
    run.folder.mkdir()
    for kept, refused in ((before, True), (after, False), ({"catalog": before["catalog"]}, False)):
        (run.folder / "environment.json").write_text(json.dumps({"data": kept}), encoding="utf-8")
        with pytest.raises(RecllmError, match=r"The given rows of 'board' are not") if refused else nullcontext():
            check_same_data(run, after)


def test_rows_that_ask_for_what_is_no_candidate_are_left_out_before_anything_trains(folder):
    for part in ("train", "valid", "test"):
        rows = [
            {"user_id": f"{part}{place}", "item_id": item, "label": 1, "history": ["1", "2"]}
            for place, item in enumerate(["3", "4", "retired" if part == "test" else "5"])
        ]
        pl.DataFrame(rows).write_ndjson(folder / f"{part}.jsonl")
    values, said = {"name": "x", "data": {"name": str(folder), "split": "given"}}, []
    task = prepare(Run.model_validate(values), said.append)
    assert [row.item_id for row in task.split.test] == ["3", "4"]
    assert len(task.split.valid) == 3
    assert said[-1].startswith("1 of 3 test rows ask for an item that is not in the catalogue")
    judged = prepare(Run.model_validate(values | {"model": {"task": "relevance", "name": "none", "item_encoder": "x"}}))
    assert len(judged.split.test) == 3  # a pair can be judged by what is known of the user


def test_cold_items_keep_to_the_fewest_events_of_validation(folder):
    task = task_of(folder, split="cold-items", cold_share=0.2)
    counts = {user: len(query.history) for user, query in task.split.train.histories().items()}
    most = max(counts.values()) + 1  # a user's validation event is not among those of training
    few = task_of(folder, split="cold-items", cold_share=0.2, min_events=most)
    assert 0 < len(few.split.valid) < len(task.split.valid)
    assert {row.query.user_id for row in few.split.valid} == {
        user for user, count in counts.items() if count + 1 == most
    }


def test_what_reading_warns_of_is_told(folder):
    events = pl.read_csv(folder / "interactions.csv", infer_schema=False)
    lost = events.with_columns(
        timestamp=pl.when(pl.int_range(pl.len()) % 40 == 7).then(pl.lit("x")).otherwise("timestamp")
    )
    lost.write_csv(folder / "interactions.csv")
    said = []
    prepare(Run.model_validate({"name": "x", "data": {"name": str(folder)}}), said.append)
    assert any("board: warning: " in line and "rows dropped" in line for line in said), said


def test_unknown_data_is_named(tmp_path):
    with pytest.raises(RecllmError, match=r"ml-100"):
        task_of("ml-100")


def test_rows_of_a_given_split_that_tell_their_own_answer_or_stand_in_both_parts_are_told(folder):
    row = {"user_id": "u0", "item_id": "5", "label": 1, "history": ["0", "2"]}
    for part, rows in (("train", [row]), ("valid", [row | {"item_id": "7"}]), ("test", [row | {"item_id": "9"}])):
        pl.DataFrame(rows).write_parquet(folder / f"{part}.parquet")
    values, said = {"name": "x", "data": {"name": str(folder), "split": "given"}}, []
    prepare(Run.model_validate(values), said.append)
    assert not any("rows" in line for line in said)
    said.clear()
    again = [row | {"item_id": "7"}, row | {"item_id": "2"}, row | {"item_id": "9"}]
    pl.DataFrame(again).write_parquet(folder / "test.parquet")
    prepare(Run.model_validate(values), said.append)
    assert "1 of 3 test rows have the item that they ask for in their own history (user 'u0', item '2')" in said[-2]
    assert "1 of 3 test rows are of a user and an item that stand in validation too (user 'u0', item '7')" in said[-1]

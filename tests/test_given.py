"""Given splits: rows with their own histories and labels, and nothing of validation or test in the training events."""

import polars as pl
import pytest

from recllm.data import Query
from recllm.errors import RecllmError
from recllm.given import given_split
from recllm.splits import Example, check_no_leak

TRAIN = [
    {"user_id": "u", "item_id": "b", "label": 1, "history": ["a"], "history_label": [0], "timestamp": 7},
    {"user_id": "v", "item_id": "a", "label": 0, "history": [], "history_label": [], "timestamp": 8},
    {
        "user_id": "u",
        "item_id": "c",
        "label": 0,
        "history": ["a", "b", "x"],
        "history_label": [0, 1, 1],
        "timestamp": 9,
    },
]
LATER = [{"user_id": "u", "item_id": "d", "label": 1, "history": ["b", "c"], "history_label": [1, 0], "timestamp": 11}]


def write(folder, part, rows, **renamed):
    pl.DataFrame(rows).rename(renamed).write_parquet(folder / f"{part}.parquet")


@pytest.fixture
def folder(tmp_path):
    for part, rows in (("train", TRAIN), ("valid", LATER), ("test", LATER)):
        write(tmp_path, part, rows)
    return tmp_path


def test_rows_keep_their_own_histories_and_labels(folder):
    split = given_split(folder)
    assert split.name == "given"
    assert split.test == [Example(Query(("b", "c"), "u", (1.0, 0.0)), "d", 1.0)]
    assert split.train_rows[1] == Example(Query((), "v", ()), "a", 0.0)
    check_no_leak(split)


def test_training_events_are_the_train_rows_and_what_their_histories_add(folder):
    frame = given_split(folder).train.frame
    events = frame.select("user_id", "item_id", "rating", "timestamp", "seq").rows()
    assert events == [
        ("u", "a", 0.0, None, 0),
        ("u", "b", 1.0, 7, 1),
        ("u", "x", 1.0, None, 2),
        ("u", "c", 0.0, 9, 3),
        ("v", "a", 0.0, 8, 0),
    ]


def test_labels_of_histories_and_times_are_optional_and_the_item_may_be_called_target(tmp_path):
    for part in ("train", "valid", "test"):
        rows = [{name: row[name] for name in ("user_id", "item_id", "label", "history")} for row in TRAIN]
        write(tmp_path, part, rows, item_id="target")
    split = given_split(tmp_path)
    assert split.valid[0] == Example(Query(("a",), "u"), "b", 1.0)
    assert split.train.frame["rating"].to_list() == [None, 1.0, None, 0.0, 0.0]
    assert split.train.frame["timestamp"].null_count() == 5


def test_few_shots_are_rows_drawn_by_the_seed(folder):
    seen = {tuple(row.item_id for row in given_split(folder, shots=2, seed=seed).train_rows) for seed in range(12)}
    assert seen <= {("b", "a"), ("b", "c"), ("a", "c")}
    assert len(seen) > 1
    few = given_split(folder, shots=2, seed=0)
    assert few.train_rows == given_split(folder, shots=2, seed=0).train_rows
    assert {row.item_id for row in few.train_rows} <= set(few.train.item_counts())
    assert given_split(folder, shots=9).train_rows == given_split(folder).train_rows


def test_json_lines_work_too(folder):
    pl.read_parquet(folder / "test.parquet").write_ndjson(folder / "test.jsonl")
    (folder / "test.parquet").unlink()
    assert given_split(folder).test[0].query.history == ("b", "c")


def test_a_missing_part_is_named(folder):
    (folder / "valid.parquet").unlink()
    with pytest.raises(RecllmError, match=r"has no valid.parquet or valid.jsonl. Put the part's rows there, or choose"):
        given_split(folder)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"label": 3}, r"test.parquet: row 1 has a label that is neither 0 nor 1 \(as 1 of 1 rows\)"),
        ({"history_label": [1]}, "row 1 has not one history_label per history item"),
        ({"user_id": None}, "row 1 needs a user_id, an item_id and a label"),
        ({"history": "b c"}, "a column has the wrong kind .*history must be a list of ids"),
    ],
)
def test_a_wrong_row_is_named(folder, changed, message):
    write(folder, "test", [LATER[0] | changed])
    with pytest.raises(RecllmError, match=message):
        given_split(folder)


def test_a_missing_column_is_named(folder):
    write(folder, "test", LATER, item_id="film")
    with pytest.raises(
        RecllmError, match=r"test.parquet has no column 'item_id' or 'target'. Its columns: user_id, film,"
    ):
        given_split(folder)

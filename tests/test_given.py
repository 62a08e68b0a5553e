"""Given splits: rows with their own histories and labels, and nothing of validation or test in the training events."""

from datetime import UTC, datetime, timedelta

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
    split = given_split(tmp_path, rated_histories=False)
    assert split.valid[0] == Example(Query(("a",), "u"), "b", 1.0)
    assert split.train.frame["rating"].to_list() == [None, 1.0, None, 0.0, 0.0]
    assert split.train.frame["timestamp"].null_count() == 5


def test_training_events_are_in_order_of_time_whatever_the_order_of_the_file(folder):
    before = given_split(folder).train.frame
    write(folder, "train", TRAIN[::-1])
    assert given_split(folder).train.frame.equals(before)


def test_ratings_of_histories_become_likes_and_dislikes(folder):
    for part, rows in (("train", TRAIN), ("valid", LATER), ("test", LATER)):
        rated = [row | {"history_label": [1.0 + 4.0 * label for label in row["history_label"]]} for row in rows]
        write(folder, part, rated, history_label="history_ratings")
    split = given_split(folder)
    assert split.test[0].query.ratings == (1.0, 0.0)
    assert split.train.frame["rating"].to_list() == [0.0, 1.0, 1.0, 0.0, 0.0]
    strict = given_split(folder, like_at=6.0)
    assert strict.test[0].query.ratings == (0.0, 0.0)


def test_ids_are_read_as_a_catalogue_reads_them(folder):
    numbers = [{"user_id": 7.0, "item_id": 50.0, "label": 1, "history": [3.0, 10.0]}]
    for part in ("train", "valid", "test"):
        write(folder, part, numbers)
    assert given_split(folder).test == [Example(Query(("3", "10"), "7"), "50", 1.0)]
    write(folder, "test", [{"user_id": " u ", "item_id": "a ", "label": 1, "history": [" b"]}])
    assert given_split(folder).test == [Example(Query(("b",), "u"), "a", 1.0)]


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
        ({"history_label": [1, 3]}, "row 1 has a history_label that is neither 0 nor 1"),
        ({"history": ["b", " "]}, "row 1 has an empty id in its history"),
        ({"user_id": None}, "row 1 needs a user_id, an item_id and a label"),
        ({"label": "yes"}, "'label' is expected to be 0 or 1"),
        ({"history": "b c"}, "'history' is expected to be a list of ids"),
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


def rows_of(user, labels, **more):
    """Train rows of one user, "a" first, whose histories hold what was liked before."""
    items = "abcdefghijklmnopqrst"[: len(labels)]
    liked = [[item for item, label in zip(items[:at], labels, strict=False) if label] for at in range(len(labels))]
    return [
        {"user_id": user, "item_id": item, "label": label, "history": history, "timestamp": 10 + at} | more
        for at, (item, label, history) in enumerate(zip(items, labels, liked, strict=True))
    ]


def split_of(folder, train, later, **options):
    for part, rows in (("train", train), ("valid", later), ("test", later)):
        write(folder, part, rows)
    return given_split(folder, **options)


def test_histories_without_labels_get_those_of_the_train_rows_and_what_they_leave_out(tmp_path):
    train = [{**row, "history": ["o", *row["history"]]} for row in rows_of("u", [0, 1, 0, 0, 1, 0])]
    later = {"user_id": "u", "item_id": "z", "label": 1, "history": ["o", "b", "e", "y"], "timestamp": 90}
    split = split_of(tmp_path, train, [later, later | {"user_id": "w"}, later | {"timestamp": 12}])
    known, unknown, early = split.test
    # "o" is as old as nobody knows, and "y" came after the train rows: neither has a label.
    assert known.query.history == ("o", "a", "b", "c", "d", "e", "f", "y")
    assert known.query.ratings == (None, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0, None)
    assert unknown.query == Query(("o", "b", "e", "y"), "w", (None, None, None, None))
    assert early.query == Query(("o", "a", "b", "c", "e", "y"), "u", (None, 0.0, 1.0, 0.0, None, None))
    plain = split_of(tmp_path, train, [later], rated_histories=False)
    assert plain.test[0].query == Query(("o", "b", "e", "y"), "u")
    assert plain.train.frame.equals(split.train.frame)


def test_parts_with_times_of_other_units_and_forms_are_of_one_clock(tmp_path):
    start = 1_600_000_000
    train = [{**row, "timestamp": 1000 * (start + row["timestamp"]) + 250} for row in rows_of("u", [0, 1, 0, 0, 1, 0])]
    later = {"user_id": "u", "item_id": "z", "label": 1, "history": ["b", "e"]}
    early = datetime.fromtimestamp(start + 12, UTC)
    half = early + timedelta(milliseconds=500)
    moments = (early.replace(tzinfo=None), early.isoformat(), half.isoformat())
    for moment, liked in zip(moments, ("ab", "ab", "abc"), strict=True):
        split = split_of(tmp_path, train, [later | {"timestamp": moment}])
        query = split.test[0].query
        rated = [item for item, rating in zip(query.history, query.ratings, strict=True) if rating is not None]
        assert rated == list(liked)  # what the history names beside that came after
    assert split.train.frame["timestamp"].to_list() == [start + 10 + at for at in range(6)]
    with pytest.raises(
        RecllmError, match=r"valid.parquet: row 1 has a timestamp that is no time .*1970 to 2200 \('soon'\)"
    ):
        split_of(tmp_path, train, [later | {"timestamp": "soon"}])


def test_numbers_that_are_no_times_are_an_order_all_the_same(tmp_path):
    train = [{**row, "timestamp": row["timestamp"] - 20} for row in rows_of("u", [0, 1, 0, 0, 1, 0])]
    later = {"user_id": "u", "item_id": "z", "label": 1, "history": ["b", "e"], "timestamp": -8}
    query = split_of(tmp_path, train, [later]).test[0].query
    rated = [item for item, rating in zip(query.history, query.ratings, strict=True) if rating is not None]
    assert rated == ["a", "b", "c"]


@pytest.mark.parametrize("wrong", [-1.0, float("inf")])
def test_a_number_that_is_no_time_takes_no_units_away_from_the_others(wrong, tmp_path):
    start = 1_600_000_000
    train = [{**row, "timestamp": float(1000 * (start + row["timestamp"]))} for row in rows_of("u", [0, 1, 0])]
    later = {"user_id": "u", "item_id": "z", "label": 1, "history": ["b"], "timestamp": float(start + 30)}
    write(tmp_path, "train", train)
    write(tmp_path, "valid", [later])
    write(tmp_path, "test", [later, later | {"timestamp": wrong}])
    with pytest.raises(RecllmError, match=r"test.parquet: row 2 has a timestamp that is no time"):
        given_split(tmp_path)
    write(tmp_path, "test", [later, later | {"timestamp": float("nan")}])  # none at all
    assert len(given_split(tmp_path).test) == 2


def test_a_train_row_knows_no_label_of_its_own_or_later_rows_and_often_fewer(tmp_path):
    train = [row for user in range(60) for row in rows_of(f"user {user}", [user % 2, 0, 1, 0, 1, 1, 0, 1])]
    split = split_of(tmp_path, train, train[-1:])
    shown = []
    for example, row in zip(split.train_rows, train, strict=True):
        before = dict(zip("abcdefgh"[: row["timestamp"] - 10], split_labels(train, row), strict=True))
        rated = {
            item: rating
            for item, rating in zip(example.query.history, example.query.ratings, strict=True)
            if rating is not None
        }
        assert rated.items() <= before.items()
        assert list(rated) == list(before)[: len(rated)]  # the oldest ones: some point in time
        assert set(example.query.history) == {*row["history"], *rated}
        if row["timestamp"] == 17:
            shown.append(len(rated))
    assert shown.count(0) > 10
    assert shown.count(7) > 10
    assert len(set(shown)) > 4
    assert split.train_rows == given_split(tmp_path).train_rows


def split_labels(train, row):
    return [other["label"] for other in train if other["user_id"] == row["user_id"]][: row["timestamp"] - 10]


def test_a_rows_own_label_is_not_in_its_history_where_the_event_stands_twice(tmp_path):
    train = rows_of("u", [0, 1, 0, 1])
    again = [{**row, "timestamp": row["timestamp"] + 20} for row in train]
    split = split_of(tmp_path, [*train, *again], [{**train[0], "timestamp": 90}])
    for example in [*split.train_rows, *split.test]:
        own = [
            rating
            for item, rating in zip(example.query.history, example.query.ratings, strict=True)
            if item == example.item_id
        ]
        assert own in ([], [None])
    with pytest.raises(RecllmError, match=r"[Ll]eak"):
        check_no_leak(split_of(tmp_path, train, [{**train[0], "timestamp": 90}], rated_histories=False))
    with pytest.raises(RecllmError, match=r"[Ll]eak"):
        check_no_leak(split_of(tmp_path, train, [{**train[0], "timestamp": 90}]))


def test_a_missing_label_in_a_history_is_no_dislike(tmp_path):
    train = [{**TRAIN[0], "history_label": [float("nan")]}, {**TRAIN[1], "history_label": None}]
    split = split_of(tmp_path, train, [LATER[0] | {"history_label": [1.0, float("nan")]}])
    assert split.test[0].query.ratings == (1.0, None)
    assert split.train_rows[0].query.ratings == (None,)
    assert split.train.frame["rating"].to_list() == [None, 1.0, 0.0]


def test_histories_with_labels_and_rows_that_are_all_liked_are_left_alone(folder, tmp_path):
    assert given_split(folder).train_rows == given_split(folder, rated_histories=False).train_rows
    liked = rows_of("u", [1, 1, 1])
    split = split_of(tmp_path, liked, liked[-1:])
    assert split.train_rows[2].query == Query(("a", "b"), "u")


def test_rows_in_another_order_than_time_are_put_in_order(tmp_path):
    train = rows_of("u", [0, 1, 0])[::-1]
    later = {"user_id": "u", "item_id": "z", "label": 1, "history": ["b"], "timestamp": 90}
    assert split_of(tmp_path, train, [later]).test[0].query == Query(("a", "b", "c"), "u", (0.0, 1.0, 0.0))
    untimed = [{key: value for key, value in row.items() if key != "timestamp"} for row in train]
    split = split_of(tmp_path, untimed, [{key: later[key] for key in later if key != "timestamp"}])
    assert split.test[0].query == Query(("c", "b", "a"), "u", (0.0, 1.0, 0.0))


def test_neighbouring_rows_know_the_earlier_ones_up_to_the_same_point(tmp_path):
    """So the history of one goes on from another's: here over stretches of 40 rows."""
    train = [
        {"user_id": f"u{user}", "item_id": f"i{at}", "label": at % 2, "history": [], "timestamp": at}
        for user in range(30)
        for at in range(100)
    ]
    rows = split_of(tmp_path, train, train[-1:]).train_rows
    points = []
    for start in range(0, len(rows), 100):
        for block in (range(40), range(40, 80), range(80, 100)):
            known = [len(rows[start + at].query.history) for at in block]
            point = max(known)
            assert known == [min(at, point) for at in block]
            points.append(point / max(block))
    assert points.count(0.0) > 10
    assert points.count(1.0) > 20
    assert sum(0.0 < point < 1.0 for point in points) > 5


def test_ratings_in_one_part_leave_the_labels_of_the_others_alone(folder):
    rated = [{**row, "history_ratings": [2 + 3 * own for own in row["history_label"]]} for row in TRAIN]
    write(folder, "train", [{key: own for key, own in row.items() if key != "history_label"} for row in rated])
    split = given_split(folder)
    assert split.valid[0].query.ratings == (1.0, 0.0)
    assert split.train_rows[2].query.ratings == (0.0, 1.0, 1.0)

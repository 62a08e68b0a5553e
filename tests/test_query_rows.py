"""Rows of a job: counted before they are read, in order, and a file of another kind is named."""

import json
from decimal import Decimal

import polars as pl
import pytest

from recllm.data import Query
from recllm.errors import RecllmError
from recllm.query_rows import BadRow, history_items, read_rows
from recllm.rowfiles import count_rows


def test_decimal_ids_are_whole_numbers(tmp_path):
    path = tmp_path / "in.parquet"
    ids = pl.Series("user_id", [Decimal(12), None, Decimal("1.5")], dtype=pl.Decimal(10, 1))
    history = pl.Series("history", [[Decimal(3), Decimal(40)]] * 3, dtype=pl.List(pl.Decimal(38, 0)))
    pl.DataFrame([ids, history]).write_parquet(path)
    rows = list(read_rows(path))
    assert [(row.user_id, row.history) for row in rows[:2]] == [("12", ("3", "40")), ("line 2", ("3", "40"))]
    assert "Decimal('1.5') is no id" in rows[2].reason


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".csv"])
def test_rows_are_counted_before_they_are_read(suffix, tmp_path):
    path = tmp_path / f"in{suffix}"
    if suffix == ".parquet":
        pl.DataFrame({"history": [["0", "2"], ["1"], []]}).write_parquet(path)
    elif suffix == ".jsonl":
        path.write_text('{"history": ["0", "2"]}\n{"history": ["1"]}\n{"history": []}\n', encoding="utf-8")
    else:
        path.write_text("history\n0 2\n1\n[]\n", encoding="utf-8")
    assert count_rows(path) == 3


def test_parquet_rows_come_in_order_from_many_row_groups(tmp_path, monkeypatch):
    monkeypatch.setattr("recllm.rowfiles.PARQUET_ROWS", 16)
    frame = pl.DataFrame({"history": [[row, row + 1] for row in range(200)], "text": ["x"] * 200})
    frame.write_parquet(tmp_path / "in.parquet", row_group_size=24)
    rows = list(read_rows(tmp_path / "in.parquet"))
    assert [row.history for row in rows] == [(str(row), str(row + 1)) for row in range(200)]
    assert [row.line for row in rows] == list(range(1, 201))
    assert not any(isinstance(row, BadRow) for row in rows)


def test_a_file_that_is_no_parquet_is_named(tmp_path):
    (tmp_path / "in.parquet").write_bytes(b"user_id,history\n")
    with pytest.raises(RecllmError, match="is not a Parquet file that can be read"):
        read_rows(tmp_path / "in.parquet")


def test_lists_in_lists_in_lists_are_a_bad_row_and_no_end(tmp_path):
    deep = "[" * 100_000
    path = tmp_path / "rows.jsonl"
    lines = ['{"history": ["1"]}', deep, json.dumps({"history": deep}), '{"history": ["2"]}']
    path.write_text("\n".join(lines), encoding="utf-8")
    assert [isinstance(row, BadRow) for row in read_rows(path)] == [False, True, True, False]


def test_a_user_id_by_another_name_is_not_lost_without_a_word(tmp_path):
    """A log's `customer` is guessed to be its user; rows that ask would be named by their lines."""
    path = tmp_path / "rows.csv"
    path.write_text("userId,history\nalice,1\n", encoding="utf-8")
    with pytest.raises(
        RecllmError, match="has no column 'user_id', and one 'userId': call it user_id, or leave it out"
    ):
        read_rows(path)
    path = tmp_path / "rows.jsonl"
    lines = ['{"customer": "alice", "history": ["1"]}', '{"history": ["1"]}', '{"user": {"age": 3}, "history": ["1"]}']
    path.write_text("\n".join([*lines, '{"customer": null, "history": ["1"]}']), encoding="utf-8")
    bad, *named_by_line = read_rows(path)
    assert bad.reason == "no 'user_id', and a 'customer': call it user_id, or leave it out"
    assert [row.user_id for row in named_by_line] == ["line 2", "line 3", "line 4"]


def test_a_user_who_is_no_number_has_no_name(tmp_path):
    path = tmp_path / "rows.parquet"
    pl.DataFrame({"user_id": [7.0, float("nan")], "history": [["1"], ["2"]]}).write_parquet(path)
    assert [row.user_id for row in read_rows(path)] == ["7", "line 2"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("50 181", ("50", "181")),
        ("['50', '181']", ("50", "181")),
        ("[50.0, 181]", ("50", "181")),
        ('["it\'s"]', ("it's",)),
        ("[]", ()),
        ("['50' '181']", ("50", "181")),  # an array of NumPy's: Python itself would read the id 50181
        ("['50'\n 'it\\'s' \"x y\"]", ("50", "it's", "x y")),
        ("['50,1']", ("50,1",)),
    ],
)
def test_a_text_of_ids_in_any_of_its_ways(text, found):
    assert history_items(text) == found


@pytest.mark.parametrize("text", ["['50', 181", "[50, 181", "['50'] + [x]", "[null]", "[__import__('os')]"])
def test_a_text_that_is_no_list_names_its_column(text):
    with pytest.raises(ValueError, match=r"'history' is .*, which begins as a JSON list and is none|None is no id"):
        history_items(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("0,2", r"has commas: part ids by blanks or \|, or write a JSON list"),
        ("0, 2, 4", "has commas"),
        ("['1' '2', '3']", "has two ids without a comma between them"),
        ("['1' ... '9']", "begins as a JSON list and is none"),
    ],
)
def test_a_text_that_could_be_read_in_two_ways_is_not_read(text, reason):
    with pytest.raises(ValueError, match=rf"'history' is .*, which {reason}"):
        history_items(text)


def test_a_blank_user_is_none(tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text('{"user_id": "  ", "history": ["1"]}\n', encoding="utf-8")
    assert [row.user_id for row in read_rows(source)] == ["line 1"]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_a_rating_that_is_no_number_is_one_that_is_missing(suffix, tmp_path):
    source = tmp_path / f"in{suffix}"
    if suffix == ".parquet":
        pl.DataFrame({"history": [["1", "2", "3"]], "ratings": [[5.0, float("nan"), None]]}).write_parquet(source)
    else:
        source.write_text('{"history": ["1", "2", "3"], "ratings": [5, NaN, null]}\n', encoding="utf-8")
    (row,) = read_rows(source, ratings=True)
    assert row.ratings == (5.0, None, None)
    assert row.query.has_ratings


def test_a_blank_history_is_looked_up_where_there_is_a_log_and_a_user_and_else_is_empty(tmp_path):
    source = tmp_path / "in.csv"
    source.write_text("user_id,history\nu,\n,\nu,7\n", encoding="utf-8")
    alone = read_rows(source)
    assert [(row.user_id, row.history) for row in alone] == [("u", ()), ("line 3", ()), ("u", ("7",))]
    logged = read_rows(source, histories={"u": Query(("1", "2"), "u")})
    assert [(row.user_id, row.history) for row in logged] == [("u", ("1", "2")), ("line 3", ()), ("u", ("7",))]


def test_of_two_columns_of_one_name_none_is_guessed(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("user_id,history,history\na,2 4,3 5\n", encoding="utf-8")
    with pytest.raises(RecllmError, match=r"has two columns called 'history'\. Rename"):
        read_rows(path)

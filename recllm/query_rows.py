"""Rows that ask: `user_id`, `history`, `ratings`, `candidates` from Parquet, JSONL or CSV, bad ones with the reason."""

import csv
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from recllm.data import Query
from recllm.errors import RecllmError, unknown

SUFFIXES = (".parquet", ".jsonl", ".ndjson", ".csv", ".tsv")
COLUMNS = ("user_id", "history", "ratings", "candidates")
PARQUET_ROWS = 4096
"""Rows of a Parquet file that are decoded together."""
BLOCK = 1 << 20


@dataclass(frozen=True)
class QueryRow:
    """One row of the input.

    Attributes:
        line: its line in the file, from 1, the header counted; in Parquet the row.
        user_id: as it was given, else "line 3", which no user is called.
        history: item ids, oldest first.
        ratings: one for each item of the history, None for an item without one; None where the row has none.
        candidates: the items to score, where rows name them.
        fields: the row as it was read.
    """

    line: int
    user_id: str
    history: tuple[str, ...]
    ratings: tuple[float | None, ...] | None
    candidates: tuple[str, ...]
    fields: Mapping[str, Any]

    @property
    def query(self) -> Query:
        """What a scorer is asked."""
        return Query(self.history, self.user_id, self.ratings)


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be answered, and why."""

    line: int
    reason: str
    fields: Any


def read_rows(
    path: Path,
    *,
    histories: Mapping[str, Query] | None = None,
    need: tuple[str, ...] = (),
    ratings: bool = False,
) -> Iterator[QueryRow | BadRow]:
    """Read `path` row by row, whatever its size.

    `history` is a list of item ids, oldest first; in CSV a text of ids parted by blanks or `|`, or a JSON list.
    `ratings`, where there are any, is as long a list of numbers, null for an item without one. A row with only
    `user_id` takes its history, and its ratings, from `histories`.

    Args:
        path: Parquet, JSONL, CSV or TSV.
        histories: by user id.
        need: further columns that every row must have.
        ratings: whether ratings are read; else no row has any.

    Raises:
        RecllmError: no such file, an empty one, an unknown kind, or columns that answer nothing.
    """
    check_source(path)
    columns = _columns(path)
    if columns is not None:
        _check_columns(path, columns, histories is not None, need)
    return (parse_row(line, fields, histories, need, ratings=ratings) for line, fields in _raw(path))


def check_source(path: Path) -> None:
    """Check that `path` is a file of a kind that is read.

    Raises:
        RecllmError: it is not.
    """
    if not path.is_file():
        raise RecllmError(f"There is no file '{path}'.")
    if path.suffix.lower() not in SUFFIXES:
        raise unknown("kind of file", path.name, [f"*{suffix}" for suffix in SUFFIXES])
    if path.stat().st_size == 0:
        raise RecllmError(f"{path} is empty; rows with 'history' or 'user_id' are expected.")


def count_rows(path: Path) -> int:
    """Rows of the file; of a text file its lines, which a quoted line break makes a little more."""
    check_source(path)
    if path.suffix.lower() == ".parquet":
        return int(_scan(path).select(pl.len()).collect().item())
    with path.open("rb") as stream:
        lines = sum(block.count(b"\n") for block in iter(lambda: stream.read(BLOCK), b""))
    return max(lines - (path.suffix.lower() in (".csv", ".tsv")), 1)


def _columns(path: Path) -> list[str] | None:
    """The file's columns; None for JSONL, where each row has its own."""
    if path.suffix.lower() == ".parquet":
        return _scan(path).collect_schema().names()
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        return None
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as stream:
        return next(csv.reader(stream, delimiter=_delimiter(path)), [])


def _check_columns(path: Path, columns: list[str], lookup: bool, need: tuple[str, ...]) -> None:
    missing = [name for name in need if name not in columns]
    if missing or not {"history", "user_id"} & set(columns):
        wanted = "', '".join(missing) or "history' or 'user_id"
        raise RecllmError(
            f"{path} has no column '{wanted}'. Its columns: {', '.join(columns)}. "
            "'history' holds item ids, oldest first."
        )
    if "history" not in columns and not lookup:
        raise RecllmError(
            f"{path} has 'user_id' and no 'history', and a bundle does not hold users' histories. Add a "
            "column 'history' (item ids, oldest first), or name the log that they are in: --interactions FILE"
        )


def _raw(path: Path) -> Iterator[tuple[int, Any]]:
    """Line and fields of every row; a text in place of fields is why the row cannot be read."""
    kind = path.suffix.lower()
    if kind == ".parquet":
        return _parquet(path)
    return _jsonl(path) if kind in (".jsonl", ".ndjson") else _csv(path)


def _parquet(path: Path) -> Iterator[tuple[int, Any]]:
    frame = _scan(path)
    names = [name for name in frame.collect_schema().names() if name in COLUMNS]
    line = 0
    for batch in frame.select(names).collect_batches(chunk_size=PARQUET_ROWS, maintain_order=True):
        for fields in batch.iter_rows(named=True):
            line += 1
            yield line, fields


def _scan(path: Path) -> pl.LazyFrame:
    try:
        frame = pl.scan_parquet(path, glob=False)
        frame.collect_schema()
    except pl.exceptions.PolarsError as error:
        raise RecllmError(
            f"{path} is not a Parquet file that can be read: {' '.join(str(error).split())[:200]}"
        ) from None
    return frame


def _jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open(encoding="utf-8-sig", errors="replace") as stream:
        for line, text in enumerate(stream, start=1):
            if not text.strip():
                continue
            try:
                yield line, json.loads(text)
            except (ValueError, RecursionError) as error:
                yield line, _Unreadable(f"not JSON ({error})", text.rstrip("\n"))


def _csv(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as stream:
        rows = csv.reader(stream, delimiter=_delimiter(path))
        header = next(rows, [])
        while True:
            try:
                row = next(rows, None)
            except csv.Error as error:
                yield rows.line_num, _Unreadable(f"not CSV ({error})", None)
                continue
            if row is None:
                return
            if not row:
                continue
            if len(row) != len(header):
                reason = f"{len(row)} fields, the header has {len(header)}; a history with commas needs quotes"
                yield rows.line_num, _Unreadable(reason, row)
            else:
                yield rows.line_num, dict(zip(header, row, strict=True))


@dataclass(frozen=True)
class _Unreadable:
    reason: str
    text: Any


def _delimiter(path: Path) -> str:
    return "\t" if path.suffix.lower() == ".tsv" else ","


def parse_row(
    line: int,
    fields: Any,  # noqa: ANN401  what JSON holds
    histories: Mapping[str, Query] | None = None,
    need: tuple[str, ...] = (),
    *,
    ratings: bool = False,
) -> QueryRow | BadRow:
    """A row out of its fields, as `read_rows` says, or why it cannot be answered."""
    if isinstance(fields, _Unreadable):
        return BadRow(line, fields.reason, fields.text)
    if not isinstance(fields, dict):
        return BadRow(line, "not a JSON object", fields)
    try:
        given = fields.get("user_id")
        user = None if given in (None, "") or given != given else _identifier(given)  # NaN is a missing value
        history, rated = _history(fields, user, histories, ratings=ratings)
        candidates = _items("candidates", fields.get("candidates")) if "candidates" in need else ()
        if "candidates" in need and not candidates:
            raise ValueError("no 'candidates', the item ids to score")
    except (ValueError, RecursionError) as error:  # the second one of lists in lists in lists
        return BadRow(line, str(error), fields)
    return QueryRow(line, f"line {line}" if user is None else user, history, rated, candidates, fields)


def _history(
    fields: Mapping[str, Any], user: str | None, histories: Mapping[str, Query] | None, *, ratings: bool
) -> tuple[tuple[str, ...], tuple[float | None, ...] | None]:
    """The history of a row and its ratings."""
    given = fields.get("history")
    looked_up = given == "" and user is not None and histories is not None  # a blank of CSV is a missing value
    if given is not None and not looked_up:
        items = _items("history", given)
        return items, _ratings(fields.get("ratings"), len(items)) if ratings else None
    if user is None:
        raise ValueError("neither 'history' nor 'user_id'")
    if histories is None:
        raise ValueError("no 'history'; for rows with only a user_id name the log: --interactions FILE")
    if user not in histories:
        raise ValueError(f"unknown user '{user}': the interactions have no event of this user")
    return histories[user].history, histories[user].ratings if ratings else None


def _ratings(given: Any, items: int) -> tuple[float | None, ...] | None:  # noqa: ANN401
    """Numbers from a list, or from a text of them, null or NaN for an item without one; None for a missing value."""
    if given is None or given == "":
        return None
    if isinstance(given, str):
        given = split_ids(given)
    if not isinstance(given, list):
        raise ValueError(f"'ratings' is {_named(given)}, not a list of numbers")
    try:
        numbers = (None if value is None else float(value) for value in given)
        found = tuple(None if value is None or math.isnan(value) else value for value in numbers)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"'ratings' is {_named(given)}, not a list of numbers") from None
    if not all(math.isfinite(value) for value in found if value is not None):
        raise ValueError(f"'ratings' is {_named(given)}, and not all of it are finite numbers")
    if len(found) != items:
        raise ValueError(f"'ratings' has {len(found)} numbers, and 'history' {items} items; each item needs one")
    return found


def _items(name: str, given: Any) -> tuple[str, ...]:  # noqa: ANN401
    """Item ids from a list, or from a text of them."""
    if isinstance(given, str):
        given = split_ids(given)
    if not isinstance(given, list):
        raise ValueError(f"'{name}' is {_named(given)}, not a list of item ids")
    return tuple(_identifier(item) for item in given)


def split_ids(text: str) -> list[Any]:
    """Ids out of a text: a JSON list, or ids parted by `|` or by blanks.

    >>> split_ids("50 181"), split_ids("50|181"), split_ids('["50", 181]')
    (['50', '181'], ['50', '181'], ['50', 181])
    """
    text = text.strip()
    if text.startswith("["):
        return list(json.loads(text))
    return [part.strip() for part in text.split("|") if part.strip()] if "|" in text else text.split()


def _identifier(value: Any) -> str:  # noqa: ANN401
    """An id as text; a whole number that became a float, as a missing one in its column makes it, loses its `.0`."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError(f"{_named(value)} is no id")
    text = str(value).strip()
    if not text.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError(f"{text!a:.60} has half of a character, which no file can hold")
    return text


def _named(value: Any) -> str:  # noqa: ANN401
    return f"{value!r:.60}"

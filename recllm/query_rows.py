"""Rows that ask: `user_id`, `history`, `ratings`, `candidates` from Parquet, JSONL or CSV, bad ones with the reason."""

import ast
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recllm.data import Query
from recllm.data.columns import EVENT_COLUMNS, squeezed
from recllm.data.texts import identifier
from recllm.errors import RecllmError
from recllm.rowfiles import Unreadable, check_source, columns_of, raw_rows

QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""")
"""A text as Python writes it."""
COLUMNS = ("user_id", "history", "ratings", "candidates")


@dataclass(frozen=True)
class QueryRow:
    """One row of the input.

    Attributes:
        line: its line in the file, from 1, the header counted; in Parquet the row.
        user_id: as it was given, without the blanks around it; else "line 3", which no user is called.
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
    columns = columns_of(path)
    if columns is not None:
        _check_columns(path, columns, histories is not None, need)
    return (parse_row(line, fields, histories, need, ratings=ratings) for line, fields in raw_rows(path, COLUMNS))


def _check_columns(path: Path, columns: list[str], lookup: bool, need: tuple[str, ...]) -> None:
    missing = [name for name in need if name not in columns]
    if missing or not {"history", "user_id"} & set(columns):
        wanted = "', '".join(missing) or "history' or 'user_id"
        raise RecllmError(
            f"{path} has no column '{wanted}'. Its columns: {', '.join(columns)}. "
            "'history' holds item ids, oldest first."
        )
    twice = next((name for name in (*COLUMNS, *need) if columns.count(name) > 1), None)
    if twice is not None:
        raise RecllmError(f"{path} has two columns called '{twice}'. Rename the one that is not meant.")
    if "user_id" not in columns and (other := _meant(columns)):
        raise RecllmError(f"{path} has no column 'user_id', and one '{other}': call it user_id, or leave it out.")
    if "history" not in columns and not lookup:
        raise RecllmError(
            f"{path} has 'user_id' and no 'history', and a bundle does not hold users' histories. Add a "
            "column 'history' (item ids, oldest first), or name the log that they are in: --interactions FILE"
        )


def parse_row(
    line: int,
    fields: Any,  # noqa: ANN401  what JSON holds
    histories: Mapping[str, Query] | None = None,
    need: tuple[str, ...] = (),
    *,
    ratings: bool = False,
) -> QueryRow | BadRow:
    """A row out of its fields, as `read_rows` says, or why it cannot be answered."""
    if isinstance(fields, Unreadable):
        return BadRow(line, fields.reason, fields.text)
    if not isinstance(fields, dict):
        return BadRow(line, "not a JSON object", fields)
    try:
        given = fields.get("user_id")
        if "user_id" not in fields and (other := _meant(fields)) and _is_id(fields[other]):
            raise ValueError(f"no 'user_id', and a '{other}': call it user_id, or leave it out")
        user = None if given in (None, "") or given != given else identifier(given) or None  # NaN is a missing value
        history, rated = _history(fields, user, histories, ratings=ratings)
        asked = fields.get("candidates") if "candidates" in need else None
        candidates = () if asked is None else _items("candidates", asked)
        if "candidates" in need and not candidates:
            raise ValueError("no 'candidates', the item ids to score")
    except (ValueError, RecursionError) as error:  # the second one of lists in lists in lists
        return BadRow(line, str(error), fields)
    return QueryRow(line, f"line {line}" if user is None else user, history, rated, candidates, fields)


def _meant(columns: Iterable[str]) -> str:
    """The column that a log's user ids would be taken from; empty where there is none."""
    by_name = {squeezed(name): name for name in columns if isinstance(name, str)}
    return next((by_name[name] for name in EVENT_COLUMNS["user_id"] if name in by_name), "")


def _is_id(value: Any) -> bool:  # noqa: ANN401  what JSON holds
    return isinstance(value, str | int) and not isinstance(value, bool) and bool(str(value).strip())


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


def history_items(text: str) -> tuple[str, ...]:
    """Item ids out of a text, as a field of CSV holds them.

    Raises:
        ValueError: it is no list of ids.
    """
    return _items("history", text)


def _items(name: str, given: Any) -> tuple[str, ...]:  # noqa: ANN401
    """Item ids from a list, or from a text of them."""
    if isinstance(given, str):
        try:
            given = split_ids(given)
        except ValueError as error:
            raise ValueError(f"'{name}' is {_named(given)}, which {_told(error)}") from None
    if not isinstance(given, list):
        raise ValueError(f"'{name}' is {_named(given)}, not a list of item ids")
    return tuple(identifier(item) for item in given)


def _told(error: ValueError) -> str:
    return f"begins as a JSON list and is none ({error})" if isinstance(error, json.JSONDecodeError) else str(error)


def split_ids(text: str) -> list[Any]:
    """Ids out of a text: a JSON list, one of Python's or NumPy's (which pandas writes), or ids parted by `|` or blanks.

    >>> split_ids("50 181"), split_ids("50|181"), split_ids('["50", 181]'), split_ids("['50', 181]")
    (['50', '181'], ['50', '181'], ['50', 181], ['50', 181])
    >>> split_ids("['50' '181']")
    ['50', '181']

    Raises:
        ValueError: a list that is none, or commas outside of one: an id may have one, so they part nothing.
    """
    text = text.strip()
    if text.startswith("["):
        try:
            return list(json.loads(text))
        except ValueError:
            if "'" not in text:
                raise
            return _python_list(text)
    if "," in text:
        raise ValueError("has commas: part ids by blanks or |, or write a JSON list")
    return [part.strip() for part in text.split("|") if part.strip()] if "|" in text else text.split()


def _python_list(text: str) -> list[Any]:
    texts = QUOTED.findall(text)
    if texts and QUOTED.sub("", text).split() in (["[", "]"], ["[]"]):  # NumPy's: no commas, which Python would join
        return [ast.literal_eval(each) for each in texts]
    try:
        found = list(ast.literal_eval(text))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise ValueError("begins as a JSON list and is none (not a list of ids)") from None
    if sum(isinstance(each, str) for each in found) != len(texts):
        raise ValueError("has two ids without a comma between them")
    return found


def _named(value: Any) -> str:  # noqa: ANN401
    return f"{value!r:.60}"

"""Given splits: a data set's own train, validation and test rows, each with its own history and label."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl

from recllm.data import Interactions, Query
from recllm.data.tables import open_table
from recllm.errors import RecllmError
from recllm.splits import Example, Split

PARTS = ("train", "valid", "test")
SUFFIXES = ("parquet", "jsonl", "ndjson")
"""Kinds of file that hold lists."""
NAMES = {
    "user_id": ("user_id",),
    "item_id": ("item_id", "target"),
    "label": ("label",),
    "history": ("history",),
    "ratings": ("history_label", "history_ratings"),
    "timestamp": ("timestamp",),
}
"""Our name of a column to the names it goes by."""
OPTIONAL = ("ratings", "timestamp")
EVENTS = {
    "user_id": pl.String,
    "item_id": pl.String,
    "rating": pl.Float32,
    "timestamp": pl.Int64,
    "seq": pl.Int32,
}

Row = tuple[str, str, float, list[str], list[float] | None, int | None]


def given_split(folder: Path, *, shots: int | None = None, seed: int = 0) -> Split:
    """Read `train`, `valid` and `test` of a data set (Parquet or JSON lines).

    Columns: user_id, item_id (or target), label (0 or 1), history (item ids, oldest first); and where there are any
    history_label (one per history item) and timestamp. The training interactions are the train rows and their
    histories, and nothing of the other two parts. With `shots`, of so many train rows, drawn by `seed`.

    Raises:
        RecllmError: a part or a column is missing, a label is neither 0 nor 1, or a history and its labels differ in
            length.
    """
    train, valid, test = (_rows(_file(folder, part)) for part in PARTS)
    if shots is not None and shots < len(train):
        train = [train[place] for place in np.sort(np.random.default_rng(seed).permutation(len(train))[:shots])]
    return Split("given", _interactions(train), _examples(valid), _examples(test), train_rows=_examples(train))


def _file(folder: Path, part: str) -> Path:
    for suffix in SUFFIXES:
        if (path := folder / f"{part}.{suffix}").is_file():
            return path
    raise RecllmError(
        f"data.split is 'given', and '{folder}' has no {part}.parquet or {part}.jsonl. Put the part's rows there, or "
        "choose another data.split, as leave-last-out."
    )


def _rows(path: Path) -> list[Row]:
    table = open_table(path)
    found = {role: next((name for name in names if name in table.columns), None) for role, names in NAMES.items()}
    for role, name in found.items():
        if name is None and role not in OPTIONAL:
            wanted = " or ".join(f"'{name}'" for name in NAMES[role])
            raise RecllmError(f"{path} has no column {wanted}. Its columns: {', '.join(table.columns)}.")
    frame = table.read(name for name in found.values() if name is not None)
    frame = frame.rename({name: role for role, name in found.items() if name is not None})
    frame = frame.with_columns(pl.lit(None).alias(role) for role in OPTIONAL if found[role] is None)
    try:
        frame = frame.select(
            pl.col("user_id", "item_id").cast(pl.String),
            pl.col("label").cast(pl.Float64),
            pl.col("history").cast(pl.List(pl.String)).fill_null([]),
            pl.col("ratings").cast(pl.List(pl.Float64)),
            pl.col("timestamp").cast(pl.Int64),
        )
    except pl.exceptions.PolarsError as error:
        reason = str(error).splitlines()[0]
        raise RecllmError(f"{path}: a column has the wrong kind ({reason}); history must be a list of ids.") from None
    _check(frame, path)
    return list(frame.iter_rows())


def _check(frame: pl.DataFrame, path: Path) -> None:
    checks = {
        "needs a user_id, an item_id and a label": pl.any_horizontal(pl.col("user_id", "item_id", "label").is_null()),
        "has a label that is neither 0 nor 1": ~pl.col("label").is_in([0.0, 1.0]),
        "has not one history_label per history item": pl.col("ratings").list.len() != pl.col("history").list.len(),
    }
    for message, wrong in checks.items():
        places = frame.select(wrong.fill_null(False).arg_true()).to_series()
        if len(places):
            raise RecllmError(f"{path}: row {places[0] + 1} {message} (as {len(places):,} of {len(frame):,} rows).")


def _examples(rows: list[Row]) -> list[Example]:
    return [
        Example(Query(tuple(history), user, None if ratings is None else tuple(ratings)), item, label)
        for user, item, label, history, ratings, _ in rows
    ]


def _interactions(rows: list[Row]) -> Interactions:
    """Events of the train rows; a history item that is no row itself stands before the first row that knows it."""
    users: dict[str, list[Row]] = {}
    for row in rows:
        users.setdefault(row[0], []).append(row)
    events = [(user, *event, seq) for user, own in users.items() for seq, event in enumerate(_events(own))]
    return Interactions(pl.DataFrame(events, schema=EVENTS, orient="row"))


def _events(rows: list[Row]) -> Iterator[tuple[str, float | None, int | None]]:
    targets = {item for _, item, *_ in rows}
    seen: set[str] = set()
    for _, item, label, history, ratings, timestamp in rows:
        for place, earlier in enumerate(history):
            if earlier not in targets and earlier not in seen:
                seen.add(earlier)
                yield earlier, None if ratings is None else ratings[place], None
        yield item, label, timestamp

"""Given splits: a data set's own train, validation and test rows, each with its own history and label."""

import bisect
import hashlib
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import polars as pl

from recllm.data import Interactions, Query
from recllm.data.checks import Checks
from recllm.data.tables import POLARS_FAILS, open_table
from recllm.data.texts import as_id_lists, as_ids
from recllm.data.times import as_seconds
from recllm.errors import RecllmError
from recllm.files import sha256_of
from recllm.splits import LIKE_AT, Example, Split

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

Row = tuple[str, str, float, list[str], list[float | None] | None, float | None]
UNKNOWN_SHARE, WHOLE_SHARE = 1 / 3, 1 / 3
"""Shares of stretches whose user is taken for unknown, and of those that know all of the user's earlier rows."""
NEIGHBOURS = 40
"""Train rows of a user, one after the other, that know the earlier ones up to the same point."""


def given_split(
    folder: Path, *, shots: int | None = None, rated_histories: bool = True, like_at: float = LIKE_AT, seed: int = 0
) -> Split:
    """Read `train`, `valid` and `test` of a data set (Parquet or JSON lines).

    Columns: user_id, item_id (or target), label (0 or 1), history (item ids, oldest first); and where there are any
    history_label (one per history item, 0 or 1; or history_ratings, which are likes from `like_at` on) and timestamp.
    The training interactions are the train rows and their histories, in order of time, and nothing of the other two
    parts, whose rows are asked after all of it, whatever their times. With `shots`, of so many train rows, drawn by
    `seed`.

    With `rated_histories`, rows whose histories have no labels get them from the user's earlier train rows, and the
    items of such rows that the history leaves out, as the disliked ones, are put where they belong in it. A row of
    validation or test may know all of the user's train rows, some or none, and so may a train row: of a third of all
    stretches of a user's neighbouring rows the user is taken for unknown, a third know the earlier ones up to one point
    of the whole, which may lie behind them, and a third know them all.

    Raises:
        RecllmError: a part or a column is missing, a label is neither 0 nor 1, an id in a history is empty, a
            timestamp is no time, or a history and its labels differ in length.
    """
    train, valid, test = _parts([_file(folder, part) for part in PARTS], like_at)
    if shots is not None and shots < len(train):
        train = [train[place] for place in np.sort(np.random.default_rng(seed).permutation(len(train))[:shots])]
    known = _interactions(train)
    if rated_histories and any(row[2] == 0.0 for row in train):
        judged = _Judged(train)
        valid, test = ([judged.completed(row) for row in part] for part in (valid, test))
        train = [judged.completed(row, place) for place, row in enumerate(train)]
    return Split("given", known, _examples(valid), _examples(test), train_rows=_examples(train))


def given_fingerprint(folder: Path) -> str:
    """A digest of the files of a given split: what is learnt and measured comes from them.

    Raises:
        RecllmError: a part is missing.
    """
    parts = "".join(sha256_of(_file(folder, part)) for part in PARTS)
    return hashlib.sha256(parts.encode()).hexdigest()


def _file(folder: Path, part: str) -> Path:
    for suffix in SUFFIXES:
        if (path := folder / f"{part}.{suffix}").is_file():
            return path
    raise RecllmError(
        f"data.split is 'given', and '{folder}' has no {part}.parquet or {part}.jsonl. Put the part's rows there, or "
        "choose another data.split, as leave-last-out."
    )


def _parts(paths: Sequence[Path], like_at: float) -> list[list[Row]]:
    read = [_frame(path) for path in paths]
    frames, rated = _on_one_clock([frame for frame, _ in read], paths), [own for _, own in read]
    labels = [frame["ratings"].explode() for frame, own in zip(frames, rated, strict=True) if own]
    if labels and not pl.concat(labels).drop_nulls().is_in([0.0, 1.0]).all():
        # Beside labels of 0 and 1 ratings would be read on their scale.
        liked = pl.col("ratings").list.eval((pl.element() >= like_at).cast(pl.Float64))
        frames = [frame.with_columns(liked) if own else frame for frame, own in zip(frames, rated, strict=True)]
    return [list(frame.iter_rows()) for frame in frames]


def _frame(path: Path) -> tuple[pl.DataFrame, bool]:
    """The rows of a part by our names, and whether its histories have ratings in place of labels."""
    table = open_table(path)
    found = {role: next((name for name in names if name in table.columns), None) for role, names in NAMES.items()}
    for role, name in found.items():
        if name is None and role not in OPTIONAL:
            wanted = " or ".join(f"'{name}'" for name in NAMES[role])
            raise RecllmError(f"{path} has no column {wanted}. Its columns: {', '.join(table.columns)}.")
    frame = table.read(name for name in found.values() if name is not None)
    frame = frame.rename({name: role for role, name in found.items() if name is not None})
    frame = frame.with_columns(pl.lit(None).alias(role) for role in OPTIONAL if found[role] is None)
    numbers = pl.col("ratings").cast(pl.List(pl.Float64)).list.eval(pl.element().fill_nan(None))
    made: dict[str, tuple[Callable[[], pl.Series | pl.Expr], str]] = {
        "user_id": (lambda: as_ids(frame["user_id"]), "text or numbers"),
        "item_id": (lambda: as_ids(frame["item_id"]), "text or numbers"),
        "label": (lambda: pl.col("label").cast(pl.Float64), "0 or 1"),
        "history": (lambda: as_id_lists(frame["history"]), "a list of ids"),
        "ratings": (lambda: numbers, "a list of numbers"),
    }
    columns = [frame["timestamp"]]
    for role, (make, wanted) in made.items():
        try:
            columns.append(frame.select(make()).to_series())
        except POLARS_FAILS as error:
            reason = str(error).splitlines()[0]
            raise RecllmError(f"{path}: '{found[role]}' is expected to be {wanted} ({reason}).") from None
    rated = found["ratings"] == "history_ratings"
    result = pl.DataFrame(columns).select(*made, "timestamp")
    _check(result, path, "history_ratings" if rated else "history_label")
    return result, rated


def _on_one_clock(frames: list[pl.DataFrame], paths: Sequence[Path]) -> list[pl.DataFrame]:
    """Times as seconds since 1970, float64, whatever unit and form a part has them in; null where there is none.

    Numbers that are no such times stay as they are where no other number has been brought to seconds: they say an
    order at least.
    """
    given = [frame["timestamp"] for frame in frames]
    given = [column.fill_nan(None) if column.dtype.is_float() else column for column in given]
    read = [
        column.cast(pl.Float64) if column.dtype == pl.Null else as_seconds(column, Checks(), path.name)
        for column, path in zip(given, paths, strict=True)
    ]
    if all(_is_order(column, seconds) for column, seconds in zip(given, read, strict=True)):
        read = [column.cast(pl.Float64) for column in given]
    for column, seconds, path in zip(given, read, paths, strict=True):
        unread = (seconds.is_null() & column.is_not_null()).arg_true()
        if len(unread):
            raise RecllmError(
                f"{path}: row {unread[0] + 1} has a timestamp that is no time of the years 1970 to 2200 "
                f"({column[unread[0]]!r}): seconds, a date or ISO 8601 is expected."
            )
    return [frame.with_columns(times.alias("timestamp")) for frame, times in zip(frames, read, strict=True)]


def _is_order(column: pl.Series, seconds: pl.Series) -> bool:
    """Whether a part's times are finite numbers, of which none was read in another unit than that of seconds."""
    if column.dtype == pl.Null:
        return True
    if not column.dtype.is_numeric():
        return False
    raw = column.cast(pl.Float64)
    return bool((raw.is_null() | (raw.is_finite() & (seconds.is_null() | (seconds == raw)))).all())


def _check(frame: pl.DataFrame, path: Path, ratings: str) -> None:
    checks: dict[str, pl.Expr] = {
        "needs a user_id, an item_id and a label": pl.any_horizontal(pl.col("user_id", "item_id", "label").is_null()),
        "has a label that is neither 0 nor 1": ~pl.col("label").is_in([0.0, 1.0]),
        "has an empty id in its history": pl.col("history").list.eval(pl.element().is_null()).list.any(),
        f"has not one {ratings} per history item": pl.col("ratings").list.len() != pl.col("history").list.len(),
    }
    if ratings == "history_label":
        known = pl.element().is_null() | pl.element().is_in([0.0, 1.0])
        checks["has a history_label that is neither 0 nor 1"] = ~pl.col("ratings").list.eval(known).list.all()
    for message, wrong in checks.items():
        places = frame.select(wrong.fill_null(False).arg_true()).to_series()
        if len(places):
            raise RecllmError(f"{path}: row {places[0] + 1} {message} (as {len(places):,} of {len(frame):,} rows).")


def _examples(rows: list[Row]) -> list[Example]:
    return [
        Example(Query(tuple(history), user, None if ratings is None else tuple(ratings)), item, label)
        for user, item, label, history, ratings, _ in rows
    ]


class _Judged:
    """Every user's train rows in order of time; ties, and rows without a time, as in the file."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.users: dict[str, list[tuple[float, int, str, float]]] = {}
        for place, (user, item, label, _, _, timestamp) in enumerate(rows):
            self.users.setdefault(user, []).append((_time(timestamp), place, item, label))
        for own in self.users.values():
            own.sort()

    def completed(self, row: Row, place: int | None = None) -> Row:
        """The row with labels in its history, as `given_split` says; `place` is that of a train row."""
        user, item, label, history, ratings, timestamp = row
        if ratings is not None:
            return row
        own = self.users.get(user, [])
        if place is not None:
            before = own[: _shown(user, bisect.bisect_left(own, (_time(timestamp), place)), len(own))]
        else:
            before = [event for event in own if timestamp is None or event[0] <= timestamp]
        labels = {event[2]: event[3] for event in before if event[2] != item}  # its own label, if it stands twice
        ranks = {earlier: rank for rank, earlier in enumerate(labels)}
        told = set(history)
        left_out = deque(earlier for earlier in labels if earlier not in told)
        # Behind its last labelled item a history has what came after the train rows.
        behind = max((at + 1 for at, earlier in enumerate(history) if earlier in ranks), default=0)
        merged: list[str] = []
        for earlier in history[:behind]:
            while left_out and ranks[left_out[0]] < ranks.get(earlier, -1):
                merged.append(left_out.popleft())
            merged.append(earlier)
        merged += [*left_out, *history[behind:]]
        return user, item, label, merged, [labels.get(earlier) for earlier in merged], timestamp


def _time(timestamp: float | None) -> float:
    return -math.inf if timestamp is None else timestamp


def _shown(user: str, earlier: int, rows: int) -> int:
    """How many of `earlier` train rows of a user with `rows` of them a train row knows: the same in every run.

    Neighbours know them up to the same point, so that the history of one goes on from another's.
    """
    block = earlier // NEIGHBOURS
    digest = hashlib.blake2b(f"{user}\0{block}".encode(), digest_size=4).digest()
    drawn = int.from_bytes(digest) / 2**32
    if drawn < UNKNOWN_SHARE:
        return 0
    if drawn >= 1 - WHOLE_SHARE:
        return earlier
    last = min(rows, (block + 1) * NEIGHBOURS)
    return min(earlier, int((drawn - UNKNOWN_SHARE) / (1 - UNKNOWN_SHARE - WHOLE_SHARE) * last))


def _interactions(rows: list[Row]) -> Interactions:
    """Events of the train rows in order of time; a history item that is no row stands before the first that knows it.

    Rows of one time, and those without one, are in the order of the file.
    """
    users: dict[str, list[Row]] = {}
    for row in rows:
        users.setdefault(row[0], []).append(row)
    events = [(user, *event, seq) for user, own in users.items() for seq, event in enumerate(_events(_in_time(own)))]
    return Interactions(pl.DataFrame(events, schema=EVENTS, orient="row"))


def _in_time(rows: list[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: _time(row[-1]))


def _events(rows: list[Row]) -> Iterator[tuple[str, float | None, int | None]]:
    targets = {item for _, item, *_ in rows}
    seen: set[str] = set()
    for _, item, label, history, ratings, timestamp in rows:
        for place, earlier in enumerate(history):
            if earlier not in targets and earlier not in seen:
                seen.add(earlier)
                yield earlier, None if ratings is None else ratings[place], None
        yield item, label, None if timestamp is None else math.floor(timestamp)

"""Normalise interactions: ids, ratings, time stamps, duplicates, order."""

from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from typing import Literal

import polars as pl

from recllm.data.checks import LINES_SHOWN, Checks
from recllm.data.columns import squeezed
from recllm.data.tables import LINE, Table, check_kinds, note_columns_twice, note_rows_in_quotes
from recllm.data.texts import as_ids, stripped
from recllm.data.times import as_seconds, holds_times
from recllm.errors import RecllmError

Duplicates = Literal["first", "last", "keep"]
"""Which event of one user with one item stays: the first in time, the last, or all."""

WEIGHT = "weight"
TIME = "_time"  # float64 seconds: the fraction orders events that share a second
MISSING = ("NULL", "null", "NaN", "nan", "NA", "N/A", "None", "<NA>")
"""How databases and pandas write a missing value as text."""
LISTED = r'^(\[(".*"|-?\d[-+.\deE, ]*)?\]|\{(".*)?\})$'
"""A list of texts or numbers or an object, as JSON that stands among single ids is read."""
EXACT = {"Float32": 2**24, "Float64": 2**53}
"""From here on floats of a kind leave whole numbers out."""
DATED_ROWS = 1000
"""Rows by which a column is seen to hold dates."""
KINDS_OF_EVENTS = {"event", "eventtype", "eventname", "action", "actiontype", "behavior", "behaviour", "behaviortype"}
"""What a column of kinds of events is called, without what stands between its words."""
MOST_KINDS = 12
"""A column of more values holds something else."""
EXTRA = "extra "
"""Before the name of a column that is kept as it is: it may be called as one of ours."""


def normalise_events(
    table: Table,
    mapping: Mapping[str, str],
    duplicates: Duplicates,
    checks: Checks,
    extra: Sequence[str] = (),
) -> pl.DataFrame:
    """Interactions as `Interactions.frame` describes them, with `LINE`; what was dropped or odd goes to `checks`.

    Columns of the file that are named in `extra` are kept as they are, under their name behind `EXTRA`.

    A user's events are ordered by `seq` where the file has one for each of them, else by time, ties in file order;
    without times by `seq`, those that have none last, and without both as in the file. Users stand in the order of
    their first event in time (then by id), without times in file order, so that the same events give the same table in
    whatever order the file holds the users.

    Raises:
        RecllmError: a column holds no single values, an event weight is no positive number, or no row is left.
    """
    raw = table.read(dict.fromkeys([*mapping.values(), *extra]))
    check_kinds(table, raw, [*mapping.values(), *extra])
    note_columns_twice(table, checks)
    note_rows_in_quotes(table, raw.height, checks)
    columns = {role: stripped(raw[column].alias(role)) for role, column in mapping.items()}
    frame = pl.DataFrame(
        [
            raw[LINE],
            as_ids(columns["user_id"]),
            as_ids(columns["item_id"]),
            _ratings(columns.get("rating"), raw[LINE], checks, table.path.name),
            _times(columns.get("timestamp"), raw.height, checks, table.path.name),
            _places(columns.get("seq"), raw[LINE], checks, table.path.name),
            *([_numbers(columns["event_weight"], WEIGHT, raw.height)] if "event_weight" in columns else []),
            *(raw[name].alias(EXTRA + name) for name in extra),
        ]
    )
    _note_large_floats(columns, checks, table.path.name)
    checks.facts |= {"rows_read": raw.height, "columns": dict(mapping)}
    checks.facts["columns_left_out"] = [name for name in table.columns if name not in mapping.values()]
    _note_kinds(table, [*mapping.values(), *extra], checks)
    timed = frame[TIME].null_count() < frame.height
    frame = _drop_bad(frame, timed or _has_text(columns.get("timestamp")), checks, table)
    if WEIGHT in frame.columns:
        frame = frame.with_columns(_weights(frame, table))
    if not timed and frame["seq"].null_count() == frame.height:
        _warn_of_order(table, mapping, checks)
    _note_missing_places(frame, timed, checks, table.path.name)
    ordered = _ordered(frame, timed)
    kept = _without_duplicates(ordered, duplicates, checks, table.path.name)
    _note_facts(kept, timed, checks)
    return kept.select(
        LINE,
        "user_id",
        "item_id",
        pl.col("rating").cast(pl.Float32),
        pl.col(TIME).floor().cast(pl.Int64).alias("timestamp"),
        pl.int_range(pl.len(), dtype=pl.Int32).over("_user").alias("seq"),
        *([pl.col(WEIGHT)] if "event_weight" in columns else []),
        *(EXTRA + name for name in extra),
    )


def _numbers(column: pl.Series | None, name: str, height: int) -> pl.Series:
    if column is None:
        return pl.Series(name, [None], dtype=pl.Float64).new_from_index(0, height)
    number = column.cast(pl.Float64, strict=False).alias(name)
    return number.to_frame().select(pl.when(pl.col(name).is_finite()).then(pl.col(name))).to_series()


def _single(number: pl.Series) -> pl.Series:
    """In single precision, float32; null where that has no number so large."""
    single = number.cast(pl.Float32).to_frame()
    return single.select(pl.when(pl.col(number.name).is_finite()).then(pl.col(number.name))).to_series()


def _places(column: pl.Series | None, lines: pl.Series, checks: Checks, file: str) -> pl.Series:
    """What a user's events are ordered by; whole numbers stay whole, for floats tell large ones not apart."""
    if column is None:
        return _numbers(None, "seq", len(lines))
    kind = column.dtype
    without_fraction = isinstance(kind, pl.Decimal) and kind.scale == 0
    if kind.is_integer() or kind.is_temporal() or kind == pl.String or without_fraction:
        whole = column.cast(pl.Int64, strict=False).alias("seq")
        if whole.null_count() == column.null_count():
            return whole
    places = _numbers(column, "seq", len(lines))
    if kind == pl.String:
        dates = as_seconds(column, Checks(), file)
        places = dates if dates.null_count() < places.null_count() else places
    bad = lines.filter(places.is_null() & column.is_not_null())
    message = "places in the order (seq) that are neither numbers nor times, taken as missing"
    checks.add("warning", "bad_seq", message, len(bad), file=file, lines=bad.head(LINES_SHOWN))
    return places.alias("seq")


def _weights(frame: pl.DataFrame, table: Table) -> pl.Series:
    weight = _single(frame[WEIGHT])
    bad = frame[LINE].filter(weight.is_null() | (weight <= 0))
    if len(bad):
        raise RecllmError(
            f"{table.path}: line {bad[0]} has an event weight that is no positive number of single precision (as "
            f"{len(bad):,} of {len(weight):,} rows). Mend it, or give the column another name."
        )
    return weight


def _ratings(column: pl.Series | None, lines: pl.Series, checks: Checks, file: str) -> pl.Series:
    rating = _single(_numbers(column, "rating", len(lines)))
    if column is not None:
        bad = lines.filter(rating.is_null() & column.is_not_null())
        message = "ratings that are no number, or too large a one, taken as missing"
        if rating.is_null().all():
            message += (
                "; that is all of them: name another column as rating, or weigh kinds of events by recllm data join"
            )
        checks.add("warning", "bad_rating", message, len(bad), file=file, lines=bad.head(LINES_SHOWN))
    return rating


def _times(column: pl.Series | None, height: int, checks: Checks, file: str) -> pl.Series:
    if column is None or column.null_count() == height:
        return _numbers(None, TIME, height)
    return as_seconds(column, checks, file).alias(TIME)


def _has_text(column: pl.Series | None) -> bool:
    return column is not None and column.null_count() < len(column)


def _drop_bad(frame: pl.DataFrame, timed: bool, checks: Checks, table: Table) -> pl.DataFrame:
    file, before = table.path.name, len(checks.findings)
    missing = frame["user_id"].is_null() | frame["item_id"].is_null()
    lines = frame[LINE].filter(missing)
    checks.add(
        "warning", "missing_id", "rows without user or item id, dropped", len(lines), file=file, lines=lines.head(5)
    )
    frame = frame.filter(~missing)
    frame = _without_strange_ids(frame, checks, table)
    for column in ("user_id", "item_id"):
        for text in frame[column].filter(frame[column].is_in(MISSING)).unique().sort():
            lines = frame[LINE].filter(frame[column] == text)
            message = (
                f"rows with the {column} '{text}', all of one; does it stand for a missing one? Leave it empty then"
            )
            checks.add("warning", "missing_id_in_words", message, len(lines), file=file, lines=lines.head(5))
    if timed:
        lines = frame[LINE].filter(frame[TIME].is_null())
        message = (
            "time stamps that are unreadable, missing, negative or after 2200 (read are ISO 8601, numbers, and dates "
            "such as 31.12.2024 or 31 Dec 2024); rows dropped"
        )
        checks.add("warning", "bad_time", message, len(lines), file=file, lines=lines.head(5))
        frame = frame.filter(frame[TIME].is_not_null())
    if frame.is_empty():
        why = "; ".join(finding.text() for finding in checks.findings[before:])
        raise RecllmError(
            f"{table.path} has no usable row: {why}. Check the mapping of its columns ([data.columns]), and how "
            "they are written."
        )
    return frame


def _without_strange_ids(frame: pl.DataFrame, checks: Checks, table: Table) -> pl.DataFrame:
    """Drop rows whose ids say that they were read wrong: nobody's id has several lines, or is a list."""
    listed = table.path.suffix.lower() in (".jsonl", ".ndjson")
    for column in ("user_id", "item_id"):
        several = pl.col(column).str.contains(r"[\r\n]")
        strange = {f"rows whose {column} has a line break (is a quote not closed?), dropped": several}
        if listed:
            strange[f"rows whose {column} is a list or an object, dropped"] = pl.col(column).str.contains(LISTED)
        for message, found in strange.items():
            lines = frame.filter(found)[LINE]
            checks.add("warning", "strange_id", message, len(lines), file=table.path.name, lines=lines.head(5))
            frame = frame.filter(~found)
    return frame


def _note_large_floats(columns: Mapping[str, pl.Series], checks: Checks, file: str) -> None:
    for role in ("user_id", "item_id"):
        if (most := EXACT.get(str(columns[role].dtype))) is not None:
            large = int((columns[role].abs() > most).sum())
            message = f"rows with a {role} above {most:,} that came as a float: different ids may have become one"
            checks.add("warning", "large_float_id", message, large, file=file)


def _has_places(frame: pl.DataFrame) -> bool:
    return frame["seq"].null_count() < frame.height


def _note_missing_places(frame: pl.DataFrame, timed: bool, checks: Checks, file: str) -> None:
    lines = frame[LINE].filter(frame["seq"].is_null()) if _has_places(frame) else frame[LINE].head(0)
    way = "so that all events of their users are in order of time" if timed else "which stand last"
    message = f"rows without a place in the order (seq), {way}"
    checks.add("warning", "missing_seq", message, len(lines), file=file, lines=lines.head(LINES_SHOWN))


def _ordered(frame: pl.DataFrame, timed: bool) -> pl.DataFrame:
    within: list[str | pl.Expr] = ["seq" if _has_places(frame) else TIME]
    if timed and _has_places(frame) and frame["seq"].null_count():
        # One event without a place, and those that have one could be put on either side of it: time says more.
        placed = pl.col("seq").is_not_null().all().over("user_id")
        within = [pl.when(placed).then("seq"), pl.when(~placed).then(TIME), "seq"]
    users = frame.group_by("user_id").agg(pl.col(TIME if timed else LINE).min().alias("_first"))
    users = users.sort("_first", "user_id").select("user_id").with_row_index("_user")
    return frame.join(users, on="user_id").sort("_user", *within, LINE, nulls_last=True)


def _note_kinds(table: Table, read: Collection[str], checks: Checks) -> None:
    """Tell of a column of kinds of events that is not read: all of them count alike, unless a join weighs them."""
    for name in (own for own in table.columns if own not in read and squeezed(own) in KINDS_OF_EVENTS):
        values = table.read([name])[name].drop_nulls()
        kinds = values.cast(pl.String, strict=False).unique().sort().head(MOST_KINDS + 1).to_list()
        if 1 < len(kinds) <= MOST_KINDS:
            message = (
                f"kinds of events in '{name}' ({', '.join(map(str, kinds))}), all of which count alike; recllm data "
                "join picks and weighs them"
            )
            checks.add("warning", "kinds_of_events", message, len(values), file=table.path.name)


def _warn_of_order(table: Table, mapping: Mapping[str, str], checks: Checks) -> None:
    """Say that the file's order stands for time, and which column may be the time that nobody has named."""
    others = [name for name in table.columns if name not in mapping.values()]
    dated = [name for name in others if holds_times(table.read([name])[name].head(DATED_ROWS))]
    rows = len(table.read([next(iter(mapping.values()))]))
    checks.add("warning", "no_times", "rows without a time, taken in the order of the file", rows, file=table.path.name)
    for name in dated:
        message = (
            f"dates in '{name}', which no name says is the time (--column timestamp={name}, or in a run file "
            f'columns = {{ timestamp = "{name}" }} under [data])'
        )
        checks.add("warning", "unnamed_time", message, rows, file=table.path.name)


def _without_duplicates(frame: pl.DataFrame, duplicates: Duplicates, checks: Checks, file: str) -> pl.DataFrame:
    pair = pl.struct("_user", "item_id")  # a number and a text hash faster than two texts
    lone = pair.is_last_distinct() if duplicates == "last" else pair.is_first_distinct()
    kept = frame.select(lone).to_series()
    lines = frame[LINE].filter(~kept).sort()
    done = {"keep": "kept", "first": "only the first kept", "last": "only the last kept"}[duplicates]
    message = f"further events of one user with one item, {done}"
    checks.add("info", "duplicate_event", message, len(lines), file=file, lines=lines.head(LINES_SHOWN))
    if duplicates == "keep":
        return frame
    left_out = frame.filter(~kept & frame["rating"].is_not_null()).select("_user", "item_id")
    lost = frame.filter(kept & frame["rating"].is_null()) if len(left_out) else frame.head(0)
    lines = lost.join(left_out, on=["_user", "item_id"], how="semi")[LINE].sort()
    message = "events without a rating that are kept of a user with an item where one that is left out has a rating"
    message += " (duplicates = keep keeps both; a join with duplicates = last takes the rating over)"
    checks.add("warning", "lost_rating", message, len(lines), file=file, lines=lines.head(LINES_SHOWN))
    return frame.filter(kept)


def _note_facts(frame: pl.DataFrame, timed: bool, checks: Checks) -> None:
    by_seq = _has_places(frame)
    rule = "time, ties in file order" if timed else "file order"
    facts = checks.facts
    facts |= {"rows_kept": frame.height, "users": frame["user_id"].n_unique(), "items": frame["item_id"].n_unique()}
    if by_seq:
        others = f", for users with rows without one {rule}" if timed and checks.report().count("missing_seq") else ""
        rule = f"by column '{facts['columns']['seq']}'{others}"
    facts["order"] = rule
    ratings = frame["rating"].drop_nulls().to_numpy()
    facts["ratings"] = f"{ratings.min():g} to {ratings.max():g}" if len(ratings) else "none"
    if not timed:
        facts["times"] = "none"
        return
    times = frame[TIME].to_numpy()
    low, high = (datetime.fromtimestamp(at, UTC).date().isoformat() for at in (times.min(), times.max()))
    facts["times"] = f"{low} to {high}"
    step = frame.filter(pl.col("_user") == pl.col("_user").shift(-1)).height
    gap = frame.select(pl.col(TIME).diff().over("_user")).to_series().drop_nulls()
    facts["ties_share"] = round(float((gap == 0).sum()) / step, 4) if step else 0.0
    if by_seq:
        message = "events that stand before an earlier one by the order column; that column is followed"
        checks.add("warning", "order_against_time", message, int((gap < 0).sum()))

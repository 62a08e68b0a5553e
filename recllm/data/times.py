"""Time stamps of any form as seconds since 1970, float64: numbers, dates, text in ISO 8601 and as people write it."""

import polars as pl

from recllm.data.checks import Checks
from recllm.data.written import as_written
from recllm.errors import RecllmError

YEAR_2200 = 7_258_118_400
YEAR_1980 = 315_532_800
# Each value tells its unit: in seconds it lies below 1e11 (the year 5138), in milliseconds above it since 1973.
UNITS = ((1e17, 1e9, "nanoseconds"), (1e14, 1e6, "microseconds"), (1e11, 1e3, "milliseconds"))
SURE = 1e8
"""Seconds from which (1973) a number says that it is in seconds; smaller ones may stand for no time at all."""
ISO_FORMATS = ("%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%d %H:%M", "%Y-%m-%d")
FIRST_DATE, LAST_DATE = 19700101, 21991231
"""Whole dates as numbers."""
DATES = 0.9
"""The share of numbers (but 0) that are such dates where all are read as dates."""
OFFSET = r"([+-])(\d{2})(?::?(\d{2}))?$"
"""Hours with or without minutes: PostgreSQL writes +00."""
FARTHEST = 14
"""No clock is set farther from UTC, in hours."""


def as_seconds(column: pl.Series, checks: Checks, file: str) -> pl.Series:
    """Seconds, float64, with the fraction; null where the value is no time between 1970 and 2200.

    Raises:
        RecllmError: the column is of times of day or of durations, or all of its dates may be read day or month first.
    """
    kind = column.dtype
    if kind in (pl.Time, pl.Duration):
        what = "times of day" if kind == pl.Time else "durations"
        raise RecllmError(f"{file}: the column of time stamps holds {what}, and no day is known of them. Name another.")
    if kind.is_temporal():
        seconds = column.cast(pl.Datetime("us")).dt.epoch("us").cast(pl.Float64) / 1e6
    else:
        seconds = _from_numbers(column, checks, file)
    valid = seconds.is_finite() & (seconds >= 0) & (seconds < YEAR_2200)
    seconds = seconds.to_frame("time").select(pl.when(valid).then(pl.col("time"))).to_series()
    middle = seconds.median()
    if isinstance(middle, float) and middle < YEAR_1980:
        checks.add(
            "warning", "early_times", "most time stamps lie before 1980; are they seconds?", len(seconds), file=file
        )
    return seconds


def holds_times(column: pl.Series) -> bool:
    """Whether all values of a column are dates or times, of their own kind or in text."""
    known = column.drop_nulls()
    if known.is_empty():
        return False
    if known.dtype == pl.String:
        iso = _from_iso(known)
        left = known.filter(iso.is_null())
        return not _from_iso(as_written(left).iso.alias(left.name)).null_count()
    return known.dtype.is_temporal() and known.dtype not in (pl.Duration, pl.Time)


def _from_numbers(column: pl.Series, checks: Checks, file: str) -> pl.Series:
    number = column.cast(pl.Float64, strict=False)
    finite = number.to_frame("n").select(pl.when(pl.col("n").is_finite()).then(pl.col("n"))).to_series()
    none = pl.Series(column.name, [None] * len(column), dtype=pl.Float64)
    iso = _from_text(column, number, checks, file) if column.dtype == pl.String else none
    dates = _from_whole_dates(finite)
    written = dates.count()
    # Among others of its kind or dates in text, and what is too small for a time stamp stands for none (0, 99999999).
    # In a column of seconds such a number is one of them.
    if written and (iso.count() or written >= DATES * int((finite != 0).sum())):
        checks.add("info", "whole_dates", "time stamps as whole dates (20201231)", written, file=file)
        seconds = (dates.is_null() & (finite >= SURE)).fill_null(False)
        finite, number = (own.zip_with(seconds, none) for own in (finite, number))
        iso = iso.zip_with(dates.is_null(), dates)
    counts, above = {}, float("inf")
    for least, divisor, unit in UNITS:
        inside = ((finite >= least) & (finite < above)).fill_null(False)
        counts[unit], above = int(inside.sum()), least
        number = number.zip_with(~inside, number / divisor)
        message = f"time stamps in {unit}, divided by {divisor:,.0f}"
        checks.add("info", "time_unit", message, counts[unit], file=file)
    counts["seconds"] = int(((finite >= SURE) & (finite < above)).sum())
    found = {unit: count for unit, count in counts.items() if count}
    if len(found) > 1:
        message = f"time stamps in several units ({', '.join(found)}), each value read in its own"
        checks.add("warning", "mixed_time_units", message, min(found.values()), file=file)
    return number.to_frame("number").select(pl.coalesce("number", iso)).to_series()


def _from_whole_dates(number: pl.Series) -> pl.Series:
    """Seconds of numbers such as 20201231, float64; null where a number is no such date. As seconds all lie in 1970."""
    within = pl.col("n").is_between(FIRST_DATE, LAST_DATE) & (pl.col("n") == pl.col("n").floor())
    text = pl.when(within).then(pl.col("n")).cast(pl.Int64).cast(pl.String)
    day = text.str.to_date("%Y%m%d", strict=False)
    return number.to_frame("n").select(day.cast(pl.Datetime("us")).dt.epoch("us").cast(pl.Float64) / 1e6).to_series()


def _from_text(column: pl.Series, number: pl.Series, checks: Checks, file: str) -> pl.Series:
    """Seconds of text that is no number: ISO 8601, and for what is not dates as people write them."""
    iso = _from_iso(column)
    left = column.zip_with(iso.is_null() & number.is_null(), pl.Series([None], dtype=pl.String))
    if left.is_null().all():
        return iso
    written = as_written(left)
    found = iso.zip_with(iso.is_not_null(), _from_iso(written.iso.alias(column.name)))
    if written.day_first is None and written.open:
        message = (
            f"time stamps such as '{written.example}' may have the day first or the month, and none of them tells "
            "which; write them as year-month-day, or with full stops as day.month.year"
        )
        if (found.is_null() & number.is_null()).all():
            raise RecllmError(f"{file}: {message}.")
        checks.add("warning", "dates_by_order", message, written.open, file=file)
    elif written.open:
        which = "day" if written.day_first else "month"
        message = f"time stamps such as '{written.example}', read {which} first, as most that tell have it"
        checks.add("info", "dates_by_order", message, written.open, file=file)
    return found


def _from_iso(column: pl.Series) -> pl.Series:
    text = pl.col(column.name).str.strip_chars()
    plain = text.str.replace(r"^(\d{4})/(\d{1,2})/", "${1}-${2}-").str.replace(r"\s*(Z|UTC|GMT)$", "")
    plain = plain.str.replace("T", " ", literal=True)
    # "2020-01-31" ends like an offset of −00:31 would: only what follows a time is one.
    timed = plain.str.contains(r":\d{2}.*" + OFFSET)
    local = pl.when(timed).then(plain.str.replace(r"\s*" + OFFSET, "")).otherwise(plain)
    hours, minutes = (plain.str.extract(OFFSET, group).cast(pl.Float64, strict=False) for group in (2, 3))
    sign = pl.when(plain.str.extract(OFFSET, 1) == "-").then(-1.0).otherwise(1.0)
    minutes = minutes.fill_null(0.0)
    there = pl.when((hours <= FARTHEST) & (minutes < 60)).then(hours * 3600 + minutes * 60)
    offset = pl.when(timed).then(sign * there).otherwise(0.0)
    parsed = pl.coalesce(local.str.to_datetime(form, strict=False, time_unit="us") for form in ISO_FORMATS)
    return column.to_frame().select(parsed.dt.epoch("us").cast(pl.Float64) / 1e6 - offset).to_series()

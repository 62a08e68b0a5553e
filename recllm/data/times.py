"""Time stamps of any form as seconds since 1970, float64: numbers, dates, ISO 8601 text."""

import polars as pl

from recllm.data.checks import Checks

YEAR_2200 = 7_258_118_400
YEAR_1980 = 315_532_800
# The median tells the unit: in seconds it lies below 1e11 (the year 5138), in milliseconds above it since 1973.
UNITS = ((1e17, 1e9, "nanoseconds"), (1e14, 1e6, "microseconds"), (1e11, 1e3, "milliseconds"))
ISO_FORMATS = ("%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%d %H:%M", "%Y-%m-%d")
OFFSET = r"([+-])(\d{2}):?(\d{2})$"


def as_seconds(column: pl.Series, checks: Checks, file: str) -> pl.Series:
    """Seconds, float64, with the fraction; null where the value is no time between 1970 and 2200."""
    kind = column.dtype
    if kind.is_temporal() and kind != pl.Duration and kind != pl.Time:
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


def _from_numbers(column: pl.Series, checks: Checks, file: str) -> pl.Series:
    number = column.cast(pl.Float64, strict=False)
    middle = number.filter(number.is_finite()).median()
    for least, divisor, unit in UNITS:
        if isinstance(middle, float) and middle >= least:
            checks.add("info", "time_unit", f"time stamps in {unit}, divided by {divisor:,.0f}", len(number), file=file)
            number = number / divisor
            break
    if column.dtype != pl.String:
        return number
    return number.to_frame("number").select(pl.coalesce("number", _from_iso(column))).to_series()


def _from_iso(column: pl.Series) -> pl.Series:
    text = pl.col(column.name).str.strip_chars()
    plain = text.str.replace(r"^(\d{4})/(\d{1,2})/", "${1}-${2}-").str.replace("T", " ", literal=True)
    plain = plain.str.replace(r"(Z| ?UTC)$", "")
    # "2020-01-31" ends like an offset of −00:31 would: only what follows a time is one.
    timed = plain.str.contains(r":\d{2}.*" + OFFSET)
    local = pl.when(timed).then(plain.str.replace(r"\s*" + OFFSET, "")).otherwise(plain)
    hours, minutes = (plain.str.extract(OFFSET, group).cast(pl.Float64, strict=False) for group in (2, 3))
    sign = pl.when(plain.str.extract(OFFSET, 1) == "-").then(-1.0).otherwise(1.0)
    offset = pl.when(timed).then(sign * (hours * 3600 + minutes * 60)).otherwise(0.0)
    parsed = pl.coalesce(local.str.to_datetime(form, strict=False, time_unit="us") for form in ISO_FORMATS)
    return column.to_frame().select(parsed.dt.epoch("us").cast(pl.Float64) / 1e6 - offset).to_series()

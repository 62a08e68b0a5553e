"""Dates as people, sheets and servers write them, as ISO 8601 text: 31.12.2024, 12/31/2024 9:05 PM, 31 Dec 2024."""

from dataclasses import dataclass

import polars as pl

MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
WEEKDAY = r"(?i)^(?:mon|tue|wed|thu|fri|sat|sun)[a-z]*[.,]?\s+"
YEAR_LAST = r"^([A-Za-z]{3}\s+\d{1,2})\s+(\d{1,2}:\d{2}:\d{2})(\s+[+-]\d{4})?\s+(\d{4})$"
"""Behind the weekday, what C's ctime writes, and with an offset Ruby: Jun 20 23:21:05 1993."""
NUMBERED = r"^(\d{1,2})([./-])\s?(\d{1,2})[./-]\s?(\d{4})"
NAMED_DAY_FIRST = r"^(\d{1,2})(?:st|nd|rd|th)?[\s./-]+([A-Za-z]{3})[a-z]{0,6}[\s.,/-]+(\d{4})"
NAMED_MONTH_FIRST = r"^([A-Za-z]{3})[a-z]{0,6}\.?\s+(\d{1,2})(?:st|nd|rd|th)?,?\s+(\d{4})"
MONTH_FIRST = r"^(\d{1,2}) (\d{1,2}), (\d{4})"
"""As Amazon's reviews have it: 09 13, 2009."""
DATE = "|".join(f"(?:{own})" for own in (NUMBERED, NAMED_DAY_FIRST, NAMED_MONTH_FIRST, MONTH_FIRST))
BETWEEN = r"^(?:\s*,\s*|\s+|T|:)"
"""Between a date and its time; servers write a colon (10/Oct/2000:13:55:36 -0700)."""
HALF_DAY = r"(?i)^(\d{1,2})(:\d{2}(?::\d{2}(?:\.\d+)?)?)\s*([ap])\.?m\.?\b(.*)$"


@dataclass(frozen=True)
class Written:
    """What was read of a column of text.

    Attributes:
        iso: `YEAR-MONTH-DAY` and behind a blank the rest of the value, String; null where no such date is written.
        day_first: whether the day stands first where numbers are divided by slashes or hyphens; None where no such
            value tells, and `iso` is null for all of them.
        open: how many values wait for `day_first`.
        example: the first of those that wait.
    """

    iso: pl.Series
    day_first: bool | None
    open: int
    example: str | None


def as_written(column: pl.Series) -> Written:
    """Dates with the year last or the month by its English name; the year has four digits.

    Divided by full stops the day stands first (31.12.2024). Divided by slashes or hyphens the column tells: where more
    values have a first number above 12 than a second one, days stand first in all of them, else months.
    """
    text = pl.col("text").str.strip_chars().str.replace(WEEKDAY, "").str.replace(YEAR_LAST, "${1} ${4} ${2}${3}")
    parts = (
        column.alias("text")
        .to_frame()
        .select(
            text.alias("text"),
            *(text.str.extract(NUMBERED, group).alias(f"n{group}") for group in (1, 2, 3, 4)),
            pl.coalesce(text.str.extract(NAMED_DAY_FIRST, 2), text.str.extract(NAMED_MONTH_FIRST, 1)).alias("name"),
            pl.coalesce(
                text.str.extract(NAMED_DAY_FIRST, 1),
                text.str.extract(NAMED_MONTH_FIRST, 2),
                text.str.extract(MONTH_FIRST, 2),
            ).alias("d"),
            text.str.extract(MONTH_FIRST, 1).alias("m"),
            pl.coalesce(text.str.extract(own, 3) for own in (NAMED_DAY_FIRST, NAMED_MONTH_FIRST, MONTH_FIRST)).alias(
                "y"
            ),
        )
    )
    open_ = parts.filter(pl.col("n2").is_in(["/", "-"]))
    first, second = (int((open_[own].cast(pl.Int64) > 12).sum()) for own in ("n1", "n3"))
    day_first = None if first == second == 0 else first >= second
    days = pl.when(pl.col("n2") == ".").then(True).when(pl.col("n2").is_not_null()).then(day_first)
    by_name = (
        pl.col("name")
        .str.to_lowercase()
        .replace_strict(
            {name: str(place) for place, name in enumerate(MONTHS, 1)}, default=None, return_dtype=pl.String
        )
    )
    day = pl.coalesce(pl.when(days).then("n1").when(~days).then("n3"), "d")
    month = pl.coalesce(pl.when(days).then("n3").when(~days).then("n1"), by_name, "m")
    year = pl.coalesce("n4", "y")
    iso = parts.select(pl.concat_str(year, month, day, separator="-") + _time_behind(pl.col("text"))).to_series()
    return Written(iso, day_first, len(open_), open_["text"][0] if len(open_) else None)


def _time_behind(text: pl.Expr) -> pl.Expr:
    """What stands behind the date, with the hours of half days (9:05 PM) counted to 24, and a blank before it."""
    behind = text.str.replace(DATE, "")
    rest = behind.str.replace(BETWEEN, "")
    hour = rest.str.extract(HALF_DAY, 1).cast(pl.Int64, strict=False)
    late = rest.str.extract(HALF_DAY, 3).str.to_lowercase() == "p"
    whole = pl.when(hour.is_between(1, 12)).then(hour % 12 + pl.when(late).then(12).otherwise(0)).cast(pl.String)
    counted = pl.concat_str(whole, rest.str.extract(HALF_DAY, 2), rest.str.extract(HALF_DAY, 4))
    time = pl.when(hour.is_null()).then(rest).otherwise(counted)
    # What follows at once is no time: the date is part of something else ("12/31/20245").
    glued = (behind != "") & (behind == rest)
    return pl.when(behind == "").then(pl.lit("")).when(~glued).then(pl.lit(" ") + time)

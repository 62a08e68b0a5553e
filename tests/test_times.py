"""Time stamps: a moment is the same one in whatever zone a file has it."""

import datetime as dt

import polars as pl
import pytest

from recllm.data import read_interactions
from recllm.data.checks import Checks
from recllm.data.times import as_seconds
from recllm.errors import RecllmError


@pytest.mark.parametrize("zone", ["UTC", "Asia/Kolkata", "America/New_York"])
@pytest.mark.parametrize("unit", ["ms", "us", "ns"])
def test_a_time_with_a_zone_is_the_moment_and_not_what_its_clock_shows(zone, unit):
    moments = pl.Series("timestamp", [1_600_000_000_500, None]).cast(pl.Datetime("ms"))
    zoned = moments.dt.replace_time_zone("UTC").dt.convert_time_zone(zone).dt.cast_time_unit(unit)
    assert as_seconds(zoned, Checks(), "log.parquet").to_list() == [1_600_000_000.5, None]


@pytest.mark.parametrize(
    ("given", "days"),
    [
        ([20201231, 20210101], [18627, 18628]),
        (["20201231", "2021-01-01", None], [18627, 18628, None]),
        ([20201231, 1609459200], [20201231 / 86400, 18628]),  # one of several numbers of seconds
        ([20201331, 20210101], [20201331 / 86400, 20210101 / 86400]),  # no date has a month 13, and half is too little
        ([0, *[20201231] * 10, 99999999], [None, *[18627] * 10, None]),  # fillers
    ],
)
def test_whole_dates_as_numbers_are_dates(given, days):
    found = as_seconds(pl.Series("time", given), Checks(), "log.csv")
    assert found.to_list() == [None if day is None else pytest.approx(day * 86400) for day in days]


def test_no_clock_is_set_farther_from_utc_than_fourteen_hours():
    times = pl.Series(
        ["2020-01-05 10:00+14:00", "2020-01-05 10:00+25:00", "2020-01-05 10:00-03:75", "2020-01-05 10:00-12"]
    )
    found = as_seconds(times, Checks(), "log.csv")
    assert found.is_null().to_list() == [False, True, True, False]
    assert found[0] == found[3] - 26 * 3600


@pytest.mark.parametrize("kind", [pl.Time, pl.Duration])
def test_times_of_day_and_durations_are_no_times(tmp_path, kind):
    path = tmp_path / "log.parquet"
    frame = pl.DataFrame({"user_id": ["u", "u"], "item_id": ["a", "b"], "time": [60_000_000, 30_000_000]})
    frame = frame.with_columns(pl.col("time").cast(pl.Duration("us") if kind == pl.Duration else pl.Int64))
    if kind == pl.Time:
        frame = frame.with_columns(pl.Series("time", [dt.time(0, 1), dt.time(0, 0, 30)]))
    frame = frame.with_columns(pl.Series("date", [dt.date(2020, 1, 2), dt.date(2020, 1, 1)]))
    frame.write_parquet(path)
    assert read_interactions(path).frame["item_id"].to_list() == ["b", "a"]  # by the date, which is guessed then
    with pytest.raises(RecllmError, match=r"the column of time stamps holds (times of day|durations), and no day is"):
        read_interactions(path, columns={"timestamp": "time"})

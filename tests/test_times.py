"""Time stamps: a moment is the same one in whatever zone a file has it."""

import datetime as dt

import polars as pl
import pytest

from recllm.data import read_interactions
from recllm.data.checks import Checks
from recllm.data.times import as_seconds, holds_times
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


@pytest.mark.parametrize(
    ("written", "moment"),
    [
        ("31.12.2024", "2024-12-31T00:00:00"),
        ("1. 2. 2024 9:05", "2024-02-01T09:05:00"),
        ("31/12/2024, 21:05:07", "2024-12-31T21:05:07"),
        ("12/31/2024 9:05 PM", "2024-12-31T21:05:00"),
        ("12/31/2024 12:01:02.5 am", "2024-12-31T00:01:02.500000"),
        ("31-Dec-2024", "2024-12-31T00:00:00"),
        ("May 3rd, 2020", "2020-05-03T00:00:00"),
        ("09 13, 2009", "2009-09-13T00:00:00"),
        ("Tue, 1 Jul 2003 10:52:37 +0200", "2003-07-01T08:52:37"),
        ("Tue, 1 Jul 2003 10:52:37 GMT", "2003-07-01T10:52:37"),
        ("10/Oct/2000:13:55:36 -0700", "2000-10-10T20:55:36"),
        ("Sun Jun 20 23:21:05 1993", "1993-06-20T23:21:05"),
        ("Tue Apr 07 22:52:51 +0000 2009", "2009-04-07T22:52:51"),
    ],
)
def test_dates_as_people_and_servers_write_them(written, moment):
    times = pl.Series("date", ["2024-01-02", written, None])
    expected = dt.datetime.fromisoformat(moment).replace(tzinfo=dt.UTC).timestamp()
    assert as_seconds(times, Checks(), "log.csv").to_list() == [1704153600.0, expected, None]
    assert holds_times(times)


@pytest.mark.parametrize(
    "written", ["12/31/20245", "31.12.24", "13/13/2024", "Foo 12, 2020", "1/2/2024 13:20 PM", "31.12.2024x"]
)
def test_what_only_looks_like_a_date_is_none(written):
    assert as_seconds(pl.Series(["12/31/2024", written]), Checks(), "log.csv").is_null().to_list() == [False, True]


def test_whether_days_stand_first_is_what_most_values_tell_that_do():
    checks = Checks()
    found = as_seconds(pl.Series(["02/03/2024", "31/12/2024", "30/12/2024", "12/31/2024"]), checks, "log.csv")
    assert found[0] == dt.datetime(2024, 3, 2, tzinfo=dt.UTC).timestamp()
    assert found.is_null().to_list() == [False, False, False, True]
    assert "such as '02/03/2024', read day first" in checks.findings[0].text()


def test_dates_that_do_not_tell_their_order_are_missing_and_an_error_where_there_are_no_others():
    checks = Checks()
    found = as_seconds(pl.Series(["02/03/2024", "2024-03-02"]), checks, "log.csv")
    assert found.is_null().to_list() == [True, False]
    assert checks.findings[0].severity == "warning"
    with pytest.raises(RecllmError, match=r"log\.csv: time stamps such as '02/03/2024' may have the day first or the"):
        as_seconds(pl.Series(["02/03/2024", "04/03/2024", None]), Checks(), "log.csv")

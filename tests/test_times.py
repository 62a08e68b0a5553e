"""Time stamps: a moment is the same one in whatever zone a file has it."""

import polars as pl
import pytest

from recllm.data.checks import Checks
from recllm.data.times import as_seconds


@pytest.mark.parametrize("zone", ["UTC", "Asia/Kolkata", "America/New_York"])
@pytest.mark.parametrize("unit", ["ms", "us", "ns"])
def test_a_time_with_a_zone_is_the_moment_and_not_what_its_clock_shows(zone, unit):
    moments = pl.Series("timestamp", [1_600_000_000_500, None]).cast(pl.Datetime("ms"))
    zoned = moments.dt.replace_time_zone("UTC").dt.convert_time_zone(zone).dt.cast_time_unit(unit)
    assert as_seconds(zoned, Checks(), "log.parquet").to_list() == [1_600_000_000.5, None]

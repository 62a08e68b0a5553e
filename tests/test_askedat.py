"""When a recommendation is asked for: faded counts of what was before, and places in the training time."""

import numpy as np
import polars as pl
import pytest

from recllm.askedat import DAY, NOW, PARTS, FadingCounts, TrainingTime, log_end, moments_of
from recllm.data import Interactions, Query


def made(rows, weights=None):
    """Events of (item row, day), one user each, and the rows of their items."""
    columns = {
        "user_id": [f"u{place}" for place in range(len(rows))],
        "item_id": [f"i{item}" for item, _ in rows],
        "rating": None,
        "timestamp": [None if day is None else int(day * DAY) for _, day in rows],
        "seq": 0,
    }
    kinds = {"rating": pl.Float32, "timestamp": pl.Int64, "seq": pl.Int32}
    frame = pl.DataFrame(columns, schema_overrides=kinds)
    if weights is not None:
        frame = frame.with_columns(weight=pl.Series(weights, dtype=pl.Float32))
    return Interactions(frame), np.array([item for item, _ in rows])


def by_hand(rows, moment, items, half_life, weights=None):
    """Each event on its own."""
    counts = np.zeros(items)
    for (item, day), weight in zip(rows, weights or [1.0] * len(rows), strict=True):
        if int(day * DAY) < moment:
            counts[item] += weight * 0.5 ** ((moment - int(day * DAY)) / DAY / half_life)
    return counts


@pytest.mark.parametrize("weights", [None, [float(1 + place % 3) for place in range(200)]])
def test_counts_as_of_moments_are_those_counted_one_by_one(weights):
    random = np.random.default_rng(0)
    rows = list(zip(random.integers(0, 5, 200).tolist(), random.uniform(0, 50, 200).tolist(), strict=True))
    counts = FadingCounts.fit(*made(rows, weights), 6, 3.0)
    end = int(log_end(made(rows)[0].frame["timestamp"]))
    moments = (random.uniform(-5, end / DAY, 30) * DAY).astype(np.int64)
    found = counts.at(moments)
    assert found == pytest.approx(np.array([by_hand(rows, at, 6, 3.0, weights) for at in moments]), rel=1e-9)
    assert (found[:, 5] == 0).all()
    clipped = [(item, min(day, end / DAY)) for item, day in rows]
    assert counts.now() == pytest.approx(by_hand(clipped, end + 1, 6, 3.0, weights), rel=1e-6)


def test_what_comes_after_the_logs_end_counts_for_later_moments_only():
    rows = [(0, 1000.0 + day / 2) for day in range(1000)] + [(1, 1600.0), (1, 1700.0)]
    counts = FadingCounts.fit(*made(rows), 2, 10.0)
    assert counts.end == 1600 * DAY
    found = counts.at((np.array([1499.5, 1600, 1600.5, 1700, 1700.5]) * DAY).astype(np.int64))[:, 1]
    assert found == pytest.approx([0.0, 0.0, 1.0, 1.0, 2.0], abs=1e-5)


def test_times_long_before_1970_are_times():
    rows = [(0, -500_000.0), (1, -499_999.0)]
    with np.errstate(all="raise", under="ignore"):
        counts = FadingCounts.fit(*made(rows), 2, 1.0)
        assert counts.now() == pytest.approx([0.5, 1.0], rel=1e-4)


@pytest.mark.parametrize(("events", "ahead"), [(1, 0), (2, 0), (999, 0), (1000, 1), (3000, 3)])
def test_the_logs_end_leaves_one_event_of_a_thousand_behind_and_none_of_fewer(events, ahead):
    assert log_end(pl.Series(range(events))) == events - 1 - ahead


def test_moments_are_answered_in_the_order_asked_and_alike_in_any_company():
    rows = [(day % 3, day / 2) for day in range(60)]
    counts = FadingCounts.fit(*made(rows), 3, 2.0)
    moments = np.array([20 * DAY, 5 * DAY, 20 * DAY, NOW, 0], dtype=np.int64)
    together = counts.at(moments)
    assert np.array_equal(together[0], together[2])
    alone = np.concatenate([counts.at(moments[place : place + 1]) for place in range(5)])
    assert together == pytest.approx(alone, rel=1e-12)
    assert counts.at(np.zeros(0, dtype=np.int64)).shape == (0, 3)


def test_places_count_events_and_not_days():
    time = TrainingTime(np.array([40, 10, 20, 1_000_000]))
    asked = [Query((), at=at) for at in (5, 10, 11, 20, 41, 1_000_000, 2_000_000, None)]
    found = time.places(moments_of(asked))
    assert (4 * found / PARTS).tolist() == [0, 0, 1, 1, 3, 3, 4, 4]
    assert time.places(moments_of([])).dtype == found.dtype == np.int64


def test_many_events_do_not_overflow_a_place():
    time = TrainingTime(np.arange(3_000_000))
    assert time.places(np.array([2_999_999])).item() == 2_999_999 * PARTS // 3_000_000


@pytest.mark.parametrize("days", [[1, None, 3], [2, 2, 2], []])
def test_there_is_no_training_time_where_not_all_events_have_one_or_all_the_same(days):
    assert TrainingTime.of(made([(0, day) for day in days])[0]) is None

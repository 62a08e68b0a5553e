"""Results: the ends of intervals and the draws behind them."""

import numpy as np

from recllm.results import Table, _ends, cold_lines, resampled


def test_intervals_are_of_95_per_cent():
    assert _ends(np.arange(1001.0)) == (25.0, 975.0)
    assert all(np.isnan(end) for end in _ends(None))


def test_every_draw_is_another_one():
    draws = np.concatenate(list(resampled(50, 200, 0)))
    assert draws.shape == (200, 50)
    assert len(np.unique(draws, axis=0)) == 200
    assert (draws.sum(axis=1) == 50).all()


def test_who_speaks_of_cold_items_alone_is_said_where_rows_ask_for_these():
    table = Table(("popularity", "neighbours"), ("NDCG@10",), {}, {}, {})
    assert cold_lines("leave-last-out", table) == []
    (line,) = cold_lines("cold-items", table)
    assert "Known ones have no score by 'neighbours', which puts cold ones first" in line
    assert cold_lines("cold-items", Table(("popularity",), ("NDCG@10",), {}, {}, {})) == []

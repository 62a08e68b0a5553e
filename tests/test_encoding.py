"""Sequence scorer: histories that continue one another are read once, and nothing changes by it."""

from dataclasses import replace

import numpy as np
import pytest

from recllm.askedat import PARTS, TrainingTime
from recllm.data import Query
from recllm.encoding import SequenceScorer, shared_paths
from recllm.histories import HistoryFormat
from recllm.ranking import ItemIndex

ITEMS = 7
INDEX = ItemIndex(f"i{row}" for row in range(ITEMS))
TABLE = np.random.default_rng(0).normal(size=(ITEMS, 4)).astype(np.float32)
HEADS = np.random.default_rng(1).normal(size=(ITEMS, 4)).astype(np.float32)
BIAS = np.linspace(-1, 1, ITEMS, dtype=np.float32)


def causal_sum(ids, ends):
    """A body known by construction: the sum of all tokens up to each end, each weighted by its position."""
    steps = np.arange(1, ids.shape[1] + 1, dtype=np.float32)[:, None]
    states = np.cumsum(TABLE[ids] * steps, axis=1)
    return np.take_along_axis(states, ends[..., None], axis=1)


class Counting:
    """Counts the rows that are read."""

    def __init__(self):
        self.rows = 0

    def __call__(self, ids, ends):
        self.rows += len(ids)
        return causal_sum(ids, ends)


def scorer(encode=causal_sum, limit=5, stride=1, **options):
    return SequenceScorer(encode, HistoryFormat((), (), limit, stride), INDEX, HEADS, BIAS, **options)


def history(*rows):
    return Query(tuple(f"i{row}" for row in rows))


def test_the_score_is_the_product_of_query_and_item_plus_the_items_bias():
    state = TABLE[3] + 2 * TABLE[1]
    assert scorer().score([history(3, 1)], INDEX)[0] == pytest.approx(HEADS @ state + BIAS, rel=1e-5)


def test_beginnings_of_one_another_share_a_path():
    rows = [(0, [1, 2]), (1, [1, 2, 3]), (2, [2]), (3, [1]), (4, [1, 2, 4]), (5, [2])]
    groups = {tuple(ids): sorted(places) for ids, places in shared_paths(rows)}
    assert groups == {(1, 2, 4): [4], (1, 2, 3): [0, 1, 3], (2,): [2, 5]}


def test_every_row_has_a_path_that_it_begins():
    rng = np.random.default_rng(2)
    rows = [(place, rng.integers(2, size=rng.integers(1, 6)).tolist()) for place in range(60)]
    groups = shared_paths(rows)
    assert sorted(place for _, places in groups for place in places) == list(range(60))
    for ids, places in groups:
        assert all(ids[: len(rows[place][1])] == rows[place][1] for place in places)
    assert all(a is b or a[: len(b)] != b for a, _ in groups for b, _ in groups)


def test_a_growing_history_is_read_once():
    encode = Counting()
    scorer(encode).query_vectors([history(0), history(0, 1), history(0, 1, 2), history(0, 1, 2)])
    assert encode.rows == 1


def test_shared_reading_equals_reading_one_by_one():
    rng = np.random.default_rng(3)
    queries = [history(*rng.integers(ITEMS, size=rng.integers(0, 9))) for _ in range(50)]
    queries += [Query(query.history[:2]) for query in queries]
    single = np.concatenate([scorer().score([query], INDEX) for query in queries])
    assert scorer().score(queries, INDEX) == pytest.approx(single, rel=1e-5, abs=1e-5, nan_ok=True)


def test_each_query_is_read_as_of_when_it_is_asked(monkeypatch):
    monkeypatch.setattr("recllm.encoding.TOKENS_IN_BATCH", 6)
    time = TrainingTime(np.arange(0, 100, 10))
    queries = [
        replace(history(*rows), at=at) for rows, at in (((1, 2, 3), 95), ((1, 2), 15), ((1, 2), None), ((4,), 0))
    ]

    def encode(ids, ends, asked):
        return causal_sum(ids, ends) + asked[..., None] / PARTS

    found = scorer(encode, time=time).query_vectors(queries)
    plain = scorer().query_vectors(queries)
    assert (found - plain)[:, :-1] == pytest.approx(np.array([[1.0], [0.2], [1.0], [0.0]]) * np.ones(4), abs=1e-6)
    assert np.array_equal(found[:, -1], plain[:, -1])


def test_batches_are_cut_by_length_and_every_query_is_reported(monkeypatch):
    monkeypatch.setattr("recllm.encoding.TOKENS_IN_BATCH", 8)
    done, shapes = [], []

    def encode(ids, ends):
        shapes.append(ids.shape)
        return causal_sum(ids, ends)

    queries = [history(*([row % ITEMS] * (row % 5 + 1))) for row in range(20)]
    found = scorer(encode, progress=done.append).score(queries, INDEX)
    assert all(rows * length <= 8 for rows, length in shapes)
    assert sum(done) == len(queries)
    assert found == pytest.approx(scorer().score(queries, INDEX), rel=1e-5)


def test_no_known_item_is_nan():
    found = scorer().score([Query(()), Query(("x", "y")), Query(("x", "i1"))], INDEX)
    assert np.isnan(found[:2]).all()
    assert found[2] == pytest.approx(scorer().score([history(1)], INDEX)[0])


def test_candidates_in_another_order_and_unknown_ones():
    found = scorer().score([history(4)], ItemIndex(["i6", "x", "i0"]))
    whole = scorer().score([history(4)], INDEX)[0]
    assert found[0] == pytest.approx([whole[6], np.nan, whole[0]], nan_ok=True)


def test_no_queries_give_no_rows():
    assert scorer().score([], INDEX).shape == (0, ITEMS)

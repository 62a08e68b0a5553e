"""Reserved places: against a slow definition, and by hand."""

import numpy as np
import pytest

from recllm.reserved import Lists, reserve, with_new

NAN = np.float32(np.nan)


def lists(rows, scores):
    rows, scores = np.array(rows), np.array(scores, dtype=np.float32)
    return Lists(rows, scores, np.stack([scores, 2 * scores], axis=1))


def top(scores, items, k):
    """The best of some items, each row filled up behind its last one."""
    order = [sorted((item for item in items if not np.isnan(row[item])), key=lambda item: -row[item]) for row in scores]
    rows = [(own[:k] + [-1] * k)[:k] for own in order]
    return lists(
        rows, [[NAN if item < 0 else row[item] for item in own] for own, row in zip(rows, scores, strict=True)]
    )


def test_by_hand():
    best, new = lists([[7, 1, 8, 2, 3]], [[9, 8, 7, 6, 5]]), lists([[7, 8, 9]], [[9, 7, 4]])
    assert reserve(best, lists([[7, 8]], [[9, 7]])).rows.tolist() == [[7, 1, 8, 2, 3]]  # enough are there already
    found = reserve(best, new)
    assert found.rows.tolist() == [[7, 1, 8, 2, 9]]
    assert found.scores.tolist() == [[9, 8, 7, 6, 4]]
    assert found.shares[0].tolist() == [[9, 8, 7, 6, 4], [18, 16, 14, 12, 8]]


@pytest.mark.parametrize("seed", range(8))
def test_it_is_the_best_list_that_has_so_many_new_items(seed):
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(30, 14)).astype(np.float32)
    scores[rng.random(scores.shape) < rng.choice([0.0, 0.4])] = NAN  # seen, or known to nobody
    new = range(10, 14)
    for k in (1, 3, 6, 14):
        for count in range(1, min(k, 4) + 1):
            found = reserve(top(scores, range(14), k), top(scores, new, count))
            for row, own in enumerate(found.rows):
                must = top(scores[row : row + 1], new, count).rows[0]
                must = must[must >= 0]
                every = top(scores[row : row + 1], range(14), 14).rows[0]
                rest = [item for item in every if item >= 0 and item not in must][: k - len(must)]
                wanted = [item for item in every if item in {*must.tolist(), *rest}]
                assert own[own >= 0].tolist() == wanted
                assert np.array_equal(found.scores[row][own >= 0], scores[row, own[own >= 0]])
                assert np.isnan(found.scores[row][own < 0]).all()
            assert np.array_equal(found.shares[:, 1], 2 * found.scores, equal_nan=True)


def test_lists_merge_by_score_with_nothing_last():
    first, second = lists([[4, -1]], [[1.0, NAN]]), lists([[6, 5]], [[3.0, 1.0]])
    found = Lists.empty(1, 2).merged(first, 3).merged(second, 3)
    assert found.rows.tolist() == [[6, 4, 5]]
    assert found.scores.tolist() == [[3.0, 1.0, 1.0]]
    assert found.shares.shape == (1, 2, 3)


@pytest.mark.parametrize(
    ("new", "count", "expected"),
    [
        ([4, 5], 0, [3, 0, 2]),
        ([4, 5], 1, [3, 0, 4]),
        ([4, 5], 2, [3, 4, 5]),
        ([0, 5], 1, [3, 0, 2]),  # one is there already
        ([0, 5], 2, [3, 0, 5]),
        ([2, 5], 2, [3, 2, 5]),
        ([5], 3, [3, 0, 5]),  # as many as there are
    ],
)
def test_one_list_with_so_many_new_ones(new, count, expected):
    order, marked = np.array([3, 0, 2, 1, 4, 5]), np.isin(np.arange(6), new)
    assert with_new(order, marked, 3, count).tolist() == expected

"""Metrics against scikit-learn and against naive loops."""

import numpy as np
import pytest
from sklearn.metrics import ndcg_score, roc_auc_score

from recllm import metrics
from recllm.ranking import target_ranks, top_k


@pytest.fixture(scope="module")
def scored():
    rng = np.random.default_rng(3)
    return rng.normal(size=(200, 30)).astype(np.float32), rng.integers(30, size=200)


def test_rank_metrics_equal_naive_loops(scored):
    scores, targets = scored
    ranks = target_ranks(scores, targets)
    for row, (own, target) in enumerate(zip(scores, targets, strict=True)):
        rank = sorted(own, reverse=True).index(own[target]) + 1
        assert metrics.hit_rate(ranks, 10)[row] == (rank <= 10)
        assert metrics.ndcg(ranks, 10)[row] == pytest.approx(1 / np.log2(rank + 1) if rank <= 10 else 0.0)
        assert metrics.mrr(ranks)[row] == pytest.approx(1 / rank)
        assert metrics.mrr(ranks, 10)[row] == pytest.approx(1 / rank if rank <= 10 else 0.0)


def test_recall_equals_hit_rate_for_one_target(scored):
    scores, targets = scored
    ranks = target_ranks(scores, targets)
    top, _ = top_k(scores, 10)
    assert np.array_equal(metrics.recall(ranks, 10), metrics.hit_rate(ranks, 10))
    assert np.array_equal(metrics.recall_at(top, [{int(t)} for t in targets]), metrics.hit_rate(ranks, 10))


def test_ndcg_equals_scikit_learn(scored):
    scores, targets = scored
    relevance = np.eye(30)[targets]
    ours = metrics.ndcg(target_ranks(scores, targets), 10)
    assert ours.mean() == pytest.approx(ndcg_score(relevance, scores, k=10))


@pytest.mark.parametrize("tied", [1, 2, 7, 30])
@pytest.mark.parametrize("greater", [0, 3, 9, 12])
def test_a_tie_is_worth_what_it_is_on_average_over_all_its_orders(tied, greater):
    scores = np.concatenate([np.full(greater, 2.0), np.full(tied, 1.0), np.zeros(20)])[None].astype(np.float32)
    ranks = target_ranks(scores, np.array([greater]))
    places = np.arange(greater + 1, greater + tied + 1)
    assert ranks.middle == pytest.approx(places.mean())
    assert metrics.hit_rate(ranks, 10) == pytest.approx((places <= 10).mean())
    assert metrics.ndcg(ranks, 10) == pytest.approx(np.where(places <= 10, 1 / np.log2(1 + places), 0.0).mean())
    assert metrics.mrr(ranks) == pytest.approx((1 / places).mean())
    assert metrics.mrr(ranks, 10) == pytest.approx(np.where(places <= 10, 1 / places, 0.0).mean())


@pytest.mark.parametrize("candidates", [12, 19, 21, 101])
def test_a_scorer_that_says_the_same_of_everything_is_as_good_as_chance(candidates):
    targets = np.arange(candidates)
    ranks = target_ranks(np.zeros((candidates, candidates), dtype=np.float32), targets)
    assert metrics.hit_rate(ranks, 10) == pytest.approx(10 / candidates)
    drawn = target_ranks(np.tile(np.random.default_rng(0).permutation(candidates), (candidates, 1)), targets)
    assert metrics.ndcg(ranks, 10).mean() == pytest.approx(metrics.ndcg(drawn, 10).mean())


def test_a_target_without_a_score_is_not_found():
    ranks = target_ranks(np.array([[np.nan, 1.0, np.nan]], dtype=np.float32), np.array([0]))
    assert ranks.first.tolist() == ranks.last.tolist() == [np.inf]
    for figure in (metrics.hit_rate(ranks, 10), metrics.ndcg(ranks, 10), metrics.mrr(ranks), metrics.mrr(ranks, 10)):
        assert figure.tolist() == [0.0]


def test_recall_at_many_targets():
    top = np.array([[0, 1, 2], [3, -1, -1], [4, 5, 6]])
    assert metrics.recall_at(top, [{0, 2, 9, 8}, {3}, set()]) == pytest.approx([0.5, 1.0, np.nan], nan_ok=True)


@pytest.mark.parametrize("levels", [3, 1000])
def test_auc_equals_scikit_learn_with_and_without_ties(levels):
    rng = np.random.default_rng(levels)
    labels, scores = rng.integers(2, size=400), rng.integers(levels, size=400)
    assert metrics.auc(labels, scores) == pytest.approx(roc_auc_score(labels, scores))
    weights = rng.integers(4, size=400)
    repeated = roc_auc_score(np.repeat(labels, weights), np.repeat(scores, weights))
    assert metrics.auc(labels, scores, weights) == pytest.approx(repeated)


def test_auc_of_one_label_or_constant_scores():
    assert np.isnan(metrics.auc([1, 1], [0.1, 0.2]))
    assert metrics.auc([1, 0, 1], [5.0, 5.0, 5.0]) == 0.5


def test_uauc_is_the_mean_over_users_with_both_labels():
    rng = np.random.default_rng(0)
    users, labels, scores = rng.integers(20, size=150), rng.integers(2, size=150), rng.normal(size=150)
    labels[users == 0] = 1
    each = [
        roc_auc_score(labels[users == user], scores[users == user])
        for user in range(20)
        if len(set(labels[users == user])) == 2
    ]
    value, count = metrics.uauc([f"u{user}" for user in users], labels, scores)
    assert (value, count) == (pytest.approx(np.mean(each)), len(each))
    assert len(each) < 20
    value, count = metrics.uauc([1, 2], [1, 0], [0.0, 1.0])
    assert np.isnan(value)
    assert count == 0


def test_coverage_counts_distinct_items_and_no_gaps():
    assert metrics.coverage(np.array([[0, 1], [1, -1]]), 8) == 0.25

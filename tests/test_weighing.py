"""Weighing: what was fitted is measured on others, and a scorer alone is kept where it is better."""

import numpy as np
import pytest

from recllm import fitting, weighing
from recllm.fusion import Fusion
from recllm.metrics import auc
from recllm.weighing import FusionSettings, _best, _folds, alone, fit_labels, fit_ranking


def test_folds_part_users_and_not_their_rows():
    users = np.repeat(np.arange(12), 7)
    parts = _folds(users, np.arange(84) % 2.0, np.random.default_rng(0))
    assert len(parts) > 1
    assert np.sum(parts, axis=0).tolist() == [1] * 84
    for inside in parts:
        assert not set(users[inside]) & set(users[~inside])


def test_noise_that_was_fitted_is_worth_nothing_on_other_users():
    rng, evidence = np.random.default_rng(0), np.full(60, 9)
    labels = rng.integers(2, size=60)
    scores = {f"noise {number}": rng.normal(size=60).astype(np.float32) for number in range(20)}
    settings = FusionSettings(kinds=("stacker",), l2=0.0, drop=0.0)
    fusion = fit_labels(scores, labels, evidence, evidence, users=np.arange(60), settings=settings)
    fused = fusion.fuse({name: own[:, None] for name, own in scores.items()}, evidence, evidence[:, None])[0][:, 0]
    assert auc(labels, fused) > 0.8 > 0.7 > fusion.candidates["stacker"]


def test_a_scorer_alone_is_kept_where_it_is_better_on_all_rows():
    base = Fusion.plain(("a", "b"))
    tried = {"plain sum": base, "only a": alone(base, "a")}
    figures = {"plain sum": 0.5, "only a": 0.4}
    assert _best(tried, figures, lambda own: 0.55 if own is base else 0.6).chosen == "only a"
    assert _best(tried, figures, lambda own: 0.6 if own is base else 0.55).chosen == "plain sum"


def test_weights_are_fitted_beside_what_the_plain_sum_ranks_highest(monkeypatch):
    monkeypatch.setattr(weighing, "QUERY_BATCH", 7)  # several blocks
    rng = np.random.default_rng(0)
    scores = {name: rng.normal(size=(40, 30)).astype(np.float32) for name in "ab"}
    targets, base = rng.integers(30, size=40), Fusion.plain(("a", "b"))
    barred = np.zeros((40, 30), dtype=bool)
    barred[np.arange(40), (targets + 1 + np.arange(40) % 20) % 30] = True  # another one in each row
    sample = np.arange(3, 40, 2)
    z, columns, stands_for = weighing._sampled(base, scores, sample, targets, barred, 8, rng)
    assert z.shape == (2, len(sample), 9)
    assert np.array_equal(columns[:, 0], targets[sample])
    total = sum(base.z(name, scores[name][sample]) for name in "ab")
    total[np.arange(len(sample)), targets[sample]] = -np.inf
    total[barred[sample]] = -np.inf
    assert not np.take_along_axis(barred[sample], columns, 1).any()
    for row, own in enumerate(total):
        assert set(columns[row, 1:5]) == set(np.argsort(-own)[:4])
    assert np.exp(stands_for[:, 5:]) == pytest.approx(24 / 4)
    for place, name in enumerate("ab"):
        assert np.array_equal(z[place], np.take_along_axis(base.z(name, scores[name][sample]), columns, 1))


def test_each_fold_has_its_own_rows_of_the_sample(monkeypatch):
    rng, losses, drawn = np.random.default_rng(0), [], []
    scores = {name: rng.normal(size=(23, 30)).astype(np.float32) for name in "ab"}
    nine, targets = np.full(23, 9), rng.integers(30, size=23)

    def sampled(*arguments):
        z, columns, stands_for = _sampled(*arguments)
        drawn.append(stands_for + rng.random(stands_for.shape))  # tells rows apart
        return z, columns, drawn[0]

    def cross_entropy(stands_for):
        losses.append(stands_for)
        return fitting.cross_entropy(stands_for)

    _sampled = weighing._sampled
    monkeypatch.setattr(weighing, "_sampled", sampled)
    monkeypatch.setattr(weighing, "cross_entropy", cross_entropy)
    settings = FusionSettings(kinds=("without counts",), negatives=8)
    fit_ranking(scores, targets, nine, np.full(30, 9), settings=settings)
    folds = np.arange(23) % 5
    assert len(losses) == 6
    assert np.array_equal(losses[0], drawn[0])
    for fold, given in enumerate(losses[1:]):
        assert np.array_equal(given, drawn[0][folds != fold])


def test_scorers_are_left_out_while_fitting():
    rng, nine = np.random.default_rng(0), np.full(50, 9)
    scores = {name: rng.normal(size=(50, 30)).astype(np.float32) for name in "ab"}
    targets, settings = rng.integers(30, size=50), FusionSettings(kinds=("without counts",), drop=0.0)
    whole, less = (
        fit_ranking(scores, targets, nine, np.full(30, 9), settings=settings.model_copy(update={"drop": drop})).theta
        for drop in (0.0, 0.5)
    )
    assert not np.allclose(whole, less)


def test_pairs_keep_their_own_pull_and_share_of_scorers_that_are_left_out():
    rng, nine = np.random.default_rng(0), np.full(60, 9)
    labels = rng.integers(2, size=60)
    scores = {name: (rng.normal(size=60) + labels).astype(np.float32) for name in "ab"}

    def theta(**keys):
        return fit_labels(scores, labels, nine, nine, settings=FusionSettings(kinds=("without counts",), **keys)).theta

    assert np.array_equal(theta(), theta(l2=0.001, drop=0.1))
    assert not np.allclose(theta(), theta(l2=2.0 / 60, drop=0.1))
    assert not np.allclose(theta(), theta(drop=0.5))


def test_levels_are_ordered_by_other_queries_than_those_that_measure_them():
    """`a` finds 11 targets and `b` the other 9; without the first fold, all of which `a` finds, `b` is the better."""
    by_fold = {0: 4, 1: 0, 2: 3, 3: 2, 4: 2}
    finds = np.zeros(20, dtype=bool)
    for fold, count in by_fold.items():
        finds[fold::5][:count] = True
    scores = {name: np.tile(np.arange(30, dtype=np.float32), (20, 1)) for name in "ab"}
    for row, own in enumerate(finds):
        scores["a" if own else "b"][row, 0] = 99.0  # of the other it is the last
    nine, targets = np.full(20, 9), np.zeros(20, dtype=np.int64)
    settings = FusionSettings(kinds=("levels",), drop=0.0)
    fusion = fit_ranking(scores, targets, nine, np.full(30, 9), settings=settings)
    # `b` first where the first fold is measured: nothing is found. Without the second fold 11 to 5, without the third
    # 8 to 8, without the others 9 to 7: `a` first, and 0, 3, 2 and 2 are found.
    assert fusion.candidates["levels"] == pytest.approx(7 / 20)
    assert fusion.levels == (0, 1)


def test_rows_of_a_user_are_compared_wherever_they_stand(monkeypatch):
    monkeypatch.setattr(fitting, "BLOCK_CELLS", 120)  # 60 rows of two scorers in a block
    rng, users, nine = np.random.default_rng(0), np.repeat(np.arange(40), 6), np.full(240, 9)
    labels = np.tile([1.0, 0.0, 1.0, 0.0, 0.0, 0.0], 40)
    scores = {name: (rng.normal(size=240) + labels * by).astype(np.float32) for name, by in (("a", 1.0), ("b", 0.3))}
    settings = FusionSettings(kinds=("without counts",), pairwise=5.0, drop=0.0)
    found = []
    for order in (np.arange(240), np.arange(240).reshape(40, 6).T.ravel()):
        given = {name: own[order] for name, own in scores.items()}
        found.append(fit_labels(given, labels[order], nine, nine, users=users[order], settings=settings).theta)
    np.testing.assert_allclose(found[1], found[0], rtol=1e-4)


def test_rankings_are_measured_on_other_users(monkeypatch):
    rng, parts = np.random.default_rng(0), []
    users, nine = np.repeat(np.arange(6), 4), np.full(24, 9)
    scores = {name: rng.normal(size=(24, 30)).astype(np.float32) for name in "ab"}
    made = weighing._made

    def noted(base, problem, *others):
        parts.append(problem.z.shape[1])
        return made(base, problem, *others)

    monkeypatch.setattr(weighing, "_made", noted)
    settings = FusionSettings(kinds=("without counts",), negatives=8)
    fit_ranking(scores, rng.integers(30, size=24), nine, np.full(30, 9), users=users, settings=settings)
    assert parts == [24, 16, 20, 20, 20, 20]  # all; then each part without the users 0 and 5, 1, 2, 3, 4


def test_levels_are_put_in_order_by_other_users_than_they_are_measured_on():
    """Of two scorers each knows half of the users, and is blind to the others."""
    rng, users = np.random.default_rng(0), np.repeat(np.arange(10), 8)
    labels = np.tile([0, 1], 40)
    knows = {name: users % 2 == part for part, name in enumerate("ab")}
    scores = {
        name: np.where(own, labels + 0.1 * rng.normal(size=80), rng.normal(size=80)).astype(np.float32)
        for name, own in knows.items()
    }
    counts, orders = np.full(80, 9), []
    made = weighing._made

    def noted(base, problem, settings, single):
        orders.append([single(name) for name in "ab"])
        return made(base, problem, settings, single)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weighing, "_made", noted)
        fit_labels(scores, labels, counts, counts, users=users, settings=FusionSettings(kinds=("levels",)))
    whole = [auc(labels, scores[name]) for name in "ab"]
    assert orders[-1] == pytest.approx(whole, abs=1e-6)
    assert len(orders) == 6
    assert all(own != pytest.approx(whole, abs=1e-6) for own in orders[:-1])

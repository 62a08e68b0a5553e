"""Fitting: losses by hand."""

import numpy as np
import pytest

from recllm.fitting import PLAIN, Problem, cross_entropy, inside_users, logistic, minimise, sample_candidates


def test_candidates_that_are_not_there_have_no_part():
    loss, gradient, _ = cross_entropy(np.array([[0.0, 0.0, -np.inf]]))(slice(0, 1), np.array([[0.0, 0.0, 50.0]]), 0.0)
    assert loss == pytest.approx(np.log(2))
    assert gradient.tolist() == [[-0.5, 0.5, 0.0]]


def test_the_loss_inside_users_is_their_mean():
    labels, users, rows = np.array([1.0, 0.0, 1.0, 0.0]), np.array([1, 1, 2, 2]), slice(0, 4)
    silent = np.zeros((4, 1))
    whole, alone = (loss(rows, silent, 0.0)[0] for loss in (inside_users(labels, users, 2.0), logistic(labels)))
    assert whole - alone == pytest.approx(4 * 2.0 * np.log(2))


def test_half_of_the_sample_are_the_highest_and_the_rest_stands_for_all_others():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(3, 500)).astype(np.float32)
    scores[:, :20] = np.nan  # the lowest
    targets, barred = np.array([30, 40, 50]), np.zeros((3, 500), dtype=bool)
    barred[:, 100:150] = True
    columns, stands_for = sample_candidates(targets, scores, barred, 21, rng)
    assert columns.shape == stands_for.shape == (3, 22)
    for row, target in enumerate(targets):
        free = np.setdiff1d(np.arange(500), [target, *range(100, 150)])
        by_score = free[np.argsort(-np.nan_to_num(scores[row, free], nan=-np.inf))]
        assert columns[row, 0] == target
        assert set(columns[row, 1:11]) == set(by_score[:10])
        assert set(columns[row, 11:]) <= set(by_score[10:])
        assert len(set(columns[row])) == 22
        assert np.exp(stands_for[row]) == pytest.approx([1.0] * 11 + [(449 - 10) / 11] * 11)
    stands_for = sample_candidates(targets, scores, barred, 1, rng)[1]
    assert np.exp(stands_for[:, 1]) == pytest.approx(449)  # of all others
    everything, stands_for = sample_candidates(targets, scores, barred, 600, rng)
    assert (np.isfinite(stands_for).sum(axis=1) == 450).all()
    assert not stands_for[np.isfinite(stands_for)].any()
    assert all(len(set(row[np.isfinite(own)])) == 450 for row, own in zip(everything, stands_for, strict=True))


def test_the_loss_over_a_sample_is_near_the_one_over_all():
    rng = np.random.default_rng(0)
    scores = 3.0 * rng.normal(size=(400, 1000))
    targets, barred = rng.integers(1000, size=400), np.zeros((400, 1000), dtype=bool)
    whole = float((np.log(np.exp(scores).sum(axis=1)) - scores[np.arange(400), targets]).sum())
    columns, stands_for = sample_candidates(targets, scores, barred, 200, rng)
    loss = cross_entropy(stands_for)(slice(0, 400), np.take_along_axis(scores, columns, 1), 0.0)[0]
    assert loss == pytest.approx(whole, rel=1e-3)
    assert (
        cross_entropy(np.where(np.isfinite(stands_for), 0.0, stands_for))(
            slice(0, 400), np.take_along_axis(scores, columns, 1), 0.0
        )[0]
        < 0.999 * whole
    )  # where nothing stands for others


def test_the_prior_counts_the_less_the_more_rows_there_are():
    rng, none = np.random.default_rng(0), np.zeros((40, 1))
    z = rng.normal(size=(2, 40, 5)).astype(np.float32)
    z[0, :, 0] += 2.0
    stands_for = np.zeros((40, 5))

    def distance(times: int, l2: float | None) -> float:
        user, item = np.tile(none, (times, 1)), np.zeros((40 * times, 5))
        problem = Problem(np.tile(z, (1, times, 1)), user, item, cross_entropy(np.tile(stands_for, (times, 1))))
        theta = minimise(problem, counts=False, l2=l2, iterations=100)
        return float(np.abs(theta[:, 0] - PLAIN).sum())

    assert distance(8, None) > 1.2 * distance(1, None)
    assert distance(8, None) == pytest.approx(distance(1, 2.0 / 320), rel=1e-3)
    assert distance(8, 0.05) == pytest.approx(distance(1, 0.05), rel=1e-3)

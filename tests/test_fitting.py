"""Fitting: losses by hand."""

import numpy as np
import pytest

from recllm.fitting import cross_entropy, inside_users, logistic


def test_candidates_that_are_not_there_have_no_part():
    loss, gradient, _ = cross_entropy(np.array([[True, True, False]]))(slice(0, 1), np.array([[0.0, 0.0, 50.0]]), 0.0)
    assert loss == pytest.approx(np.log(2))
    assert gradient.tolist() == [[-0.5, 0.5, 0.0]]


def test_the_loss_inside_users_is_their_mean():
    labels, users, rows = np.array([1.0, 0.0, 1.0, 0.0]), np.array([1, 1, 2, 2]), slice(0, 4)
    silent = np.zeros((4, 1))
    whole, alone = (loss(rows, silent, 0.0)[0] for loss in (inside_users(labels, users, 2.0), logistic(labels)))
    assert whole - alone == pytest.approx(4 * 2.0 * np.log(2))

"""Weighing: what was fitted is measured on others, and a scorer alone is kept where it is better."""

import numpy as np

from recllm.fusion import Fusion
from recllm.metrics import auc
from recllm.weighing import FusionSettings, _best, _folds, alone, fit_labels


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

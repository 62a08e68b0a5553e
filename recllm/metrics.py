"""Metrics: per-row ranking metrics from ranks, AUC and UAUC from labels; rows stay apart so that bootstraps pair."""

from collections.abc import Sequence, Set
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Rows = NDArray[np.float64]
"""float64[rows], one figure per row."""


class Ranks(NamedTuple):
    """The places that each row's target may have, 1 the best: several where others share its score.

    Metrics are means over those places, what they are under random ties (McSherry & Najork 2008, "Computing
    information retrieval performance measures efficiently in the presence of tied scores"); at the place in the middle
    a scorer that says the same of everything would have all or nothing.

    Attributes:
        first: float64[rows], with all others that share its score behind it; infinite for a target without a score.
        last: float64[rows], with all of them before it; infinite where `first` is.
    """

    first: Rows
    last: Rows

    @property
    def middle(self) -> Rows:
        """The expected place, float64[rows]."""
        return (self.first + self.last) / 2.0


def hit_rate(ranks: Ranks, k: int) -> Rows:
    """1.0 where the target is among the first `k`, else 0.0; between them where ties reach over `k`: float64[rows]."""
    return _mean_gain(ranks, np.ones(k))


def recall(ranks: Ranks, k: int) -> Rows:
    """Share of the relevant items among the first `k`; with one target per row it equals `hit_rate`: float64[rows]."""
    return hit_rate(ranks, k)


def ndcg(ranks: Ranks, k: int) -> Rows:
    """1 / log2(1 + rank) within the first `k`, else 0.0: float64[rows].

    Järvelin and Kekäläinen 2002 with one relevant item, whose ideal gain is 1.
    """
    return _mean_gain(ranks, 1.0 / np.log2(np.arange(2.0, k + 2.0)))


def mrr(ranks: Ranks, k: int | None = None) -> Rows:
    """1 / rank, within the first `k` where it is given: float64[rows] (Voorhees 1999)."""
    if k is None:
        there = ranks.last[np.isfinite(ranks.last)]
        k = int(there.max()) if len(there) else 0
    return _mean_gain(ranks, 1.0 / np.arange(1.0, k + 1.0))


def _mean_gain(ranks: Ranks, gains: Rows) -> Rows:
    """The mean gain over each row's places, float64[rows]; `gains`, float64[k], are of the places 1 … k, 0 behind."""
    placed = np.isfinite(ranks.first)
    first, last = (np.where(placed, value, 1.0) for value in ranks)
    upto = np.concatenate([[0.0], np.cumsum(gains)])
    summed = upto[np.minimum(last, len(gains)).astype(int)] - upto[np.minimum(first - 1.0, len(gains)).astype(int)]
    # Of one place the gain itself: a difference of sums has other last bits.
    alone = np.concatenate([gains, [0.0]])[np.minimum(first - 1.0, len(gains)).astype(int)]
    return np.where(placed, np.where(first == last, alone, summed / (last - first + 1.0)), 0.0)


def recall_at(top: NDArray[np.int64], relevant: Sequence[Set[int]]) -> Rows:
    """Share of each row's `relevant` columns among its `top`, int64[rows, k] with −1 for no item: float64[rows].

    NaN for a row without relevant columns.
    """
    assert len(top) == len(relevant)
    return np.array(
        [
            len(wanted & set(row.tolist())) / len(wanted) if wanted else np.nan
            for row, wanted in zip(top, relevant, strict=True)
        ]
    )


def coverage(top: NDArray[np.int64], n_items: int) -> float:
    """Share of the `n_items` candidates that stand in at least one row of `top`, int64[rows, k] with −1 for no item."""
    return len(np.unique(top[top >= 0])) / n_items


def auc(labels: ArrayLike, scores: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Probability that a positive row scores higher than a negative one, a tie counts half; NaN with one label only.

    The Mann-Whitney statistic (Hanley and McNeil 1982). `weights` counts a row so many times.

    Args:
        labels: [rows], above 0 is positive.
        scores: [rows], no NaN.
        weights: [rows], 1 where left out.
    """
    levels, level = np.unique(np.asarray(scores), return_inverse=True)
    return auc_of_levels(np.asarray(labels) > 0, level, len(levels), weights)


def auc_of_levels(
    positive: NDArray[np.bool_], level: NDArray[np.int64], levels: int, weights: ArrayLike | None = None
) -> float:
    """As `auc`, for scores that are sorted into `level` 0 … `levels` − 1 already: a bootstrap sorts once."""
    count = np.ones(len(positive)) if weights is None else np.asarray(weights, dtype=np.float64)
    positives = np.bincount(level, weights=count * positive, minlength=levels)
    negatives = np.bincount(level, weights=count * ~positive, minlength=levels)
    pairs = positives.sum() * negatives.sum()
    below = np.cumsum(negatives) - negatives / 2.0
    return float(positives @ below / pairs) if pairs else float("nan")


def user_aucs(users: ArrayLike, labels: ArrayLike, scores: ArrayLike) -> tuple[NDArray[np.int64], Rows]:
    """AUC inside each user: first row of each, int64[users], and float64[users], NaN with one label."""
    labels, scores = np.asarray(labels), np.asarray(scores)
    _, first, place = np.unique(np.asarray(users), return_index=True, return_inverse=True)
    order = np.argsort(place, kind="stable")
    groups = np.split(order, np.cumsum(np.bincount(place))[:-1])
    return first, np.array([auc(labels[rows], scores[rows]) for rows in groups])


def uauc(users: ArrayLike, labels: ArrayLike, scores: ArrayLike) -> tuple[float, int]:
    """Mean of the AUC inside each user who has both labels, every such user counting once; and their number.

    As in CoLLM (Zhang et al. 2023). NaN and 0 without such a user.
    """
    _, each = user_aucs(users, labels, scores)
    known = each[~np.isnan(each)]
    return (float(known.mean()) if len(known) else float("nan")), len(known)

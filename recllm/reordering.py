"""Reordering: a small network looks again at the first hundred of a fused list, and at what each scorer says of them.

A fusion adds what its scorers say. Whether two of them agree, or how far one of them stands above its next, is in no
sum; so what the sum has brought to the top is put in order once more, by one hidden layer over all shares.
"""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from recllm.fitting import places_of

Array = NDArray[np.float32]

FIRST = 100
"""Places of a list that are put in order again."""
SHARE = "network"
"""What the network adds, among the shares."""
CLIPPED = 8.0
"""Standard deviations from the mean beyond which a feature says no more."""
COPIES, HIDDEN = 4, 32
"""Networks whose mean is taken, and units of each: one alone moves the figures more than what it is worth."""
PASSES, ROWS_IN_STEP = 5, 64
LEARNING_RATE, WEIGHT_DECAY, DROPOUT = 2e-3, 0.1, 0.3
WARM_SHARE = 0.3
"""Of the steps, those in which the learning rate still rises."""
BETAS, TINY = (0.9, 0.999), 1e-8


@dataclass(frozen=True, eq=False)
class Reordering:
    """The network: what it adds to a place's score is outer · relu(inner · x + bias) of its features x."""

    means: Array
    """float32[features]"""
    deviations: Array
    """float32[features]"""
    inner: Array
    """float32[features, units]"""
    bias: Array
    """float32[units]"""
    outer: Array
    """float32[units]"""

    def added(self, shares: Array, n_user: NDArray[np.int64], n_item: NDArray[np.int64], few: int) -> Array:
        """What is added to the scores of the first places of some lists: float32[rows, places], 0 at the least.

        It is counted from the least of a list, so that no place falls behind what was not looked at. New items,
        whose shares are by other weights than those it learnt with, all have the mean of the known ones.

        Args:
            shares: float32[rows, scorers, places], best place first; NaN where a list has ended.
            n_user: length of each query's known history, int[rows].
            n_item: train events of the item at each place, int[rows, places].
            few: events from which an item is known.
        """
        there = ~np.isnan(shares[:, 0])
        x = (features(shares, n_user, n_item) - self.means) / self.deviations
        hidden = np.maximum(np.clip(x, -CLIPPED, CLIPPED) @ self.inner + self.bias, np.float32(0))
        found = (hidden @ self.outer).astype(np.float32)
        known = there & (n_item >= few)
        found = np.where(known, found, _mean(found, known))
        least = np.where(there, found, np.inf).min(axis=1, keepdims=True, initial=np.inf)
        result: Array = np.where(there, found - np.where(np.isinf(least), 0, least), 0).astype(np.float32)
        return result

    def facts(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {name: getattr(self, name).tolist() for name in self.__dataclass_fields__}

    @classmethod
    def of(cls, facts: dict[str, Any]) -> Self:
        """What `facts` gave."""
        return cls(**{name: np.array(value, dtype=np.float32) for name, value in facts.items()})


def features(shares: Array, n_user: NDArray[np.int64], n_item: NDArray[np.int64]) -> Array:
    """What the network sees of every place: float32[rows, places, 2 · scorers + 3].

    Each scorer's share, from its mean over the list; the logarithm of the place that it has by that share alone, equal
    ones having their mean rank; of the place that it has; and of 1 + the events of the item and of the user.

    Args:
        shares: float32[rows, scorers, places], NaN where a list has ended.
        n_user: int[rows].
        n_item: int[rows, places].
    """
    rows, scorers, places = shares.shape
    there = ~np.isnan(shares[:, 0])
    result = np.zeros((rows, places, 2 * scorers + 3), dtype=np.float32)
    for at in range(scorers):
        own = shares[:, at]
        result[:, :, at] = np.where(there, own - _mean(own, there), 0)
        result[:, :, scorers + at] = np.log(places_of(own))
    result[:, :, -3] = np.log(np.arange(1, places + 1))
    result[:, :, -2] = np.log1p(n_item)
    result[:, :, -1] = np.log1p(n_user)[:, None]
    return result


def _mean(values: Array, of: NDArray[np.bool_]) -> Array:
    """Mean of each row over those places, float32[rows, 1]; 0 without any."""
    total = np.where(of, values, 0).sum(axis=1, keepdims=True)
    result: Array = (total / np.maximum(of.sum(axis=1, keepdims=True), 1)).astype(np.float32)
    return result


def learn(x: Array, scores: Array, wanted: NDArray[np.int64], seed: int = 0) -> Reordering:
    """Learn on lists which of their places was wanted: softmax cross-entropy over a list's scores and what is added.

    AdamW (Loshchilov & Hutter 2019) with the rate of one cycle (Smith & Topin 2019), dropout of hidden units; the mean
    of `COPIES` networks, which is one with as many times their units.

    Args:
        x: `features`, float32[rows, places, features].
        scores: of the fusion, float32[rows, places], −inf where a list has ended.
        wanted: the place of each row's target, int64[rows].
        seed: of the networks and of the order of rows.
    """
    there = x[scores > -np.inf]
    means, deviations = there.mean(axis=0), there.std(axis=0)
    deviations = np.where(deviations > 0, deviations, 1).astype(np.float32)
    x = np.clip((x - means) / deviations, -CLIPPED, CLIPPED).astype(np.float32)
    copies = [_network(x, scores, wanted, np.random.default_rng((seed, copy))) for copy in range(COPIES)]
    inner, bias, outer = (np.concatenate([own[part] for own in copies], axis=-1) for part in range(3))
    return Reordering(means, deviations, inner, bias, (outer / COPIES).astype(np.float32))


def _network(x: Array, scores: Array, wanted: NDArray[np.int64], rng: np.random.Generator) -> list[Array]:
    """One network: inner float32[features, units], bias float32[units] and outer float32[units]."""
    reach = 1 / np.sqrt(x.shape[-1])
    weights = [
        rng.uniform(-reach, reach, (x.shape[-1], HIDDEN)).astype(np.float32),
        rng.uniform(-reach, reach, HIDDEN).astype(np.float32),
        np.zeros(HIDDEN, dtype=np.float32),
    ]
    first, second = ([np.zeros_like(own) for own in weights] for _ in range(2))
    steps = PASSES * -(-len(x) // ROWS_IN_STEP)
    for step in range(steps):
        if step % (steps // PASSES) == 0:
            order = rng.permutation(len(x))
        place = step % (steps // PASSES) * ROWS_IN_STEP
        rows = order[place : place + ROWS_IN_STEP]
        kept = np.float32(1 / (1 - DROPOUT)) * (rng.random((len(rows), x.shape[1], HIDDEN), np.float32) >= DROPOUT)
        _, slopes = loss_and_slopes(weights, x[rows], scores[rows], wanted[rows], kept)
        rate = LEARNING_RATE * _cycle(step / max(steps - 1, 1))
        for own, slope, mean, square in zip(weights, slopes, first, second, strict=True):
            mean += (1 - BETAS[0]) * (slope - mean)
            square += (1 - BETAS[1]) * (slope**2 - square)
            ahead = mean / (1 - BETAS[0] ** (step + 1))
            spread = np.sqrt(square / (1 - BETAS[1] ** (step + 1))) + TINY
            own -= np.float32(rate) * (WEIGHT_DECAY * own + ahead / spread)
    return weights


def loss_and_slopes(
    weights: list[Array], x: Array, scores: Array, wanted: NDArray[np.int64], kept: Array | None = None
) -> tuple[float, list[Array]]:
    """Mean cross-entropy of the wanted places, and its slope by each of a network's `weights`.

    Args:
        weights: inner, bias and outer, as `Reordering` has them.
        x: standardised features, float32[rows, places, features].
        scores: float32[rows, places], −inf where a list has ended.
        wanted: int64[rows].
        kept: what hidden units are multiplied by, float32[rows, places, units]: dropout.
    """
    inner, bias, outer = weights
    before = x @ inner + bias
    on = before > 0 if kept is None else (before > 0) * kept
    hidden = before * on
    total = scores + hidden @ outer
    total = total - total.max(axis=1, keepdims=True)
    power = np.exp(total)
    wrong = power / power.sum(axis=1, keepdims=True)
    rows = np.arange(len(x))
    loss = float(np.mean(np.log(power.sum(axis=1)) - total[rows, wanted]))
    wrong[rows, wanted] -= 1
    wrong /= len(x)
    back = (wrong[:, :, None] * outer * on).reshape(-1, len(bias))
    flat = x.reshape(-1, x.shape[-1])
    return loss, [flat.T @ back, back.sum(axis=0), np.tensordot(wrong, hidden, 2)]


def _cycle(done: float) -> float:
    """Of the learning rate: from a 25th up to all of it, by cosines, and down to nothing."""
    if done < WARM_SHARE:
        return float(1 / 25 + (1 - 1 / 25) * (1 - np.cos(np.pi * done / WARM_SHARE)) / 2)
    return float(1 + np.cos(np.pi * (done - WARM_SHARE) / (1 - WARM_SHARE))) / 2

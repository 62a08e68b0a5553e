"""Fitting fusion weights: standardised scores and evidence in, θ out, by L-BFGS with analytic gradients."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from recllm.errors import require
from recllm.ranking import Scores

Array = NDArray[np.float64]
Loss = Callable[[slice, Array, float], tuple[float, Array, float]]
"""(rows, their scores float64[rows, candidates], intercept) → summed loss, its gradient on scores and on intercept."""

PLAIN = float(np.log(np.e - 1.0))
"""The θ whose softplus is 1: the plain sum."""
PRIOR = 2.0
"""Pull of the weights towards the plain sum, beside the loss summed over rows."""
FLAT = 1e-6
"""Scores whose deviation is below this share of their size are constant: they say nothing, so z is 0."""
BLOCK_CELLS = 1_000_000
ROWS_OF_A_USER = 64
"""The most rows of one label that are compared with each other inside a user."""
RANK_OFFSET = 60.0
"""The constant of reciprocal rank fusion."""
BORDA_PLACES = 100.0
"""Places that get Borda points."""


@dataclass(frozen=True)
class Evidence:
    """Standardises log1p of an event count, clipped to the range that was seen while fitting."""

    mean: float = 0.0
    deviation: float = 1.0
    low: float = 0.0
    high: float = 0.0

    @classmethod
    def of(cls, counts: ArrayLike) -> Self:
        """Take the constants from `counts`."""
        logs = np.log1p(np.asarray(counts, dtype=np.float64))
        return cls(float(logs.mean()), max(float(logs.std()), 1e-3), float(logs.min()), float(logs.max()))

    def __call__(self, counts: ArrayLike) -> Array:
        """(clip(log1p n, low, high) − mean) / deviation, in the shape of `counts`."""
        logs = np.log1p(np.asarray(counts, dtype=np.float64))
        return (np.clip(logs, self.low, self.high) - self.mean) / self.deviation


def moments(scores: Scores) -> tuple[Array, Array]:
    """Mean and deviation of each row's known scores, float64[rows, 1] each; the deviation is 0 for a constant row."""
    known = ~np.isnan(scores)
    count = np.maximum(known.sum(axis=1, keepdims=True), 1)
    filled = np.where(known, scores, 0.0).astype(np.float64)
    mean = filled.sum(axis=1, keepdims=True) / count
    deviation = np.sqrt((np.where(known, filled - mean, 0.0) ** 2).sum(axis=1, keepdims=True) / count)
    return mean, np.where(deviation > FLAT * np.abs(mean), deviation, 0.0)


def standardised(scores: Scores, mean: ArrayLike, deviation: ArrayLike) -> Scores:
    """(scores − mean) / deviation; 0 where the score is NaN or the deviation 0: float32, the shape of `scores`."""
    deviation = np.asarray(deviation)
    z = (scores - np.asarray(mean)) / np.where(deviation > 0, deviation, 1.0)
    return np.where(np.isnan(z) | (deviation <= 0), 0.0, z).astype(np.float32)


def places_of(scores: Scores) -> Array:
    """Place of each candidate in its row by score, float64[queries, candidates], 1 first, NaN last with −∞.

    Equal ones all have their mean place: by the order of the catalogue, which says nothing, one of them would lead.
    """
    lowest_first = np.where(np.isnan(scores), np.inf, -scores)
    order = np.argsort(lowest_first, axis=1, kind="stable")
    ordered = np.take_along_axis(lowest_first, order, axis=1)
    numbers = np.arange(scores.shape[1])
    differs = np.ones((len(scores), scores.shape[1] + 1), dtype=bool)
    differs[:, 1:-1] = ordered[:, 1:] != ordered[:, :-1]
    first = np.maximum.accumulate(np.where(differs[:, :-1], numbers, 0), axis=1)
    last = np.minimum.accumulate(np.where(differs[:, 1:], numbers, len(numbers))[:, ::-1], axis=1)[:, ::-1]
    places = np.empty(scores.shape)
    np.put_along_axis(places, order, (first + last) / 2.0 + 1.0, axis=1)
    return places


def reciprocal_ranks(scores: Scores, at: Array) -> Scores:
    """1 / (60 + rank) of each row's known scores, by `places_of`, 0 for NaN: float32, the shape of `scores`."""
    return np.where(np.isnan(scores), 0.0, 1.0 / (RANK_OFFSET + at)).astype(np.float32)


def borda_points(scores: Scores, at: Array) -> Scores:
    """The share of the first 100 places that a candidate leaves behind, by `places_of`, 0 for NaN: float32, alike."""
    points = np.maximum(0.0, 1.0 - (at - 1.0) / BORDA_PLACES)
    return np.where(np.isnan(scores), 0.0, points).astype(np.float32)


def softplus(x: ArrayLike) -> Array:
    """log(1 + eˣ), without overflow."""
    return softplus_and_slope(x)[0]


def softplus_and_slope(x: ArrayLike) -> tuple[Array, Array]:
    """log(1 + eˣ) and its derivative 1 / (1 + e⁻ˣ), by one exponential; several times faster than logaddexp."""
    given = np.asarray(x, dtype=np.float64)
    power = np.exp(-np.abs(given))
    return np.maximum(given, 0.0) + np.log1p(power), np.where(given >= 0.0, 1.0, power) / (1.0 + power)


def sigmoid(x: Array) -> Array:
    """1 / (1 + e⁻ˣ), without overflow."""
    return 0.5 * (1.0 + np.tanh(0.5 * x))


@dataclass(frozen=True, eq=False)
class Problem:
    """What the weights are fitted on."""

    z: NDArray[np.float32]
    """float32[scorers, rows, candidates], standardised, 0 where missing or dropped."""
    user: Array
    """float64[rows, 1], evidence of the user."""
    item: Array
    """float64[rows, candidates], evidence of the item."""
    loss: Loss


def sample_candidates(
    targets: NDArray[np.int64],
    scores: NDArray[np.floating[Any]],
    barred: NDArray[np.bool_],
    most: int,
    rng: np.random.Generator,
) -> tuple[NDArray[np.int64], Array]:
    """The target of each row and up to `most` other candidates that are not `barred`, and how many each stands for.

    Half of the others, rounded down, are those with the highest `scores`, between which a list of ten is decided, each
    for itself; the rest is drawn from all that remain, without replacement, and stands for these. So the sums of a
    softmax over the sample are right on average (importance sampling in two strata; Bengio & Senécal 2003).

    Args:
        targets: column of each row's target, int64[rows].
        scores: what the highest are found by, floating[rows, candidates]; NaN counts as the lowest.
        barred: bool[rows, candidates].
        most: the most candidates beside the target.
        rng: draws the rest.

    Returns:
        Columns int64[rows, 1 + most], the target first; and the logarithm of how many candidates each stands for,
        float64[rows, 1 + most], −inf where a row has no more candidates.
    """
    most = min(most, barred.shape[1] - 1)
    columns = np.tile(targets[:, None], (1, most + 1))
    stands_for = np.full(columns.shape, -np.inf)
    stands_for[:, 0] = 0.0
    for row, target in enumerate(targets):
        free = ~barred[row]
        free[target] = False
        free, best = np.flatnonzero(free), most // 2
        if len(free) > most:
            order = np.argpartition(-np.nan_to_num(scores[row, free], nan=-np.inf), best)
            highest, others = free[order[:best]], free[order[best:]]
            drawn = others[rng.permutation(len(others))[: most - best]]
        else:
            highest, others, drawn = free, free[:0], free[:0]
        end = 1 + len(highest)
        columns[row, 1:end], stands_for[row, 1:end] = highest, 0.0
        if len(drawn):
            columns[row, end : end + len(drawn)] = drawn
            stands_for[row, end : end + len(drawn)] = np.log(len(others) / len(drawn))
    return columns, stands_for


def drop_scorers(z: NDArray[np.float32], drop: float, rng: np.random.Generator) -> NDArray[np.float32]:
    """Blank each scorer of `z` in a row with probability `drop`, but never all of a row's."""
    keep = rng.random(z.shape[:2]) >= drop
    keep |= ~keep.any(axis=0)
    return z * keep[:, :, None].astype(np.float32)


def cross_entropy(stands_for: Array) -> Loss:
    """Softmax cross-entropy of the first column; no intercept.

    Args:
        stands_for: the logarithm of how many candidates each stands for, float64[rows, candidates]; −inf: no such one.
    """

    def loss(rows: slice, scores: Array, intercept: float) -> tuple[float, Array, float]:
        scores = scores + stands_for[rows]
        top = scores.max(axis=1, keepdims=True)
        odds = np.exp(scores - top)
        total = odds.sum(axis=1, keepdims=True)
        gradient = odds / total
        gradient[:, 0] -= 1.0
        return float((np.log(total) + top - scores[:, :1]).sum()), gradient, 0.0

    return loss


def logistic(labels: Array) -> Loss:
    """Logistic loss of `labels`, float64[rows] of 0 and 1, for scores float64[rows, 1]."""

    def loss(rows: slice, scores: Array, intercept: float) -> tuple[float, Array, float]:
        logit, label = scores + intercept, labels[rows, None]
        gradient = sigmoid(logit) - label
        return float((softplus(logit) - label * logit).sum()), gradient, float(gradient.sum())

    return loss


def inside_users(labels: Array, users: NDArray[np.int64], weight: float) -> Loss:
    """`logistic`, and `weight` times the logistic loss over pairs of one user's liked and disliked rows.

    Every user who has both counts the same (BPR's loss, Rendle et al. 2009, inside users), as in AUC inside users. Of
    each user's rows of one label at most `ROWS_OF_A_USER`, evenly spaced, are compared; and in a set of several blocks
    only those of one block, so that a user's rows should stand together.

    Args:
        labels: float64[rows] of 0 and 1.
        users: number of each row's user, int64[rows].
        weight: of the pairs beside the rows.
    """
    plain, liked, disliked, shares = logistic(labels), [], [], []
    if weight == 0.0:
        return plain
    order = np.argsort(users, kind="stable")
    for own in np.split(order, np.flatnonzero(np.diff(users[order])) + 1):
        ones, zeros = (_spaced(own[labels[own] == label]) for label in (1.0, 0.0))
        if len(ones) and len(zeros):
            liked.append(np.repeat(ones, len(zeros)))
            disliked.append(np.tile(zeros, len(ones)))
            shares.append(np.full(len(liked[-1]), 1.0 / len(liked[-1])))
    if not liked:
        return plain
    above, below = np.concatenate(liked), np.concatenate(disliked)
    share = np.concatenate(shares) / len(shares)

    def loss(rows: slice, scores: Array, intercept: float) -> tuple[float, Array, float]:
        total, gradient, slope = plain(rows, scores, intercept)
        here = (np.minimum(above, below) >= rows.start) & (np.maximum(above, below) < rows.stop)
        over, under = above[here] - rows.start, below[here] - rows.start
        difference, own = scores[under, 0] - scores[over, 0], weight * len(labels) * share[here]
        moved = own * sigmoid(difference)
        for places, sign in ((under, 1.0), (over, -1.0)):
            gradient[:, 0] += sign * np.bincount(places, weights=moved, minlength=len(scores))
        return total + float(own @ softplus(difference)), gradient, slope

    return loss


def _spaced(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """At most `ROWS_OF_A_USER` of the rows, evenly spaced."""
    if len(rows) <= ROWS_OF_A_USER:
        return rows
    return rows[np.linspace(0, len(rows) - 1, ROWS_OF_A_USER).astype(np.int64)]


def minimise(problem: Problem, *, counts: bool, l2: float | None, iterations: int, signed: bool = False) -> Array:
    """Fit θ, float64[scorers, 3]: the weight of scorer s is softplus(θ_s · [1, user, item]), or `signed` that itself.

    Minimises the mean loss over rows plus l2 · ‖θ − plain sum‖². An `l2` of None is `PRIOR` over the number of rows:
    beside the sum over rows always the same, and so the weaker the more rows there are. Without `counts` only the first
    column moves.

    Raises:
        RecllmError: scipy is not installed.
    """
    optimise = require("scipy.optimize", "train", "Fitting the fusion")
    scorers, rows, candidates = problem.z.shape
    plain = np.zeros((scorers, 3))
    plain[:, 0] = 1.0 if signed else PLAIN
    width = 3 if counts else 1
    size = max(1, BLOCK_CELLS // (scorers * candidates))
    pull = PRIOR / rows if l2 is None else l2

    def theta_of(values: Array) -> Array:
        theta = plain.copy()
        theta[:, :width] = values[:-1].reshape(scorers, width)
        return theta

    def objective(values: Array) -> tuple[float, Array]:
        theta = theta_of(values)
        total, gradient, slope = 0.0, np.zeros((scorers, 3)), 0.0
        for start in range(0, rows, size):
            here = slice(start, min(start + size, rows))
            part, moved, shifted = _block(problem, here, theta, values[-1], signed=signed, counts=counts)
            total, gradient, slope = total + part, gradient + moved, slope + shifted
        gradient = gradient / rows + 2.0 * pull * (theta - plain)
        penalty = pull * float(((theta - plain) ** 2).sum())
        return total / rows + penalty, np.append(gradient[:, :width].ravel(), slope / rows)

    first = np.append(plain[:, :width].ravel(), 0.0)
    found = optimise.minimize(objective, first, jac=True, method="L-BFGS-B", options={"maxiter": iterations})
    return theta_of(found.x)


def _block(
    problem: Problem, rows: slice, theta: Array, intercept: float, *, signed: bool, counts: bool
) -> tuple[float, Array, float]:
    """Summed loss of some rows, its gradient on θ, float64[scorers, 3], and on the intercept.

    Without `counts` a scorer has one weight everywhere, and the gradient on the other two columns is left at zero.
    """
    user, item, z = problem.user[rows], problem.item[rows], problem.z[:, rows].astype(np.float64)
    linear = [bias + by_user * user + by_item * item if counts else np.array(bias) for bias, by_user, by_item in theta]
    linked = [(x, np.ones(())) if signed else softplus_and_slope(x) for x in linear]
    scores = np.zeros(z.shape[1:])
    for (weight, _), own in zip(linked, z, strict=True):
        scores += weight * own
    total, on_scores, slope = problem.loss(rows, scores, intercept)
    gradient = np.zeros((len(theta), 3))
    for row, ((_, steepness), own) in enumerate(zip(linked, z, strict=True)):
        moved = on_scores * own
        moved *= steepness
        gradient[row] = (moved.sum(), (moved * user).sum(), (moved * item).sum()) if counts else (moved.sum(), 0.0, 0.0)
    return total, gradient, slope

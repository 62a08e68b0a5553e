"""Fitting fusion weights: softmax cross-entropy over candidates, or logistic loss, with analytic gradients and L-BFGS."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from recllm.errors import require

Array = NDArray[np.float64]
Loss = Callable[[slice, Array, float], tuple[float, Array, float]]
"""(rows, their scores float64[rows, candidates], intercept) → summed loss, its gradient on the scores, on the intercept."""

PLAIN = float(np.log(np.e - 1.0))
"""The θ whose softplus is 1: the plain sum."""
BLOCK_CELLS = 1_000_000


def softplus(x: Array) -> Array:
    """log(1 + eˣ), without overflow."""
    return np.logaddexp(0.0, x)


def sigmoid(x: Array) -> Array:
    """1 / (1 + e⁻ˣ), without overflow."""
    return 0.5 * (1.0 + np.tanh(0.5 * x))


@dataclass(frozen=True, eq=False)
class Problem:
    """Standardised scores with the evidence for each: what the weights are fitted on."""

    z: NDArray[np.float32]
    """float32[scorers, rows, candidates], 0 where missing or dropped."""
    user: Array
    """float64[rows, 1], standardised log-count of the user's events."""
    item: Array
    """float64[rows, candidates], standardised log-count of the item's events."""


def drop_scorers(z: NDArray[np.float32], drop: float, rng: np.random.Generator) -> NDArray[np.float32]:
    """Blank each scorer in a row with probability `drop`, but never all of them; as dropout, without rescaling."""
    keep = rng.random(z.shape[:2]) >= drop
    keep |= ~keep.any(axis=0)
    return z * keep[:, :, None]


def cross_entropy(valid: NDArray[np.bool_]) -> Loss:
    """Softmax cross-entropy of the first column over the `valid` ones, bool[rows, candidates]; no intercept."""

    def loss(rows: slice, scores: Array, intercept: float) -> tuple[float, Array, float]:
        scores = np.where(valid[rows], scores, -np.inf)
        top = scores.max(axis=1, keepdims=True)
        odds = np.exp(scores - top)
        total = odds.sum(axis=1, keepdims=True)
        gradient = odds / total
        gradient[:, 0] -= 1.0
        return float((np.log(total) + top - scores[:, :1]).sum()), gradient, 0.0

    return loss


def logistic(labels: Array) -> Loss:
    """Logistic loss of `labels`, float64[rows] of 0 and 1; scores are float64[rows, 1]."""

    def loss(rows: slice, scores: Array, intercept: float) -> tuple[float, Array, float]:
        logit, label = scores + intercept, labels[rows, None]
        gradient = sigmoid(logit) - label
        return float((softplus(logit) - label * logit).sum()), gradient, float(gradient.sum())

    return loss


def minimise(problem: Problem, loss: Loss, *, counts: bool, l2: float, iterations: int) -> Array:
    """Fit θ, float64[scorers, 3]: the weight of scorer s is softplus(θ_s · [1, user, item]).

    Minimises the mean loss over rows plus `l2` · ‖θ − plain sum‖². Without `counts` only the first column moves.

    Raises:
        RecllmError: scipy is not installed.
    """
    optimise = require("scipy.optimize", "train", "Fitting the fusion")
    scorers, rows, candidates = problem.z.shape
    start = np.zeros((scorers, 3))
    start[:, 0] = PLAIN
    width = 3 if counts else 1
    size = max(1, BLOCK_CELLS // (scorers * candidates))
    blocks = [slice(at, min(at + size, rows)) for at in range(0, rows, size)]

    def objective(values: Array) -> tuple[float, Array]:
        theta = start.copy()
        theta[:, :width] = values[:-1].reshape(scorers, width)
        total, gradient, slope = 0.0, np.zeros((scorers, 3)), 0.0
        for block in blocks:
            part, moved, shifted = _block(problem, block, theta, values[-1], loss)
            total, gradient, slope = total + part, gradient + moved, slope + shifted
        away = theta - start
        gradient = gradient / rows + 2.0 * l2 * away
        return total / rows + l2 * float((away**2).sum()), np.append(gradient[:, :width].ravel(), slope / rows)

    first = np.append(start[:, :width].ravel(), 0.0)
    found = optimise.minimize(objective, first, jac=True, method="L-BFGS-B", options={"maxiter": iterations})
    theta = start.copy()
    theta[:, :width] = found.x[:-1].reshape(scorers, width)
    return theta


def _block(
    problem: Problem, rows: slice, theta: Array, intercept: float, loss: Loss
) -> tuple[float, Array, float]:
    """Summed loss of some rows, its gradient on θ, float64[scorers, 3], and on the intercept."""
    user, item = problem.user[rows], problem.item[rows]
    linear = [t[0] + t[1] * user + t[2] * item for t in theta]
    z = problem.z[:, rows].astype(np.float64)
    scores = sum(softplus(x) * own for x, own in zip(linear, z, strict=True))
    total, on_scores, slope = loss(rows, np.asarray(scores), intercept)
    on_linear = [on_scores * sigmoid(x) * own for x, own in zip(linear, z, strict=True)]
    gradient = [[g.sum(), (g * user).sum(), (g * item).sum()] for g in on_linear]
    return total, np.array(gradient), slope

"""Matrix factorization: implicit ALS, explicit ALS with biases; a new history is folded in in closed form."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import Field

from recllm.data import Interactions, Query
from recllm.errors import RecllmError, require
from recllm.priors import read_arrays, take_rows, write_arrays
from recllm.ranking import ItemIndex, Scores, batches, dot_scores
from recllm.recency import recency_weights
from recllm.recipes import Settings


class FactorSettings(Settings):
    """Settings of `ImplicitMF`, named as in implicit's AlternatingLeastSquares."""

    factors: int = Field(64, ge=1)
    """Length of a factor vector."""
    regularization: float = Field(30.0, gt=0)
    """λ of the ridge term."""
    alpha: float = Field(5.0, gt=0)
    """Confidence of one event; an item without an event has confidence 1."""
    iterations: int = Field(15, ge=1)
    """Alternations between users and items."""


class ExplicitSettings(Settings):
    """Settings of `ExplicitMF`."""

    factors: int = Field(32, ge=1)
    """Length of a factor vector."""
    regularization: float = Field(5.0, gt=0)
    """λ of the ridge term on factors."""
    bias_regularization: float = Field(5.0, gt=0)
    """λ of the ridge term on b_user and b_item."""
    iterations: int = Field(10, ge=1)
    """Alternations between users and items."""


def _codes(frame: pl.DataFrame, key: str) -> tuple[list[str], NDArray[np.int64]]:
    """Ids in order of first appearance, and each event's place among them, int64[events]."""
    ids = frame[key].unique(maintain_order=True).to_list()
    places = {name: place for place, name in enumerate(ids)}
    return ids, np.fromiter((places[name] for name in frame[key]), dtype=np.int64, count=len(frame))


def user_items_matrix(interactions: Interactions) -> tuple[ItemIndex, Any]:
    """The items, and scipy's csr matrix float32[users, items] of event counts, or of the sums of their weights.

    Raises:
        RecllmError: no interactions, or scipy is not installed.
    """
    if not len(interactions):
        raise RecllmError(
            "Matrix factorization needs interactions, and the training part has none. Check the split; and where likes "
            "are learnt, data.like_at: no training event is rated as high."
        )
    sparse = require("scipy.sparse", "train", "Fitting matrix factorization")
    users, rows = _codes(interactions.frame, "user_id")
    items, columns = _codes(interactions.frame, "item_id")
    weights = interactions.weights()
    return ItemIndex(items), sparse.csr_matrix((weights, (rows, columns)), shape=(len(users), len(items)))


class ImplicitMF:
    """Weighted matrix factorization for events without ratings (Hu, Koren, Volinsky 2008).

    implicit's ALS fits the item factors; the factors of a user are always folded in from the query's history, so a new
    user and a known one are one case. NaN for an item without train events and for a history without a known item,
    where implicit itself answers with numbers that mean nothing.
    """

    def __init__(
        self,
        items: ItemIndex,
        item_factors: NDArray[np.float32],
        settings: FactorSettings,
        half_life: float | None = None,
    ) -> None:
        """Keep `item_factors`, float32[items, factors]; a history fades with `half_life`, in events."""
        self.items, self.item_factors, self.settings, self.half_life = items, item_factors, settings, half_life
        factors = item_factors.astype(np.float64)
        # YᵀY + λI, the part of the normal equations that all users share: (factors, factors)
        self.gram = factors.T @ factors + settings.regularization * np.eye(factors.shape[1])

    @classmethod
    def fit(
        cls, interactions: Interactions, settings: FactorSettings | None = None, *, seed: int = 0, threads: int = 0
    ) -> Self:
        """Fit item factors on event counts, on the CPU; `threads` 0 takes every core.

        The factors depend on the seed and not on `threads`: every row is solved by one thread. implicit's solver for
        CUDA leaves `alpha` out while it fits, and draws by the clock where the seed is 0.

        Raises:
            RecllmError: no interactions, or implicit is not installed.
        """
        settings = settings or FactorSettings()
        items, user_items = user_items_matrix(interactions)
        als = require("implicit.als", "train", "Fitting matrix factorization")
        limits = require("threadpoolctl", "train", "Fitting matrix factorization").threadpool_limits
        with limits(1, "blas"):  # implicit threads over rows itself, and warns when BLAS does so too
            model = als.AlternatingLeastSquares(
                **settings.model_dump(), random_state=seed, use_gpu=False, num_threads=threads
            )
            model.fit(user_items, show_progress=False)
        return cls(items, np.asarray(model.item_factors, dtype=np.float32), settings)

    def user_factors(self, queries: Sequence[Query]) -> NDArray[np.float32]:
        """Fold histories in: float32[queries, factors], NaN for a history without a known item.

        x = (YᵀY + λI + Σ (cᵢ − 1) yᵢyᵢᵀ)⁻¹ Σ cᵢyᵢ with cᵢ = alpha · (events with item i), equation 4 of Hu et al. 2008
        in implicit's convention (its `recalculate_user`); with a half-life an event counts by its recency.
        """
        width = self.item_factors.shape[1]
        result = np.full((len(queries), width), np.nan, dtype=np.float32)
        for place, part in batches(queries):
            known = [self._confidences(query) for query in part]
            left = np.tile(self.gram, (len(part), 1, 1))  # (batch, factors, factors)
            right = np.zeros((len(part), width, 1))
            for row, (rows, confidence) in enumerate(known):
                own = self.item_factors[rows].astype(np.float64)
                left[row] += (own.T * (confidence - 1.0)) @ own
                right[row, :, 0] = confidence @ own
            solved = np.linalg.solve(left, right)[:, :, 0]
            empty = np.array([not len(rows) for rows, _ in known])
            result[place] = np.where(empty[:, None], np.nan, solved)
        return result

    def _confidences(self, query: Query) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Each known item of the history, int64[items], and its confidence, float64[items]."""
        rows = self.items.known(query.history)
        own, place = np.unique(rows, return_inverse=True)
        events = np.bincount(place, weights=recency_weights(len(rows), self.half_life), minlength=len(own))
        return own, self.settings.alpha * events.astype(np.float64)

    def query_vectors(self, queries: Sequence[Query]) -> NDArray[np.float32]:
        """The same as `user_factors`."""
        return self.user_factors(queries)

    def item_vectors(self, candidates: ItemIndex) -> NDArray[np.float32]:
        """Item factors in the order of `candidates`, float32[candidates, factors]; NaN without train events."""
        return take_rows(self.item_factors, self.items, candidates)

    def score(self, queries: Sequence[Query], candidates: ItemIndex) -> Scores:
        """Dot products x · Yᵀ: float32[queries, candidates]."""
        return dot_scores(self.user_factors(queries), self.item_vectors(candidates))

    def save(self, folder: Path) -> None:
        """Write `mf.safetensors` (item_factors) and `mf.json` (ids, settings, half-life)."""
        facts = {"ids": self.items.ids, "settings": self.settings.model_dump(), "half_life": self.half_life}
        write_arrays(folder, "mf", {"item_factors": self.item_factors}, facts)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `save` wrote."""
        arrays, facts = read_arrays(folder, "mf")
        return cls(
            ItemIndex(facts["ids"]), arrays["item_factors"], FactorSettings(**facts["settings"]), facts.get("half_life")
        )


def _ridge(
    design: NDArray[np.float64], target: NDArray[np.float64], penalty: NDArray[np.float64]
) -> NDArray[np.float64]:
    """(DᵀD + diag(penalty))⁻¹ Dᵀt: float64[columns]."""
    solved = np.linalg.solve(design.T @ design + np.diag(penalty), design.T @ target)
    return np.asarray(solved, dtype=np.float64)


def _groups(codes: NDArray[np.int64], count: int) -> Iterator[NDArray[np.int64]]:
    """The events of each code 0 … count − 1, int64[events of it]."""
    order = np.argsort(codes, kind="stable")
    yield from np.split(order, np.searchsorted(codes[order], np.arange(1, count)))


class ExplicitMF:
    """Matrix factorization for ratings: rating ≈ μ + b_user + b_item + p·q (Koren, Bell, Volinsky 2009), fitted by ALS.

    Factors and bias of a user are folded in from the query's ratings, the later ones counting more where they fade. NaN
    without ratings of a known item, and for an item without train ratings.
    """

    def __init__(
        self,
        items: ItemIndex,
        item_factors: NDArray[np.float32],
        mean: float,
        settings: ExplicitSettings,
        half_life: float | None = None,
    ) -> None:
        """Keep `item_factors`, float32[items, factors + 1], the last column is b_item; μ; the half-life, in ratings."""
        self.items, self.item_factors, self.mean, self.settings = items, item_factors, mean, settings
        self.half_life = half_life

    @classmethod
    def fit(cls, interactions: Interactions, settings: ExplicitSettings | None = None, *, seed: int = 0) -> Self:
        """Alternate ridge regressions for users and items, in numpy.

        Raises:
            RecllmError: no event has a rating.
        """
        settings = settings or ExplicitSettings()
        frame = interactions.frame.filter(pl.col("rating").is_not_null())
        if frame.is_empty():
            raise RecllmError("Explicit matrix factorization needs ratings, and the interactions have none.")
        (user_ids, users), (item_ids, items) = _codes(frame, "user_id"), _codes(frame, "item_id")
        ratings = frame["rating"].to_numpy().astype(np.float64)
        mean = float(ratings.mean())
        by_user, by_item = list(_groups(users, len(user_ids))), list(_groups(items, len(item_ids)))
        right = np.random.default_rng(seed).normal(0.0, 0.1, (len(item_ids), settings.factors + 1))
        right[:, -1] = 0.0
        left = np.zeros((len(user_ids), settings.factors + 1))
        penalty = _penalty(settings)
        for _ in range(settings.iterations):
            for row, events in enumerate(by_user):
                left[row] = _side(right[items[events]], ratings[events] - mean, penalty)
            for row, events in enumerate(by_item):
                right[row] = _side(left[users[events]], ratings[events] - mean, penalty)
        return cls(ItemIndex(item_ids), right.astype(np.float32), mean, settings)

    def user_factors(self, queries: Sequence[Query]) -> NDArray[np.float32]:
        """Fold ratings in: float32[queries, factors + 1], the last column is b_user; NaN without a known rated item."""
        width = self.item_factors.shape[1]
        result = np.full((len(queries), width), np.nan, dtype=np.float32)
        penalty = _penalty(self.settings)
        for row, query in enumerate(queries):
            rows = self.items.rows(query.history)
            if query.ratings is None:
                continue
            ratings = np.array(query.ratings, dtype=np.float64)  # NaN: not rated
            rows, ratings = rows[~np.isnan(ratings)], ratings[~np.isnan(ratings)]
            known = rows >= 0
            if known.any():
                target = ratings[known] - self.mean
                weights = recency_weights(len(rows), self.half_life)[known].astype(np.float64)
                result[row] = _side(self.item_factors[rows[known]].astype(np.float64), target, penalty, weights)
        return result

    def score(self, queries: Sequence[Query], candidates: ItemIndex) -> Scores:
        """μ + b_user + b_item + p·q: float32[queries, candidates]."""
        users, items = self.user_factors(queries), take_rows(self.item_factors, self.items, candidates)
        scores: Scores = dot_scores(users[:, :-1], items[:, :-1]) + users[:, -1:] + items[:, -1] + np.float32(self.mean)
        return scores

    def save(self, folder: Path) -> None:
        """Write `explicit_mf.safetensors` (item_factors) and `explicit_mf.json` (ids, mean, settings, half-life)."""
        facts = {
            "ids": self.items.ids,
            "mean": self.mean,
            "settings": self.settings.model_dump(),
            "half_life": self.half_life,
        }
        write_arrays(folder, "explicit_mf", {"item_factors": self.item_factors}, facts)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `save` wrote."""
        arrays, facts = read_arrays(folder, "explicit_mf")
        settings = ExplicitSettings(**facts["settings"])
        return cls(ItemIndex(facts["ids"]), arrays["item_factors"], facts["mean"], settings, facts.get("half_life"))


def _penalty(settings: ExplicitSettings) -> NDArray[np.float64]:
    return np.array([settings.regularization] * settings.factors + [settings.bias_regularization])


def _side(
    other: NDArray[np.float64],
    target: NDArray[np.float64],
    penalty: NDArray[np.float64],
    weights: NDArray[np.float64] | None = None,
) -> NDArray[np.float64]:
    """One row's factors and bias, given the other side's (last column: its biases): float64[factors + 1].

    `weights` are of the squared errors, float64[events]; 1 where left out.
    """
    design = np.concatenate([other[:, :-1], np.ones((len(other), 1))], axis=1)
    scale = 1.0 if weights is None else np.sqrt(weights)[:, None]
    return _ridge(design * scale, (target - other[:, -1]) * np.ravel(scale), penalty)

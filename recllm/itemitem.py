"""Item-item models in closed form: EASE, which knows no order, and transitions, which do; strong without training."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PositiveFloat

from recllm.data import Interactions, Query
from recllm.errors import RecllmError, require
from recllm.mf import user_items_matrix
from recllm.priors import read_arrays, take_rows, write_arrays
from recllm.ranking import ItemIndex, Scores, dot_scores
from recllm.recency import recency_weights
from recllm.recipes import Settings

MOST_ITEMS = 20_000
"""The most items of an item-item model: its matrix is dense."""
POSITIONS = 20_000
"""Histories whose products are summed at once."""


class EaseSettings(Settings):
    """`[ease]`: item-item regression, where the catalogue is small enough for it."""

    regularization: float = Field(default=200.0, gt=0)
    """λ of the ridge term."""
    max_items: int = Field(default=5000, ge=0)
    """Left out for larger catalogues (its matrix is items × items, and part of the bundle), always above 20,000;
    0 leaves it out always."""


class TransitionSettings(Settings):
    """`[transitions]`: regression of the next item on the last ones, where the catalogue is small enough for it."""

    regularization: float = Field(default=200.0, gt=0)
    """λ of the ridge term."""
    half_lives: tuple[PositiveFloat, ...] = Field(default=(3.0, 10.0), min_length=1)
    """How fast the past fades while fitting and scoring, in events: the choices, by NDCG@10 on validation."""
    max_history: int = Field(default=50, ge=1)
    """How many of the last items count while fitting; when scoring, what has faded counts little anyhow."""
    max_items: int = Field(default=5000, ge=0)
    """As of `[ease]`."""


def has_room(items: int, limit: int) -> bool:
    """Whether an item-item model of so many items is asked for, and can be."""
    return items <= min(limit, MOST_ITEMS)


class ItemItem:
    """A score is a weighted sum over the history's items, of each one's row of an item-item matrix."""

    kind: ClassVar[str]
    """Names its files and the scorer."""

    def __init__(self, items: ItemIndex, weights: NDArray[np.float32], half_life: float | None = None) -> None:
        """Keep `weights`, float32[items, items], from the history's item to the candidate; `half_life` in events."""
        self.items, self.weights, self.half_life = items, weights, half_life

    def query_vectors(self, queries: Sequence[Query]) -> NDArray[np.float32]:
        """How much each item of the history counts, float32[queries, items]; NaN for no known history.

        An item that occurs several times counts as its last occurrence.
        """
        vectors = np.zeros((len(queries), len(self.items)), dtype=np.float32)
        for row, query in enumerate(queries):
            known = self.items.known(query.history)
            vectors[row, known] = recency_weights(len(known), self.half_life)  # of equal places the last one stays
            if not len(known):
                vectors[row] = np.nan
        return vectors

    def item_vectors(self, candidates: ItemIndex) -> NDArray[np.float32]:
        """The candidates' columns of the weights, float32[candidates, items]; NaN for an unknown item."""
        return take_rows(self.weights.T, self.items, candidates)

    def score(self, queries: Sequence[Query], candidates: ItemIndex) -> Scores:
        """Sum of the history's rows: float32[queries, candidates]; NaN for an unknown item or no known history."""
        return dot_scores(self.query_vectors(queries), self.item_vectors(candidates))

    def save(self, folder: Path) -> None:
        """Write `<kind>.safetensors` (weights) and `<kind>.json` (ids, half-life)."""
        write_arrays(folder, self.kind, {"weights": self.weights}, {"ids": self.items.ids, "half_life": self.half_life})

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `save` wrote."""
        arrays, facts = read_arrays(folder, cls.kind)
        return cls(ItemIndex(facts["ids"]), arrays["weights"], facts.get("half_life"))


class EASE(ItemItem):
    """Item-item regression in closed form (Steck 2019, "Embarrassingly Shallow Autoencoders for Sparse Data").

    Steck's model is without a half-life; where the order of a history says something, a fading one ranks far better.
    """

    kind = "ease"

    @classmethod
    def fit(cls, interactions: Interactions, *, regularization: float = EaseSettings().regularization) -> Self:
        """B = I − P·diag(1/diag(P)) with P = (XᵀX + λI)⁻¹, X the binary user-item matrix.

        Raises:
            RecllmError: no interactions, or more than `MOST_ITEMS` items.
        """
        items, matrix = user_items_matrix(interactions)
        _check_size("EASE", items)
        matrix.data[:] = 1.0
        gram = (matrix.T @ matrix).toarray().astype(np.float64)
        gram[np.diag_indices_from(gram)] += regularization
        inverse = np.linalg.inv(gram)
        weights = -inverse / np.diag(inverse)
        np.fill_diagonal(weights, 0.0)
        return cls(items, weights.astype(np.float32))


class Transitions(ItemItem):
    """Regression of the next item on the fading history before it: B = (SᵀS + λI)⁻¹ SᵀT.

    A row of S is the beginning of a history, its items weighted by recency, a row of T the item after it (the linear
    transition model SLIT of Choi et al. 2021, "Session-aware Linear Item-Item Models for Session-based
    Recommendation", with a horizon of one item).
    """

    kind = "transitions"

    @classmethod
    def fit(
        cls,
        interactions: Interactions,
        *,
        half_life: float = 3.0,
        regularization: float = TransitionSettings().regularization,
        max_history: int = TransitionSettings().max_history,
    ) -> Self:
        """Fit on every beginning of every user's history, its last `max_history` events.

        Raises:
            RecllmError: no interactions, or more than `MOST_ITEMS` items.
        """
        items, _ = user_items_matrix(interactions)
        _check_size("Transitions", items)
        sequences = [items.rows(query.history) for query in interactions.histories().values()]
        gram = np.zeros((len(items), len(items)))
        right = np.zeros((len(items), len(items)))
        for before, after in _beginnings(sequences, len(items), half_life, max_history):
            gram += (before.T @ before).toarray()
            right += (before.T @ after).toarray()
        gram[np.diag_indices_from(gram)] += regularization
        solved = require("scipy.linalg", "train", "Fitting transitions").solve(gram, right, assume_a="pos")
        return cls(items, solved.astype(np.float32), half_life)


def _beginnings(
    sequences: Sequence[NDArray[np.int64]], items: int, half_life: float, max_history: int
) -> Iterator[tuple[Any, Any]]:
    """Blocks of (beginnings, next items), scipy's csr float64[positions, items] each; a repeated item adds up."""
    sparse = require("scipy.sparse", "train", "Fitting transitions")
    weights = recency_weights(max_history, half_life).astype(np.float64)

    def block(starts: list[NDArray[np.int64]], targets: list[int]) -> tuple[Any, Any]:
        lengths = np.array([len(start) for start in starts])
        rows = np.repeat(np.arange(len(starts)), lengths)
        values = np.concatenate([weights[-len(start) :] for start in starts])
        shape = (len(starts), items)
        before = sparse.csr_matrix((values, (rows, np.concatenate(starts))), shape=shape)
        after = sparse.csr_matrix((np.ones(len(targets)), (np.arange(len(targets)), targets)), shape=shape)
        return before, after

    starts: list[NDArray[np.int64]] = []
    targets: list[int] = []
    for sequence in sequences:
        for place in range(1, len(sequence)):
            starts.append(sequence[max(0, place - max_history) : place])
            targets.append(int(sequence[place]))
        if len(targets) >= POSITIONS:
            yield block(starts, targets)
            starts, targets = [], []
    if targets:
        yield block(starts, targets)


def _check_size(name: str, items: ItemIndex) -> None:
    if len(items) > MOST_ITEMS:
        raise RecllmError(
            f"{name} over {len(items):,} items needs a dense matrix of {len(items) ** 2 * 8 / 1e9:.1f} GB, twice; "
            f"the limit is {MOST_ITEMS:,} items. Use matrix factorization (ImplicitMF) instead."
        )

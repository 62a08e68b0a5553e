"""EASE: item-item regression in closed form, the strong baseline without training."""

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from recllm.data import Interactions, Query
from recllm.errors import RecllmError
from recllm.mf import user_items_matrix
from recllm.priors import read_arrays, take_rows, write_arrays
from recllm.ranking import ItemIndex, Scores, dot_scores

EASE_ITEMS = 20_000
"""The most items EASE takes: its item-item matrix is dense."""


class EASE:
    """Item-item regression in closed form (Steck 2019, "Embarrassingly Shallow Autoencoders for Sparse Data")."""

    def __init__(self, items: ItemIndex, weights: NDArray[np.float32]) -> None:
        """Keep `weights`, float32[items, items], from the history's item to the candidate."""
        self.items, self.weights = items, weights

    @classmethod
    def fit(cls, interactions: Interactions, *, regularization: float = 200.0) -> Self:
        """B = I − P·diag(1/diag(P)) with P = (XᵀX + λI)⁻¹, X the binary user-item matrix.

        Raises:
            RecllmError: no interactions, or more than `EASE_ITEMS` items.
        """
        items, matrix = user_items_matrix(interactions)
        if len(items) > EASE_ITEMS:
            raise RecllmError(
                f"EASE over {len(items):,} items needs a dense matrix of {len(items) ** 2 * 8 / 1e9:.1f} GB, twice; "
                f"the limit is {EASE_ITEMS:,} items. Use matrix factorization (ImplicitMF) instead."
            )
        matrix.data[:] = 1.0
        gram = (matrix.T @ matrix).toarray().astype(np.float64)
        gram[np.diag_indices_from(gram)] += regularization
        inverse = np.linalg.inv(gram)
        weights = -inverse / np.diag(inverse)
        np.fill_diagonal(weights, 0.0)
        return cls(items, weights.astype(np.float32))

    def query_vectors(self, queries: Sequence[Query]) -> NDArray[np.float32]:
        """Which items the history has, float32[queries, items]; NaN for no known history."""
        vectors = np.zeros((len(queries), len(self.items)), dtype=np.float32)
        for row, query in enumerate(queries):
            known = self.items.known(query.history)
            vectors[row, known] = 1.0
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
        """Write `ease.safetensors` (weights) and `ease.json` (ids)."""
        write_arrays(folder, "ease", {"weights": self.weights}, {"ids": self.items.ids})

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `save` wrote."""
        arrays, facts = read_arrays(folder, "ease")
        return cls(ItemIndex(facts["ids"]), arrays["weights"])

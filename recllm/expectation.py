"""Expected popularity: how often a new item will be chosen, judging by items that share its columns, words and text."""

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from recllm.data import Catalog, Query
from recllm.neighbours import Likeness
from recllm.priors import read_arrays, take_rows, write_arrays
from recllm.ranking import ItemIndex, Scores, dot_scores

MOST_FITTED = 5_000
"""Items that are learnt from; of a larger catalogue so many are drawn: the cost grows with their cube."""
RIDGES = (0.1, 0.3, 1.0, 3.0, 10.0)
"""Penalties that are tried."""
BY_CHANCE = 3.0
"""The noise of an item of n events is 1 + 3 / (1 + n) times the penalty: the logarithm of a count has, by chance alone,
a variance of about 1 / n."""


class ExpectedPopularity:
    """log1p of the events that a new item is expected to have; NaN for items with events, the same for every query.

    Kernel ridge regression of the logarithm of items' train events on their likeness (Saunders et al. 1998, "Ridge
    Regression Learning Algorithm in Dual Variables"), which is that of `Neighbours`. What an item with events would be
    expected to have is told by the others alone, in closed form: left out, item i is off by αᵢ / (K + λN)⁻¹ᵢᵢ.
    """

    def __init__(
        self,
        items: ItemIndex,
        known: NDArray[np.bool_],
        values: NDArray[np.float32],
        weights: NDArray[np.float64],
        middle: float,
    ) -> None:
        """Keep the expected log1p of events, float32[items], and what tells that of further items.

        Args:
            items: the catalogue.
            known: bool[items], which have enough events.
            values: float32[items], NaN for an item that is like no other.
            weights: float64[items], α; NaN for items that were not learnt from.
            middle: the mean of what was learnt from.
        """
        self.items, self.known, self.values, self.weights, self.middle = items, known, values, weights, middle

    @classmethod
    def fit(
        cls,
        catalog: Catalog,
        text: NDArray[np.float32],
        counts: NDArray[np.int64],
        known: NDArray[np.bool_],
        *,
        seed: int = 0,
    ) -> Self:
        """Learn from all items with events, or from `MOST_FITTED` of them; the penalty has the least error left out.

        Args:
            catalog: columns and titles.
            text: float32[items, width], text vectors of length 1; a NaN row for none.
            counts: train events, int64[items].
            known: bool[items], which have enough events.
            seed: of the draw.
        """
        items = ItemIndex(catalog.ids)
        rows = np.flatnonzero(counts > 0)
        rows = np.sort(np.random.default_rng(seed).permutation(rows)[:MOST_FITTED])
        weights = np.full(len(items), np.nan)
        if not len(rows):
            return cls(items, known, np.full(len(items), np.nan, dtype=np.float32), weights, 0.0)
        weights[rows] = 0.0
        alike = Likeness(catalog, text, ~np.isnan(weights))
        kernel = np.stack([alike.of(row)[rows] for row in rows.tolist()])
        wanted, noise = np.log1p(counts[rows].astype(np.float64)), 1.0 + BY_CHANCE / (1.0 + counts[rows])
        middle = float(np.average(wanted, weights=1.0 / noise))
        least = np.inf
        for ridge in RIDGES:
            inverse = np.linalg.inv(kernel + np.diag(ridge * noise))
            dual = inverse @ (wanted - middle)
            off = dual / inverse.diagonal()
            if (error := float((off**2 / noise).sum())) < least:
                least, weights[rows], left_out = error, dual, wanted - off
        told = cls(items, known, np.empty(0, dtype=np.float32), weights, middle)
        told.values = told._expected(alike, range(len(items)))
        alone = np.isnan(told.values[rows])
        told.values[rows] = np.where(alone, np.nan, left_out)
        return told

    def _expected(self, alike: Likeness, rows: Sequence[int]) -> NDArray[np.float32]:
        """What items are expected to have that were not learnt from, float32[rows]; NaN for what is like nothing."""
        fitted = np.nan_to_num(self.weights)
        found = np.full(len(rows), np.nan, dtype=np.float32)
        for place, row in enumerate(rows):
            likeness = alike.of(row)
            likeness[row] = 0.0  # of its own events nothing is known
            if likeness.any():
                found[place] = self.middle + likeness @ fitted
        return found

    def query_vectors(self, queries: Sequence[Query]) -> NDArray[np.float32]:
        """Ones, float32[queries, 1]: it is the same for everybody."""
        return np.ones((len(queries), 1), dtype=np.float32)

    def item_vectors(self, candidates: ItemIndex) -> NDArray[np.float32]:
        """The values, float32[candidates, 1]; NaN for items with events."""
        return self._take(np.where(self.known, np.float32(np.nan), self.values), candidates)

    def score(self, queries: Sequence[Query], candidates: ItemIndex) -> Scores:
        """The same values for every query: float32[queries, candidates]."""
        return dot_scores(self.query_vectors(queries), self.item_vectors(candidates))

    def score_as_new(self, queries: Sequence[Query], candidates: ItemIndex) -> Scores:
        """What the others tell of items with events, too: float32[queries, candidates]."""
        return dot_scores(self.query_vectors(queries), self._take(self.values, candidates))

    def _take(self, values: NDArray[np.float32], candidates: ItemIndex) -> NDArray[np.float32]:
        return take_rows(values[:, None], self.items, candidates)

    def grown(self, catalog: Catalog, text: NDArray[np.float32]) -> "ExpectedPopularity":
        """The same with new items at the end of the catalogue; `text`, float32[items, width], of all of them."""
        items = ItemIndex(catalog.ids)
        new = range(len(self.items), len(items))
        weights = np.concatenate([self.weights, np.full(len(new), np.nan)])
        told = ExpectedPopularity(
            items, np.concatenate([self.known, np.zeros(len(new), dtype=bool)]), self.values, weights, self.middle
        )
        added = told._expected(Likeness(catalog, text, ~np.isnan(weights)), new)
        told.values = np.concatenate([self.values, added])
        return told

    def save(self, folder: Path) -> None:
        """Write `expected_popularity.safetensors` and `expected_popularity.json`."""
        arrays = {"known": self.known, "values": self.values, "weights": self.weights}
        write_arrays(folder, "expected_popularity", arrays, {"ids": self.items.ids, "middle": self.middle})

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `save` wrote."""
        arrays, facts = read_arrays(folder, "expected_popularity")
        items = ItemIndex(facts["ids"])
        return cls(items, arrays["known"], arrays["values"], arrays["weights"], facts["middle"])

"""Rated neighbours: a candidate is judged by what the user gave to the items most like it in words and columns."""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from recllm.data import Catalog, Query
from recllm.neighbours import TEXT_SHARE, SharedFeatures
from recllm.priors import ItemMean
from recllm.ranking import ItemIndex, Scores

SHRINKAGE = 2.0
"""Weight of neighbours that would have said nothing."""
MOST_ITEMS = 10_000
"""Larger catalogues do without: every item is compared with every other one, 400 MB for so many."""


class RatedNeighbours:
    """How far above the items' means a user's ratings of like items are, Σ w·(rating − mean) / (Σ w + λ).

    The neighbourhood model around baseline estimates (Koren 2008, "Factorization Meets the Neighborhood", formula 3)
    with likeness taken from columns, titles and text in place of co-ratings, so that it judges items nobody has rated.
    NaN for a query without a rated item of the catalogue, and for a candidate that is not in it.

    Args:
        catalog: columns and titles.
        text: float32[items, width], text vectors of length 1; a NaN row for none.
        means: of the training ratings; an item without any has the middle of the others'.
    """

    def __init__(self, catalog: Catalog, text: NDArray[np.float32], means: ItemMean) -> None:
        self.items, self._catalog, self._text = ItemIndex(catalog.ids), catalog, text
        own = means.score([Query(())], self.items)[0]
        self.means = np.where(np.isnan(own), np.nanmean(own), own).astype(np.float32)

    @cached_property
    def alike(self) -> NDArray[np.float32]:
        """Likeness of two items, at least 0: float32[items, items]; made when it is first asked for."""
        vectors = np.nan_to_num(self._text)
        shared = SharedFeatures(self._catalog.frame.iter_rows(named=True), np.ones(len(self.items), dtype=bool))
        alike = np.empty((len(self.items), len(self.items)), dtype=np.float32)
        for row in range(len(self.items)):
            alike[row] = shared.cosines(row) + TEXT_SHARE * np.maximum(vectors @ vectors[row], 0.0)
        return alike

    def score(self, queries: Sequence[Query], candidates: ItemIndex) -> Scores:
        """float32[queries, candidates]."""
        rows = self.items.rows(candidates.ids)
        result = np.full((len(queries), len(rows)), np.nan, dtype=np.float32)
        for place, query in enumerate(queries):
            rated, above = self._rated(query)
            if len(rated):
                weights = self.alike[np.ix_(rows, rated)]
                result[place] = np.where(rows >= 0, weights @ above / (weights.sum(axis=1) + SHRINKAGE), np.nan)
        return result

    def _rated(self, query: Query) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Places of the query's rated items, and how far above their means the ratings are."""
        places = self.items.rows(query.history)
        ratings = np.array(query.ratings or [None] * len(places), dtype=np.float32)
        known = (places >= 0) & ~np.isnan(ratings)
        return places[known], ratings[known] - self.means[places[known]]

"""Expected popularity: how often a new item will be chosen, judging by items that share its columns, words and text."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from recllm.data import Query
from recllm.likeness import TOLD, Dual, LikenessRidge
from recllm.priors import read_arrays, take_rows, write_arrays
from recllm.ranking import ItemIndex, Scores, dot_scores


class ExpectedPopularity:
    """log1p of the events that a new item is expected to have; NaN for known items, the same for every query."""

    def __init__(self, items: ItemIndex, known: NDArray[np.bool_], values: NDArray[np.float32], told: Dual) -> None:
        """Keep the expected log1p of events, float32[items], and what tells that of further items.

        Args:
            items: the catalogue.
            known: bool[items], which have enough events.
            values: float32[items], NaN for an item that is like no other.
            told: of one column.
        """
        self.items, self.known, self.values, self.told = items, known, values, told

    @classmethod
    def fit(cls, items: ItemIndex, ridge: LikenessRidge, counts: NDArray[np.int64]) -> Self:
        """Learn from train events, int64[items]; of an item with events, from those of all others."""
        events = np.log1p(counts.astype(np.float32))[:, None]
        return cls(items, ridge.known, ridge.means(events, np.arange(len(items)))[:, 0], ridge.dual(events))

    def query_vectors(self, queries: Sequence[Query]) -> NDArray[np.float32]:
        """Ones, float32[queries, 1]: it is the same for everybody."""
        return np.ones((len(queries), 1), dtype=np.float32)

    def item_vectors(self, candidates: ItemIndex) -> NDArray[np.float32]:
        """The values, float32[candidates, 1]; NaN for known items."""
        return self._take(np.where(self.known, np.float32(np.nan), self.values), candidates)

    def score(self, queries: Sequence[Query], candidates: ItemIndex) -> Scores:
        """The same values for every query: float32[queries, candidates]."""
        return dot_scores(self.query_vectors(queries), self.item_vectors(candidates))

    def score_as_new(self, queries: Sequence[Query], candidates: ItemIndex) -> Scores:
        """What the others tell of items with events, too: float32[queries, candidates]."""
        return dot_scores(self.query_vectors(queries), self._take(self.values, candidates))

    def _take(self, values: NDArray[np.float32], candidates: ItemIndex) -> NDArray[np.float32]:
        return take_rows(values[:, None], self.items, candidates)

    def grown(self, items: ItemIndex, alike: NDArray[np.float64]) -> "ExpectedPopularity":
        """With new items at the end of `items`, by their likeness to what was learnt from, float64[new, fitted]."""
        known = np.concatenate([self.known, np.zeros(len(alike), dtype=bool)])
        return ExpectedPopularity(items, known, np.concatenate([self.values, self.told.of(alike)[:, 0]]), self.told)

    def save(self, folder: Path) -> None:
        """Write `expected_popularity.safetensors` and `expected_popularity.json`."""
        arrays: dict[str, NDArray[Any]] = {"known": self.known, "values": self.values}
        arrays |= {key: getattr(self.told, key) for key in TOLD}
        write_arrays(folder, "expected_popularity", arrays, {"ids": self.items.ids})

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `save` wrote."""
        arrays, facts = read_arrays(folder, "expected_popularity")
        told = Dual(*(arrays[key] for key in TOLD))
        return cls(ItemIndex(facts["ids"]), arrays["known"], arrays["values"], told)

"""Neighbours: a new item is scored as the known items most like it in their columns, titles and text."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from recllm.data import Catalog, Query
from recllm.itemitem import EASE
from recllm.mf import ImplicitMF
from recllm.priors import read_arrays, write_arrays
from recllm.ranking import ItemIndex, Scores, dot_scores
from recllm.recipes import Settings

WORD = re.compile(r"\w+")
TEXT_SHARE = 0.25
"""Weight of the text vectors' cosine beside that of shared columns and title words."""
VALUE_LENGTH = 60
"""Values with a longer part between two commas are running text: that is what the text vectors are for."""
CELLS = 20_000_000
"""Numbers that are held at once while vectors are averaged."""
MOST_FEW = 64
"""From so many events on every item is known."""
BASES: dict[str, Any] = {"ease": EASE, "mf": ImplicitMF}


class NeighbourSettings(Settings):
    """`[neighbours]`: how items without events borrow from items with events."""

    neighbours: int = Field(default=10, ge=0)
    """From how many; 0 leaves the scorer out."""
    max_items: int = Field(default=20_000, ge=0)
    """In larger catalogues new items are told nothing by the items like them, for every item is compared with every
    other one: the scorers `neighbours` and `expected_popularity`, `regression` and `few_share` are off, and a new item
    is ranked by its own text."""
    few_share: float = Field(default=0.5, ge=0, lt=1)
    """An item with less than this share of the usual number of events (the median over items that have any) is new
    still, up to `MOST_FEW` events: they say less than its neighbours do. 0: it is known from its first event on."""
    regression: bool = True
    """Whether regression on the likeness of all items tells what new ones are: that of which sequence models make the
    vectors to rank them by (else, and where more than 5,000 items have events, the means of their neighbours'), and how
    popular they will be, one more scorer."""


def few_events(counts: NDArray[np.int64], settings: NeighbourSettings) -> int:
    """The number of events from which an item is known; at least 1."""
    apart = settings.neighbours > 0 or settings.regression
    if not apart or len(counts) > settings.max_items or not (counts > 0).any():
        return 1
    return max(1, min(MOST_FEW, round(settings.few_share * float(np.median(counts[counts > 0])))))


def features_of(record: Mapping[str, object]) -> Iterator[str]:
    """What an item may share with another one: the words of its title, and every short value of its other columns."""
    for column, value in record.items():
        if column == "item_id" or value is None:
            continue
        if column == "title":
            yield from (f"title {word}" for word in WORD.findall(str(value).lower()))
            continue
        parts = [part.strip().lower() for part in str(value).split(",")]
        # A list whose parts are short; the short clauses of a plot are no features that items share.
        if max(map(len, parts)) <= VALUE_LENGTH:
            yield from (f"{column} {part}" for part in parts if part)


class SharedFeatures:
    """Cosines of items by the features that they share, rare ones counting more (tf-idf, Spärck Jones 1972)."""

    def __init__(self, records: Iterable[Mapping[str, object]], known: NDArray[np.bool_], *, own: bool = False) -> None:
        """Index the records; only `known` ones, bool[items], are found as neighbours and counted for the rarity.

        With `own`, what a record has and no known one counts in its length, as rare as what one of them has alone: else
        records that are not known are shorter than those that are, and their cosines larger.
        """
        self.features = [tuple(dict.fromkeys(features_of(record))) for record in records]
        postings: dict[str, list[int]] = {}
        for row in np.flatnonzero(known).tolist():
            for feature in self.features[row]:
                postings.setdefault(feature, []).append(row)
        self.postings = {feature: np.array(rows) for feature, rows in postings.items()}
        count = int(known.sum())
        self.rarity = {feature: np.log((1 + count) / (1 + len(rows))) for feature, rows in postings.items()}
        self.of_unknown = float(np.log((1 + count) / 2)) if own else 0.0
        self.lengths = np.array([self._length(features) for features in self.features])

    def _length(self, features: Sequence[str]) -> float:
        return float(np.sqrt(sum(self.rarity.get(feature, self.of_unknown) ** 2 for feature in features))) or 1.0

    def cosines(self, row: int) -> NDArray[np.float64]:
        """Cosine of item `row` with every known item, float64[items]; 0 with the others."""
        found = np.zeros(len(self.features), dtype=np.float64)
        for feature in self.features[row]:
            if feature in self.postings:
                found[self.postings[feature]] += self.rarity[feature] ** 2
        cosines: NDArray[np.float64] = found / (self.lengths * self.lengths[row])
        return cosines


def nearest(
    catalog: Catalog, text: NDArray[np.float32], known: NDArray[np.bool_], rows: Iterable[int], count: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The known items most like each of `rows`, which is never its own neighbour.

    Args:
        catalog: columns and titles.
        text: float32[items, width], text vectors of length 1; a NaN row for none.
        known: bool[items], which may be neighbours.
        rows: the items that look for neighbours.
        count: the most neighbours.

    Returns:
        Places int64[rows, count] and weights float32[rows, count] that sum to 1; all weights of an item that is like
        no other are 0.
    """
    shared, vectors = SharedFeatures(catalog.frame.iter_rows(named=True), known), np.nan_to_num(text)
    places, weights = [], []
    for row in rows:
        alike = shared.cosines(row) + TEXT_SHARE * np.maximum(vectors @ vectors[row], 0.0)
        alike[~known] = 0.0
        alike[row] = 0.0
        best = np.argsort(-alike, kind="stable")[:count]
        total = alike[best].sum()
        places.append(best)
        weights.append(alike[best] / total if total > 0 else np.zeros(len(best)))
    width = min(count, len(known))
    shape = (len(places), width)
    return np.array(places, dtype=np.int64).reshape(shape), np.array(weights, dtype=np.float32).reshape(shape)


class Neighbours:
    """What a collaborative scorer says of the known items most like a new one; NaN for items with events.

    A mapping from attributes to a collaborative model (Gantner et al. 2010, "Learning Attribute-to-Feature Mappings for
    Cold-Start Recommendations", its k-nearest-neighbour variant): because scores are dot products, the mean of the
    neighbours' scores is the score of their mean vector.
    """

    def __init__(
        self,
        items: ItemIndex,
        known: NDArray[np.bool_],
        places: NDArray[np.int64],
        weights: NDArray[np.float32],
        base: EASE | ImplicitMF,
    ) -> None:
        """Keep neighbours int64[items, k] and weights float32[items, k]; `known`, bool[items], have enough events."""
        self.items, self.known, self.places, self.weights, self.base = items, known, places, weights, base

    @classmethod
    def fit(
        cls,
        catalog: Catalog,
        text: NDArray[np.float32],
        known: NDArray[np.bool_],
        base: EASE | ImplicitMF,
        *,
        count: int = NeighbourSettings().neighbours,
    ) -> Self:
        """Find every item's neighbours; of items with events too, to see on validation what their like would get."""
        items = ItemIndex(catalog.ids)
        return cls(items, known, *nearest(catalog, text, known, range(len(items)), count), base)

    def query_vectors(self, queries: Sequence[Query]) -> NDArray[np.float32]:
        """The base's: float32[queries, width]; a NaN row without a known history."""
        return self.base.query_vectors(queries)

    def item_vectors(self, candidates: ItemIndex) -> NDArray[np.float32]:
        """Means of the neighbours' vectors, float32[candidates, width]; NaN for items with events or neighbours."""
        rows = self.items.rows(candidates.ids)
        return self._means(np.where((rows >= 0) & ~self.known[rows], rows, -1))

    def score(self, queries: Sequence[Query], candidates: ItemIndex) -> Scores:
        """Dot products: float32[queries, candidates]."""
        return dot_scores(self.query_vectors(queries), self.item_vectors(candidates))

    def score_as_new(self, queries: Sequence[Query], candidates: ItemIndex) -> Scores:
        """The same for items with events, by their neighbours alone: float32[queries, candidates]."""
        return dot_scores(self.query_vectors(queries), self._means(self.items.rows(candidates.ids)))

    def _means(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        return self.means(self.base.item_vectors(self.items), rows)

    def means(self, vectors: NDArray[np.float32], rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Mean of the neighbours' `vectors`, float32[items, width], for each of `rows`.

        Returns:
            float32[rows, width]; NaN for the row −1 and where nothing is alike.
        """
        filled, width = np.nan_to_num(vectors), vectors.shape[1]
        result = np.full((len(rows), width), np.nan, dtype=np.float32)
        asked = np.flatnonzero((rows >= 0) & (self.weights[rows].sum(axis=1) > 0))
        step = max(1, CELLS // max(width * self.places.shape[1], 1))
        for start in range(0, len(asked), step):
            part = asked[start : start + step]
            own = rows[part]
            result[part] = np.einsum("rk,rkw->rw", self.weights[own], filled[self.places[own]])
        return result

    def grown(self, catalog: Catalog, text: NDArray[np.float32]) -> "Neighbours":
        """The same with new items at the end of the catalogue; `text`, float32[items, width], of all of them."""
        items = ItemIndex(catalog.ids)
        new = range(len(self.items), len(items))
        known = np.concatenate([self.known, np.zeros(len(new), dtype=bool)])
        places, weights = nearest(catalog, text, known, new, self.places.shape[1])
        return Neighbours(
            items, known, np.concatenate([self.places, places]), np.concatenate([self.weights, weights]), self.base
        )

    def save(self, folder: Path) -> None:
        """Write `neighbours.safetensors` and `neighbours.json`; the base is saved by itself."""
        arrays = {"known": self.known, "places": self.places, "weights": self.weights}
        base = next(name for name, kind in BASES.items() if isinstance(self.base, kind))
        write_arrays(folder, "neighbours", arrays, {"ids": self.items.ids, "base": base})

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `save` wrote, and the base beside it."""
        arrays, facts = read_arrays(folder, "neighbours")
        base = BASES[facts["base"]].load(folder)
        return cls(ItemIndex(facts["ids"]), arrays["known"], arrays["places"], arrays["weights"], base)

"""The seam: everything that scores turns queries and candidates into float32[queries, candidates], NaN for unknown."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from recllm.data import Query
from recllm.metrics import Ranks

Scores = NDArray[np.float32]
"""float32[queries, candidates]; NaN where the scorer knows nothing of the user or the item."""

QUERY_BATCH = 256
Row = TypeVar("Row")


class ItemIndex:
    """The candidates in a fixed order, with their rows by id."""

    def __init__(self, ids: Iterable[str]) -> None:
        """Keep `ids` in the order given; a repeated id is refused."""
        self.ids: tuple[str, ...] = tuple(ids)
        self._row = {item: row for row, item in enumerate(self.ids)}
        if len(self._row) != len(self.ids):
            raise ValueError("an item id occurs twice among the candidates")

    def __len__(self) -> int:
        return len(self.ids)

    def __contains__(self, item_id: str) -> bool:
        return item_id in self._row

    def rows(self, ids: Iterable[str]) -> NDArray[np.int64]:
        """Rows of `ids`, int64[ids]; −1 for an id that is not here."""
        return np.fromiter((self._row.get(item, -1) for item in ids), dtype=np.int64)

    def known(self, ids: Iterable[str]) -> NDArray[np.int64]:
        """Rows of those `ids` that are here, in their order."""
        rows = self.rows(ids)
        return rows[rows >= 0]


class Scorer(Protocol):
    """Anything that scores candidates for queries."""

    def score(self, queries: Sequence[Query], candidates: ItemIndex) -> Scores:
        """Score every candidate for every query: float32[queries, candidates], NaN for unknown."""
        ...


class VectorScorer(Scorer, Protocol):
    """A scorer that is a dot product, so that it can go into the whole-catalogue graph."""

    def query_vectors(self, queries: Sequence[Query]) -> NDArray[np.float32]:
        """What the user side gives: float32[queries, width]; a NaN row where nothing is known of the user."""
        ...

    def item_vectors(self, candidates: ItemIndex) -> NDArray[np.float32]:
        """What the item side gives: float32[candidates, width]; a NaN row for an unknown item."""
        ...


@runtime_checkable
class PairScorer(Protocol):
    """A scorer that has a better way for pairs than to score every candidate for every query."""

    def score_pairs(self, queries: Sequence[Query], items: Sequence[str]) -> NDArray[np.float32]:
        """Score one item per query: float32[queries], NaN for unknown."""
        ...


@runtime_checkable
class NewItemScorer(Protocol):
    """A scorer that knows something of items without events."""

    def score_as_new(self, queries: Sequence[Query], candidates: ItemIndex) -> Scores:
        """Scores as if the candidates had no events: float32[queries, candidates], NaN for unknown."""
        ...


def score_as_new(scorer: Scorer, queries: Sequence[Query], candidates: ItemIndex) -> Scores:
    """What a scorer would say of the candidates if they had no events; NaN by one that lives on events."""
    if isinstance(scorer, NewItemScorer):
        return scorer.score_as_new(queries, candidates)
    return np.full((len(queries), len(candidates)), np.nan, dtype=np.float32)


def batches(rows: Sequence[Row], size: int = QUERY_BATCH) -> Iterator[tuple[slice, Sequence[Row]]]:
    """Cut `rows` into runs of at most `size`, each with its place."""
    for start in range(0, len(rows), size):
        place = slice(start, min(start + size, len(rows)))
        yield place, rows[place]


def mask_seen(scores: Scores, queries: Sequence[Query], candidates: ItemIndex) -> Scores:
    """A copy of `scores` in which the items of each query's history are NaN, so that they are not ranked."""
    masked = scores.copy()
    for row, query in enumerate(queries):
        masked[row, candidates.known(query.history)] = np.nan
    return masked


def top_k(scores: Scores, k: int) -> tuple[NDArray[np.int64], Scores]:
    """The `k` best columns of every row, best first: int64[rows, k] and float32[rows, k].

    Ties go to the earlier candidate, so that equal scores give one order everywhere. A candidate without
    a score (NaN) is not ranked: its place holds −1 and NaN.
    """
    filled = np.where(np.isnan(scores), -np.inf, scores)
    k = min(k, scores.shape[1])
    order = np.argsort(-filled, axis=1, kind="stable")[:, :k]
    best = np.take_along_axis(filled, order, axis=1).astype(np.float32)
    missing = np.isneginf(best)
    return np.where(missing, -1, order), np.where(missing, np.float32(np.nan), best)


def target_ranks(scores: Scores, targets: NDArray[np.int64]) -> Ranks:
    """The places of each row's target column, 1 is best.

    A target without a score is in no list, however long: its rank is infinite.
    """
    own = np.take_along_axis(scores, targets[:, None], axis=1)  # (rows, 1)
    first = np.where(np.isnan(own[:, 0]), np.inf, 1.0 + (scores > own).sum(axis=1))
    return Ranks(first, first + np.maximum((scores == own).sum(axis=1) - 1.0, 0.0))


def score_pairs(scorer: Scorer, queries: Sequence[Query], items: Sequence[str]) -> NDArray[np.float32]:
    """Score one item per query, float32[queries], by the scorer's own `score_pairs` where it has one.

    Otherwise a batch of queries is scored with all items of the batch: a few dot products too many cost less than a
    call per query.
    """
    if isinstance(scorer, PairScorer):
        return scorer.score_pairs(queries, items)
    groups: dict[Query, list[int]] = {}
    for row, query in enumerate(queries):
        groups.setdefault(query, []).append(row)
    result = np.full(len(queries), np.nan, dtype=np.float32)
    owned = list(groups.values())
    for place, batch in batches(list(groups)):
        members = owned[place]
        rows = np.concatenate(members)
        index = ItemIndex(dict.fromkeys(items[row] for row in rows))
        lines = np.repeat(np.arange(len(batch)), [len(own) for own in members])
        result[rows] = scorer.score(batch, index)[lines, index.rows(items[row] for row in rows)]
    return result


def dot_scores(queries: NDArray[np.float32], items: NDArray[np.float32]) -> Scores:
    """Queries · itemsᵀ of float32[queries, width] and float32[items, width]; NaN where either row is NaN."""
    scores: Scores = np.nan_to_num(queries) @ np.nan_to_num(items).T
    unknown = np.isnan(queries[:, :1]) | np.isnan(items[:, 0])
    return np.where(unknown, np.float32(np.nan), scores)

"""Score histories by query vectors: whatever reads ids into vectors, torch or ONNX, serves the same scorer."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from recllm.askedat import TrainingTime, moments_of
from recllm.data import Query
from recllm.histories import HistoryFormat, padded
from recllm.ranking import ItemIndex, Scores, dot_scores

Encode = Callable[..., NDArray[np.float32]]
"""ids int64[batch, length], ends int64[batch, ends] -> query vectors float32[batch, ends, width].

Of a model to which time makes a difference also, as the third one, when each is asked, int64[batch, ends].
"""

TOKENS_IN_BATCH = 2048
"""Padded ids that are read at once."""


class SequenceScorer:
    """A next-item model as a scorer: query vector of the history · item vector + item bias.

    Args:
        encode: reads ids into vectors.
        history: how a history becomes ids.
        index: the items, in the order of `heads`.
        heads: float32[items, width], vectors that queries are compared with; NaN rows for unknown items.
        bias: float32[items].
        new: float32[items, width + 1], heads and bias as they would be without any events; None where nobody asks.
        progress: gets the number of queries done, batch by batch.
        time: where the moments are at which queries are asked; None where `encode` takes none, and all are asked now.
    """

    def __init__(
        self,
        encode: Encode,
        history: HistoryFormat,
        index: ItemIndex,
        heads: NDArray[np.float32],
        bias: NDArray[np.float32],
        new: NDArray[np.float32] | None = None,
        progress: Callable[[int], None] = lambda _: None,
        time: TrainingTime | None = None,
    ) -> None:
        self.time = time
        self.encode, self.history, self.index, self.progress = encode, history, index, progress
        # The bias as one more column, against a query column of ones: one product for all.
        self.items: NDArray[np.float32] = np.concatenate([heads, bias[:, None]], axis=1).astype(np.float32)
        self.new = new

    def query_vectors(self, queries: Sequence[Query]) -> NDArray[np.float32]:
        """Read histories: float32[queries, width + 1]; a NaN row for a history without a known item.

        A history that another one continues is not read again: its vector is taken on the way of the longer one.
        """
        result = np.full((len(queries), self.items.shape[1]), np.nan, dtype=np.float32)
        asked = None if self.time is None else self.time.places(moments_of(queries))
        paths = [self.history.ids(self.history.window(self.index.known(query.history))) for query in queries]
        groups = shared_paths([(row, ids) for row, (ids, ends) in enumerate(paths) if ends])
        for batch in _length_batches(groups):
            ids = padded([group[0] for group in batch])
            ends = padded([[len(paths[row][0]) - 1 for row in rows] for _, rows in batch])
            when = () if asked is None else (padded([asked[rows].tolist() for _, rows in batch]),)
            vectors = self.encode(ids, ends, *when)
            for place, (_, rows) in enumerate(batch):
                result[rows, :-1] = vectors[place, : len(rows)]
                result[rows, -1] = 1.0
            self.progress(sum(len(rows) for _, rows in batch))
        return result

    def item_vectors(self, candidates: ItemIndex) -> NDArray[np.float32]:
        """Item vectors with bias in the order of `candidates`: float32[candidates, width + 1], NaN for unknown."""
        if candidates is self.index or candidates.ids == self.index.ids:
            return self.items
        rows = self.index.rows(candidates.ids)
        return np.where((rows >= 0)[:, None], self.items[rows], np.float32(np.nan))

    def score(self, queries: Sequence[Query], candidates: ItemIndex) -> Scores:
        """Score every candidate for every history: float32[queries, candidates]."""
        return dot_scores(self.query_vectors(queries), self.item_vectors(candidates))

    def score_as_new(self, queries: Sequence[Query], candidates: ItemIndex) -> Scores:
        """Scores of the candidates by what is known without events: float32[queries, candidates]."""
        assert self.new is not None
        rows = self.index.rows(candidates.ids)
        heads = np.where((rows >= 0)[:, None], self.new[rows], np.float32(np.nan))
        return dot_scores(self.query_vectors(queries), heads)


def shared_paths(rows: list[tuple[int, list[int]]]) -> list[tuple[list[int], list[int]]]:
    """Group id rows that are beginnings of one another: the longest, and the places of all of its group."""
    groups: list[tuple[list[int], list[int]]] = []
    for place, ids in sorted(rows, key=lambda row: row[1], reverse=True):
        # Sorted downwards, the only row that can continue this one and has come before stands last.
        if groups and groups[-1][0][: len(ids)] == ids:
            groups[-1][1].append(place)
        else:
            groups.append((ids, [place]))
    return groups


def _length_batches(groups: list[tuple[list[int], list[int]]]) -> list[list[tuple[list[int], list[int]]]]:
    """Cut groups into batches of about `TOKENS_IN_BATCH` padded ids, in length order, the longest first."""
    ordered = sorted(groups, key=lambda group: (-len(group[0]), group[1]))
    result: list[list[tuple[list[int], list[int]]]] = []
    while ordered:
        size = max(1, TOKENS_IN_BATCH // len(ordered[0][0]))
        result.append(ordered[:size])
        ordered = ordered[size:]
    return result

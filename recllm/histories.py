"""Histories as ids into a table of input vectors: one function for training and serving."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


def window_start(length: int, limit: int, stride: int) -> int:
    """Where the read end of a history of `length` items begins: at the first multiple of `stride` that leaves `limit`.

    So a history and the same one with a few more events mostly begin at the same item.
    """
    stride = min(stride, limit)  # else a history a little longer than the limit had nothing left
    return max(0, -(-(length - limit) // stride) * stride)


@dataclass(frozen=True)
class HistoryFormat:
    """How a history becomes ids of a table whose first rows are `vocabulary` and whose other rows are item tokens.

    Attributes:
        vocabulary: token ids of the language model whose vectors stand first in the table.
        start: table rows before the history, the prompt's first words.
        texts: per item its table rows when histories are text (None: the item cannot be written); None when an item
            is one item token.
        limit: how many of the last items are read.
        stride: a longer history starts at a multiple of this.
        positions: the most ids that the model reads; None for no limit. The oldest items of a text history that is
            longer are left out.
    """

    vocabulary: tuple[int, ...]
    start: tuple[int, ...]
    limit: int
    stride: int
    texts: tuple[tuple[int, ...] | None, ...] | None = None
    positions: int | None = None

    def window(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The end of a history that is read.

        A long history starts at a multiple of `stride`, so that a history and the same one with a few more events
        mostly share their beginning, and a causal model reads both in one pass.
        """
        if self.texts is not None:
            rows = rows[[self.texts[row] is not None for row in rows]]
        return self.fitting(rows[window_start(len(rows), self.limit, self.stride) :])

    def fitting(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The last of `rows` whose texts fit into the model's positions; all of them where items are tokens."""
        if self.texts is None or self.positions is None:
            return rows
        room = self.positions - len(self.start)
        lengths = np.cumsum([len(self.texts[row] or ()) for row in rows[::-1]])
        return rows[len(rows) - int(np.searchsorted(lengths, room, side="right")) :]

    def ids(self, window: Sequence[int] | NDArray[np.int64]) -> tuple[list[int], list[int]]:
        """Table rows of a history and the position at which each item ends."""
        ids, ends = list(self.start), []
        for row in window:
            text = None if self.texts is None else self.texts[row]
            ids.extend((len(self.vocabulary) + int(row),) if text is None else text)
            ends.append(len(ids) - 1)
        return ids, ends

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "vocabulary": list(self.vocabulary),
            "start": list(self.start),
            "limit": self.limit,
            "stride": self.stride,
            "positions": self.positions,
            "texts": None if self.texts is None else [None if text is None else list(text) for text in self.texts],
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "HistoryFormat":
        """What `to_dict` gave."""
        texts = values["texts"]
        return cls(
            tuple(values["vocabulary"]),
            tuple(values["start"]),
            values["limit"],
            values["stride"],
            None if texts is None else tuple(None if text is None else tuple(text) for text in texts),
            values["positions"],
        )


def item_token_history(start_tokens: Sequence[int], limit: int, stride: int) -> HistoryFormat:
    """Histories as item tokens: the table holds only the words before the history, then the items."""
    vocabulary = tuple(dict.fromkeys(start_tokens))
    start = tuple(vocabulary.index(token) for token in start_tokens)
    return HistoryFormat(vocabulary, start, limit, stride)


def text_history(
    start_tokens: Sequence[int],
    item_tokens: Sequence[Sequence[int] | None],
    limit: int,
    stride: int,
    positions: int | None = None,
) -> HistoryFormat:
    """Histories as text: the table holds the words that occur in any item, so that the vocabulary stays small."""
    used = dict.fromkeys(start_tokens)
    for tokens in item_tokens:
        used.update(dict.fromkeys(tokens or ()))
    place = {token: row for row, token in enumerate(used)}
    texts = tuple(None if tokens is None else tuple(place[token] for token in tokens) for tokens in item_tokens)
    return HistoryFormat(tuple(used), tuple(place[token] for token in start_tokens), limit, stride, texts, positions)


def padded(rows: Sequence[Sequence[int]], fill: int = 0) -> NDArray[np.int64]:
    """Rows of different lengths as int64[rows, longest], filled on the right."""
    result = np.full((len(rows), max(map(len, rows), default=0)), fill, dtype=np.int64)
    for place, row in enumerate(rows):
        result[place, : len(row)] = row
    return result

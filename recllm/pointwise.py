"""Pointwise relevance: ask a language model about every candidate; a history is read once, and kept for its return.

What reads is a `Reader`, in torch or in ONNX Runtime; prompts, batches, kept prefixes and calibration are the same.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from recllm.data import Catalog, Query
from recllm.histories import padded
from recllm.prompts import CompiledPrompt
from recllm.ranking import ItemIndex, Scores

Ids = NDArray[np.int64]

CALL_TOKENS = 32
"""What a pass costs beside its tokens, in tokens: a shorter block has to save more padding than that."""
SHARED_FROM = 4
"""Items of one history from which reading the history once is faster than whole prompts."""


class Reads(Protocol):
    """What prompts have to know of a model."""

    @property
    def causal(self) -> bool:
        """Whether it looks back only, so that candidates can share a prefix."""
        ...

    @property
    def max_tokens(self) -> int:
        """The longest prompt."""
        ...


class Reader(Reads, Protocol):
    """A language model that answers one question: logit of the positive answer minus logit of the negative one."""

    @property
    def tokens_at_once(self) -> int:
        """Tokens that are read in one pass."""
        ...

    @property
    def shares(self) -> bool:
        """Whether candidates can follow a prefix that is read once; else whole prompts are read."""
        ...

    def whole(self, ids: Ids, lengths: Ids) -> NDArray[np.float32]:
        """Answers float32[rows] to whole prompts, int64[rows, length], padded on the right."""
        ...

    def read(self, ids: Ids, lengths: Ids) -> Any:  # noqa: ANN401  each engine keeps prefixes its own way
        """Keys and values of prefixes, int64[users, length], padded on the right; only where `shares`."""
        ...

    def take(self, prefixes: Any, row: int) -> tuple[Any, int]:  # noqa: ANN401
        """A copy of one user's prefix without padding, and its bytes."""
        ...

    def join(self, prefixes: Sequence[Any]) -> Any:  # noqa: ANN401
        """Prefixes of one user each, together."""
        ...

    def answers(self, prefixes: Any, ids: Ids, lengths: Ids) -> NDArray[np.float32]:  # noqa: ANN401
        """Answers float32[users, candidates] after continuations int64[users, candidates, length] of the prefixes.

        They are padded on the right to their `lengths`, int64[users, candidates].
        """
        ...


@dataclass(frozen=True, eq=False)
class PairPrompts:
    """Prompts of (query, item) pairs, the same for training and scoring; every item is tokenised once.

    Attributes:
        prompt: the compiled relevance prompt.
        catalog: the items that can be written.
        model: knows how long a prompt may be; the oldest items of a history that does not fit are left out.
    """

    prompt: CompiledPrompt
    catalog: Catalog
    model: Reads

    @cached_property
    def _items(self) -> dict[str, list[int] | None]:
        return dict(zip(self.catalog.ids, self.prompt.encode_items(self.catalog), strict=True))

    @cached_property
    def candidates(self) -> dict[str, list[int]]:
        """What stands behind the prefix, by the id of every item that has text."""
        end = [] if self.model.causal else self.prompt.end
        suffixes = zip(self.catalog.ids, self.prompt.encode_suffixes(self.catalog), strict=True)
        return {item: ids + end for item, ids in suffixes if ids is not None}

    @cached_property
    def _room(self) -> int:
        # One bound for all candidates, so that they share one prefix.
        return self.model.max_tokens - max(map(len, self.candidates.values()), default=0)

    def knows(self, query: Query) -> bool:
        """Whether an item of the history can be written."""
        return any(self._items.get(item) is not None for item in query.history)

    def prefix(self, query: Query) -> list[int]:
        """Everything up to the candidate."""
        kept = [place for place, item in enumerate(query.history) if self._items.get(item) is not None]
        kept = kept[-self.prompt.prompt.max_history :]
        while True:
            ratings = None if query.ratings is None else [query.ratings[place] for place in kept]
            ids = self.prompt.prefix_ids([self._items[query.history[place]] for place in kept], ratings)
            if len(ids) <= self._room or not kept:
                return ids
            kept = kept[1:]

    def whole(self, query: Query, item_id: str) -> list[int]:
        """The whole prompt of an item that is among the candidates."""
        return self.prefix(query) + self.candidates[item_id]


@dataclass
class KeptPrefixes:
    """Prefixes of returning users, the least recently used one given up first.

    Attributes:
        limit: bytes that may be kept; 0 keeps nothing.
        size: bytes that are kept.
    """

    limit: int
    size: int = 0
    _kept: OrderedDict[tuple[int, ...], tuple[Any, int]] = field(default_factory=OrderedDict, repr=False)

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, ids: tuple[int, ...]) -> Any:  # noqa: ANN401
        """The prefix of these token ids, or None."""
        found = self._kept.get(ids)
        if found is None:
            return None
        self._kept.move_to_end(ids)
        return found[0]

    def add(self, ids: tuple[int, ...], prefix: Any, size: int) -> None:  # noqa: ANN401
        """Keep a prefix of `size` bytes; one that is larger than the limit is not kept."""
        if size > self.limit or ids in self._kept:
            return
        self._kept[ids] = prefix, size
        self.size += size
        while self.size > self.limit:
            _, (_, gone) = self._kept.popitem(last=False)
            self.size -= gone


@dataclass
class PointwiseScorer:
    """A language model as a scorer of (history, candidate) pairs.

    Attributes:
        reader: the language model.
        prompt: the compiled relevance prompt.
        catalog: the items that can be written.
        calibrated: take off the score of the same candidate after an empty history (content-free calibration, Zhao et
            al. 2021). A causal model only.
        keep_bytes: memory for the prefixes of returning users, keyed by what was read.
        progress: gets the number of queries done.
    """

    reader: Reader
    prompt: CompiledPrompt
    catalog: Catalog
    calibrated: bool = True
    keep_bytes: int = 0
    progress: Callable[[int], None] = lambda _: None
    _empty: dict[str, float] = field(default_factory=dict, repr=False)

    def score(self, queries: Sequence[Query], candidates: ItemIndex) -> Scores:
        """Score every candidate for every query: float32[queries, candidates]; NaN for an item without text.

        A history without a known item is NaN: what the model says of it is the calibration itself.
        """
        columns = [row for row, item in enumerate(candidates.ids) if item in self.prompts.candidates]
        result = np.full((len(queries), len(candidates)), np.nan, dtype=np.float32)
        known = [row for row, query in enumerate(queries) if self.prompts.knows(query)]
        self.progress(len(queries) - len(known))
        if not columns or not known:
            self.progress(len(known))
            return result
        suffixes = [self.prompts.candidates[candidates.ids[row]] for row in columns]
        empty = self._calibration([candidates.ids[row] for row in columns])
        prefixes = [self.prompts.prefix(queries[row]) for row in known]
        with self._reading():
            for places, answers in self._after(prefixes, suffixes):
                result[np.ix_([known[place] for place in places], columns)] = answers - empty
                self.progress(len(places))
        return result

    def score_pairs(self, queries: Sequence[Query], items: Sequence[str]) -> NDArray[np.float32]:
        """Score one item per query: float32[queries], NaN as above.

        A history that comes with several items is read once; other pairs are whole prompts, in length order.
        """
        rows: dict[Query, list[int]] = {}
        for row, (query, item) in enumerate(zip(queries, items, strict=True)):
            if item in self.prompts.candidates:
                rows.setdefault(query, []).append(row)
        result = np.full(len(queries), np.nan, dtype=np.float32)
        single: list[int] = []
        for query, own in rows.items():
            if self.reader.shares and len(own) >= SHARED_FROM:
                index = ItemIndex(dict.fromkeys(items[row] for row in own))
                result[own] = self.score([query], index)[0, index.rows(items[row] for row in own)]
            elif self.prompts.knows(query):
                single += own
        if single:
            empty = self._calibration([items[row] for row in single])
            with self._reading():
                written = [self.prompts.whole(queries[row], items[row]) for row in single]
                result[single] = self._whole(written, self.progress) - empty
        return result

    @cached_property
    def prompts(self) -> PairPrompts:
        """What the model reads."""
        return PairPrompts(self.prompt, self.catalog, self.reader)

    @cached_property
    def kept(self) -> KeptPrefixes:
        """Prefixes of returning users."""
        return KeptPrefixes(self.keep_bytes)

    def _reading(self) -> AbstractContextManager[None]:
        """Whatever the reader needs around its passes."""
        return nullcontext()

    def _whole(self, written: Sequence[list[int]], progress: Callable[[int], None]) -> NDArray[np.float32]:
        """Answers float32[prompts] to whole prompts, read in batches of one length as nearly as may be."""
        order = sorted(range(len(written)), key=lambda place: len(written[place]))
        result = np.zeros(len(written), dtype=np.float32)
        start = 0
        while start < len(order):
            # As many as fit by the first, which is the shortest: the next ones are hardly longer.
            places = order[start : start + max(1, self.reader.tokens_at_once // len(written[order[start]]))]
            batch = [written[place] for place in places]
            result[places] = self.reader.whole(padded(batch), np.array(list(map(len, batch)), dtype=np.int64))
            start += len(places)
            progress(len(places))
        return result

    def _calibration(self, items: Sequence[str]) -> NDArray[np.float32]:
        if not self.calibrated or not self.reader.causal:
            return np.zeros(len(items), dtype=np.float32)
        missing = [item for item in dict.fromkeys(items) if item not in self._empty]
        if missing:
            suffixes = [self.prompts.candidates[item] for item in missing]
            with self._reading():
                ((_, scores),) = self._after([self.prompt.empty_prefix], suffixes)
            self._empty.update(zip(missing, scores[0].tolist(), strict=True))
        return np.array([self._empty[item] for item in items], dtype=np.float32)

    def _after(
        self, prefixes: Sequence[list[int]], suffixes: Sequence[list[int]]
    ) -> Iterator[tuple[list[int], NDArray[np.float32]]]:
        """Places of some prefixes, and answers float32[places, suffixes] to all suffixes behind them."""
        if not self.reader.shares:
            for place, prefix in enumerate(prefixes):
                yield [place], self._whole([prefix + suffix for suffix in suffixes], lambda _: None)[None]
            return
        blocks = _blocks(list(map(len, suffixes)), self.reader.tokens_at_once)
        texts = [padded([suffixes[place] for place in block]) for block in blocks]
        lengths = [np.array([len(suffixes[place]) for place in block], dtype=np.int64) for block in blocks]
        largest = max(text.size for text in texts)
        order = sorted(range(len(prefixes)), key=lambda place: len(prefixes[place]))
        while order:
            # Neither the prefixes together nor their largest block is more than one pass may read.
            tokens = max(largest, len(prefixes[order[-1]]))
            places = order[-max(1, self.reader.tokens_at_once // tokens) :]
            del order[-len(places) :]
            read = self._prefixes([prefixes[place] for place in places])
            result = np.zeros((len(places), len(suffixes)), dtype=np.float32)
            for block, text, length in zip(blocks, texts, lengths, strict=True):
                shape = len(places), len(block)
                own = np.tile(text, (shape[0], 1, 1)), np.tile(length, (shape[0], 1))
                result[:, block] = self.reader.answers(read, *own)
            yield places, result

    def _prefixes(self, written: Sequence[list[int]]) -> Any:  # noqa: ANN401
        """The prefixes together; those that are kept are not read again."""
        if not self.keep_bytes:
            return self._read(written)
        keys = [tuple(ids) for ids in written]
        found = {key: self.kept.get(key) for key in keys}
        missing = [key for key, prefix in found.items() if prefix is None]
        if missing:
            read = self._read([list(key) for key in missing])
            for row, key in enumerate(missing):
                found[key], size = self.reader.take(read, row)
                self.kept.add(key, found[key], size)
        return self.reader.join([found[key] for key in keys])

    def _read(self, written: Sequence[list[int]]) -> Any:  # noqa: ANN401
        return self.reader.read(padded(written), np.array(list(map(len, written)), dtype=np.int64))


def _blocks(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Places of texts of like length, so that padding and passes together cost least; none of more than `tokens`.

    Of all ways to cut the texts in length order the cheapest one, by dynamic programming over the distinct lengths.
    """
    order = sorted(range(len(lengths)), key=lambda place: lengths[place])
    ends = [place for place in range(1, len(order)) if lengths[order[place]] != lengths[order[place - 1]]]
    ends = [0, *ends, len(order)]
    cost, before = [0.0], [0]
    for stop in range(1, len(ends)):
        longest = lengths[order[ends[stop] - 1]]
        costs = [cost[start] + CALL_TOKENS + longest * (ends[stop] - ends[start]) for start in range(stop)]
        before.append(min(range(stop), key=costs.__getitem__))
        cost.append(costs[before[-1]])
    blocks: list[list[int]] = []
    stop = len(ends) - 1
    while stop:
        block = order[ends[before[stop]] : ends[stop]]
        size = max(1, tokens // max(1, lengths[block[-1]]))
        blocks += [block[start : start + size] for start in range(0, len(block), size)]
        stop = before[stop]
    return blocks

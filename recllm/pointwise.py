"""Pointwise relevance: ask a language model about every candidate; a history is read once, and kept for its return.

What reads is a `Reader`, in torch or in ONNX Runtime; prompts, batches, kept prefixes and calibration are the same.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from threading import Lock
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from recllm.data import Catalog, Query
from recllm.errors import RecllmError
from recllm.histories import padded
from recllm.prompts import CompiledPrompt
from recllm.ranking import ItemIndex, Scores

Ids = NDArray[np.int64]
Beginning = tuple[str | None, int, str | None]
"""User, place and item of the first event that is read."""

CALL_TOKENS = 32
"""What a pass costs beside its tokens, in tokens: a shorter block has to save more padding than that."""
STRETCH = 64
"""Items whose answers after an empty history are read together."""
ALIKE = 0.8
"""Users with fewer candidates than this share of another's are not read with that one: the gap is padding."""
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

    @property
    def soft_from(self) -> int | None:
        """The token that stands for the catalogue's first item, the others behind it; None where items have none."""
        ...


@dataclass(frozen=True)
class Traits:
    """What prompts have to know of a model, without the model: a worker that writes prompts gets no copy of it."""

    causal: bool
    max_tokens: int
    soft_from: int | None = None

    @classmethod
    def of(cls, model: Reads) -> "Traits":
        """What they have to know of `model`."""
        return cls(model.causal, model.max_tokens, model.soft_from)


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
        items = enumerate(zip(self.catalog.ids, self.prompt.encode_items(self.catalog), strict=True))
        return {item: None if ids is None else self._soft(row) + ids for row, (item, ids) in items}

    @cached_property
    def candidates(self) -> dict[str, list[int]]:
        """What stands behind the prefix, by the id of every item that has text."""
        end = [] if self.model.causal else self.prompt.end
        suffixes = enumerate(zip(self.catalog.ids, self.prompt.encode_suffixes(self.catalog), strict=True))
        return {item: self._soft(row) + ids + end for row, (item, ids) in suffixes if ids is not None}

    def _soft(self, row: int) -> list[int]:
        """The token of the item itself, before its words."""
        return [] if self.model.soft_from is None else [self.model.soft_from + row]

    @cached_property
    def _room(self) -> int:
        # One bound for all candidates, so that they share one prefix.
        longest = max(self.candidates, key=lambda item: len(self.candidates[item]), default=None)
        room = self.model.max_tokens - (0 if longest is None else len(self.candidates[longest]))
        least = len(self.prompt.stem_ids([], None)) + len(self.prompt.middle)
        if room < least and longest is not None:
            raise RecllmError(
                f"The prompt does not fit: of {self.model.max_tokens:,} tokens the item '{longest}' as a candidate "
                f"takes {len(self.candidates[longest]):,} and what stands before it {least:,}, and no room is left for "
                "any history. Lower the prompt's max_candidate_tokens."
            )
        return room

    @property
    def written(self) -> list[str]:
        """Items of which a history can say something, in the catalogue's order."""
        return [item for item, ids in self._items.items() if ids is not None]

    def knows(self, query: Query) -> bool:
        """Whether an item of the history can be written, and has room beside the longest candidate."""
        return any(self._items.get(item) is not None for item in query.history) and bool(self._fitting(query)[0])

    def prefix(self, query: Query) -> list[int]:
        """Everything up to the candidate."""
        return self.stem(query) + self.prompt.middle

    def stem(self, query: Query) -> list[int]:
        """The part of the prefix that a longer history of the same `beginning` goes on from."""
        return self._fitting(query)[1]

    def _fitting(self, query: Query) -> tuple[list[int], list[int]]:
        """Places of the items that are written, and the stem of them."""
        known = [place for place, item in enumerate(query.history) if self._items.get(item) is not None]
        settings = self.prompt.prompt
        first, stride = self.prompt.first_read(len(known)), settings.history_stride
        while True:
            kept = known[first:]
            ratings = None if query.ratings is None else [query.ratings[place] for place in kept]
            ids = self.prompt.stem_ids([self._items[query.history[place]] for place in kept], ratings)
            if len(ids) + len(self.prompt.middle) <= self._room or not kept:
                return kept, ids
            # By strides, so that neighbours still begin alike, as long as that does not cost much of the history.
            first += stride if 2 * stride <= len(kept) else 1

    def branch(self, item_id: str) -> list[int]:
        """What stands behind the stem, of an item that is among the candidates."""
        return self.prompt.middle + self.candidates[item_id]

    def whole(self, query: Query, item_id: str) -> list[int]:
        """The whole prompt of an item that is among the candidates."""
        return self.stem(query) + self.branch(item_id)

    def beginning(self, query: Query) -> Beginning:
        """Alike for histories of one user that are read from the same item on: mostly one goes on from another."""
        kept, _ = self._fitting(query)
        return query.user_id, kept[0] if kept else 0, query.history[kept[0]] if kept else None


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
    _lock: Lock = field(default_factory=Lock, repr=False)  # a server asks from several threads

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, ids: tuple[int, ...]) -> Any:  # noqa: ANN401
        """The prefix of these token ids, or None."""
        with self._lock:
            found = self._kept.get(ids)
            if found is None:
                return None
            self._kept.move_to_end(ids)
            return found[0]

    def add(self, ids: tuple[int, ...], prefix: Any, size: int) -> None:  # noqa: ANN401
        """Keep a prefix of `size` bytes; one that is larger than the limit is not kept."""
        with self._lock:
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
        scored = self.score_lists(queries, [candidates.ids] * len(queries))
        return np.stack(scored) if scored else np.zeros((0, len(candidates)), dtype=np.float32)

    def score_lists(self, queries: Sequence[Query], items: Sequence[Sequence[str]]) -> list[NDArray[np.float32]]:
        """Score each query's own candidates: per query float32[its candidates], NaN as above."""
        result = [np.full(len(own), np.nan, dtype=np.float32) for own in items]
        written = {
            own: [place for place, item in enumerate(own) if item in self.prompts.candidates]
            for own in set(map(tuple, items))
        }
        columns = [written[tuple(own)] for own in items]
        known = [row for row, query in enumerate(queries) if columns[row] and self.prompts.knows(query)]
        self.progress(len(queries) - len(known))
        if not known:
            return result
        asked = {
            item: self.prompts.candidates[item] for row in known for item in (items[row][at] for at in columns[row])
        }
        empty = self._calibration(list(asked))
        prefixes = [self.prompts.prefix(queries[row]) for row in known]
        suffixes = [[asked[items[row][at]] for at in columns[row]] for row in known]
        with self._reading():
            for places, answers in self._after(prefixes, suffixes):
                for place, own in zip(places, answers, strict=True):
                    row = known[place]
                    offsets = [empty[items[row][at]] for at in columns[row]]
                    result[row][columns[row]] = own - np.array(offsets, dtype=np.float32)
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
        shared = {query: own for query, own in rows.items() if self.reader.shares and len(own) >= SHARED_FROM}
        scored = self.score_lists(list(shared), [[items[row] for row in own] for own in shared.values()])
        for own, scores in zip(shared.values(), scored, strict=True):
            result[own] = scores
        single = [
            row for query, own in rows.items() if query not in shared and self.prompts.knows(query) for row in own
        ]
        if single:
            empty = self._calibration([items[row] for row in single])
            with self._reading():
                result[single] = self._apart([queries[row] for row in single], [items[row] for row in single])
            result[single] -= np.array([empty[items[row]] for row in single], dtype=np.float32)
        return result

    def answers(self, prefixes: Sequence[list[int]], suffixes: Sequence[list[int]]) -> NDArray[np.float32]:
        """What the model says of every continuation of every prefix, both token ids: float32[prefixes, suffixes].

        Not calibrated; `score` is this for histories and items.
        """
        result = np.zeros((len(prefixes), len(suffixes)), dtype=np.float32)
        if not suffixes:
            return result
        with self._reading():
            for places, answers in self._after(prefixes, [suffixes] * len(prefixes)):
                result[places] = answers
        return result

    @cached_property
    def prompts(self) -> PairPrompts:
        """What the model reads."""
        return PairPrompts(self.prompt, self.catalog, self.reader)

    @cached_property
    def _stretches(self) -> tuple[list[str], dict[str, int]]:
        """The items that can be written, and the place of each."""
        items = list(self.prompts.candidates)
        return items, {item: place for place, item in enumerate(items)}

    @cached_property
    def kept(self) -> KeptPrefixes:
        """Prefixes of returning users."""
        return KeptPrefixes(self.keep_bytes)

    def _reading(self) -> AbstractContextManager[None]:
        """Whatever the reader needs around its passes."""
        return nullcontext()

    def _apart(self, queries: Sequence[Query], items: Sequence[str]) -> NDArray[np.float32]:
        """Answers float32[pairs] about one item per query, not calibrated."""
        written = [self.prompts.whole(query, item) for query, item in zip(queries, items, strict=True)]
        return self._whole(written, self.progress)

    def _whole(self, written: Sequence[list[int]], progress: Callable[[int], None]) -> NDArray[np.float32]:
        """Answers float32[prompts] to whole prompts, read in batches of one length as nearly as may be."""
        order = _by_length(written)
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

    def _calibration(self, items: Sequence[str]) -> dict[str, float]:
        """What is taken off each item's answers."""
        if not self.calibrated or not self.reader.causal:
            return dict.fromkeys(items, 0.0)
        # Whole stretches of the catalogue: the batch that an item is read in, and with it its last digits, must not
        # hang on what was asked before.
        catalogue, places = self._stretches
        for number in sorted({places[item] // STRETCH for item in items if item not in self._empty}):
            part = catalogue[number * STRETCH : (number + 1) * STRETCH]
            (scores,) = self.answers([self.prompt.empty_prefix], [self.prompts.candidates[item] for item in part])
            self._empty.update(zip(part, scores.tolist(), strict=True))
        return self._empty

    def _after(
        self, prefixes: Sequence[list[int]], suffixes: Sequence[Sequence[list[int]]]
    ) -> Iterator[tuple[list[int], list[NDArray[np.float32]]]]:
        """Places of some prefixes, and for each the answers float32[its suffixes] behind it."""
        if not self.reader.shares:
            for place, prefix in enumerate(prefixes):
                yield [place], [self._whole([prefix + suffix for suffix in suffixes[place]], lambda _: None)]
            return
        # The most suffixes and the longest prefix last: they are taken from the end.
        order = sorted(range(len(prefixes)), key=lambda place: (len(suffixes[place]), len(prefixes[place])))
        longest = max(map(len, prefixes), default=0)
        while order:
            first = order[-1]
            # Neither the prefixes together nor what stands behind them is much more than one pass may read.
            tokens = max(longest, sum(map(len, suffixes[first])))
            places = order[-max(1, self.reader.tokens_at_once // tokens) :]
            places = [place for place in places if len(suffixes[place]) >= ALIKE * len(suffixes[first])]
            del order[-len(places) :]
            read = self._prefixes([prefixes[place] for place in places])
            yield places, self._behind(read, [suffixes[place] for place in places])

    def _behind(self, read: Any, suffixes: Sequence[Sequence[list[int]]]) -> list[NDArray[np.float32]]:  # noqa: ANN401
        """Answers of each user's suffixes; the users' shortest are read together, then the next ones."""
        most = max(map(len, suffixes))
        # A user with fewer suffixes than another has empty ones, which stand first.
        orders = [_by_length(own) for own in suffixes]
        texts = [
            [[0]] * (most - len(own)) + [own[at] for at in order] for own, order in zip(suffixes, orders, strict=True)
        ]
        lengths = np.array([list(map(len, own)) for own in texts], dtype=np.int64)  # (users, most)
        result = np.zeros(lengths.shape, dtype=np.float32)
        for block in _blocks(lengths.max(axis=0).tolist(), self.reader.tokens_at_once // len(suffixes)):
            ids = padded([own[place] for own in texts for place in block])
            own_lengths = lengths[:, block]
            result[:, block] = self.reader.answers(read, ids.reshape(*own_lengths.shape, -1), own_lengths)
        answers = [np.zeros(len(own), dtype=np.float32) for own in suffixes]
        for own, order, row in zip(answers, orders, result, strict=True):
            own[order] = row[most - len(order) :]
        return answers

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


def _by_length(texts: Sequence[list[int]]) -> list[int]:
    return sorted(range(len(texts)), key=lambda place: len(texts[place]))


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

"""Labelled pairs: (query, item, label) rows to train relevance on and to measure it by, with sampled negatives."""

import itertools
from collections.abc import Callable, Container, Hashable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Generic, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from recllm.data import Query
from recllm.errors import RecllmError
from recllm.histories import window_start
from recllm.splits import Example
from recllm.tasks import Task

T = TypeVar("T")
DRAWS = 100
"""Draws of a negative before all that is left is listed."""


class Made(Sequence[T]):
    """A sequence whose entries are made when they are asked for: all prompts at once would not fit into memory.

    It can be pickled to a worker that reads ahead, if `make` can: no lambda, then, and no function inside another.
    """

    def __init__(self, rows: int, make: Callable[[int], T]) -> None:
        """Keep `make`, which gives the entry of a row 0 … `rows` − 1."""
        self.rows, self.make = rows, make

    def __len__(self) -> int:
        return self.rows

    @overload
    def __getitem__(self, row: int) -> T: ...

    @overload
    def __getitem__(self, row: slice) -> Sequence[T]: ...

    def __getitem__(self, row: int | slice) -> T | Sequence[T]:
        """One entry, or several."""
        places = range(self.rows)[row]
        return self.make(places) if isinstance(places, int) else [self.make(place) for place in places]


def each_of(blocks: Sequence[Sequence[Example]], sizes: Sequence[int], write: Callable[[Example], T]) -> Made[T]:
    """What `write` makes of every row of the blocks, one after the other; a block is made once for all of its rows."""
    return Made(sum(sizes), _EachOf(blocks, sizes, write))


class _EachOf(Generic[T]):
    """Makes the rows of `each_of`."""

    def __init__(
        self, blocks: Sequence[Sequence[Example]], sizes: Sequence[int], write: Callable[[Example], T]
    ) -> None:
        self.blocks, self.write = blocks, write
        self.places = [(number, row) for number, rows in enumerate(sizes) for row in range(rows)]
        self.last: tuple[int, Sequence[Example]] = (-1, [])

    def __call__(self, place: int) -> T:
        number, row = self.places[place]
        last, block = self.last
        if last != number:
            block = self.blocks[number]
            self.last = (number, block)
        return self.write(block[row])


def user_of(query: Query) -> str | None:
    """What rows have in common that stand together, where nothing else is said."""
    return query.user_id


def earlier_events(task: Task, *, like_at: float, max_history: int, stride: int = 1) -> Sequence[Example]:
    """Every training event that has an earlier one, its history the last events before it, as `window_start` cuts."""
    queries, threshold = list(task.split.train.histories().values()), task.liked_from(like_at)
    places = [(user, place) for user, query in enumerate(queries) for place in range(1, len(query.history))]
    return Made(len(places), partial(_earlier_event, queries, places, threshold, max_history, stride))


def _earlier_event(
    queries: Sequence[Query], places: Sequence[tuple[int, int]], like_at: float, max_history: int, stride: int, row: int
) -> Example:
    user, place = places[row]
    query, first = queries[user], window_start(place, max_history, stride)
    ratings = None if query.ratings is None else query.ratings[first:place]
    rating = None if query.ratings is None else query.ratings[place]
    label = None if rating is None else float(rating >= like_at)
    return Example(Query(query.history[first:place], query.user_id, ratings), query.history[place], label)


class Blocks(Made[list[Example]]):
    """Blocks of rows, made when they are asked for; `sizes` are the numbers of their rows."""

    def __init__(self, sizes: Sequence[int], make: Callable[[int], list[Example]]) -> None:
        super().__init__(len(sizes), make)
        self.sizes = sizes

    @property
    def each(self) -> Sequence[Example]:
        """Their rows, one after the other."""
        return each_of(self, self.sizes, _itself)


def _itself(row: Example) -> Example:
    return row


def training_blocks(
    task: Task,
    *,
    items: Container[str],
    like_at: float,
    max_history: int,
    limit: int,
    epochs: int,
    seed: int,
    at_least: int = 0,
    blocks_at_least: int = 0,
    block: int = 1,
    stride: int = 1,
    alike: Callable[[Query], Hashable] = user_of,
    scattered: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Blocks:
    """The rows that relevance is trained on, in the order in which they are seen, all epochs one after the other.

    With labels of both kinds they are the labelled events; where all are positive (no ratings), every event is
    followed by a warm item that the user has not, sampled uniformly. A row is a pure function of seed, epoch and event.

    Args:
        task: the data.
        items: what may stand as a candidate.
        like_at: a rating of at least this is liked.
        max_history: how many of the last items a history keeps.
        limit: the most rows of an epoch, but for the rest of a block; which ones, each epoch draws anew.
        epochs: passes.
        seed: of order and samples.
        at_least: further passes until there are so many rows.
        blocks_at_least: further passes until there are so many blocks.
        block: the most events that stand together.
        stride: a longer history begins at a multiple of so many items.
        alike: events whose queries it gives the same stand together; by default those of one user.
        scattered: blocks are drawn, and stand in any order; else events are drawn, and a block stands where its first
            event does, so that full ones come first.
        say: gets a line where users have every item, so that their events have no negative and are left out.

    Raises:
        RecllmError: no training event has a history, or everybody has every item.
    """
    given = task.split.train_rows
    events = earlier_events(task, like_at=like_at, max_history=max_history, stride=stride)
    base = events if given is None else given
    labels = {
        row: example.label for row, example in enumerate(base) if example.query.history and example.item_id in items
    }
    judged = 0.0 in labels.values()
    rows = np.array([row for row, label in labels.items() if label is not None or not judged], dtype=np.int64)
    if not len(rows):
        raise RecllmError(
            "Relevance needs training events with a history whose item has text, and there is none. Check the split "
            "(data.split) and the columns that the prompt writes."
        )
    negatives = None if judged else Negatives(task, task.split.train.histories(), items)
    if negatives is not None:
        rows = _with_negatives(base, rows, negatives, say)
    count = limit if judged else max(1, limit // 2)
    passes = max(epochs, -(-at_least // (min(count, len(rows)) * (1 if judged else 2))))
    order: list[tuple[int, list[int]]] = []
    for epoch in itertools.count():
        if epoch >= passes and len(order) >= blocks_at_least:
            break
        drawn = np.random.default_rng((seed, epoch)).permutation(rows)
        if not scattered:
            order += [(epoch, own) for own in in_blocks(base, drawn[:count], block, alike)]
            continue
        # Whole blocks: of rows that are drawn one by one hardly any two have a beginning in common.
        blocks = in_blocks(base, drawn, block, alike)
        places = np.random.default_rng((seed, epoch, len(blocks))).permutation(len(blocks))
        before = np.cumsum([0, *(len(blocks[place]) for place in places)])[:-1]
        order += [(epoch, blocks[place]) for place, so_far in zip(places, before, strict=True) if so_far < count]
    each = 1 if negatives is None else 2
    return Blocks([each * len(own) for _, own in order], partial(_block, base, order, negatives, seed))


def _block(
    base: Sequence[Example],
    order: Sequence[tuple[int, list[int]]],
    negatives: "Negatives | None",
    seed: int,
    place: int,
) -> list[Example]:
    epoch, own = order[place]
    if negatives is None:
        return [base[event] for event in own]
    return [row for event in own for row in negatives.pair(base[event], (seed, epoch, event))]


def _with_negatives(
    base: Sequence[Example], rows: NDArray[np.int64], negatives: "Negatives", say: Callable[[str], None]
) -> NDArray[np.int64]:
    """Those of the `rows` of `base` whose users lack an item.

    Raises:
        RecllmError: none is left.
    """
    full = negatives.full()
    if not full:
        return rows
    out = frozenset(full)
    kept = np.array([row for row in rows.tolist() if base[row].query.user_id not in out], dtype=np.int64)
    if not len(kept):
        raise RecllmError(
            f"Every user, such as '{full[0]}', has an event with every item, so there is no negative to sample. Give "
            "ratings or labels (data.columns)."
        )
    say(
        f"{len(full):,} users have an event with every item, such as '{full[0]}': no negative can be sampled for them, "
        f"and {len(rows) - len(kept):,} of {len(rows):,} training events are left out"
    )
    return kept


def in_blocks(
    base: Sequence[Example], rows: NDArray[np.int64], block: int, alike: Callable[[Query], Hashable]
) -> list[list[int]]:
    """The `rows` of `base`, in blocks of up to `block` that are alike; blocks stand where their first row stood."""
    if block == 1:
        return [[row] for row in rows.tolist()]
    open_blocks: dict[Hashable, list[int]] = {}
    blocks: list[list[int]] = []
    for row in rows.tolist():
        key = alike(base[row].query)
        own = open_blocks.get(key)
        if own is None or len(own) == block:
            own = open_blocks[key] = []
            blocks.append(own)
        own.append(row)
    return blocks


def labelled_rows(task: Task, part: str, seed: int) -> list[Example]:
    """The rows of "valid" or "test" that have a label; where all are positive, each is followed by a sampled negative.

    Such a negative is an item the user has no event with, in any part of the data for test rows and before test for
    those of validation, and cold where the target is cold; a row of a user who has them all is left out. When a row is
    asked says nothing to what judges pairs, and is left out too, so that rows of one history are read together.

    Raises:
        RecllmError: test rows have dislikes and validation rows none, so that the two would mean different things.
    """
    examples = [
        replace(row, query=replace(row.query, at=None))
        for row in (task.split.valid if part == "valid" else task.split.test)
    ]
    if not samples_negatives(task):
        if not any(row.label == 0 for row in task.split.valid):
            raise RecllmError(
                "No validation row is a dislike, and some test rows are: nothing can be chosen by likes alone. Take "
                "another data.split or data.like_at, or give validation rows of both kinds."
            )
        return [example for example in examples if example.label is not None]
    known = task.dataset.interactions.histories()
    if part == "valid":  # what is chosen on these rows shall know nothing of test
        known = _before_test(task)
    negatives = Negatives(task, known, frozenset(task.index.ids))
    rows = [(place, example) for place, example in enumerate(examples) if negatives.left(example)]
    return [row for place, example in rows for row in negatives.pair(example, (seed, place))]


def _before_test(task: Task) -> dict[str, Query]:
    """What users have in the training and validation rows."""
    had: dict[str, set[str]] = {}
    for user, query in task.split.train.histories().items():
        had.setdefault(user, set()).update(query.history)
    for row in task.split.valid:
        if row.query.user_id is not None:
            had.setdefault(row.query.user_id, set()).update((*row.query.history, row.item_id))
    return {user: Query(tuple(sorted(items)), user) for user, items in had.items()}


def samples_negatives(task: Task) -> bool:
    """Whether no row that is measured is a dislike, so that negatives are sampled."""
    return not any(row.label == 0 for row in (*task.split.valid, *task.split.test))


class Negatives:
    """Items that a user has not, sampled uniformly: warm ones for a warm target, cold ones for a cold target."""

    def __init__(self, task: Task, known: Mapping[str, Query], items: Container[str]) -> None:
        """Keep those of `items` that are warm or held out as cold in `task`, and what each user is known to have."""
        self.cold = task.split.cold_items
        warm = {item for item, is_warm in zip(task.index.ids, task.warm, strict=True) if is_warm}
        self.pools = {
            is_cold: [item for item in task.index.ids if item in kind and item in items]
            for is_cold, kind in ((False, warm), (True, self.cold))
        }
        self.items = {user: frozenset(query.history) for user, query in known.items()}

    def pair(self, example: Example, key: Sequence[int]) -> tuple[Example, Example]:
        """The example as a positive, and its query with a sampled item as a negative; the same for the same `key`.

        Raises:
            RecllmError: the user has every item.
        """
        item = self._sample(example, np.random.default_rng(key))
        return Example(example.query, example.item_id, 1.0), Example(example.query, item, 0.0)

    def full(self) -> list[str]:
        """Users who have every warm item."""
        pool = self.pools[False]
        return [user for user, own in self.items.items() if len(own) >= len(pool) and own.issuperset(pool)]

    def left(self, example: Example) -> bool:
        """Whether there is an item that the user has not."""
        own, pool = self._of(example)
        return len(own) < len(pool) or any(item not in own for item in pool)

    def _of(self, example: Example) -> tuple[frozenset[str], list[str]]:
        """What the user has, and what a negative is drawn of."""
        user = example.query.user_id
        known = self.items.get(user, frozenset()) if user is not None else frozenset()
        return known.union(example.query.history, [example.item_id]), self.pools[example.item_id in self.cold]

    def _sample(self, example: Example, rng: np.random.Generator) -> str:
        own, pool = self._of(example)
        for _ in range(DRAWS if pool else 0):
            item = pool[int(rng.integers(len(pool)))]
            if item not in own:
                return item
        left = [item for item in pool if item not in own]
        if not left:
            raise RecllmError(
                f"User '{example.query.user_id}' has an event with every item: there is no negative to sample. Give "
                "ratings or labels (data.columns), or leave that user out."
            )
        return left[int(rng.integers(len(left)))]

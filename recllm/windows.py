"""Training windows of item rows: of the events, cut anew for every pass, and those that a teacher has completed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]
"""Rows of items in the catalogue; with a second column, int64[events, 2], when each was, in parts of training time."""

CUTTING = 1
"""Version of how windows are cut and ordered: stored ones of another version are not read. Raise it with any change."""
POOL = 64
"""Batches that are sorted by length together."""


def like_lengths(lengths: Sequence[int], batch: int, random: np.random.Generator) -> NDArray[np.int64]:
    """A random order; of whole batches of like length, the rest last."""
    order = random.permutation(len(lengths))
    if batch == 1:
        return order
    whole = len(order) - len(order) % batch
    pools = [order[start : min(start + POOL * batch, whole)] for start in range(0, whole, POOL * batch)]
    alike = [pool[np.argsort(np.take(lengths, pool), kind="stable")] for pool in pools]
    batches = np.concatenate([np.zeros(0, dtype=np.int64), *alike]).reshape(-1, batch)
    return np.concatenate([batches[random.permutation(len(batches))].ravel(), order[whole:]])


def items_of(window: Rows) -> Rows:
    """The items of a window, int64[events], without their times."""
    return window if window.ndim == 1 else window[:, 0]


class Taught(NamedTuple):
    """A history and what a teacher would choose after it.

    Attributes:
        window: item rows, oldest first, the last one the teacher's first choice.
        hidden: item rows of the same user that are not in the window, and not to be chosen.
        items: int64[targets], the teacher's best.
        shares: float32[targets], how much of each; their sum is what the history weighs in its step.
    """

    window: Rows
    hidden: Rows
    items: Rows
    shares: NDArray[np.float32]


def with_taught(
    windows: Sequence[Rows], taught: Sequence[Taught], *, passes: int, batch: int, seed: int
) -> list[Rows | Taught]:
    """Windows of events with whole batches of taught ones among them; in a pass each once, a few twice to fill them.

    Args:
        windows: in batches, which stay as they are; what is left over stays last.
        taught: what a teacher has completed.
        passes: how often all `taught` come.
        batch: windows in a step on all devices.
        seed: of their order.
    """
    random = np.random.default_rng([seed, 2, 2])  # no stream of an epoch's, which are [seed, number]
    whole, steps = len(windows) // batch, -(-len(taught) // batch)
    added: list[Taught] = []
    for _ in range(passes):
        more = random.integers(0, len(taught), steps * batch - len(taught))
        filled = [*taught, *(taught[place] for place in more)]
        added += [filled[place] for place in like_lengths([len(row.window) for row in filled], batch, random)]
    result: list[Rows | Taught] = []
    events, place = 0, 0
    for is_taught in random.permutation(np.arange(whole + passes * steps) < passes * steps):
        if is_taught:
            result += added[place : place + batch]
            place += batch
        else:
            result += windows[events : events + batch]
            events += batch
    return [*result, *windows[events:]]


@dataclass(frozen=True)
class Windows:
    """Training examples as a pure function of (seed, epoch, example), so that a resumed run sees the same ones.

    Every epoch cuts each user's events into windows of at most `length` inputs with its own offset, the last window
    always whole, and visits them in its own order. `recent` keeps only the last window of each user. With a `batch` of
    more than one, windows of like length stand together, so that little of a step is padding.
    """

    sequences: list[NDArray[np.int64]]
    length: int
    epochs: int
    seed: int
    recent: bool = False
    batch: int = 1

    def epoch(self, number: int) -> Iterator[NDArray[np.int64]]:
        """The windows of one epoch in order: item rows, inputs and targets overlapping by one."""
        random = np.random.default_rng([self.seed, number])
        cuts = [(user, *cut) for user, events in enumerate(self.sequences) for cut in self._cuts(len(events), random)]
        for place in like_lengths([stop - start for _, start, stop in cuts], self.batch, random):
            user, start, stop = cuts[place]
            yield self.sequences[user][start:stop]

    def _cuts(self, events: int, random: np.random.Generator) -> Iterator[tuple[int, int]]:
        stop, size = events, self.length
        while stop > 1:
            start = max(0, stop - 1 - size)
            yield start, stop
            if self.recent:
                return
            # Only the window after the last one has a drawn length: it moves all earlier cuts from epoch to epoch.
            size = int(random.integers(1, self.length + 1)) if stop == events else self.length
            stop = start + 1

    @property
    def about(self) -> int:
        """About how many windows all epochs have."""
        if self.recent:
            return self.epochs * len(self.sequences)
        return self.epochs * sum(1 + len(events) // self.length for events in self.sequences)

    def each(self, at_least: int = 0) -> Iterator[NDArray[np.int64]]:
        """The windows of all epochs, one after the other, and of further ones until there are `at_least` so many."""
        rest: list[NDArray[np.int64]] = []
        number = given = 0
        while number < self.epochs or 0 < given < at_least:
            windows = list(self.epoch(number))
            whole = len(windows) - len(windows) % self.batch
            yield from windows[:whole]
            rest.extend(windows[whole:])  # to the end: it would shift the batches of the epochs after it
            given += len(windows)
            number += 1
        yield from rest

    def all(self, at_least: int = 0) -> list[NDArray[np.int64]]:
        """All that `each` gives."""
        return list(self.each(at_least))

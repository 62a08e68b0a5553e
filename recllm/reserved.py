"""Reserved places: some of a user's list kept for new items, which known ones would keep out of it for ever."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Lists:
    """Lists of items, best first.

    Attributes:
        rows: int64[users, length], −1 behind the last item.
        scores: float32[users, length], NaN behind the last item.
        shares: float32[users, scorers, length].
    """

    rows: NDArray[np.int64]
    scores: NDArray[np.float32]
    shares: NDArray[np.float32]

    @classmethod
    def empty(cls, users: int, scorers: int) -> "Lists":
        """Lists of no item."""
        return cls(
            np.zeros((users, 0), dtype=np.int64),
            np.zeros((users, 0), dtype=np.float32),
            np.zeros((users, scorers, 0), dtype=np.float32),
        )

    def first(self, count: int) -> "Lists":
        """The first places of each list."""
        return Lists(self.rows[:, :count], self.scores[:, :count], self.shares[:, :, :count])

    def with_share(self, share: NDArray[np.float32]) -> "Lists":
        """With what else adds to the scores, float32[users, length], as one more share."""
        return Lists(self.rows, self.scores + share, np.concatenate([self.shares, share[:, None]], axis=1))

    def share_of(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """What the last of the shares gives items, float32 like the rows int64[users, items]: 0 to what is not here."""
        same = (rows[:, :, None] == self.rows[:, None, :]) & (rows >= 0)[:, :, None]
        found: NDArray[np.float32] = np.where(same, self.shares[:, None, -1], np.float32(0)).sum(axis=2)
        return found

    def merged(self, other: "Lists", count: int) -> "Lists":
        """The `count` best of both; of equal scores the earlier ones."""
        scores = np.concatenate([self.scores, other.scores], axis=1)
        order = np.argsort(np.where(np.isnan(scores), np.inf, -scores), axis=1, kind="stable")[:, :count]
        return _picked(self, other, order)


def _picked(first: Lists, second: Lists, order: NDArray[np.int64]) -> Lists:
    """The places int64[users, length] of both lists behind each other."""
    return Lists(
        np.take_along_axis(np.concatenate([first.rows, second.rows], axis=1), order, 1),
        np.take_along_axis(np.concatenate([first.scores, second.scores], axis=1), order, 1),
        np.take_along_axis(np.concatenate([first.shares, second.shares], axis=2), order[:, None], 2),
    )


def reserve(best: Lists, new: Lists) -> Lists:
    """The best items with at least as many new ones among them as `new` has, or as there are.

    As little as that needs is changed: the new items that are on the list stay where they are, and what is missing of
    the next ones takes the place of the last known ones, behind everything else, for all of `best` scores higher.

    Args:
        best: of all items.
        new: the best new items by the same scores.
    """
    width = best.rows.shape[1]
    there = (best.rows[:, :, None] == new.rows[:, None, :]) & (best.rows >= 0)[:, :, None]  # (users, width, new)
    is_new, listed = there.any(2), there.any(1)
    missing = ((new.rows >= 0) & ~listed).sum(1)
    known_behind = np.cumsum((~is_new)[:, ::-1], axis=1)[:, ::-1]  # with itself: the last known item has 1
    stays = is_new | (known_behind > missing[:, None])
    taken = np.concatenate([stays & (best.rows >= 0), (new.rows >= 0) & ~listed], axis=1)
    order = np.argsort(~taken, axis=1, kind="stable")[:, :width]
    kept = np.take_along_axis(taken, order, 1)
    found = _picked(best, new, order)
    return Lists(
        np.where(kept, found.rows, -1),
        np.where(kept, found.scores, np.float32(np.nan)),
        np.where(kept[:, None], found.shares, np.float32(np.nan)),
    )


def with_new(order: NDArray[np.int64], new: NDArray[np.bool_], length: int, count: int) -> NDArray[np.int64]:
    """The first `length` of one user's items with at least `count` new ones among them, or as many as there are.

    Args:
        order: places of the items, best first, int64[items].
        new: whether the item at a place is new, bool[items].
        length: of the list.
        count: how many of it at least are new.
    """
    head, behind = order[:length], order[length:]
    spare = behind[new[behind]][: max(0, count - int(new[head].sum()))]
    known = np.flatnonzero(~new[head])
    return np.concatenate([np.delete(head, known[len(known) - len(spare) :]), spare])

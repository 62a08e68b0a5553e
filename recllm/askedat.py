"""When a recommendation is asked for: what had happened by then, and how much of the training time was over."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from recllm.data import Interactions

DAY = 86_400.0
"""Seconds."""
NOW = int(np.iinfo(np.int64).max)
"""The moment after all others."""
BEFORE_THE_END = 0.999
"""The share of a log's events that are before its end, from which popularity's events fade."""
PARTS = 1 << 20
"""Places in the training time are whole numbers of so many parts, so that they lie beside rows of items."""


def log_end(times: pl.Series) -> float:
    """Where all but one event of a thousand are over: some clocks are ahead. Of times in seconds, without nulls."""
    return float(np.quantile(times.to_numpy().astype(np.float64), BEFORE_THE_END, method="lower"))


@dataclass(frozen=True, eq=False)
class FadingCounts:
    """The events of every item, from which counts that fade can be taken as of any moment.

    Attributes:
        rows: int32[events], the item of each.
        times: int64[events], in seconds, ascending.
        weights: float32[events], what each counts.
        items: how many items there are.
        half_life_days: an event counts ½ for every so many days since.
    """

    rows: NDArray[np.int32]
    times: NDArray[np.int64]
    weights: NDArray[np.float32]
    items: int
    half_life_days: float

    @classmethod
    def fit(
        cls, interactions: Interactions, rows: NDArray[np.int64], items: int, half_life_days: float
    ) -> "FadingCounts":
        """Put events, each of the item in `rows`, int64[events], into the order of time; all have a timestamp.

        Those after the log's end are taken for its last.
        """
        end = int(log_end(interactions.frame["timestamp"]))
        times = np.minimum(interactions.frame["timestamp"].to_numpy().astype(np.int64), end)
        order = np.argsort(times, kind="stable")
        weights = interactions.weights().astype(np.float32)
        return cls(rows[order].astype(np.int32), times[order], weights[order], items, half_life_days)

    def at(self, moments: NDArray[np.int64]) -> NDArray[np.float64]:
        """Faded counts of what happened before each of `moments`, int64[moments], in seconds: float64[moments, items].

        An event of the same second as the request does not count: which of the two came first is not known. After the
        log's end nothing fades further, since nothing is known of what came then.
        """
        moments = np.minimum(moments, self.times[-1] + 1)
        result = np.empty((len(moments), self.items))
        counts, first, before = np.zeros(self.items), 0, 0
        for place in np.argsort(moments, kind="stable"):
            moment = int(moments[place])
            stop = int(np.searchsorted(self.times, moment, side="left"))
            counts *= np.exp2((before - moment) / (DAY * self.half_life_days))  # of nothing, the first time
            ages = (moment - self.times[first:stop]) / (DAY * self.half_life_days)
            fresh = self.weights[first:stop] * np.exp2(-ages)
            counts += np.bincount(self.rows[first:stop], weights=fresh, minlength=self.items)
            result[place], first, before = counts, stop, moment
        return result

    def now(self) -> NDArray[np.float64]:
        """Faded counts at the log's end, float64[items]."""
        counts: NDArray[np.float64] = self.at(np.array([NOW]))[0]
        return counts


class TrainingTime:
    """Places in the training time: how many of its events were before a moment, in `PARTS` of all of them.

    Counted in events and not in days, so that a clock that is wrong, or a year with little to see, takes no room.
    """

    def __init__(self, times: NDArray[np.int64]) -> None:
        """Keep `times`, int64[events], in seconds, in any order."""
        self.times = np.sort(times)

    @classmethod
    def of(cls, interactions: Interactions) -> "TrainingTime | None":
        """That of the events; None where one has no timestamp, or all have the same."""
        times = interactions.frame["timestamp"]
        if times.is_empty() or times.null_count() or times.min() == times.max():
            return None
        return cls(times.to_numpy().astype(np.int64))

    def places(self, moments: Iterable[int | None]) -> NDArray[np.int64]:
        """Where `moments`, in seconds, are: int64[moments], 0 to `PARTS`; None is now, the end."""
        given = list(moments)
        known = np.array([0 if moment is None else moment for moment in given], dtype=np.int64)
        now = np.array([moment is None for moment in given], dtype=bool)
        before = np.searchsorted(self.times, known, side="left")
        return np.where(now, PARTS, before * PARTS // len(self.times)).astype(np.int64)

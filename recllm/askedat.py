"""When a recommendation is asked for: what had happened by then, and how much of the training time was over."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from recllm.data import Interactions, Query

DAY = 86_400.0
"""Seconds."""
NOW = int(np.iinfo(np.int64).max)
"""The moment after all others."""
BEFORE_THE_END = 0.999
"""The share of a log's events that are before its end, from which popularity's events fade."""
PARTS = 1 << 20
"""Places in the training time are whole numbers of so many parts, so that they lie beside rows of items."""


def log_end(times: pl.Series) -> float:
    """Where all but one event of a thousand are over: some clocks are ahead. Of times in seconds, without nulls.

    Of fewer events than a thousand it is the last.
    """
    return float(np.quantile(times.to_numpy().astype(np.float64), BEFORE_THE_END, method="inverted_cdf"))


def moments_of(queries: Sequence[Query]) -> NDArray[np.int64]:
    """When queries are asked, int64[queries], in seconds; `NOW` where they do not say."""
    return np.array([NOW if query.at is None else query.at for query in queries], dtype=np.int64)


@dataclass(frozen=True, eq=False)
class FadingCounts:
    """The events of every item, from which counts that fade can be taken as of any moment.

    Attributes:
        rows: int32[events], the item of each.
        times: int64[events], in seconds, ascending.
        weights: float32[events], what each counts.
        items: how many items there are.
        end: the log's end, in seconds; what comes after it is as old as what comes at it.
        half_life_days: an event counts ½ for every so many days since.
    """

    rows: NDArray[np.int32]
    times: NDArray[np.int64]
    weights: NDArray[np.float32]
    items: int
    end: int
    half_life_days: float

    @classmethod
    def fit(
        cls, interactions: Interactions, rows: NDArray[np.int64], items: int, half_life_days: float
    ) -> "FadingCounts":
        """Put events, each of the item in `rows`, int64[events], into the order of time; all have a timestamp."""
        times = interactions.frame["timestamp"].to_numpy().astype(np.int64)
        order = np.argsort(times, kind="stable")
        weights = interactions.weights().astype(np.float32)[order]
        end = int(log_end(interactions.frame["timestamp"]))
        return cls(rows[order].astype(np.int32), times[order], weights, items, end, half_life_days)

    def at(self, moments: NDArray[np.int64]) -> NDArray[np.float64]:
        """Faded counts of what happened before each of `moments`, int64[moments], in seconds: float64[moments, items].

        An event of the same second as the request does not count: which of the two came first is not known. After the
        log's end nothing fades further, since of what came then nearly nothing is known.
        """
        result = np.empty((len(moments), self.items))
        ages = np.minimum(moments, self.end + 1)
        order = np.argsort(moments, kind="stable")
        counts, first, before = np.zeros(self.items), 0, ages[order[:1]]
        for place in order:
            stop, moment = int(np.searchsorted(self.times, moments[place], side="left")), ages[place]
            counts *= self._share(moment - before)
            fresh = self.weights[first:stop] * self._share(moment - np.minimum(self.times[first:stop], self.end))
            counts += np.bincount(self.rows[first:stop], weights=fresh, minlength=self.items)
            result[place], first, before = counts, stop, moment
        return result

    def _share(self, seconds: NDArray[np.int64]) -> NDArray[np.float64]:
        """How much of an event is left after so long."""
        return np.asarray(np.exp2(-seconds / (DAY * self.half_life_days)))

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

    def places(self, moments: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where `moments`, int64[...] in seconds, are: int64[...], 0 to `PARTS`; `NOW` is at the end."""
        before = np.searchsorted(self.times, moments, side="left").astype(np.int64)
        return before * PARTS // len(self.times)

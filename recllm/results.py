"""Results: figures of several scorers on the same rows, with paired bootstrap intervals over users."""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from recllm.errors import unknown

Interval = tuple[float, float, float]
"""A figure with the lower and upper end of its 95 % interval (NaN where none is drawn)."""
Key = tuple[str, str, str]
"""Scorer, metric, slice."""

PERCENTILES = (2.5, 97.5)
DRAW_BLOCK = 64
CELL = 20
UNKNOWN = {
    "AUC": "not known, for all these rows have one label",
    "UAUC": "not known, for none of these users has rows of both labels",
}
"""What is said of a metric that no scorer has."""


@dataclass(frozen=True, eq=False)
class Table:
    """Figures of several scorers on the same rows, with the bootstrap draws that pair them."""

    scorers: tuple[str, ...]
    metrics: tuple[str, ...]
    counts: dict[str, tuple[int, int]]
    """Rows and users of every slice."""
    values: dict[Key, float]
    draws: dict[Key, NDArray[np.float64]]
    """float64[resamples] beside `values`, the same resamples for every scorer; a metric without interval has none."""
    per_row: dict[str, dict[str, NDArray[np.float64]]] = field(default_factory=dict)
    """float64[rows] by scorer and metric, beside them "rank" (for labelled pairs only "score")."""

    def interval(self, scorer: str, metric: str, part: str = "all") -> Interval:
        """The figure in a slice and its 95 % percentile interval.

        Raises:
            RecllmError: an unknown scorer, metric or slice.
        """
        key = self._key(scorer, metric, part)
        return (self.values[key], *_ends(self.draws.get(key) if self._several(part) else None))

    def difference(self, a: str, b: str, metric: str, part: str = "all") -> Interval:
        """`a` less `b` on the same rows, with the 95 % interval of the paired bootstrap.

        Raises:
            RecllmError: an unknown scorer, metric or slice.
        """
        left, right = self._key(a, metric, part), self._key(b, metric, part)
        drawn = self.draws[left] - self.draws[right] if left in self.draws and self._several(part) else None
        return (self.values[left] - self.values[right], *_ends(drawn))

    def rows(self) -> list[dict[str, object]]:
        """One row per slice and scorer: slice, rows, users, scorer, and each metric's (figure, low, high)."""
        return [
            {"slice": part, "rows": rows, "users": users, "scorer": scorer}
            | {metric: self.interval(scorer, metric, part) for metric in self.metrics}
            for part, (rows, users) in self.counts.items()
            for scorer in self.scorers
        ]

    def to_dict(self) -> dict[str, object]:
        """The rows with None in place of NaN, so that JSON takes them."""
        rows = [{key: _plain(value) for key, value in row.items()} for row in self.rows()]
        return {"metrics": list(self.metrics), "rows": rows}

    def lines(self, slices: Collection[str] | None = None) -> list[str]:
        """The table as text, one line per slice and scorer; of some `slices`, or of all."""
        width = max(map(len, (*self.scorers, "scorer")))
        head = "  ".join(["scorer".ljust(width), *(metric.ljust(CELL) for metric in self.metrics)]).rstrip()
        lines = []
        for part, (rows, users) in self.counts.items():
            if slices is not None and part not in slices:
                continue
            lines += [f"{part}: {rows} rows, {users} users", head]
            for scorer in self.scorers:
                cells = [_cell(self.interval(scorer, metric, part)).ljust(CELL) for metric in self.metrics]
                lines.append("  ".join([scorer.ljust(width), *cells]).rstrip())
            for metric in self.metrics:
                if metric in UNKNOWN and self.lacks(metric, part):
                    lines.append(f"{metric}: {UNKNOWN[metric]}")
        return lines

    def lacks(self, metric: str, part: str = "all") -> bool:
        """Whether no scorer has a metric in a slice."""
        return all(np.isnan(self.values[name, metric, part]) for name in self.scorers)

    def _several(self, part: str) -> bool:
        """Whether a slice has users to draw from: of a single one all draws are the same, and tell of no spread."""
        return self.counts[part][1] > 1

    def _key(self, scorer: str, metric: str, part: str) -> Key:
        if scorer not in self.scorers:
            raise unknown("scorer", scorer, self.scorers)
        if metric not in self.metrics:
            raise unknown("metric", metric, self.metrics)
        if part not in self.counts:
            raise unknown("slice", part, self.counts)
        return scorer, metric, part


def difference_lines(table: Table) -> list[str]:
    """How far the fusion is ahead of every other scorer, on the same rows."""
    metric, found = differences(table)
    if not found:
        return []
    lines = [f"fusion less … in {metric} (95 % interval, paired bootstrap over users)"]
    return lines + [f"  {name:20} {value}  {low} … {high}" for name, (value, low, high) in found.items()]


def differences(table: Table) -> tuple[str, dict[str, tuple[str, str, str]]]:
    """The metric, and by scorer how far the fusion is ahead in it: the difference and the ends of its interval."""
    metric = next((name for name in ("NDCG@10", "AUC") if name in table.metrics), table.metrics[0])
    found: dict[str, tuple[str, str, str]] = {}
    for name in table.scorers if "fusion" in table.scorers else ():
        if name != "fusion":
            figures = table.difference("fusion", name, metric)
            value, low, high = ("–" if math.isnan(each) else f"{each:+.4f}" for each in figures)
            found[name] = value, low, high
    return metric, found


def cold_lines(split: str, table: Table) -> list[str]:
    """How to read a table whose rows ask for cold items alone: who speaks of nothing else puts them first."""
    alone = [f"'{name}'" for name in ("neighbours", "expected_popularity") if name in table.scorers]
    if split != "cold-items" or not alone:
        return []
    return [
        f"Every row asks for a cold item, among all items. Known ones have no score by {' and '.join(alone)}, which "
        "puts cold ones first; the fusion may pay little for that in the order of known items (fusion.new_cost), and "
        "recllm recommend --new-items keeps places for them."
    ]


def averaged(tables: Sequence[Table]) -> Table:
    """The mean of tables of the same rows, as of several seeds; their draws took the same users, so they average too.

    Slices that hold other rows from seed to seed (as those of items that were drawn to be cold) are left out.

    Raises:
        ValueError: they have not the same scorers, metrics or rows.
    """
    first = tables[0]
    counts = {part: own for part, own in first.counts.items() if all(table.counts.get(part) == own for table in tables)}
    for table in tables:
        if (table.scorers, table.metrics) != (first.scorers, first.metrics) or "all" not in counts:
            raise ValueError("only tables of the same scorers, metrics and rows can be averaged")
    keys = [key for key in first.values if key[2] in counts]
    values = {key: float(np.mean([table.values[key] for table in tables])) for key in keys}
    draws = {key: np.mean([table.draws[key] for table in tables], axis=0) for key in keys if key in first.draws}
    return Table(first.scorers, first.metrics, counts, values, draws)


def _ends(draws: NDArray[np.float64] | None) -> tuple[float, float]:
    if draws is None or np.isnan(draws).all():
        return float("nan"), float("nan")
    low, high = np.nanpercentile(draws, PERCENTILES)
    return float(low), float(high)


def _plain(value: object) -> object:
    return [None if np.isnan(number) else number for number in value] if isinstance(value, tuple) else value


def _cell(interval: Interval) -> str:
    value, low, high = interval
    return "–" if np.isnan(value) else f"{value:.4f}" + ("" if np.isnan(low) else f" {low:.3f}…{high:.3f}")


def resampled(users: int, resamples: int, seed: int) -> Iterator[NDArray[np.float64]]:
    """How often each user is drawn in each resample, float64[block, users] block by block; a pure function of seed."""
    rng = np.random.default_rng(seed)
    for start in range(0, resamples, DRAW_BLOCK):
        drawn = (rng.integers(users, size=users) for _ in range(min(DRAW_BLOCK, resamples - start)))
        yield np.stack([np.bincount(sample, minlength=users) for sample in drawn]).astype(np.float64)


def bootstrap_means(
    columns: Mapping[Key, tuple[NDArray[np.int64], NDArray[np.float64]]], users: int, resamples: int, seed: int
) -> dict[Key, NDArray[np.float64]]:
    """Draw the mean of every column: users are drawn with replacement, with all their rows (Efron 1979).

    Args:
        columns: by key, the user of every row, int64[rows], and its figure, float64[rows].
        users: number of users over all columns.
        resamples: number of draws.
        seed: the same seed draws the same users, so that columns are paired.

    Returns:
        float64[resamples] by key; NaN where no row of a column was drawn.
    """
    sums = np.stack([np.bincount(owner, weights=figures, minlength=users) for owner, figures in columns.values()], 1)
    counts = np.stack([np.bincount(owner, minlength=users) for owner, _ in columns.values()], 1).astype(np.float64)
    with np.errstate(invalid="ignore"):  # 0 / 0 where a small slice is missing from a resample
        means = np.concatenate([(block @ sums) / (block @ counts) for block in resampled(users, resamples, seed)])
    return dict(zip(columns, means.T, strict=True))

"""What the like of an item tell of it: kernel ridge regression on shared columns, words and text."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from recllm.data import Catalog
from recllm.neighbours import TEXT_SHARE, SharedFeatures
from recllm.priors import read_arrays, write_arrays

LIKENESS = "likeness"
"""The name of a run's file of it; no bundle has it."""
TOLD = ("rows", "weights", "middle")
"""`Dual`'s own, as they are saved."""
TOLD_OF = ("text", "factors", "own")
"""What is told of a new item for a sequence model, which makes the item's head of it; `own` is what the model has
learnt of each item: a vector, if it learns such, and in the last column the bias."""
MOST_FITTED = 5_000
"""Items that are learnt from; of a larger catalogue so many are drawn: the cost grows with their cube."""
RIDGES = (0.1, 0.3, 1.0, 3.0, 10.0)
"""Penalties that are tried."""
BY_CHANCE = 3.0
"""The noise of an item of n events is 1 + 3 / (1 + n) times the penalty: what is learnt of it is by chance the more the
fewer they are (the logarithm of a count has a variance of about 1 / n)."""


@dataclass(frozen=True, eq=False)
class Dual:
    """What tells the values of further items by their likeness to those that were learnt from.

    Attributes:
        rows: which items were learnt from, int64[fitted].
        weights: float32[fitted, width].
        middle: the mean of what was learnt, float32[width].
    """

    rows: NDArray[np.int64]
    weights: NDArray[np.float32]
    middle: NDArray[np.float32]

    def of(self, alike: NDArray[np.float64]) -> NDArray[np.float32]:
        """The values by likeness, float64[items, fitted], to float32[items, width]; NaN for what is like nothing."""
        found = (self.middle + alike @ self.weights).astype(np.float32)
        found[~alike.any(axis=1)] = np.nan
        return found


@dataclass(frozen=True, eq=False)
class ToldVectors:
    """What tells the vectors by which a sequence model ranks the items that come later.

    Attributes:
        parts: what the model makes an item's head and bias of, by `TOLD_OF`.
        shrinkage: the heads are multiplied by it (`shrinkage`).
    """

    parts: Mapping[str, Dual]
    shrinkage: float

    @property
    def rows(self) -> NDArray[np.int64]:
        """Which items were learnt from, int64[fitted]."""
        return self.parts["own"].rows

    def of(
        self,
        alike: NDArray[np.float64],
        make_heads: Callable[[NDArray[np.float32], NDArray[np.float32]], NDArray[np.float32]],
    ) -> NDArray[np.float32]:
        """Heads and biases by likeness, float64[items, fitted].

        Args:
            alike: likeness to the items that were learnt from.
            make_heads: the model's own, of text vectors float32[items, width] and factors float32[items, factors].

        Returns:
            float32[items, head + 1]; NaN for what is like nothing.
        """
        told = {part: dual.of(alike) for part, dual in self.parts.items()}
        factors, bias = np.concatenate([told["factors"], told["own"][:, :-1]], axis=1), told["own"][:, -1:]
        items = np.concatenate([self.shrinkage * make_heads(told["text"], factors), bias], axis=1)
        return np.where(np.isnan(bias), np.float32(np.nan), items).astype(np.float32)

    def arrays(self, name: str) -> dict[str, NDArray[Any]]:
        """What a bundle keeps of it; all of its models have the same text vectors and factors."""
        found: dict[str, NDArray[Any]] = {f"{name}.told.shrinkage": np.array(self.shrinkage, dtype=np.float32)}
        for part, dual in self.parts.items():
            found |= {f"{_place(name, part)}.{key}": getattr(dual, key) for key in TOLD}
        return found

    @classmethod
    def read(cls, arrays: Mapping[str, NDArray[Any]], name: str) -> Self | None:
        """What a bundle kept; None for one from before, and where neighbours tell."""
        if f"{name}.told.rows" not in arrays:
            return None
        parts = {part: Dual(*(arrays[f"{_place(name, part)}.{key}"] for key in TOLD)) for part in TOLD_OF}
        shrinkage = arrays.get(f"{name}.told.shrinkage")
        return cls(parts, 1.0 if shrinkage is None else shrinkage.item())  # there was none at first


def _place(name: str, part: str) -> str:
    return f"{name}.told" if part == "own" else f"told.{part}"


def shrinkage(own: NDArray[np.float32], told: NDArray[np.float32]) -> float:
    """By what told vectors are multiplied to be as large as they are right: the slope of `own` over them.

    A model makes heads of length 1, told ones as well, so that what is hardly known of an item would count like what is
    known of others: without it a quarter of ml-1m's first ten are films that few have seen (LOG.md). Times the slope
    (least squares through the origin), a dot product with a told head is what one with the own head is expected to be.

    Args:
        own: float32[items, width], heads of items that are known; NaN rows for those that have none.
        told: what the others tell of them, float32[items, width]; NaN rows for nothing.

    Returns:
        Between 0 and 1; 1 where nothing is told.
    """
    there = ~np.isnan(own + told).any(axis=1)
    right, size = (float((part[there] * told[there]).sum()) for part in (own, told))
    return min(max(right / size, 0.0), 1.0) if size > 0 else 1.0


def likeness_to(
    catalog: Catalog, text: NDArray[np.float32], fitted: NDArray[np.int64], rows: Sequence[int]
) -> NDArray[np.float64]:
    """Likeness of some items to those that were learnt from: the cosine by features, and a part of that by text.

    Args:
        catalog: columns and titles.
        text: float32[items, width], text vectors of length 1; a NaN row for none.
        fitted: which items were learnt from, int64[fitted].
        rows: the items that are compared with them.

    Returns:
        float64[rows, fitted]; 0 for what is not alike.
    """
    known = np.zeros(len(catalog), dtype=bool)
    known[fitted] = True
    shared, vectors = SharedFeatures(catalog.frame.iter_rows(named=True), known, own=True), np.nan_to_num(text)
    # Negative cosines stay: without them the matrix would not be positive definite.
    found = TEXT_SHARE * (vectors[list(rows)] @ vectors[fitted].T).astype(np.float64)
    for place, row in enumerate(rows):
        found[place] += shared.cosines(row)[fitted]
    return found


class LikenessRidge:
    """Values of items as those with events tell them by their likeness.

    Kernel ridge regression (Saunders et al. 1998, "Ridge Regression Learning Algorithm in Dual Variables") of anything
    that an item with events has: its popularity, its vector in a model (as Gantner et al. 2010 map attributes to
    factors). What an item with events would have is told by the others, in closed form: left out, item i is off by
    αᵢ / (K + λN)⁻¹ᵢᵢ, beside a mean of all that it has its part in, as all others have. That is linear in what is
    learnt, so that one matrix does for all of it.
    """

    def __init__(
        self,
        known: NDArray[np.bool_],
        rows: NDArray[np.int64],
        operator: NDArray[np.float32],
        share: NDArray[np.float64],
        scale: NDArray[np.float64],
        *,
        whole: bool = True,
        shrunk: bool = True,
    ) -> None:
        """Keep what was learnt.

        Args:
            known: bool[items], which have enough events to be told by nobody.
            rows: which items were learnt from, int64[fitted].
            operator: float32[items, fitted], values of what was learnt from, off their mean, to values of every item;
                NaN rows for items that are like no other.
            share: of each in their mean, float64[fitted], in all 1.
            scale: (K + λN)⁻¹ᵢᵢ, float64[fitted].
            whole: all items with events were learnt from; where only some were, those most like an item are often not
                among them, and the means of its neighbours say more of its vector (LOG.md).
            shrunk: whether told heads are multiplied by their `shrinkage`; not in runs whose scores were made without.
        """
        self.known, self.rows, self.operator, self.share, self.scale = known, rows, operator, share, scale
        self.whole, self.shrunk = whole, shrunk

    @classmethod
    def fit(
        cls,
        catalog: Catalog,
        text: NDArray[np.float32],
        counts: NDArray[np.int64],
        known: NDArray[np.bool_],
        *,
        seed: int = 0,
    ) -> Self:
        """Learn from all items with events, or from `MOST_FITTED` of them, drawn by `seed`.

        The penalty is the one by which the logarithm of items' events is told best with each of them left out.

        Args:
            catalog: columns and titles.
            text: float32[items, width], text vectors of length 1; a NaN row for none.
            counts: train events, int64[items].
            known: bool[items], which have enough events.
            seed: of the draw.
        """
        every = rows = np.flatnonzero(counts > 0)
        rows = np.sort(np.random.default_rng(seed).permutation(rows)[:MOST_FITTED])
        kernel = likeness_to(catalog, text, rows, range(len(catalog)))
        inner, noise = kernel[rows], 1.0 + BY_CHANCE / (1.0 + counts[rows])
        wanted, share = np.log1p(counts[rows].astype(np.float64)), (1.0 / noise) / (1.0 / noise).sum()
        off = wanted - share @ wanted
        least, best = np.inf, np.zeros_like(inner)
        for ridge in RIDGES:
            inverse = np.asarray(np.linalg.inv(inner + np.diag(ridge * noise)), dtype=np.float64)
            error = float(share @ (inverse @ off / inverse.diagonal()) ** 2)
            if error < least:
                least, best = error, inverse
        scale = best.diagonal().copy()
        kernel[rows, np.arange(len(rows))] = 0.0  # of its own events nothing is known
        alone = ~kernel.any(axis=1)
        operator = kernel @ best
        operator[rows] = np.eye(len(rows)) - best / scale[:, None]
        operator[alone] = np.nan
        return cls(known, rows, operator.astype(np.float32), share, scale, whole=len(rows) == len(every))

    def means(self, values: NDArray[np.float32], rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """What the others tell of `rows` of the items by their own `values`, float32[items, width].

        Returns:
            float32[rows, width]; NaN for the row −1 and where nothing is alike.
        """
        off, middle = self._off(values)
        found = np.full((len(rows), values.shape[1]), np.nan, dtype=np.float32)
        asked = rows >= 0
        found[asked] = middle + self.operator[rows[asked]] @ off
        return found

    def dual(self, values: NDArray[np.float32]) -> Dual:
        """What tells the values of items that come later, by `values`, float32[items, width], of those of today."""
        off, middle = self._off(values)
        left_out = np.nan_to_num(self.operator[self.rows]) @ off  # what is like no other is told the mean
        return Dual(self.rows, ((off - left_out) * self.scale[:, None]).astype(np.float32), middle)

    def _off(self, values: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Values of what was learnt from, off their mean, float32[fitted, width]; and that mean, float32[width]."""
        own = values[self.rows]
        there = np.where(np.isnan(own), 0.0, self.share[:, None])
        middle = (there * np.nan_to_num(own)).sum(axis=0) / np.maximum(there.sum(axis=0), 1e-12)
        off = np.where(np.isnan(own), 0.0, own - middle)
        return off.astype(np.float32), middle.astype(np.float32)

    def save(self, folder: Path) -> None:
        """Write `likeness.safetensors` and `likeness.json`."""
        arrays = {key: getattr(self, key) for key in ("known", "rows", "operator", "share", "scale")}
        write_arrays(folder, LIKENESS, arrays, {"whole": self.whole, "shrunk": self.shrunk})

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `save` wrote."""
        arrays, facts = read_arrays(folder, LIKENESS)
        own = (arrays[key] for key in ("known", "rows", "operator", "share", "scale"))
        return cls(*own, whole=facts["whole"], shrunk=facts.get("shrunk", False))

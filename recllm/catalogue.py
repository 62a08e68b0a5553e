"""The item side of the catalogue graph, prepared once: centred on its mean, zero where unknown, new items apart.

A standard score over the catalogue needs the mean and the deviation of a scorer's products with all items. The mean of
products is the product with the mean, so centred items give centred scores; the deviation is the length of the query
in the items' own spread. So nothing is left to do per user and item but one product, whatever the number of scorers.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from recllm.fitting import moments
from recllm.fusion import PLACING, Fusion, popularity_says

WIDE, WIDEST, ITEMS_TO_A_NUMBER = 1024, 2048, 4
"""From the first width on a deviation is taken from the scores, for the root of the spread would be as large as the
items; up to the second one not where there are that many items to each of its numbers. (Wider ones take minutes.)"""
ROWS_AT_ONCE = 65_536
KNOWN_BARRED = "known_barred"
"""An input of the graph that may be left out, float32[1]: 1 ranks new items only, 0 all."""
Vectors = NDArray[np.float32]


ROOT = "_root"
"""Behind a scorer's name: the graph's input of its items' root."""


def rooted(fusion: Fusion, widths: Mapping[str, int], items: int) -> tuple[str, ...]:
    """The scorers whose deviation is known before their scores, from the root of their items' spread.

    So a new graph has them; what an older one has, and one whose catalogue has grown, its inputs say.
    """
    most = max(WIDE - 1, min(WIDEST, items // ITEMS_TO_A_NUMBER))
    return tuple(name for name in fusion.names if fusion.standardise == "query" and widths[name] <= most)


def folded(fusion: Fusion, roots: tuple[str, ...]) -> tuple[str, ...]:
    """Those of them that go into one product: where weights are the same for all items with events."""
    return () if fusion.theta[:, 2].any() or any(fusion.levels) else roots


@dataclass(frozen=True, eq=False)
class Prepared:
    """What the catalogue graph is given of the items, and where they stand in it.

    Attributes:
        feeds: the graph's inputs that are the same for all users.
        order: int64[places], the item at each place of the graph; −1 for a place without one.
        places: int64[items], the place of each item.
        roots: the scorers whose deviation is known before their scores.
    """

    feeds: dict[str, NDArray[np.generic]]
    order: NDArray[np.int64]
    places: NDArray[np.int64]
    roots: tuple[str, ...]


def prepare(
    fusion: Fusion, vectors: Mapping[str, Vectors], n_item: NDArray[np.int64], inputs: Collection[str] | None = None
) -> Prepared:
    """Prepare the item side.

    Args:
        fusion: of rankings.
        vectors: per scorer float32[items, width], NaN rows for unknown items.
        n_item: events of each item, int64[items].
        inputs: names of the graph's; as a new one for so many items has them where not given.
    """
    apart = fusion.new is not None
    new = n_item < fusion.few if apart else np.zeros(len(n_item), dtype=bool)
    sides = {"items": np.flatnonzero(~new)} | ({"new_items": np.flatnonzero(new)} if apart else {})
    # A graph cannot pick from nothing: an empty side has one place, whose item nobody knows.
    sides = {side: rows if len(rows) else np.array([-1]) for side, rows in sides.items()}
    known = np.stack([~np.isnan(own[:, 0]) for own in vectors.values()])
    bits = np.arange(len(known))[:, None]
    # Which scorers know an item, as one number; the last one stands for row −1, which nobody knows.
    codes, pattern = np.unique(np.append((known << bits).sum(axis=0), 0), return_inverse=True)
    widths = {name: own.shape[1] for name, own in vectors.items()}
    before = rooted(fusion, widths, len(n_item))
    if inputs is not None:
        before = tuple(name for name in fusion.names if name + ROOT in inputs)
    inside = folded(fusion, before)
    feeds: dict[str, NDArray[np.generic]] = {
        "patterns": ((codes >> bits) & 1).astype(np.float32),
        "known": np.maximum(known.sum(axis=1), 1).astype(np.float32),
        "n_item": np.append(n_item, 0)[sides["items"]].astype(np.int64),
    }
    blocks: dict[str, list[Vectors]] = {side: [] for side in sides}
    for place, (name, own) in enumerate(vectors.items()):
        scale = fusion.scales.get(name) if name in before else None
        mean, centred = _centred(own, None if scale is None else scale[0])
        feeds[f"{name}_mean"] = mean[:, None].astype(np.float32)
        if scale is not None:  # the root of so many squares in all
            feeds[name + ROOT] = np.array([[scale[1] * np.sqrt(feeds["known"][place])]], dtype=np.float32)
        elif name in before:
            feeds[name + ROOT] = _root(centred)
        for side, rows in sides.items():
            part = _columns(centred, rows)
            if side == "new_items" and name == PLACING:
                part = _placed(fusion, own, part, rows)
            if name in inside:
                blocks[side].append(part)
            else:
                feeds[f"{name}_{side}"] = part
    for side, rows in sides.items():
        one_hot = np.zeros((len(codes), len(rows)), dtype=np.float32)
        one_hot[pattern[rows], np.arange(len(rows))] = 1.0
        feeds[side] = np.concatenate([*blocks[side], one_hot])
    order = np.concatenate(list(sides.values()))
    places = np.zeros(len(n_item), dtype=np.int64)
    places[order[order >= 0]] = np.flatnonzero(order >= 0)
    return Prepared(feeds, order, places, before)


def _placed(fusion: Fusion, popularity: Vectors, part: Vectors, rows: NDArray[np.int64]) -> Vectors:
    """New items' centred popularity, float32[1, rows], as `Fusion.placed` has its z."""
    mean, deviation = moments(popularity[:, 0][None])
    if fusion.standardise != "query" or fusion.unseen is None or not popularity_says(mean, deviation).item():
        return part
    known = (rows >= 0) & ~np.isnan(popularity[rows, 0])
    return np.where(known, np.float32(fusion.unseen * deviation.item()), np.float32(0.0))[None]


def _centred(vectors: Vectors, given: float | None = None) -> tuple[NDArray[np.float64], Vectors]:
    """The mean of the known rows, or what is given, float64[width]; and the rows less it, zero where unknown."""
    known = ~np.isnan(vectors[:, 0])
    mean = vectors[known].mean(axis=0, dtype=np.float64) if known.any() else np.zeros(vectors.shape[1])
    mean = mean if given is None else np.full(vectors.shape[1], given)
    return mean, np.where(known[:, None], vectors - mean, 0.0).astype(np.float32)


def _root(centred: Vectors) -> Vectors:
    """R, float32[width, width]: the sum of squares of `centred` times a query is that of R times it.

    By way of the eigenvectors of the spread, and not the spread itself: a length keeps its digits where a product
    q C q, of large terms of both signs, does not.
    """
    spread = np.zeros((centred.shape[1],) * 2)
    for start in range(0, len(centred), ROWS_AT_ONCE):
        rows = centred[start : start + ROWS_AT_ONCE].astype(np.float64)
        spread += rows.T @ rows
    values, vectors = np.linalg.eigh(spread)
    root: Vectors = (vectors * np.sqrt(np.maximum(values, 0.0))).astype(np.float32)
    return root


def _columns(vectors: Vectors, rows: Sequence[int] | NDArray[np.int64]) -> Vectors:
    """float32[width, rows] of some rows, in one piece; zeros for row −1."""
    taken = np.where((np.asarray(rows) >= 0)[:, None], vectors[rows], np.float32(0.0))
    return np.ascontiguousarray(taken.T)

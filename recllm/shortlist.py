"""A shortlist of a large catalogue: a cheap search over all items, so that only some are scored in full.

What stands behind a fused score is one product of a query and an item, but for weights that go by an item's events.
That product is searched in whole numbers (a quarter of the memory, and several times as fast), or by an index that
looks at a part of the items only. The exact graph then ranks what was found, so that an approximation can cost an item
its place in the shortlist, but never changes a score.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from recllm.catalogue import ITEMS_TO_A_NUMBER, ROOT, WIDE, WIDEST, Prepared, Vectors
from recllm.errors import RecllmError, require, unknown
from recllm.fitting import FLAT
from recllm.fusion import Counts, Fusion
from recllm.sessions import open_session

Places = NDArray[np.int64]

ITEMS_IN_GRAPH = 1 << 18
"""Items of one graph: a graph that holds its items is built in memory, and may not have two gigabytes."""
OPSET = 21
"""As the catalogue graph's."""
LISTED = 100
"""The least length of a shortlist."""
PER_LIST = 64
"""Items from which a list of the approximate index learns its centre."""
PROBED_FOR = 0.99
"""The share of the ten best that the approximate index should find: lists are added until it does."""
ITEM_STEPS, QUERY_STEPS = 63, 127
"""Steps of an item's and of a query's scale on either side of zero. Items have seven bits: without VNNI, processors add
two products of eight bits into sixteen, which overflows."""


class Search(Protocol):
    """Finds the items with the largest products."""

    def __call__(self, queries: Vectors, count: int, need: Counts | None = None) -> tuple[Places, Vectors]:
        """The `count` best of each query, float32[queries, width]: places, −1 for none, and products, best first.

        Of each query `need` are enough, int64[queries], where they are given: what one query needs must not change
        what another one finds.
        """
        ...


class Int8Search:
    """All items in seven bits and queries in eight, each by a scale of its own.

    Args:
        items: float32[items, width].
        threads: inside one operator; 0 leaves it to ONNX Runtime.
    """

    def __init__(self, items: Vectors, threads: int = 0) -> None:
        starts = range(0, len(items), ITEMS_IN_GRAPH)
        self._parts = [
            (start, open_session(int8_graph(items[start : start + ITEMS_IN_GRAPH]), threads=threads))
            for start in starts
        ]
        self._counts = [min(ITEMS_IN_GRAPH, len(items) - start) for start in starts]

    def __call__(self, queries: Vectors, count: int, need: Counts | None = None) -> tuple[Places, Vectors]:
        """As `Search`."""
        scale = np.maximum(np.abs(queries).max(axis=1, keepdims=True), np.finfo(np.float32).tiny) / QUERY_STEPS
        whole = (np.rint(queries / scale) + 128.0).astype(np.uint8)
        found = []
        for (start, session), own in zip(self._parts, self._counts, strict=True):
            given = {"queries": whole, "k": np.array([min(count, own)], dtype=np.int64)}
            products, places = session.run(None, given)
            found.append((places + start, products * scale))
        return merged(found, count)


def int8_graph(items: Vectors) -> bytes:
    """A graph from uint8[queries, width], 128 for zero, to the best items: their products and their places."""
    onnx = require("onnx", "index", "The int8 index")
    helper, kinds, array = onnx.helper, onnx.TensorProto, onnx.numpy_helper.from_array
    scale = np.maximum(np.abs(items).max(axis=1), np.finfo(np.float32).tiny) / np.float32(ITEM_STEPS)
    whole = np.ascontiguousarray(np.rint(items / scale[:, None]).astype(np.int8).T)
    kept = [array(whole, "items"), array(scale[None], "scale"), array(np.array(128, dtype=np.uint8), "zero")]
    nodes = [
        helper.make_node("MatMulInteger", ["queries", "items", "zero"], ["sums"]),
        helper.make_node("Cast", ["sums"], ["floats"], to=kinds.FLOAT),
        helper.make_node("Mul", ["floats", "scale"], ["products"]),
        helper.make_node("TopK", ["products", "k"], ["best", "places"], axis=1, largest=1, sorted=1),
    ]
    inputs = [
        helper.make_tensor_value_info("queries", kinds.UINT8, ["queries", items.shape[1]]),
        helper.make_tensor_value_info("k", kinds.INT64, [1]),
    ]
    outputs = [
        helper.make_tensor_value_info("best", kinds.FLOAT, ["queries", "top"]),
        helper.make_tensor_value_info("places", kinds.INT64, ["queries", "top"]),
    ]
    graph = helper.make_graph(nodes, "int8", inputs, outputs, kept)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    result: bytes = model.SerializeToString()
    return result


class FaissSearch:
    """A part of the items: those in the lists whose centres are nearest, each item in 8 bits (IVF, Jégou et al. 2011).

    Args:
        items: float32[items, width].
        samples: float32[queries, width], on which the number of lists that are looked into is chosen.
        threads: of the search; 0 leaves it to faiss.
    """

    def __init__(self, items: Vectors, samples: Vectors, threads: int = 0) -> None:
        self._faiss, self._threads = require("faiss", "index", "The faiss index"), threads
        self._lists = max(1, min(int(4 * np.sqrt(len(items))), len(items) // PER_LIST))
        inner = self._faiss.METRIC_INNER_PRODUCT
        self._index = self._faiss.index_factory(items.shape[1], f"IVF{self._lists},SQ8", inner)
        drawn = np.random.default_rng(0).permutation(len(items))[: PER_LIST * self._lists]
        with self._own_threads():
            self._index.train(items[np.sort(drawn)])
            self._index.add(items)
        best, self.probes = _exact(items, samples, 10), 1
        """Lists that are looked into."""
        while self.probes < self._lists and recall(best, self(samples, LISTED)[0]) < PROBED_FOR:
            self.probes = min(2 * self.probes, self._lists)

    def __call__(self, queries: Vectors, count: int, need: Counts | None = None) -> tuple[Places, Vectors]:
        """As `Search`; a query whose lists hold fewer items than it needs looks into more of them."""
        places, products = self._found(queries, count, self.probes)
        probes, need = self.probes, np.full(len(queries), count) if need is None else need
        while probes < self._lists and len(short := np.flatnonzero((places >= 0).sum(axis=1) < need)):
            probes = min(2 * probes, self._lists)
            places[short], products[short] = self._found(queries[short], count, probes)
        return places, products

    def _found(self, queries: Vectors, count: int, probes: int) -> tuple[Places, Vectors]:
        given = np.ascontiguousarray(queries, dtype=np.float32)
        with self._own_threads():
            found = self._index.search(given, count, params=self._faiss.SearchParametersIVF(nprobe=probes))
        return found[1].astype(np.int64), found[0]

    @contextmanager
    def _own_threads(self) -> Iterator[None]:
        """As many threads as were asked for; faiss knows one number for the whole process."""
        before = self._faiss.omp_get_max_threads()
        if self._threads:
            self._faiss.omp_set_num_threads(self._threads)
        try:
            yield
        finally:
            self._faiss.omp_set_num_threads(before)


def _exact(items: Vectors, queries: Vectors, count: int) -> Places:
    """The places of the `count` largest products, int64[queries, count]."""
    found = []
    for start in range(0, len(items), ITEMS_IN_GRAPH):
        products = queries @ items[start : start + ITEMS_IN_GRAPH].T
        order = np.argsort(-products, axis=1, kind="stable")[:, :count]
        found.append((order + start, np.take_along_axis(products, order, 1)))
    return merged(found, count)[0]


def recall(best: Places, found: Places) -> float:
    """The share of `best` that is in `found`, a row each; −1 in either is none."""
    hits = [np.isin(row[row >= 0], other) for row, other in zip(best, found, strict=True)]
    every = np.concatenate(hits)
    return float(every.mean()) if len(every) else 1.0


def merged(found: Sequence[tuple[Places, Vectors]], count: int) -> tuple[Places, Vectors]:
    """The `count` best of several searches' places and products, [queries, …] each."""
    places, products = (np.concatenate([own[part] for own in found], axis=1) for part in (0, 1))
    order = np.argsort(-products, axis=1, kind="stable")[:, :count]
    return np.take_along_axis(places, order, 1), np.take_along_axis(products, order, 1)


class Shortlist:
    """The item side of the catalogue graph behind a search: the graph is given only what was found.

    Args:
        fusion: of rankings.
        prepared: the item side.
        n_item: events of the item at each place, int64[places].
        kind: one of `KINDS`.
        samples: queries by scorer as `find` takes them, on which an approximate search is set.
        threads: of the search.

    Raises:
        RecllmError: a fusion that is no sum of products, or the package is missing.
    """

    def __init__(
        self,
        fusion: Fusion,
        prepared: Prepared,
        n_item: Counts,
        *,
        kind: str,
        samples: Mapping[str, Vectors],
        threads: int = 0,
    ) -> None:
        widths = {name: prepared.feeds[f"{name}_mean"].shape[0] for name in fusion.names}
        if prepared.roots != fusion.names:
            wide = [name for name in fusion.names if name not in prepared.roots]
            raise RecllmError(
                f"An index searches a sum of products, and {', '.join(map(repr, wide))} of this bundle cannot be one: "
                f"vectors of more than {WIDEST:,} numbers, of {WIDE:,} and more with fewer than {ITEMS_TO_A_NUMBER} "
                "items to each (item-item matrices), or a fusion by ranks. Leave the index out, or train with a "
                "narrower model.item_encoder and fusion.kinds that add scores. (A bundle that an older recllm wrote "
                f"has it for fewer than {WIDE:,} numbers: export it again.)"
            )
        self.fusion, self._widths, self._before = fusion, widths, prepared.roots
        sides = ("items", "new_items") if fusion.new is not None else ("items",)
        first = len(prepared.feeds["n_item"])
        self._bounds = dict(zip(sides, ((0, first), (first, len(prepared.order))), strict=False))
        own = {name for name in prepared.feeds if name.endswith(sides) and not name.startswith("n_")}
        # A row for each place, so that those that were found are read in one piece each.
        self._rows = {name: np.ascontiguousarray(prepared.feeds[name].T) for name in own}
        self._others = {name: feed for name, feed in prepared.feeds.items() if name not in own and name != "n_item"}
        self._n_item = prepared.feeds["n_item"]
        means, roots = ([self._others[name + part] for name in fusion.names] for part in ("_mean", ROOT))
        self._means, self._roots = ([np.asarray(own, dtype=np.float64) for own in part] for part in (means, roots))
        self._scales = {name: self._scale(name) for name in fusion.names}
        given = self._queries(samples, np.full(len(next(iter(samples.values()))), 1))
        self._searches = {side: KINDS[kind](self._items(side, n_item), given[side], threads) for side in sides}

    def find(self, queries: Mapping[str, Vectors], n_user: Counts, counts: Counts) -> Places:
        """The best places of each user by the search, int64[users, the most]; −1 behind the last.

        Args:
            queries: per scorer float32[users, width], NaN rows for unknown.
            n_user: length of each one's known history, int64[users].
            counts: how many places of each user, int64[users].
        """
        given = self._queries(queries, n_user)
        found, most = [], int(counts.max())
        for side, (start, stop) in self._bounds.items():
            size = stop - start
            places, products = self._searches[side](given[side], min(most, size), np.minimum(counts, size))
            found.append((np.where(places < 0, -1, places + start), products))
        places = merged(found, most)[0]
        return np.where(np.arange(places.shape[1]) < counts[:, None], places, -1)

    def together(self, places: Places) -> Places:
        """Those places once each, ascending, with at least one of every side: the graph wants something of each."""
        firsts = [start for start, _ in self._bounds.values()]
        return np.unique(np.concatenate([places[places >= 0], firsts]))

    def feeds(self, places: Places) -> dict[str, NDArray[np.generic]]:
        """The graph's item side with only these `places`, ascending."""
        result = dict(self._others)
        for side, (start, stop) in self._bounds.items():
            own = places[(places >= start) & (places < stop)] - start
            for name, rows in self._rows.items():
                if name == side or (name.endswith(f"_{side}") and name.removesuffix(f"_{side}") in self._widths):
                    result[name] = np.ascontiguousarray(rows[own].T)
            if start == 0:
                result["n_item"] = self._n_item[own]
        return result

    def _block(self, name: str, side: str) -> Vectors:
        """A scorer's centred items on a side, float32[places, width]."""
        own = self._rows.get(f"{name}_{side}")
        if own is not None:
            return own
        start = 0
        for other in self._before:
            if other == name:
                break
            start += self._widths[other]
        return self._rows[side][:, start : start + self._widths[name]]

    def _scale(self, name: str) -> float:
        """Brings a scorer's queries to components of about 1, and its items to what they add: one scale suits all.

        By the known items, or by the new ones where it speaks of these alone; 0 where it speaks of none.
        """
        for side in self._bounds:
            known = self._block(name, side)
            parts = (known[start : start + ITEMS_IN_GRAPH] for start in range(0, len(known), ITEMS_IN_GRAPH))
            squares = sum(float(np.einsum("iw,iw->", part, part, dtype=np.float64)) for part in parts)
            if squares:
                return float(np.sqrt(squares / len(known)))
        return 0.0

    def _items(self, side: str, n_item: Counts) -> Vectors:
        """What is searched on a side, float32[places, all widths], weighted as for a usual user."""
        start, stop = self._bounds[side]
        weights = self.fusion.weights(self._usual_user, n_item[start:stop])
        blocks = [
            self._block(name, side) * (weights[name] / (self._scales[name] or 1.0)).astype(np.float32)[:, None]
            for name in self.fusion.names
        ]
        return np.concatenate(blocks, axis=1)

    def _queries(self, queries: Mapping[str, Vectors], n_user: Counts) -> dict[str, Vectors]:
        """What is searched with, by side, float32[users, all widths].

        Its products with a scorer's items are standard scores, times the user's weight as a share of a usual user's.
        """
        counts = {"items": self._usual_item, "new_items": 0}
        result = {}
        units = {name: self._unit(place, queries[name]) for place, name in enumerate(self.fusion.names)}
        for side in self._bounds:
            usual = self.fusion.weights(self._usual_user, counts[side])
            own = self.fusion.weights(np.asarray(n_user)[:, None], counts[side])
            with np.errstate(divide="ignore", invalid="ignore"):
                shares = {name: np.nan_to_num(own[name] / usual[name], posinf=1.0, neginf=1.0) for name in units}
            blocks = [(unit * (self._scales[name] * shares[name])).astype(np.float32) for name, unit in units.items()]
            result[side] = np.concatenate(blocks, axis=1)
        return result

    def _unit(self, place: int, queries: Vectors) -> NDArray[np.float64]:
        """Queries whose products with centred items are standard scores, as the graph makes them."""
        known = np.nan_to_num(queries).astype(np.float64)
        squares = ((known @ self._roots[place]) ** 2).sum(axis=1, keepdims=True)
        deviation = np.sqrt(squares / np.asarray(self._others["known"], dtype=np.float64)[place])
        varies = deviation > FLAT * np.abs(known @ self._means[place])
        result: NDArray[np.float64] = known * np.where(varies, 1.0 / np.where(varies, deviation, 1.0), 0.0)
        return result

    @property
    def _usual_user(self) -> int:
        return round(float(np.expm1(self.fusion.user.mean)))

    @property
    def _usual_item(self) -> int:
        return max(self.fusion.few, round(float(np.expm1(self.fusion.item.mean))))


def _int8(items: Vectors, _: Vectors, threads: int) -> Search:
    return Int8Search(items, threads)


KINDS: dict[str, Callable[[Vectors, Vectors, int], Search]] = {"int8": _int8, "faiss": FaissSearch}
"""Searches by the name that `load` takes."""
EXACT = "exact"
"""The whole catalogue is ranked, without a search before."""


def check_kind(kind: str) -> None:
    """Check the name of an index.

    Raises:
        RecllmError: there is no such one.
    """
    if kind not in (EXACT, *KINDS):
        raise unknown("index", kind, (EXACT, *KINDS))

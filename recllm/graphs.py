"""The whole-catalogue graph: dot products, fusion, seen items out and top-k in plain ONNX operators, one call."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from recllm.catalogue import KNOWN_BARRED, ROOT, folded, rooted
from recllm.fitting import BORDA_PLACES, FLAT, RANK_OFFSET, Evidence
from recllm.fusion import Fusion

OPSET = 21
"""Has all the operators below; the bundle's model graphs have an opset of their own."""
BARRED = -1e30
"""Score of an item that no scorer of the user knows: far below every real one, and a number, for 0 times it is 0."""
END = np.iinfo(np.int64).max
"""To the last one, in a slice."""


class Builder:
    """Collects nodes; every method adds one and gives the name of its result."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}

    def add(self, operator: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:  # noqa: ANN401
        """Add a node; the name of its output, or a tuple of names."""
        names = [f"{operator}_{len(self.nodes)}_{place}" for place in range(outputs)]
        self.nodes.append(helper.make_node(operator, list(inputs), names, **attributes))
        return names[0] if outputs == 1 else tuple(names)

    def constant(self, value: Any, kind: Any = np.float32) -> str:  # noqa: ANN401  anything numpy takes
        """A constant; equal ones are kept once."""
        array = np.asarray(value, dtype=kind)
        name = f"constant_{array.dtype}_{array.shape}_{array.tobytes().hex()}"
        self.constants.setdefault(name, numpy_helper.from_array(array, name))
        return name


def catalogue_graph(fusion: Fusion, widths: Mapping[str, int], items: int, path: Path) -> None:
    """Write the graph that scores, fuses and ranks a whole catalogue; the formula is `Fusion.fuse`'s.

    Inputs, per scorer s: `s_queries` float32[users, width], NaN rows for unknown; `n_user` int64[users], `seen`
    int64[users, seen] (places in the graph, −1 for none), `k` int64[1] and, where new items have weights of their own,
    `known_barred`; and the item side, which `prepare` makes. Outputs: `rows` int64[users, k], places in the graph (−1
    behind the last); `scores` float32[users, k]; and `shares` float32[users, scorers, k].

    Args:
        fusion: of rankings; its constants of labelled pairs say nothing of a catalogue.
        widths: vector width of each scorer, in the order of `fusion.names`.
        items: how many items the catalogue has; what is known before scores goes by it.
        path: where the graph is written.
    """
    assert fusion.standardise != "global"
    assert tuple(widths) == fusion.names
    build = Builder()
    sides = ("items", "new_items") if fusion.new is not None else ("items",)
    before_scores = rooted(fusion, widths, items)
    inside = folded(fusion, before_scores)
    user = _evidence(build, "n_user", fusion.user, axis=1)  # (users, 1)
    given = [_query(build, name) for name in fusion.names]
    has = build.add("Concat", *(build.add("Cast", known, to=TensorProto.FLOAT) for _, known in given), axis=1)
    # Items that no scorer of a user knows: a product of which user knows what with which item is known to whom.
    nobody = build.add("Less", build.add("MatMul", has, "patterns"), build.constant(0.5))
    barred = build.add("Where", nobody, build.constant(BARRED), build.constant(0.0))
    blocks: dict[str, list[str]] = {side: [] for side in sides}
    apart: dict[int, list[str]] = {}  # per scorer its shares, (users, places) of each side
    marks = _Marks(build, has, sum(widths[name] for name in inside))
    for place, name in enumerate(fusion.names):
        queries, _ = given[place]
        new = [] if fusion.new is None else [_weight(build, 1.0, np.append(fusion.new[place], 0.0), user, signed=True)]
        item = _evidence(build, "n_item", fusion.item, axis=0) if fusion.theta[place][2] else None  # (1, places)
        weights = [_weight(build, fusion.gates[place], fusion.theta[place], user, item, signed=fusion.signed), *new]
        if name in before_scores:
            reach = build.add("MatMul", queries, name + ROOT)
            squares = build.add("ReduceSumSquare", reach, build.constant([1], np.int64), keepdims=1)
            unit = build.add("Mul", queries, _inverse(build, place, name, queries, squares))
            if name in inside:
                for side, weight in zip(sides, weights, strict=True):
                    blocks[side].append(build.add("Mul", unit, weight))
                continue
            z = [build.add("MatMul", unit, f"{name}_{side}") for side in sides]
        else:
            scores = [build.add("MatMul", queries, f"{name}_{side}") for side in sides]
            z = _common_scale(build, fusion, marks, place, name, queries, scores)
        apart[place] = [build.add("Mul", weight, own) for weight, own in zip(weights, z, strict=True)]
        if before := [own for own, level in enumerate(fusion.levels) if level < fusion.levels[place]]:
            silenced = reduce(partial(build.add, "Or"), [marks.known(own, "items") for own in before])
            apart[place][0] = build.add("Where", silenced, build.constant(0.0), apart[place][0])
    bars = dict.fromkeys(sides, barred)
    if fusion.new is not None:
        bars["items"] = build.add("Add", barred, build.add("Mul", KNOWN_BARRED, build.constant(BARRED)))
    left = {side: build.add("Concat", *own, bars[side], axis=1) for side, own in blocks.items()}
    totals = [
        reduce(partial(build.add, "Add"), [own[at] for own in apart.values()], build.add("MatMul", left[side], side))
        for at, side in enumerate(sides)
    ]
    total = _without_seen(build, _joined(build, totals))
    best, rows = build.add("TopK", total, "k", outputs=2, axis=1, largest=1, sorted=1)
    gone = build.add("Less", best, build.constant(BARRED / 10))
    build.nodes.append(helper.make_node("Where", [gone, build.constant(-1, np.int64), rows], ["rows"]))
    build.nodes.append(helper.make_node("Where", [gone, build.constant(np.nan), best], ["scores"]))
    shares = _shares(build, {name: widths[name] for name in inside}, left, rows)
    for place, share in apart.items():
        picked = build.add("GatherElements", _joined(build, share), rows, axis=1)
        shares[fusion.names[place]] = build.add("Unsqueeze", picked, build.constant([1], np.int64))
    build.nodes.append(helper.make_node("Concat", [shares[name] for name in fusion.names], ["shares"], axis=1))
    _write(build, widths, before_scores, sides, fusion, path)


@dataclass(frozen=True)
class _Marks:
    """Which scorer knows which item for which user."""

    build: Builder
    has: str
    """float32[users, scorers]: 1 where a scorer has a query."""
    start: int
    """The row of the items' inputs at which their patterns begin."""

    def known(self, place: int, side: str) -> str:
        """bool[users, places] of a side."""
        build = self.build
        to_whom = _slice(build, "patterns", place, place + 1, axis=0)
        items = build.add("MatMul", to_whom, _slice(build, side, self.start, END, axis=0))
        users = _slice(build, self.has, place, place + 1, axis=1)
        return build.add("Greater", build.add("Mul", users, items), build.constant(0.5))


def _query(build: Builder, name: str) -> tuple[str, str]:
    """A scorer's queries with NaN taken out, and which are known, bool[users, 1]."""
    missing = build.add("IsNaN", f"{name}_queries")
    filled = build.add("Where", missing, build.constant(0.0), f"{name}_queries")
    return filled, build.add("Not", _slice(build, missing, 0, 1, axis=1))


def _inverse(build: Builder, place: int, name: str, queries: str, squares: str) -> str:
    """One over the deviation of a scorer's scores over the known items, (users, 1); 0 where they are constant.

    `squares` is the sum of squares of the centred scores.
    """
    known = build.add("Gather", "known", build.constant([place], np.int64), axis=0)
    deviation = build.add("Sqrt", build.add("Div", squares, known))
    mean = build.add("MatMul", queries, f"{name}_mean")
    varies = build.add("Greater", deviation, build.add("Mul", build.add("Abs", mean), build.constant(FLAT)))
    divisor = build.add("Where", varies, deviation, build.constant(1.0))
    return build.add("Where", varies, build.add("Reciprocal", divisor), build.constant(0.0))


def _common_scale(
    build: Builder, fusion: Fusion, marks: _Marks, place: int, name: str, queries: str, scores: list[str]
) -> list[str]:
    """Scores of each side as `Fusion.z` brings them to a common scale, (users, places)."""
    if fusion.standardise == "query":
        axis = build.constant([1], np.int64)
        squares = [build.add("ReduceSumSquare", own, axis, keepdims=1) for own in scores]
        inverse = _inverse(build, place, name, queries, reduce(partial(build.add, "Add"), squares))
        return [build.add("Mul", own, inverse) for own in scores]
    known = [marks.known(place, side) for side, _ in zip(("items", "new_items"), scores, strict=False)]
    places = _places(build, _joined(build, scores), _joined(build, known))
    if fusion.standardise == "reciprocal rank":
        points = build.add("Reciprocal", build.add("Add", places, build.constant(RANK_OFFSET)))
    else:
        behind = build.add("Div", build.add("Sub", places, build.constant(1.0)), build.constant(BORDA_PLACES))
        points = build.add("Relu", build.add("Sub", build.constant(1.0), behind))
    z = build.add("Where", _joined(build, known), points, build.constant(0.0))
    if len(scores) == 1:
        return [z]
    first = build.add("Shape", scores[0], start=1, end=2)
    end = build.constant([END], np.int64)
    axis = build.constant([1], np.int64)
    return [
        build.add("Slice", z, build.constant([0], np.int64), first, axis),
        build.add("Slice", z, first, end, axis),
    ]


def _joined(build: Builder, sides: Sequence[str]) -> str:
    """The places of all sides beside each other."""
    return build.add("Concat", *sides, axis=1) if len(sides) > 1 else sides[0]


def _slice(build: Builder, value: str, start: int, stop: int, *, axis: int) -> str:
    bounds = [build.constant([number], np.int64) for number in (start, stop, axis)]
    return build.add("Slice", value, *bounds)


def _without_seen(build: Builder, total: str) -> str:
    """−∞ at the `seen` places; −1 names the first place and leaves it as it is."""
    none = build.add("Less", "seen", build.constant(0, np.int64))
    lowest = build.add("Where", none, build.constant(np.inf), build.constant(-np.inf))
    at = build.add("Max", "seen", build.constant(0, np.int64))
    return build.add("ScatterElements", total, at, lowest, axis=1, reduction="min")


def _shares(build: Builder, widths: Mapping[str, int], left: Mapping[str, str], rows: str) -> dict[str, str]:
    """What each scorer in the one product gives the picked `rows`, float32[users, 1, k]."""
    terms, start = _products_at(build, left, rows), 0
    shares = {}
    for name, width in widths.items():
        own = _slice(build, terms, start, start + width, axis=1)
        shares[name] = build.add("ReduceSum", own, build.constant([1], np.int64), keepdims=1)
        start += width
    return shares


def _products_at(build: Builder, left: Mapping[str, str], rows: str) -> str:
    """The terms of the one product at the picked `rows`, float32[users, width, k]."""
    first = build.add("Squeeze", build.add("Shape", "items", start=1, end=2))
    one = build.constant(1, np.int64)
    last = build.add("Sub", first, one)
    terms = _terms(build, left["items"], "items", build.add("Min", rows, last))
    if "new_items" not in left:
        return terms
    behind = build.add("Max", build.add("Sub", rows, first), build.constant(0, np.int64))
    new = build.add("Unsqueeze", build.add("Greater", rows, last), build.constant([1], np.int64))
    return build.add("Where", new, _terms(build, left["new_items"], "new_items", behind), terms)


def _terms(build: Builder, left: str, side: str, rows: str) -> str:
    columns = build.add("Transpose", build.add("Gather", side, rows, axis=1), perm=[1, 0, 2])
    return build.add("Mul", columns, build.add("Unsqueeze", left, build.constant([2], np.int64)))


def _places(build: Builder, scores: str, known: str) -> str:
    """Place of each item in its row by score, from 1, unknown ones last; equal ones all have their mean place."""
    ranked = build.add("Where", known, scores, build.constant(-np.inf))
    # Of equal ones the earlier is first, and from the other end the later: the mean of both is the same for all.
    other = _turned(build, _strict_places(build, _turned(build, ranked)))
    return build.add("Mul", build.add("Add", _strict_places(build, ranked), other), build.constant(0.5))


def _turned(build: Builder, value: str) -> str:
    """Its columns from the last to the first."""
    bounds = [build.constant([number], np.int64) for number in (-1, -END, 1, -1)]
    return build.add("Slice", value, *bounds)


def _strict_places(build: Builder, ranked: str) -> str:
    """Place of each item in its row, from 1; of equal ones the earlier item first."""
    shape = build.add("Shape", ranked)
    _, items = build.add("Split", shape, outputs=2, axis=0, num_outputs=2)
    _, order = build.add("TopK", ranked, items, outputs=2, axis=1, largest=1, sorted=1)
    start, step = build.constant(1, np.int64), build.constant(1, np.int64)
    stop = build.add("Add", build.add("Squeeze", items), step)
    numbers = build.add("Expand", build.add("Range", start, stop, step), shape)
    return build.add("ScatterElements", ranked, order, build.add("Cast", numbers, to=TensorProto.FLOAT), axis=1)


def _evidence(build: Builder, counts: str, evidence: Evidence, *, axis: int) -> str:
    """(clip(log1p n, low, high) − mean) / deviation, with a new axis."""
    logs = build.add("Log", build.add("Add", build.add("Cast", counts, to=TensorProto.FLOAT), build.constant(1.0)))
    clipped = build.add("Clip", logs, build.constant(evidence.low), build.constant(evidence.high))
    centred = build.add("Sub", clipped, build.constant(evidence.mean))
    scaled = build.add("Div", centred, build.constant(evidence.deviation))
    return build.add("Unsqueeze", scaled, build.constant([axis], np.int64))


def _weight(
    build: Builder,
    gate: float,
    theta: NDArray[np.float64],
    user: str,
    item: str | None = None,
    *,
    signed: bool = False,
) -> str:
    """Gate · softplus(θ · [1, user, item]), or without the softplus: (users, 1), or (users, places) with an `item`."""
    bias, by_user, by_item = (build.constant(value) for value in theta)
    argument = build.add("Add", build.add("Mul", user, by_user), bias)
    if item is not None:
        argument = build.add("Add", argument, build.add("Mul", item, by_item))
    weight = argument if signed else build.add("Softplus", argument)
    return weight if gate == 1.0 else build.add("Mul", weight, build.constant(gate))


def _write(
    build: Builder,
    widths: Mapping[str, int],
    roots: tuple[str, ...],
    sides: Sequence[str],
    fusion: Fusion,
    path: Path,
) -> None:
    def value(name: str, shape: Sequence[str | int], kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, list(shape))

    inputs = [value(f"{name}_queries", ["users", width]) for name, width in widths.items()]
    inputs += [value(f"{name}_mean", [width, 1]) for name, width in widths.items()]
    inputs += [value(name + ROOT, [widths[name], widths[name]]) for name in roots]
    inside = folded(fusion, roots)
    inputs += [value(f"{n}_{side}", [widths[n], side]) for n in widths if n not in inside for side in sides]
    inputs += [value(side, [f"{side}_rows", side]) for side in sides]
    inputs += [value("patterns", [len(widths), "patterns"]), value("known", [len(widths)])]
    inputs += [value("n_user", ["users"], TensorProto.INT64), value("n_item", ["items"], TensorProto.INT64)]
    constants = list(build.constants.values())
    if fusion.new is not None:  # an input with a value: who leaves it out ranks all items
        inputs.append(value(KNOWN_BARRED, [1]))
        constants.append(numpy_helper.from_array(np.zeros(1, dtype=np.float32), KNOWN_BARRED))
    inputs += [value("seen", ["users", "seen"], TensorProto.INT64), value("k", [1], TensorProto.INT64)]
    outputs = [
        value("rows", ["users", "top"], TensorProto.INT64),
        value("scores", ["users", "top"]),
        value("shares", ["users", len(widths), "top"]),
    ]
    graph = helper.make_graph(build.nodes, "catalogue", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)

"""The whole-catalogue graph: dot products, fusion, seen items out and top-k in plain ONNX operators, one call."""

from collections.abc import Mapping, Sequence
from functools import partial, reduce
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from recllm.fitting import BORDA_PLACES, FLAT, RANK_OFFSET, Evidence
from recllm.fusion import Fusion

OPSET = 21
"""Has all the operators below; the bundle's model graphs have an opset of their own."""


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


def catalogue_graph(fusion: Fusion, widths: Mapping[str, int], path: Path) -> None:
    """Write the graph that scores, fuses and ranks a whole catalogue; the formula is `Fusion.fuse`'s.

    Inputs, per scorer s: `s_queries` float32[users, width], `s_items` float32[items, width], NaN rows for unknown; and
    `n_user` int64[users], `n_item` int64[items], `seen` int64[users, seen] (item rows, −1 for none), `k` int64[1].
    Outputs: `rows` int64[users, k] (−1 behind the last), `scores` float32[users, k], and
    `shares` float32[users, scorers, k].

    Args:
        fusion: of rankings; its constants of labelled pairs say nothing of a catalogue.
        widths: vector width of each scorer, in the order of `fusion.names`.
        path: where the graph is written.
    """
    assert fusion.standardise != "global"
    assert tuple(widths) == fusion.names
    build = Builder()
    user = _evidence(build, "n_user", fusion.user, axis=1)  # (users, 1)
    item = _evidence(build, "n_item", fusion.item, axis=0)  # (1, items)
    cold = build.add(
        "Unsqueeze", build.add("Less", "n_item", build.constant(fusion.few, np.int64)), build.constant([0], np.int64)
    )
    products = [_scores(build, name) for name in fusion.names]
    known = [has for _, has in products]
    shares = []
    for place, (scores, has) in enumerate(products):
        z = _common_scale(build, fusion, scores, has)
        weight = _weight(build, fusion.gates[place], fusion.theta[place], user, item, signed=fusion.signed)
        share = build.add("Mul", weight, z)
        before = [known[own] for own, level in enumerate(fusion.levels) if level < fusion.levels[place]]
        if before:
            share = build.add("Where", reduce(partial(build.add, "Or"), before), build.constant(0.0), share)
        if fusion.new is not None:
            weight = _weight(build, 1.0, np.append(fusion.new[place], 0.0), user, item, signed=True)
            own = build.add("Mul", weight, z)
            share = build.add("Where", cold, own, share)  # items without events have weights of their own
        shares.append(share)
    total, any_known = shares[0], known[0]
    for share, has in zip(shares[1:], known[1:], strict=True):
        total, any_known = build.add("Add", total, share), build.add("Or", any_known, has)
    free = build.add("And", any_known, build.add("Not", _seen(build, total)))
    ranked = build.add("Where", free, total, build.constant(-np.inf))
    best, rows = build.add("TopK", ranked, "k", outputs=2, axis=1, largest=1, sorted=1)
    gone = build.add("IsInf", best)
    build.nodes.append(helper.make_node("Where", [gone, build.constant(-1, np.int64), rows], ["rows"]))
    build.nodes.append(helper.make_node("Where", [gone, build.constant(np.nan), best], ["scores"]))
    axis = build.constant([1], np.int64)
    picked = [build.add("Unsqueeze", build.add("GatherElements", share, rows, axis=1), axis) for share in shares]
    build.nodes.append(helper.make_node("Concat", picked, ["shares"], axis=1))
    _write(build, widths, path)


def _scores(build: Builder, name: str) -> tuple[str, str]:
    """A scorer's product with NaN taken out, and where it is known, both (users, items)."""
    lacking, filled = {}, {}
    for side in ("queries", "items"):
        missing = build.add("IsNaN", f"{name}_{side}")
        filled[side] = build.add("Where", missing, build.constant(0.0), f"{name}_{side}")
        first = build.add("Slice", missing, *(build.constant([value], np.int64) for value in (0, 1, 1)))
        lacking[side] = first  # (users, 1) and (items, 1)
    scores = build.add("MatMul", filled["queries"], build.add("Transpose", filled["items"], perm=[1, 0]))
    unknown = build.add("Or", lacking["queries"], build.add("Transpose", lacking["items"], perm=[1, 0]))
    return scores, build.add("Not", unknown)


def _common_scale(build: Builder, fusion: Fusion, scores: str, known: str) -> str:
    """Scores as `Fusion.z` brings them to a common scale, (users, items)."""
    if fusion.standardise == "query":
        return _standardised(build, scores, known)
    places = _places(build, scores, known)
    if fusion.standardise == "reciprocal rank":
        points = build.add("Reciprocal", build.add("Add", places, build.constant(RANK_OFFSET)))
    else:
        behind = build.add("Div", build.add("Sub", places, build.constant(1.0)), build.constant(BORDA_PLACES))
        points = build.add("Relu", build.add("Sub", build.constant(1.0), behind))
    return build.add("Where", known, points, build.constant(0.0))


def _places(build: Builder, scores: str, known: str) -> str:
    """Place of each item in its row by score, from 1; of equal ones the earlier item first, unknown ones last."""
    ranked = build.add("Where", known, scores, build.constant(-np.inf))
    shape = build.add("Shape", ranked)
    _, items = build.add("Split", shape, outputs=2, axis=0, num_outputs=2)
    _, order = build.add("TopK", ranked, items, outputs=2, axis=1, largest=1, sorted=1)
    start, step = build.constant(1, np.int64), build.constant(1, np.int64)
    stop = build.add("Add", build.add("Squeeze", items), step)
    numbers = build.add("Expand", build.add("Range", start, stop, step), shape)
    return build.add("ScatterElements", ranked, order, build.add("Cast", numbers, to=TensorProto.FLOAT), axis=1)


def _standardised(build: Builder, scores: str, known: str) -> str:
    """(score − mean) / deviation over the known scores of a row; 0 where unknown or constant."""
    zero, axis = build.constant(0.0), build.constant([1], np.int64)
    ones = build.add("Cast", known, to=TensorProto.FLOAT)
    count = build.add("Max", build.add("ReduceSum", ones, axis, keepdims=1), build.constant(1.0))
    filled = build.add("Where", known, scores, zero)
    mean = build.add("Div", build.add("ReduceSum", filled, axis, keepdims=1), count)
    centred = build.add("Where", known, build.add("Sub", filled, mean), zero)
    square = build.add("ReduceSum", build.add("Mul", centred, centred), axis, keepdims=1)
    deviation = build.add("Sqrt", build.add("Div", square, count))
    floor = build.add("Mul", build.add("Abs", mean), build.constant(FLAT))
    varies = build.add("Greater", deviation, floor)
    divisor = build.add("Where", varies, deviation, build.constant(1.0))
    return build.add("Where", varies, build.add("Div", centred, divisor), zero)


def _evidence(build: Builder, counts: str, evidence: Evidence, *, axis: int) -> str:
    """(clip(log1p n, low, high) − mean) / deviation, with a new axis."""
    logs = build.add("Log", build.add("Add", build.add("Cast", counts, to=TensorProto.FLOAT), build.constant(1.0)))
    clipped = build.add("Clip", logs, build.constant(evidence.low), build.constant(evidence.high))
    centred = build.add("Sub", clipped, build.constant(evidence.mean))
    scaled = build.add("Div", centred, build.constant(evidence.deviation))
    return build.add("Unsqueeze", scaled, build.constant([axis], np.int64))


def _weight(
    build: Builder, gate: float, theta: NDArray[np.float64], user: str, item: str, *, signed: bool = False
) -> str:
    """Gate · softplus(θ · [1, user, item]), or without the softplus, broadcastable to (users, items)."""
    bias, by_user, by_item = (build.constant(value) for value in theta)
    sides = build.add("Add", build.add("Mul", user, by_user), build.add("Mul", item, by_item))
    argument = build.add("Add", sides, bias)
    weight = argument if signed else build.add("Softplus", argument)
    return build.add("Mul", weight, build.constant(gate))


def _seen(build: Builder, like: str) -> str:
    """bool[users, items] of the `seen` rows; −1 falls into one more column that is cut off."""
    shape = build.add("Shape", like)
    users, items = build.add("Split", shape, outputs=2, axis=0, num_outputs=2)
    wide = build.add("Concat", users, build.add("Add", items, build.constant([1], np.int64)), axis=0)
    empty = build.add("ConstantOfShape", wide, value=helper.make_tensor("zero", TensorProto.FLOAT, [1], [0.0]))
    column = build.add("Where", build.add("Less", "seen", build.constant(0, np.int64)), items, "seen")
    ones = build.add(
        "ConstantOfShape", build.add("Shape", "seen"), value=helper.make_tensor("one", TensorProto.FLOAT, [1], [1.0])
    )
    marked = build.add("ScatterElements", empty, column, ones, axis=1)
    bounds = [build.constant([0], np.int64), items, build.constant([1], np.int64)]
    return build.add("Greater", build.add("Slice", marked, *bounds), build.constant(0.5))


def _write(build: Builder, widths: Mapping[str, int], path: Path) -> None:
    def value(name: str, kind: int, shape: Sequence[str | int]) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, list(shape))

    inputs = [
        value(f"{name}_{side}", TensorProto.FLOAT, [rows, width])
        for name, width in widths.items()
        for side, rows in (("queries", "users"), ("items", "items"))
    ]
    inputs += [value("n_user", TensorProto.INT64, ["users"]), value("n_item", TensorProto.INT64, ["items"])]
    inputs += [value("seen", TensorProto.INT64, ["users", "seen"]), value("k", TensorProto.INT64, [1])]
    outputs = [
        value("rows", TensorProto.INT64, ["users", "top"]),
        value("scores", TensorProto.FLOAT, ["users", "top"]),
        value("shares", TensorProto.FLOAT, ["users", len(widths), "top"]),
    ]
    graph = helper.make_graph(build.nodes, "catalogue", inputs, outputs, list(build.constants.values()))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)

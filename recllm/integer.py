"""Integer products for causal graphs: activations rounded row by row, weights column by column, answers' rows twice.

A row of activations is divided by its largest value and rounded to 8 bits when it is there, so that no calibration can
be out of date; a model is to be turned before (recllm/turning.py), else few places of a row take all the steps. Behind
a turned model's norms all rows are alike: one step does for all, which spares a pass over their products. Weights are
rounded by GPTQ (Frantar et al. 2023): what rounding a row of them loses on sample prompts is made up for by the rows
that are still to be rounded. Most of what is lost is lost at the rows that answers are read at, a few of all: in the
last layers what rounding has lost of these is rounded once more, in finer steps, and what it gives is added.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from recllm.errors import RecllmError
from recllm.graphfiles import open_model, save_graph
from recllm.sessions import INTEGER_ROWS, INTEGERS
from recllm.weightonly import SHARES, Feeds, WeightSettings, name_layers, weight_layers, with_float_products

STEPS, MIDDLE = 127, 128
"""Steps on either side of zero, and the byte that stands for zero."""
DAMPING = 0.01
"""Of the mean square of the inputs, added to each of them: GPTQ's own."""
BLOCK = 128
"""Rows of weights that GPTQ rounds before it passes on what they have lost."""
PRODUCT_BYTES = 4 << 30
"""What the inputs' products of the layers that are watched at once may take; for more of them the samples run again.
Rounding one layer takes some five times its own beside."""
SMALLEST = 1e-12
"""Stands in for the largest value of a row of zeros."""
NORMED = 4.0
"""What larger values are cut to behind a turned model's norms, where the mean square of a row is one: of normally
spread numbers one in sixteen thousand. Less makes finer steps, and loses as much by cutting off more (LOG.md)."""
ENDS, PLACES = "ends", "product_places"
"""A graph that answers is given where; and the row and place of each answer."""
TWICE = (1 / 3, 1 / 2, 2 / 3, 1.0)
"""Shares of the layers, the last ones, in which the rows of answers are rounded twice, tried in turn: on a tuned
model of 30 layers the last third makes up for most of the loss, and the first third for nothing (LOG.md)."""


@dataclass
class _Layer:
    """A weight of one or several graphs, and what it is given on the samples.

    Attributes:
        weight: float32[in, out].
        products: float64[in, in], the sum of the inputs' products with one another; None before and after rounding.
        peaks: the sum of the squares of the rows' largest values; behind norms NORMED stands for these.
        steps: int8[in, out].
        scales: float32[out].
        damage: the share of its output, squared, that rounding both sides loses on these inputs.
    """

    weight: NDArray[np.float32]
    products: NDArray[np.float64] | None = None
    peaks: float = 0.0
    steps: NDArray[np.int8] = field(default_factory=lambda: np.zeros(0, np.int8))
    scales: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))
    damage: float = 0.0


def quantise_products(
    sources: Sequence[Path],
    target: Path,
    settings: WeightSettings,
    samples: Mapping[str, Sequence[Feeds]],
    lost: Callable[[Path], float],
) -> dict[str, Any]:
    """Write the graphs of one model with integer products, as many as what they say together bears.

    Args:
        sources: graphs in float32, of which some may hold the same weights.
        target: the folder that they are written to.
        settings: `max_damage` is what `lost` may be.
        samples: inputs of each graph by its name without ending, of real prompts.
        lost: opens the graphs in a folder and says how far their answers are from the float32 ones.

    Returns:
        The damage of every layer, what was lost by what was tried, and the layers that kept floats.

    Raises:
        RecllmError: graphs without products with weights.
    """
    models = {path: onnx.load(path) for path in sources}
    layers, names = _rounded(models, samples)
    worst = sorted(layers, key=lambda key: layers[key].damage, reverse=True)
    answering = any(map(_answers, models.values()))
    tried: dict[str, float] = {}
    kept, seen = set[str](), set[tuple[int, ...]]()
    for twice, share in _tries(answering=answering):
        counts = (round(share * len(worst)), *(_first_twice(twice, len(own)) for own in names.values()))
        if counts in seen:  # of few layers
            continue
        seen.add(counts)
        kept = set(worst[: counts[0]])
        for path, model in models.items():
            given = onnx.ModelProto()
            given.CopyFrom(model)
            integer = {name: layers[key] for name, key in names[path].items() if key not in kept}
            made = _with_integer_products(given, integer, list(names[path]), twice)
            save_graph(with_float_products(made, _turns(made.graph)), target / path.name)
        name = f"answers twice {twice:.2g}, floats {share:g}" if answering else f"floats {share:g}"
        tried[name] = lost(target)
        if settings.max_damage is None or tried[name] <= settings.max_damage:
            break
    if len(kept) < len(layers):
        write_probe(target / INTEGERS)
    own = {f"{path.stem}: {name}": key for path in sources for name, key in names[path].items()}
    return {
        "layers": {name: layers[key].damage for name, key in own.items()},
        "graph": tried,
        "higher": [name for name, key in own.items() if key in kept],
    }


def _tries(*, answering: bool) -> list[tuple[float, float]]:
    """The share of the last layers whose answers' rows are rounded twice, and that of the layers in floats, in turn."""
    first = [(twice, 0.0) for twice in TWICE] if answering else [(0.0, 0.0)]
    return [*first, *((first[-1][0], share) for share in SHARES if share)]


def _first_twice(share: float, layers: int) -> int:
    """The place of the first of so many layers in which the rows of answers are rounded twice."""
    return round((1.0 - share) * layers)


def _answers(model: onnx.ModelProto) -> bool:
    """Whether a graph gives answers, and is told where they are read."""
    return any(own.name == ENDS for own in model.graph.input)


def _rounded(
    models: Mapping[Path, onnx.ModelProto], samples: Mapping[str, Sequence[Feeds]]
) -> tuple[dict[str, _Layer], dict[Path, dict[str, str]]]:
    """The rounded layers of the graphs by their keys, and each graph's keys by the names of its nodes.

    Raises:
        RecllmError: no graph has a layer.
    """
    layers: dict[str, _Layer] = {}
    names: dict[Path, dict[str, str]] = {}
    for path, model in models.items():
        name_layers(model)
        names[path] = _keys(model, layers)
    if not layers:
        raise RecllmError(
            "Integer products are for layers that are a product with a matrix of weights, and this model has none that "
            "is exported so (GPT-2's are not). Take the export recipe int8, fp16 or fp32."
        )
    for group in _groups(layers):
        for path, model in models.items():
            _watch(model, samples[path.stem], {name: group[key] for name, key in names[path].items() if key in group})
        for layer in group.values():
            _round(layer)
    return layers, names


def _keys(model: onnx.ModelProto, layers: dict[str, _Layer]) -> dict[str, str]:
    """The key of each layer of a graph by its node's name; layers that are not known yet are added.

    Layers of several graphs with one weight are one: else the weights would differ, and lie there twice.
    """
    weights, turns = {tensor.name: tensor for tensor in model.graph.initializer}, _turns(model.graph)
    keys = {}
    for node in weight_layers(model):
        if node.input[1] not in turns:
            weight = numpy_helper.to_array(weights[node.input[1]])
            keys[node.name] = key = hashlib.sha256(weight.tobytes()).hexdigest()
            layers.setdefault(key, _Layer(weight))
    return keys


def _groups(layers: Mapping[str, _Layer]) -> Iterator[dict[str, _Layer]]:
    """The layers in turn, as many at once as `PRODUCT_BYTES` have room for the products of."""
    group: dict[str, _Layer] = {}
    room = PRODUCT_BYTES
    for key, layer in layers.items():
        needed = 8 * len(layer.weight) ** 2
        if group and needed > room:
            yield group
            group, room = {}, PRODUCT_BYTES
        group[key] = layer
        room -= needed
    yield group


def _watch(model: onnx.ModelProto, samples: Sequence[Feeds], layers: Mapping[str, _Layer]) -> None:
    """Run a graph and add up what its `layers`, by their nodes' names, are given."""
    normed = _normed(model.graph)
    nodes = [node for node in weight_layers(model) if node.name in layers]
    inputs = list(dict.fromkeys(node.input[0] for node in nodes))
    if not inputs:
        return
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    del probe.graph.output[:]
    probe.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in inputs)
    session, sums, peaks = open_model(probe), dict.fromkeys(inputs, np.zeros(())), dict.fromkeys(inputs, 0.0)
    for feeds in samples:
        for name, value in zip(inputs, session.run(None, dict(feeds)), strict=True):
            rows = value.reshape(-1, value.shape[-1]).astype(np.float32)
            sums[name] = sums[name] + (rows.T @ rows).astype(np.float64)
            peaks[name] += NORMED**2 * len(rows) if name in normed else float((np.abs(rows).max(1) ** 2).sum())
    for node in nodes:
        layer, own = layers[node.name], sums[node.input[0]]
        layer.products = own if layer.products is None else layer.products + own
        layer.peaks += peaks[node.input[0]]


def _round(layer: _Layer) -> None:
    """Round the weight of a layer by GPTQ, with one scale for each column, and forget what it was given."""
    assert layer.products is not None
    count = len(layer.weight)
    products = layer.products + np.eye(count) * max(DAMPING * float(np.trace(layer.products)) / count, SMALLEST)
    # The upper Cholesky factor of the inverse: row i says what the rows behind i make up for.
    share = np.linalg.cholesky(np.linalg.inv(products)).T
    scales = np.maximum(np.abs(layer.weight).max(0), SMALLEST) / STEPS
    left = layer.weight.astype(np.float64)
    steps = np.zeros(left.shape, np.int8)
    for start in range(0, count, BLOCK):
        stop = min(start + BLOCK, count)
        errors = np.zeros((stop - start, left.shape[1]))
        for row in range(start, stop):
            steps[row] = np.clip(np.rint(left[row] / scales), -STEPS, STEPS)
            errors[row - start] = (left[row] - steps[row] * scales) / share[row, row]
            left[row:stop] -= np.outer(share[row, row:stop], errors[row - start])
        left[stop:] -= share[start:stop, stop:].T @ errors
    layer.steps, layer.scales = steps, scales.astype(np.float32)
    layer.damage = _damage(layer, layer.products)
    layer.products = None


def _damage(layer: _Layer, products: NDArray[np.float64]) -> float:
    """What rounding weights and rows loses of the layer's output, squared.

    A number of a row is off by a twelfth of a squared step on average, and a step is the row's largest value over 127,
    or NORMED over 127, of which what is cut off is not counted.
    """
    weight, made = layer.weight.astype(np.float64), layer.steps * layer.scales.astype(np.float64)
    whole = float(np.einsum("io,io->", weight, products @ weight))
    off = weight - made
    by_weights = float(np.einsum("io,io->", off, products @ off))
    by_rows = layer.peaks / STEPS**2 / 12 * float((made**2).sum())
    return (by_weights + by_rows) / whole if whole else 0.0


def _with_integer_products(
    model: onnx.ModelProto, layers: Mapping[str, _Layer], order: Sequence[str], share: float
) -> onnx.ModelProto:
    """The model with the named layers as integer products, in place.

    Args:
        model: of a graph.
        layers: by the name of their node.
        order: all layers of the graph, the first ones first.
        share: that of the last ones in which the rows of answers are rounded twice.
    """
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    constants = {
        "product_step": np.array(1 / STEPS, np.float32),
        "product_middle": np.array(MIDDLE, np.uint8),
        "product_normed_step": np.array(NORMED / STEPS, np.float32),
        "product_last": np.array([-1], np.int64),
        "product_smallest": np.array(SMALLEST, np.float32),
    }
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    answering = _answers(model)
    nodes = _answer_places(graph) if answering else []
    again = set(order[_first_twice(share, len(order)) :]) if answering else set()
    rounded: set[str] = set()
    normed = _normed(graph)
    for node in graph.node:
        if node.name not in layers:
            nodes.append(node)
            continue
        (rows, weight), (found,), layer = node.input, node.output, layers[node.name]
        if weight in weights:
            graph.initializer.append(numpy_helper.from_array(layer.steps, f"{weight}_steps"))
            graph.initializer.append(numpy_helper.from_array(layer.scales, f"{weight}_scales"))
            graph.initializer.remove(weights.pop(weight))
        step, largest = ("product_normed_step", "") if rows in normed else ("product_step", f"{rows}_largest")
        if rows not in rounded:
            nodes += _round_normed(rows) if rows in normed else _round_rows(rows, len(layer.weight))
        if node.name in again:
            lost, coarse, fine = f"{rows}_lost", f"{found}_coarse", f"{found}_fine"
            if lost not in rounded:
                nodes += [*_answers_lost(rows, step, largest), *_round_rows(lost, len(layer.weight))]
            nodes += _product(rows, weight, step, largest, coarse)
            nodes += _product(lost, weight, "product_step", f"{lost}_largest", fine)
            nodes.append(helper.make_node("ScatterND", [coarse, PLACES, fine], [found], reduction="add"))
            rounded.add(lost)
        else:
            nodes += _product(rows, weight, step, largest, found)
        rounded.add(rows)
    del graph.node[:]
    graph.node.extend(nodes)
    if all(own.domain != "com.microsoft" for own in model.opset_import):
        model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return model


def _product(rows: str, weight: str, step: str, largest: str, found: str) -> list[onnx.NodeProto]:
    """Nodes that multiply rounded rows with a rounded weight; `largest` is empty where one step is all there is."""
    given = [f"{rows}_steps", f"{weight}_steps", step, f"{weight}_scales", "product_middle"]
    if not largest:
        return [helper.make_node("MatMulIntegerToFloat", given, [found], domain="com.microsoft")]
    return [
        helper.make_node("MatMulIntegerToFloat", given, [f"{found}_unit"], domain="com.microsoft"),
        helper.make_node("Mul", [f"{found}_unit", largest], [found]),
    ]


def write_probe(path: Path) -> None:
    """The largest integer product there can be, for `check_integer_products`."""
    given = {
        "step": np.array(1, np.float32),
        "scales": np.ones(INTEGER_ROWS, np.float32),
        "middle": np.array(MIDDLE, np.uint8),
        "steps": np.full((INTEGER_ROWS, INTEGER_ROWS), STEPS, np.int8),
    }
    held = [numpy_helper.from_array(value, name) for name, value in given.items()]
    inputs = ["rows", "steps", "step", "scales", "middle"]
    node = helper.make_node("MatMulIntegerToFloat", inputs, ["found"], domain="com.microsoft")
    rows = helper.make_tensor_value_info("rows", onnx.TensorProto.UINT8, [1, INTEGER_ROWS])
    found = helper.make_tensor_value_info("found", onnx.TensorProto.FLOAT, [1, INTEGER_ROWS])
    graph = helper.make_graph([node], "integers", [rows], [found], held)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)


def _normed(graph: onnx.GraphProto) -> set[str]:
    """Names of a turned model's rows with a mean square of one: behind norms that multiply with ones (opset 23)."""
    if not _turns(graph):
        return set()
    ones = {own.name for own in graph.initializer if len(own.dims) == 1 and (numpy_helper.to_array(own) == 1).all()}
    return {node.output[0] for node in graph.node if node.op_type == "RMSNormalization" and node.input[1] in ones}


def _turns(graph: onnx.GraphProto) -> set[str]:
    """Names of a turned model's Hadamard matrices, of ±size^−½ throughout, as no learnt weight is."""
    square = [own for own in graph.initializer if len(own.dims) == 2 and own.dims[0] == own.dims[1]]
    sizes = {own.name: np.abs(numpy_helper.to_array(own)) for own in square}
    return {name for name, size in sizes.items() if np.allclose(size, len(size) ** -0.5, rtol=1e-5, atol=0)}


def _round_normed(rows: str) -> list[onnx.NodeProto]:
    """Nodes that bring rows behind a norm to 8 bits."""
    given = [rows, "product_normed_step", "product_middle"]
    return [helper.make_node("QuantizeLinear", given, [f"{rows}_steps"])]


def _round_rows(rows: str, width: int) -> list[onnx.NodeProto]:
    """Nodes that bring rows of such a width to 8 bits, once for all layers that read them.

    The largest value by both ends and a step for each row take half of the time of absolute values and a division; rows
    as blocks are shared out among threads, and along an axis they are not.
    """
    given = [rows, f"{rows}_step", f"{rows}_middle"]
    return [
        helper.make_node("ReduceMax", [rows, "product_last"], [f"{rows}_top"], keepdims=1),
        helper.make_node("ReduceMin", [rows, "product_last"], [f"{rows}_bottom"], keepdims=1),
        helper.make_node("Neg", [f"{rows}_bottom"], [f"{rows}_depth"]),
        helper.make_node("Max", [f"{rows}_top", f"{rows}_depth", "product_smallest"], [f"{rows}_largest"]),
        helper.make_node("Mul", [f"{rows}_largest", "product_step"], [f"{rows}_step"]),
        helper.make_node("Shape", [f"{rows}_step"], [f"{rows}_count"]),
        helper.make_node("Expand", ["product_middle", f"{rows}_count"], [f"{rows}_middle"]),
        helper.make_node("QuantizeLinear", given, [f"{rows}_steps"], axis=-1, block_size=width),
    ]


def _answer_places(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Nodes that say where answers are read: int64[continuations, 2], of all users one after the other."""
    constants = {"product_zero": np.array(0), "product_one": np.array(1)}
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    return [
        helper.make_node("Reshape", [ENDS, "product_last"], ["product_ends"]),
        helper.make_node("Size", ["product_ends"], ["product_count"]),
        helper.make_node("Range", ["product_zero", "product_count", "product_one"], ["product_rows"]),
        helper.make_node("Unsqueeze", ["product_rows", "product_last"], ["product_rows_column"]),
        helper.make_node("Unsqueeze", ["product_ends", "product_last"], ["product_ends_column"]),
        helper.make_node("Concat", ["product_rows_column", "product_ends_column"], [PLACES], axis=1),
    ]


def _answers_lost(rows: str, step: str, largest: str) -> list[onnx.NodeProto]:
    """Nodes that say what rounding has lost of the rows that answers are read at."""
    nodes = [
        helper.make_node("GatherND", [rows, PLACES], [f"{rows}_answers"]),
        helper.make_node("GatherND", [f"{rows}_steps", PLACES], [f"{rows}_answers_steps"]),
        helper.make_node(
            "DequantizeLinear", [f"{rows}_answers_steps", step, "product_middle"], [f"{rows}_answers_unit"]
        ),
    ]
    rounded = f"{rows}_answers_unit"
    if largest:
        rounded = f"{rows}_answers_rounded"
        nodes += [
            helper.make_node("GatherND", [largest, PLACES], [f"{rows}_answers_largest"]),
            helper.make_node("Mul", [f"{rows}_answers_unit", f"{rows}_answers_largest"], [rounded]),
        ]
    return [*nodes, helper.make_node("Sub", [f"{rows}_answers", rounded], [f"{rows}_lost"])]

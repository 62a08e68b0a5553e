"""Weight-only quantisation of causal graphs: few bits where that does little damage on real prompts, 8 elsewhere.

Activations stay floats: a causal model has a few that are a hundred times larger than the rest (recllm/quantise.py).
"""

import logging
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from pydantic import Field, model_validator

from recllm.errors import RecllmError
from recllm.graphfiles import open_model, save_graph
from recllm.recipes import Settings

Feeds = Mapping[str, NDArray[Any]]
SHARES = (0.0, 0.125, 0.25, 0.5, 1.0)
"""Shares of the layers that are tried with 8 bits, until the graph's damage is within its limit."""
ROWS = 512
"""The most inputs of a layer that its damage is measured on."""
HIGHER_BITS = 8
TABLE_ROWS = 1024
"""Rows from which on a table of embeddings is worth making smaller."""
TABLE_STEPS = 127
"""Of a row's largest value, the most that 8 bits with a sign hold."""


class WeightSettings(Settings):
    """`[causal]` of an export recipe; bits, block_size and accuracy_level are ONNX Runtime's MatMulNBitsQuantizer's."""

    bits: Literal[4, 8] = 8
    """Of a weight."""
    block_size: Literal[16, 32, 64, 128, 256] = 32
    """Weights that share a scale."""
    accuracy_level: int = Field(default=0, ge=0, le=4)
    """0: float32 products; 4 would round activations too."""
    activations: Literal["float", "int8"] = "float"
    """int8 rounds each row of them, for integer products; rankers only, with bits = 8 and max_damage."""
    algorithm: Literal["rtn", "hqq"] = "rtn"
    """Round to the nearest, or half-quadratic quantisation (Badri & Shaji 2023) of 4 bits, which fits zero points."""
    max_damage: float | None = Field(default=None, gt=0)
    """The share of what a graph says that may be lost on sample prompts, squared; the layers that lose most get 8 bits
    until it holds. With int8 activations the share of the spread of a history's scores: answers' rows are rounded
    twice in more layers, then those layers keep float activations. None leaves all layers alike."""

    @model_validator(mode="after")
    def _fits_together(self) -> "WeightSettings":
        if self.algorithm == "hqq" and (self.bits != 4 or self.accuracy_level != 0):
            raise ValueError("algorithm 'hqq' is for bits = 4 with accuracy_level = 0")
        if self.activations == "int8" and (self.bits != 8 or self.max_damage is None):
            raise ValueError("activations = 'int8' goes with bits = 8 and max_damage")
        return self


def quantise_weights(
    source: Path, target: Path, settings: WeightSettings, samples: Sequence[Feeds] = ()
) -> dict[str, Any] | None:
    """Write a causal graph with quantised weights.

    Args:
        source: a graph in float32.
        target: where the result is written.
        settings: bits, and how they are chosen.
        samples: inputs of the graph, of real prompts; needed where `settings.max_damage` is given.

    Returns:
        What was tried: the damage of every layer in `settings.bits`, the damage of the whole graph by the share of
        layers with 8 bits, and those layers; None where nothing is measured.

    Raises:
        RecllmError: damage is to be measured, and there is no sample, or no layer.
    """
    model = onnx.load(source)
    split_products(model)
    if settings.max_damage is None:
        save_graph(_quantised(model, settings, frozenset()), target)
        return None
    if not samples:
        raise RecllmError(
            f"causal.max_damage is measured on training histories, and there is none for {source.name}. Leave it out "
            "of the export recipe."
        )
    if not weight_layers(model):
        raise RecllmError(
            f"Bits are chosen for layers that are a product with a matrix of weights, and {source.name} has none that "
            "is exported so. Take the export recipe fp16 or fp32."
        )
    name_layers(model)
    layers = layer_damages(model, samples, lambda part: _quantised(part, settings, frozenset()))
    worst = sorted(layers, key=layers.__getitem__, reverse=True)
    # A weight of several layers is kept once, in the bits that the worst of them needs.
    weight_of = {node.name: node.input[1] for node in model.graph.node if node.name in layers}
    expected = _outputs(model, samples)
    tried: dict[str, float] = {}
    higher: list[str] = []
    for share in SHARES:
        raised = {weight_of[name] for name in worst[: round(share * len(worst))]}
        before, higher = higher, [name for name in worst if weight_of[name] in raised]
        if tried and higher == before:
            continue
        given = onnx.ModelProto()
        given.CopyFrom(model)
        made = _quantised(given, settings, frozenset(higher))
        pairs = zip(expected, _outputs(made, samples), strict=True)
        tried[f"{share:g}"] = damage = max(_damage(*pair) for pair in pairs)
        if damage <= settings.max_damage:
            break
    save_graph(made, target)
    return {"layers": layers, "graph": tried, "higher": higher}


def split_products(model: onnx.ModelProto) -> None:
    """Write a product with a matrix of weights that adds a bias as two nodes, in place: quantisers know products alone.

    GPT-2's layers are exported so.
    """
    matrices = {tensor.name for tensor in model.graph.initializer if len(tensor.dims) == 2}
    nodes = [own for node in model.graph.node for own in (_split(node) if _adds(node, matrices) else [node])]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _adds(node: onnx.NodeProto, matrices: Collection[str]) -> bool:
    """Whether it is rows times a matrix as it lies there, and a bias, neither of them scaled."""
    if node.op_type != "Gemm" or node.input[1] not in matrices:
        return False
    given = {own.name: helper.get_attribute_value(own) for own in node.attribute}
    scaled = given.get("alpha", 1.0) != 1.0 or given.get("beta", 1.0) != 1.0
    return not scaled and not given.get("transA", 0) and not given.get("transB", 0)


def _split(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    rows, weight, *bias = node.input
    (found,) = node.output
    product = f"{found} product" if bias and bias[0] else found
    nodes = [helper.make_node("MatMul", [rows, weight], [product], name=node.name)]
    return nodes if product == found else [*nodes, helper.make_node("Add", [product, bias[0]], [found])]


def name_layers(model: onnx.ModelProto) -> None:
    """Give every product with a weight a name of its own, for layers are told apart by it."""
    seen: set[str] = set()
    for place, node in enumerate(model.graph.node):
        if node.op_type == "MatMul" and (not node.name or node.name in seen):
            node.name = f"layer {place} {node.name}".strip()
        seen.add(node.name)


def layer_damages(
    model: onnx.ModelProto, samples: Sequence[Feeds], quantised: Callable[[onnx.ModelProto], onnx.ModelProto]
) -> dict[str, float]:
    """The share of each layer's output that quantising it alone loses on the samples, squared, by the node's name."""
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes = weight_layers(model)
    names = list(dict.fromkeys(node.input[0] for node in nodes))
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    del probe.graph.output[:]
    probe.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names)
    outputs = _outputs(probe, samples)
    inputs: dict[str, list[NDArray[np.float32]]] = {name: [] for name in names}
    for place, value in enumerate(outputs):
        inputs[names[place % len(names)]].append(value.reshape(-1, value.shape[-1]))
    result: dict[str, float] = {}
    for node in nodes:
        rows = np.concatenate(inputs[node.input[0]])
        rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), ROWS)).astype(np.int64)]
        made = quantised(_alone(weights[node.input[1]], model))
        expected = rows @ numpy_helper.to_array(weights[node.input[1]])
        result[node.name] = _damage(expected, _outputs(made, [{"rows": rows}])[0])
    return result


def weight_layers(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The products of a graph with a matrix of weights."""
    matrices = {tensor.name for tensor in model.graph.initializer if len(tensor.dims) == 2}
    return [node for node in model.graph.node if node.op_type == "MatMul" and node.input[1] in matrices]


def _alone(weight: onnx.TensorProto, model: onnx.ModelProto) -> onnx.ModelProto:
    """A model of one product with a weight."""
    width, out = weight.dims
    rows = helper.make_tensor_value_info("rows", onnx.TensorProto.FLOAT, ["rows", width])
    product = helper.make_tensor_value_info("product", onnx.TensorProto.FLOAT, ["rows", out])
    node = helper.make_node("MatMul", ["rows", weight.name], ["product"], name="layer")
    graph = helper.make_graph([node], "layer", [rows], [product], [weight])
    return helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)


def _quantised(model: onnx.ModelProto, settings: WeightSettings, higher: frozenset[str]) -> onnx.ModelProto:
    """The model with quantised weights, those of the layers named `higher` in 8 bits."""
    from onnxruntime.quantization.matmul_nbits_quantizer import HQQWeightOnlyQuantConfig

    def pass_over(given: onnx.ModelProto, names: list[str], **keys: Any) -> onnx.ModelProto:  # noqa: ANN401
        return _with_few_bits(given, settings, names, **keys)

    if settings.algorithm == "hqq" and settings.bits == 4:
        config = HQQWeightOnlyQuantConfig(block_size=settings.block_size, bits=settings.bits)
        model = pass_over(model, sorted(higher), algo_config=config)
    else:
        model = pass_over(model, sorted(higher), bits=settings.bits, is_symmetric=True)
    return _with_small_tables(pass_over(model, [], bits=HIGHER_BITS, is_symmetric=True) if higher else model)


def with_float_products(model: onnx.ModelProto, apart: Collection[str]) -> onnx.ModelProto:
    """A model whose products are float products, of weights in 8 bits but for those whose name is in `apart`."""
    names = [node.name for node in weight_layers(model) if node.input[1] in apart]
    return _with_small_tables(_with_few_bits(model, WeightSettings(), names, bits=HIGHER_BITS, is_symmetric=True))


def _with_few_bits(
    model: onnx.ModelProto,
    settings: WeightSettings,
    names: list[str],
    **keys: Any,  # noqa: ANN401
) -> onnx.ModelProto:
    """The model by ONNX Runtime's quantizer, but for the named layers."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    logging.getLogger("onnxruntime.quantization.matmul_nbits_quantizer").setLevel(logging.WARNING)
    quantizer = MatMulNBitsQuantizer(
        model,
        block_size=settings.block_size,
        accuracy_level=settings.accuracy_level,
        nodes_to_exclude=names,
        **keys,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch dislikes arrays that cannot be written to, which nobody does
        quantizer.process()
    return quantizer.model.model


def _with_small_tables(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with its tables of embeddings in 8 bits, in place: a row is its largest value times 127ths.

    MatMulNBitsQuantizer leaves them as they are in 8 bits, and in a small model they are the largest weights of all.
    """
    graph = model.graph
    uses: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            uses.setdefault(name, []).append(node)
    tables = {tensor.name: tensor for tensor in graph.initializer if _is_table(tensor, uses.get(tensor.name, []))}
    for name, tensor in tables.items():
        values = numpy_helper.to_array(tensor)
        scales = np.abs(values).max(1, keepdims=True) / TABLE_STEPS
        scales[scales == 0.0] = 1.0
        graph.initializer.remove(tensor)
        steps = np.rint(values / scales).astype(np.int8)
        graph.initializer.append(numpy_helper.from_array(steps, f"{name}_steps"))
        graph.initializer.append(numpy_helper.from_array(scales.astype(np.float32), f"{name}_scales"))
    nodes = [
        own
        for node in graph.node
        for own in (_read_table(node) if node.input[:1] and node.input[0] in tables else [node])
    ]
    del graph.node[:]
    graph.node.extend(nodes)
    return model


def _is_table(tensor: onnx.TensorProto, uses: Sequence[onnx.NodeProto]) -> bool:
    large = tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) == 2 and tensor.dims[0] >= TABLE_ROWS
    return large and bool(uses) and all(_takes_rows(node, tensor.name) for node in uses)


def _takes_rows(node: onnx.NodeProto, table: str) -> bool:
    places = [own.i for own in node.attribute if own.name == "axis"]
    return node.op_type == "Gather" and node.input[0] == table and places in ([], [0])


def _read_table(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    table, rows = node.input
    (found,) = node.output
    return [
        helper.make_node("Gather", [f"{table}_steps", rows], [f"{found}_steps"], name=f"{node.name} steps"),
        helper.make_node("Cast", [f"{found}_steps"], [f"{found}_cast"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Gather", [f"{table}_scales", rows], [f"{found}_scales"], name=f"{node.name} scales"),
        helper.make_node("Mul", [f"{found}_cast", f"{found}_scales"], [found], name=f"{node.name} rows"),
    ]


def _outputs(model: onnx.ModelProto, samples: Sequence[Feeds]) -> list[NDArray[np.float32]]:
    """All outputs of a model that is in memory, of each sample after the other."""
    session = open_model(model)
    return [np.asarray(value) for feeds in samples for value in session.run(None, dict(feeds))]


def _damage(expected: NDArray[np.float32], found: NDArray[np.float32]) -> float:
    """‖expected − found‖² / ‖expected‖²."""
    whole = float((expected.astype(np.float64) ** 2).sum())
    return float(((expected.astype(np.float64) - found) ** 2).sum()) / whole if whole else 0.0

"""Graphs in which layers were traced once: the other layers are written out as calls with their own weights."""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.convenience import replace_all_uses_with
from onnx_ir.passes import common
from torch import nn

from recllm.repeated import AGAIN, DOMAIN, ENTER, LEAVE, NotAlikeError, Repeated, weights_of

LAYERS = "layers."
"""Begins the names of the layers' weights."""
GRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


def write_out(model: ir.Model, repeated: Repeated, inputs: Sequence[Sequence[str]]) -> None:
    """Put all layers where they are called, in place.

    Args:
        model: as exported, the weights of the first layers of each kind as inputs.
        repeated: the layers.
        inputs: names of those inputs, for each of `repeated.firsts`.

    Raises:
        NotAlikeError: something of a layer is used outside of it, or has a graph of its own.
    """
    graph = model.graph
    by_name = {own.name: own for own in graph.inputs}
    for kind, names in zip(repeated.firsts, inputs, strict=True):
        weights = [by_name[name] for name in names]
        outer = _as_function(model, kind, weights)
        for node in [own for own in graph if own.domain == DOMAIN and own.op_type in (ENTER, AGAIN)]:
            number = int(node.attributes["number"].as_int())
            if repeated.kinds[number] == kind:
                _call(graph, node, kind, _initializers(graph, number, repeated.layers[number]), outer)
        for value in weights:
            graph.inputs.remove(value)
    common.InlinePass()(model)
    _turn_weights(graph)
    for last in (common.RemoveUnusedNodesPass(), common.RemoveUnusedOpsetsPass(), common.NameFixPass()):
        last(model)


def _only(graph: ir.Graph, operator: str, number: int) -> ir.Node:
    for node in graph:
        if node.domain == DOMAIN and node.op_type == operator and node.attributes["number"].as_int() == number:
            return node
    raise NotAlikeError(f"the mark {operator} {number} is gone")


def _as_function(model: ir.Model, kind: int, weights: Sequence[ir.Value]) -> list[ir.Value]:
    """Make what lies between two marks a function of their inputs, the weights and other values, which are returned."""
    graph = model.graph
    enter, leave = _only(graph, ENTER, kind), _only(graph, LEAVE, kind)
    inside: list[ir.Node] = []
    made = {*enter.outputs, *weights}
    for node in graph:
        if node is not enter and node is not leave and any(value in made for value in node.inputs):
            if any(own.type in GRAPHS for own in node.attributes.values()):
                raise NotAlikeError(f"{node.op_type} has a graph of its own")
            inside.append(node)
            made.update(node.outputs)
    own_nodes = set(inside)
    users = {use.node for value in made for use in value.uses()} - own_nodes
    if users - {leave} or any(value not in made for value in leave.inputs) or any(v.is_graph_output() for v in made):
        raise NotAlikeError("something of a layer is used outside of it")
    outer = [value for node in inside for value in node.inputs if value is not None and value not in made]
    outer = list(dict.fromkeys(outer))
    fresh = {
        own: ir.Value(name=f"given_{place}", shape=own.shape, type=own.type)
        for place, own in enumerate([*enter.outputs, *weights, *outer])
    }
    for node in inside:
        for place, value in enumerate(node.inputs):
            if value in fresh:
                node.replace_input_with(place, fresh[value])
    outputs = [fresh.get(own, own) for own in leave.inputs if own is not None]
    # The first layer becomes a call like the others, where it leaves.
    call = ir.Node(DOMAIN, ENTER, enter.inputs, [ir.AttrInt64("number", kind)], num_outputs=len(leave.outputs))
    graph.insert_before(leave, call)
    _take_over(leave, call)
    graph.remove([leave, enter, *inside], safe=False)
    body = ir.Graph(list(fresh.values()), outputs, nodes=inside, opset_imports=dict(model.opset_imports))
    function = ir.Function(DOMAIN, f"layer_{kind}", graph=body, attributes=[])
    model.functions[function.identifier()] = function
    return outer


def _initializers(graph: ir.Graph, number: int, layer: nn.Module) -> list[ir.Value]:
    values = []
    for name, weight in weights_of(layer).items():
        array = np.ascontiguousarray(weight.numpy())
        value = ir.Value(name=f"{LAYERS}{number}.{name}", const_value=ir.tensor(array, name=f"{LAYERS}{number}.{name}"))
        graph.register_initializer(value)
        values.append(value)
    return values


def _call(graph: ir.Graph, node: ir.Node, kind: int, weights: Sequence[ir.Value], outer: Sequence[ir.Value]) -> None:
    call = ir.Node(DOMAIN, f"layer_{kind}", [*node.inputs, *weights, *outer], num_outputs=len(node.outputs))
    graph.insert_before(node, call)
    _take_over(node, call)
    graph.remove(node, safe=True)


def _take_over(node: ir.Node, call: ir.Node) -> None:
    """Give what `node` makes to `call`, names and places among the graph's outputs too."""
    for old, new in zip(node.outputs, call.outputs, strict=True):
        name, new.shape, new.type = old.name, old.shape, old.type
        replace_all_uses_with(old, new, replace_graph_outputs=True)
        old.name, new.name = None, name


def _turn_weights(graph: ir.Graph) -> None:
    """Transpose the layers' weights once, and not at every call; made when they are written, not to be held twice."""
    for value in [own for name, own in graph.initializers.items() if name.startswith(LAYERS)]:
        for node in [use.node for use in value.uses()]:
            if node.op_type != "Transpose" or node.domain not in ("", "ai.onnx") or "perm" not in node.attributes:
                continue
            order = tuple(node.attributes["perm"].as_ints())
            name = f"{value.name}.turned_{'_'.join(map(str, order))}"
            if name not in graph.initializers:
                graph.register_initializer(ir.Value(name=name, const_value=_turned(value, order, name)))
            replace_all_uses_with(node.outputs[0], graph.initializers[name])
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]


def _turned(value: ir.Value, order: tuple[int, ...], name: str) -> ir.LazyTensor:
    weight = value.const_value
    assert weight is not None
    shape = ir.Shape([int(weight.shape.numpy()[place]) for place in order])
    return ir.LazyTensor(
        lambda: ir.tensor(np.ascontiguousarray(weight.numpy().transpose(order)), name=name),
        dtype=weight.dtype,
        shape=shape,
        name=name,
    )

"""Tracing: a torch module to an ONNX graph and its weights."""

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recllm.graphfiles import MOST_BYTES
from recllm.repeated import WithWeights, repeated_layers, weights_of
from recllm.unfolding import write_out


def write_graph(
    module: nn.Module,
    example: Mapping[str, tuple[Tensor, Sequence[str] | Mapping[int, str]]],
    path: Path,
    outputs: tuple[str, ...],
    opset: int,
) -> None:
    """Export a module with the weights inside the file, or beside it where they are too large for one.

    Args:
        module: what is exported.
        example: per input a value and the names of its first dimensions, those that vary, or their names by place.
        path: where the graph is written.
        outputs: names of the results.
        opset: the ONNX version of the operators.
    """
    values = tuple(value.clone() for value, _ in example.values())
    named = [dict(names if isinstance(names, Mapping) else enumerate(names)) for _, names in example.values()]
    dimensions = {name: torch.export.Dim(name, min=1) for names in named for name in names.values()}
    shapes = tuple({place: dimensions[name] for place, name in names.items()} for names in named)
    module = module.eval().cpu()
    with _quiet(), torch.no_grad():
        program = _layers_once(module, values, list(example), shapes, outputs, opset)
        if program is None:
            program = _program(module, values, list(example), shapes, outputs, opset)
    sizes = (own.const_value.nbytes for own in program.model.graph.initializers.values() if own.const_value is not None)
    program.save(str(path), external_data=sum(sizes) > MOST_BYTES)


def _program(
    module: nn.Module,
    values: tuple[Tensor, ...],
    names: Sequence[str],
    shapes: tuple[Any, ...],
    outputs: Sequence[str],
    opset: int,
) -> torch.onnx.ONNXProgram:
    program = torch.onnx.export(
        module,
        values,
        dynamo=True,
        opset_version=opset,
        input_names=list(names),
        output_names=list(outputs),
        dynamic_shapes=shapes,
        verbose=False,
    )
    assert program is not None
    return program


def _layers_once(
    module: nn.Module,
    values: tuple[Tensor, ...],
    names: Sequence[str],
    shapes: tuple[Any, ...],
    outputs: Sequence[str],
    opset: int,
) -> torch.onnx.ONNXProgram | None:
    """The graph with each kind of layer traced once; None where layers differ or do what such a graph cannot say."""
    try:
        return _repeated_program(module, values, names, shapes, outputs, opset)
    except MemoryError:
        raise
    except Exception as error:  # whatever it is: traced whole, the model says itself what is wrong
        logging.getLogger(__name__).debug("Layers are traced one by one: %r", error)
        return None


def _repeated_program(
    module: nn.Module,
    values: tuple[Tensor, ...],
    names: Sequence[str],
    shapes: tuple[Any, ...],
    outputs: Sequence[str],
    opset: int,
) -> torch.onnx.ONNXProgram | None:
    repeated = repeated_layers(module, values)
    if repeated is None:
        return None
    weights = [weights_of(repeated.layers[number]) for number in repeated.firsts]
    inputs = [[f"weight_{kind}_{place}" for place in range(len(own))] for kind, own in enumerate(weights)]
    given = (*values, *(own.clone() for kind in weights for own in kind.values()))
    every = (*names, *(name for kind in inputs for name in kind))
    whole = WithWeights(module, repeated, len(values))
    fixed: tuple[dict[int, Any], ...] = ({},) * (len(given) - len(values))
    program = _program(whole, given, every, ((*shapes, *fixed),), outputs, opset)
    write_out(program.model, repeated, inputs)
    return program


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's notes on its own insides; its errors are exceptions."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

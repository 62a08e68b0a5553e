"""Tracing: a torch module to an ONNX graph and its weights."""

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recllm.graphfiles import MOST_BYTES
from recllm.repeated import Repeated, WithWeights, repeated_layers, weights_of
from recllm.unfolding import write_out

Example = Mapping[str, tuple[Tensor, Sequence[str] | Mapping[int, str]]]
"""Per input of a graph a value and the names of its first dimensions, those that vary, or their names by place."""


def write_graph(
    module: nn.Module,
    example: Example,
    path: Path,
    outputs: tuple[str, ...],
    opset: int,
) -> None:
    """Export a module with the weights inside the file, or beside it where they are too large for one.

    Args:
        module: what is exported.
        example: its inputs.
        path: where the graph is written.
        outputs: names of the results.
        opset: the ONNX version of the operators.
    """
    values = tuple(value.clone() for value, _ in example.values())
    named = [dict(names if isinstance(names, Mapping) else enumerate(names)) for _, names in example.values()]
    dimensions = {name: torch.export.Dim(name, min=1) for names in named for name in names.values()}
    shapes = tuple({place: dimensions[name] for place, name in names.items()} for names in named)
    asked = _Asked(module.eval().cpu(), values, list(example), shapes, outputs, opset)
    with _quiet(), torch.no_grad():
        program = _layers_once(asked)
        if program is None:
            program = _program(asked)
    sizes = (own.const_value.nbytes for own in program.model.graph.initializers.values() if own.const_value is not None)
    program.save(str(path), external_data=sum(sizes) > MOST_BYTES)


@dataclass(frozen=True)
class _Asked:
    """What torch's exporter is asked for.

    Attributes:
        module: what is exported.
        values: example arguments.
        names: of the arguments.
        shapes: as `dynamic_shapes` of torch.export.
        outputs: names of the results.
        opset: the ONNX version of the operators.
    """

    module: nn.Module
    values: tuple[Tensor, ...]
    names: Sequence[str]
    shapes: tuple[Any, ...]
    outputs: Sequence[str]
    opset: int


def _program(asked: _Asked) -> torch.onnx.ONNXProgram:
    program = torch.onnx.export(
        asked.module,
        asked.values,
        dynamo=True,
        opset_version=asked.opset,
        input_names=list(asked.names),
        output_names=list(asked.outputs),
        dynamic_shapes=asked.shapes,
        verbose=False,
    )
    assert program is not None
    return program


def _layers_once(asked: _Asked) -> torch.onnx.ONNXProgram | None:
    """The graph with each kind of layer traced once; None where layers differ or do what such a graph cannot say."""
    try:
        repeated = repeated_layers(asked.module, asked.values)
        return None if repeated is None else _repeated_program(asked, repeated)
    except MemoryError:
        raise
    except Exception as error:  # whatever it is: traced whole, the model says itself what is wrong
        logging.getLogger(__name__).debug("Layers are traced one by one: %r", error)
        return None


def _repeated_program(asked: _Asked, repeated: Repeated) -> torch.onnx.ONNXProgram:
    weights = [weights_of(repeated.layers[number]) for number in repeated.firsts]
    inputs = [[f"weight_{kind}_{place}" for place in range(len(own))] for kind, own in enumerate(weights)]
    further = tuple(own.clone() for kind in weights for own in kind.values())
    fixed: tuple[dict[int, Any], ...] = ({},) * len(further)
    whole = replace(
        asked,
        module=WithWeights(asked.module, repeated, len(asked.values)),
        values=(*asked.values, *further),
        names=(*asked.names, *(name for kind in inputs for name in kind)),
        shapes=((*asked.shapes, *fixed),),  # its arguments are one tuple
    )
    program = _program(whole)
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

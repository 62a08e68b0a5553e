"""Tracing: a torch module to an ONNX graph with the weights inside the file."""

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn


def write_graph(
    module: nn.Module,
    example: Mapping[str, tuple[Tensor, Sequence[str] | Mapping[int, str]]],
    path: Path,
    outputs: tuple[str, ...],
    opset: int,
) -> None:
    """Export a module with the weights inside the file.

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
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            module.eval().cpu(),
            values,
            dynamo=True,
            opset_version=opset,
            input_names=list(example),
            output_names=list(outputs),
            dynamic_shapes=tuple({place: dimensions[name] for place, name in names.items()} for names in named),
            verbose=False,
        )
    assert program is not None
    program.save(str(path), external_data=False)


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

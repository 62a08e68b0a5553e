"""ONNX graphs as files: weights that are too large for one, or that several have in common, lie in a second one."""

import hashlib
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
from onnx.external_data_helper import set_external_data

from recllm.sessions import open_session

MOST_BYTES = 1_500_000_000
"""Of weights that still go into the file of the graph."""
WEIGHTS = ".data"
"""Ends the name of the file with the weights, behind the graph's own name, by which the graph names it."""
SHARED_BYTES = 1024
"""Weights of fewer bytes stay in their graph, where the runtime may compute with them when it loads."""
ALIGNMENT = 4096
"""Weights begin at a page of memory, so that they can be mapped, as onnx lays them out."""


def weights_file(path: Path) -> Path:
    """Where the weights of a graph lie that is too large for one file; it need not be there."""
    return path.with_name(path.name + WEIGHTS)


def is_large(model: onnx.ModelProto) -> bool:
    """Whether the weights of a model need a file of their own."""
    return sum(len(tensor.raw_data) for tensor in model.graph.initializer) > MOST_BYTES


def save_graph(model: onnx.ModelProto, path: Path) -> None:
    """Write a model, and its weights beside it where they are large; the model is not to be used any more."""
    if not is_large(model):
        onnx.save(model, path)
        return
    weights_file(path).unlink(missing_ok=True)  # onnx writes behind what is there
    onnx.save(model, path, save_as_external_data=True, location=weights_file(path).name)


def copy_graph(source: Path, target: Path) -> None:
    """Copy a graph, and its weights where they lie beside it.

    Args:
        source: the graph.
        target: the copy, by the same file name, for a graph names the file of its weights.
    """
    assert source.name == target.name
    shutil.copyfile(source, target)
    if weights_file(source).is_file():
        shutil.copyfile(weights_file(source), weights_file(target))


def share_weights(paths: Sequence[Path], target: Path) -> None:
    """Move the weights of graphs into one file beside them, where equal ones lie once; one graph at a time in memory.

    Args:
        paths: graphs of one folder, with their weights inside or in a file of their own.
        target: the file of all weights, in that folder.
    """
    places: dict[tuple[bytes, int], int] = {}
    with target.open("wb") as file:
        for path in paths:
            model = onnx.load(path)
            for tensor in model.graph.initializer:
                size = len(tensor.raw_data)
                if size < SHARED_BYTES:
                    continue
                known = hashlib.sha256(tensor.raw_data).digest(), size
                if known not in places:
                    places[known] = file.seek(-(-file.tell() // ALIGNMENT) * ALIGNMENT)
                    file.write(tensor.raw_data)
                set_external_data(tensor, target.name, places[known], size)
                tensor.ClearField("raw_data")
            onnx.save(model, path)
            weights_file(path).unlink(missing_ok=True)


def open_model(model: onnx.ModelProto) -> Any:  # noqa: ANN401  onnxruntime is untyped
    """A session of a model that is in memory, on the CPU; the model stays as it is."""
    if not is_large(model):
        return open_session(model.SerializeToString())
    given = onnx.ModelProto()
    given.CopyFrom(model)
    with tempfile.TemporaryDirectory() as folder:
        save_graph(given, Path(folder) / "model.onnx")
        del given
        return open_session(Path(folder) / "model.onnx")

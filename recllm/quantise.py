"""Precision of a graph: half precision, weights in few bits for causal models, dynamic int8 for encoders."""

import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import onnx

from recllm.files import write_json
from recllm.graphfiles import copy_graph, save_graph, weights_file
from recllm.weightonly import Feeds, WeightSettings, quantise_weights

Precision = Literal["fp32", "fp16", "int8", "int4"]
REPORT = "quantisation.json"
"""In a bundle: the damage of every layer, of each graph by the share of layers with 8 bits, and which those are."""


def quantise(
    source: Path, target: Path, precision: Precision, causal: WeightSettings | None, samples: Sequence[Feeds] = ()
) -> dict[str, Any] | None:
    """Write `source` again in another precision.

    Args:
        source: a graph in float32.
        target: where the result is written.
        precision: fp32 copies.
        causal: for a causal model, whose activations must stay floats; None for an encoder or a small projection, which
            take dynamic int8 and nothing.
        samples: inputs of a causal graph, on which damage is measured.

    Returns:
        What `quantise_weights` has measured; None where it has not.
    """
    if precision == "fp32" or source.stem.endswith("-items"):
        copy_graph(source, target)  # item projections are small, and every score of a new item hangs on them
    elif precision == "fp16":
        _half(source, target)
    elif causal is not None:
        return quantise_weights(source, target, causal, samples)
    else:
        _dynamic(source, target)
    return None


def write_quantisation(folder: Path, measured: Mapping[str, dict[str, Any] | None]) -> None:
    """Keep what quantising each graph has measured beside the graphs, where it has measured anything."""
    said = {name: own for name, own in measured.items() if own is not None}
    if said:
        write_json(folder / REPORT, said)


def _half(source: Path, target: Path) -> None:
    from onnxruntime.transformers.float16 import convert_float_to_float16

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it names every weight too small for fp16; the gate judges the result
        model = convert_float_to_float16(onnx.load(source), keep_io_types=True, disable_shape_infer=True)
    save_graph(model, target)


def _dynamic(source: Path, target: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # it advises pre-processing that the exporter has done already
    try:
        # Named, because left to itself it also rewrites opset 23's Attention into one that cannot be loaded.
        operators = ["MatMul", "Gemm", "Gather"]
        quantize_dynamic(
            source,
            target,
            weight_type=QuantType.QInt8,
            per_channel=True,
            op_types_to_quantize=operators,
            use_external_data_format=weights_file(source).is_file(),
        )
    finally:
        root.setLevel(level)

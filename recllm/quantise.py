"""Precision of a graph: half precision, 8-bit weights for causal models, dynamic int8 for encoders."""

import logging
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import onnx


def quantise(
    source: Path, target: Path, precision: Literal["fp32", "fp16", "int8"], causal: Mapping[str, Any] | None
) -> None:
    """Write `source` again in another precision.

    Args:
        source: a graph in float32.
        target: where the result is written.
        precision: fp32 copies.
        causal: keys of MatMulNBitsQuantizer for a causal model, whose activations must stay floats; None for an encoder
            or a small projection, which take dynamic int8 and nothing.
    """
    if precision == "fp32" or source.stem.endswith("-items"):
        shutil.copyfile(source, target)  # item projections are small, and every score of a new item hangs on them
    elif precision == "fp16":
        _half(source, target)
    elif causal is not None:
        _weights_only(source, target, causal)
    else:
        _dynamic(source, target)


def _half(source: Path, target: Path) -> None:
    from onnxruntime.transformers.float16 import convert_float_to_float16

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it names every weight too small for fp16; the gate judges the result
        model = convert_float_to_float16(onnx.load(source), keep_io_types=True, disable_shape_infer=True)
    onnx.save(model, target)


def _weights_only(source: Path, target: Path, keys: Mapping[str, Any]) -> None:
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    logging.getLogger("onnxruntime.quantization.matmul_nbits_quantizer").setLevel(logging.WARNING)
    quantizer = MatMulNBitsQuantizer(onnx.load(source), is_symmetric=True, **keys)
    quantizer.process()
    quantizer.model.save_model_to_file(str(target), use_external_data_format=False)


def _dynamic(source: Path, target: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # it advises pre-processing that the exporter has done already
    try:
        # Named, because left to itself it also rewrites opset 23's Attention into one that cannot be loaded.
        operators = ["MatMul", "Gemm", "Gather"]
        quantize_dynamic(source, target, weight_type=QuantType.QInt8, per_channel=True, op_types_to_quantize=operators)
    finally:
        root.setLevel(level)

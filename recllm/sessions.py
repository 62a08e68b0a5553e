"""ONNX Runtime's sessions: on exactly the provider that was asked for, or an error with the way out."""

from collections.abc import Mapping
from contextlib import redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path
from textwrap import shorten
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recllm.errors import RecllmError, require, unknown

WARNING, FATAL = 2, 4
"""ONNX Runtime's own numbers of severity; the first is its default."""
PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}

DEVICES = {"CPUExecutionProvider": "cpu"}
"""Where a provider's memory is, as ONNX Runtime names it; `ACCELERATOR` for all others."""
ACCELERATOR = "cuda"
SLOW_ON_CPU = ("SkipLayerNormFusion",)
"""Fusions that a CPU is better off without: the kernel for a sum and its layer norm takes about ten times as long as
the two kernels that it replaces (LOG.md)."""
INTEGERS = "integers.onnx"
"""One integer product, in bundles whose graphs have some: `check_integer_products` tries it."""
INTEGER_ROWS = 64
"""The width of its rows: whole registers of every processor."""


def open_session(path: Path | bytes, provider: str = "cpu", threads: int = 0) -> Any:  # noqa: ANN401  onnxruntime is untyped
    """Open a graph on exactly the provider asked for.

    Args:
        path: the graph, or what its file would hold.
        provider: cpu, cuda or tensorrt.
        threads: inside one operator; 0 leaves it to ONNX Runtime.

    Raises:
        RecllmError: ONNX Runtime is missing, or has not got the provider, or would fall back to another one.
    """
    ort = require("onnxruntime", "gpu", "Running a bundle")
    if provider not in PROVIDERS:
        raise unknown("provider", provider, PROVIDERS)
    wanted = PROVIDERS[provider]
    if wanted not in ort.get_available_providers():
        there = ", ".join(ort.get_available_providers())
        raise RecllmError(
            f"The provider '{provider}' is not in this ONNX Runtime (it has {there}). "
            'For cuda install "recllm[gpu]" and remove the package onnxruntime, or ask for the provider cpu.'
        )
    if provider != "cpu":
        _load_libraries(ort)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # warnings about unused initialisers say nothing to a user
    ort.set_default_logger_severity(FATAL)  # a provider that fails speaks on its own, and we say it below
    try:
        # Its Python wrapper would else go on with the CPU by itself, now and in later runs.
        given = path if isinstance(path, bytes) else str(path)
        session = ort.InferenceSession(
            given,
            options,
            providers=[wanted],
            enable_fallback=0,
            disabled_optimizers=SLOW_ON_CPU if provider == "cpu" else (),
        )
    except Exception as error:  # its exceptions share no class but this
        reason = shorten(str(error), 300, placeholder=" …")
        place = "a graph in memory" if isinstance(path, bytes) else str(path)
        if provider != "cpu":
            raise RecllmError(
                f"ONNX Runtime cannot open {place} with '{provider}': {reason}. Install what that provider needs, free "
                "memory on the device, or ask for the provider cpu."
            ) from None
        raise RecllmError(
            f"onnxruntime {ort.__version__} cannot open {place}: {reason}. Install a newer onnxruntime, or export the "
            "bundle again by a recipe with a lower opset."
        ) from None
    finally:
        ort.set_default_logger_severity(WARNING)
    if session.get_providers()[0] != wanted:
        # ONNX Runtime falls back to the CPU without a word when the provider's libraries cannot be loaded.
        raise RecllmError(
            f"ONNX Runtime could not load the libraries of '{provider}' and would have run on the CPU. "
            'Install CUDA and cuDNN for it (pip install "onnxruntime-gpu[cuda,cudnn]"; and TensorRT, for tensorrt), or '
            "ask for the provider cpu."
        )
    return session


@cache
def _load_libraries(ort: ModuleType) -> None:
    """Load CUDA's libraries where pip has put them: ONNX Runtime alone looks where the system has its own."""
    if hasattr(ort, "preload_dlls"):
        with redirect_stdout(StringIO()):  # it prints what it does not find, which may lie where the system has it
            ort.preload_dlls()


def check_integer_products(folder: Path, provider: str) -> None:
    """Try the largest integer product, where a bundle has any.

    Processors without VNNI add pairs of 8-bit products in 16 bits, which overflow: a graph would answer wrongly there,
    and say nothing.

    Args:
        folder: the bundle.
        provider: that is to run it.

    Raises:
        RecllmError: another provider than cpu, or a processor that adds them wrongly.
    """
    if not (folder / INTEGERS).exists():
        return
    way_out = "Export the run with another recipe as well (int8, fp16 or fp32), and load that bundle here."
    if provider != "cpu":
        raise RecllmError(
            f"'{folder}' has integer products, which ONNX Runtime has for a CPU only, not for '{provider}'. {way_out}"
        )
    if not integer_products_hold(folder / INTEGERS):
        raise RecllmError(
            f"'{folder}' has integer products, and this processor's overflow (it has no VNNI instructions): answers "
            f"would be wrong. {way_out}"
        )


def integer_products_hold(graph: Path | bytes) -> bool:
    """Whether this processor adds the largest integer product up rightly; `graph` is such a product."""
    rows = np.full((1, INTEGER_ROWS), 255, dtype=np.uint8)
    (found,) = open_session(graph, threads=1).run(None, {"rows": rows})
    # 255 stands for 127, times 127, in every place.
    return np.array_equal(found, np.full_like(found, 127.0 * 127.0 * INTEGER_ROWS))


def placed(session: Any, arrays: Mapping[str, NDArray[Any]]) -> dict[str, Any]:  # noqa: ANN401  onnxruntime is untyped
    """Arrays where a session computes, for `compute` to take in place of them: copied there once, not at every call.

    On a CPU nothing is copied, and the arrays must not be changed any more.
    """
    return {name: _value(own, _device(session)) for name, own in arrays.items()}


def compute(session: Any, feeds: Mapping[str, Any], *, stay: bool = False) -> list[Any]:  # noqa: ANN401
    """Run a graph on arrays and on what is already where it computes.

    Args:
        session: the graph.
        feeds: by input an array, or a value of `placed` or of an earlier call that `stay`s.
        stay: leave the outputs where the session computes, for a next graph there.

    Returns:
        The outputs in order: arrays, or ONNX Runtime's own values with `stay`, whose `numpy()` copies them back.
    """
    binding = session.io_binding()
    # As values: its binding of arrays does not know inputs that may be left out. They are held until the graph has run:
    # before onnxruntime 1.30 a binding did not, and the graph read what had been freed.
    held = {name: _value(own, "cpu") if isinstance(own, np.ndarray) else own for name, own in feeds.items()}
    for name, value in held.items():
        binding.bind_ortvalue_input(name, value)
    for output in session.get_outputs():
        binding.bind_output(output.name, _device(session) if stay else "cpu")
    session.run_with_iobinding(binding)
    found = list(binding.get_outputs())
    return found if stay else [value.numpy() for value in found]


def _value(array: NDArray[Any], device: str) -> Any:  # noqa: ANN401
    value = require("onnxruntime", "gpu", "Running a bundle").OrtValue
    return value.ortvalue_from_numpy(np.ascontiguousarray(array), device)


def _device(session: Any) -> str:  # noqa: ANN401
    return DEVICES.get(session.get_providers()[0], ACCELERATOR)

"""ONNX Runtime's sessions: on exactly the provider that was asked for, or an error with the way out."""

from pathlib import Path
from typing import Any

from recllm.errors import RecllmError, require, unknown

WARNING, FATAL = 2, 4
"""ONNX Runtime's own numbers of severity; the first is its default."""
PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}


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
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # warnings about unused initialisers say nothing to a user
    ort.set_default_logger_severity(FATAL)  # a provider that fails speaks on its own, and we say it below
    try:
        # Its Python wrapper would else go on with the CPU by itself, now and in later runs.
        given = path if isinstance(path, bytes) else str(path)
        session = ort.InferenceSession(given, options, providers=[wanted], enable_fallback=0)
    except Exception as error:  # its exceptions share no class but this
        reason = " ".join(str(error).split())[:300]
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
            "Install CUDA and cuDNN (and TensorRT, for tensorrt) for this onnxruntime-gpu, or ask for the provider cpu."
        )
    return session

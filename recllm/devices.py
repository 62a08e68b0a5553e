"""Where training runs: the processes that train together, the CPU or an accelerator, and the precision that is fast."""

import gc
import os
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from recllm.errors import RecllmError

PATIENCE = timedelta(days=7)
"""How long the other processes wait while the first one encodes items or scores; ten minutes are the default."""


def on_cpu() -> bool:
    """Whether training runs on the CPU: accelerate is told so, or there is no accelerator."""
    return parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()


def on_gpu() -> bool:
    """Whether models run on a GPU, in training and outside of it: there is one, and nobody said to keep off it."""
    return torch.cuda.is_available() and not on_cpu()


def free_memory() -> None:
    """Give a GPU back what nothing holds any more: nobody looks for it where memory runs out there."""
    if on_gpu():
        gc.collect()
        torch.cuda.empty_cache()


def process_state() -> PartialState:
    """The processes that train together, set up at the first call.

    Without an accelerator `PartialState` has to be told that it is on the CPU, else every process of a launcher takes
    itself for the only one.
    """
    return PartialState(cpu=on_cpu(), timeout=PATIENCE)


def sharding() -> str:
    """How the launcher shards what is trained over the processes: "fsdp", "zero2" …, or "none"."""
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return "fsdp"
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        return f"zero{os.environ.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', '')}"
    return "none"


def sharded() -> bool:
    """Whether the launcher shards what is trained over the processes (FSDP, DeepSpeed's ZeRO)."""
    return sharding() != "none"


def fast_bf16() -> bool:
    """Whether this machine multiplies bf16 in hardware (AMX or AVX-512 BF16); without it a CPU is slower in bf16."""
    if on_gpu():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def check_precision(keys: Mapping[str, Any]) -> None:
    """Check that Trainer's keys ask for no precision that this machine cannot train in.

    Raises:
        RecllmError: fp16 on a CPU.
    """
    if keys.get("fp16") and on_cpu():
        raise RecllmError(
            "fp16 needs an accelerator, for its gradients are scaled there, and training runs on the CPU. Take "
            'train.precision = "bf16", or leave it out.'
        )


def precision_keys(precision: str) -> dict[str, bool]:
    """Trainer's keys for a precision; `auto` is bf16 where it is fast."""
    if precision == "auto":
        precision = "bf16" if fast_bf16() else "fp32"
    return {"bf16": precision == "bf16", "fp16": precision == "fp16"}

"""Sharded training (FSDP2, ZeRO-3): weights that lie in parts on several processes, gathered whole and put back."""

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate.utils import DistributedType, parse_flag_from_env
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from recllm.adapters import AdapterRecipe
from recllm.devices import on_cpu, process_state
from recllm.errors import RecllmError
from recllm.lean import outermost_layers


def reshard(model: nn.Module) -> None:
    """Leave every process with its own parts only: what a pass has gathered last is kept for the way back, else."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole(value: Tensor) -> Tensor:
    """A weight without its gradient; one that lies in parts is gathered, for which all processes have to ask."""
    if hasattr(value, "ds_id"):
        with _gathered(value):
            return value.detach().clone()
    value = value.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value


def put(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Write whole weights into the parameters of their names; of one that lies in parts every process takes its own.

    All processes have to take part, with the same names.
    """
    reshard(model)
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in weights.items():
            kept = own[name]
            if hasattr(kept, "ds_id"):
                with _gathered(kept, by=0):
                    kept.copy_(value)
                continue
            if isinstance(kept, DTensor):
                value = distribute_tensor(value.to(kept.device), kept.device_mesh, kept.placements)
            kept.copy_(value)


def _gathered(value: Tensor, by: int | None = None) -> AbstractContextManager[Any]:
    """A weight of DeepSpeed's ZeRO-3, whole inside; what process `by` writes there is what all have afterwards."""
    import deepspeed  # type: ignore[import-not-found]  # no part of recllm: who trains with it has installed it

    gathered: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters([value], modifier_rank=by)
    return gathered


def check_shardable(
    recipe: AdapterRecipe | None, *, half: torch.dtype | None, compiled: bool, together: int = 1
) -> None:
    """Check, before any work, that what the launcher asks to shard can be.

    Args:
        recipe: the adapter's, None where only projections train.
        half: the dtype of autocast, None for float32.
        compiled: whether layers are to be compiled.
        together: rows of a user that are read behind one history.

    Raises:
        RecllmError: it cannot.
    """
    way_out = "Take --profile gpus"
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        old = os.environ.get("FSDP_VERSION", "1") != "2"
        if old or parse_flag_from_env("FSDP_CPU_RAM_EFFICIENT_LOADING"):
            what = "fsdp_version: 2" if old else "fsdp_cpu_ram_efficient_loading: false"
            raise RecllmError(f"Sharding by FSDP needs '{what}' in accelerate's configuration. Take --profile fsdp2.")
    if process_state().distributed_type in (DistributedType.NO, DistributedType.MULTI_CPU):
        here, other = ("there is none here", "cpu") if on_cpu() else ("one process trains on one", "gpu")
        raise RecllmError(f"Sharded training needs several accelerators, and {here}. Take --profile {other}.")
    if half == torch.float16:
        raise RecllmError(f'Sharded training has no fp16. {way_out}, or train.precision = "bf16".')
    if compiled:
        raise RecllmError("train.torch_compile has not been tried on sharded layers. Leave it out.")
    if together > 1:
        raise RecllmError(f"model.rows_together has not been tried on sharded layers. {way_out}, or leave it at 1.")
    if recipe is not None and recipe.quantization is not None:
        raise RecllmError(f"A quantised base model is not sharded. {way_out}, or a recipe like 'lora'.")
    if recipe is not None and recipe.tuner == "adalora":
        raise RecllmError(
            f"AdaLoRA counts ranks over whole matrices, and here they lie in parts. {way_out}, or 'lora'."
        )


def name_layers(model: nn.Module) -> None:
    """Tell accelerate which modules are gathered one after the other: the layers, named as transformers does."""
    names: Any = sorted({type(layer).__name__ for layer in outermost_layers(model)})
    model._no_split_modules = names

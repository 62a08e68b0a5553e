"""LoRA that starts from what 4 bits take away (LoftQ, Li et al. 2023): A and B make up for the rounding error."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import bitsandbytes as bnb
import peft
import torch
from peft.tuners.lora import Linear, Linear4bit
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

BITS, KEPT = "load_in_4bit", "llm_int8_skip_modules"
"""Keys of transformers' BitsAndBytesConfig: without the first there is nothing to start from; the second one names
layers that stay as they are, which `round_layers` does not know."""
FP4 = "fp4"
"""bitsandbytes' levels where a recipe names none."""
MORE, PASSES = 2, 4
"""Directions that are followed for one that is kept, and passes over them, of the randomised decomposition."""


@torch.no_grad()
def start_from_rounding(model: nn.Module, pretrained: Callable[[], nn.Module]) -> None:
    """Give the LoRA matrices beside 4-bit layers the best sum for the rounding error of those layers.

    Such a layer then is `round(W) + scaling · B A`, where `scaling · B A` is the singular value decomposition of
    `W - round(W)` cut to the adapter's rank: LoftQ's algorithm with one iteration, the one that leaves the quantised
    weights as they are. The decomposition is the randomised one (Halko et al. 2011), which takes a share of the time.

    Args:
        model: the quantised base model with LoRA modules, in place.
        pretrained: loads the base model in full precision once more; it takes that much memory, until it returns.
    """
    whole = pretrained()
    for name, module in _layers(model):
        if not isinstance(module, Linear4bit):
            continue
        stored = module.get_base_layer().weight
        rounded = bnb.functional.dequantize_4bit(stored.data, stored.quant_state)
        weight = _turned(whole.get_submodule(name), whole.get_parameter(f"{name}.weight").detach())
        _start(module, weight.to(rounded.device).float() - rounded.float())


@torch.no_grad()
def round_layers(model: nn.Module, rounding: Mapping[str, Any]) -> None:
    """Round the layers beside LoRA modules as 4 bits do, in full precision and in place.

    What was trained over a quantised base and has made up for its rounding error means the same over this one, for
    merging and scoring. LoRA's matrices are left for what was trained.

    Args:
        model: the base model in full precision with LoRA modules.
        rounding: the recipe's keys of transformers' BitsAndBytesConfig.
    """
    for _, module in _layers(model):
        layer = module.get_base_layer()
        codes, state = bnb.functional.quantize_4bit(
            _turned(layer, layer.weight.detach()).contiguous(),
            compress_statistics=rounding.get("bnb_4bit_use_double_quant", False),
            quant_type=rounding.get("bnb_4bit_quant_type", FP4),
        )
        layer.weight.data = _turned(layer, bnb.functional.dequantize_4bit(codes, state)).contiguous()


def _layers(model: nn.Module) -> Iterator[tuple[str, Linear | Linear4bit]]:
    """The adapted linear layers, by their names in the base model."""
    (found,) = (module for module in model.modules() if isinstance(module, peft.PeftModel))
    for name, module in found.get_base_model().named_modules():
        if isinstance(module, Linear | Linear4bit):
            yield name, module


def _turned(layer: nn.Module, weight: Tensor) -> Tensor:
    """A layer's weight as [out, in], or back: GPT-2's layers hold it the other way, and 4 bits never do."""
    return weight.T if isinstance(layer, Conv1D) else weight


def _start(module: Linear | Linear4bit, error: Tensor) -> None:
    least = min(error.shape)
    for adapter, rank in module.r.items():
        left, values, right = torch.svd_lowrank(error, q=min(MORE * rank, least), niter=PASSES)
        into, out = module.lora_A[adapter].weight, module.lora_B[adapter].weight
        # Of a rank beyond what the layer has, the rest starts as LoRA always does.
        found = min(rank, least)
        root = values[:found].sqrt()
        into[:found] = root[:, None] * right[:, :found].T
        out[:, :found] = left[:, :found] * root / module.scaling[adapter]

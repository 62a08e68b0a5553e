"""LoRA that starts from what 4 bits take away (LoftQ, Li et al. 2023): A and B make up for the rounding error."""

from collections.abc import Callable, Mapping
from typing import Any

import bitsandbytes as bnb
import peft
import torch
from peft.tuners.lora import Linear, Linear4bit
from torch import Tensor, nn

BITS = "load_in_4bit"
"""The key of transformers' BitsAndBytesConfig without which there is nothing to start from."""
FP4 = "fp4"
"""bitsandbytes' levels where a recipe names none."""


@torch.no_grad()
def start_from_rounding(model: nn.Module, pretrained: Callable[[], nn.Module], rounding: Mapping[str, Any]) -> None:
    """Give the LoRA matrices of a model the best sum for the rounding error of the layers that they stand beside.

    Such a layer then is `round(W) + scaling · B A`, where `scaling · B A` is the singular value decomposition of
    `W - round(W)` cut to the adapter's rank (LoftQ's algorithm with one iteration, the one that leaves the quantised
    weights as they are). A base model in full precision has its adapted layers rounded first, so that an adapter that
    was trained over the quantised one finds, for merging and scoring, the same weights there.

    Args:
        model: the base model with LoRA modules, in place.
        pretrained: loads the base model in full precision once more; asked where the one of `model` is quantised.
        rounding: the recipe's keys of transformers' BitsAndBytesConfig.
    """
    (found,) = (module for module in model.modules() if isinstance(module, peft.PeftModel))
    own = found.get_base_model()
    layers = {name: module for name, module in own.named_modules() if isinstance(module, Linear | Linear4bit)}
    quantised = any(isinstance(module, Linear4bit) for module in layers.values())
    whole = pretrained() if quantised else own
    for name, module in layers.items():
        base = module.get_base_layer()
        if isinstance(module, Linear4bit):
            weight = whole.get_parameter(f"{name}.weight").to(base.weight.device)
            rounded = bnb.functional.dequantize_4bit(base.weight.data, base.weight.quant_state)
        else:
            weight = base.weight.detach()
            rounded = base.weight.data = _rounded(weight, rounding)
        _start(module, weight.float() - rounded.float())


def _rounded(weight: Tensor, rounding: Mapping[str, Any]) -> Tensor:
    """A weight as it comes back from 4 bits, float32."""
    codes, state = bnb.functional.quantize_4bit(
        weight.contiguous(),
        compress_statistics=rounding.get("bnb_4bit_use_double_quant", False),
        quant_type=rounding.get("bnb_4bit_quant_type", FP4),
    )
    back: Tensor = bnb.functional.dequantize_4bit(codes, state)
    return back


def _start(module: Linear | Linear4bit, error: Tensor) -> None:
    left, values, right = torch.linalg.svd(error, full_matrices=False)
    for adapter, rank in module.r.items():
        root = values[:rank].sqrt()
        into, out = module.lora_A[adapter].weight, module.lora_B[adapter].weight
        into.copy_(root[:, None] * right[:rank])
        out.copy_(left[:, :rank] * root / module.scaling[adapter])

"""Lean passes of a model: frozen weights in half precision, cheap attention and dropout on a CPU, compiled layers.

None of them changes what is computed: under autocast a frozen weight, and what is multiplied with it, is rounded at
every use anyway; short attention is the same softmax in other kernels, and so is what is compiled; dropout draws other
random numbers, of the same distribution.
"""

import os
import shutil
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_layers import GradientCheckpointingLayer

from recllm.errors import RecllmError

NAME = "recllm_short"
SHORT = 192
"""Longest sequence that plain products attend to on a CPU; from about 200 tokens on the fused kernel is as fast."""
HIDDEN = "hidden_states"
ROUNDS = "recllm_rounds"
"""Marks a module whose input is rounded already."""
SPECIAL = ("softcap", "position_bias", "cache")
"""What some families hand to their attention, and only transformers' own function knows."""


def lean(model: nn.Module, kind: torch.dtype | None, *, cpu: bool) -> None:
    """Make a model with frozen parts cheaper to train.

    Args:
        model: what trains is left as it is.
        kind: the dtype of autocast; None where training is in float32.
        cpu: whether it trains on the CPU, where the fused attention's way back takes a third of a step.
    """
    if kind is not None:
        round_frozen(model, kind)
        _round_inputs_once(model, kind)
    if cpu:
        _draw_cheaply(model)
        for module in model.modules():
            # Falcon and others ask for "sdpa" by its name, and add up their masks in another way where it is not so.
            if not isinstance(module, PreTrainedModel) or not module._supports_attention_backend:
                continue
            if module.config._attn_implementation == "sdpa":
                module.config._attn_implementation = NAME


def round_frozen(model: nn.Module, kind: torch.dtype) -> None:
    """Keep the frozen linear layers in `kind`, the dtype of the autocast that they are used under: half the memory.

    DoRA computes with its layers' weights in full, so they stay.
    """
    kept = {module.base_layer for module in model.modules() if any(getattr(module, "use_dora", {}).values())}
    for module in model.modules():
        if type(module) is nn.Linear and module not in kept and not module.weight.requires_grad:
            module.weight.data = module.weight.data.to(kind)


def _round_inputs_once(model: nn.Module, kind: torch.dtype) -> None:
    """Round what attention and feed-forward layers are given once, and not for every linear layer inside of them.

    Those of a layer have four to seven, and twice as many with adapters, each with a copy of its own on the way there
    and back. Where a residual is added inside, as encoders do it, or adapters do something else with it than multiply,
    nothing is rounded.
    """
    for layer in model.modules():
        for part in layer.children() if isinstance(layer, GradientCheckpointingLayer) else ():
            kinds = {type(own) for own in part.modules()}
            tuners = [own for own in part.modules() if isinstance(own, BaseTunerLayer)]
            if nn.Linear not in kinds or nn.LayerNorm in kinds or not all(map(_only_multiplies, tuners)):
                continue
            for own in tuners:
                own.cast_input_dtype_enabled = False  # PEFT would make float32 of it, for autocast to round again
            if not hasattr(part, ROUNDS):
                part.register_forward_pre_hook(partial(_rounded, kind), with_kwargs=True)
                setattr(part, ROUNDS, True)


def _only_multiplies(tuner: nn.Module) -> bool:
    """Whether an adapter is LoRA's plain kind: DoRA, OFT and VeRA compute with what they are given."""
    return hasattr(tuner, "lora_A") and not any(getattr(tuner, "use_dora", {}).values())


def _rounded(
    kind: torch.dtype, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    hidden = args[0] if args else kwargs.get(HIDDEN)
    if not isinstance(hidden, Tensor) or hidden.dtype != torch.float32:
        return args, kwargs
    if not torch.is_autocast_enabled(hidden.device.type):
        return args, kwargs
    return ((hidden.to(kind), *args[1:]), kwargs) if args else (args, kwargs | {HIDDEN: hidden.to(kind)})


class CheapDropout(nn.Dropout):
    """Dropout with four entries to a random number.

    On a CPU torch draws one for each, on one thread: with adapters on all linear layers that takes longer than their
    products. The share that is dropped is a multiple of 2^−16.
    """

    def forward(self, input: Tensor) -> Tensor:
        """float[…], entries zero with probability `p` and the others scaled by 1 / (1 − p), in training."""
        if not self.training or self.p == 0.0 or input.device.type != "cpu":
            return super().forward(input)
        drawn = torch.empty((input.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
        parts = drawn.view(torch.int16)[: input.numel()].view(input.shape)
        # In the dtype of the input at once: a mask of bools would be one pass more.
        kept = torch.ge(parts, round(self.p * 2**16) - 2**15, out=torch.empty(input.shape, dtype=input.dtype))
        return input * kept.mul_(1.0 / (1.0 - self.p))


def _draw_cheaply(model: nn.Module) -> None:
    for module in model.modules():
        if type(module) is nn.Dropout and not module.inplace and module.p < 1.0:
            module.__class__ = CheapDropout


def compile_layers(model: nn.Module, *, cpu: bool, backend: str = "inductor", mode: str | None = None) -> None:
    """Compile the layers of a model's bodies in place, once for all of them and for all lengths.

    Layers and not whole models: they are alike, so that one is compiled and not thirty, and what is around them (the
    catalogue's softmax, adapters' budgets) stays as it is. Nothing is renamed, so checkpoints stay what they are.

    Args:
        model: its outermost lists of modules are the layers.
        cpu: whether it trains on the CPU, where compiling needs a C++ compiler.
        backend: of torch.compile.
        mode: of torch.compile.

    Raises:
        RecllmError: there is no compiler, or nothing to compile.
    """
    compiler = os.environ.get("CXX", "g++")
    if cpu and backend == "inductor" and shutil.which(compiler) is None:
        raise RecllmError(
            f"train.torch_compile needs a C++ compiler on a CPU, and there is no '{compiler}'. Install one (CXX names "
            "another), or leave the key out."
        )
    layers = list(outermost_layers(model))
    if not layers:
        raise RecllmError("train.torch_compile found no layers in this model. Leave it out.")
    # Dynamo gives up after a few models in one process, as a search trains them: each begins anew.
    torch.compiler.reset()
    for layer in layers:
        # Dynamic from the start: else the first two lengths are compiled anew, and a training that goes on from a
        # checkpoint meets them in another order, and rounds otherwise.
        layer.compile(dynamic=True, backend=backend, mode=mode)


def outermost_layers(module: nn.Module) -> Iterator[nn.Module]:
    """The layers of a model's bodies: what stands in lists of modules that are in no other list."""
    for own in module.children():
        if isinstance(own, nn.ModuleList):
            yield from own
        else:
            yield from outermost_layers(own)


def short_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **given: Any,  # noqa: ANN401
) -> tuple[Tensor, None]:
    """Attention in transformers' interface: plain products for short sequences that train, else the fused kernel.

    Args:
        module: the layer, which may say `is_causal`.
        query: float[batch, heads, length, width].
        key: float[batch, key-value heads, length, width].
        value: the same.
        attention_mask: bool or float[batch, 1, length, length], or None.
        dropout: share of attention weights that are dropped.
        scaling: of the products; one over the root of the width where it is None.
        is_causal: whether a mask of None stands for a causal one.
        given: what the family adds.

    Returns:
        float[batch, length, heads, width], and None for the weights.
    """
    length, special = query.shape[2], any(given.get(name) is not None for name in SPECIAL)
    if special or dropout or length > SHORT or length != key.shape[2] or not torch.is_grad_enabled():
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, is_causal, **given)
    batch, heads, _, width = query.shape
    groups = heads // key.shape[1]
    if attention_mask is None and (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        attention_mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()[None, None]
    # The query heads of a key-value head are further rows of one product, so that nothing is repeated.
    rows = (query * (width**-0.5 if scaling is None else scaling)).reshape(batch, -1, groups * length, width)
    scores = rows @ key.transpose(2, 3)
    if attention_mask is not None:
        mask = attention_mask.repeat(1, 1, groups, 1) if attention_mask.shape[1] == 1 else attention_mask
        mask = mask.reshape(mask.shape[0], -1, groups * length, length)
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    mixed = (weights @ value).reshape(batch, heads, length, -1)
    return mixed.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, short_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)

"""A causal model turned so that what its layers read has no outliers, and says the same (QuaRot, Ashkboos et al. 2024).

A few numbers of the residual stream are a hundred times larger than the rest, and whoever rounds a row by its largest
number loses the others. An orthogonal matrix spreads them over all places: it is folded into the weights on both
sides, so that nothing is computed in addition. What an attention head mixes is turned in the same way. In front of a
down projection there is a product of two branches, through which nothing can be folded: there a Hadamard matrix of
small blocks is multiplied with, and its inverse is in the weights.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from recllm.cascade import pretrained
from recllm.relevance import RelevanceModel

BLOCK = 32
"""Places that a Hadamard matrix in front of a down projection mixes: a twentieth of the projection's own work."""
SAME = 1e-3
"""Largest difference of hidden states, as a share of the largest one, that rounding explains."""


class TurnedProjection(nn.Module):
    """A projection behind a Hadamard matrix of blocks, which its weights undo."""

    def __init__(self, projection: nn.Linear, block: int) -> None:
        super().__init__()
        matrix = hadamard(block)
        self.hadamard = nn.Linear(block, block, bias=False)
        self.hadamard.weight = nn.Parameter(matrix)
        self.projection = projection
        turned = projection.weight.detach().view(len(projection.weight), -1, block) @ matrix.T
        self.projection.weight = nn.Parameter(turned.reshape(projection.weight.shape))

    def forward(self, hidden: Tensor) -> Tensor:
        """float[…, width] to float[…, out], as the projection alone."""
        blocks = self.hadamard(hidden.view(*hidden.shape[:-1], -1, self.hadamard.in_features))
        result: Tensor = self.projection(blocks.view(hidden.shape))
        return result


def hadamard(size: int) -> Tensor:
    """Sylvester's orthogonal matrix of ±size^−½, float32[size, size]; the size is a power of two."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    result: Tensor = matrix / size**0.5
    return result


def turned(model: RelevanceModel, seed: int = 0) -> RelevanceModel | None:
    """A turned copy of a causal relevance model on the CPU; None where its family is not built as is known here.

    Known are layers like Llama's (Qwen, Mistral, SmolLM): norms by the root mean square in front of attention and of a
    gated layer. Whether the copy says the same is tried on a few tokens, so that a family that looks alike and adds
    something of its own is left as it is.
    """
    made = copy.deepcopy(model).cpu().float().eval()
    ids = torch.arange(1, 24)[None]
    try:
        with torch.no_grad():
            expected = pretrained(made.body)(input_ids=ids, use_cache=False).last_hidden_state
            answers = made.answer(expected)
            _turn(made, torch.Generator().manual_seed(seed))
            found = made.answer(pretrained(made.body)(input_ids=ids, use_cache=False).last_hidden_state)
    except (AttributeError, IndexError, RuntimeError, TypeError):  # a part that is not there, or has another shape
        return None
    return made if (found - answers).abs().max() <= SAME * answers.abs().max() else None


def _turn(model: RelevanceModel, random: torch.Generator) -> None:
    """Turn the model in place; it is spoilt where this raises."""
    body: Any = pretrained(model.body)
    width = body.embed_tokens.weight.shape[1]
    stream = _orthogonal(width, random)
    body.embed_tokens.weight = nn.Parameter(body.embed_tokens.weight @ stream)
    for layer in body.layers:
        attention, gated = layer.self_attn, layer.mlp
        heads = _orthogonal(attention.head_dim, random)
        for own in (attention.q_proj, attention.k_proj, attention.v_proj):
            _reads(own, layer.input_layernorm.weight, stream)
        for own in (gated.gate_proj, gated.up_proj):
            _reads(own, layer.post_attention_layernorm.weight, stream)
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight = nn.Parameter(torch.ones_like(norm.weight))
        _writes(attention.v_proj, heads)
        mixed = attention.o_proj.weight.view(width, -1, len(heads)) @ heads
        attention.o_proj.weight = nn.Parameter(mixed.reshape(attention.o_proj.weight.shape))
        _writes(attention.o_proj, stream)
        _writes(gated.down_proj, stream)
        block = BLOCK
        while gated.down_proj.in_features % block:
            block //= 2
        gated.down_proj = TurnedProjection(gated.down_proj, block)
    direction: Any = model.difference.direction
    model.difference.direction = (direction * body.norm.weight) @ stream
    body.norm.weight = nn.Parameter(torch.ones_like(body.norm.weight))


def _orthogonal(size: int, random: torch.Generator) -> Tensor:
    """float32[size, size], drawn evenly from all orthogonal matrices."""
    q, r = torch.linalg.qr(torch.randn(size, size, generator=random, dtype=torch.float64))
    result: Tensor = (q * torch.sign(torch.diagonal(r))).float()
    return result


def _reads(layer: nn.Linear, norm: Tensor, stream: Tensor) -> None:
    """Let a layer read the turned stream, behind a norm without weights."""
    layer.weight = nn.Parameter((layer.weight * norm) @ stream)


def _writes(layer: nn.Linear, turn: Tensor) -> None:
    """Let a layer write turned: all of its outputs, or every head's."""
    parts = layer.weight.view(-1, len(turn), layer.in_features)
    layer.weight = nn.Parameter((turn.T @ parts).reshape(layer.weight.shape))
    if layer.bias is not None:
        layer.bias = nn.Parameter((layer.bias.view(-1, len(turn)) @ turn).reshape(layer.bias.shape))

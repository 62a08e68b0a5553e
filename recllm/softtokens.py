"""Soft tokens: items as single tokens behind a language model's vocabulary, made of their text vectors and factors.

A relevance prompt then names each item twice, by its words and by one token that says what its text vector and its
factors say (as CoLLM does it with factors alone, Zhang et al. 2023). As they are ids like any other, prompts, batches,
shared prefixes and graphs stay what they are.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from recllm.sequence import ItemProjection, drop_factors
from recllm.vectors import ItemFeatures


class SoftTokens(nn.Module):
    """Input embeddings of words, and behind them one of each item, projected from its vectors.

    Args:
        words: the model's own embeddings.
        features: the items' text vectors and factors.
        scale: root mean square that an item's embedding starts with, that of words.
        factor_dropout: share of item tokens that lose their factors in a training step, so that text learns to stand
            alone.
    """

    def __init__(self, words: nn.Module, features: ItemFeatures, scale: float, factor_dropout: float = 0.0) -> None:
        super().__init__()
        self.factor_dropout = factor_dropout
        self.words, self.first = words, int(words.num_embeddings)  # type: ignore[arg-type]
        width = int(words.embedding_dim)  # type: ignore[arg-type]
        self.items = ItemProjection(features.text.shape[1], features.factors.shape[1], width, scale)
        # Not persistent: the vectors are saved once for all models of a run.
        self.register_buffer("text_vectors", torch.from_numpy(features.text), persistent=False)
        self.register_buffer("item_factors", torch.from_numpy(features.factors), persistent=False)
        self.register_buffer("baked", None, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Embeddings float[…, width] of int64[…]; from `first` on, ids are rows of items."""
        words, soft = self.words(ids.clamp(max=self.first - 1)), ids >= self.first
        if self.baked is not None:
            items = nn.functional.embedding((ids - self.first).clamp(min=0), self.baked)
            return torch.where(soft[..., None], items.to(words.dtype), words)
        rows = ids[soft] - self.first
        factors: Tensor = self.item_factors[rows]  # type: ignore[index]
        if self.training:
            factors = drop_factors(factors, self.factor_dropout)
        items = self.items(self.text_vectors[rows], factors)  # type: ignore[index]
        return words.masked_scatter(soft[..., None], items.to(words.dtype))

    @torch.no_grad()
    def bake(self) -> None:
        """Make every item's embedding once, and for good: for a model that is not trained any more."""
        self.baked = self.items(self.text_vectors, self.item_factors)


def add_soft_tokens(body: nn.Module, features: ItemFeatures, scale: float, factor_dropout: float = 0.0) -> int:
    """Put soft tokens behind the vocabulary of a model, in place; they train.

    Returns:
        The id of the first item's token.
    """
    model = next(module for module in body.modules() if isinstance(module, PreTrainedModel))
    embeddings = model.get_input_embeddings()
    soft = SoftTokens(embeddings, features, scale, factor_dropout)
    model.set_input_embeddings(soft.to(embeddings.weight.device))  # a quantised model lies on its GPU already
    return soft.first


def bake_soft_tokens(body: nn.Module) -> None:
    """Make the item embeddings of a model once, where it has soft tokens."""
    for module in body.modules():
        if isinstance(module, SoftTokens):
            module.bake()

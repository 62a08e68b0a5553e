"""The vectors by which a next-item model ranks items: its own, and for new items what the like of them tell."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from recllm.likeness import TOLD_OF, LikenessRidge, ToldVectors, shrinkage
from recllm.neighbours import Neighbours
from recllm.sequence import NextItemModel


@dataclass(frozen=True, eq=False)
class ItemHeads:
    """What a catalogue is ranked by.

    Attributes:
        items: heads float32[items, head]; NaN for an item with neither text nor factors.
        bias: float32[items].
        new: both as they would be if no item had events, float32[items, head + 1]; NaN where nothing is known.
        shrinkage: what told heads were multiplied by (`likeness.shrinkage`); 1 where no regression tells any.
    """

    items: NDArray[np.float32]
    bias: NDArray[np.float32]
    new: NDArray[np.float32]
    shrinkage: float


@torch.inference_mode()
def item_heads(model: NextItemModel) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Item vectors float32[items, head] (NaN for an item with neither text nor factors) and bias float32[items]."""
    heads = model.heads(model.text_vectors, model.factors())
    unknown = torch.isnan(model.text_vectors[:, 0]) & torch.isnan(model.item_factors[:, 0])  # type: ignore[index]
    heads = torch.where(unknown[:, None], torch.nan, heads)
    bias = model.biases(model.item_factors)  # type: ignore[arg-type]
    return heads.float().cpu().numpy(), bias.float().cpu().numpy()


@torch.inference_mode()
def text_heads(model: NextItemModel) -> NDArray[np.float32]:
    """Item vectors and bias from text alone, as of items without events: float32[items, head + 1], NaN without text."""
    text: torch.Tensor = model.text_vectors  # type: ignore[assignment]
    heads = model.heads(text, torch.full_like(model.factors(), torch.nan))
    heads = torch.cat([heads, model.cold_bias.expand(len(heads), 1)], dim=1)
    return torch.where(torch.isnan(text[:, :1]), torch.nan, heads).float().cpu().numpy()


def borrowed_heads(model: NextItemModel, lender: Neighbours | LikenessRidge | None) -> ItemHeads:
    """Item vectors with those of items without events as the items like them tell.

    A new item's own head, made from its text alone, ranks far worse among new items than the mean of its neighbours'
    heads, and that one worse than the head of the text vector and the factors that regression on the likeness of all
    items tells (LOG.md): the model has few items to learn from what text means, and learns them by heart. Its own is
    kept where an item is like no other.

    Args:
        model: trained.
        lender: what tells new items' heads; None where nothing does, and all have their own.
    """
    heads, bias = item_heads(model)
    whole, new, smaller = np.concatenate([heads, bias[:, None]], axis=1), text_heads(model), 1.0
    if lender is None:
        return ItemHeads(heads, bias, new, smaller)
    if isinstance(lender, Neighbours):
        borrowed = lender.means(whole, np.arange(len(whole)))
    else:
        borrowed = _told(model, lender)
        smaller = shrinkage(heads[lender.known], borrowed[lender.known, :-1]) if lender.shrunk else 1.0
        borrowed[:, :-1] *= smaller
    new = np.where(np.isnan(borrowed), new, borrowed)
    whole = np.where(lender.known[:, None], whole, new)
    return ItemHeads(whole[:, :-1], whole[:, -1], new, smaller)


@torch.inference_mode()
def _told(model: NextItemModel, ridge: LikenessRidge) -> NDArray[np.float32]:
    """Heads and bias of every item as those like it tell them, float32[items, head + 1]; NaN where nothing is alike."""
    rows = np.arange(len(ridge.operator))
    told = {part: torch.from_numpy(ridge.means(own, rows)) for part, own in _tellable(model).items()}
    factors, bias = torch.cat([told["factors"], told["own"][:, :-1]], dim=1), told["own"][:, -1:]
    device = model.text_vectors.device
    heads = model.heads(told["text"].to(device), factors.to(device)).float().cpu()  # type: ignore[arg-type]
    return torch.where(bias.isnan(), torch.nan, torch.cat([heads, bias], dim=1)).numpy()


def told_later(model: NextItemModel, ridge: LikenessRidge, smaller: float) -> ToldVectors:
    """What tells the heads and biases of items that come later, whose heads are multiplied by `smaller` like others."""
    return ToldVectors({part: ridge.dual(own) for part, own in _tellable(model).items()}, smaller)


@torch.inference_mode()
def _tellable(model: NextItemModel) -> dict[str, NDArray[np.float32]]:
    """What a model makes heads and biases of, float32[items, width] each; what is told of new items, by `TOLD_OF`."""
    fixed: Any = model.item_factors
    own = torch.cat([model.factors()[:, fixed.shape[1] :], model.biases(fixed)[:, None]], dim=1)
    given: tuple[Any, ...] = (model.text_vectors, fixed, own)
    return {part: own.float().cpu().numpy() for part, own in zip(TOLD_OF, given, strict=True)}

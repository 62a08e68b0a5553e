"""Cross-entropy over a whole catalogue, a few rows of logits at a time, with the gradients made on the way.

The logits of a step are its largest tensor by far: a thousand histories' ends times every item. Made in one piece, they
are written and read a dozen times between memory and processor, and several copies are kept for the way back. In pieces
that fit into the cache nothing of them is kept (as Liger Kernel's fused linear cross-entropy does it, Hsu et al. 2024):
the gradient of a softmax is known with its loss.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

CELLS_AT_ONCE = 1 << 20, 1 << 26
"""Logits of a piece, on a CPU, where they should stay in the cache, and on a GPU, which wants large products."""
ROWS_AT_LEAST = 128
"""Rows of a piece, however many items there are: each piece reads all items' vectors."""
DRAWN_BY = 0.75
"""Negatives are drawn by their events to this power (Mikolov et al. 2013)."""


class Targets(NamedTuple):
    """What each row should choose: items, int64[rows, targets], with shares, float32[rows, targets].

    A row with fewer names its first one again with a share of 0.
    """

    items: Tensor
    shares: Tensor


class Barred(NamedTuple):
    """What is left out of the softmax: pairs of the row of a query and an item, int64[pairs] each, rows ascending."""

    rows: Tensor
    items: Tensor


def draw_odds(counts: Tensor) -> Tensor:
    """The chance of each item in one draw, float64[items], by its `counts` of events; 0 for an item without any."""
    weights = counts.double() ** DRAWN_BY
    return weights / weights.sum()


def draw_negatives(odds: Tensor, draws: int) -> tuple[Tensor, Tensor]:
    """Draw items with replacement, and keep each once.

    Args:
        odds: float64[items], the chance of each in one draw.
        draws: how many.

    Returns:
        The items, int64[drawn], ascending, and the chance of each to be among them, float32[drawn].
    """
    drawn = torch.multinomial(odds, draws, replacement=True).unique()  # type: ignore[no-untyped-call]
    return drawn, -torch.expm1(draws * torch.log1p(-odds[drawn])).float()


def catalogue_loss(
    queries: Tensor,
    heads: Tensor,
    bias: Tensor,
    targets: Targets,
    barred: Barred,
    *,
    offset: Tensor | None = None,
    ranks: bool = False,
) -> tuple[Tensor, Tensor]:
    """Sum of the cross-entropies of `targets` under softmax(queries · heads + bias), without the barred items.

    With an `offset` of −log of the chance with which an item was drawn, the sum over all items is estimated without
    bias by those that were (importance sampling, Bengio & Senécal 2003), a row's targets standing for themselves.

    Args:
        queries: float[rows, width].
        heads: float[items, width].
        bias: float32[items]; −∞ leaves an item out for all rows.
        targets: what each row should choose; it stays in though it is barred.
        barred: items that are left out of single rows.
        offset: float32[items], added to the logits of all items that are no targets of a row; −∞ leaves one out.
        ranks: whether to rank the targets as well.

    Returns:
        The sum, float32[], and the rank of each row's first target among its items, a tie counting half; float32[rows],
        empty where `ranks` are not asked for.
    """
    return _CatalogueLoss.apply(queries, heads, bias, targets, barred, offset, ranks)  # type: ignore[no-any-return, no-untyped-call]


class _CatalogueLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        queries: Tensor,
        heads: Tensor,
        bias: Tensor,
        targets: Targets,
        barred: Barred,
        offset: Tensor | None,
        ranks: bool,
    ) -> tuple[Tensor, Tensor]:
        rows, items = barred
        back = any(ctx.needs_input_grad[:3])
        kinds = queries.dtype, heads.dtype, bias.dtype
        if torch.is_autocast_enabled(queries.device.type):
            kind = torch.get_autocast_dtype(queries.device.type)
            # Gradients are scaled behind the loss, and what is made here would vanish in fp16 before that; and rounded
            # logits would tie what ranks tell apart.
            kind = torch.float32 if ranks or kind == torch.float16 else kind
            queries, heads = queries.to(kind), heads.to(kind)
        else:
            heads = heads.to(queries.dtype)
        total, places = bias.new_zeros(()), bias.new_zeros(len(queries) if ranks else 0)
        by_query, by_head = torch.zeros_like(queries), torch.zeros_like(heads, dtype=torch.float32)
        by_bias = torch.zeros_like(bias)
        at_once = max(ROWS_AT_LEAST, CELLS_AT_ONCE[queries.is_cuda] // len(heads))
        starts = torch.arange(0, len(queries), at_once, device=rows.device)
        bounds = [*torch.searchsorted(rows, starts).tolist(), len(rows)]
        with torch.autocast(queries.device.type, enabled=False):
            for number, start in enumerate(range(0, len(queries), at_once)):
                here = slice(start, start + at_once)
                part, own, shares = queries[here], targets.items[here], targets.shares[here]
                logits = (part @ heads.T).float().add_(bias)
                wanted = logits.gather(1, own)
                if offset is not None:
                    logits += offset
                pairs = slice(bounds[number], bounds[number + 1])
                logits[rows[pairs] - start, items[pairs]] = -torch.inf
                logits.scatter_(1, own, wanted)
                if ranks:
                    first = wanted[:, :1]
                    ties = (logits == first).sum(1).float() - 1.0
                    places[here] = 1.0 + (logits > first).sum(1).float() + ties / 2.0
                top = logits.amax(1, keepdim=True)
                mass = logits.sub_(top).exp_().sum(1, keepdim=True)
                weight = shares.sum(1, keepdim=True)
                total += ((mass.log() + top) * weight).sum() - (shares * wanted).sum()
                if not back:
                    continue
                slopes = logits.mul_(weight / mass).scatter_add_(1, own, -shares)
                by_bias += slopes.sum(0)
                slopes = slopes.to(part.dtype)
                by_query[here] = slopes @ heads
                by_head += (slopes.T @ part).float()
        if back:
            ctx.save_for_backward(by_query.to(kinds[0]), by_head.to(kinds[1]), by_bias.to(kinds[2]))
        ctx.mark_non_differentiable(places)
        return total, places

    @staticmethod
    def backward(ctx: Any, slope: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        by_query, by_head, by_bias = ctx.saved_tensors
        return by_query * slope, by_head * slope, by_bias * slope, None, None, None, None

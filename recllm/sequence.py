"""Next-item models over item vectors: the shared loss and item projections, and the light causal transformer."""

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from recllm.askedat import PARTS
from recllm.softmax import Barred, Targets, catalogue_loss, draw_negatives, draw_odds
from recllm.vectors import ItemFeatures

IGNORED = -100
START_SCALE = 10.0
"""What the cosines of histories and items are multiplied by before training; one over the softmax's temperature."""
LEARNT_START = 0.1
"""Standard deviation of what an item's learnt vector starts with; text vectors and factors have about 1."""


class ItemProjection(nn.Module):
    """Project an item's text vector and factors into one vector; a missing part adds nothing of its own.

    Args:
        text_width: width of the text vectors.
        factor_width: width of the factors; 0 for none.
        width: width of the result.
        scale: root mean square that the result starts with; None brings it to unit length, for a cosine.
    """

    def __init__(self, text_width: int, factor_width: int, width: int, scale: float | None) -> None:
        super().__init__()
        self.text = nn.Linear(text_width, width)
        self.factors = nn.Linear(max(factor_width, 1), width, bias=False)
        self.cold = nn.Parameter(torch.zeros(width))  # what stands in for the factors of an item without events
        self.gain = None if scale is None else nn.Parameter(torch.full((width,), scale))

    def forward(self, text: Tensor, factors: Tensor) -> Tensor:
        """Project float32[items, text] and float32[items, factors], NaN rows for missing, to float32[items, width]."""
        has_text = ~torch.isnan(text[:, :1])
        has_factors = ~torch.isnan(factors[:, :1])
        result = self.text(torch.where(has_text, text, 0.0))
        result = result + torch.where(has_factors, self.factors(torch.where(has_factors, factors, 0.0)), self.cold)
        if self.gain is None:
            return functional.normalize(result, dim=-1)
        return functional.rms_norm(result, (result.shape[-1],), self.gain, 1e-6)


def drop_factors(factors: Tensor, share: float) -> Tensor:
    """Factors float32[items, width] of which a random share of the items has lost theirs (NaN rows)."""
    if share == 0.0:
        return factors
    return torch.where(torch.rand(len(factors), 1, device=factors.device) >= share, factors, torch.nan)


class Drift(nn.Module):
    """What is added to every query by when it is asked, so that what people turn to may change with time.

    One vector at each end of a stretch of the training time, and in between on the straight line from one to the next.
    All stretches have as many events. It starts at zero, where time makes no difference.
    """

    def __init__(self, stretches: int, width: int) -> None:
        super().__init__()
        self.ends = nn.Parameter(torch.zeros(stretches + 1, width))

    def forward(self, asked: Tensor | None) -> Tensor:
        """Of int64[...], in `PARTS` of the training time, float32[..., width]; None asks now, at its end."""
        if asked is None:
            return self.ends[-1]
        place = asked.float() * ((len(self.ends) - 1) / PARTS)
        first = place.long().clamp(max=len(self.ends) - 2)
        return torch.lerp(self.ends[first], self.ends[first + 1], (place - first)[..., None])


class RelativePositions(nn.Module):
    """What every attention head adds for how far back a place lies, one learnt number each.

    The bias of T5 (Raffel et al. 2020, "Exploring the Limits of Transfer Learning with a Unified Text-to-Text
    Transformer"), with every distance by itself, as the histories of a light scorer are short.
    """

    def __init__(self, positions: int, heads: int) -> None:
        super().__init__()
        self.bias = nn.Embedding(positions, heads)
        nn.init.zeros_(self.bias.weight)

    def forward(self, length: int) -> Tensor:
        """For every place and the one that it looks at, float32[heads, length, length]; −inf for what comes later."""
        places = torch.arange(length, device=self.bias.weight.device)
        back = places[:, None] - places
        bias = self.bias(back.clamp(min=0)).permute(2, 0, 1)
        return bias.masked_fill(back < 0, -torch.inf)


class LightBody(nn.Module):
    """A small pre-norm causal transformer over item tokens (SASRec, Kang & McAuley 2018, with full softmax).

    Args:
        width: of its hidden states.
        layers: how many.
        heads: of the attention.
        positions: the most tokens that are read.
        dropout: in every layer.
        relative: whether every layer also learns how much each distance between two places counts.
        gated: whether every layer gates what its attention has mixed.
    """

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        positions: int,
        dropout: float,
        *,
        relative: bool = False,
        gated: bool = False,
    ) -> None:
        super().__init__()
        self.position = nn.Embedding(positions, width)
        nn.init.normal_(self.position.weight, std=0.02)
        near = positions if relative else 0
        self.blocks = nn.ModuleList(LightBlock(width, heads, dropout, near, gated=gated) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        """Hidden states float32[batch, length, width] of item tokens of the same shape; right padding is harmless."""
        hidden = self.dropout(tokens + self.position(torch.arange(tokens.shape[1], device=tokens.device)))
        for block in self.blocks:
            hidden = block(hidden)
        result: Tensor = self.norm(hidden)
        return result


class LightBlock(nn.Module):
    """Causal self-attention and a feed-forward layer, each behind a layer norm with a residual around it.

    With `positions`, the most places that it sees, attention also learns how much their distance counts. With `gated`,
    what it has mixed is normed and multiplied by a gate of what it stands beside, as in HSTU (Zhai et al. 2024,
    "Actions Speak Louder than Words"), whose other parts it does without.
    """

    def __init__(self, width: int, heads: int, dropout: float, positions: int = 0, *, gated: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.norm_in, self.norm_mid = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)
        self.relative = RelativePositions(positions, heads) if positions else None
        self.gate = nn.Linear(width, width) if gated else None
        self.norm_mixed = nn.LayerNorm(width) if gated else nn.Identity()

    def forward(self, hidden: Tensor) -> Tensor:
        """One layer on float32[batch, length, width]."""
        batch, length, width = hidden.shape
        normed = self.norm_in(hidden)
        qkv = self.qkv(normed).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each (batch, heads, length, width / heads)
        # No dropout inside the attention: it would cost the fused kernel, and a fifth of a step's time on a CPU.
        bias = None if self.relative is None else self.relative(length).to(query.dtype)
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, is_causal=bias is None)
        mixed = mixed.transpose(1, 2).reshape(batch, length, width)
        if self.gate is not None:
            mixed = self.norm_mixed(mixed) * functional.silu(self.gate(normed))
        hidden = hidden + self.dropout(self.out(mixed))
        return hidden + self.dropout(self.down(functional.gelu(self.up(self.norm_mid(hidden)))))


class NextItemModel(nn.Module):
    """Predict the next item at the end of every item of a history, over the whole catalogue at once.

    A history is a row of ids into a *table* of input vectors: first the `lead` (vectors of the words before the
    history, or the whole vocabulary when histories are text), then one token per item. Histories and items are compared
    by their cosine with a learnt scale: with plain dot products the items' lengths learn popularity a second time,
    beside the bias, and ranking suffers (LOG.md has the figures). Items without a training event are left out of the
    softmax, so that they are not learnt as negatives.

    Args:
        body: maps float32[batch, length, width] to hidden states of the same shape, causally.
        features: the item vectors; their number of rows is the number of classes.
        width: hidden width of the body.
        head_width: width of the space in which histories and items are compared.
        warm: bool[items], the items that have training events.
        token_scale: root mean square of an item token (that of the body's own embeddings).
        lead: gives float32[rows, width], the table's rows before the items.
        factor_dropout: share of items that lose their factors in a training step, so that text learns to stand alone.
        counts: int64[items], training events, by which negatives are drawn.
        negatives: items that are drawn in a training step, in place of all; 0, or as many as there are, takes all. What
            a step costs then hardly grows with the catalogue: but for drawing, and the steps of what is learnt of each
            item, its bias and its vector.
        repeats: whether what a window has shown may come again.
        drift: stretches of the training time in which people may turn to something else; 0 for none.
        learnt: width of a vector of its own that every item with factors learns beside them; 0 for none.
    """

    def __init__(
        self,
        body: nn.Module,
        features: ItemFeatures,
        *,
        width: int,
        head_width: int,
        warm: NDArray[np.bool_],
        token_scale: float,
        lead: Callable[[], Tensor] | None = None,
        factor_dropout: float = 0.0,
        counts: NDArray[np.int64] | None = None,
        negatives: int = 0,
        repeats: bool = False,
        drift: int = 0,
        learnt: int = 0,
    ) -> None:
        super().__init__()
        self.body, self.repeats = body, repeats
        text_width, factor_width = features.text.shape[1], features.factors.shape[1] + learnt
        self.tokens = ItemProjection(text_width, factor_width, width, token_scale)
        self.heads = ItemProjection(text_width, factor_width, head_width, None)
        self.query = nn.Linear(width, head_width)
        self.drift = Drift(drift, head_width) if drift else None
        # Vectors of one and no scalars: what is sharded over processes needs an axis to be cut along.
        self.log_scale = nn.Parameter(torch.tensor([math.log(START_SCALE)]))
        self.bias = nn.Parameter(torch.zeros(len(features.index)))
        self.cold_bias = nn.Parameter(torch.zeros(1))  # of an item without factors: what learns of events learns none
        # One for both sides, as SASRec has; joined to the factors, so that an item loses both or none.
        start = torch.randn(len(features.index), learnt) * LEARNT_START if learnt else None
        self.learnt = None if start is None else nn.Parameter(start)
        self.lead, self.factor_dropout = lead, factor_dropout
        # Not persistent: the vectors are saved once for all models of a run, not in every checkpoint.
        self.register_buffer("text_vectors", torch.from_numpy(features.text), persistent=False)
        self.register_buffer("item_factors", torch.from_numpy(features.factors), persistent=False)
        self.register_buffer("warm", torch.from_numpy(warm), persistent=False)
        self.negatives = negatives if negatives < warm.sum() else 0
        events = torch.from_numpy(warm * (1 if counts is None else counts))
        self.register_buffer("odds", draw_odds(events) if self.negatives else None, persistent=False)

    def factors(self, rows: Tensor | slice = slice(None)) -> Tensor:
        """Factors of items, beside them what the model has learnt of each, float32[items, factors + learnt].

        NaN rows for items without factors, which have learnt nothing either.
        """
        fixed: Tensor = self.item_factors[rows]  # type: ignore[index]
        if self.learnt is None:
            return fixed
        return torch.cat([fixed, torch.where(torch.isnan(fixed[:, :1]), torch.nan, self.learnt[rows])], dim=1)

    def table(self, factors: Tensor | None = None) -> Tensor:
        """The input vectors that ids point into: the lead's rows, then one token per item."""
        items = self.tokens(self.text_vectors, self.factors() if factors is None else factors)
        return items if self.lead is None else torch.cat([self.lead().to(items.dtype), items])

    def encode(self, ids: Tensor, ends: Tensor, table: Tensor, asked: Tensor | None = None) -> Tensor:
        """Query vectors float32[batch, ends, head] at `ends`, int64[batch, ends], of `ids`, int64[batch, length].

        Their length is the scale of the cosine, so that the dot product with an item's head is its logit. `asked`,
        int64[batch, ends], is when, in `PARTS` of the training time; None is now.
        """
        hidden = self.body(functional.embedding(ids, table))
        at = torch.gather(hidden, 1, ends[..., None].expand(-1, -1, hidden.shape[-1]))
        query = self.query(at)
        if self.drift is not None:
            query = query + self.drift(asked)
        return functional.normalize(query, dim=-1) * self.log_scale.exp()

    def forward(
        self,
        ids: Tensor,
        ends: Tensor,
        labels: Tensor,
        seen: Tensor,
        num_items_in_batch: Tensor | int | None = None,
        *,
        taught: Tensor | None = None,
        shares: Tensor | None = None,
        hidden: Tensor | None = None,
        asked: Tensor | None = None,
        **_: object,
    ) -> dict[str, Tensor]:
        """Cross-entropy of the next items among those that the window has not shown yet; with `repeats` among all.

        What was chosen before is left out when ranking, so it is left out of the softmax too: else the model has to
        learn of every item that it does not come again, and validation would rank differently from serving.

        Args:
            ids: int64[batch, length], rows of the table.
            ends: int64[batch, ends], where each item ends.
            labels: int64[batch, ends], the row of the item after it, −100 where there is none to learn.
            seen: int64[batch, ends], the row of the item that ends there, −100 behind the last one.
            num_items_in_batch: the number of labels over all devices and accumulation steps, Trainer's own.
            taught: int64[batch, targets], in place of the one label of each window, what a teacher would choose.
            shares: float32[batch, targets], how much of each.
            hidden: int64[batch, hidden], further items that a window must not choose, −100 behind the last one.
            asked: int64[batch, ends], when each choice was made, as `encode` takes it.

        Returns:
            `loss`, a scalar; when not training also `ranks`, float32[batch], of the last label of each row.
        """
        chosen = labels != IGNORED
        if taught is None or shares is None:
            own = labels[chosen][:, None]
            targets = Targets(own, torch.ones_like(own, dtype=torch.float32))
        else:
            counts = chosen.any(1)  # a row that only fills a batch has no end to learn from
            targets = Targets(taught[counts], shares[counts])
        barred = Barred(seen.new_empty(0), seen.new_empty(0)) if self.repeats else seen_before(chosen, seen, hidden)
        if self.training and self.negatives:
            total, ranks = self._drawn_loss(ids, ends, asked, chosen, targets, barred)
        else:
            factors = self._dropped(self.factors())
            queries = self.encode(ids, ends, self.table(factors), asked)
            heads = self.heads(self.text_vectors, factors)
            bias = torch.where(self.warm, self.biases(factors), -torch.inf)  # type: ignore[arg-type]
            total, ranks = catalogue_loss(queries[chosen], heads, bias, targets, barred, ranks=not self.training)
        count = chosen.sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        output = {"loss": total / count.clamp(min=1).to(total.device)}  # a step may have no label at all
        if not self.training:
            output["ranks"] = _of_last(ranks, chosen)
        return output

    def _drawn_loss(
        self, ids: Tensor, ends: Tensor, asked: Tensor | None, chosen: Tensor, targets: Targets, barred: Barred
    ) -> tuple[Tensor, Tensor]:
        """`catalogue_loss` over drawn items; only they and what the batch shows are projected."""
        lead = None if self.lead is None else self.lead()
        first = 0 if lead is None else len(lead)
        drawn, chance = draw_negatives(self.odds, self.negatives)  # type: ignore[arg-type]
        shown = torch.cat([targets.items.flatten(), barred.items, ids[ids >= first] - first])
        rows = torch.cat([drawn, shown]).unique()  # type: ignore[no-untyped-call]

        def place(items: Tensor) -> Tensor:
            return torch.searchsorted(rows, items)

        factors = self._dropped(self.factors(rows))
        text: Tensor = self.text_vectors[rows]  # type: ignore[index]
        tokens = self.tokens(text, factors)
        table = tokens if lead is None else torch.cat([lead.to(tokens.dtype), tokens])
        queries = self.encode(torch.where(ids < first, ids, first + place(ids - first)), ends, table, asked)
        bias = torch.where(torch.isnan(factors[:, 0]), self.cold_bias, self.bias[rows])
        offset = bias.new_full(bias.shape, -torch.inf).index_put((place(drawn),), -chance.log())
        return catalogue_loss(
            queries[chosen],
            self.heads(text, factors),
            bias,
            Targets(place(targets.items), targets.shares),
            Barred(barred.rows, place(barred.items)),
            offset=offset,
        )

    def biases(self, factors: Tensor) -> Tensor:
        """Item biases float32[items]; one for all items without factors, a NaN row of float32[items, factors]."""
        return torch.where(torch.isnan(factors[:, 0]), self.cold_bias, self.bias)

    def _dropped(self, factors: Tensor) -> Tensor:
        return drop_factors(factors, self.factor_dropout) if self.training else factors


def seen_before(chosen: Tensor, seen: Tensor, hidden: Tensor | None) -> Barred:
    """Which chosen end, counted through bool[batch, ends], must not choose which item.

    Those up to it in its window, and what is `hidden` from the window.
    """
    place = torch.where(chosen, chosen.flatten().cumsum(0).view(chosen.shape) - 1, -1)
    later, earlier = torch.tril_indices(chosen.shape[1], chosen.shape[1], device=chosen.device)
    rows, items = place[:, later], seen[:, earlier]
    if hidden is not None:  # behind what stands in the same window, so that the rows still ascend
        rows = torch.cat([rows, place.amax(1, keepdim=True).expand_as(hidden)], dim=1)
        items = torch.cat([items, hidden], dim=1)
    pairs = (rows >= 0) & (items >= 0)
    return Barred(rows[pairs], items[pairs])


def _of_last(ranks: Tensor, chosen: Tensor) -> Tensor:
    """Of the ranks of all chosen ends those of the last end in each row, float32[batch]; NaN in a row without any."""
    every = ranks.new_full(chosen.shape, torch.nan)
    every[chosen] = ranks
    last = chosen.float().cumsum(1).argmax(1)  # the first position where the count of labels is complete
    return every.gather(1, last[:, None])[:, 0]

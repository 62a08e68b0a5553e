"""Cascade attention: many short continuations of one prefix, whose keys and values are computed once and never copied.

Each attention has a part against the shared prefix, one large matrix product for all continuations, and a part against
the continuation itself, joined under one softmax (Juravsky et al. 2024, *Hydragen*; Ye et al. 2024, *Cascade
inference*). It is one function in transformers' attention interface, so that every causal family that goes through
that interface has it, without copied modelling code.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from recllm.errors import RecllmError
from recllm.lm import given_positions

NAME = "recllm_cascade"
BARRED = -1e4
"""Added to the logit of a place that is not there, by a product, which wants a number that half precision holds."""
SAME = 1e-3
"""Largest difference of hidden states, as a share of the largest one, that rounding explains."""


@dataclass(frozen=True, eq=False)
class Prefix:
    """Keys and values of the prefixes of some users, padded on the right.

    Attributes:
        keys: per layer float[users, key-value heads, length, width], already rotated.
        values: the same shape.
        lengths: int64[users], the real length of each.
        padded: whether one is shorter than another, so that its padding has to be masked.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    lengths: Tensor
    padded: bool = True

    @property
    def bytes(self) -> int:
        """What it takes of memory."""
        return sum(part.numel() * part.element_size() for part in (*self.keys, *self.values))

    def of(self, row: int) -> "Prefix":
        """A copy of one user's prefix, without padding."""
        length = int(self.lengths[row])
        keys, values = ([part[row : row + 1, :, :length].clone() for part in own] for own in (self.keys, self.values))
        return Prefix(tuple(keys), tuple(values), self.lengths[row : row + 1].clone(), padded=False)


def joined(prefixes: Sequence[Prefix]) -> Prefix:
    """The users of several prefixes together, padded to the longest."""
    if len(prefixes) == 1:
        return prefixes[0]
    reach = max(prefix.keys[0].shape[2] for prefix in prefixes)

    def together(parts: Sequence[Tensor]) -> Tensor:
        return torch.cat([functional.pad(part, (0, 0, 0, reach - part.shape[2])) for part in parts])

    return Prefix(
        tuple(map(together, zip(*(prefix.keys for prefix in prefixes), strict=True))),
        tuple(map(together, zip(*(prefix.values for prefix in prefixes), strict=True))),
        torch.cat([prefix.lengths for prefix in prefixes]),
        any(prefix.padded or prefix.keys[0].shape[2] < reach for prefix in prefixes),
    )


def read_prefix(model: nn.Module, ids: Tensor, lengths: Tensor) -> Prefix:
    """Keys and values of `ids`, int64[users, length], padded on the right to their `lengths`, int64[users].

    Padding needs no mask: attention looks back only, and what is behind a prefix's length is left out later.

    Raises:
        RecllmError: a model whose layers keep something else than keys and values.
    """
    # Without the configuration every layer keeps all of its keys, also one with a sliding window.
    cache = DynamicCache()
    given = given_positions(ids.shape[0], ids.shape[1], ids.device)
    model(input_ids=ids, past_key_values=cache, use_cache=True, **given)
    layers: list[Any] = cache.layers
    if not layers or not all(type(layer) is DynamicLayer and layer.keys is not None for layer in layers):
        raise RecllmError(f"{type(model).__name__} keeps no keys and values per layer, so prefixes cannot be shared.")
    # Under autocast products take them in its precision anyway: half the memory, and no cast at every use.
    kind = torch.get_autocast_dtype(ids.device.type) if torch.is_autocast_enabled(ids.device.type) else None
    keys, values = ([getattr(layer, name).to(kind) for layer in layers] for name in ("keys", "values"))
    padded = torch.compiler.is_exporting() or bool((lengths < ids.shape[1]).any())
    return Prefix(tuple(keys), tuple(values), lengths, padded)


def read_suffixes(model: nn.Module, prefix: Prefix, ids: Tensor) -> Tensor:
    """Hidden states of continuations of each prefix.

    Args:
        model: the body that `read_prefix` was given.
        prefix: of some users.
        ids: int64[users, continuations, length], padded on the right.

    Returns:
        float[users, continuations, length, width].
    """
    users, count, length = ids.shape
    steps = torch.arange(length, device=ids.device)
    positions = (prefix.lengths[:, None, None] + steps).expand(users, count, length)
    with _cascading(model):
        hidden = model(
            input_ids=ids.reshape(users * count, length),
            position_ids=positions.reshape(users * count, length),
            use_cache=False,
            recllm_prefix=prefix,
        ).last_hidden_state
    return hidden.view(users, count, length, -1)  # type: ignore[no-any-return]


@torch.inference_mode()
def shares_prefixes(model: nn.Module) -> bool:
    """Whether a causal model reads continuations of a kept prefix as it reads the whole, tried on a few tokens.

    A family may keep something else than keys and values, share them between layers, or add to its attention what
    cascade attention does not know: then the hidden states differ, and prompts are to be read whole.
    """
    if not tells_windows(model):
        return False
    device = next(model.parameters()).device
    ids = torch.arange(1, 8, device=device)[None]
    was_training = model.training
    model.eval()
    try:
        with torch.autocast(device.type, enabled=False):  # where rounding hides less
            if not _reads_alike(model, ids):
                return False
            with _short_window(model) as is_short:
                return not is_short or _reads_alike(model, ids)
    except Exception:  # whatever a family raises that cannot do it
        return False
    finally:
        model.train(was_training)


def _reads_alike(model: nn.Module, ids: Tensor) -> bool:
    """Whether the last three of seven ids are read behind the kept others as in the whole."""
    whole = model(input_ids=ids, use_cache=False).last_hidden_state[0, -3:].float()
    prefix = read_prefix(model, ids[:, :4], torch.tensor([4], device=ids.device))
    parts = read_suffixes(model, prefix, ids[None, :, 4:])[0, 0].float()
    return bool((whole - parts).abs().max() <= SAME * whole.abs().max())


@contextmanager
def _short_window(model: nn.Module) -> Iterator[bool]:
    """Gives whether a window that the configuration states for all layers has been made short enough for the trial.

    Families whose layers have windows of their own are looked at by `tells_windows`, and so are not those that keep
    the window in their layers, which the configuration no longer moves.
    """
    config = pretrained(model).config
    window = getattr(config, "sliding_window", None)
    kept = any(hasattr(module, "sliding_window") for module in model.modules())
    if not window or kept or getattr(config, "layer_types", None):
        yield False
        return
    config.sliding_window = 2
    try:
        yield True
    finally:
        config.sliding_window = window


def tells_windows(model: nn.Module) -> bool:
    """Whether layers that look back a limited way say so to their attention, which the short trial cannot see."""
    kinds = set(getattr(pretrained(model).config, "layer_types", None) or ())
    if not kinds - {"full_attention"}:
        return True
    layers = [module for module in model.modules() if hasattr(module, "layer_idx") and hasattr(module, "scaling")]
    return kinds <= {"full_attention", "sliding_attention"} and all(hasattr(own, "sliding_window") for own in layers)


@contextmanager
def _cascading(model: nn.Module) -> Iterator[None]:
    """With cascade attention in place of the model's own."""
    config = pretrained(model).config
    own = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = own


def pretrained(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside whatever PEFT has put around it."""
    return next(module for module in model.modules() if isinstance(module, PreTrainedModel))


def cascade_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    recllm_prefix: Prefix,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """One layer's attention of continuations over their prefix and themselves; transformers' attention signature.

    Args:
        module: the attention layer; it knows its number.
        query: float[users · continuations, heads, length, width].
        key: float[users · continuations, key-value heads, length, width].
        value: the same.
        attention_mask: none; the mask follows from the positions.
        scaling: of the products; by default width^−½.
        dropout: has no part in it, models only read here.
        recllm_prefix: keys and values of the prefixes.
        sliding_window: how many positions a query looks back, itself included.
        softcap: Gemma 2's bound of the logits.

    Returns:
        float[users · continuations, length, heads, width], and no weights.
    """
    del attention_mask, dropout
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    before, behind = recllm_prefix.keys[layer], recllm_prefix.values[layer]
    users, kinds, reach, width = before.shape
    rows, heads, length = query.shape[:3]
    groups = heads // kinds
    query = (query * (width**-0.5 if scaling is None else scaling)).contiguous()
    exporting = torch.compiler.is_exporting()
    # (users, kinds, continuations · groups · length, width): every query of a user against one copy of the keys.
    # ONNX Runtime shares out whole products among its threads, so that there it is one for each head.
    order = (0, 2, 3, 1, 4, 5) if exporting else (0, 2, 1, 3, 4, 5)
    spread = query.view(users, -1, kinds, groups, length, width).permute(order)
    asked, padded = spread.reshape(users, kinds, -1, width), recllm_prefix.padded
    if padded and softcap is None and exporting:
        asked, before, padded = *_barred_by_keys(asked, before, recllm_prefix.lengths), False
    far = _by_head(asked, before.transpose(-1, -2), groups).view(*spread.shape[:-1], reach)
    near = query.view(rows, kinds, groups * length, width) @ key.transpose(-1, -2)
    near = near.view(users, -1, kinds, groups, length, length).permute(order)
    far, near = far.float(), near.float()  # as everywhere, the softmax is taken in float32
    if softcap is not None:
        far, near = softcap * torch.tanh(far / softcap), softcap * torch.tanh(near / softcap)
    far, near = _masked(far, near, recllm_prefix.lengths, sliding_window, padded=padded)
    far, near, total = _odds(far, near)
    far, near = far.to(behind.dtype), near.to(behind.dtype)
    if far.shape[-1] > reach:
        behind = functional.pad(behind, (0, 0, 0, length))
    read = _by_head(far.reshape(users, kinds, -1, far.shape[-1]), behind, groups).view(spread.shape)
    back = (0, 3, 1, 2, 4, 5) if exporting else (0, 2, 1, 3, 4, 5)
    own = near.permute(back).reshape(rows, kinds, groups * length, length) @ value
    own = own.view(users, -1, kinds, groups, length, width).permute(order)
    mixed = read + own  # as `spread`
    if total is not None:
        mixed = mixed / total
    return mixed.permute(back).permute(0, 1, 4, 2, 3, 5).reshape(rows, length, heads, width), None


def _by_head(rows: Tensor, own: Tensor, groups: int) -> Tensor:
    """float[users, kinds, rows, inner] times float[users, kinds, inner, outer]; in an export one for each head."""
    if not torch.compiler.is_exporting():
        return rows @ own
    users, kinds, _, inner = rows.shape
    return rows.reshape(users, kinds, groups, -1, inner) @ own[:, :, None]


def _masked(far: Tensor, near: Tensor, lengths: Tensor, window: int | None, *, padded: bool) -> tuple[Tensor, Tensor]:
    """−∞ where a query must not look: padding, what comes after it, and what lies before its window."""
    length, reach = far.shape[-2:]
    place, step = torch.arange(reach, device=far.device), torch.arange(length, device=far.device)
    near = _barred(near, step > step[:, None])
    if padded:
        hidden = place >= lengths[:, None]  # (users, reach)
        far = _barred(far, hidden[:, None, None, None, None, :])
    if window is not None:
        at = lengths[:, None] + step  # (users, length), the position of each query
        far = _barred(far, (at[:, :, None] - place >= window)[:, None, None, None])
        near = _barred(near, step[:, None] - step >= window)
    return far, near


# In place, for the logits are the largest tensors here, and on a CPU every new one costs more than its arithmetic. The
# exporter takes no such operators: there an addition takes the place of a mask, one softmax that of six passes, and
# what can ride on a product does: padding, as one more number of every key, and the near part's shares, which stay
# behind those of the far part and meet zeros behind its values.


def _barred_by_keys(asked: Tensor, before: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Queries float[users, kinds, rows, width] and keys with one number more, whose product bars what is padding."""
    hidden = torch.arange(before.shape[2], device=before.device) >= lengths[:, None]
    bars = torch.where(hidden, BARRED, 0.0).to(before.dtype)[:, None, :, None].expand(*before.shape[:-1], 1)
    return functional.pad(asked, (0, 1), value=1.0), torch.cat([before, bars], -1)


def _barred(logits: Tensor, where: Tensor) -> Tensor:
    if torch.compiler.is_exporting():
        return logits + torch.where(where, -torch.inf, 0.0)
    return logits.masked_fill_(where, -torch.inf)


def _odds(far: Tensor, near: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Shares of both parts under one softmax, and what they still have to be divided by.

    In an export the far part's have the near part's behind them, and nothing divides them any more.
    """
    if torch.compiler.is_exporting():
        odds = torch.cat([far, near], -1).softmax(-1)
        return odds, odds[..., far.shape[-1] :], None
    # Without joining them: they share the largest logit and the sum.
    top = torch.maximum(far.amax(-1, keepdim=True), near.amax(-1, keepdim=True))
    far, near = far.sub_(top).exp_(), near.sub_(top).exp_()
    return far, near, far.sum(-1, keepdim=True) + near.sum(-1, keepdim=True)


def _no_mask(*_: object, **__: object) -> None:
    """The mask of cascade attention, which makes its own."""


AttentionInterface.register(NAME, cascade_attention)
AttentionMaskInterface.register(NAME, _no_mask)

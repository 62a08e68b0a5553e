"""Names: a language model reads the names of a catalogue's items, and says how probable it finds each."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from recllm.histories import padded
from recllm.lm import BaseModel, given_positions

TOKENS_AT_ONCE = 1024
"""Padded tokens of a pass: its logits have a column for every word of the vocabulary."""


class NameModel(nn.Module):
    """Mean log-probability of what stands behind the prompt's words, by a causal language model."""

    def __init__(self, base: BaseModel, first: int) -> None:
        """Read with `base`, which has an output matrix; names begin at the place `first` of every row."""
        super().__init__()
        assert base.output is not None
        self.body, self.output, self.first = base.model, base.output, first
        config = base.model.config
        # What Cohere, Granite and Gemma 2 do behind the output matrix.
        self.scale = float(getattr(config, "logit_scale", None) or 1.0) / (
            getattr(config, "logits_scaling", None) or 1.0
        )
        self.cap: float | None = getattr(config, "final_logit_softcapping", None)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """float32[texts] of `ids`, int64[texts, length], padded on the right to their `lengths`, int64[texts]."""
        given = given_positions(ids.shape[0], ids.shape[1], ids.device)
        hidden = self.body(input_ids=ids, use_cache=False, **given).last_hidden_state[:, self.first - 1 : -1]
        with torch.autocast(ids.device.type, enabled=False):  # half precision has steps of .1 at these logits
            logits = self.output(hidden.float()) * self.scale
            if self.cap is not None:
                logits = self.cap * torch.tanh(logits / self.cap)
            name = ids[:, self.first :]
            told = logits.gather(2, name[..., None])[..., 0] - logits.logsumexp(-1)
        counts = torch.arange(self.first, ids.shape[1], device=ids.device) < lengths[:, None]
        mean: Tensor = (told * counts).sum(1) / counts.sum(1)
        return mean


@torch.inference_mode()
def read_names(
    model: NameModel,
    token_ids: Sequence[list[int] | None],
    bf16: bool = False,
    progress: Callable[[int], None] = lambda _: None,
) -> NDArray[np.float32]:
    """Likelihoods float32[texts], NaN for None; read in length order, under autocast with `bf16`."""
    result = np.full(len(token_ids), np.nan, dtype=np.float32)
    device = next(model.parameters()).device
    order = sorted((row for row, ids in enumerate(token_ids) if ids), key=lambda row: len(token_ids[row] or ()))
    start = 0
    while start < len(order):
        rows = order[start : start + max(1, TOKENS_AT_ONCE // len(token_ids[order[start]] or (0,)))]
        # The last one is the longest.
        rows = rows[: max(1, TOKENS_AT_ONCE // len(token_ids[rows[-1]] or (0,)))]
        batch = [token_ids[row] or [] for row in rows]
        ids, lengths = (torch.from_numpy(padded(batch)), torch.tensor(list(map(len, batch))))
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
            result[rows] = model(ids.to(device), lengths.to(device)).float().cpu().numpy()
        start += len(rows)
        progress(len(rows))
    return result

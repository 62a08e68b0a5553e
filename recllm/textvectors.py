"""Vectors of items by their text: mean-pooled hidden states, kept by content, those of a large catalogue in parts."""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file
from torch.nn.utils.rnn import pad_sequence

from recllm.arrayfiles import read_tensors
from recllm.devices import free_memory
from recllm.errors import DamagedError, out_of_memory
from recllm.fetch import cache_folder
from recllm.files import sha256_of, written
from recllm.lm import MODEL_FILES, BaseModel, mean_pool, stream_width
from recllm.vectors import RawVectors

TOKENS_IN_BATCH = 512
"""Padded tokens that are read at once on a CPU: length order keeps the padding small."""
TOKENS_ON_DEVICE = 16_384
"""The same on all other devices, which a small batch leaves idle."""
ITEMS_IN_PART = 20_000
"""Items whose vectors are kept together: a kill costs the reading of so many at most."""


def item_vectors(
    base: BaseModel,
    ids: Sequence[str],
    token_ids: Sequence[list[int] | None],
    progress: Callable[[int], None] = lambda _: None,
) -> RawVectors:
    """Vectors of items by their text, kept in the cache by the content of model and text.

    Those of more than `ITEMS_IN_PART` items are kept part by part on the way, so that a kill does not cost them all.

    Args:
        base: reads the texts.
        ids: the items.
        token_ids: the tokens of each one's text; None where it has none.
        progress: gets the number of texts done, batch by batch.
    """
    digest = hashlib.sha256(repr((list(ids), list(token_ids))).encode())
    for file in sorted(path for kind in MODEL_FILES for path in base.folder.glob(kind)):
        digest.update(sha256_of(file).encode())
    path = cache_folder() / "vectors" / f"{digest.hexdigest()[:24]}.safetensors"
    if path.is_file():
        with suppress(DamagedError):  # of a disk: it is read once more
            return RawVectors.load(path)
    starts = range(0, len(token_ids), ITEMS_IN_PART)
    if len(starts) <= 1:
        RawVectors(tuple(ids), encode_ids(base, token_ids, progress)).save(path)
        return RawVectors.load(path)
    parts = [path.with_suffix(f".{start}.part") for start in starts]
    values = [
        _part(part, base, token_ids[start : start + ITEMS_IN_PART], progress)
        for part, start in zip(parts, starts, strict=True)
    ]
    RawVectors(tuple(ids), np.concatenate(values)).save(path)
    for part in parts:
        part.unlink(missing_ok=True)
    return RawVectors.load(path)


def _part(
    path: Path, base: BaseModel, token_ids: Sequence[list[int] | None], progress: Callable[[int], None]
) -> NDArray[np.float32]:
    """Vectors of some of the items, float32[items, hidden], from a file that is left of an earlier call or for a later.

    Whoever has made the whole meanwhile has taken the file away.
    """
    try:
        values: NDArray[np.float32] = read_tensors(path)["vectors"]
    except (FileNotFoundError, DamagedError):
        values = encode_ids(base, token_ids, progress)
        with written(path) as temporary:
            save_file({"vectors": values}, temporary)
    else:
        progress(sum(ids is not None for ids in token_ids))
    return values


@torch.inference_mode()
def encode_ids(
    base: BaseModel, token_ids: Sequence[list[int] | None], progress: Callable[[int], None] = lambda _: None
) -> NDArray[np.float32]:
    """Mean-pooled last hidden states, float32[texts, hidden]; a NaN row for None.

    Texts are read in length order, so many at once as a number of padded tokens allows, which is halved where memory
    is out; `progress` gets the number of texts done.
    """
    result = np.full((len(token_ids), stream_width(base.model.config)), np.nan, dtype=np.float32)
    order = sorted((row for row, ids in enumerate(token_ids) if ids), key=lambda row: len(token_ids[row] or ()))
    most, start = TOKENS_IN_BATCH if base.model.device.type == "cpu" else TOKENS_ON_DEVICE, 0
    while start < len(order):
        size = max(1, most // len(token_ids[order[start]] or (0,)))
        rows = order[start : start + size]
        try:
            result[rows] = _pooled(base, [token_ids[row] or [] for row in rows])
        except Exception as error:  # the device's libraries raise many kinds
            if len(rows) == 1 or not out_of_memory(error):
                raise
            most = len(token_ids[rows[0]] or ()) * (len(rows) // 2)
        else:
            start += len(rows)
            progress(len(rows))
            continue
        free_memory()  # outside of the error's block, whose traceback holds what the pass had
    return result


def _pooled(base: BaseModel, batch: list[list[int]]) -> NDArray[np.float32]:
    device = base.model.device
    ids = pad_sequence([torch.tensor(row) for row in batch], batch_first=True).to(device)
    lengths = torch.tensor([len(row) for row in batch], device=device)
    mask = (torch.arange(ids.shape[1], device=device) < lengths[:, None]).long()
    hidden = base.model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
    return mean_pool(hidden, mask).cpu().numpy()

"""A relevance model as two ONNX graphs: prefixes once per user, candidates behind them; without torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recllm.pointwise import Ids
from recllm.sessions import compute, open_session, placed

PREFIX, SUFFIX = "prefix.onnx", "suffix.onnx"
WEIGHTS = "weights.data"
"""Of both, for they are one model's."""


@dataclass(frozen=True, eq=False)
class ReadPrefix:
    """Keys and values of prefixes, float32[layers, users, key-value heads, length, width]; lengths int64[users].

    They lie where the graphs compute, as ONNX Runtime's own values; those of one user that are kept are arrays.
    """

    keys: Any
    values: Any
    lengths: Ids

    @cached_property
    def arrays(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Keys and values as arrays, fetched once for all users of a call."""
        if isinstance(self.keys, np.ndarray):
            return self.keys, self.values
        return self.keys.numpy(), self.values.numpy()


@dataclass(frozen=True, eq=False)
class OnnxReader:
    """What `PointwiseScorer` asks, by ONNX Runtime.

    Attributes:
        prefix: the session of the prefixes.
        suffix: the session of what stands behind them.
        max_tokens: the longest prompt.
        tokens_at_once: as many as keep the device busy; more would only take memory.
        soft_from: the token of the catalogue's first item; None where items have none.
        causal: whether the model looks back only; all that are exported do.
        shares: whether candidates can go on from a history's keys and values; likewise.
    """

    prefix: Any
    suffix: Any
    max_tokens: int
    tokens_at_once: int = 4096
    soft_from: int | None = None
    causal: bool = True
    shares: bool = True

    @classmethod
    def open(
        cls, folder: Path, max_tokens: int, provider: str = "cpu", threads: int = 0, soft_from: int | None = None
    ) -> "OnnxReader":
        """Open both graphs of a folder on exactly the provider asked for.

        Raises:
            RecllmError: ONNX Runtime or the provider is not there.
        """
        prefix, suffix = (open_session(folder / name, provider, threads) for name in (PREFIX, SUFFIX))
        return cls(prefix, suffix, max_tokens, soft_from=soft_from)

    def whole(self, ids: Ids, lengths: Ids) -> NDArray[np.float32]:
        """Answers float32[rows] to whole prompts: all but the last token are the prefix."""
        last = np.take_along_axis(ids, lengths[:, None] - 1, axis=1)
        read = self.read(ids[:, : max(1, ids.shape[1] - 1)], lengths - 1)
        return self.answers(read, last[:, :, None], np.ones((len(ids), 1), dtype=np.int64))[:, 0]

    def read(self, ids: Ids, lengths: Ids) -> ReadPrefix:
        """Keys and values of prefixes, int64[users, length], padded on the right."""
        keys, values = compute(self.prefix, {"ids": ids}, stay=True)
        return ReadPrefix(keys, values, lengths)

    def take(self, prefixes: ReadPrefix, row: int) -> tuple[ReadPrefix, int]:
        """A copy of one user's prefix without padding, and its bytes."""
        own = slice(row, row + 1)
        length = int(prefixes.lengths[row])
        keys, values = (np.array(part[:, own, :, :length]) for part in prefixes.arrays)
        return ReadPrefix(keys, values, prefixes.lengths[own].copy()), keys.nbytes + values.nbytes

    def join(self, prefixes: Sequence[ReadPrefix]) -> ReadPrefix:
        """Prefixes of one user each, together, padded to the longest."""
        reach = max(prefix.keys.shape[3] for prefix in prefixes)

        def together(parts: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
            if len(parts) == 1:
                return parts[0]
            shape = list(parts[0].shape)
            shape[1], shape[3] = len(parts), reach
            result = np.zeros(shape, dtype=np.float32)
            for row, part in enumerate(parts):
                result[:, row, :, : part.shape[3]] = part[:, 0]
            return result

        keys, values = (together(own) for own in zip(*(prefix.arrays for prefix in prefixes), strict=True))
        # To the device once, not with every block of candidates.
        there = placed(self.suffix, {"keys": keys, "values": values})
        return ReadPrefix(there["keys"], there["values"], np.concatenate([prefix.lengths for prefix in prefixes]))

    def answers(self, prefixes: ReadPrefix, ids: Ids, lengths: Ids) -> NDArray[np.float32]:
        """Answers float32[users, candidates] after continuations int64[users, candidates, length]."""
        feeds = {"ids": ids, "ends": lengths - 1, "lengths": prefixes.lengths}
        (answers,) = compute(self.suffix, feeds | {"keys": prefixes.keys, "values": prefixes.values})
        return np.asarray(answers, dtype=np.float32)

"""Item features: the text vector and the factors of every item, in the order of the candidates."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from recllm.arrayfiles import read_tensors
from recllm.files import read_json, write_json, written
from recllm.ranking import ItemIndex

VECTORS = "vectors.safetensors"
"""In a run's folder: the text vectors of its items."""


@dataclass(frozen=True)
class ItemFeatures:
    """What sequence models know of the items.

    Attributes:
        index: the items, in row order.
        text: float32[items, t], standardised text vectors; a NaN row for an item without text.
        factors: float32[items, f], standardised factors; a NaN row for an item without events.
    """

    index: ItemIndex
    text: NDArray[np.float32]
    factors: NDArray[np.float32]


@dataclass(frozen=True)
class Standard:
    """Centre and spread that bring raw vectors to zero mean and unit mean square; new items use the same."""

    mean: NDArray[np.float32]
    scale: float

    @classmethod
    def fit(cls, vectors: NDArray[np.float32]) -> "Standard":
        """Measure float32[items, width], NaN rows left out."""
        known = vectors[~np.isnan(vectors).any(axis=1)]
        if len(known) == 0:
            return cls(np.zeros(vectors.shape[1], dtype=np.float32), 1.0)
        mean = known.mean(axis=0, dtype=np.float64)
        spread = float(np.sqrt(np.mean((known - mean) ** 2)))
        return cls(mean.astype(np.float32), spread or 1.0)

    def __call__(self, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        """Standardise float32[items, width]; one scale for all columns keeps cosines between centred vectors."""
        return ((vectors - self.mean) / self.scale).astype(np.float32)


@dataclass(frozen=True)
class RawVectors:
    """Item vectors as the encoder or the factorization gave them, with the items they belong to.

    Attributes:
        ids: the items, in row order.
        values: float32[items, width]; a NaN row for an item without a vector.
    """

    ids: tuple[str, ...]
    values: NDArray[np.float32]

    def align(self, index: ItemIndex) -> NDArray[np.float32]:
        """Rows in the order of `index`; NaN rows for items that are not here."""
        rows = ItemIndex(self.ids).rows(index.ids)
        return np.where((rows >= 0)[:, None], self.values[rows], np.float32(np.nan))

    def save(self, path: Path) -> None:
        """Write `path` (safetensors) and the ids beside it."""
        write_json(path.with_suffix(".ids.json"), list(self.ids))  # first: whoever finds the vectors reads both
        with written(path) as temporary:
            save_file({"vectors": np.ascontiguousarray(self.values)}, temporary)

    @classmethod
    def load(cls, path: Path) -> "RawVectors":
        """Read what `save` wrote."""
        return cls(tuple(read_json(path.with_suffix(".ids.json"))), read_tensors(path)["vectors"])


def item_features(index: ItemIndex, text: RawVectors, factors: RawVectors) -> tuple[ItemFeatures, Standard, Standard]:
    """Align and standardise both parts; the two standards are what a new item needs."""
    text_rows, factor_rows = text.align(index), factors.align(index)
    text_standard, factor_standard = Standard.fit(text_rows), Standard.fit(factor_rows)
    features = ItemFeatures(index, text_standard(text_rows), factor_standard(factor_rows))
    return features, text_standard, factor_standard

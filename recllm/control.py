"""Controls: one part of what a model knows taken away on purpose, to see whether a gain comes from it."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from recllm.recipes import Settings
from recllm.vectors import ItemFeatures

Part = Literal["own", "shuffled", "same"]


class ControlSettings(Settings):
    """`[control]`: what the trained models lack. The scorers that are not trained by gradient have it all the same."""

    language_model: Literal["pretrained", "random"] = "pretrained"
    """`random`: weights drawn anew by the run's seed; item text is still read by a pretrained model."""
    text: Part = "own"
    """Text vectors of the items: each its own, those of another one, or the mean of all."""
    factors: Part = "own"
    """Factors of the items, in the same way."""

    @property
    def lacking(self) -> str:
        """What is taken away, as `key = value`; empty where nothing is."""
        changed = self.model_dump(exclude_defaults=True)
        return ", ".join(f"control.{key} = {value}" for key, value in changed.items())


def controlled(features: ItemFeatures, settings: ControlSettings, seed: int) -> ItemFeatures:
    """What sequence models read under a control; items without a vector still have none.

    Args:
        features: of all items.
        settings: what is taken away.
        seed: draws the order of what is shuffled.
    """
    text, factors = (
        _controlled(vectors, part, np.random.default_rng([seed, place]))
        for place, (vectors, part) in enumerate(((features.text, settings.text), (features.factors, settings.factors)))
    )
    return ItemFeatures(features.index, text, factors)


def _controlled(vectors: NDArray[np.float32], part: Part, rng: np.random.Generator) -> NDArray[np.float32]:
    """Standardised vectors float32[items, width], a NaN row for an item without one, under a control."""
    known = np.flatnonzero(~np.isnan(vectors).any(axis=1))
    result = vectors.copy()
    if part == "shuffled":
        result[known] = vectors[rng.permutation(known)]
    elif part == "same":
        result[known] = 0.0  # the mean, as they are standardised
    return result

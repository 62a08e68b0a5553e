"""Likelihood: how probable a language model finds an item's name, which says how well known it is; the same for all.

A pretrained model has read more about what is famous, and so it tells known items from obscure ones before anybody here
has chosen them (Sileo et al. 2022, "Zero-Shot Recommendation as Language Modeling", rank by such likelihoods).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from recllm.data import Query
from recllm.errors import RecllmError
from recllm.histories import padded
from recllm.priors import ItemPrior, read_arrays, write_arrays
from recllm.prompts import CompiledPrompt
from recllm.ranking import ItemIndex, Scores

NAME_GRAPH, NAME_PROMPT, NAME_TOKENIZER = "likelihood.onnx", "likelihood.toml", "likelihood-tokenizer.json"
"""A bundle's files of it."""


class Likelihood(ItemPrior):
    """Mean log-probability of the tokens of an item's name; NaN for an item that has none or is unknown."""

    def score_as_new(self, queries: Sequence[Query], candidates: ItemIndex) -> Scores:
        """As `score`: it knows no events."""
        return self.score(queries, candidates)

    def save(self, folder: Path) -> None:
        """Write `likelihood.safetensors` and `likelihood.json`."""
        write_arrays(folder, "likelihood", {"values": self.values}, {"ids": self.items.ids})

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `save` wrote."""
        arrays, facts = read_arrays(folder, "likelihood")
        return cls(ItemIndex(facts["ids"]), arrays["values"])


def first_token(prompt: CompiledPrompt) -> int:
    """The place of a name's first token in the `item_ids` of a prompt.

    Raises:
        RecllmError: nothing stands before the name, so that its first token follows nothing, or something behind it.
    """
    if not prompt.start or prompt.behind:
        raise RecllmError(
            "A likelihood prompt has some words before {candidate}, for a first token has no likelihood, and none "
            "behind it, which would be counted as the name's: write 'A famous title: {candidate}'."
        )
    return len(prompt.start)


@dataclass(frozen=True, eq=False)
class NameReader:
    """Likelihoods of new items by a bundle's graph, which is opened when a name is read for the first time."""

    open: Callable[[], Any]
    prompt: CompiledPrompt

    @cached_property
    def session(self) -> Any:  # noqa: ANN401  onnxruntime is untyped
        """The graph."""
        return self.open()

    def __call__(self, records: Sequence[Mapping[str, str]]) -> NDArray[np.float32]:
        """float32[records]; NaN for a record without a name."""
        result = np.full(len(records), np.nan, dtype=np.float32)
        for row, record in enumerate(records):
            ids = self.prompt.item_ids(record)
            if ids is not None:
                given = {"ids": padded([ids]), "lengths": np.array([len(ids)], dtype=np.int64)}
                result[row] = self.session.run(None, given)[0][0]
        return result

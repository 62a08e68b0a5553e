"""Relevance: will this user like this candidate? Two rows of the output matrix at one position, one prefix per user."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from transformers import DynamicCache

from recllm.data import Catalog, Query
from recllm.errors import RecllmError
from recllm.histories import padded
from recllm.lm import BaseModel, mean_pool
from recllm.loop import Examples
from recllm.prompts import CompiledPrompt
from recllm.ranking import ItemIndex, Scores

SUFFIXES_IN_BATCH = 16


@dataclass(frozen=True)
class RelevanceCollator:
    """(prompt ids, label) rows to padded tensors."""

    def __call__(self, rows: Sequence[tuple[list[int], float]]) -> dict[str, Tensor]:
        """Ids int64[batch, length], lengths int64[batch], labels float32[batch, 1]."""
        return {
            "ids": torch.from_numpy(padded([ids for ids, _ in rows])),
            "lengths": torch.tensor([len(ids) for ids, _ in rows]),
            "labels": torch.tensor([[label] for _, label in rows], dtype=torch.float32),
        }


class AnswerDifference(nn.Module):
    """Logit of the positive answer minus logit of the negative one: the difference of two rows of the output matrix."""

    def __init__(self, output: nn.Linear, answers: tuple[int, int]) -> None:
        super().__init__()
        positive, negative = answers
        rows = output.weight.detach().float()
        self.register_buffer("direction", rows[positive] - rows[negative], persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """float[…, width] to float32[…]."""
        return hidden.float() @ self.direction  # type: ignore[operator]


class RelevanceModel(nn.Module):
    """A language model that answers one question about a history and a candidate.

    A causal model answers at the last position of the prompt with the difference of its answer words' logits, without
    any new parameter, so that zero-shot, few-shot and tuned are the same code. An encoder has no answer words: it
    pools the pair and learns one direction, so it must be tuned first.
    """

    def __init__(self, base: BaseModel, body: nn.Module, output: nn.Linear | None, answers: tuple[int, int]) -> None:
        super().__init__()
        self.body, self.causal = body, base.causal
        width = base.model.config.hidden_size
        self.difference = nn.Linear(width, 1) if output is None else AnswerDifference(output, answers)

    def forward(
        self, ids: Tensor, lengths: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None = None, **_: object
    ) -> dict[str, Tensor]:
        """Binary cross-entropy of `labels` float32[batch, 1]; returns `loss` and `logits` float32[batch, 1]."""
        logits = self.logits(ids, lengths)
        total = functional.binary_cross_entropy_with_logits(logits, labels[:, 0], reduction="sum")
        return {"loss": total / (len(labels) if num_items_in_batch is None else num_items_in_batch), "logits": logits}

    def logits(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Scores float32[batch] of whole prompts, int64[batch, length], padded on the right."""
        mask = (torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]).long()
        if self.causal:
            hidden = self.body(input_ids=ids, use_cache=False).last_hidden_state
            result = self.difference(hidden[torch.arange(len(ids), device=ids.device), lengths - 1])
        else:
            hidden = self.body(input_ids=ids, attention_mask=mask).last_hidden_state
            result = self.difference(mean_pool(hidden.float(), mask))[:, 0]
        return result


@dataclass
class RelevanceScorer:
    """The relevance model as a scorer; the history is read once per user, whatever the number of candidates.

    Attributes:
        model: the relevance model.
        prompt: the compiled relevance prompt.
        catalog: the items that can be written.
        calibrated: take off the score of the same candidate after an empty history (content-free calibration, Zhao et
            al. 2021). A causal model only.
        progress: gets the number of queries done.
    """

    model: RelevanceModel
    prompt: CompiledPrompt
    catalog: Catalog
    calibrated: bool = True
    progress: Callable[[int], None] = lambda _: None
    _empty: dict[str, float] = field(default_factory=dict, repr=False)

    def score(self, queries: Sequence[Query], candidates: ItemIndex) -> Scores:
        """Score every candidate for every query: float32[queries, candidates]; NaN for an item without text.

        A history without a known item is NaN: what the model says of it is the calibration itself.
        """
        rows = [row for row, item in enumerate(candidates.ids) if item in self.catalog]
        texts = [self.prompt.suffix(self.catalog.record(candidates.ids[row])) for row in rows]
        known = [(row, text) for row, text in zip(rows, texts, strict=True) if text is not None]
        result = np.full((len(queries), len(candidates)), np.nan, dtype=np.float32)
        if not known:
            return result
        columns, suffixes = [row for row, _ in known], [text for _, text in known]
        empty = self._calibration([candidates.ids[row] for row in columns], suffixes)
        was_training = self.model.training
        self.model.eval()
        for row, query in enumerate(queries):
            if any(item in self.catalog for item in query.history):
                result[row, columns] = self._after(self.prompt.prefix(query, self.catalog), suffixes) - empty
            self.progress(1)
        self.model.train(was_training)
        return result

    def _calibration(self, items: list[str], suffixes: list[list[int]]) -> NDArray[np.float32]:
        if not self.calibrated or not self.model.causal:
            return np.zeros(len(items), dtype=np.float32)
        missing = [place for place, item in enumerate(items) if item not in self._empty]
        if missing:
            scores = self._after(self.prompt.empty_prefix, [suffixes[place] for place in missing])
            self._empty.update({items[place]: float(score) for place, score in zip(missing, scores, strict=True)})
        return np.array([self._empty[item] for item in items], dtype=np.float32)

    @torch.inference_mode()
    def _after(self, prefix: list[int], suffixes: list[list[int]]) -> NDArray[np.float32]:
        """Scores float32[suffixes] of suffixes that follow one prefix."""
        order = sorted(range(len(suffixes)), key=lambda place: len(suffixes[place]))
        device = next(self.model.parameters()).device
        cache = self._read_prefix(torch.tensor([prefix], device=device)) if self.model.causal else None
        result = np.zeros(len(suffixes), dtype=np.float32)
        for start in range(0, len(order), SUFFIXES_IN_BATCH):
            places = order[start : start + SUFFIXES_IN_BATCH]
            batch = [suffixes[place] for place in places]
            scores = self._pairs(prefix, batch, device) if cache is None else self._suffixes(cache, len(prefix), batch)
            result[places] = scores.float().cpu().numpy()
        return result

    def _read_prefix(self, ids: Tensor) -> DynamicCache:
        return self.model.body(input_ids=ids, use_cache=True).past_key_values

    def _suffixes(self, cache: DynamicCache, prefix_length: int, batch: list[list[int]]) -> Tensor:
        shared = copy.deepcopy(cache)  # the model appends to the cache it is given
        shared.batch_repeat_interleave(len(batch))
        device = next(self.model.parameters()).device
        ids = torch.from_numpy(padded(batch)).to(device)
        lengths = torch.tensor([len(row) for row in batch], device=device)
        steps = torch.arange(ids.shape[1], device=device)
        mask = torch.ones(len(batch), prefix_length + ids.shape[1], dtype=torch.long, device=device)
        mask[:, prefix_length:] = (steps < lengths[:, None]).long()
        hidden = self.model.body(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(prefix_length + steps).expand(len(batch), -1),
            past_key_values=shared,
            use_cache=True,
        ).last_hidden_state
        return self.model.difference(hidden[torch.arange(len(batch), device=device), lengths - 1])

    def _pairs(self, prefix: list[int], batch: list[list[int]], device: torch.device) -> Tensor:
        rows = [prefix + suffix + self.prompt.end for suffix in batch]
        lengths = torch.tensor([len(row) for row in rows], device=device)
        return self.model.logits(torch.from_numpy(padded(rows)).to(device), lengths)


def answer_output(base: BaseModel, whole: nn.Module | None) -> nn.Linear | None:
    """The output matrix of a causal model; None for an encoder.

    Raises:
        RecllmError: a causal model without an output matrix.
    """
    if not base.causal:
        return None
    output = whole.get_output_embeddings() if whole is not None else None  # type: ignore[operator]
    if output is None:
        raise RecllmError(
            f"{base.folder} has no output matrix, so it has no answer words. Use a causal language model."
        )
    return output


def relevance_examples(
    rows: Sequence[tuple[Query, str, float]], prompt: CompiledPrompt, catalog: Catalog, causal: bool
) -> Examples:
    """Prompt ids and labels of (query, item, label) rows; rows whose item has no text are left out."""
    result = []
    for query, item, label in rows:
        suffix = prompt.suffix(catalog.record(item)) if item in catalog else None
        if suffix is not None:
            result.append((prompt.prefix(query, catalog) + suffix + ([] if causal else prompt.end), label))
    return Examples(result)

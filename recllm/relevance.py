"""Relevance: will this user like this candidate? Two rows of the output matrix at one position, one prefix per user."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import DynamicCache

from recllm.data import Catalog, Query
from recllm.errors import RecllmError
from recllm.histories import padded
from recllm.lightjudge import judged_loss
from recllm.lm import BaseModel, load_base, mean_pool, model_folder, scoring_device
from recllm.loop import fast_bf16
from recllm.prompts import CompiledPrompt, compile_prompt, load_prompt
from recllm.ranking import ItemIndex, Scores

SUFFIXES_IN_BATCH = 16
PAIR_TOKENS = 4096
"""Tokens of whole prompts that are read at once."""
ANY_LENGTH = 1 << 20
"""Longest prompt of a model that states no limit."""
SHARED_FROM = 4
"""Items of one history from which reading the history once is faster than whole prompts."""


@dataclass(frozen=True)
class RelevanceCollator:
    """(prompt ids, label, number of the user) rows to padded tensors."""

    def __call__(self, rows: Sequence[tuple[list[int], float, int]]) -> dict[str, Tensor]:
        """Ids int64[batch, length], lengths and users int64[batch], labels float32[batch, 1]."""
        return {
            "ids": torch.from_numpy(padded([ids for ids, _, _ in rows])),
            "lengths": torch.tensor([len(ids) for ids, _, _ in rows]),
            "users": torch.tensor([user for _, _, user in rows]),
            "labels": torch.tensor([[label] for _, label, _ in rows], dtype=torch.float32),
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
        config = base.model.config
        # RoBERTa's relatives count positions from 2.
        self.max_tokens = getattr(config, "max_position_embeddings", ANY_LENGTH) - (0 if base.causal else 2)
        self.difference = nn.Linear(config.hidden_size, 1) if output is None else AnswerDifference(output, answers)
        self.pairwise = 0.0
        """Weight of the loss over liked and disliked rows of one user."""

    def forward(
        self,
        ids: Tensor,
        lengths: Tensor,
        labels: Tensor,
        users: Tensor,
        num_items_in_batch: Tensor | int | None = None,
        **_: object,
    ) -> dict[str, Tensor]:
        """Binary cross-entropy of `labels` float32[batch, 1], −100 where a row does not count.

        With `pairwise` it also compares the rows of one user, int64[batch] `users`, that stand in this batch.

        Returns:
            `loss`, a scalar, and `logits`, float32[batch].
        """
        logits, given = self.logits(ids, lengths), labels[:, 0]
        weight = self.pairwise if self.training else 0.0
        return {"loss": judged_loss(logits, given, users, weight, num_items_in_batch), "logits": logits}

    def logits(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Scores float32[batch] of whole prompts, int64[batch, length], padded on the right."""
        mask = (torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]).long()
        if self.causal:
            hidden = self.body(input_ids=ids, use_cache=False).last_hidden_state
            return self.answer(hidden[torch.arange(len(ids), device=ids.device), lengths - 1])
        hidden = self.body(input_ids=ids, attention_mask=mask).last_hidden_state
        return self.answer(mean_pool(hidden.float(), mask))[:, 0]

    def answer(self, hidden: Tensor) -> Tensor:
        """Scores of hidden states, in float32 whatever the precision around: bf16 would tie what should be ranked."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.difference(hidden.float())


@dataclass(frozen=True, eq=False)
class PairPrompts:
    """Prompts of (query, item) pairs, the same for training and scoring; every item is tokenised once.

    Attributes:
        prompt: the compiled relevance prompt.
        catalog: the items that can be written.
        model: knows how long a prompt may be; the oldest items of a history that does not fit are left out.
    """

    prompt: CompiledPrompt
    catalog: Catalog
    model: RelevanceModel

    @cached_property
    def _items(self) -> dict[str, list[int] | None]:
        return dict(zip(self.catalog.ids, self.prompt.encode_items(self.catalog), strict=True))

    @cached_property
    def candidates(self) -> dict[str, list[int]]:
        """What stands behind the prefix, by the id of every item that has text."""
        end = [] if self.model.causal else self.prompt.end
        suffixes = zip(self.catalog.ids, self.prompt.encode_suffixes(self.catalog), strict=True)
        return {item: ids + end for item, ids in suffixes if ids is not None}

    @cached_property
    def _room(self) -> int:
        # One bound for all candidates, so that they share one prefix.
        return self.model.max_tokens - max(map(len, self.candidates.values()), default=0)

    def knows(self, query: Query) -> bool:
        """Whether an item of the history can be written."""
        return any(self._items.get(item) is not None for item in query.history)

    def prefix(self, query: Query) -> list[int]:
        """Everything up to the candidate."""
        kept = [place for place, item in enumerate(query.history) if self._items.get(item) is not None]
        kept = kept[-self.prompt.prompt.max_history :]
        while True:
            ratings = None if query.ratings is None else [query.ratings[place] for place in kept]
            ids = self.prompt.prefix_ids([self._items[query.history[place]] for place in kept], ratings)
            if len(ids) <= self._room or not kept:
                return ids
            kept = kept[1:]

    def whole(self, query: Query, item_id: str) -> list[int]:
        """The whole prompt of an item that is among the candidates."""
        return self.prefix(query) + self.candidates[item_id]


@dataclass
class RelevanceScorer:
    """The relevance model as a scorer; the history is read once per user, whatever the number of candidates.

    Attributes:
        model: the relevance model.
        prompt: the compiled relevance prompt.
        catalog: the items that can be written.
        calibrated: take off the score of the same candidate after an empty history (content-free calibration, Zhao et
            al. 2021). A causal model only.
        bf16: read in bf16.
        progress: gets the number of queries done.
    """

    model: RelevanceModel
    prompt: CompiledPrompt
    catalog: Catalog
    calibrated: bool = True
    bf16: bool = False
    progress: Callable[[int], None] = lambda _: None
    _empty: dict[str, float] = field(default_factory=dict, repr=False)

    def score(self, queries: Sequence[Query], candidates: ItemIndex) -> Scores:
        """Score every candidate for every query: float32[queries, candidates]; NaN for an item without text.

        A history without a known item is NaN: what the model says of it is the calibration itself.
        """
        columns = [row for row, item in enumerate(candidates.ids) if item in self.prompts.candidates]
        result = np.full((len(queries), len(candidates)), np.nan, dtype=np.float32)
        if not columns:
            return result
        suffixes = [self.prompts.candidates[candidates.ids[row]] for row in columns]
        empty = self._calibration([candidates.ids[row] for row in columns])
        with self._reading():
            for row, query in enumerate(queries):
                if self.prompts.knows(query):
                    result[row, columns] = self._after(self.prompts.prefix(query), suffixes) - empty
                self.progress(1)
        return result

    def score_pairs(self, queries: Sequence[Query], items: Sequence[str]) -> NDArray[np.float32]:
        """Score one item per query: float32[queries], NaN as above.

        A history that comes with several items is read once; other pairs are whole prompts, in length order.
        """
        rows: dict[Query, list[int]] = {}
        for row, (query, item) in enumerate(zip(queries, items, strict=True)):
            if item in self.prompts.candidates:
                rows.setdefault(query, []).append(row)
        result = np.full(len(queries), np.nan, dtype=np.float32)
        single: list[int] = []
        for query, own in rows.items():
            if self.model.causal and len(own) >= SHARED_FROM:
                index = ItemIndex(dict.fromkeys(items[row] for row in own))
                result[own] = self.score([query], index)[0, index.rows(items[row] for row in own)]
            elif self.prompts.knows(query):
                single += own
        if single:
            empty = self._calibration([items[row] for row in single])
            with self._reading():
                result[single] = self._whole([(queries[row], items[row]) for row in single]) - empty
        return result

    @cached_property
    def prompts(self) -> PairPrompts:
        """What the model reads."""
        return PairPrompts(self.prompt, self.catalog, self.model)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        was_training, device = self.model.training, next(self.model.parameters()).device
        self.model.eval()
        with torch.inference_mode(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.bf16):
            yield
        self.model.train(was_training)

    def _whole(self, pairs: Sequence[tuple[Query, str]]) -> NDArray[np.float32]:
        """Scores float32[pairs] of whole prompts, read in batches of one length as nearly as may be."""
        written = [self.prompts.whole(query, item) for query, item in pairs]
        order = sorted(range(len(written)), key=lambda place: len(written[place]))
        result = np.zeros(len(written), dtype=np.float32)
        device, start = next(self.model.parameters()).device, 0
        while start < len(order):
            # As many as fit by the first, which is the shortest: the next ones are hardly longer.
            places = order[start : start + max(1, PAIR_TOKENS // len(written[order[start]]))]
            batch = [written[place] for place in places]
            lengths = torch.tensor([len(ids) for ids in batch], device=device)
            scores = self.model.logits(torch.from_numpy(padded(batch)).to(device), lengths)
            result[places] = scores.float().cpu().numpy()
            start += len(places)
            self.progress(len(places))
        return result

    def _calibration(self, items: Sequence[str]) -> NDArray[np.float32]:
        if not self.calibrated or not self.model.causal:
            return np.zeros(len(items), dtype=np.float32)
        missing = [item for item in dict.fromkeys(items) if item not in self._empty]
        if missing:
            suffixes = [self.prompts.candidates[item] for item in missing]
            with self._reading():
                scores = self._after(self.prompt.empty_prefix, suffixes)
            self._empty.update(zip(missing, scores.tolist(), strict=True))
        return np.array([self._empty[item] for item in items], dtype=np.float32)

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
        return self.model.answer(hidden[torch.arange(len(batch), device=device), lengths - 1])

    def _pairs(self, prefix: list[int], batch: list[list[int]], device: torch.device) -> Tensor:
        rows = [prefix + suffix for suffix in batch]
        lengths = torch.tensor([len(row) for row in rows], device=device)
        return self.model.logits(torch.from_numpy(padded(rows)).to(device), lengths)


def answer_output(base: BaseModel) -> nn.Linear | None:
    """The output matrix of a causal model; None for an encoder.

    Raises:
        RecllmError: a causal model without an output matrix.
    """
    if base.causal and base.output is None:
        raise RecllmError(
            f"{base.folder} has no output matrix, so it has no answer words. Use a causal language model."
        )
    return base.output


def zero_shot_scorer(
    model_name: str, prompt_name: str, catalog: Catalog, say: Callable[[str], None] = lambda _: None
) -> RelevanceScorer:
    """An untrained language model as a scorer of items that have only text.

    Args:
        model_name: a fetchable name, a hub id or a local folder of a causal model.
        prompt_name: a relevance prompt, shipped or by path.
        catalog: the items of the histories and the candidates.
        say: gets lines about what is fetched or converted.

    Raises:
        RecllmError: the model is an encoder or cannot be had, or the prompt is for another task or names a column that
            is not there.
    """
    prompt = load_prompt(prompt_name, task="relevance")
    prompt.check_against(catalog)
    base = load_base(model_folder(model_name, say))
    if not base.causal:
        raise RecllmError(
            f"'{model_name}' is an encoder: it has no answer words, so it cannot judge before it is trained. Score "
            "zero-shot with a causal model (smollm2-135m-instruct, a hub id or a folder), or train an encoder as "
            "model.item_encoder, whose text similarity scores new items."
        )
    compiled = compile_prompt(prompt, base.tokenizer)
    model = RelevanceModel(base, base.model, answer_output(base), compiled.answer_ids)
    model.eval().to(scoring_device())
    return RelevanceScorer(model, compiled, catalog, bf16=fast_bf16())

"""Relevance: will this user like this candidate? Two rows of the output matrix at one position, one prefix per user."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PretrainedConfig

from recllm.cascade import Prefix, joined, read_prefix, read_suffixes, shares_prefixes
from recllm.data import Catalog, Query
from recllm.devices import fast_bf16
from recllm.errors import RecllmError
from recllm.histories import padded
from recllm.judgedloss import NOTHING, judged_loss
from recllm.lean import round_frozen
from recllm.lm import BaseModel, load_base, mean_pool, model_folder, positions_of, scoring_device, stream_width
from recllm.pointwise import Beginning, Ids, PointwiseScorer
from recllm.prompts import CompiledPrompt, compile_prompt, load_prompt
from recllm.sequence import IGNORED
from recllm.trees import Tree, chains_of, read_trees, reads_trees, tree_of, trees_together

TOKENS_AT_ONCE = 4096, 65536
"""Tokens that are read at once, on a CPU and at most on a GPU."""
GPU_BYTES, LOGIT_BYTES, LONG = 8 << 30, 7, 1024
"""What one layer's attention and all keys and values of such tokens may take on a GPU, bytes that cascade attention
takes for a logit against a prefix (measured), and the prefix's length that is reckoned with."""
TREE_TOKENS = 1536
"""Ids of a tree that is only read: its attention grows with their square."""
NOT_GROWN = tree_of([])
ANY_LENGTH = 1 << 20
"""Longest prompt of a model that states no limit."""


@dataclass(frozen=True)
class RelevanceCollator:
    """(prompt ids, label, number of the user) rows to padded tensors."""

    def __call__(self, rows: Sequence[tuple[list[int], float, int]]) -> dict[str, Tensor]:
        """Ids int64[batch, length], lengths int64[batch], users int64[batch, 1], labels float32[batch, 1]."""
        return {
            "ids": torch.from_numpy(padded([ids for ids, _, _ in rows])),
            "lengths": torch.tensor([len(ids) for ids, _, _ in rows]),
            "users": torch.tensor([[user] for _, _, user in rows]),
            "labels": torch.tensor([[label] for _, label, _ in rows], dtype=torch.float32),
        }


class AnswerDifference(nn.Module):
    """Logit of the positive answer minus logit of the negative one: the difference of two rows of the output matrix."""

    def __init__(self, output: nn.Linear, answers: tuple[int, int]) -> None:
        super().__init__()
        positive, negative = answers
        rows = output.weight.detach().float()
        bias = rows.new_zeros(len(rows)) if output.bias is None else output.bias.detach().float()
        self.register_buffer("direction", rows[positive] - rows[negative], persistent=False)
        self.register_buffer("offset", bias[positive] - bias[negative], persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """float[…, width] to float32[…]."""
        return hidden.float() @ self.direction + self.offset  # type: ignore[operator]


class RelevanceModel(nn.Module):
    """A language model that answers one question about a history and a candidate.

    A causal model answers at the last position of the prompt with the difference of its answer words' logits, without
    any new parameter, so that zero-shot, few-shot and tuned are the same code. An encoder has no answer words: it
    pools the pair and learns one direction, so it must be tuned first.
    """

    accepts_loss_kwargs = True
    """Trainer then says how many labels all devices and accumulation steps have, and takes the loss for a share."""

    def __init__(self, base: BaseModel, body: nn.Module, output: nn.Linear | None, answers: tuple[int, int]) -> None:
        super().__init__()
        self.body, self.causal = body, base.causal
        self.max_tokens = positions_of(base) or ANY_LENGTH
        width = stream_width(base.model.config)
        self.difference = nn.Linear(width, 1) if output is None else AnswerDifference(output, answers)
        self.soft_from: int | None = None
        """The token of the catalogue's first item, where items have tokens of their own."""
        self.history_stride = 1
        """Of the prompts that it is trained on."""
        self.inside = NOTHING
        """Weights of the losses over rows of one user."""

    def forward(
        self,
        ids: Tensor,
        lengths: Tensor,
        labels: Tensor,
        users: Tensor,
        num_items_in_batch: Tensor | int | None = None,
        ends: Tensor | None = None,
        positions: Tensor | None = None,
        trunks: Tensor | None = None,
        branches: Tensor | None = None,
        reach: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Binary cross-entropy of `labels` float32[batch, rows], −100 where a row does not count.

        Whole prompts are a row each; with `ends`, int64[batch, rows], each sequence is a tree of `trees_together`. With
        weights `inside` users it also compares the rows of one user, int64[batch, rows] `users`: those of this batch,
        or of each tree by itself, so that it is the same loss whoever reads which trees.

        Returns:
            `loss`, a scalar, and `logits`, float32[batch, rows].
        """
        if ends is None:
            logits = self.logits(ids, lengths)[:, None]
        else:
            tree = {"positions": positions, "trunks": trunks, "branches": branches, "reach": reach}
            logits = self.tree_logits(ids, ends, **{name: own for name, own in tree.items() if own is not None})
        inside = self.inside if self.training else NOTHING
        if num_items_in_batch is None:
            num_items_in_batch = (labels != IGNORED).sum().clamp(min=1)
        groups = [(logits.reshape(-1), labels.reshape(-1), users.reshape(-1))]
        if inside and ends is not None:
            groups = list(zip(logits, labels, users, strict=True))
        loss = torch.stack([judged_loss(*group, inside, num_items_in_batch) for group in groups]).sum()
        return {"loss": loss, "logits": logits}

    def tree_logits(self, ids: Tensor, ends: Tensor, **tree: Tensor) -> Tensor:
        """Scores float32[trees, rows] of the rows of trees, as `trees_together` gives them."""
        hidden = read_trees(self.body, ids=ids, **tree)
        return self.answer(torch.gather(hidden, 1, ends[..., None].expand(*ends.shape, hidden.shape[-1])))

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


@dataclass(eq=False)
class TorchReader:
    """The relevance model as what `PointwiseScorer` asks."""

    model: RelevanceModel

    @property
    def causal(self) -> bool:
        """As the model's."""
        return self.model.causal

    @property
    def max_tokens(self) -> int:
        """As the model's."""
        return self.model.max_tokens

    @property
    def soft_from(self) -> int | None:
        """As the model's."""
        return self.model.soft_from

    @property
    def tokens_at_once(self) -> int:
        """As many as keep the device busy; more would only take memory."""
        return tokens_on_gpu(self.model.body.config) if self._device.type == "cuda" else TOKENS_AT_ONCE[0]

    @cached_property
    def shares(self) -> bool:
        """Whether candidates can share a prefix: tried once."""
        return self.causal and shares_prefixes(self.model.body)

    @cached_property
    def grows(self) -> bool:
        """Whether prompts that begin alike can be read as a tree: tried once."""
        return self.causal and reads_trees(self.model.body)

    def tree(self, trees: Sequence[Tree]) -> list[NDArray[np.float32]]:
        """Answers to the rows of trees: per tree float32[its rows]."""
        given = {name: own.to(self._device) for name, own in trees_together(trees).items()}
        found = _array(self.model.tree_logits(**given))
        return [answers[: len(tree.ends)] for tree, answers in zip(trees, found, strict=True)]

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def whole(self, ids: Ids, lengths: Ids) -> NDArray[np.float32]:
        """Answers float32[rows] to whole prompts."""
        return _array(self.model.logits(self._tensor(ids), self._tensor(lengths)))

    def read(self, ids: Ids, lengths: Ids) -> Prefix:
        """Keys and values of prefixes."""
        return read_prefix(self.model.body, self._tensor(ids), self._tensor(lengths))

    def take(self, prefixes: Prefix, row: int) -> tuple[Prefix, int]:
        """One user's prefix, and its bytes."""
        own = prefixes.of(row)
        return own, own.bytes

    def join(self, prefixes: Sequence[Prefix]) -> Prefix:
        """Prefixes of one user each, together."""
        return joined(prefixes)

    def answers(self, prefixes: Prefix, ids: Ids, lengths: Ids) -> NDArray[np.float32]:
        """Answers float32[users, candidates] after continuations of the prefixes."""
        hidden = read_suffixes(self.model.body, prefixes, self._tensor(ids))
        return _array(self.model.answer(at_ends(hidden, self._tensor(lengths) - 1)))

    def _tensor(self, ids: Ids) -> Tensor:
        return torch.from_numpy(ids).to(self._device)


def tokens_on_gpu(config: PretrainedConfig) -> int:
    """Tokens that are read at once on a GPU: as many as keep it busy, fewer of a model with many heads or layers."""
    least, most = TOKENS_AT_ONCE
    try:
        config = config.get_text_config()
        heads = int(config.num_attention_heads)
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        kept = 2 * 4 * config.num_hidden_layers * width * (getattr(config, "num_key_value_heads", None) or heads)
    # No attention heads (Mamba), layers that differ in them (Gemma 4), several texts (MusicGen): the careful number.
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return least
    return max(least, min(most, GPU_BYTES // (LOGIT_BYTES * LONG * heads + kept)))


def at_ends(hidden: Tensor, ends: Tensor) -> Tensor:
    """Of float[users, candidates, length, width] the place `ends`, int64[users, candidates], of each."""
    at = ends[..., None, None].expand(*ends.shape, 1, hidden.shape[-1])
    return torch.gather(hidden, 2, at)[:, :, 0]


def _array(scores: Tensor) -> NDArray[np.float32]:
    return scores.float().cpu().numpy()


class RelevanceScorer(PointwiseScorer):
    """The relevance model as a scorer, as `PointwiseScorer`; the model is left in the mode that it was in.

    With `bf16` the linear layers of the model are rounded for good, once in place of at every pass.

    Args:
        model: the relevance model.
        prompt: the compiled relevance prompt.
        catalog: the items that can be written.
        calibrated: take off what the model says after an empty history.
        bf16: read in bf16, under autocast.
        progress: gets the number of queries done.
        keep_bytes: memory for the prefixes of returning users.
    """

    def __init__(
        self,
        model: RelevanceModel,
        prompt: CompiledPrompt,
        catalog: Catalog,
        calibrated: bool = True,
        bf16: bool = False,
        progress: Callable[[int], None] = lambda _: None,
        keep_bytes: int = 0,
    ) -> None:
        self._torch = TorchReader(model)
        super().__init__(self._torch, prompt, catalog, calibrated, keep_bytes, progress)
        self.model, self._bf16 = model, bf16
        if bf16:
            _ = self._torch.shares, self._torch.grows  # tried in float32, where rounding hides less
            round_frozen(model.body.requires_grad_(False), torch.bfloat16)

    def _apart(self, queries: Sequence[Query], items: Sequence[str]) -> NDArray[np.float32]:
        """As the base class; histories of one user that go on from one another are read once."""
        if not self._torch.grows:
            return super()._apart(queries, items)
        alike: dict[Beginning, list[int]] = {}
        for row, query in enumerate(queries):
            alike.setdefault(self.prompts.beginning(query), []).append(row)
        chains = [chain for rows in alike.values() for chain in self._chains(rows, queries, items)]
        result = np.zeros(len(queries), dtype=np.float32)
        alone = [chain[0] for chain, _ in chains if len(chain) == 1]
        result[alone] = super()._apart([queries[row] for row in alone], [items[row] for row in alone])
        grown = sorted((own for own in chains if len(own[0]) > 1), key=lambda own: -len(own[1].ids))
        while grown:
            # As many as a pass may read, and no more masks than of a few long trees.
            length = len(grown[0][1].ids)
            most = min(self._torch.tokens_at_once // length, self._torch.tokens_at_once * TREE_TOKENS // length**2)
            batch, grown = grown[: max(1, most)], grown[max(1, most) :]
            for (rows, _), answers in zip(batch, self._torch.tree([tree for _, tree in batch]), strict=True):
                result[rows] = answers
                self.progress(len(rows))
        return result

    def _chains(
        self, rows: Sequence[int], queries: Sequence[Query], items: Sequence[str]
    ) -> Iterator[tuple[list[int], Tree]]:
        """Rows whose stems go on from one another, and their tree, of rows that begin alike."""
        if len(rows) == 1:
            yield list(rows), NOT_GROWN
            return
        written = [(self.prompts.stem(queries[row]), self.prompts.branch(items[row])) for row in rows]
        for places in chains_of(written, TREE_TOKENS):
            yield [rows[place] for place in places], tree_of([written[place] for place in places])

    @contextmanager
    def _reading(self) -> Iterator[None]:
        was_training, device = self.model.training, next(self.model.parameters()).device
        self.model.eval()
        try:
            with torch.inference_mode(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=self._bf16):
                yield
        finally:
            self.model.train(was_training)


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
    model_name: str,
    prompt_name: str,
    catalog: Catalog,
    say: Callable[[str], None] = lambda _: None,
    *,
    like_at: float | None = None,
    bf16: bool | None = None,
) -> RelevanceScorer:
    """An untrained language model as a scorer of items that have only text.

    Args:
        model_name: a fetchable name, a hub id or a local folder of a causal model.
        prompt_name: a relevance prompt, shipped or by path.
        catalog: the items of the histories and the candidates.
        say: gets lines about what is fetched or converted.
        like_at: the rating from which an item of a history was liked; None marks none as liked or disliked.
        bf16: read in bf16; where that is fast, if not given.

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
    compiled = compile_prompt(prompt, base.tokenizer, like_at)
    model = RelevanceModel(base, base.model, answer_output(base), compiled.answer_ids)
    scorer = RelevanceScorer(model.eval(), compiled, catalog, bf16=fast_bf16() if bf16 is None else bf16)
    model.to(scoring_device())  # rounded by now: a GPU may have no room for all of it
    return scorer

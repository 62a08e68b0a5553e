"""The light judge: a small transformer reads a history with its ratings and says whether a candidate will be liked."""

import math
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from recllm.data import Query
from recllm.histories import padded
from recllm.judgedloss import NOTHING, InsideUsers, judged_loss
from recllm.ranking import ItemIndex, Scores
from recllm.sequence import ItemProjection, LightBody, drop_factors
from recllm.splits import Example
from recllm.vectors import ItemFeatures

UNRATED, DISLIKED, LIKED, CANDIDATE = range(4)
"""What is known of an item where it stands."""
FACTS = 5
SHRINKAGE = 5.0
FOLDS = 4
"""Parts of the training rows; few, so that what the others say of a row's own label is little."""
PAIRS_IN_BATCH = 512
"""Pairs that are scored at once."""


@dataclass(frozen=True)
class LikeShares:
    """How often each item was liked, and each user's items, in the training rows.

    A training row sees the counts of the other folds only. To leave out just the row's own label would not hide it: of
    one user's rows the liked ones would see a share lower by one like than the disliked ones.

    Attributes:
        items: rows and likes by item and fold, float64[folds, 2].
        users: rows and likes by user and fold, float64[folds, 2].
        middle: share of likes over all rows.
    """

    items: dict[str, NDArray[np.float64]]
    users: dict[str, NDArray[np.float64]]
    middle: float

    @classmethod
    def fit(cls, rows: Iterable[Example]) -> Self:
        """Count the labelled rows; each event once, however often a set repeats it."""
        items: dict[str, NDArray[np.float64]] = {}
        users: dict[str, NDArray[np.float64]] = {}
        likes = {(row.query.user_id, row.item_id): row.label for row in rows if row.label is not None}
        for (user, item), label in likes.items():
            for counts, key in ((items, item), (users, user or "")):
                counts.setdefault(key, np.zeros((FOLDS, 2)))[fold_of(user, item)] += 1.0, label
        total = sum((counts.sum(axis=0) for counts in items.values()), np.zeros(2))
        return cls(items, users, float(total[1] / max(total[0], 1.0)))

    def facts(self, query: Query, item: str, likes: Sequence[float] | None, *, training: bool = False) -> list[float]:
        """Five numbers: the item's share of likes and log count, the user's, and the log length of the history.

        Args:
            query: who is asked.
            item: the candidate.
            likes: 1 and 0 of the history's rated items, which stand for the user; None where the history has no
                ratings, so that the user's training rows do.
            training: leave the fold of this pair out.
        """
        left_out = fold_of(query.user_id, item) if training else None
        in_items = self._counts(self.items.get(item), left_out)
        in_users = self._counts(self.users.get(query.user_id or ""), left_out)
        if likes is not None:
            in_users = float(len(likes)), float(sum(likes))
        shares = [number for counts in (in_items, in_users) for number in (self._share(counts), math.log1p(counts[0]))]
        return [*shares, math.log1p(len(query.history))]

    def _share(self, counts: tuple[float, float]) -> float:
        number, liked = counts
        return (liked + SHRINKAGE * self.middle) / (number + SHRINKAGE) - self.middle

    @staticmethod
    def _counts(counts: NDArray[np.float64] | None, left_out: int | None) -> tuple[float, float]:
        if counts is None:
            return 0.0, 0.0
        number, liked = counts.sum(axis=0) - (0.0 if left_out is None else counts[left_out])
        return float(number), float(liked)


def fold_of(user: str | None, item: str) -> int:
    """The fold of a pair, the same in every run."""
    return zlib.crc32(f"{user}\0{item}".encode()) % FOLDS


class Pair(NamedTuple):
    """One history with its candidate, ready for the model."""

    ids: list[int]
    """Item rows of the history, oldest first, the candidate last."""
    kinds: list[int]
    facts: list[float]
    user: int
    label: float


@dataclass(frozen=True, eq=False)
class PairFormat:
    """Turns queries and items into pairs, the same for training and scoring.

    Attributes:
        index: the items.
        shares: what the training rows say of items and users.
        threshold: a rating of at least this is a like.
        limit: how many of the last items are read.
    """

    index: ItemIndex
    shares: LikeShares
    threshold: float
    limit: int
    _users: dict[str, int] = field(default_factory=dict)

    def knows(self, query: Query, item: str) -> bool:
        """Whether the pair can be judged: a known item in the history, and a known candidate."""
        return item in self.index and any(own in self.index for own in query.history)

    def pair(self, query: Query, item: str, label: float | None = None) -> Pair:
        """The pair of a training row, whose fold is left out of the shares, or of a question without a label."""
        known = [place for place, own in enumerate(query.history) if own in self.index][-self.limit :]
        kinds = [self._kind(None if query.ratings is None else query.ratings[place]) for place in known]
        rows = self.index.rows([*(query.history[place] for place in known), item]).tolist()
        likes = None if query.ratings is None else [float(kind == LIKED) for kind in kinds if kind != UNRATED]
        facts = self.shares.facts(query, item, likes, training=label is not None)
        user = self._users.setdefault(query.user_id, len(self._users)) if query.user_id is not None else -1
        return Pair(rows, [*kinds, CANDIDATE], facts, user, 0.0 if label is None else label)

    def _kind(self, rating: float | None) -> int:
        if rating is None:
            return UNRATED
        return LIKED if rating >= self.threshold else DISLIKED


@dataclass(frozen=True)
class PairCollator:
    """Pairs to padded tensors, without any randomness."""

    def __call__(self, pairs: Sequence[Pair]) -> dict[str, Tensor]:
        """int64[batch, length] `ids` and `kinds`, int64[batch] `ends` and `users`, float32[batch, …] the others."""
        return {
            "ids": torch.from_numpy(padded([pair.ids for pair in pairs])),
            "kinds": torch.from_numpy(padded([pair.kinds for pair in pairs])),
            "ends": torch.tensor([len(pair.ids) - 1 for pair in pairs]),
            "facts": torch.tensor([pair.facts for pair in pairs], dtype=torch.float32),
            "users": torch.tensor([pair.user for pair in pairs]),
            "labels": torch.tensor([[pair.label] for pair in pairs], dtype=torch.float32),
        }


class LightJudge(nn.Module):
    """A causal transformer over item tokens, each marked as liked, disliked, unrated or asked about.

    As knowledge tracing asks whether the next answer will be right (Pandey & Karypis 2019, "A Self-Attentive Model for
    Knowledge Tracing"), the candidate stands last and attends to the marked history; what training rows say of the
    item and of the user is added to it.

    Args:
        features: the item vectors.
        width, layers, heads, dropout: of the transformer.
        limit: the longest history.
        relative, gated: whether attention also learns how much each distance counts, and gates what it mixes.
        factor_dropout: share of items that lose their factors in a training step.
        inside: weights of the losses over rows of one user.
    """

    def __init__(
        self,
        features: ItemFeatures,
        *,
        width: int,
        layers: int,
        heads: int,
        dropout: float,
        limit: int,
        relative: bool = False,
        gated: bool = False,
        factor_dropout: float = 0.0,
        inside: InsideUsers = NOTHING,
    ) -> None:
        super().__init__()
        self.tokens = ItemProjection(features.text.shape[1], features.factors.shape[1], width, 1.0)
        self.kinds = nn.Embedding(4, width)
        nn.init.normal_(self.kinds.weight, std=0.02)
        self.facts = nn.Linear(FACTS, width)
        self.body = LightBody(width, layers, heads, limit + 1, dropout, relative=relative, gated=gated)
        self.head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Dropout(dropout), nn.Linear(width, 1))
        self.factor_dropout, self.inside = factor_dropout, inside
        self.register_buffer("text_vectors", torch.from_numpy(features.text), persistent=False)
        self.register_buffer("item_factors", torch.from_numpy(features.factors), persistent=False)

    def forward(
        self,
        ids: Tensor,
        kinds: Tensor,
        ends: Tensor,
        facts: Tensor,
        users: Tensor,
        labels: Tensor,
        num_items_in_batch: Tensor | int | None = None,
        **_: object,
    ) -> dict[str, Tensor]:
        """Binary cross-entropy, and the losses over those rows of one user that stand in this batch.

        Returns:
            `loss`, a scalar, and `logits`, float32[batch].
        """
        logits, given = self.logits(ids, kinds, ends, facts), labels[:, 0]
        inside = self.inside if self.training else NOTHING
        return {"loss": judged_loss(logits, given, users, inside, num_items_in_batch), "logits": logits}

    def logits(self, ids: Tensor, kinds: Tensor, ends: Tensor, facts: Tensor) -> Tensor:
        """Scores float32[batch] of pairs, padded on the right."""
        table = self.tokens(self.text_vectors, self._factors())
        tokens = functional.embedding(ids, table) + self.kinds(kinds)
        rows = torch.arange(len(ids), device=ids.device)
        asked = torch.zeros_like(tokens).index_put((rows, ends), self.facts(facts).to(tokens.dtype))
        hidden = self.body(tokens + asked)[rows, ends]
        logits: Tensor = self.head(hidden)[:, 0].float()
        return logits

    def _factors(self) -> Tensor:
        factors: Tensor = self.item_factors  # type: ignore[assignment]
        return drop_factors(factors, self.factor_dropout) if self.training else factors


@dataclass(eq=False)
class LightJudgeScorer:
    """A trained light judge as a scorer; NaN for an unknown item and for a history without a known one."""

    model: LightJudge
    form: PairFormat

    def score(self, queries: Sequence[Query], candidates: ItemIndex) -> Scores:
        """Judge every candidate for every query: float32[queries, candidates]."""
        pairs = [query for query in queries for _ in candidates.ids]
        return self.score_pairs(pairs, candidates.ids * len(queries)).reshape(len(queries), len(candidates))

    @torch.inference_mode()
    def score_pairs(self, queries: Sequence[Query], items: Sequence[str]) -> NDArray[np.float32]:
        """Judge one item per query: float32[queries]."""
        self.model.eval()
        device, collate = next(self.model.parameters()).device, PairCollator()
        rows = [row for row, pair in enumerate(zip(queries, items, strict=True)) if self.form.knows(*pair)]
        pairs = {row: self.form.pair(queries[row], items[row]) for row in rows}
        rows.sort(key=lambda row: len(pairs[row].ids))
        result = np.full(len(items), np.nan, dtype=np.float32)
        for start in range(0, len(rows), PAIRS_IN_BATCH):
            part = rows[start : start + PAIRS_IN_BATCH]
            batch = {name: value.to(device) for name, value in collate([pairs[row] for row in part]).items()}
            logits = self.model.logits(batch["ids"], batch["kinds"], batch["ends"], batch["facts"])
            result[part] = logits.cpu().numpy()
        return result

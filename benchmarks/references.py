"""The classical references of a ranking table, each tuned on validation over a stated grid.

They are what the field compares with, so none of them has what recllm adds: histories do not fade, SASRec learns its
item vectors from ids alone. Each is fitted once per entry of its grid, and the best by NDCG@10 on validation is kept.
"""

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from recllm.data import Interactions, Query
from recllm.histories import padded
from recllm.itemitem import EASE
from recllm.mf import FactorSettings, ImplicitMF, user_items_matrix
from recllm.priors import TextSimilarity
from recllm.ranking import ItemIndex, Scorer, Scores
from recllm.recency import Fading, RecencySettings, ranking_figure
from recllm.runs import LightSettings
from recllm.sequence import LightBody
from recllm.softmax import Barred, Targets, catalogue_loss
from recllm.tasks import Task
from recllm.vectors import RawVectors, Standard
from recllm.windows import Windows

Say = Callable[[str], None]
Figure = Callable[[Fading], float]
"""NDCG@10 on the validation rows that tune."""
GRIDS: dict[str, dict[str, Sequence[Any]]] = {
    "ref ALS": {"factors": (64, 128), "alpha": (1.0, 5.0, 20.0), "regularization": (10.0, 100.0)},
    "ref BPR": {"factors": (64, 128), "regularization": (0.01, 0.1)},
    "ref EASE": {"regularization": (50.0, 200.0, 500.0, 1000.0)},
    "ref SASRec": {"dropout": (0.2, 0.5)},
    "ref text cosine": {"centred": (False, True)},
}
"""What each reference is tuned over: every combination is one trial."""
LARGE_ITEMS, LARGE_EVENTS = 5000, 500_000
"""From so many items or events on a trial takes minutes, and the grids are smaller."""
LARGE_GRIDS: dict[str, dict[str, Sequence[Any]]] = {
    "ref ALS": {"factors": (128,), "alpha": (1.0, 5.0, 20.0), "regularization": (10.0, 30.0)},
    "ref BPR": {"factors": (64,), "regularization": (0.01,)},
    "ref EASE": {"regularization": (20.0, 50.0, 200.0, 500.0)},
}
SASREC_EPOCHS = 100
"""The most passes of a SASRec trial; the best epoch on validation is kept."""
PATIENCE = 10
"""Epochs without a better one after which a SASRec trial ends: with 3 it ended at epoch 16 on ml-100k, whose validation
goes up and down, and .1041 there became .1247 by epoch 80."""
TUNED_ON = RecencySettings().queries
"""The most validation rows that tune a reference, as many as choose recllm's own half-lives."""


@dataclass(frozen=True)
class Reference:
    """A tuned reference: the scorer, the chosen settings, and each trial's NDCG@10 on validation."""

    scorer: Scorer
    chosen: dict[str, Any]
    trials: dict[str, float]
    seconds: float


class BPR:
    """implicit's Bayesian personalised ranking: known users only, by their own factors."""

    half_life = None

    def __init__(
        self,
        users: dict[str, int],
        items: ItemIndex,
        user_factors: NDArray[np.float32],
        item_factors: NDArray[np.float32],
    ) -> None:
        self.users, self.items, self.user_factors, self.item_factors = users, items, user_factors, item_factors

    @classmethod
    def fit(cls, train: Interactions, seed: int, *, factors: int, regularization: float) -> "BPR":
        """Fit on one thread: on two its result is another one every time."""
        from implicit.bpr import BayesianPersonalizedRanking

        items, matrix = user_items_matrix(train)
        model = BayesianPersonalizedRanking(
            factors=factors, regularization=regularization, iterations=100, random_state=seed, num_threads=1
        )
        with threadpool_limits(1, "blas"):
            model.fit(matrix, show_progress=False)
        users = {user: row for row, user in enumerate(train.frame["user_id"].unique(maintain_order=True))}
        return cls(users, items, np.asarray(model.user_factors), np.asarray(model.item_factors))

    def score(self, queries: Sequence[Query], candidates: ItemIndex) -> Scores:
        """Dot products: float32[queries, candidates]; NaN for an unknown user or item."""
        rows = np.array([self.users.get(query.user_id or "", -1) for query in queries])
        columns = self.items.rows(candidates.ids)
        scores = (self.user_factors[rows] @ self.item_factors[columns].T).astype(np.float32)
        scores[rows < 0] = np.nan
        scores[:, columns < 0] = np.nan
        return scores


class SASRec(nn.Module):
    """Kang & McAuley 2018 with full softmax: one learnt vector per item, the same for input and output."""

    def __init__(self, items: int, width: int, positions: int, dropout: float) -> None:
        super().__init__()
        self.items = nn.Embedding(items, width)
        nn.init.normal_(self.items.weight, std=0.02)
        self.body = LightBody(width, layers=2, heads=2, positions=positions, dropout=dropout)

    def forward(self, ids: Tensor) -> Tensor:
        """Hidden states float32[batch, length, width] of item rows, int64[batch, length]."""
        hidden: Tensor = self.body(self.items(ids))
        return hidden


class SASRecScorer:
    """A trained SASRec; NaN for an empty history and for an item without events."""

    half_life = None

    def __init__(self, model: SASRec, index: ItemIndex, warm: NDArray[np.bool_], positions: int) -> None:
        self.model, self.index, self.warm, self.positions = model.eval(), index, warm, positions

    @torch.inference_mode()
    def score(self, queries: Sequence[Query], candidates: ItemIndex) -> Scores:
        """Dot products with the last hidden state: float32[queries, candidates]."""
        rows = [self.index.known(query.history)[-self.positions :].tolist() for query in queries]
        last = torch.tensor([max(len(row) - 1, 0) for row in rows])
        hidden = self.model(torch.from_numpy(padded([row or [0] for row in rows])))[torch.arange(len(rows)), last]
        scores = (hidden @ self.model.items.weight.T).numpy().astype(np.float32)
        scores[:, ~self.warm] = np.nan
        scores[[not row for row in rows]] = np.nan
        columns = self.index.rows(candidates.ids)
        return np.where(columns >= 0, scores[:, columns], np.float32(np.nan))


def train_sasrec(
    task: Task, figure: Figure, seed: int, say: Say, *, dropout: float, width: int = 128, positions: int = 50
) -> SASRecScorer:
    """Train by AdamW with the light scorer's schedule of windows; the best epoch on validation is kept.

    `say` gets a line per epoch.
    """
    torch.manual_seed(seed)
    batch, none = 64, torch.zeros(0, dtype=torch.long)
    model = SASRec(len(task.index), width, positions, dropout)
    bias = torch.where(torch.from_numpy(task.warm), 0.0, -torch.inf)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, betas=(0.9, 0.98))
    windows = Windows(task.sequences(), positions, SASREC_EPOCHS, seed, batch=batch)
    best, kept, since = -1.0, copy.deepcopy(model), 0
    for epoch in range(SASREC_EPOCHS):
        model.train()
        rows = list(windows.epoch(epoch))
        for start in range(0, len(rows), batch):
            part = rows[start : start + batch]
            ids = torch.from_numpy(padded([row[:-1].tolist() for row in part]))
            labels = torch.from_numpy(padded([row[1:].tolist() for row in part], -100))
            with torch.autocast("cpu", dtype=torch.bfloat16):
                hidden, own = model(ids)[labels != -100], labels[labels != -100][:, None]
                targets = Targets(own, torch.ones(own.shape))
                total, _ = catalogue_loss(hidden, model.items.weight, bias, targets, Barred(none, none))
            loss = total / len(own)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        found = figure(SASRecScorer(model, task.index, task.warm, positions))
        say(f"ref SASRec: epoch {epoch + 1} of at most {SASREC_EPOCHS}, validation NDCG@10 {found:.4f}")
        since = 0 if found > best else since + 1
        if found > best:
            best, kept = found, copy.deepcopy(model)
        if since == PATIENCE:
            break
    return SASRecScorer(kept, task.index, task.warm, positions)


def tuned_references(
    task: Task, vectors: RawVectors, seed: int, names: Sequence[str], say: Say, light: LightSettings | None = None
) -> dict[str, Reference]:
    """Fit every entry of every grid and keep the best of each reference.

    Args:
        task: the data.
        vectors: text vectors of the frozen encoder.
        seed: of the fits.
        names: which references; keys of `GRIDS`.
        say: gets a line per trial.
        light: of recllm's own sequence scorer: SASRec is as wide and reads as far back, where that is more than usual.
    """
    rows = [row for row in task.split.valid if row.item_id in task.index]
    if len(rows) > TUNED_ON:
        chosen = np.sort(np.random.default_rng(seed).permutation(len(rows))[:TUNED_ON])
        rows = [rows[place] for place in chosen]
    queries, targets = [row.query for row in rows], task.index.rows(row.item_id for row in rows)

    def figure(scorer: Fading) -> float:
        return ranking_figure(scorer, queries, targets, task.index, exclude_seen=not task.repeats)

    large = len(task.index) > LARGE_ITEMS or len(task.split.train) > LARGE_EVENTS
    grids = GRIDS | (LARGE_GRIDS if large else {})
    if light is not None and (light.width > 128 or light.max_history > 50):
        grids["ref SASRec"] = {**grids["ref SASRec"], "width": (light.width,), "positions": (light.max_history,)}
    return {name: _tuned(name, grids[name], task, vectors, seed, figure, say) for name in names}


def _tuned(
    name: str,
    grid: Mapping[str, Sequence[Any]],
    task: Task,
    vectors: RawVectors,
    seed: int,
    figure: Figure,
    say: Say,
) -> Reference:
    start, best, trials = time.monotonic(), None, {}
    for settings in _combinations(grid):
        scorer = _fit(name, task, vectors, figure, seed, say, settings)
        found = figure(scorer)
        trials[" ".join(f"{key}={value}" for key, value in settings.items())] = round(found, 5)
        say(f"{name} {settings}: validation NDCG@10 {found:.4f}")
        if best is None or found > best[0]:
            best = found, scorer, settings
    assert best is not None
    return Reference(best[1], best[2], trials, round(time.monotonic() - start, 1))


def _combinations(grid: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    for values in product(*grid.values()):
        yield dict(zip(grid, values, strict=True))


def _fit(
    name: str,
    task: Task,
    vectors: RawVectors,
    figure: Figure,
    seed: int,
    say: Say,
    settings: dict[str, Any],
) -> Fading:
    train = task.split.train
    if name == "ref ALS":
        return ImplicitMF.fit(train, FactorSettings(**settings), seed=seed)
    if name == "ref BPR":
        return BPR.fit(train, seed, **settings)
    if name == "ref EASE":
        return EASE.fit(train, **settings)
    if name == "ref SASRec":
        return train_sasrec(task, figure, seed, say, **settings)
    rows = vectors.align(task.index)
    return TextSimilarity(task.index, Standard.fit(rows)(rows) if settings["centred"] else rows)

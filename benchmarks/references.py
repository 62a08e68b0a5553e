"""The classical references of a ranking table, each tuned on validation over a stated grid.

They are what the field compares with, so none of them has what recllm adds: neither histories nor popularity fade,
SASRec learns its item vectors from ids alone and compares them by dot products, without a bias of each item. Each is
fitted once per entry of its grid, and the best by NDCG@10 on validation is kept.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sasrec import SASRecScorer, train_sasrec
from threadpoolctl import threadpool_limits

from recllm.data import Interactions, Query
from recllm.itemitem import EASE
from recllm.mf import FactorSettings, ImplicitMF, user_items_matrix
from recllm.priors import Popularity, TextSimilarity
from recllm.ranking import ItemIndex, Scorer, Scores
from recllm.recency import RecencySettings, ranking_figure
from recllm.runs import LightSettings
from recllm.tasks import Task
from recllm.vectors import RawVectors, Standard

Say = Callable[[str], None]
Figure = Callable[[Scorer], float]
"""NDCG@10 on the validation rows that tune."""
GRIDS: dict[str, dict[str, Sequence[Any]]] = {
    "ref popularity": {"half_life_days": (None,)},
    "ref ALS": {"factors": (64, 128), "alpha": (1.0, 5.0, 20.0), "regularization": (10.0, 100.0)},
    "ref BPR": {
        "factors": (64, 128),
        "regularization": (0.01, 0.05),
        "learning_rate": (0.01, 0.1),
        "iterations": (100, 300),
    },
    "ref EASE": {"regularization": (50.0, 200.0, 500.0, 1000.0)},
    "ref SASRec": {"dropout": (0.2, 0.5)},
    "ref text cosine": {"centred": (False, True)},
}
"""What each reference is tuned over: every combination is one trial."""
LARGE_ITEMS, LARGE_EVENTS = 5000, 500_000
"""From so many items or events on a trial takes minutes, and the grids are smaller."""
LARGE_GRIDS: dict[str, dict[str, Sequence[Any]]] = {
    "ref ALS": {"factors": (128,), "alpha": (1.0, 5.0, 20.0), "regularization": (10.0, 30.0)},
    "ref BPR": {
        "factors": (128,),
        "regularization": (0.01, 0.05),
        "learning_rate": (0.01, 0.1),
        "iterations": (100, 300),
    },
    "ref EASE": {"regularization": (20.0, 50.0, 200.0, 500.0)},
}
TUNED_ON = RecencySettings().queries
"""The most validation rows that tune a reference, as many as choose recllm's own half-lives."""


@dataclass(frozen=True)
class Reference:
    """A tuned reference.

    Attributes:
        scorer: the best trial's.
        chosen: its settings.
        trials: by settings, NDCG@10 on validation.
        epochs: by settings, of what is trained in epochs: the best one, and how many there were.
        seconds: what tuning took, the epochs of earlier calls with it.
    """

    scorer: Scorer
    chosen: dict[str, Any]
    trials: dict[str, float]
    epochs: dict[str, tuple[int, int]]
    seconds: float


class BPR:
    """implicit's Bayesian personalised ranking: known users only, by their own factors."""

    def __init__(
        self,
        users: dict[str, int],
        items: ItemIndex,
        user_factors: NDArray[np.float32],
        item_factors: NDArray[np.float32],
    ) -> None:
        self.users, self.items, self.user_factors, self.item_factors = users, items, user_factors, item_factors

    @classmethod
    def fit(
        cls,
        train: Interactions,
        seed: int,
        *,
        factors: int,
        regularization: float,
        learning_rate: float,
        iterations: int,
    ) -> "BPR":
        """Fit on one thread: on two its result is another one every time."""
        from implicit.bpr import BayesianPersonalizedRanking

        items, matrix = user_items_matrix(train)
        model = BayesianPersonalizedRanking(
            factors=factors,
            regularization=regularization,
            learning_rate=learning_rate,
            iterations=iterations,
            random_state=seed,
            num_threads=1,
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


def tuned_references(
    task: Task,
    vectors: RawVectors,
    seed: int,
    names: Sequence[str],
    say: Say,
    light: LightSettings | None = None,
    folder: Path | None = None,
) -> dict[str, Reference]:
    """Fit every entry of every grid and keep the best of each reference.

    Args:
        task: the data.
        vectors: text vectors of the frozen encoder.
        seed: of the fits.
        names: which references; keys of `GRIDS`.
        say: gets a line per trial.
        light: of recllm's own sequence scorer: SASRec is as wide and reads as far back, where that is more than usual,
            has as many windows in a step, and trials that are as deep beside those of two layers.
        folder: where SASRec's trials are kept, so that a later call goes on with them.
    """
    rows = [row for row in task.split.valid if row.item_id in task.index]
    if len(rows) > TUNED_ON:
        chosen = np.sort(np.random.default_rng(seed).permutation(len(rows))[:TUNED_ON])
        rows = [rows[place] for place in chosen]
    queries, targets = [row.query for row in rows], task.index.rows(row.item_id for row in rows)

    def figure(scorer: Scorer) -> float:
        return ranking_figure(scorer, queries, targets, task.index, exclude_seen=not task.repeats)

    large = len(task.index) > LARGE_ITEMS or len(task.split.train) > LARGE_EVENTS
    grids = GRIDS | (LARGE_GRIDS if large else {})
    if light is not None:
        grids["ref SASRec"] = {
            **grids["ref SASRec"],
            "width": (max(light.width, 128),),
            "positions": (max(light.max_history, 50),),
            "batch": (light.per_device_train_batch_size,),
            **({"layers": (2, light.layers)} if light.layers > 2 else {}),
        }
    return {name: _tuned(name, grids[name], task, vectors, seed, figure, say, folder) for name in names}


def _tuned(
    name: str,
    grid: Mapping[str, Sequence[Any]],
    task: Task,
    vectors: RawVectors,
    seed: int,
    figure: Figure,
    say: Say,
    folder: Path | None,
) -> Reference:
    best, trials, epochs, seconds = None, {}, {}, 0.0
    for settings in _combinations(grid):
        start = time.monotonic()
        scorer = _fit(name, task, vectors, figure, seed, say, settings, folder)
        found, key = figure(scorer), " ".join(f"{key}={value}" for key, value in settings.items())
        trials[key] = round(found, 5)
        if isinstance(scorer, SASRecScorer):
            epochs[key] = scorer.progress.best_epoch, scorer.progress.epochs
            seconds += scorer.progress.seconds
        else:
            seconds += time.monotonic() - start
        say(f"{name} {settings}: validation NDCG@10 {found:.4f}")
        if best is None or found > best[0]:
            best = found, scorer, settings
    assert best is not None
    return Reference(best[1], best[2], trials, epochs, round(seconds, 1))


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
    folder: Path | None,
) -> Scorer:
    train = task.split.train
    if name == "ref popularity":
        return Popularity.fit(train, task.index.ids, **settings)
    if name == "ref ALS":
        return ImplicitMF.fit(train, FactorSettings(**settings), seed=seed)
    if name == "ref BPR":
        return BPR.fit(train, seed, **settings)
    if name == "ref EASE":
        return EASE.fit(train, **settings)
    if name == "ref SASRec":
        return train_sasrec(task, figure, seed, say, folder, **settings)
    rows = vectors.align(task.index)
    return TextSimilarity(task.index, Standard.fit(rows)(rows) if settings["centred"] else rows)

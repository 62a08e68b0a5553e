"""SASRec as a reference: trained until validation no longer gains, and resumable, because that takes hours on a CPU."""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from recllm.data import Query
from recllm.files import written
from recllm.histories import padded
from recllm.ranking import ItemIndex, Scorer, Scores
from recllm.sequence import LightBody, seen_before
from recllm.softmax import Barred, Targets, catalogue_loss
from recllm.tasks import Task
from recllm.windows import Windows

Say = Callable[[str], None]
EPOCHS = 100
"""The most passes of a trial; the best epoch on validation is kept."""
PATIENCE = 10
"""Epochs without a better one after which a trial ends: with 3 it ended at epoch 16 on ml-100k, whose validation goes
up and down, and .1041 there became .1247 by epoch 80."""


@dataclass
class Progress:
    """How far a trial is.

    Attributes:
        epochs: passes that are done.
        best: the highest NDCG@10 on validation.
        best_epoch: the pass behind which it was measured, from 1.
        seconds: what its epochs took, those of earlier calls with them.
    """

    epochs: int = 0
    best: float = -1.0
    best_epoch: int = 0
    seconds: float = field(default=0.0, compare=False)

    @property
    def ended(self) -> bool:
        """Whether training is at its plateau, or out of passes."""
        return self.epochs >= EPOCHS or self.epochs - self.best_epoch >= PATIENCE


class SASRec(nn.Module):
    """Kang & McAuley 2018 with full softmax: one learnt vector per item, the same for input and output."""

    def __init__(self, items: int, width: int, positions: int, dropout: float, layers: int = 2) -> None:
        super().__init__()
        self.items = nn.Embedding(items, width)
        nn.init.normal_(self.items.weight, std=0.02)
        self.body = LightBody(width, layers=layers, heads=2, positions=positions, dropout=dropout)

    def forward(self, ids: Tensor) -> Tensor:
        """Hidden states float32[batch, length, width] of item rows, int64[batch, length]."""
        hidden: Tensor = self.body(self.items(ids))
        return hidden


class SASRecScorer:
    """A trained SASRec; NaN for an empty history and for an item without events."""

    half_life = None

    def __init__(
        self, model: SASRec, index: ItemIndex, warm: NDArray[np.bool_], positions: int, progress: Progress
    ) -> None:
        self.model, self.index, self.warm, self.positions = model.eval(), index, warm, positions
        self.progress = progress

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


class Trial:
    """One SASRec in training: everything that goes on changing, and where it is kept between two epochs.

    Args:
        task: the data.
        seed: of the first weights, the windows and dropout.
        folder: where the state is kept; None keeps none.
        settings: what the trial is of: dropout, width, positions, windows in a step, and layers where they are not two.
    """

    def __init__(self, task: Task, seed: int, folder: Path | None, settings: dict[str, Any]) -> None:
        torch.manual_seed(seed)
        self.task, self.settings = task, settings
        self.windows = Windows(task.sequences(), settings["positions"], EPOCHS, seed, batch=settings["batch"])
        shape = {name: own for name, own in settings.items() if name != "batch"}
        self.model = SASRec(len(task.index), **shape)
        self.best = copy.deepcopy(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, weight_decay=0.0, betas=(0.9, 0.98))
        self.progress = Progress()
        self.of = {"settings": settings, "seed": seed, "data": task.fingerprints(), "train": len(task.split.train)}
        self.of |= {"seen": "barred"}  # states from before had all items in the softmax
        name = " ".join(f"{key}={value}" for key, value in settings.items())
        self.path = None if folder is None else folder / f"SASRec {name}.pt"

    def save(self) -> None:
        """Keep the state, whole or not at all."""
        if self.path is None:
            return
        state = {"of": self.of, "progress": vars(self.progress), "random": torch.get_rng_state()}
        parts = {name: getattr(self, name).state_dict() for name in ("model", "best", "optimizer")}
        with written(self.path) as temporary:
            torch.save(state | parts, temporary)

    def load(self) -> bool:
        """Go on from a kept state, if there is one of this very trial."""
        if self.path is None or not self.path.is_file():
            return False
        state = torch.load(self.path, weights_only=True)
        if state["of"] != self.of:
            return False
        for name in ("model", "best", "optimizer"):
            getattr(self, name).load_state_dict(state[name])
        self.progress = Progress(**state["progress"])
        torch.set_rng_state(state["random"])
        return True

    def scorer(self, model: SASRec) -> SASRecScorer:
        """One of the two models as a scorer."""
        return SASRecScorer(model, self.task.index, self.task.warm, self.settings["positions"], self.progress)

    def epoch(self) -> None:
        """One pass."""
        none = torch.zeros(0, dtype=torch.long)
        bias = torch.where(torch.from_numpy(self.task.warm), 0.0, -torch.inf)
        rows, batch = list(self.windows.epoch(self.progress.epochs)), self.settings["batch"]
        self.model.train()
        for start in range(0, len(rows), batch):
            part = rows[start : start + batch]
            ids = torch.from_numpy(padded([row[:-1].tolist() for row in part]))
            labels = torch.from_numpy(padded([row[1:].tolist() for row in part], -100))
            chosen = labels != -100
            # Its authors draw no negatives from what a user has chosen either.
            seen = torch.where(chosen, ids, -100)
            barred = Barred(none, none) if self.task.repeats else seen_before(chosen, seen, None)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                hidden, own = self.model(ids)[chosen], labels[chosen][:, None]
                targets = Targets(own, torch.ones(own.shape))
                total, _ = catalogue_loss(hidden, self.model.items.weight, bias, targets, barred)
            loss = total / len(own)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()


def train_sasrec(
    task: Task,
    figure: Callable[[Scorer], float],
    seed: int,
    say: Say,
    folder: Path | None = None,
    *,
    dropout: float,
    width: int = 128,
    positions: int = 50,
    batch: int = 32,
    layers: int = 2,
) -> SASRecScorer:
    """Train by AdamW with the light scorer's schedule of windows; the best epoch on validation is kept.

    Args:
        task: the data.
        figure: NDCG@10 on the validation rows that tune.
        seed: of the first weights, the windows and dropout.
        say: gets a line per epoch.
        folder: where the state is kept behind every epoch; a later call of the same trial goes on from it.
        dropout: in embeddings and layers.
        width: of the hidden states.
        positions: items of a window.
        batch: windows in a step.
        layers: transformer layers.
    """
    settings = {"dropout": dropout, "width": width, "positions": positions, "batch": batch}
    trial = Trial(task, seed, folder, settings | ({} if layers == 2 else {"layers": layers}))
    if trial.load():
        say(f"ref SASRec: goes on behind epoch {trial.progress.epochs}")
    while not trial.progress.ended:
        start = time.monotonic()
        trial.epoch()
        found = figure(trial.scorer(trial.model))
        trial.progress.epochs += 1
        if found > trial.progress.best:
            trial.progress.best, trial.progress.best_epoch = found, trial.progress.epochs
            trial.best = copy.deepcopy(trial.model)
        trial.progress.seconds += time.monotonic() - start
        trial.save()
        say(f"ref SASRec: epoch {trial.progress.epochs} of at most {EPOCHS}, validation NDCG@10 {found:.4f}")
    return trial.scorer(trial.best)

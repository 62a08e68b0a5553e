"""Protocols: how the scorers of a run are scored, fused and measured, over the whole catalogue or on labelled pairs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from recllm.data import Interactions
from recllm.evaluate import KnownPairs, KnownScores, evaluate_labels, evaluate_ranking, user_codes
from recllm.fusion import Fusion, evidence
from recllm.neighbours import few_events
from recllm.newitems import fit_new_items
from recllm.pairs import labelled_rows
from recllm.ranking import Scorer, Scores, batches, score_pairs
from recllm.results import Table
from recllm.runs import Run
from recllm.splits import Example, liked_events
from recllm.tasks import Task
from recllm.weighing import fit_labels, fit_ranking


class EvaluationProtocol(Protocol):
    """What differs between the protocols; `scores` have one row per example."""

    @property
    def language(self) -> str:
        """The language model's name among the scorers."""
        ...

    def positives(self) -> Interactions:
        """The training events that count as chosen."""
        ...

    def examples(self, part: str) -> list[Example]:
        """The rows of "valid" or "test"."""
        ...

    def score(self, scorer: Scorer, examples: Sequence[Example]) -> Scores:
        """A scorer's scores of the examples."""
        ...

    def shape(self, rows: int) -> tuple[int, ...]:
        """The shape of the scores of so many rows."""
        ...

    def fit(self, scores: Mapping[str, Scores], examples: Sequence[Example]) -> Fusion:
        """The fusion fitted on validation scores."""
        ...

    def fit_new_items(
        self, fusion: Fusion, scores: Mapping[str, Scores], as_new: Mapping[str, Scores], examples: Sequence[Example]
    ) -> Fusion:
        """The fusion with weights for items without events, where the protocol ranks such."""
        ...

    def fuse(self, fusion: Fusion, scores: Mapping[str, Scores], examples: Sequence[Example]) -> Scores:
        """Fused scores."""
        ...

    def table(self, scores: Mapping[str, Scores | Scorer], examples: Sequence[Example], ks: tuple[int, ...]) -> Table:
        """Metrics of every scorer, warm and cold rows apart; the bootstrap draws the same users for every seed."""
        ...


def evaluation_protocol(run: Run, task: Task) -> EvaluationProtocol:
    """The protocol of a run, by what its language model is trained for."""
    return LabelledPairs(run, task) if run.model.task == "relevance" else WholeCatalogue(run, task)


@dataclass(frozen=True, eq=False)
class WholeCatalogue:
    """Every item is ranked for every row; scores are float32[rows, items]."""

    run: Run
    task: Task
    language: str = "lm"

    def positives(self) -> Interactions:
        """All of them."""
        return self.task.split.train

    def examples(self, part: str) -> list[Example]:
        """The rows of the split."""
        return self.task.split.valid if part == "valid" else self.task.split.test

    def score(self, scorer: Scorer, examples: Sequence[Example]) -> Scores:
        """Scores of all items."""
        return scorer.score([example.query for example in examples], self.task.index)

    def shape(self, rows: int) -> tuple[int, ...]:
        """A row per example and a column per item."""
        return rows, len(self.task.index)

    def fit(self, scores: Mapping[str, Scores], examples: Sequence[Example]) -> Fusion:
        """Fit to rank the targets, by NDCG@10."""
        counts, seen = self._evidence(examples), self._seen(examples)
        targets = self._targets(examples, seen)
        users = user_codes(examples)
        return fit_ranking(scores, targets, *counts, seen, users=users, settings=self.run.fusion, seed=self.run.seed)

    def fit_new_items(
        self, fusion: Fusion, scores: Mapping[str, Scores], as_new: Mapping[str, Scores], examples: Sequence[Example]
    ) -> Fusion:
        """With weights for items without events; `as_new` are scores as if no item had any."""
        counts, seen = self._evidence(examples), self._seen(examples)
        targets = self._targets(examples, seen)
        few = few_events(self.task.item_counts, self.run.neighbours)
        return fit_new_items(
            fusion,
            scores,
            as_new,
            targets,
            *counts,
            seen,
            few=few,
            users=user_codes(examples),
            settings=self.run.fusion,
            seed=self.run.seed,
        )

    def fuse(self, fusion: Fusion, scores: Mapping[str, Scores], examples: Sequence[Example]) -> Scores:
        """Fused scores of all items; block by block, for the shares are as large as all scores together."""
        n_user, n_item = self._evidence(examples)
        result = np.empty((len(examples), len(self.task.index)), dtype=np.float32)
        for place, part in batches(examples):
            given = {name: np.asarray(scores[name][place]) for name in fusion.names}
            both = fusion.fuse(given, n_user[place], n_item)
            barred = None if fusion.network is None else self._seen(part)
            result[place] = fusion.reordered(*both, n_user[place], n_item, barred)[0]
        return result

    def table(self, scores: Mapping[str, Scores | Scorer], examples: Sequence[Example], ks: tuple[int, ...]) -> Table:
        """HitRate, NDCG, MRR and coverage."""
        queries = [example.query for example in examples]
        known: dict[str, Scorer] = {
            name: KnownScores(queries, self.task.index, value) if isinstance(value, np.ndarray) else value
            for name, value in scores.items()
        }
        slices = self.task.slices(list(examples))
        return evaluate_ranking(
            known, examples, self.task.index, ks=ks, slices=slices, exclude_seen=not self.task.repeats
        )

    def _evidence(self, examples: Sequence[Example]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        queries = [example.query for example in examples]
        return evidence(queries, self.task.index, self.task.split.train.item_counts())

    def _seen(self, examples: Sequence[Example]) -> NDArray[np.bool_]:
        """What no list has, bool[examples, items]."""
        mask = np.zeros((len(examples), len(self.task.index)), dtype=bool)
        for row, example in enumerate(() if self.task.repeats else examples):
            mask[row, self.task.index.known(example.query.history)] = True
        return mask

    def _targets(self, examples: Sequence[Example], seen: NDArray[np.bool_]) -> NDArray[np.int64]:
        """The targets' columns, int64[examples]; −1 for one that no list has, from which there is nothing to learn."""
        targets = self.task.index.rows(example.item_id for example in examples)
        return np.where((targets >= 0) & seen[np.arange(len(seen)), targets], -1, targets)


@dataclass(frozen=True, eq=False)
class LabelledPairs:
    """Each row has one item and a label; scores are float32[rows]."""

    run: Run
    task: Task
    language: str = "relevance"

    def positives(self) -> Interactions:
        """Those that are liked, or have no rating."""
        return liked_events(self.task.split.train, self.run.data.like_at)

    def examples(self, part: str) -> list[Example]:
        """The rows of the split that have a label, with sampled negatives where all are positive."""
        return labelled_rows(self.task, part, self.run.seed)

    def score(self, scorer: Scorer, examples: Sequence[Example]) -> Scores:
        """Scores of each row's own item."""
        return score_pairs(scorer, [example.query for example in examples], [example.item_id for example in examples])

    def shape(self, rows: int) -> tuple[int, ...]:
        """One score per example."""
        return (rows,)

    def fit(self, scores: Mapping[str, Scores], examples: Sequence[Example]) -> Fusion:
        """Fit to tell the labels apart, by AUC."""
        labels = np.array([example.label for example in examples], dtype=np.float64)
        counts = self._evidence(examples)
        users = user_codes(examples)
        return fit_labels(scores, labels, *counts, users=users, settings=self.run.fusion, seed=self.run.seed)

    def fit_new_items(
        self, fusion: Fusion, scores: Mapping[str, Scores], as_new: Mapping[str, Scores], examples: Sequence[Example]
    ) -> Fusion:
        """The same: a pair's weights by counts go down to no events."""
        return fusion

    def fuse(self, fusion: Fusion, scores: Mapping[str, Scores], examples: Sequence[Example]) -> Scores:
        """Fused scores of each row's own item."""
        n_user, n_item = self._evidence(examples)
        given = {name: np.asarray(scores[name])[:, None] for name in fusion.names}
        return fusion.fuse(given, n_user, n_item[:, None])[0][:, 0]

    def table(self, scores: Mapping[str, Scores | Scorer], examples: Sequence[Example], ks: tuple[int, ...]) -> Table:
        """AUC and UAUC, over all rows and over those whose user or item is new; `ks` has no part in it."""
        pairs = [example.query for example in examples], [example.item_id for example in examples]
        known: dict[str, Scorer] = {
            name: KnownPairs(*pairs, value) if isinstance(value, np.ndarray) else value
            for name, value in scores.items()
        }
        return evaluate_labels(known, examples, slices=self._slices(examples))

    @cached_property
    def _users(self) -> frozenset[str]:
        return frozenset(self.task.split.train.users())

    def _slices(self, examples: Sequence[Example]) -> dict[str, NDArray[np.bool_]]:
        slices = self.task.slices(list(examples))
        new = np.array([example.query.user_id not in self._users for example in examples], dtype=bool)
        if not new.any():
            return slices
        warm = slices.get("warm", np.ones(len(examples), dtype=bool)) & ~new
        return {"warm": warm, "cold user": new} | {name: mask for name, mask in slices.items() if name != "warm"}

    def _evidence(self, examples: Sequence[Example]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        n_user, _ = evidence([example.query for example in examples], self.task.index, self._counts)
        return n_user, np.array([self._counts.get(example.item_id, 0) for example in examples], dtype=np.int64)

    @cached_property
    def _counts(self) -> dict[str, int]:
        return self.task.split.train.item_counts()

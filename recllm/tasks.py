"""The task of a run: its data read, split and indexed, the same for training, evaluating and exporting."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from recllm.data import Dataset, read_dataset
from recllm.errors import RecllmError
from recllm.evaluate import warm_and_cold
from recllm.fetch import resolve_data
from recllm.given import given_split
from recllm.ranking import ItemIndex
from recllm.runs import DataSettings, Run
from recllm.splits import Example, Split, check_no_leak, cold_items, leave_last_out, sampled, temporal


@dataclass(frozen=True, eq=False)
class Task:
    """What a run learns from and what it is measured on.

    Attributes:
        dataset: everything that was read.
        split: what is learnt from, and what is predicted.
        index: every item of the catalogue; rows and columns everywhere are in this order.
    """

    dataset: Dataset
    split: Split
    index: ItemIndex

    @cached_property
    def item_counts(self) -> NDArray[np.int64]:
        """Training events per item, int64[items]."""
        counts = self.split.train.item_counts()
        return np.array([counts.get(item, 0) for item in self.index.ids], dtype=np.int64)

    @property
    def warm(self) -> NDArray[np.bool_]:
        """Items with training events, bool[items]."""
        return self.item_counts > 0

    def sequences(self) -> list[NDArray[np.int64]]:
        """Item rows of every training user, oldest first."""
        return [self.index.rows(query.history) for query in self.split.train.histories().values()]

    def slices(self, examples: list[Example]) -> dict[str, NDArray[np.bool_]]:
        """Masks of the warm and the cold rows among `examples`."""
        return warm_and_cold(examples, item_counts=self.split.train.item_counts(), cold_items=self.split.cold_items)

    def fingerprints(self) -> dict[str, str]:
        """Fingerprints of what was read."""
        return {
            "interactions": self.dataset.interactions.fingerprint(),
            "catalog": self.dataset.catalog.fingerprint(),
        }


def prepare(run: Run, say: Callable[[str], None] = lambda _: None) -> Task:
    """Read and split the data of a run, and check that nothing after the cut reaches training.

    Raises:
        RecllmError: the data cannot be read or split, or an item of a text model has no text at all.
    """
    settings = run.data
    if settings.name:
        resolve_data(settings.name, say)
    dataset = read_dataset(
        settings.name,
        interactions=settings.interactions,
        items=settings.items,
        columns=settings.columns,
        item_columns=settings.item_columns,
        duplicates=settings.duplicates,
    )
    dataset.catalog.demand_text(f"'{dataset.name}'")
    seed = run.seed if settings.seed is None else settings.seed
    if settings.split == "given":
        split = given_split(
            _folder(settings), shots=settings.shots, rated_histories=settings.rated_histories, seed=run.seed
        )
    else:
        split = _split(dataset, settings, seed)
    if settings.test_rows is not None:
        split = replace(split, test=sampled(split.test, settings.test_rows, seed))
    check_no_leak(split)
    _check_labels(split, run)
    if not split.valid or not split.test:
        raise RecllmError(
            f"The split '{settings.split}' of '{dataset.name}' leaves {len(split.valid)} validation and "
            f"{len(split.test)} test events. Lower data.min_events (now {settings.min_events}) or "
            "choose another data.split."
        )
    return Task(dataset, split, ItemIndex(dataset.catalog.ids))


def _check_labels(split: Split, run: Run) -> None:
    """Rows that were judged and disliked are no events to predict."""
    rows = [*(split.train_rows or ()), *split.valid, *split.test] if split.name == "given" else []
    if run.model.task == "next_item" and any(row.label == 0.0 for row in rows):
        raise RecllmError(
            "The given split has rows with label 0, and a model of the next item would take them for chosen. Set "
            "model.task = 'relevance', which judges pairs, or choose another data.split."
        )


def _folder(settings: DataSettings) -> Path:
    place = resolve_data(settings.name) if settings.name else Path(settings.interactions or "")
    return place if place.is_dir() else place.parent


def _split(dataset: Dataset, settings: DataSettings, seed: int) -> Split:
    if settings.split == "temporal":
        return temporal(dataset.interactions, like_at=settings.like_at)
    if settings.split == "cold-items":
        return cold_items(
            dataset.interactions,
            share=settings.cold_share,
            seed=seed,
            like_at=settings.like_at,
            given_back=settings.given_back,
        )
    return leave_last_out(dataset.interactions, min_events=settings.min_events, like_at=settings.like_at)

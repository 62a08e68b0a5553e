"""Training examples in a fixed order, and the collator that makes batches of windows of item rows."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from recllm.histories import HistoryFormat, padded
from recllm.sequence import IGNORED
from recllm.windows import Taught, items_of


class Examples(Dataset[Any]):
    """Training examples in the order in which they are seen, all epochs one after the other."""

    def __init__(self, rows: Sequence[Any], rows_of_data: int | None = None) -> None:
        """Keep `rows`; where one of them holds several rows of the data, `rows_of_data` is the number of those."""
        self.rows = rows
        self.rows_of_data = len(rows) if rows_of_data is None else rows_of_data

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> Any:  # noqa: ANN401  whatever the collator reads
        return self.rows[place]


class WholeBatches(Dataset[Any]):
    """Examples with a note whether they count: the last one comes again until all processes have whole batches.

    accelerate would repeat rows by itself, and they would be learnt twice: two processes would not reach the losses of
    one.
    """

    def __init__(self, examples: Examples, rows: int) -> None:
        """Fill up to a multiple of `rows`, the rows of one round over all processes."""
        self.examples, self.length = examples, math.ceil(len(examples) / rows) * rows

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, place: int) -> tuple[Any, bool]:
        return self.examples[min(place, len(self.examples) - 1)], place < len(self.examples)


def collate_counted(
    collator: Callable[[Any], dict[str, Tensor]], rows: Sequence[tuple[Any, bool]]
) -> dict[str, Tensor]:
    """A batch by `collator`, in which rows that do not count have no labels."""
    batch = collator([row for row, _ in rows])
    batch["labels"][[not counts for _, counts in rows]] = IGNORED
    return batch


def lengths_of(batch: dict[str, Tensor]) -> NDArray[np.int64]:
    """Ids of each row of a batch that are no padding, int64[rows]."""
    lengths = batch["lengths"] if "lengths" in batch else batch["ends"].reshape(len(batch["ids"]), -1).amax(1) + 1
    return np.asarray(lengths.cpu(), dtype=np.int64)


@dataclass(frozen=True)
class NextItemCollator:
    """Windows of item rows to padded ids, ends and labels; without any randomness, so that resuming is exact."""

    history: HistoryFormat
    last_only: bool = False
    """Only the last item is a label (validation)."""

    def __call__(self, rows: Sequence[NDArray[np.int64] | Taught]) -> dict[str, Tensor]:
        """Item rows, oldest first, the last only a label, to tensors as `NextItemModel.forward` takes them.

        A batch has either windows of events or windows that a teacher has completed.
        """
        taught = [row for row in rows if isinstance(row, Taught)]
        if not taught:
            return self._tensors([row for row in rows if not isinstance(row, Taught)], last_only=self.last_only)
        batch = self._tensors([row.window for row in taught], last_only=True)
        batch["taught"] = torch.from_numpy(np.stack([row.items for row in taught]))
        batch["shares"] = torch.from_numpy(np.stack([row.shares for row in taught]))
        batch["hidden"] = torch.from_numpy(padded([row.hidden.tolist() for row in taught], IGNORED))
        return batch

    def _tensors(self, windows: Sequence[NDArray[np.int64]], *, last_only: bool) -> dict[str, Tensor]:
        inputs = [self.history.fitting(items_of(window)[:-1]) for window in windows]
        paths = [self.history.ids(rows) for rows in inputs]
        chosen = [window[len(window) - len(rows) :] for window, rows in zip(windows, inputs, strict=True)]
        labels = [items_of(window).tolist() for window in chosen]
        if last_only:
            labels = [[IGNORED] * (len(row) - 1) + row[-1:] for row in labels]
        columns = {
            "ids": padded([ids for ids, _ in paths]),
            "ends": padded([ends for _, ends in paths]),
            "labels": padded(labels, IGNORED),
            "seen": padded([rows.tolist() for rows in inputs], IGNORED),
        }
        if windows and windows[0].ndim > 1:  # what follows is asked for when it happens
            columns["asked"] = padded([window[:, 1].tolist() for window in chosen])
        return {name: torch.from_numpy(column) for name, column in columns.items()}

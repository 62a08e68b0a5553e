"""Long trainings' windows in one Arrow file, memory-mapped through Hugging Face datasets: cut once, kept by content."""

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from recllm.devices import process_state
from recllm.fetch import cache_folder
from recllm.files import written
from recllm.windows import CUTTING, Rows, Windows

STORED_FROM = 1_000_000
"""Windows of all epochs from which on they are stored: fewer take less memory than reading them from a file."""
ITEMS = "items"
IN_BATCH = 10_000
"""Windows that are written at once."""


class StoredWindows(Sequence[Any]):
    """Windows of an Arrow file, of which memory holds what is being read. It can be pickled to a worker."""

    def __init__(self, path: Path, columns: int = 1) -> None:
        self.columns = columns
        from datasets import Dataset  # heavy, and only for long trainings

        self.table = Dataset.from_file(str(path)).with_format("numpy")

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, place: Any) -> Any:  # noqa: ANN401  one window, or a list of them for a slice
        if isinstance(place, slice):
            return [self[row] for row in range(*place.indices(len(self)))]
        row = self.table[int(place)][ITEMS].astype(np.int64)
        return row if self.columns == 1 else row.reshape(-1, self.columns)


def training_windows(windows: Windows, at_least: int = 0, *, store: bool = True) -> Sequence[Rows]:
    """`windows.all(at_least)`; where they are many, memory-mapped from a file in the cache.

    The file is written by the first process, named by the sha256 of what the windows are cut from and how, and found
    again by the next training that cuts the same ones. Without `store` all stay in memory, and nothing is written.
    """
    if not store or max(windows.about, at_least) < STORED_FROM:
        return windows.all(at_least)
    path = cache_folder() / "windows" / f"{_content(windows, at_least)}.arrow"
    with process_state().main_process_first():
        if not path.is_file():
            _write(windows.each(at_least), path)
    return StoredWindows(path, math.prod(windows.sequences[0].shape[1:]))


def _content(windows: Windows, at_least: int) -> str:
    """What decides about the windows, as a name."""
    settings = (CUTTING, windows.length, windows.epochs, windows.seed, windows.recent, windows.batch, at_least)
    digest = hashlib.sha256(repr(settings).encode())
    for sequence in windows.sequences:
        digest.update(np.int64(len(sequence)).tobytes() + b"timed" * (sequence.ndim - 1))
        digest.update(np.ascontiguousarray(sequence, dtype=np.int64).tobytes())
    return digest.hexdigest()[:24]


def _write(rows: Iterable[Rows], path: Path) -> None:
    schema = pa.schema([(ITEMS, pa.list_(pa.int32()))])
    with written(path) as temporary, pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_stream(sink, schema) as stream:
        for block in _blocks(rows):
            ends = np.cumsum([0, *(row.size for row in block)], dtype=np.int32)
            values = pa.array(np.concatenate(block).ravel().astype(np.int32))
            stream.write_batch(pa.record_batch([pa.ListArray.from_arrays(pa.array(ends), values)], schema=schema))


def _blocks(rows: Iterable[Rows]) -> Iterator[list[Rows]]:
    rest = iter(rows)
    while block := list(islice(rest, IN_BATCH)):
        yield block

"""Answers in files: Parquet, JSONL or CSV, a part at a time, and the parts joined."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import polars as pl

from recllm.errors import RecllmError, unknown

SUFFIXES = (".parquet", ".jsonl", ".ndjson", ".csv")
ROW_GROUP = 65_536
"""Rows of a row group of Parquet; a fixed number, so that the same parts give the same bytes."""


def check_target(path: Path, *, overwrite: bool) -> None:
    """Check that `path` can be written.

    Raises:
        RecllmError: an unknown kind of file, a folder, or a file that is there without `overwrite`.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise unknown("kind of output file", path.name, [f"*{suffix}" for suffix in SUFFIXES])
    if path.is_dir():
        raise RecllmError(f"'{path}' is a folder; name a file to write to.")
    if path.exists() and not overwrite:
        raise RecllmError(f"'{path}' exists already. Replace it by --overwrite, or name another file.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecllmError(f"'{path}' cannot be written: {error.strerror}. Name another place.") from None
    if not os.access(path.parent, os.W_OK):
        raise RecllmError(f"'{path}' cannot be written: nothing may be written into its folder. Name another place.")


def write_frame(frame: pl.DataFrame, path: Path, suffix: str) -> None:
    """Write a part; of CSV every part has the header."""
    if suffix == ".parquet":
        frame.write_parquet(path)
    elif suffix == ".csv":
        frame.write_csv(path)
    else:
        frame.write_ndjson(path)


def join_frames(parts: Sequence[Path], target: Path, suffix: str) -> None:
    """Write all parts as one file, read one after the other; the same parts give the same bytes."""
    if suffix == ".parquet":
        # One scan of many files, and not many scans: those are all opened at once, and take memory by their number.
        scan = pl.scan_parquet(list(parts), glob=False)
        scan.sink_parquet(target, row_group_size=ROW_GROUP, maintain_order=True)
        return
    with target.open("wb") as out:
        for number, part in enumerate(parts):
            with part.open("rb") as stream:
                if suffix == ".csv" and number:
                    stream.readline()  # the header; names of columns have no line breaks
                shutil.copyfileobj(stream, out)

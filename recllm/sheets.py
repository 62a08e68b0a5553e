"""Answers to a file, chunk by chunk, in Parquet, JSONL or CSV, whole or not there; beside it the rejected rows."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Protocol

import polars as pl

from recllm.errors import RecllmError, unknown
from recllm.files import written

SUFFIXES = (".parquet", ".jsonl", ".ndjson", ".csv")


class Sheet(Protocol):
    """A file while it is written."""

    rows: int

    def add(self, frame: pl.DataFrame) -> None:
        """Append the rows of `frame`."""
        ...


class TextSheet:
    """CSV or JSONL, appended to."""

    def __init__(self, stream: IO[bytes], suffix: str) -> None:
        self.stream, self.suffix, self.rows = stream, suffix, 0

    def add(self, frame: pl.DataFrame) -> None:
        """Append the rows of `frame`."""
        if self.suffix == ".csv":
            frame.write_csv(self.stream, include_header=self.rows == 0)
        else:
            frame.write_ndjson(self.stream)
        self.rows += frame.height


class ParquetSheet:
    """Parquet: a file per chunk in a folder, joined at the end, because a Parquet file cannot be appended to."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.rows, self.parts = folder, 0, 0

    def add(self, frame: pl.DataFrame) -> None:
        """Append the rows of `frame`."""
        frame.write_parquet(self.folder / f"{self.parts:08}.parquet")
        self.parts += 1
        self.rows += frame.height

    def join(self, path: Path) -> None:
        """Write all chunks as one file; they are read one after the other."""
        parts = sorted(self.folder.iterdir())
        pl.concat([pl.scan_parquet(part, glob=False) for part in parts]).sink_parquet(path)


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


@contextmanager
def sheet(path: Path) -> Iterator[Sheet]:
    """A sheet whose rows are at `path` when the block ends well; nothing is there when it does not."""
    suffix = path.suffix.lower()
    with written(path) as temporary:
        if suffix != ".parquet":
            with temporary.open("wb") as stream:
                yield TextSheet(stream, suffix)
            return
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".chunks", dir=path.parent))
        try:
            joined = ParquetSheet(folder)
            yield joined
            joined.join(temporary)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


class Rejects:
    """`<target>.rejects.jsonl`: line, reason and row of what could not be answered; written when there is one."""

    def __init__(self, target: Path) -> None:
        self.path = target.with_name(f"{target.name}.rejects.jsonl")
        self.count, self.first = 0, ""
        self._stream: IO[str] | None = None
        self.path.unlink(missing_ok=True)  # of an earlier job, that would be taken for this one's

    def add(self, line: int, reason: str, row: Any) -> None:  # noqa: ANN401  whatever was in the file
        """Note a row."""
        if self._stream is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._stream = self.path.open("w", encoding="utf-8")
            self.first = f"line {line}: {reason}"
        values = {"line": line, "reason": reason, "row": row}
        self._stream.write(json.dumps(values, ensure_ascii=False, default=str) + "\n")
        self.count += 1

    def close(self) -> Path | None:
        """End the file; its path, or None where no row was set aside."""
        if self._stream is None:
            return None
        self._stream.close()
        return self.path

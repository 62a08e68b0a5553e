"""Files of rows, read one row at a time whatever their size: Parquet, JSONL, CSV; what cannot be read says why."""

import csv
import json
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import polars as pl

from recllm.data.tables import POLARS_FAILS, delimiter_of
from recllm.errors import RecllmError, unknown

SUFFIXES = (".parquet", ".jsonl", ".ndjson", ".csv", ".tsv")
PARQUET_ROWS = 4096
"""Rows of a Parquet file that are decoded together."""
BLOCK = 1 << 20
SPAN = 100
"""Lines that a CSV row with quoted line breaks may have."""
FIELD = 1 << 27
"""Letters that a CSV field may have; the csv module's own limit is a history of some 20,000 items."""


@dataclass(frozen=True)
class Unreadable:
    """Why a row cannot be read, and what stands there."""

    reason: str
    text: Any


def check_source(path: Path) -> None:
    """Check that `path` is a file of a kind that is read.

    Raises:
        RecllmError: it is not.
    """
    if not path.is_file():
        raise RecllmError(f"There is no file '{path}'.")
    if path.suffix.lower() not in SUFFIXES:
        raise unknown("kind of file", path.name, [f"*{suffix}" for suffix in SUFFIXES])
    if path.stat().st_size == 0:
        raise RecllmError(f"{path} is empty; rows with 'history' or 'user_id' are expected.")


def count_rows(path: Path) -> int:
    """Rows of the file; of a text file its lines, which a quoted line break makes a little more."""
    check_source(path)
    if path.suffix.lower() == ".parquet":
        return int(_scan(path).select(pl.len()).collect().item())
    lines, end = 0, b""
    with path.open("rb") as stream:
        for block in iter(lambda: stream.read(BLOCK), b""):
            lines, end = lines + block.count(b"\n"), block[-1:]
    lines += end != b"\n"  # the last line may lack its end
    return max(lines - (path.suffix.lower() in (".csv", ".tsv")), 1)


def columns_of(path: Path) -> list[str] | None:
    """The file's columns; None for JSONL, where each row has its own."""
    if path.suffix.lower() == ".parquet":
        return _scan(path).collect_schema().names()
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        return None
    with _opened(path) as stream:
        return _header(_Lines(stream), path)


def raw_rows(path: Path, wanted: Sequence[str]) -> Iterator[tuple[int, Any]]:
    """Line and fields of every row; `Unreadable` in place of fields where the row cannot be read.

    Of text a line at a time is in memory, of Parquet a row group.

    Args:
        path: a file that `check_source` takes.
        wanted: the columns that are read of Parquet, and that hold no line break in CSV.
    """
    kind = path.suffix.lower()
    if kind == ".parquet":
        return _parquet(path, wanted)
    return _jsonl(path) if kind in (".jsonl", ".ndjson") else _csv(path, wanted)


def _parquet(path: Path, wanted: Sequence[str]) -> Iterator[tuple[int, Any]]:
    frame = _scan(path)
    names = [name for name in frame.collect_schema().names() if name in wanted]
    line = 0
    try:
        for batch in frame.select(names).collect_batches(chunk_size=PARQUET_ROWS, maintain_order=True):
            for fields in batch.iter_rows(named=True):
                line += 1
                yield line, fields
    except POLARS_FAILS as error:
        raise _not_parquet(path, error) from None


def _scan(path: Path) -> pl.LazyFrame:
    try:
        frame = pl.scan_parquet(path, glob=False)
        frame.collect_schema()
    except POLARS_FAILS as error:
        raise _not_parquet(path, error) from None
    return frame


def _not_parquet(path: Path, error: BaseException) -> RecllmError:
    return RecllmError(f"{path} is not a Parquet file that can be read: {' '.join(str(error).split())[:200]}")


def _opened(path: Path) -> TextIO:
    # Bytes that are not UTF-8 stay apart: two users must not become one by the sign for what cannot be read.
    return path.open(encoding="utf-8-sig", errors="surrogateescape", newline="")


def _not_utf8(text: str) -> Unreadable | None:
    if text.isascii() or not any("\udc80" <= letter <= "\udcff" for letter in text):
        return None
    shown = text.rstrip("\r\n").encode(errors="surrogateescape").decode(errors="replace")
    return Unreadable("not UTF-8; write the file as UTF-8", shown)


def _jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    with _opened(path) as stream:
        for line, text in enumerate(stream, start=1):
            if not text.strip():
                continue
            if (bad := _not_utf8(text)) is not None:
                yield line, bad
                continue
            try:
                yield line, json.loads(text)
            except (ValueError, RecursionError) as error:
                yield line, Unreadable(f"not JSON ({error})", text.rstrip("\r\n"))


class _Lines:
    """Lines of a stream that can be put back."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.back, self.number = stream, deque[str](), 0

    def take(self) -> str | None:
        line = self.back.popleft() if self.back else next(self.stream, None)
        self.number += line is not None
        return line

    def put_back(self, lines: Sequence[str]) -> None:
        self.back.extendleft(reversed(lines))
        self.number -= len(lines)


def _header(lines: _Lines, path: Path) -> list[str]:
    csv.field_size_limit(FIELD)
    header, _ = _record(lines, delimiter_of(path))
    if isinstance(header, Unreadable):
        raise RecllmError(f"{path}: the header is {header.reason}.")
    return header or []


def _csv(path: Path, wanted: Sequence[str]) -> Iterator[tuple[int, Any]]:
    delimiter = delimiter_of(path)
    with _opened(path) as stream:
        lines = _Lines(stream)
        header = _header(lines, path)
        while True:
            row, number = _record(lines, delimiter, [name in wanted for name in header])
            if row is None:
                return
            if isinstance(row, Unreadable):
                yield number, row
            elif row and len(row) != len(header):
                reason = f"{len(row)} fields, the header has {len(header)}; part the ids of a history by blanks or |"
                yield number, Unreadable(reason, row)
            elif row:
                yield number, dict(zip(header, row, strict=True))


def _record(lines: _Lines, delimiter: str, whole: Sequence[bool] = ()) -> tuple[list[str] | Unreadable | None, int]:
    """The next row and its first line; fields that are to be `whole` hold no line break.

    Of a quote that nothing closes one line is lost, not what comes behind it: reading goes on with the next line.
    """
    taken: list[str] = []

    def more() -> Iterator[str]:
        while len(taken) < SPAN and (line := lines.take()) is not None:
            taken.append(line)
            yield line

    row: list[str] | Unreadable | None
    try:
        row = next(csv.reader(more(), delimiter=delimiter, strict=True), None)
    except csv.Error as error:
        row = Unreadable(f"not CSV ({error}); a quote opens and closes a whole field", taken[0].rstrip("\r\n"))
    number = lines.number - max(len(taken) - 1, 0)
    broken = isinstance(row, list) and any(
        is_whole and ("\n" in field or "\r" in field) for is_whole, field in zip(whole, row, strict=False)
    )
    if broken:
        row = Unreadable("not CSV (a quote that opens on this line is not closed on it)", taken[0].rstrip("\r\n"))
    if isinstance(row, Unreadable):
        lines.put_back(taken[1:])
    return _not_utf8("".join(taken[:1] if isinstance(row, Unreadable) else taken)) or row, number

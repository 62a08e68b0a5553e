"""Readers: CSV, TSV, JSONL, Parquet, RecBole's atomic files and MovieLens' own formats, as tables with line numbers."""

import csv
import importlib
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import polars as pl

from recllm.data.checks import Checks
from recllm.errors import RecllmError, unknown

POLARS_FAILS = (pl.exceptions.PolarsError, pl.exceptions.PanicException)
"""What Polars raises of a file that it cannot read; for some columns of Parquet it panics."""
# Arrow writes zones such as "-03:30", which Polars takes for no zone and panics at; the times beside are in UTC anyway.
os.environ.setdefault("POLARS_IGNORE_TIMEZONE_PARSE_ERROR", "1")
BOM, UTF_16 = b"\xef\xbb\xbf", (b"\xff\xfe", b"\xfe\xff")
"""The marks that a file of UTF-8 and one of UTF-16 may begin with."""
UNDEFINED = frozenset(b"\x81\x8d\x8f\x90\x9d")
"""Bytes that Windows-1252 has no letter for."""
NOT_UTF8 = re.compile("[\udc80-\udcff]")
"""What bytes that are not UTF-8 are read as (surrogateescape)."""
LINE = "\x1fline"
"""The column of line numbers: no file has one of this name."""
WIDE = 4
"""Columns from which as many separators in each line of a text are hardly by chance."""
LONGEST = 2**31 - 1
"""Characters that a field of CSV may have; the csv module stops at 131,072 by itself."""
BUDGET = 8 << 30
"""Most bytes that a file may take in memory."""

SUFFIXES = ("parquet", "csv", "tsv", "jsonl", "ndjson", "inter", "item", "user", "dat", "data")
RATINGS = ["user_id", "item_id", "rating", "timestamp"]
MOVIES = ["item_id", "title", "genres"]
# ml-100k's u.genre; in u.item each is a column of 0 and 1.
GENRES_100K = (
    *(
        "unknown",
        "Action",
        "Adventure",
        "Animation",
        "Children's",
        "Comedy",
        "Crime",
        "Documentary",
        "Drama",
        "Fantasy",
    ),
    *("Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western"),
)
TEXT_BYTES = 32  # a text in memory: 16 for the view, about as much behind it


@dataclass(frozen=True)
class Table:
    """A file that can be read: its columns (without `LINE`), and what RecBole's header says of their types."""

    path: Path
    columns: list[str]
    frame: pl.LazyFrame
    """All columns and `LINE`: the line in the file, from 1, the header counted; in Parquet the row."""
    types: dict[str, str] = field(default_factory=dict)
    not_utf8: tuple[int, ...] = ()
    """Lines that were read as Windows-1252, for they are not UTF-8."""

    def read(self, columns: Iterable[str]) -> pl.DataFrame:
        """`columns` and `LINE`, in file order.

        Raises:
            RecllmError: a row that cannot be read, or no row at all.
        """
        wanted = list(dict.fromkeys(columns))
        # Of a line with more fields than the header has Polars tells only where the last column is read; else it takes
        # the wrong ones.
        last = [] if self.path.suffix.lower() in (".parquet", ".jsonl", ".ndjson") else self.columns[-1:]
        beside = [name for name in last if name not in wanted]
        try:
            read = self.frame.select(LINE, *wanted, *beside).collect().drop(beside)
        except POLARS_FAILS as error:
            raise _broken(self.path, error) from None
        if read.is_empty():
            raise RecllmError(f"{self.path} has a header ({', '.join(self.columns)}) and no rows.")
        starts = _starts(self.path, read.height)
        return read if starts is None else read.with_columns(pl.Series(LINE, starts, dtype=read[LINE].dtype))


def open_table(path: Path, budget: int = BUDGET) -> Table:
    """Open a table by the kind of its name; rows are read later.

    Raises:
        RecllmError: no such file, an empty one, a kind that is not known, or one too large for `budget` bytes.
    """
    if not path.is_file():
        here = "" if path.is_absolute() else f" Paths are read from the folder that a command runs in, '{Path.cwd()}'."
        raise RecllmError(f"There is no file '{path}'.{here}")
    size = path.stat().st_size
    if size == 0:
        raise RecllmError(f"{path} is empty; a header and rows are expected.")
    kind = path.suffix.lower().lstrip(".")
    if kind not in SUFFIXES:
        raise unknown("kind of file", path.name, [f"*.{suffix}" for suffix in SUFFIXES])
    _fits(path, size, budget)
    if kind != "parquet":
        _check_no_zeros(path)
    try:
        return _open(path, kind, budget)
    except POLARS_FAILS as error:
        raise _broken(path, error) from None


def _check_no_zeros(path: Path) -> None:
    with path.open("rb") as stream:
        start = stream.read(1 << 12)
    # Every other one in what is written in Latin letters; marked, it is told when it is decoded.
    if 4 * start.count(0) > len(start) and not start.startswith(UTF_16):
        raise RecllmError(f"{path} has bytes of 0 between its letters, as UTF-16 has. Write it as UTF-8.")


def _open(path: Path, kind: str, budget: int) -> Table:
    if kind == "parquet":
        return _parquet(path, budget)
    if kind in {"jsonl", "ndjson"}:
        frame = pl.scan_ndjson(_plain(path), infer_schema_length=None, row_index_name=LINE, row_index_offset=1)
        return _table(path, frame)
    if kind == "data":
        return _headless(path, "\t", RATINGS)
    if path.name == "u.item":
        return _u_item(path)
    if kind == "dat":
        return _headless(path, "::", MOVIES if "movie" in path.name or "item" in path.name else RATINGS)
    if kind in {"inter", "item", "user"}:
        return _atomic(path)
    frame, not_utf8 = _scan(path, delimiter_of(path), quote='"')
    return replace(_table(path, frame), not_utf8=not_utf8)


def delimiter_of(path: Path) -> str:
    """What parts the columns: of a .csv a semicolon, a tab or a bar where its header has some and no comma."""
    if path.suffix.lower() != ".csv":
        return "\t"
    with path.open("rb") as stream:
        header = stream.readline(1 << 16)
    return next((sign for sign in ";\t|" if b"," not in header and sign.encode() in header), ",")


def _table(path: Path, frame: pl.LazyFrame) -> Table:
    return Table(path, [name for name in frame.collect_schema().names() if name != LINE], frame)


def _plain(path: Path) -> Path | io.BytesIO:
    """A path that polars takes as it is: brackets in it would be a pattern, and of JSON it reads no mark of UTF-8."""
    with path.open("rb") as stream:
        marked = stream.read(len(BOM)) == BOM
    if marked or set(str(path)) & set("*?[]"):
        return io.BytesIO(path.read_bytes().removeprefix(BOM))
    return path


def _scan(path: Path, separator: str, quote: str | None) -> tuple[pl.LazyFrame, tuple[int, ...]]:
    """Scan a text file with a header, everything as text; with the lines that are not UTF-8."""
    source: Path | io.BytesIO = path
    not_utf8: tuple[int, ...] = ()
    if not _is_utf8(path):
        text, not_utf8 = _decoded(path)
        source = io.BytesIO(text.encode())
    frame = pl.scan_csv(
        source,
        separator=separator,
        quote_char=quote,
        infer_schema=False,
        glob=False,
        row_index_name=LINE,
        row_index_offset=2,
    )
    return frame, not_utf8


def _is_utf8(path: Path) -> bool:
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            while stream.read(1 << 20):
                pass
    except UnicodeDecodeError:
        return False
    return True


def _decoded(path: Path) -> tuple[str, tuple[int, ...]]:
    """The text of a file, with its lines that are not UTF-8: one such line does not spoil those that are.

    Raises:
        RecllmError: the file is UTF-16.
    """
    raw = path.read_bytes().removeprefix(BOM).replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    if raw.startswith(UTF_16):
        raise RecllmError(f"{path} is UTF-16. Write it as UTF-8.")
    lines, not_utf8 = [], []
    for number, line in enumerate(raw.split(b"\n"), start=1):
        try:
            lines.append(line.decode())
        except UnicodeDecodeError:
            not_utf8.append(number)
            lines.append(line.decode("cp1252") if not set(line) & UNDEFINED else line.decode("latin-1"))
    return "\n".join(lines), tuple(not_utf8)


def _atomic(path: Path) -> Table:
    """RecBole: tab separated, `name:type` in the header, no quotes."""
    frame, not_utf8 = _scan(path, "\t", quote=None)
    pairs = [(name, *name.partition(":")[::2]) for name in frame.collect_schema().names() if name != LINE]
    frame = frame.rename({full: name for full, name, _ in pairs})
    return Table(path, [name for _, name, _ in pairs], frame, {name: kind for _, name, kind in pairs}, not_utf8)


def _headless(path: Path, separator: str, columns: list[str]) -> Table:
    """MovieLens' formats without a header; polars wants one byte as separator, so `::` becomes a control character."""
    text, not_utf8 = _decoded(path)
    one = "\x1f" if len(separator) > 1 else separator
    frame = pl.scan_csv(
        io.BytesIO(text.replace(separator, one).encode()),
        separator=one,
        has_header=False,
        quote_char=None,
        schema=dict.fromkeys(columns, pl.String),
        row_index_name=LINE,
        row_index_offset=1,
    )
    return Table(path, columns, frame, not_utf8=not_utf8)


def _u_item(path: Path) -> Table:
    """ml-100k's u.item; the genre flags become one text, joined as in MovieLens' later sets."""
    plain = ["item_id", "title", "release_date", "video_release_date", "imdb_url"]
    table = _headless(path, "|", [*plain, *GENRES_100K])
    flags = [pl.when(pl.col(name).str.strip_chars() == "1").then(pl.lit(name)) for name in GENRES_100K]
    genres = pl.concat_str(flags, separator="|", ignore_nulls=True).alias("genres")
    frame = table.frame.select(LINE, *plain, genres)
    return Table(path, [*plain, "genres"], frame, not_utf8=table.not_utf8)


def _parquet(path: Path, budget: int) -> Table:
    frame = pl.scan_parquet(path, glob=False)
    rows = frame.select(pl.len()).collect().item()
    widths = [TEXT_BYTES if kind in (pl.String, pl.Binary) else 8 for kind in frame.collect_schema().dtypes()]
    _fits(path, max(rows * sum(widths), _row_groups(path)), budget)
    # pandas' categories are texts that are kept once; nothing is done with them but reading.
    plain = [name for name, kind in frame.collect_schema().items() if kind in (pl.Categorical, pl.Enum)]
    return _table(path, frame.with_columns(pl.col(plain).cast(pl.String)).with_row_index(LINE, offset=1))


def _row_groups(path: Path) -> int:
    """Uncompressed bytes by the row groups' metadata; 0 without pyarrow, which only an extra brings."""
    try:
        metadata = importlib.import_module("pyarrow.parquet").read_metadata(path)
    except ImportError:
        return 0
    return sum(metadata.row_group(index).total_byte_size for index in range(metadata.num_row_groups))


def _fits(path: Path, size: int, budget: int) -> None:
    if size > budget:
        raise RecllmError(
            f"{path} would take about {size / 2**30:.3g} GiB in memory; the limit is {budget / 2**30:.3g} GiB. "
            f"Leave out columns and old events, or write only the users of interest into a smaller file."
        )


def _starts(path: Path, rows: int) -> list[int] | None:
    """The line on which each row starts, where rows are not lines: a quoted text of several lines, blank lines."""
    kind = path.suffix.lower()
    header = {".csv": 1, ".tsv": 1, ".jsonl": 0, ".ndjson": 0}.get(kind)
    if header is None:
        return None
    if rows + header == _count_lines(path):
        return None
    starts = _csv_starts(path)[1:] if header else [number for number, line in _lines(path) if line.strip()]
    return starts if len(starts) == rows else None


def _count_lines(path: Path) -> int:
    """Lines of a file; the last one may lack its end."""
    lines, last = 0, b"\n"
    with path.open("rb") as stream:
        for block in iter(lambda: stream.read(1 << 20), b""):
            lines, last = lines + block.count(b"\n"), block[-1:]
    return lines + (last != b"\n")


def _csv_starts(path: Path) -> list[int]:
    starts: list[int] = []
    try:
        for first, _, row in _csv_rows(path):
            if row or starts:  # a blank line behind the header is a row too, of nothing
                starts.append(first)
    except csv.Error:  # Polars has read it, in a way of its own
        return []
    return starts


def _csv_rows(path: Path, *, strict: bool = False) -> Iterator[tuple[int, list[str], list[str]]]:
    """Rows of a CSV file: the line on which each starts, from 1, its lines as they stand, and its fields.

    Raises:
        csv.Error: a row cannot be read.
    """
    before = csv.field_size_limit(LONGEST)
    held: list[str] = []

    def kept(lines: Iterable[str]) -> Iterator[str]:
        for line in lines:
            held.append(line)
            yield line

    try:
        with path.open(encoding="latin-1", newline="") as stream:
            first = 1
            for row in csv.reader(kept(stream), delimiter=delimiter_of(path), strict=strict):
                yield first, held, row
                first += len(held)
                held.clear()
    finally:
        csv.field_size_limit(before)


def note_columns_twice(table: Table, checks: Checks) -> None:
    """Tell of columns that the header names more than once: the first is read, and it may not be the one meant."""
    for column in table.columns:
        if f"{column}_duplicated_0" in table.columns:  # as Polars calls the second one
            message = f"the header has '{column}' more than once, and the first is read"
            checks.add("warning", "column_twice", message, 1, file=table.path.name, lines=[1])


def note_rows_in_quotes(table: Table, rows: int, checks: Checks) -> None:
    """Tell of quoted texts that hold what look like whole rows, as where a quote is not closed.

    A text may well have several lines, but hardly as many separators in each as the header has.

    Args:
        table: of any kind; quotes mean something in CSV and TSV alone.
        rows: how many were read.
        checks: takes the finding.
    """
    path, width = table.path, len(table.columns)
    if path.suffix.lower() not in (".csv", ".tsv") or rows + 1 >= _count_lines(path) or width < WIDE:
        return
    sign = delimiter_of(path)
    try:
        found = [
            first
            for first, lines, _ in _csv_rows(path)
            if len(lines) > 1 and all(line.count(sign) + 1 == width for line in lines)
        ]
    except csv.Error:
        return
    message = "quoted texts that hold what look like whole rows, which are not read as such; is a quote not closed?"
    checks.add("warning", "rows_in_quotes", message, len(found), file=path.name, lines=found)


def _broken(path: Path, error: BaseException) -> RecllmError:
    """Say which line is wrong; polars itself names no line."""
    kind = path.suffix.lower()
    finder = {".csv": _bad_row, ".tsv": _bad_row, ".jsonl": _bad_json, ".ndjson": _bad_json}.get(kind, _wide_line)
    found = None if kind == ".parquet" else finder(path)
    return RecllmError(f"{path} cannot be read: {found or ' '.join(str(error).split())[:200]}.")


def _bad_row(path: Path) -> str | None:
    width, behind = None, 1
    try:
        for first, lines, row in _csv_rows(path, strict=True):
            width = width or len(row)
            if len(row) > width:
                sign = {",": "commas", ";": "semicolons", "\t": "tabs"}[delimiter_of(path)]
                return _too_wide(first, row, width, f"a text with {sign} needs quotes")
            behind = first + len(lines)
    except csv.Error as error:
        return f"line {behind} is not CSV ({error}); a quote opens and closes a whole field, and is doubled inside one"
    return _quote_inside(path)


def _quote_inside(path: Path) -> str | None:
    """The first field that has a quote inside without being in quotes: to Polars it opens one."""
    sign = delimiter_of(path)
    quoted = re.compile(rf'(?:^|(?<={sign}))"(?:[^"]|"")*"(?=[{sign}\r\n]|$)')
    for first, lines, _ in _csv_rows(path):
        rest = quoted.sub("", "".join(lines)).rstrip("\r\n").split(sign)
        wrong = next((field for field in rest if '"' in field), None)
        if wrong is not None:
            shown = wrong.encode("latin-1").decode(errors="replace")[:60]
            doubled = shown.replace('"', '""')
            return f'line {first} has a quote inside a field, {shown}; write it in quotes and doubled, "{doubled}"'
    return None


def _too_wide(line: int, row: Sequence[str], width: int, way: str) -> str:
    if not any(row[width:]):
        way = "those beyond it are empty: give the header as many, or take them away"
    return f"line {line} has {len(row)} fields, the header has {width}; {way}"


def _wide_line(path: Path) -> str | None:
    """Of RecBole's files and MovieLens' own the first line with too many fields; they know no quotes."""
    items = "movie" in path.name or "item" in path.name
    known = {".data": ("\t", 4), ".dat": ("::", len(MOVIES if items else RATINGS))}
    sign, width = ("|", 24) if path.name == "u.item" else known.get(path.suffix.lower(), ("\t", None))
    with path.open(encoding="latin-1") as stream:
        for number, line in enumerate(stream, start=1):
            row = line.rstrip("\n").split(sign)
            width = width or len(row)
            if len(row) > width:
                return _too_wide(number, row, width, f"{sign!r} parts the fields, and stands in none")
    return None


def _bad_json(path: Path) -> str | None:
    for number, line in _lines(path):
        if NOT_UTF8.search(line):
            return f"line {number} is not UTF-8"
        try:
            fields = json.loads(line, parse_constant=_no_constant) if line.strip() else {}
        except ValueError as error:
            return f"line {number} is not JSON ({getattr(error, 'msg', error)})"
        if not isinstance(fields, dict):
            return f"line {number} is not a JSON object"
    return None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON: null stands for a missing one")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines, with `NOT_UTF8` for what cannot be read."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as stream:
        yield from enumerate(stream, start=1)


def check_kinds(table: Table, raw: pl.DataFrame, columns: Sequence[str]) -> None:
    """Check that columns hold one number, text or time in every row.

    Raises:
        RecllmError: one holds lists, structures or bytes.
    """
    for name in columns:
        kind = raw[name].dtype
        if kind.is_nested() or kind in (pl.Binary, pl.Object):
            what = "bytes" if kind == pl.Binary else "lists" if isinstance(kind, pl.List | pl.Array) else "structures"
            raise RecllmError(
                f"{table.path}: the column '{name}' holds {what} ({kind}), and one value per row is expected. Take the "
                "value out of it, with one row per event or item, or name another column."
            )

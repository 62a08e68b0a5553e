"""Recommend in batch, file in, file out: chunk by chunk, with progress, bad rows set aside and never in the way."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from recllm.data import Query
from recllm.errors import RecllmError
from recllm.progress import Progress
from recllm.query_rows import BadRow, QueryRow, check_source, count_rows, read_rows
from recllm.ranker import TwoStage
from recllm.ranking import ItemIndex, Scorer, Scores
from recllm.runtime import Recommender
from recllm.sheets import Rejects, check_target, sheet

Say = Callable[[str], None]
Answer = Callable[[Sequence[QueryRow]], pl.DataFrame]
CHUNK = 512
"""Rows that are answered and written together; no more of the input or of the answers is held in memory."""
NO_HISTORY = "no item of the history is known; name the file that has their text: --history-items FILE"
EVERY = 5.0
"""Seconds between two lines of progress."""


@dataclass
class Summary:
    """What became of a batch job.

    Attributes:
        answered: rows of the input that have an answer.
        rejected: rows that could not be answered, each in the rejects file with its reason.
        written: rows of the output.
        unknown: item ids that the catalogue does not have; they were passed over.
        seconds: from the first row to the last.
        rejects: the file of the rejected rows, None where there are none.
    """

    answered: int = 0
    rejected: int = 0
    written: int = 0
    unknown: int = 0
    seconds: float = 0.0
    rejects: Path | None = None

    def lines(self, target: Path) -> list[str]:
        """Readable text."""
        rate = self.answered / max(self.seconds, 1e-9)
        lines = [f"{target}: {self.written:,} lines for {self.answered:,} users, {rate:,.0f} users/s"]
        if self.unknown:
            lines.append(f"{self.unknown:,} item ids are not in the catalogue and were passed over")
        if self.rejects is not None:
            lines.append(f"{self.rejected:,} rows could not be answered; they are in {self.rejects} with the reason")
        return lines


@dataclass(frozen=True)
class Job:
    """What all batch jobs share.

    Attributes:
        source: Parquet, JSONL, CSV or TSV; rows with `history` (item ids, oldest first) or `user_id`.
        target: Parquet, JSONL or CSV by its suffix.
        histories: by user id, for rows that have only that.
        overwrite: replace `target`.
        say: gets lines of progress.
        chunk: rows that are answered together.
    """

    source: Path
    target: Path
    histories: Mapping[str, Query] | None = None
    overwrite: bool = False
    say: Say = field(default=lambda _: None)
    chunk: int = CHUNK

    def by(self, chunk: int) -> "Job":
        """The same job in chunks of so many rows."""
        return replace(self, chunk=chunk)

    def check(self) -> None:
        """Check the files before anything is loaded.

        Raises:
            RecllmError: a source that cannot be read, a target of an unknown kind, or one that exists.
        """
        check_source(self.source)
        check_target(self.target, overwrite=self.overwrite)
        if self.target.exists() and self.target.samefile(self.source):
            raise RecllmError(f"'{self.target}' is the input itself; name another file for the answers.")


def recommend_file(recommender: Recommender | TwoStage, job: Job, *, k: int = 10, exclude_seen: bool = True) -> Summary:
    """The `k` best items for every row: `user_id, rank, item_id, score, share_<scorer>…`.

    A row without `user_id` is named by its line. Bad rows go to `<target>.rejects.jsonl` and never stop the job.

    Raises:
        RecllmError: `k`, the source's columns or kind, the target's kind; a target that exists; not one good row.
    """
    recommender.check_k(k)

    def answer(rows: Sequence[QueryRow]) -> pl.DataFrame:
        found = recommender.recommend([row.history for row in rows], k, exclude_seen=exclude_seen)
        lengths = np.array([len(ids) for ids in found.ids], dtype=np.int64)
        kept = np.arange(k) < lengths[:, None]  # (rows, k)
        columns = {
            "user_id": [row.user_id for row, ids in zip(rows, found.ids, strict=True) for _ in ids],
            "rank": np.nonzero(kept)[1].astype(np.int32) + 1,
            "item_id": [item for ids in found.ids for item in ids],
            "score": found.scores[kept],
        }
        return _frame(columns | {f"share_{name}": share[kept] for name, share in found.shares.items()})

    return _run(job, recommender.index, answer, need=())


def score_file(recommender: Recommender, job: Job) -> Summary:
    """Score the `candidates` (item ids) of every row: `user_id, item_id, score, share_<scorer>…`.

    Raises:
        RecllmError: as `recommend_file`.
    """
    index = recommender.index

    def answer(rows: Sequence[QueryRow]) -> pl.DataFrame:
        items = ItemIndex(dict.fromkeys(item for row in rows for item in row.candidates if item in index))
        scores, shares = recommender.score([row.history for row in rows], items.ids)
        columns = [items.known(row.candidates) for row in rows]
        picked = {"score": scores} | {f"share_{name}": share for name, share in shares.items()}
        return _pairs(rows, items, columns, picked)

    return _run(job, index, answer, need=("candidates",))


def score_items_file(scorer: Scorer, items: ItemIndex, known: ItemIndex, job: Job) -> Summary:
    """Score all `items` for every row: `user_id, item_id, score`.

    Args:
        scorer: any scorer, as the zero-shot one.
        items: what is scored.
        known: the items that a history can name.
        job: files and progress.

    Raises:
        RecllmError: as `recommend_file`.
    """
    every = np.arange(len(items), dtype=np.int64)

    def answer(rows: Sequence[QueryRow]) -> pl.DataFrame:
        scores = scorer.score([Query(row.history, row.user_id) for row in rows], items)
        return _pairs(rows, items, [every] * len(rows), {"score": scores})

    return _run(job, known, answer, need=(), unknown=NO_HISTORY)


def _pairs(
    rows: Sequence[QueryRow], items: ItemIndex, columns: Sequence[NDArray[np.int64]], scores: Mapping[str, Scores]
) -> pl.DataFrame:
    """A line per row and one of its columns."""
    lengths = [len(each) for each in columns]
    across, down = np.concatenate(columns), np.repeat(np.arange(len(rows)), lengths)
    named = {
        "user_id": [rows[row].user_id for row in down.tolist()],
        "item_id": [items.ids[column] for column in across.tolist()],
    }
    return _frame(named | {name: values[down, across] for name, values in scores.items()})


def _frame(columns: Mapping[str, Any]) -> pl.DataFrame:
    """The columns with null for NaN: what is not known looks the same in every kind of file."""
    return pl.DataFrame(columns).with_columns(pl.col(pl.Float32).fill_nan(None))


def _run(job: Job, index: ItemIndex, answer: Answer, *, need: tuple[str, ...], unknown: str | None = None) -> Summary:
    """Read, answer and write chunk by chunk; the target appears when the last one is written.

    Rows whose history has items, and none that is known, are set aside for the reason `unknown`, where it is given.
    """
    job.check()
    total = count_rows(job.source)
    rows = read_rows(job.source, histories=job.histories, need=need)
    summary, progress = Summary(), Progress(total, "users", job.say, EVERY)
    rejects = Rejects(job.target)
    try:
        with sheet(job.target) as out:
            for chunk in _chunks(rows, job.chunk):
                good = [row for each in chunk if (row := _checked(each, index, rejects, summary, unknown)) is not None]
                if good:
                    out.add(answer(good))
                summary.answered += len(good)
                summary.written, summary.rejected = out.rows, rejects.count
                progress.add(len(chunk), f", {summary.rejected:,} set aside" if summary.rejected else "")
            if not summary.answered:
                raise RecllmError(
                    f"No row of {job.source} could be answered: {rejects.first or 'it has no rows'}. "
                    "Rows need 'history', a list of item ids, oldest first."
                )
    finally:
        summary.rejects = rejects.close()
    summary.seconds = progress.seconds
    return summary


def _checked(
    row: QueryRow | BadRow, index: ItemIndex, rejects: Rejects, summary: Summary, unknown: str | None
) -> QueryRow | None:
    """Count unknown items; set aside what cannot be answered."""
    if isinstance(row, BadRow):
        rejects.add(row.line, row.reason, row.fields)
        return None
    known = [item in index for item in row.candidates or ()]
    if known and not any(known):
        rejects.add(row.line, "none of the candidates is in the catalogue", row.fields)
        return None
    if unknown is not None and row.history and not any(item in index for item in row.history):
        rejects.add(row.line, unknown, row.fields)
        return None
    summary.unknown += sum(item not in index for item in row.history) + known.count(False)
    return row


def _chunks(rows: Iterable[QueryRow | BadRow], size: int) -> Iterator[list[QueryRow | BadRow]]:
    chunk: list[QueryRow | BadRow] = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk

"""Recommend in batch, file in, file out: chunk by chunk, resumable, with bad rows set aside and never in the way."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import polars as pl
from numpy.typing import NDArray

from recllm.bundle import MANIFEST
from recllm.data import Query
from recllm.errors import RecllmError, out_of_memory
from recllm.files import sha256_of
from recllm.parts import Counts, Parts, is_ours, sweep
from recllm.process import FORKS
from recllm.progress import Progress
from recllm.query_rows import BadRow, QueryRow, read_rows
from recllm.ranker import RanksLists, TwoStage
from recllm.ranking import ItemIndex, Scorer, Scores
from recllm.rowfiles import check_source, count_rows
from recllm.runtime import USERS_IN_BATCH, Recommender
from recllm.sheets import check_target

T = TypeVar("T")
Say = Callable[[str], None]

CHUNK = 512
"""Rows that are answered and written together; in memory are these, their answers and the rows behind them."""
NO_HISTORY = "no item of the history is known by its text; name the file that has it: --history-items FILE"
NO_EVENT = "the history is empty, and a language model says nothing of a user without one"
NO_KNOWN = "no item of the history is known by its text, and a language model says nothing of a user without one"
NOTHING_LEFT = "nothing is left to recommend: the history has every item"
PAIRS = ["user_id", "item_id", "score"]
"""Columns of scores of named items."""
EVERY = 5.0
"""Seconds between two lines of progress."""


class Answers(NamedTuple):
    """What some rows are answered with: the lines of the output, one row's after the other's, and how many of each."""

    frame: pl.DataFrame
    lines: Sequence[int]

    @classmethod
    def joined(cls, parts: Sequence["Answers"]) -> "Answers":
        """The answers of one part of the rows after the other."""
        return cls(pl.concat([part.frame for part in parts]), [count for part in parts for count in part.lines])

    def unanswered(self, rows: Sequence[QueryRow]) -> list[BadRow]:
        """The rows without a line, because the history has all that there is."""
        counted = zip(rows, self.lines, strict=True)
        return [BadRow(row.line, NOTHING_LEFT, row.fields) for row, count in counted if not count]


Answer = Callable[[Sequence[QueryRow]], Answers]


@dataclass
class Summary(Counts):
    """What became of a batch job.

    Attributes:
        seconds: from the first row to the last, of this process.
        here: rows of the input that this process went through; fewer than all where it went on with a job.
        rejects: the file of the rejected rows, None where there are none.
        example: an id of the catalogue.
    """

    seconds: float = 0.0
    here: int = 0
    rejects: Path | None = None
    example: str = ""

    def lines(self, target: Path) -> list[str]:
        """Readable text."""
        rate = self.here / max(self.seconds, 1e-9)
        lines = [f"{target}: {self.written:,} lines for {self.answered:,} users, {rate:,.0f} users/s"]
        if self.nameless:
            lines.append(
                f"{self.nameless:,} rows have no column 'user_id', or nothing in it, and are named by their lines"
            )
        if self.unknown:
            lines.append(f"{self.unknown:,} item ids are not in the catalogue and were passed over")
        if self.strangers:
            lines.append(
                f"{self.strangers:,} of {self.answered:,} users have a history of which no item is known, and are "
                f"answered as if they had none; the catalogue's ids are like '{self.example}'"
            )
        if self.rejects is not None:
            lines.append(f"{self.rejected:,} rows could not be answered; they are in {self.rejects} with the reason")
        return lines


@dataclass(frozen=True)
class Job:
    """What all batch jobs share.

    Attributes:
        source: Parquet, JSONL, CSV or TSV; rows with `history` (item ids, oldest first) or `user_id`, and `ratings`
            where a language model is to read them.
        target: Parquet, JSONL or CSV by its suffix.
        histories: by user id, for rows that have only that.
        overwrite: replace `target`, and begin anew where another job was begun.
        say: gets lines of progress.
        chunk: rows that are answered together, and kept when the process is killed.
        shard: (i, n): only the i-th of n parts of the rows, from 1; the parts one after the other are all rows.
        facts: what else the answers depend on, as a bundle's files; an unfinished job goes on only with the same.
        others: files that are read beside `source`, as a log; no answers are written over them.
    """

    source: Path
    target: Path
    histories: Mapping[str, Query] | None = None
    overwrite: bool = False
    say: Say = field(default=lambda _: None)
    chunk: int = CHUNK
    shard: tuple[int, int] = (1, 1)
    facts: Mapping[str, Any] = field(default_factory=dict)
    others: Sequence[Path] = ()

    def by(self, chunk: int) -> "Job":
        """The same job in chunks of so many rows."""
        return replace(self, chunk=chunk)

    def knowing(self, **facts: Any) -> "Job":  # noqa: ANN401  anything that JSON can hold
        """The same job, whose answers depend on `facts` too."""
        return replace(self, facts={**self.facts, **facts})

    def identity(self) -> dict[str, Any]:
        """What its answers depend on."""
        users = None
        if self.histories is not None:
            users = digest_of(f"{user} {query.history} {query.ratings}" for user, query in self.histories.items())
        part, parts = self.shard
        return {
            "rows": sha256_of(self.source),
            "histories": users,
            "chunk": self.chunk,
            "shard": f"{part}/{parts}",
            **self.facts,
        }

    def check(self) -> None:
        """Check the files before anything is loaded.

        Raises:
            RecllmError: a source that cannot be read, a target of an unknown kind, one that exists, or a shard that
                there is not.
        """
        part, parts = self.shard
        if not 1 <= part <= parts:
            raise RecllmError(f"shard {part}/{parts}: give I/N with I between 1 and N, as 1/4.")
        check_source(self.source)
        sweep(self.target)
        check_target(self.target, overwrite=self.overwrite or is_ours(self.target))
        if any((folder / MANIFEST).is_file() for folder in self.target.resolve().parents):
            raise RecllmError(
                f"'{self.target}' would lie in a bundle, which holds its own files only. Name another place."
            )
        if rejects_of(self.target).exists() and rejects_of(self.target).samefile(self.source):
            raise RecllmError(
                f"'{self.source}' is where the rows of '{self.target}' go that cannot be answered. Rename one of them."
            )
        for read in (self.source, *self.others):
            if self.target.exists() and read.exists() and self.target.samefile(read):
                raise RecllmError(f"'{self.target}' is itself read here; name another file for the answers.")


def recommend_file(
    recommender: Recommender | TwoStage, job: Job, *, k: int = 10, exclude_seen: bool | None = None, new_items: int = 0
) -> Summary:
    """The `k` best items for every row: `user_id, rank, item_id, score, share_<scorer>…`.

    A row without `user_id` is named by its line. Bad rows go to `<target>.rejects.jsonl` and never stop the job.

    Raises:
        RecllmError: `k`, the source's columns or kind, the target's kind; a target that exists; not one good row.
    """
    recommender.check_k(k, new_items)
    exclude_seen = recommender.exclude_seen if exclude_seen is None else exclude_seen

    def answer(rows: Sequence[QueryRow]) -> Answers:
        return best_items(recommender, rows, k, exclude_seen=exclude_seen, new_items=new_items)

    job = job.knowing(work="recommend", k=k, exclude_seen=exclude_seen)
    if new_items:
        job = job.knowing(new_items=new_items)
    columns = ["user_id", "rank", "item_id", "score", *(f"share_{name}" for name in recommender.share_names)]
    ratings = isinstance(recommender, TwoStage)
    return _run(job, recommender.index, answer, columns, need=(), ratings=ratings)


def best_items(
    recommender: Recommender | TwoStage,
    rows: Sequence[QueryRow],
    k: int,
    *,
    exclude_seen: bool | None,
    new_items: int = 0,
) -> Answers:
    """The `k` best items of some rows: `user_id, rank, item_id, score, share_<scorer>…`, best first."""
    FORKS.check()
    histories = [row.history for row in rows]
    if isinstance(recommender, TwoStage):
        ratings = [row.ratings for row in rows]
        found = recommender.recommend(histories, k, exclude_seen=exclude_seen, new_items=new_items, ratings=ratings)
    else:
        found = recommender.recommend(histories, k, exclude_seen=exclude_seen, new_items=new_items)
    lengths = np.array([len(ids) for ids in found.ids], dtype=np.int64)
    kept = np.arange(k) < lengths[:, None]  # (rows, k)
    columns = {
        "user_id": [row.user_id for row, ids in zip(rows, found.ids, strict=True) for _ in ids],
        "rank": np.nonzero(kept)[1].astype(np.int32) + 1,
        "item_id": [item for ids in found.ids for item in ids],
        "score": found.scores[kept],
    }
    return Answers(
        _frame(columns | {f"share_{name}": share[kept] for name, share in found.shares.items()}), lengths.tolist()
    )


def score_file(recommender: Recommender, job: Job) -> Summary:
    """Score the `candidates` (item ids) of every row: `user_id, item_id, score, share_<scorer>…`.

    Raises:
        RecllmError: as `recommend_file`.
    """
    index = recommender.index

    def answer(rows: Sequence[QueryRow]) -> Answers:
        # All candidates of the rows stand beside each row: few rows at once, for they may be all of a large catalogue.
        parts = [rows[start : start + USERS_IN_BATCH] for start in range(0, len(rows), USERS_IN_BATCH)]
        return Answers.joined([scored(part) for part in parts])

    def scored(rows: Sequence[QueryRow]) -> Answers:
        items = ItemIndex(dict.fromkeys(item for row in rows for item in row.candidates if item in index))
        scores, shares = recommender.score([row.history for row in rows], items.ids)
        columns = [items.known(row.candidates) for row in rows]
        picked = {"score": scores} | {f"share_{name}": share for name, share in shares.items()}
        return _pairs(rows, items, columns, picked)

    columns = [*PAIRS, *(f"share_{name}" for name in recommender.share_names)]
    return _run(job.knowing(work="score candidates"), index, answer, columns, need=("candidates",))


def rank_file(ranker: RanksLists, known: ItemIndex, job: Job) -> Summary:
    """Score the `candidates` (item ids) of every row by a ranker alone: `user_id, item_id, score`.

    Args:
        ranker: judges pairs.
        known: the items that it has text of.
        job: files and progress.

    Raises:
        RecllmError: as `recommend_file`.
    """

    def answer(rows: Sequence[QueryRow]) -> Answers:
        asked = [[item for item in row.candidates if item in known] for row in rows]
        scores = ranker.score_lists([row.query for row in rows], asked)
        columns = {
            "user_id": [row.user_id for row, own in zip(rows, asked, strict=True) for _ in own],
            "item_id": [item for own in asked for item in own],
            "score": np.concatenate(scores),
        }
        return Answers(_frame(columns), [len(own) for own in asked])

    work, need = job.knowing(work="rank candidates"), ("candidates",)
    return _run(work, known, answer, PAIRS, need=need, unknown=NO_KNOWN, ratings=True)


def score_items_file(scorer: Scorer, items: ItemIndex, known: ItemIndex, job: Job, *, unread: str = "") -> Summary:
    """Score all `items` for every row: `user_id, item_id, score`.

    Args:
        scorer: any scorer, as the zero-shot one.
        items: what is scored.
        known: the items that a history can name.
        job: files and progress.
        unread: why the scorer does not read ratings; empty where it does, or has no use for them.

    Raises:
        RecllmError: as `recommend_file`; or a history has ratings that are not read.
    """
    every = np.arange(len(items), dtype=np.int64)
    if unread:
        # Looked for in all rows before the first one is answered: hours of work are not to end at a late one.
        job.check()
        for row in read_rows(job.source, histories=job.histories, ratings=True):
            if isinstance(row, QueryRow) and row.query.has_ratings:
                raise RecllmError(f"Line {row.line} of {job.source}: {unread}")

    def answer(rows: Sequence[QueryRow]) -> Answers:
        scores = scorer.score([row.query for row in rows], items)
        return _pairs(rows, items, [every] * len(rows), {"score": scores})

    work = {"work": "score items", "items": digest_of(items.ids)}
    return _run(job.knowing(**work), known, answer, PAIRS, need=(), unknown=NO_HISTORY, ratings=True)


def _pairs(
    rows: Sequence[QueryRow], items: ItemIndex, columns: Sequence[NDArray[np.int64]], scores: Mapping[str, Scores]
) -> Answers:
    """A line per row and one of its columns."""
    lengths = [len(each) for each in columns]
    across, down = np.concatenate(columns), np.repeat(np.arange(len(rows)), lengths)
    named = {
        "user_id": [rows[row].user_id for row in down.tolist()],
        "item_id": [items.ids[column] for column in across.tolist()],
    }
    return Answers(_frame(named | {name: values[down, across] for name, values in scores.items()}), lengths)


def _frame(columns: Mapping[str, Any]) -> pl.DataFrame:
    """The columns with null for NaN: what is not known looks the same in every kind of file."""
    return pl.DataFrame(columns, schema=_schema(columns)).with_columns(pl.col(pl.Float32).fill_nan(None))


def _schema(columns: Iterable[str]) -> dict[str, Any]:
    """The kind of every column, also where a part has no line."""
    kinds = {"user_id": pl.String, "item_id": pl.String, "rank": pl.Int32}
    return {name: kinds.get(name, pl.Float32) for name in columns}


def _run(
    job: Job,
    index: ItemIndex,
    answer: Answer,
    columns: Sequence[str],
    *,
    need: tuple[str, ...],
    unknown: str = "",
    ratings: bool = False,
) -> Summary:
    """Read, answer and keep part by part; the target appears when the last one is there.

    Rows without a known item in their history are set aside for the reason `unknown`, where it is given.
    `ratings` are read only where something reads them.
    A job that was killed goes on behind its last part, and ends with the same bytes.
    """
    FORKS.check()
    job.check()
    total = count_rows(job.source)
    part, parts = job.shard
    first, last = total * (part - 1) // parts, total * part // parts if part < parts else None
    rows = read_rows(job.source, histories=job.histories, need=need, ratings=ratings)
    kept = Parts(job.target, job.identity(), overwrite=job.overwrite)
    try:
        if kept.done:
            job.say(f"Going on behind {kept.counts.answered + kept.counts.rejected:,} rows that are done")
        begin = first + kept.done * job.chunk
        here = islice(rows, begin, None if last is None else max(begin, last))
        progress = Progress(max((total if last is None else last) - begin, 0), "users", job.say, EVERY)
        summary = Summary(example=index.ids[0] if len(index) else "")
        checked = (_checked_chunk(chunk, index, unknown) for chunk in _chunks(here, job.chunk))
        for good, rejects, counts in () if kept.complete else ahead(checked):
            answers = _answered(answer, good) if good else None
            left = () if answers is None else answers.unanswered(good)
            rejects = sorted([*rejects, *(_set_aside(row) for row in left)], key=lambda reject: reject["line"])
            counts.answered, counts.rejected = len(good) - len(left), len(rejects)
            counts.written = 0 if answers is None else answers.frame.height
            kept.add(None if answers is None else answers.frame, rejects, counts)
            done = counts.answered + counts.rejected
            summary.here += done
            gone = kept.counts.rejected
            progress.add(done, f", {gone:,} set aside" if gone else "")
        if not kept.counts.answered and parts == 1:
            reason = kept.first or "it has no rows"
            kept.refuse(rejects_of(job.target))
            kept.remove()
            others = ", and 'candidates', the item ids to score" if need else ""
            raise RecllmError(
                f"No row of {job.source} could be answered: {reason}. Rows need 'history', a list of item ids, oldest "
                f"first{others}."
            )
        summary.rejects = kept.finish(rejects_of(job.target), pl.DataFrame(schema=_schema(columns)))
    finally:
        kept.close()
    summary.add(kept.counts)
    summary.seconds = progress.seconds
    return summary


def rejects_of(target: Path) -> Path:
    """Where the rows go that could not be answered: line, reason and row of each."""
    return target.with_name(f"{target.name}.rejects.jsonl")


def _answered(answer: Answer, rows: Sequence[QueryRow]) -> Answers:
    """The answers; where memory does not suffice, those of either half.

    Raises:
        RecllmError: a single row is too much.
    """
    try:
        return answer(rows)
    except Exception as error:
        if not out_of_memory(error):
            raise
    if len(rows) == 1:
        raise RecllmError(f"Memory does not suffice for line {rows[0].line} alone. Free some, or shorten its history.")
    half = len(rows) // 2
    return Answers.joined([_answered(answer, rows[:half]), _answered(answer, rows[half:])])


def digest_of(texts: Iterable[str]) -> str:
    """The first 16 digits of the sha256 of some texts, in their order."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()[:16]


def ahead(parts: Iterator[T]) -> Iterator[T]:
    """The parts in their order, each made in another thread while the one before it is being used.

    What making a part raises is raised in its place.
    """
    with ThreadPoolExecutor(1, "read-ahead") as pool:
        following = pool.submit(next, parts, None)
        while (part := following.result()) is not None:
            following = pool.submit(next, parts, None)
            yield part


def _checked_chunk(
    chunk: Sequence[QueryRow | BadRow], index: ItemIndex, unknown: str
) -> tuple[list[QueryRow], list[dict[str, Any]], Counts]:
    """The rows that can be answered, and what is set aside; the counts know only of unknown items yet."""
    rejects: list[dict[str, Any]] = []
    counts = Counts()
    good = [row for each in chunk if (row := _checked(each, index, rejects, counts, unknown)) is not None]
    return good, rejects, counts


def _checked(
    row: QueryRow | BadRow, index: ItemIndex, rejects: list[dict[str, Any]], counts: Counts, unknown: str
) -> QueryRow | None:
    """Count unknown items; set aside what cannot be answered."""

    def refuse(reason: str) -> None:
        rejects.append(_set_aside(BadRow(row.line, reason, row.fields)))

    if isinstance(row, BadRow):
        rejects.append(_set_aside(row))
        return None
    known = [item in index for item in row.candidates or ()]
    if known and not any(known):
        refuse("none of the candidates is in the catalogue")
        return None
    strange = sum(item not in index for item in row.history)
    stranger = bool(row.history) and strange == len(row.history)
    if unknown and (stranger or not row.history):
        refuse(unknown if row.history else NO_EVENT)
        return None
    counts.strangers += stranger
    counts.nameless += row.user_id == f"line {row.line}"
    counts.unknown += strange + known.count(False)
    return row


def _set_aside(row: BadRow) -> dict[str, Any]:
    """A line of the rejects."""
    return {"line": row.line, "reason": row.reason, "row": row.fields}


def _chunks(rows: Iterable[QueryRow | BadRow], size: int) -> Iterator[list[QueryRow | BadRow]]:
    chunk: list[QueryRow | BadRow] = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk

"""Answers of a batch job, part by part beside the target, until all are there: killed at any moment, it goes on."""

import glob
import json
import math
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import polars as pl

from recllm.errors import RecllmError
from recllm.files import locked, written
from recllm.sheets import join_frames, write_frame

JOURNAL = "journal.jsonl"
ATTEMPTS, PAUSE = 100, 0.01
"""How often a folder is tried that others take away, and how many seconds lie between."""
COMPLETE = {"complete": True}
"""The journal's line behind the last part."""


@dataclass
class Counts:
    """What became of some rows.

    Attributes:
        answered: rows of the input that have an answer.
        rejected: rows that could not be answered.
        written: rows of the output.
        unknown: item ids that the catalogue does not have; they were passed over.
        strangers: answered rows whose history has items, none of which the catalogue has.
        nameless: answered rows without a user id.
    """

    answered: int = 0
    rejected: int = 0
    written: int = 0
    unknown: int = 0
    strangers: int = 0
    nameless: int = 0

    def add(self, other: "Counts") -> None:
        """Take the other's rows in."""
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)


class Parts:
    """The folder of a job that is not finished, `.NAME.parts` beside the target, and its journal.

    A part is a file of answers and one of rejected rows, each written under a temporary name and renamed, and then a
    line of the journal: only with that line it counts, so a part that was being written when the process was killed is
    written again. The journal's first line says which job this is.
    """

    def __init__(self, target: Path, job: Mapping[str, Any], *, overwrite: bool) -> None:
        """Begin the job, or go on with it.

        Args:
            target: the file that is written in the end.
            job: what makes it this job: whatever its answers depend on.
            overwrite: begin anew where another job was begun here.

        Raises:
            RecllmError: another job was begun here, or is running.
        """
        self.target, self.suffix = target, target.suffix.lower()
        self.folder = folder_of(target)
        self.counts, self.done, self.first = Counts(), 0, ""
        self._journal = self._locked()
        self._kept: list[Counts] = []
        before = self._lines()
        if before and before[0] != job:
            if not overwrite:
                self._journal.close()
                raise RecllmError(_another(target, self.folder, before[0], job))
            before = []
        if not before and not overwrite and target.exists():
            self.remove()
            raise RecllmError(
                f"'{target}' has appeared since this job was begun: another one has written it. Replace it by "
                "--overwrite, or name another file."
            )
        if not before:
            # The journal first: a kill between the two must not leave lines whose parts are gone.
            self._journal.truncate(0)
            os.fsync(self._journal.fileno())
            for path in self.folder.iterdir():
                if path.name != JOURNAL:
                    path.unlink()
            self._note(dict(job))
        self.complete = COMPLETE in before
        for line in before[1:]:
            if line == COMPLETE:
                continue
            self.first = self.first or line["first"]
            self._count(Counts(**{name: line.get(name, 0) for name in asdict(self.counts)}))

    def add(self, frame: pl.DataFrame | None, rejects: Sequence[Mapping[str, Any]], counts: Counts) -> None:
        """Keep the next part: its answers (None for none), rejected rows, and what became of its rows."""
        if rejects:
            text = "".join(_reject(row) + "\n" for row in rejects)
            # Half of a surrogate pair, as a cut emoji is, stays an escape, which is what JSON has for it.
            data = text.encode("utf-8", "backslashreplace")
            _keep(self._rejects(self.done), lambda path: path.write_bytes(data))
        if frame is not None:
            _keep(self._answers(self.done), lambda path: write_frame(frame, path, self.suffix))
        first = f"line {rejects[0]['line']}: {rejects[0]['reason']}" if rejects else ""
        self.first = self.first or first
        self._note(asdict(counts) | {"first": first})
        self._count(counts)

    def _count(self, counts: Counts) -> None:
        self._kept.append(counts)
        self.counts.add(counts)
        self.done += 1

    def finish(self, rejects: Path, empty: pl.DataFrame) -> Path | None:
        """Join all parts into the target and the file of rejected rows, and remove the folder.

        Args:
            rejects: where the rejected rows go; a file of an earlier job is replaced, or removed where there are none.
            empty: what is written where no row has an answer.

        Returns:
            The file of rejected rows, or None.

        Raises:
            RecllmError: a part that the journal has is not there.
        """
        self._check_whole()
        if not self.complete:
            self._note(COMPLETE)  # from here on the target may be there, and is ours
        refused = self.refuse(rejects)
        answers = [path for part in range(self.done) if (path := self._answers(part)).is_file()]
        # Inside the folder until it is whole: a kill leaves nothing beside the target.
        joined = self.folder / "joined"
        if answers:
            join_frames(answers, joined, self.suffix)
        else:
            write_frame(empty, joined, self.suffix)
        _on_disk(joined)
        joined.replace(self.target)
        self.remove()
        return refused

    def _check_whole(self) -> None:
        for part, counts in enumerate(self._kept):
            lacks = counts.written and not self._answers(part).is_file()
            if lacks or (counts.rejected and not self._rejects(part).is_file()):
                raise RecllmError(
                    f"Part {part} of '{self.target}' is gone from '{self.folder}'. Remove that folder, and begin anew."
                )

    def refuse(self, rejects: Path) -> Path | None:
        """Join the rejected rows alone, as `finish` does."""
        refused = [path for part in range(self.done) if (path := self._rejects(part)).is_file()]
        if not refused:
            rejects.unlink(missing_ok=True)
            return None
        joined = self.folder / "joined.rejects"
        with joined.open("wb") as out:
            for path in refused:
                with path.open("rb") as stream:
                    shutil.copyfileobj(stream, out)
        joined.replace(rejects)
        return rejects

    def remove(self) -> None:
        """Take the parts away: in one step from under their name, so that a kill leaves all of them or none."""
        if self._journal.closed:
            return  # what is there by now is another job's
        gone = self.folder.with_name(f"{self.folder.name}.{os.getpid()}.gone")
        with suppress(FileNotFoundError):
            self.folder.replace(gone)
        self._journal.close()
        shutil.rmtree(gone, ignore_errors=True)

    def close(self) -> None:
        """Leave the parts, where there are any, for another time."""
        if self.done:
            self._journal.close()
        else:
            self.remove()

    def _answers(self, part: int) -> Path:
        return self.folder / f"{part:08}{self.suffix}"

    def _rejects(self, part: int) -> Path:
        return self.folder / f"{part:08}.rejects"

    def _locked(self) -> IO[str]:
        """The journal, held by this process alone; the system lets go of it however the process ends."""
        path = self.folder / JOURNAL
        for _ in range(ATTEMPTS):
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                journal = path.open("a+", encoding="utf-8")
            except (FileNotFoundError, FileExistsError):
                time.sleep(PAUSE)  # a job that has finished may take it away at this moment
                continue
            if locked(journal.fileno()) is False:
                journal.close()
                raise RecllmError(f"Another process is writing '{self.target}' at this moment. Wait for it.")
            if _is_still(journal, path):
                return journal
            journal.close()  # of a job that has finished in between: this lock keeps nobody out
        raise RecllmError(
            f"The folder '{self.folder}', where parts are kept, cannot be made. Is something in its place?"
        )

    def _lines(self) -> list[dict[str, Any]]:
        """The journal's lines; a last one that was cut off is taken away."""
        lines, size = _whole_lines(self.folder / JOURNAL)
        self._journal.truncate(size)
        return [json.loads(line) for line in lines]

    def _note(self, line: Mapping[str, Any]) -> None:
        self._journal.write(json.dumps(line) + "\n")
        self._journal.flush()
        os.fsync(self._journal.fileno())


def _is_still(opened: IO[str], path: Path) -> bool:
    """Whether a path is still that of the file that was opened there."""
    try:
        return os.path.samestat(os.fstat(opened.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _reject(row: Mapping[str, Any]) -> str:
    try:
        return json.dumps(_json(row), ensure_ascii=False, default=str)
    except RecursionError:  # lists in lists, as deep as a reader takes and no writer
        return json.dumps({**row, "row": "too deep to be written"})


def _json(value: Any) -> Any:  # noqa: ANN401  anything that a row holds
    """The same with null for numbers that JSON has no word for."""
    if isinstance(value, Mapping):
        return {str(key): _json(own) for key, own in value.items()}
    if isinstance(value, list | tuple):
        return [_json(own) for own in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def folder_of(target: Path) -> Path:
    """Where the parts of an unfinished job lie."""
    return target.with_name(f".{target.name}.parts")


def is_ours(target: Path) -> bool:
    """Whether a job was killed while it wrote `target`, or behind it: then the file that is there is its own."""
    journal = folder_of(target) / JOURNAL
    return journal.is_file() and json.dumps(COMPLETE) in _whole_lines(journal)[0]


def sweep(target: Path) -> None:
    """Take away what a kill left while the parts of a finished job were being removed."""
    for path in target.parent.glob(f"{glob.escape(folder_of(target).name)}.*.gone"):
        shutil.rmtree(path, ignore_errors=True)


def _whole_lines(journal: Path) -> tuple[list[str], int]:
    """The lines that end, and their bytes."""
    data = journal.read_bytes()
    size = data.rfind(b"\n") + 1
    return data[:size].decode("utf-8").split("\n")[:-1], size


def _keep(path: Path, write: Any) -> None:  # noqa: ANN401  a function of a path
    """Write a file that is on the disk, whole, when this returns."""
    with written(path) as temporary:
        write(temporary)
        _on_disk(temporary)


def _on_disk(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def _another(target: Path, folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    changed = ", ".join(name for name in dict.fromkeys([*before, *now]) if before.get(name) != now.get(name))
    return (
        f"'{target}' was begun by another job and is not finished; what differs: {changed}. Run that one again to "
        f"finish it, begin anew by --overwrite, or name another file. (Its parts are in '{folder}'.)"
    )

"""The task of a run: its data read, split and indexed, the same for training, evaluating and exporting."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from recllm.askedat import TrainingTime
from recllm.data import Dataset, read_dataset
from recllm.errors import RecllmError
from recllm.evaluate import warm_and_cold
from recllm.fetch import resolve_data
from recllm.files import written
from recllm.given import given_fingerprint, given_split
from recllm.ranking import ItemIndex
from recllm.runs import DataSettings, Run
from recllm.splits import Example, Split, check_no_leak, cold_items, leave_last_out, like_threshold, sampled, temporal

LEARNT, LEARNT_BEFORE = "learnt.parquet", "learnt-before.parquet"
"""In a run's folder: the pairs of user and item that it has learnt with all that it started from, and those alone."""


@dataclass(frozen=True, eq=False)
class Task:
    """What a run learns from and what it is measured on.

    Attributes:
        dataset: everything that was read.
        split: what is learnt from, and what is predicted.
        index: every item of the catalogue; rows and columns everywhere are in this order.
        repeats: whether an item may be chosen again, and so be recommended again; else what a history has is left out.
        given: digest of the files of a given split, where there is one.
    """

    dataset: Dataset
    split: Split
    index: ItemIndex
    repeats: bool = False
    given: str | None = None

    @cached_property
    def item_counts(self) -> NDArray[np.int64]:
        """Training events per item, int64[items]."""
        counts = self.split.train.item_counts()
        return np.array([counts.get(item, 0) for item in self.index.ids], dtype=np.int64)

    @property
    def warm(self) -> NDArray[np.bool_]:
        """Items with training events, bool[items]."""
        return self.item_counts > 0

    def liked_from(self, like_at: float) -> float:
        """The rating from which an event counts as liked, by the scale that labelled the rows of the split.

        That is the scale of the whole log: what is left to learn from may have one of its ends only.
        """
        given = self.split.name == "given"  # whose histories have a scale of their own
        return like_threshold(self.split.train if given else self.dataset.interactions, like_at)

    def sequences(self) -> list[NDArray[np.int64]]:
        """Item rows of every training user, oldest first."""
        return [self.index.known(query.history) for query in self.split.train.histories().values()]

    @cached_property
    def time(self) -> TrainingTime | None:
        """Where moments are in the training time; None where not all training events have a timestamp."""
        return TrainingTime.of(self.split.train)

    def timed_sequences(self) -> list[NDArray[np.int64]]:
        """As `sequences`, with when each event was beside it, in `PARTS` of the training time: int64[events, 2]."""
        assert self.time is not None
        train = self.split.train.frame
        rows = self.index.rows(train["item_id"])
        both = np.stack([rows, self.time.places(train["timestamp"].to_numpy())], axis=1)
        users = train["user_id"].rle_id().to_numpy()  # a user's rows stand together
        parts = np.split(both, np.flatnonzero(np.diff(users)) + 1)
        return [part[part[:, 0] >= 0] for part in parts]

    def slices(self, examples: list[Example]) -> dict[str, NDArray[np.bool_]]:
        """Masks of the warm and the cold rows among `examples`."""
        return warm_and_cold(examples, item_counts=self.split.train.item_counts(), cold_items=self.split.cold_items)

    def fingerprints(self) -> dict[str, str]:
        """Fingerprints of what was read."""
        read = {
            "interactions": self.dataset.interactions.fingerprint(),
            "catalog": self.dataset.catalog.fingerprint(),
        }
        return read if self.given is None else read | {"given rows": self.given}


def prepare(run: Run, say: Callable[[str], None] = lambda _: None, *, begun: bool = True) -> Task:
    """Read and split the data of a run, and check that nothing after the cut reaches training.

    Args:
        run: the run.
        say: gets a line of what is fetched, or left out.
        begun: whether what lies in the run's folder is of this run, if there is anything.

    Raises:
        RecllmError: the data cannot be read or split, an item of a text model has no text at all, or the run starts
            from one that does not say what it has learnt.
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
    for finding in dataset.report.findings:
        if finding.severity == "warning":
            say(f"{dataset.name}: {finding.text()}")
    dataset.catalog.demand_text(f"'{dataset.name}'")
    seed = run.seed if settings.seed is None else settings.seed
    if settings.split == "given":
        split = given_split(
            _folder(settings),
            shots=settings.shots,
            rated_histories=settings.rated_histories,
            like_at=settings.like_at,
            seed=run.seed,
        )
        _check_known(split, dataset, say)
        _say_what_is_doubtful(split, say)
        split = _without_unknown(split, run, dataset, say)
    else:
        split = _split(dataset, settings, seed)
    if settings.test_rows is not None:
        split = replace(split, test=sampled(split.test, settings.test_rows, seed))
    check_no_leak(split)
    _check_labels(split, run)
    split = _without_learnt(split, run, say, begun=begun)
    if not split.valid or not split.test:
        raise RecllmError(
            f"The split '{settings.split}' of '{dataset.name}' leaves {len(split.valid)} validation and "
            f"{len(split.test)} test events. Bring users with more events, lower data.min_events (now "
            f"{settings.min_events}) or choose another data.split."
        )
    given = given_fingerprint(_folder(settings)) if settings.split == "given" else None
    return Task(dataset, split, ItemIndex(dataset.catalog.ids), repeats=settings.duplicates == "keep", given=given)


def keep_learnt(run: Run, task: Task) -> None:
    """Write into the run's folder which pairs of user and item it learns, with those of the runs it starts from."""
    own, before = _pairs(task.split), _learnt_before(run)
    if before is not None:
        with written(run.folder / LEARNT_BEFORE) as part:
            before.write_parquet(part)
        own = pl.concat([own, before]).unique(maintain_order=True)
    with written(run.folder / LEARNT) as part:
        own.write_parquet(part)


def _pairs(split: Split) -> pl.DataFrame:
    return split.train.frame.select("user_id", "item_id").unique(maintain_order=True)


def _without_learnt(split: Split, run: Run, say: Callable[[str], None], *, begun: bool) -> Split:
    """The split without those validation and test rows that the runs have learnt which this one has learnt from.

    Such as those of a user with too few events to be asked about yesterday. What this run learns itself, where an
    event may come again, stays.
    """
    own = run.folder / LEARNT_BEFORE
    before = pl.read_parquet(own) if begun and own.is_file() else _learnt_before(run)
    if before is None:
        return split
    known = before.join(_pairs(split), on=["user_id", "item_id"], how="anti")
    pairs = set(known.iter_rows())
    valid, test = (
        [row for row in part if (row.query.user_id, row.item_id) not in pairs] for part in (split.valid, split.test)
    )
    gone = len(split.valid) - len(valid), len(split.test) - len(test)
    if any(gone):
        source = run.start_from if run.start_from is not None else run.light.teacher
        say(f"{gone[0]:,} validation and {gone[1]:,} test rows are left out: '{source}' has learnt them")
    return replace(split, valid=valid, test=test)


def _learnt_before(run: Run) -> pl.DataFrame | None:
    """The pairs that are known to what a run starts from, and to what its teacher started from; None without either."""
    paths = [Path(run.start_from) / LEARNT] if run.start_from is not None else []
    if paths and not paths[0].is_file():
        raise RecllmError(
            f"start_from = '{run.start_from}' does not say what it has learnt (it has no {LEARNT}), so that nobody "
            "could tell whether it knows this run's test rows. Train it again, or leave start_from out."
        )
    if run.light.teacher is not None:  # it has learnt this run's own training part, and what lies before it
        taught = Path(run.light.teacher) / LEARNT_BEFORE
        paths += [taught] if taught.is_file() else []
    return pl.concat(map(pl.read_parquet, paths)).unique(maintain_order=True) if paths else None


def _check_known(split: Split, dataset: Dataset, say: Callable[[str], None]) -> None:
    """Tell how many items of a given split the catalogue has not, and refuse one that it has nothing of."""
    found = {row.item_id for row in (*(split.train_rows or ()), *split.valid, *split.test)}
    found.update(split.train.item_counts())
    strange = sorted(item for item in found if item not in dataset.catalog)
    if len(strange) == len(found):
        raise RecllmError(
            f"The catalogue of '{dataset.name}' has none of the given split's {len(found):,} items, such as "
            f"'{strange[0]}'; its own are like '{dataset.catalog.ids[0]}'. Write the ids alike."
        )
    if strange:
        say(f"{len(strange):,} of {len(found):,} items of the given split are not in the catalogue ('{strange[0]}', …)")


def _say_what_is_doubtful(split: Split, say: Callable[[str], None]) -> None:
    """Tell of rows of a given split that say too much: of their own answer, or of what the other part asks."""
    for name, rows in (("validation", split.valid), ("test", split.test)):
        own = [row for row in rows if row.item_id in row.query.history]
        if own:
            say(
                f"{len(own):,} of {len(rows):,} {name} rows have the item that they ask for in their own history (user "
                f"'{own[0].query.user_id}', item '{own[0].item_id}'): the history tells it, and a list leaves it out"
            )
    fitted = {(row.query.user_id, row.item_id) for row in split.valid}
    again = [row for row in split.test if (row.query.user_id, row.item_id) in fitted]
    if again:
        say(
            f"{len(again):,} of {len(split.test):,} test rows are of a user and an item that stand in validation too "
            f"(user '{again[0].query.user_id}', item '{again[0].item_id}'): what is chosen there knows them"
        )


def _without_unknown(split: Split, run: Run, dataset: Dataset, say: Callable[[str], None]) -> Split:
    """Without the validation and test rows of a ranking whose item is no candidate."""
    if run.model.task != "next_item":
        return split
    parts = {"validation": split.valid, "test": split.test}
    kept = {name: [row for row in rows if row.item_id in dataset.catalog] for name, rows in parts.items()}
    for name, rows in parts.items():
        if len(kept[name]) < len(rows):
            say(
                f"{len(rows) - len(kept[name]):,} of {len(rows):,} {name} rows ask for an item that is not in the "
                "catalogue, so that nothing can rank it: they are left out"
            )
    return replace(split, valid=kept["validation"], test=kept["test"])


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
            min_events=settings.min_events,
            like_at=settings.like_at,
            given_back=settings.given_back,
        )
    return leave_last_out(dataset.interactions, min_events=settings.min_events, like_at=settings.like_at)

"""Join several sources into one data set: `recllm data join JOIN.toml FOLDER`.

Shops, apps and platforms log the same people and things under other ids, with other clocks and other kinds of events.
A join file names each source once; what comes out is one data set that every other command reads.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import polars as pl
from pydantic import Field, model_validator

from recllm.data.events import EXTRA, Duplicates
from recllm.data.read import read_dataset
from recllm.data.sets import Dataset
from recllm.data.texts import as_ids
from recllm.data.times import YEAR_2200
from recllm.errors import RecllmError, unknown
from recllm.files import whole_folder
from recllm.recipes import Settings, parse, read_toml

SEPARATOR = ":"
"""Stands between a namespace and an id."""


class EventKind(Settings):
    """What one kind of event is worth."""

    weight: float = Field(1.0, gt=0)
    """Beside the source's own weight."""
    rating: float | None = None
    """Taken as the rating where the event has none: a like 5, a dislike 1."""


class Source(Settings):
    """`[[source]]`: one log with its items."""

    name: str
    """Names it in messages and in the column `source`."""
    data: str = ""
    """A fetchable name, a folder, or the name of a folder under RECLLM_DATA."""
    interactions: str | None = None
    """A file of its own for the interactions."""
    items: str | None = None
    """A file of its own for the items. Without it a source of `interactions` alone has none."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Our name = the file's column, for the interactions."""
    item_columns: dict[str, str] = Field(default_factory=dict)
    """Our name = the file's column, for the items."""
    users: str | None = None
    """Namespace of the user ids; sources with the same one mean the same people. The source's name if not given; empty
    leaves the ids as they are."""
    items_namespace: str | None = None
    """The same for the item ids."""
    weight: float = Field(1.0, gt=0)
    """What one event counts beside those of the other sources."""
    event: str | None = None
    """The column that says what kind of event it is."""
    events: dict[str, EventKind] = Field(default_factory=dict)
    """By kind what it is worth; events of a kind that is not named here are left out, and counted."""
    rating_scale: tuple[float, float] | None = None
    """Lowest and highest rating of this source; brought to 1 … 5. Ratings by kind of event are not: they are 1 … 5."""
    clock: float = 0.0
    """Seconds that are added to its time stamps."""
    duplicates: Duplicates = "keep"
    """Which of several events of one user with one item goes on to the join's own rule: the first in this source, the
    last, or all of them; with `event` all, for they may be of different kinds."""

    @model_validator(mode="after")
    def _agrees(self) -> "Source":
        if bool(self.event) != bool(self.events):
            raise ValueError("event names a column and events says what its kinds are worth: give both or none")
        if self.event and self.duplicates != "keep":
            raise ValueError("duplicates is for a source without event: of several kinds of events all go on")
        if self.rating_scale is not None and self.rating_scale[0] >= self.rating_scale[1]:
            raise ValueError("rating_scale is the lowest, then the highest rating")
        if not self.data and not self.interactions:
            raise ValueError("give data (a name or a folder) or interactions (a file)")
        return self

    @property
    def of_users(self) -> str:
        """The namespace of its user ids."""
        return self.name if self.users is None else self.users

    @property
    def of_items(self) -> str:
        """The namespace of its item ids."""
        return self.name if self.items_namespace is None else self.items_namespace


class Join(Settings):
    """A join file."""

    source: tuple[Source, ...] = Field(min_length=1)
    duplicates: Duplicates = "last"
    """Which of several events of one user with one item stays, over all sources: the first as it was then, or the last
    with what the earlier ones said. The first cannot know what the user did later: a split in time would show it."""
    merged_weight: Literal["largest", "sum"] = "largest"
    """What the last event weighs: as the heaviest of those it stands for, or as all of them."""

    @model_validator(mode="after")
    def _namespaces_are_apart(self) -> "Join":
        for spaces in ({source.of_users for source in self.source}, {source.of_items for source in self.source}):
            for space in spaces:
                inside = sorted(other for other in spaces if space and other.startswith(space + SEPARATOR))
                if inside:
                    raise ValueError(
                        f"the namespaces '{space}' and '{inside[0]}' could make one id of two: name them so that none "
                        f"begins with another and '{SEPARATOR}'"
                    )
        return self

    @model_validator(mode="after")
    def _agrees(self) -> "Join":
        if "merged_weight" in self.model_fields_set and self.duplicates != "last":
            raise ValueError(
                "merged_weight is what the last of several events weighs: it goes with duplicates = 'last'"
            )
        return self


def join_sources(file: Path, target: Path, say: Callable[[str], None]) -> int:
    """Read every source of a join file and write `target`, a data set of interactions.parquet and items.parquet.

    The event that stays keeps its place and time. The last of several has the last rating that the user gave. An item
    that several sources describe takes each column from the first of them that has it.

    Returns:
        The number of events.

    Raises:
        RecllmError: a mistake in the join file, a source that cannot be read, times in some sources only, or a target
            that is there already.
    """
    join = parse(Join, read_toml(file), str(file))
    names = [source.name for source in join.source]
    if len(set(names)) < len(names):
        raise RecllmError(f"{file}: two sources have the same name; each needs its own ({', '.join(names)}).")
    if target.exists():
        raise RecllmError(f"'{target}' is there already. Name another folder, or remove it.")
    events, items = [], []
    for source in join.source:
        dataset = _read(source)
        _say_warnings(source, dataset, say)
        frame = dataset.interactions.frame
        kinds = None if source.event is None else as_ids(frame[EXTRA + source.event])
        frame = _weighted(source, _with_kinds(source, frame, kinds), say)
        events.append(frame)
        items.append(_named_items(source, dataset))
    _say_who_never_meets(join, events, say)
    joined = _without_duplicates(_in_time(pl.concat(events), names, events), join)
    catalog = _merged(items)
    with whole_folder(target) as part:
        joined.write_parquet(part / "interactions.parquet")
        catalog.write_parquet(part / "items.parquet")
    users, count = joined["user_id"].n_unique(), joined["item_id"].n_unique()
    named = any(source.of_users or source.of_items for source in join.source)
    for first in joined.head(1).iter_rows(named=True) if named else ():
        say(f"Ids are written with their namespaces: user '{first['user_id']}', item '{first['item_id']}'")
    if join.duplicates == "keep":
        say("A run keeps several events of one user with one item by --set data.duplicates=keep; else the first stays")
    say(f"{target}: {len(joined):,} events of {users:,} users with {count:,} items, {len(catalog):,} items in all")
    return len(joined)


def _say_who_never_meets(join: Join, events: Sequence[pl.DataFrame], say: Callable[[str], None]) -> None:
    """Tell where a source has no id of the others in its namespace: they are written differently, or it is another."""
    for column, spaces in (
        ("user_id", [source.of_users for source in join.source]),
        ("item_id", [source.of_items for source in join.source]),
    ):
        ids = [frame[column].unique(maintain_order=True) for frame in events]
        for place, (source, space) in enumerate(zip(join.source, spaces, strict=True)):
            others = [own for at, own in enumerate(ids) if at != place and spaces[at] == space and len(own)]
            if others and len(ids[place]) and not ids[place].is_in(pl.concat(others).implode()).any():
                say(
                    f"{source.name}: warning: no {column} is that of another source of its namespace '{space}' "
                    f"('{ids[place][0]}' here, '{others[0][0]}' there); are they written alike?"
                )


def _read(source: Source) -> Dataset:
    try:
        return read_dataset(
            source.data,
            interactions=source.interactions,
            items=source.items,
            columns=source.columns,
            item_columns=source.item_columns,
            duplicates=source.duplicates,
            extra=() if source.event is None else (source.event,),
            items_beside=bool(source.data),  # beside a log may lie the items of another source
        )
    except RecllmError as error:
        raise RecllmError(
            f"Source '{source.name}': {error} (A join file names columns in columns and item_columns of the "
            "[[source]], files in interactions and items.)"
        ) from None


def _say_warnings(source: Source, dataset: Dataset, say: Callable[[str], None]) -> None:
    for finding in dataset.report.findings:
        if finding.code == "order_against_time":
            say(f"{source.name}: events that stand before an earlier one by the order column; a join goes by time")
        elif finding.severity == "warning":
            say(f"{source.name}: {finding.text()}")


def _with_kinds(source: Source, frame: pl.DataFrame, kinds: pl.Series | None) -> pl.DataFrame:
    """Weights and ratings by the kind of event."""
    given = pl.col("weight") if "weight" in frame.columns else pl.lit(1.0)  # of a set that was joined before
    if source.rating_scale is not None:
        low, high = source.rating_scale
        ratings = frame["rating"] if kinds is None else frame["rating"].filter(kinds.is_in(list(source.events)))
        outside = ratings.drop_nulls().filter(~ratings.drop_nulls().is_between(low, high))
        if len(outside):
            raise RecllmError(
                f"Source '{source.name}': {len(outside):,} ratings lie outside of rating_scale = [{low:g}, {high:g}], "
                f"the first is {outside[0]:g}. Give the lowest and the highest rating that the log can have."
            )
        frame = frame.with_columns(rating=(1.0 + 4.0 * (pl.col("rating") - low) / (high - low)).cast(pl.Float32))
    if kinds is None:
        return frame.with_columns(weight=(given * source.weight).cast(pl.Float32))
    missing = sorted(set(source.events) - set(kinds.drop_nulls().unique().to_list()))
    if missing:
        raise unknown(f"kind of event in '{source.name}'", missing[0], kinds.drop_nulls().unique().sort().to_list())
    weights = {kind: source.weight * worth.weight for kind, worth in source.events.items()}
    by_kind = {kind: worth.rating for kind, worth in source.events.items()}
    return frame.with_columns(
        weight=(given * kinds.replace_strict(weights, default=None, return_dtype=pl.Float32)).cast(pl.Float32),
        rating=pl.coalesce(pl.col("rating"), kinds.replace_strict(by_kind, default=None, return_dtype=pl.Float32)),
    )


def _weighted(source: Source, frame: pl.DataFrame, say: Callable[[str], None]) -> pl.DataFrame:
    """One source's events in the common form, its ids in their namespaces, its clock and rating scale set right."""
    left_out = frame["weight"].null_count()
    if left_out:
        say(f"{source.name}: {left_out:,} events of kinds that [source.events] does not name, left out")
    frame = frame.filter(pl.col("weight").is_not_null())
    heavy = int((~frame["weight"].is_finite()).sum())
    if heavy:
        raise RecllmError(
            f"Source '{source.name}': {heavy:,} events weigh more than single precision holds, by their own weight "
            "times those of the source and of their kind. Give smaller ones."
        )
    time = (pl.col("timestamp").cast(pl.Float64) + source.clock).round()
    outside = frame.select(time.is_between(0, YEAR_2200, closed="left").not_().sum()).item()
    if outside:
        raise RecllmError(
            f"Source '{source.name}': clock = {source.clock:g} moves {outside:,} events out of the years 1970 to 2200. "
            "It is in seconds."
        )
    say(f"{source.name}: {len(frame):,} events of {frame['user_id'].n_unique():,} users")
    return frame.select(
        _inside(source.of_users, "user_id"),
        _inside(source.of_items, "item_id"),
        pl.col("rating").cast(pl.Float32),
        time.cast(pl.Int64).alias("timestamp"),
        "seq",
        "weight",
        pl.lit(source.name).alias("source"),
    )


def _inside(namespace: str, column: str) -> pl.Expr:
    if namespace == "":
        return pl.col(column)
    return pl.concat_str(pl.lit(namespace + SEPARATOR), pl.col(column)).alias(column)


def _in_time(frame: pl.DataFrame, names: list[str], events: list[pl.DataFrame]) -> pl.DataFrame:
    """All events, each user's in time; ties, and events without times, in the order of the sources."""
    timed = [name for name, own in zip(names, events, strict=True) if not own["timestamp"].null_count()]
    if timed and len(timed) < len(names):
        other = next(name for name in names if name not in timed)
        raise RecllmError(
            f"Source '{other}' has events without a time stamp and '{timed[0]}' has none such: they cannot be put in "
            "one order. Give it a timestamp column ([source.columns]), or join only sources of one kind."
        )
    # The sort is stable: events of one second stay in the order of the sources, and of each source's own seq.
    return frame.sort("timestamp", maintain_order=True) if timed else frame


def _without_duplicates(frame: pl.DataFrame, join: Join) -> pl.DataFrame:
    if join.duplicates == "keep":
        return _numbered(frame)
    pair = ("user_id", "item_id")
    if join.duplicates == "first":
        return _numbered(frame.filter(pl.struct(*pair).is_first_distinct()))
    weight = pl.col("weight").sum() if join.merged_weight == "sum" else pl.col("weight").max()
    rating = pl.col("rating").drop_nulls().last()
    frame = frame.with_columns(weight.over(pair), rating.over(pair).alias("rating"))
    return _numbered(frame.filter(pl.struct(*pair).is_last_distinct()))


def _numbered(frame: pl.DataFrame) -> pl.DataFrame:
    """Each user's events together, numbered; users stand in the order of their first event."""
    first = frame["user_id"].unique(maintain_order=True).to_frame().with_row_index("_user")
    ordered = frame.join(first, on="user_id", maintain_order="left").sort("_user", maintain_order=True).drop("_user")
    ordered = ordered.with_columns(pl.int_range(pl.len(), dtype=pl.Int32).over("user_id").alias("seq"))
    return ordered.rename({"weight": "event_weight"})


def _named_items(source: Source, dataset: Dataset) -> pl.DataFrame:
    return dataset.catalog.frame.with_columns(_inside(source.of_items, "item_id"))


def _merged(items: list[pl.DataFrame]) -> pl.DataFrame:
    """Every item once; each column from the first source that has a value."""
    frame = pl.concat(items, how="diagonal")
    columns: Mapping[str, pl.Expr] = {
        name: pl.col(name).drop_nulls().first() for name in frame.columns if name != "item_id"
    }
    return frame.group_by("item_id", maintain_order=True).agg(**columns)

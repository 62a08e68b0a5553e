"""Read a data set by name, folder or files: `read_dataset("ml-100k")`."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import polars as pl

from recllm.data.checks import LINES_SHOWN, Checks
from recllm.data.columns import EVENT_COLUMNS, ITEM_COLUMNS, demand, map_columns
from recllm.data.events import Duplicates, normalise_events
from recllm.data.items import normalise_items
from recllm.data.sets import Catalog, Dataset, Interactions
from recllm.data.tables import BUDGET, LINE, SUFFIXES, Table, open_table
from recllm.errors import RecllmError, unknown
from recllm.fetch import read_marker, resolve_data

EVENT_FILES = ("interactions.*", "*.inter", "ratings.*", "u.data")
ITEM_FILES = ("items.*", "*.item", "movies.*", "u.item")
NOT_STATED = "not stated"


def read_dataset(
    data: str,
    *,
    interactions: str | None = None,
    items: str | None = None,
    columns: Mapping[str, str] | None = None,
    item_columns: Mapping[str, str] | None = None,
    duplicates: Duplicates = "first",
    budget: int = BUDGET,
    extra: Sequence[str] = (),
    items_beside: bool = True,
) -> Dataset:
    """Read, normalise and check a data set.

    Args:
        data: a name (fetched, or a folder in RECLLM_DATA), a folder, or a file of interactions;
            may be empty where `interactions` is given.
        interactions: the file of interactions, where it is not found by its name.
        items: the file of items, likewise; without any, the catalog holds the ids only.
        columns: our column (user_id, item_id, rating, timestamp, seq, event_weight) to the file's, where the guess is
            wrong.
        item_columns: likewise for items (item_id, title, genres, release_year, or a new name for any other).
        duplicates: which event of one user with one item stays.
        budget: most bytes that a file may take in memory.
        extra: further columns of the interactions' file that are kept as they are.
        items_beside: without `items` look for a file of items by its name, in the folder or beside the log.

    Raises:
        RecllmError: an unknown name, a file that is missing, empty, broken or too large, or a column that is missing.
    """
    place = Path(interactions).parent if interactions and not data else resolve_data(data)
    folder = place if place.is_dir() else place.parent
    if interactions is not None:
        event_file = _given(interactions, folder)
    else:
        event_file = place if place.is_file() else _event_file(folder)
    item_file = _only(folder, ITEM_FILES) if items is None and items_beside else None
    if items is not None:
        item_file = _given(items, folder)
    checks = Checks()
    events = _read_events(event_file, columns, duplicates, budget, checks, extra)
    texts = None if item_file is None else _read_items(item_file, item_columns, budget, checks)
    catalog = _completed(events, texts, event_file.name, checks)
    source, licence = _origin(folder)
    # A file that is named by itself lies in any folder, whose name says nothing of it.
    beside = place.is_dir() and event_file.parent == folder and (data or interactions is None)
    name = folder.resolve().name if beside else event_file.stem
    return Dataset(name, Interactions(events.drop(LINE)), catalog, source, licence, checks.report())


def read_interactions(
    path: Path,
    *,
    columns: Mapping[str, str] | None = None,
    duplicates: Duplicates = "first",
    budget: int = BUDGET,
    say: Callable[[str], None] = lambda _: None,
) -> Interactions:
    """Read a file of interactions alone.

    Args:
        path: any kind of file that a data set's interactions may be.
        columns: our column to the file's, where the guess is wrong.
        duplicates: which event of one user with one item stays.
        budget: most bytes that the file may take in memory.
        say: gets a line for every kind of event that is left out or doubtful.

    Raises:
        RecllmError: a file that is missing, empty, broken or too large, or a column that is missing.
    """
    checks = Checks()
    events = _read_events(path, columns, duplicates, budget, checks)
    _say_warnings(path, checks, say)
    return Interactions(events.drop(LINE))


def read_items(
    path: Path,
    *,
    columns: Mapping[str, str] | None = None,
    budget: int = BUDGET,
    say: Callable[[str], None] = lambda _: None,
) -> Catalog:
    """Read a file of items alone.

    Args:
        path: any kind of file that a data set's items may be.
        columns: our column to the file's, where the guess is wrong.
        budget: most bytes that the file may take in memory.
        say: gets a line for every kind of item that is left out or doubtful.

    Raises:
        RecllmError: a file that is missing, empty, broken or too large, a column that is missing, or no text at all.
    """
    checks = Checks()
    catalog = Catalog(_read_items(path, columns, budget, checks))
    _say_warnings(path, checks, say)
    catalog.demand_text(str(path))
    return catalog


def _say_warnings(path: Path, checks: Checks, say: Callable[[str], None]) -> None:
    for finding in checks.report().findings:
        if finding.severity == "warning":
            say(f"{path.name}: {finding.text()}")


def _read_events(
    path: Path,
    columns: Mapping[str, str] | None,
    duplicates: Duplicates,
    budget: int,
    checks: Checks,
    extra: Sequence[str] = (),
) -> pl.DataFrame:
    for role in columns or {}:
        if role not in EVENT_COLUMNS:
            raise unknown("key in data.columns", role, EVENT_COLUMNS)
    table = open_table(path, budget)
    mapping = map_columns(table, EVENT_COLUMNS, columns, "data.columns")
    demand(table, mapping, ("user_id", "item_id"), "data.columns")
    for name in extra:
        if name not in table.columns:
            raise unknown(f"column of {path.name}", name, table.columns)
    checks.facts["interactions_file"] = path.name
    _note_encoding(table, checks)
    return normalise_events(table, mapping, duplicates, checks, extra)


def _read_items(path: Path, columns: Mapping[str, str] | None, budget: int, checks: Checks) -> pl.DataFrame:
    table = open_table(path, budget)
    mapping = map_columns(table, ITEM_COLUMNS, columns, "data.item_columns")
    demand(table, mapping, ("item_id",), "data.item_columns")
    checks.facts["items_file"] = path.name
    _note_encoding(table, checks)
    return normalise_items(table, mapping, checks)


def _note_encoding(table: Table, checks: Checks) -> None:
    # The research sets of these kinds are of Western Europe and older than UTF-8: nothing is doubtful there.
    known = table.path.suffix.lower() in (".data", ".dat", ".item", ".inter", ".user")
    lines, message = table.not_utf8, "lines that are not UTF-8, read as Windows-1252"
    shown, file = lines[:LINES_SHOWN], table.path.name
    checks.add("info" if known else "warning", "not_utf8", message, len(lines), file=file, lines=shown)


def _completed(events: pl.DataFrame, items: pl.DataFrame | None, file: str, checks: Checks) -> Catalog:
    """The catalog of `items` and, without text, of what only `events` know."""
    if items is None:
        items = pl.DataFrame(schema={"item_id": pl.String, "title": pl.String})
    unlisted = events.filter(~pl.col("item_id").is_in(items["item_id"].implode()))
    ids = unlisted["item_id"].unique(maintain_order=True)
    if len(events) and len(unlisted) == len(events) and len(items):
        raise RecllmError(
            f"{file}: no event is of an item of the item file; the log has items such as '{ids[0]}', the item file "
            f"such as '{items['item_id'][0]}'. Write ids alike in both (a column with a missing number becomes 50.0 in "
            "place of 50), or name other columns (data.columns, data.item_columns)."
        )
    message = f"events whose item is in no row of the items ({len(ids):,} items), kept without text"
    lines = unlisted[LINE].sort().head(LINES_SHOWN)
    checks.add("warning", "item_not_listed", message, unlisted.height, file=file, lines=lines)
    whole = ids.str.replace(r"\.0+$", "")
    alike = ids.filter((whole != ids) & whole.is_in(items["item_id"].implode()))
    message = "items of these that are listed without the .0 at their end, as a column with a missing number has it"
    checks.add("warning", "id_with_fraction", message, len(alike), file=file)
    idle = int((~items["item_id"].is_in(events["item_id"].unique().implode())).sum())
    checks.add("info", "item_without_event", "items without any event", idle)
    frame = pl.concat([items, ids.to_frame()], how="diagonal")
    checks.facts["catalog_items"] = frame.height
    return Catalog(frame)


def _given(file: str, folder: Path) -> Path:
    """A file by its path, or by its name in the data's folder.

    Raises:
        RecllmError: there are two of them.
    """
    inside, here = folder / file, Path(file)
    if not inside.is_file():
        return here
    if here.is_file() and not here.samefile(inside):
        raise RecllmError(
            f"There is a '{file}' in '{folder}', and another one in the working folder. Give the whole path of the one "
            f"that is meant, {inside.resolve()} or {here.resolve()}."
        )
    return inside


def _event_file(folder: Path) -> Path:
    found = _only(folder, EVENT_FILES)
    if found is None:
        names = sorted(path.name for path in folder.iterdir())
        raise RecllmError(
            f"'{folder}' has no file of interactions ({', '.join(EVENT_FILES)}; {', '.join(SUFFIXES)}). It holds: "
            f"{', '.join(names[:12]) or 'nothing'}. Name the file: --interactions FILE, or for a run --set "
            "data.interactions=FILE"
        )
    return found


def _only(folder: Path, patterns: tuple[str, ...]) -> Path | None:
    """The file that fits the first pattern that fits any.

    Raises:
        RecllmError: several fit.
    """
    for pattern in patterns:
        found = sorted(path for path in folder.glob(pattern) if path.suffix.lower().lstrip(".") in SUFFIXES)
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise RecllmError(
                f"'{folder}' has several files that fit '{pattern}': {names}. Name one: --interactions FILE or "
                "--items FILE, or for a run --set data.interactions=FILE or data.items=FILE."
            )
        if found:
            return found[0]
    return None


def _origin(folder: Path) -> tuple[str, str]:
    """Source and licence, by the folder's SOURCE.md (`- origin: …`, `- licence: …`) or what `fetch` noted."""
    marker = read_marker(folder)
    stated = {"origin": marker.get("source"), "licence": marker.get("licence")}
    note = folder / "SOURCE.md"
    if note.is_file():
        for line in note.read_text(encoding="utf-8", errors="replace").splitlines():
            key, found, value = line.removeprefix("- ").partition(":")
            if line.startswith("- ") and found and key in stated:
                stated[key] = stated[key] or value.strip()
    return stated["origin"] or NOT_STATED, stated["licence"] or NOT_STATED

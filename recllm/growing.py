"""Add items to a bundle without training: their text is read once, and the next call can recommend them."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from recllm.arrayfiles import read_tensors
from recllm.bundle import CATALOG, MANIFEST, new_bundle, read_manifest, state, write_catalog
from recllm.data import Catalog, read_items
from recllm.data.tables import open_table
from recllm.errors import RecllmError, unknown
from recllm.expectation import ExpectedPopularity
from recllm.files import alone, write_json
from recllm.graphscorer import TableScorer
from recllm.likelihood import Likelihood
from recllm.neighbours import Neighbours
from recllm.priors import Popularity, TextSimilarity
from recllm.removing import REMOVED
from recllm.runtime import VECTORS, Recommender, load

Say = Callable[[str], None]
SEALED = ("format", "recllm", "made", "files")
"""Keys of a manifest that the sealing of the new bundle writes anew."""


def add_items(
    source: Path,
    items: Path,
    target: Path,
    *,
    columns: Mapping[str, str] | None = None,
    provider: str = "cpu",
    overwrite: bool = False,
    say: Say = lambda _: None,
) -> int:
    """Write the bundle `target`: `source` with the items of a file, known by their text alone.

    Items that the bundle has already are left as they are, but for those that were removed from its lists, which come
    back; items without text and columns that its catalogue has not
    are left out.

    Args:
        source: a bundle.
        items: a file of items, of any kind that a data set's items may be.
        target: the new bundle; it may be `source` itself, which is replaced when the new one is whole.
        columns: our column to the file's, where the guess is wrong; over what the run that made the bundle was told of
            its own items (`data.item_columns`), as far as the file has such columns.
        provider: what reads the text.
        overwrite: replace another bundle that is there.
        say: gets a line for everything that is doubtful in the file or passed over.

    Returns:
        How many items were added, or came back.

    Raises:
        RecllmError: not a bundle, a bundle without an item encoder, a file that cannot be read, a target that is no
            bundle, or no item that is new.
    """
    if any((folder / MANIFEST).is_file() for folder in target.resolve().parents):
        raise RecllmError(f"'{target}' would lie in a bundle, which holds its own files only. Name another folder.")
    read_manifest(source, verify=False)
    # One after the other: of two that add to the same bundle at once, the second would take away the first one's items.
    with alone(target, say):
        _check_target(source, target, overwrite)
        return _add(source, items, target, columns, provider, say)


def _check_target(source: Path, target: Path, overwrite: bool) -> None:
    if not target.exists() or target.samefile(source):
        return
    if not (target / MANIFEST).is_file():
        raise RecllmError(f"'{target}' is there already, and is no bundle. Name another folder.")
    if not overwrite:
        raise RecllmError(f"'{target}' is another bundle. Replace it by --overwrite, or name another folder.")


def _add(source: Path, items: Path, target: Path, columns: Mapping[str, str] | None, provider: str, say: Say) -> int:
    before = state(source)
    recommender = load(source, provider=provider)
    manifest = read_manifest(source, verify=False)
    records, back = _new_records(source, items, recommender.catalog, manifest, columns, say)
    grown = recommender.with_items(records)
    facts = {key: value for key, value in manifest.items() if key not in SEALED}
    if back:
        facts[REMOVED] = sorted(frozenset(facts[REMOVED]).difference(back))
    with new_bundle(target, facts | {"items_added": facts.get("items_added", 0) + len(records)}) as part:
        for path in sorted(source.rglob("*")):
            name = path.relative_to(source)
            if name.as_posix() in manifest["files"] and name.as_posix() not in (CATALOG, VECTORS, MANIFEST):
                (part / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, part / name)
        _write_grown(grown, read_tensors(source / VECTORS), part)
        if state(source) != before:
            raise RecllmError(
                f"'{source}' was replaced while items were added to it. Nothing was written; add them again."
            )
    return len(records) + len(back)


def _new_records(
    source: Path,
    items: Path,
    known: Catalog,
    manifest: Mapping[str, Any],
    columns: Mapping[str, str] | None,
    say: Say,
) -> tuple[list[dict[str, str]], list[str]]:
    """What a file says of the items that a bundle does not have, in the columns that it has; and which come back."""
    ours = list(dict.fromkeys(["item_id", *known.frame.columns]))
    for column in columns or {}:
        if column not in ours:
            raise unknown(f"column of '{source}'", column, ours, "Write --item-column OURS=THEIRS.")
    found = read_items(items, columns={**told_columns(items, manifest, "item_columns"), **(columns or {})}, say=say)
    new = [_fitting(found, item, known) for item in found.ids if item not in known]
    records = [record for record in new if len(record) > 1]
    removed = frozenset(manifest.get(REMOVED, ()))
    back = [item for item in found.ids if item in removed]
    if back:
        say(f"{len(back):,} items were removed, and are recommended again, with the text that the bundle has of them")
    if not new and not back:
        raise RecllmError(
            f"{items} has no item that '{source}' does not have already; nothing was written. Another text of an item "
            "is read where it comes under another id, or when the bundle is exported again."
        )
    if new and not records and not back:
        raise RecllmError(
            f"Of {len(new):,} items of {items} that '{source}' does not have, none has text in a column that it knows: "
            f"the file has {', '.join(found.frame.columns)}, the bundle {', '.join(known.frame.columns)}. Say which is "
            "which by --item-column OURS=THEIRS; nothing was written."
        )
    if there := len(found.ids) - len(new) - len(back):
        say(f"{there:,} items are in the bundle already, and are left as they are there")
    if left := [name for name in found.frame.columns if name not in ours]:
        say(f"Columns that the bundle has not, left out: {', '.join(left)}")
    if untold := len(new) - len(records):
        say(f"{untold:,} items have no text, without which nothing recommends them, and are left out")
    return records, back


def told_columns(file: Path, manifest: Mapping[str, Any], key: str) -> dict[str, str]:
    """Our columns to the file's, as the bundle's run was told of its own; those that this file has.

    Args:
        file: a log or a file of items.
        manifest: of the bundle.
        key: `columns` of a log, `item_columns` of items.
    """
    there = open_table(file).columns
    return {ours: theirs for ours, theirs in manifest.get(key, {}).items() if theirs in there}


def _fitting(found: Catalog, item: str, known: Catalog) -> dict[str, str]:
    return {name: value for name, value in found.record(item).items() if name in known.frame.columns}


def _write_grown(grown: Recommender, arrays: dict[str, NDArray[Any]], folder: Path) -> None:
    write_catalog(folder, grown.catalog)
    added = len(grown.index) - len(arrays["item_counts"])
    arrays["item_counts"] = np.concatenate([arrays["item_counts"], np.zeros(added, dtype=np.int64)])
    for name, scorer in grown.scorers.items():
        if isinstance(scorer, Popularity | Likelihood | TextSimilarity | Neighbours | ExpectedPopularity):
            scorer.save(folder / "cf")
        elif isinstance(scorer, TableScorer):
            arrays[f"{name}.table"] = scorer.table
            arrays[f"{name}.heads"], arrays[f"{name}.bias"] = scorer.items[:, :-1], scorer.items[:, -1]
            write_json(folder / f"{name}.json", scorer.history.to_dict())  # it may hold a text of each item
    save_file({key: np.ascontiguousarray(value) for key, value in arrays.items()}, folder / VECTORS)

"""Take items out of a bundle's lists: what is sold out is recommended no more, and still counts in histories."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from recllm.bundle import MANIFEST, read_catalog, read_manifest
from recllm.data.columns import ITEM_COLUMNS, demand, map_columns
from recllm.data.tables import open_table
from recllm.data.texts import as_ids
from recllm.errors import RecllmError
from recllm.files import alone, write_json

REMOVED = "removed"
"""In a bundle's manifest: the ids of the items that are in no list."""


def item_ids(file: Path, manifest: Mapping[str, Any], columns: Mapping[str, str] | None = None) -> list[str]:
    """The ids in a file of items, each once: a text file (.txt) with one to a line, or any kind that items come in.

    Args:
        file: the file; of its columns only that of the ids is read.
        manifest: of the bundle, whose run may have been told what that column is called.
        columns: `item_id` to the file's column, where the guess is wrong.

    Raises:
        RecllmError: the file cannot be read, has no column of ids, or no id.
    """
    if file.suffix.lower() == ".txt":
        try:
            found = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise RecllmError(f"'{file}' cannot be read: {error}. Give a file of item ids, one to a line.") from None
    else:
        table = open_table(file)
        told = {ours: theirs for ours, theirs in manifest.get("item_columns", {}).items() if theirs in table.columns}
        given = {ours: theirs for ours, theirs in (told | dict(columns or {})).items() if ours == "item_id"}
        names = map_columns(table, {"item_id": ITEM_COLUMNS["item_id"]}, given, "data.item_columns")
        demand(table, names, ["item_id"], "data.item_columns")
        found = as_ids(table.read([names["item_id"]])[names["item_id"]]).drop_nulls().to_list()
    ids = list(dict.fromkeys(item for item in found if item))
    if not ids:
        raise RecllmError(f"'{file}' has no item id.")
    return ids


def remove_items(
    bundle: Path, file: Path, *, columns: Mapping[str, str] | None = None, say: Callable[[str], None] = lambda _: None
) -> int:
    """Note the items of a file in the bundle's manifest, so that no list of it has them from the next call on.

    Nothing else changes: the vectors stay, for histories have these items, and `add_items` brings one back.

    Args:
        bundle: that recommends.
        file: as `item_ids` reads it.
        columns: likewise.
        say: is told of ids that the bundle has not, or has removed before.

    Returns:
        How many items were removed.

    Raises:
        RecllmError: no such bundle, a file that cannot be read, no item of the bundle's lists in it, or all of them.
    """
    read_manifest(bundle, verify=False)
    with alone(bundle, say):
        manifest = read_manifest(bundle)
        if "scorers" not in manifest:
            raise RecllmError(f"'{bundle}' ranks what another bundle recommends. Remove the items from that one.")
        known, before = read_catalog(bundle), frozenset(manifest.get(REMOVED, ()))
        ids = item_ids(file, manifest, columns)
        there = [item for item in ids if item in known]
        new = [item for item in there if item not in before]
        if strange := len(ids) - len(there):
            say(f"{strange:,} ids that the bundle has not, passed over")
        if twice := len(there) - len(new):
            say(f"{twice:,} items were removed before")
        if not new:
            raise RecllmError(f"'{file}' has no item that lists of '{bundle}' may have; nothing was changed.")
        if len(before) + len(new) == len(known.ids):
            raise RecllmError(f"'{file}' has all items that lists of '{bundle}' may have; nothing was changed.")
        write_json(bundle / MANIFEST, manifest | {REMOVED: sorted(before.union(new))})
    return len(new)

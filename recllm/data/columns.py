"""Which column of a file is which of ours: given, or guessed from its name."""

from collections.abc import Iterable, Mapping

import polars as pl

from recllm.data.tables import Table
from recllm.errors import RecllmError, unknown

Guesses = Mapping[str, tuple[str, ...]]

EVENT_COLUMNS: Guesses = {
    "user_id": ("userid", "user", "uid", "customerid", "customer", "reviewerid", "memberid", "accountid", "visitorid"),
    "item_id": (
        *(
            "itemid",
            "item",
            "iid",
            "movieid",
            "movie",
            "productid",
            "product",
            "asin",
            "parentasin",
            "bookid",
            "wineid",
        ),
        *("trackid", "songid", "articleid", "newsid", "videoid", "sku", "isbn"),
    ),
    "rating": ("rating", "score", "stars", "overall", "label"),
    "timestamp": (
        *("timestamp", "time", "ts", "unixreviewtime", "datetime", "date", "createdat", "eventtime", "eventtimestamp"),
        *("eventdate", "boughtat", "purchasedat", "purchasedate", "orderedat", "orderdate", "ratedat", "reviewdate"),
        *("viewedat", "clickedat", "watchedat", "visitedat", "timestampms", "unixtime"),
    ),
    "seq": ("seq", "sequence"),
    "event_weight": ("eventweight",),
}
"""Our columns of interactions and the names they go by, best first, as `squeezed` writes them."""

ITEM_COLUMNS: Guesses = {
    "item_id": (*EVENT_COLUMNS["item_id"], "id"),
    "title": (
        *("title", "itemtitle", "movietitle", "producttitle", "booktitle", "name", "itemname", "moviename"),
        *("productname", "productdisplayname"),
    ),
    "genres": ("genres", "genre", "class"),
    "release_year": ("releaseyear", "year"),
}


def squeezed(name: str) -> str:
    """A column's name as the guesses are written: lower case, letters and digits only."""
    return "".join(sign for sign in name.lower() if sign.isalnum())


def map_columns(
    table: Table,
    guesses: Mapping[str, tuple[str, ...]],
    given: Mapping[str, str] | None,
    key: str,
) -> dict[str, str]:
    """Which column of the file is which of ours: what is `given`, then what its name says.

    Args:
        table: the file.
        guesses: for each of our columns the names it goes by, best first, as `squeezed` writes them.
        given: our column to the file's; stands above the guesses.
        key: the run file's table, for the message (`data.columns`).

    Raises:
        RecllmError: a given column that the file has not.
    """
    mapping: dict[str, str] = {}
    for role, column in (given or {}).items():
        if column not in table.columns:
            raise unknown(f"column for {key}.{role}: {table.path.name} has no column", column, table.columns)
        mapping[role] = column
    by_name: dict[str, str] = {}
    for column in table.columns:
        by_name.setdefault(squeezed(column), column)
    kinds = table.frame.collect_schema()
    for role, names in guesses.items():
        free = [by_name[name] for name in names if name in by_name and by_name[name] not in mapping.values()]
        if role == "timestamp":  # nothing is told by a time of day without its day
            free = [column for column in free if kinds[column] not in (pl.Time, pl.Duration)]
        if role not in mapping and free:
            mapping[role] = free[0]
    return mapping


def demand(table: Table, mapping: Mapping[str, str], roles: Iterable[str], key: str) -> None:
    """Check that `mapping` has all `roles`.

    Raises:
        RecllmError: one is missing; says the columns found and how to name one.
    """
    for role in roles:
        if role not in mapping:
            option = "--item-column" if key.endswith("item_columns") else "--column"
            raise RecllmError(
                f"{table.path} has no column for '{role}'. Its columns: {', '.join(table.columns)}. Name the right one "
                f"in the run file's table [{key}], with --set {key}.{role}=NAME, by {option} {role}=NAME where a "
                f"command has it, or call it '{role}' in the file"
            )

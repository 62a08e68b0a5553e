"""The currencies of recllm: a query, the interactions, the item catalog, and a data set of both."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from functools import cached_property
from numbers import Real
from typing import Any
from uuid import UUID

import numpy as np
import polars as pl
from numpy.typing import NDArray

from recllm.data.checks import CheckReport
from recllm.data.texts import identifier
from recllm.errors import RecllmError, unknown
from recllm.process import FORKS

FINGERPRINT_LENGTH = 16


@dataclass(frozen=True)
class Query:
    """What is known of a user when a recommendation is asked for; hashable."""

    history: tuple[str, ...]
    """Item ids, oldest first."""
    user_id: str | None = None
    ratings: tuple[float | None, ...] | None = None
    """As long as `history`, None for an item without a rating. None says nothing of ratings, so that what training
    knows of the user stands in; all of them None says that the user has rated nothing yet."""
    at: int | None = None
    """When the recommendation is asked for, in Unix seconds; None is now, after everything that is known."""

    @property
    def has_ratings(self) -> bool:
        """Whether an item of the history has a rating."""
        return self.ratings is not None and any(rating is not None for rating in self.ratings)


@dataclass(frozen=True, eq=False)
class Interactions:
    """Events of users with items, ordered inside each user."""

    frame: pl.DataFrame
    """user_id: String, item_id: String, rating: Float32 (nullable), timestamp: Int64 seconds (nullable), seq: Int32.
    A user's rows stand together and are ordered by seq; users stand in the order of first appearance. A set of several
    sources also has weight: Float32, what an event counts beside the others."""

    def __len__(self) -> int:
        return self.frame.height

    def fingerprint(self) -> str:
        """First 16 hex digits of the sha256 over all columns and their row order."""
        digest = hashlib.sha256()
        for name in ("user_id", "item_id"):
            _hash_texts(digest, name, self.frame[name])
        for name, kind in (("rating", "<f4"), ("timestamp", "<i8"), ("seq", "<i4")):
            column = self.frame[name]
            digest.update(name.encode() + np.packbits(column.is_null().to_numpy()).tobytes())
            digest.update(column.fill_null(0).to_numpy().astype(kind).tobytes())
        if "weight" in self.frame.columns:
            digest.update(b"weight" + self.frame["weight"].to_numpy().astype("<f4").tobytes())
        return digest.hexdigest()[:FINGERPRINT_LENGTH]

    def weights(self) -> NDArray[np.float32]:
        """What each event counts, float32[events]; 1 where nothing else is said."""
        if "weight" not in self.frame.columns:
            return np.ones(self.frame.height, dtype=np.float32)
        return self.frame["weight"].to_numpy().astype(np.float32)

    def users(self) -> list[str]:
        """User ids in the order of first appearance."""
        return self.frame["user_id"].unique(maintain_order=True).to_list()

    def histories(self) -> dict[str, Query]:
        """All events of every user as a query; `ratings` is None where all of them are missing."""
        grouped = self.frame.group_by("user_id", maintain_order=True).agg("item_id", "rating")
        return {
            user: Query(tuple(items), user, tuple(ratings) if any(rating is not None for rating in ratings) else None)
            for user, items, ratings in grouped.iter_rows()
        }

    def item_counts(self) -> dict[str, int]:
        """Number of events per item, in the order of first appearance."""
        counted = self.frame.group_by("item_id", maintain_order=True).len()
        return dict(counted.iter_rows())


@dataclass(frozen=True, eq=False)
class Catalog:
    """The items and their text."""

    frame: pl.DataFrame
    """item_id: String, title: String (nullable), further columns all String (nullable)."""

    def __len__(self) -> int:
        return self.frame.height

    def __contains__(self, item_id: object) -> bool:
        return item_id in self._rows

    @cached_property
    def ids(self) -> tuple[str, ...]:
        """Item ids in the catalog's order."""
        return tuple(self.frame["item_id"].to_list())

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {item: row for row, item in enumerate(self.ids)}

    @property
    def text_columns(self) -> list[str]:
        """All columns but the id."""
        return [name for name in self.frame.columns if name != "item_id"]

    def record(self, item_id: str) -> dict[str, str]:
        """The fields of one item that are not empty, `item_id` among them.

        Raises:
            KeyError: the item is not in the catalog.
        """
        fields: dict[str, Any] = self.frame.row(self._rows[item_id], named=True)
        return {name: value for name, value in fields.items() if value}

    def demand_text(self, place: str) -> None:
        """Check that some item has text; `place` begins the message.

        Raises:
            RecllmError: none has.
        """
        if self.frame.select(pl.all_horizontal(pl.col(self.text_columns).is_null()).all()).item():
            raise RecllmError(
                f"{place} has no items with text, and recllm reads items by their text. Name a file with a column "
                "'title' (or any text): --items FILE, or items = \"FILE\" under [data] in a run file."
            )

    def fingerprint(self) -> str:
        """First 16 hex digits of the sha256 over columns, rows and their order."""
        digest = hashlib.sha256()
        for name in self.frame.columns:
            _hash_texts(digest, name, self.frame[name])
        return digest.hexdigest()[:FINGERPRINT_LENGTH]

    def with_items(self, records: Sequence[Mapping[str, str]]) -> "Catalog":
        """A catalog with `records` appended; white space is squeezed as it is when reading.

        Raises:
            RecllmError: a record without id, an id that is there already, or a field the catalog has not.
        """
        FORKS.check()
        known = set(self.ids)
        rows = [_checked(record, self.frame.columns, known) for record in records]
        schema = dict.fromkeys(self.frame.columns, pl.String)
        return Catalog(pl.concat([self.frame, pl.DataFrame(rows, schema=schema)]))


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set as it was read: both tables, where they are from, under which licence, and what checking found."""

    name: str
    interactions: Interactions
    catalog: Catalog
    source: str
    licence: str
    report: CheckReport


def _hash_texts(digest: "hashlib._Hash", name: str, column: pl.Series) -> None:
    # Lengths keep ("ab", "c") apart from ("a", "bc"), and a null (−1) apart from an empty text.
    lengths = column.str.len_bytes().cast(pl.Int64).fill_null(-1)
    digest.update(f"\x00{name}\x00".encode() + lengths.to_numpy().astype("<i8").tobytes())
    digest.update("".join(column.drop_nulls().to_list()).encode())


def _text(value: object) -> str:
    """A field as text; lists are joined as they are when reading."""
    return ", ".join(str(each) for each in value if each is not None) if isinstance(value, list | tuple) else str(value)


def _is_missing(value: object) -> bool:
    """Whether a value stands for none: None, NaN, and what pandas writes for them."""
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return True
    return isinstance(value, Real | Decimal) and bool(value != value)


def _id_of(value: object) -> str:
    """An id as logs have it: also a number with a fraction, a UUID or a date.

    Raises:
        RecllmError: it is no id.
    """
    value = value.item() if isinstance(value, np.generic) else value
    try:
        return identifier(value)
    except ValueError as error:
        if isinstance(value, UUID | date) or (isinstance(value, float | Decimal) and math.isfinite(value)):
            return str(value)
        raise RecllmError(f"A new item's item_id: {error}.") from None


def _checked(record: Mapping[str, str], columns: list[str], known: set[str]) -> dict[str, str | None]:
    for name in record:
        if name not in columns:
            raise unknown("item field", name, columns)
    given = {name: value for name, value in record.items() if not _is_missing(value)}
    fields = {name: " ".join(_text(value).split()) or None for name, value in given.items()}
    item_id = _id_of(given.get("item_id", ""))  # white space inside an id is a part of it
    if not item_id:
        raise RecllmError(f"A new item needs 'item_id'; its fields are: {', '.join(record) or 'none'}.")
    if item_id in known:
        raise RecllmError(f"Item '{item_id}' is in the catalog already; give a new id, or leave the item out.")
    known.add(item_id)
    return fields | {"item_id": item_id}

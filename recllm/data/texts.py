"""Columns of any type as text: ids and item text; and single values as ids."""

from decimal import Decimal
from numbers import Integral
from typing import Any

import polars as pl

PLACEHOLDERS = ("unknown", "unkonwn", "nan", "NaN", "null", "NULL", "n/a", "N/A", "(no genres listed)")
"""Texts that say that there is none; the second is RecBole's spelling."""

NAMING = ("name", "title", "label")
"""Fields of a structure that say what it is, the first that is there."""
NUMBER_WITHOUT_FRACTION = r"^(-?\d+)\.0+$"


def stripped(column: pl.Series) -> pl.Series:
    """A column of text without the blanks around it, null where nothing else is there; any other as it is."""
    return column.str.strip_chars().replace("", None) if column.dtype == pl.String else column


def as_ids(column: pl.Series) -> pl.Series:
    """Ids as stripped text, null where empty.

    Numbers that became floats (by a missing one) or are decimals lose their `.0`.
    """
    text = _id_text(pl.col(column.name), column.dtype)
    return column.to_frame().select(text).to_series()


def as_id_lists(column: pl.Series) -> pl.Series:
    """Lists of ids, each as `as_ids` has it; an empty list where there is none.

    Raises:
        pl.exceptions.PolarsError: no column of lists of text or numbers.
    """
    column = column.cast(pl.List(pl.String)) if column.dtype == pl.Null else column
    column = column.arr.to_list() if isinstance(column.dtype, pl.Array) else column
    inner: pl.DataType | None = column.dtype.inner if isinstance(column.dtype, pl.List) else None  # type: ignore[assignment]
    text = _id_text(pl.element(), inner)
    return column.to_frame().select(pl.col(column.name).list.eval(text).fill_null([])).to_series()


def _id_text(ids: pl.Expr, kind: pl.DataType | None) -> pl.Expr:
    text = ids.cast(pl.String).str.strip_chars()
    if kind is not None and kind.is_float():
        # Large ones would be written with an exponent.
        whole = pl.coalesce(ids.cast(pl.Int64, strict=False).cast(pl.String), text)
        text = pl.when(ids.is_finite() & (ids == ids.floor())).then(whole).otherwise(text.replace("NaN", None))
    elif kind is not None and kind.is_decimal():
        text = text.str.replace(NUMBER_WITHOUT_FRACTION, "${1}")
    return text.replace("", None)


def as_text(column: pl.Series) -> pl.Series | None:
    """Item text: white space squeezed, numbers short, lists joined with commas; None for a type that is no text.

    Lists of fractions are none: they are vectors.
    Of structures (`{"id": 16, "name": "Animation"}`), alone or in lists, it is the name, the title or the label.
    """
    frame, text = column.to_frame(), pl.col(column.name)
    kind = column.dtype
    if kind.is_float():
        text = text.round(4)
    elif isinstance(kind, pl.List):
        inner: pl.DataType = kind.inner  # type: ignore[assignment]
        if isinstance(inner, pl.List):  # Amazon's categories: a list of paths
            text, inner = text.list.eval(pl.element().explode()), inner.inner  # type: ignore[assignment]
        if inner.is_float():  # an embedding
            return None
        if isinstance(inner, pl.Struct):
            name = _names(inner)
            if name is None:
                return None
            text = text.list.eval(pl.element().struct.field(name))
        elif inner.is_nested() or inner == pl.Binary:
            return None
        text = text.cast(pl.List(pl.String)).list.join(", ", ignore_nulls=True)
    elif isinstance(kind, pl.Struct) and (name := _names(kind)) is not None:
        text = text.struct.field(name)
    elif kind.is_nested() or kind.is_temporal() or kind == pl.Binary:
        return None
    text = text.cast(pl.String).str.replace_all(r"\s+", " ").str.strip_chars()
    text = text.str.replace(NUMBER_WITHOUT_FRACTION, "${1}")
    return frame.select(text.replace("", None).alias(column.name)).to_series()


def _names(kind: pl.Struct) -> str | None:
    """The field of a structure that says in words what it is."""
    words = [field.name for field in kind.fields if field.dtype == pl.String]
    return next((name for wanted in NAMING for name in words if name.lower() == wanted), None)


def identifier(value: Any) -> str:  # noqa: ANN401
    """An id as text; a whole number that became a float, as a missing one in its column makes it, loses its `.0`.

    So does a decimal number, as warehouses keep ids.
    """
    if isinstance(value, Integral) and not isinstance(value, bool):
        value = int(value)  # NumPy's too
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, Decimal) and value.is_finite() and value == value.to_integral_value():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError(f"{value!r:.60} is no id")
    text = str(value).strip()
    if not text.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError(f"{text!a:.60} has half of a character, which no file can hold")
    return text

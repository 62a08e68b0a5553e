"""Columns of any type as text: ids and item text."""

import polars as pl

PLACEHOLDERS = ("unknown", "unkonwn", "nan", "NaN", "null", "NULL", "n/a", "N/A", "(no genres listed)")
"""Texts that say that there is none; the second is RecBole's spelling."""

NAMING = ("name", "title", "label")
"""Fields of a structure that say what it is, the first that is there."""
NUMBER_WITHOUT_FRACTION = r"^(-?\d+)\.0+$"


def as_ids(column: pl.Series) -> pl.Series:
    """Ids as stripped text, null where empty; numbers that became floats (by a missing one) lose their `.0`."""
    text = _id_text(pl.col(column.name), of_floats=column.dtype.is_float())
    return column.to_frame().select(text).to_series()


def as_id_lists(column: pl.Series) -> pl.Series:
    """Lists of ids, each as `as_ids` has it; an empty list where there is none.

    Raises:
        pl.exceptions.PolarsError: no column of lists of text or numbers.
    """
    column = column.cast(pl.List(pl.String)) if column.dtype == pl.Null else column
    inner = column.dtype.inner if isinstance(column.dtype, pl.List | pl.Array) else None
    text = _id_text(pl.element(), of_floats=inner is not None and inner.is_float())
    return column.to_frame().select(pl.col(column.name).list.eval(text).fill_null([])).to_series()


def _id_text(ids: pl.Expr, *, of_floats: bool) -> pl.Expr:
    text = ids.cast(pl.String).str.strip_chars()
    if of_floats:
        text = text.str.replace(NUMBER_WITHOUT_FRACTION, "${1}").replace("NaN", None)
    return text.replace("", None)


def as_text(column: pl.Series) -> pl.Series | None:
    """Item text: white space squeezed, numbers short, lists joined with commas; None for a type that is no text.

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

"""Normalise items: one row per id, all else as text."""

from collections.abc import Mapping

import polars as pl

from recllm.data.checks import LINES_SHOWN, Checks
from recllm.data.tables import LINE, Table, check_kinds, note_columns_twice, note_rows_in_quotes
from recllm.data.texts import PLACEHOLDERS, as_ids, as_text

GENRE_LIKE = ("genres", "categories", "category", "tags", "keywords")
"""Columns that list words: joined with commas, whether the file has bars or (RecBole's token_seq) blanks."""

DATE = r"^(\d{4}-\d{2}-\d{2}.*|\d{1,2}-[A-Z][a-z]{2}-\d{4}|\d{1,2}/\d{1,2}/\d{4})$"
YEAR = r"[12]\d{3}"
MOSTLY = 0.5


def normalise_items(table: Table, mapping: Mapping[str, str], checks: Checks) -> pl.DataFrame:
    """Items as `Catalog.frame` describes them; what was dropped, left out or odd goes to `checks`.

    A release year goes into the title, `Heat (1995)`; what has a year and no title, or more words than a year, stays in
    its column. Columns that are no text (addresses, dates, ids of elsewhere, empty ones) are left out and named.

    Args:
        table: the file.
        mapping: our column to the file's; the file's other columns keep their names.
        checks: takes the findings.
    """
    file = table.path.name
    raw = table.read(table.columns)
    check_kinds(table, raw, [mapping["item_id"]])
    note_columns_twice(table, checks)
    note_rows_in_quotes(table, raw.height, checks)
    ids = as_ids(raw[mapping["item_id"]].alias("item_id"))
    several = ids.str.contains(r"[\r\n]").fill_null(False)
    message, lines = "items whose id has a line break (is a quote not closed?), dropped", raw[LINE].filter(several)
    checks.add("warning", "strange_id", message, len(lines), file=file, lines=lines.head(5))
    lines = raw[LINE].filter(ids.is_null())
    ids = ids.set(several, None)
    checks.add("warning", "missing_item_id", "items without id, dropped", len(lines), file=file, lines=lines.head(5))
    texts, left_out = _texts(table, mapping, raw, checks)
    title = texts.pop("title", pl.Series("title", [None], dtype=pl.String).new_from_index(0, raw.height))
    if "release_year" in texts:
        before = title
        title, rest = _with_year(title, texts.pop("release_year"))
        dated_titles = not title.equals(before) or title.str.contains(r"\(\d{4}\)$").any()
        if rest.null_count() < len(rest):
            texts["release_year"] = rest
        else:
            left_out[mapping["release_year"]] = "a year, now in the title" if dated_titles else "no years"
    frame = pl.DataFrame([raw[LINE], ids, title, *texts.values()]).filter(pl.col("item_id").is_not_null())
    repeated = frame.filter(~pl.col("item_id").is_first_distinct())[LINE]
    message = "further rows of one item, only the first kept"
    checks.add("warning", "duplicate_item", message, len(repeated), file=file, lines=repeated.head(LINES_SHOWN))
    frame = frame.filter(pl.col("item_id").is_first_distinct())
    _note_missing(frame, checks, file)
    checks.facts["item_columns"] = {name: _origin(name, mapping) for name in frame.columns if name != LINE}
    checks.facts["item_columns_left_out"] = [f"{name} ({why})" for name, why in left_out.items()]
    return frame.drop(LINE)


def _origin(name: str, mapping: Mapping[str, str]) -> str:
    return mapping.get(name, name)


def _texts(
    table: Table, mapping: Mapping[str, str], raw: pl.DataFrame, checks: Checks
) -> tuple[dict[str, pl.Series], dict[str, str]]:
    """The text columns by our names, and the file's columns that are no text with the reason."""
    ours = [(role, column) for role, column in mapping.items() if role != "item_id"]
    named = [column for column in table.columns if column not in mapping.values()]
    places = {column: place for place, column in enumerate(table.columns)}
    texts: dict[str, pl.Series] = {}
    left_out: dict[str, str] = {}
    empty = 0
    for name, column in sorted([*ours, *zip(named, named, strict=True)], key=lambda pair: places[pair[1]]):
        if column in named and name in mapping:
            left_out[column] = f"'{mapping[name]}' was given for it"
            continue
        text = as_text(raw[column].alias(name))
        why = "no text" if text is None else _no_text(text) if column in named else ""
        if text is None or why:
            left_out[column] = why
            continue
        empty += len(text.filter(text.is_in(PLACEHOLDERS)))
        if name in GENRE_LIKE:
            text = _listed(text, table.types.get(column, ""))
        texts[name] = text.to_frame().select(pl.col(name).replace(dict.fromkeys(PLACEHOLDERS))).to_series()
    checks.add(
        "info", "placeholder", f"texts such as '{PLACEHOLDERS[0]}' taken as missing", empty, file=table.path.name
    )
    return texts, left_out


def _no_text(text: pl.Series) -> str:
    """Why a column is left out; empty for one that stays."""
    values = text.drop_nulls()
    if values.is_empty():
        return "empty"
    if text.name.endswith(("_id", "Id", "ID")):
        return "an id of elsewhere"
    if _fitting(values, r"^https?://") > MOSTLY:
        return "addresses"
    if _fitting(values, DATE) > MOSTLY:
        return "dates"
    return ""


def _fitting(values: pl.Series, pattern: str) -> float:
    return len(values.filter(values.str.contains(pattern))) / len(values)


def _listed(text: pl.Series, kind: str) -> pl.Series:
    if kind == "token_seq" and not text.str.contains(r"[,|]").any():
        return text.str.replace_all(" ", ", ", literal=True)
    return text.str.replace_all(r"\s*\|\s*", ", ")


def _with_year(title: pl.Series, year: pl.Series) -> tuple[pl.Series, pl.Series]:
    """Put the year back behind the title; RecBole cut off the last brackets, be it a year or a mark as in `(V)`.

    Returns:
        The titles, and the years that are in none.
    """
    known = pl.col("title").str.ends_with(pl.concat_str(pl.lit("("), "release_year", pl.lit(")")))
    dated = pl.col("title").str.contains(r"\(\d{4}\)$") & pl.col("release_year").str.contains(r"^\d")
    add = pl.col("release_year").str.contains(r"^(\d{4}|[A-Z]{1,2})$") & ~known & ~dated
    joined = pl.concat_str("title", pl.lit(" ("), "release_year", pl.lit(")"))
    inside = pl.col("title").is_not_null() & (add | known | dated)
    said = pl.col("release_year").str.contains(YEAR) & ~pl.col("release_year").str.contains(DATE)
    frame = pl.DataFrame([title, year]).select(
        pl.when(add).then(joined).otherwise("title").alias("title"), pl.when(~inside & said).then("release_year")
    )
    return frame["title"], frame["release_year"]


def _note_missing(frame: pl.DataFrame, checks: Checks, file: str) -> None:
    lines = frame.filter(pl.col("title").is_null())[LINE]
    way_out = "; name its column (--item-column title=COLUMN, or item_columns under [data])" * (
        len(lines) == len(frame)
    )
    message = f"items without title{way_out}"
    checks.add("warning", "missing_title", message, len(lines), file=file, lines=lines.head(5))
    texts = [name for name in frame.columns if name not in {LINE, "item_id"}]
    lines = frame.filter(pl.all_horizontal(pl.col(texts).is_null()))[LINE]
    checks.add("warning", "missing_text", "items without any text", len(lines), file=file, lines=lines.head(5))

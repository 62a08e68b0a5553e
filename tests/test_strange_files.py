"""Files as they come: mixed encodings, open quotes, ids as floats, zones of half an hour; told, not guessed."""

from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from uuid import UUID

import numpy as np
import polars as pl
import pytest

from recllm.data import read_dataset, read_interactions, read_items
from recllm.data.texts import as_id_lists, as_ids, identifier
from recllm.errors import RecllmError

LOG = "user_id,item_id\na,1\na,2\nb,3\n"


def written(folder, name, text):
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder / name


def findings(folder):
    return {finding.code: finding for finding in read_dataset(str(folder)).report.findings}


@pytest.mark.parametrize(("name", "severity"), [("items.csv", "warning"), ("films.item", "info")])
def test_a_line_that_is_not_utf8_does_not_spoil_those_that_are(name, severity, tmp_path):
    written(tmp_path, "interactions.csv", LOG)
    sign = b"," if name == "items.csv" else b"\t"
    lines = [b"item_id,title", b"1,Am\xc3\xa9lie", b"2,Schindler\x92s List", b"3,cut \xe9\x81"]
    written(tmp_path, name, b"\r\n".join(lines).replace(b",", sign))
    titles = read_dataset(str(tmp_path)).catalog.frame.rows()
    assert titles == [("1", "Amélie"), ("2", "Schindler’s List"), ("3", "cut é\x81")]
    finding = findings(tmp_path)["not_utf8"]
    assert (finding.severity, finding.count, finding.lines, finding.file) == (severity, 2, (3, 4), name)
    written(tmp_path, name, b"\n".join(lines[:2]).replace(b",", sign))
    assert "not_utf8" not in findings(tmp_path)


def test_utf_16_is_refused_by_its_name(tmp_path):
    path = written(tmp_path, "log.csv", LOG.encode("utf-16"))
    with pytest.raises(RecllmError, match=r"log.csv is UTF-16. Write it as UTF-8"):
        read_interactions(path)


def test_json_lines_may_begin_with_the_mark_of_utf8(tmp_path):
    path = written(tmp_path, "log.jsonl", '\ufeff{"user_id": "a", "item_id": "1"}\n{"user_id": "b", "item_id": "2"}\n')
    assert read_interactions(path).frame["user_id"].to_list() == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "log.csv",
            'user_id,item_id\na,1\na,"Foo\nb,2\n',
            r"line 3 is not CSV .*a quote opens and closes a whole field",
        ),
        ("log.tsv", 'user_id\titem_id\na\t1\nb\t"Al" Yankovic\n', r"line 3 is not CSV .*is doubled inside one"),
        (
            "log.jsonl",
            '{"user_id": "a", "item_id": 1}\n{"user_id": "b", "item_id": NaN}\n',
            r"line 2 is not JSON \(NaN",
        ),
        (
            "log.jsonl",
            b'{"user_id": "a", "item_id": "\xef\xbf\xbd"}\n{"user_id": "\xe9", "item_id": "1"}\n',
            "line 2 is not UTF-8",
        ),
    ],
)
def test_what_cannot_be_read_is_told_with_its_line(name, text, message, tmp_path):
    with pytest.raises(RecllmError, match=message):
        read_interactions(written(tmp_path, name, text))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("interactions.csv", "user_id,item_id,rating,note\nu,1,5,fine\nu,hello, world,2,4\n", "line 3 has 5 fields"),
        ("interactions.tsv", "user_id\titem_id\tnote\nu\t1\tfine\nu\t2\tso\tso\n", "line 3 .*with tabs needs quotes"),
        ("interactions.csv", "user_id,item_id,note\nu,1,fine,\n", "line 2 has 4 fields, .*beyond it are empty: give"),
        ("log.inter", "user_id:token\titem_id:token\tnote:token\nu\t1\ta\tb\n", r"line 2 .*'\\t' parts the fields"),
        ("u.data", "u\t1\t5\t100\nu\thello\tworld\t2\t200\n", "line 2 has 5 fields, the header has 4"),
        ("ratings.dat", "u::1::5::100\nu::1::5::100::7\n", "line 2 has 5 fields, the header has 4"),
    ],
)
def test_a_line_with_too_many_fields_is_not_read_shifted(name, text, message, tmp_path):
    written(tmp_path, name, text)
    with pytest.raises(RecllmError, match=f"{name} cannot be read: {message}"):
        read_dataset(str(tmp_path))


def test_lines_are_right_behind_blank_ones_and_texts_of_several(tmp_path):
    written(tmp_path, "interactions.csv", LOG)
    written(tmp_path, "items.csv", 'item_id,title\n\n1,"one\ntwo"\n2,Two\n2,Again\n3,Three\n')
    (finding,) = (own for own in read_dataset(str(tmp_path)).report.findings if "duplicate" in own.code)
    assert finding.lines == (6,)
    written(tmp_path, "interactions.csv", "\n\n" + LOG + "\n,3\n")
    assert findings(tmp_path)["missing_id"].lines == (7, 8)  # the blank line, too


def test_an_id_with_a_line_break_is_a_quote_that_was_not_closed(tmp_path):
    written(tmp_path, "interactions.csv", 'user_id,item_id\na,1\na,"3\n4,5\n6,7"\n8,9\n')
    dataset = read_dataset(str(tmp_path))
    assert dataset.interactions.frame["item_id"].to_list() == ["1", "9"]
    finding = findings(tmp_path)["strange_id"]
    assert (finding.count, finding.lines) == (1, (3,))


def test_an_id_that_is_a_list_is_dropped_and_told(tmp_path):
    rows = [
        '{"user_id": "a", "item_id": "1"}',
        '{"user_id": "a", "item_id": ["b"]}',
        '{"user_id": "[x]", "item_id": "2"}',
        '{"user_id": "a", "item_id": [3, 4]}',
    ]
    written(tmp_path, "interactions.jsonl", "\n".join(rows))
    assert read_dataset(str(tmp_path)).interactions.frame["item_id"].to_list() == ["1", "2"]
    finding = findings(tmp_path)["strange_id"]
    assert (finding.count, finding.lines) == (2, (2, 4))


@pytest.mark.parametrize(
    ("values", "kind", "texts"),
    [
        ([1.0, -1.0, 1.5, 1.5e16, float("nan"), None], pl.Float64, ["1", "-1", "1.5", "15000000000000000", None, None]),
        ([Decimal("17.00"), Decimal("-3.00"), Decimal("17.50")], pl.Decimal(10, 2), ["17", "-3", "17.50"]),
        (["17.00", " x ", ""], pl.String, ["17.00", "x", None]),
    ],
)
def test_an_id_is_one_text_wherever_it_stands(values, kind, texts):
    assert as_ids(pl.Series("id", values, dtype=kind)).to_list() == texts
    assert as_id_lists(pl.Series("ids", [values], dtype=pl.List(kind))).to_list() == [texts]
    whole = [(value, text) for value, text in zip(values, texts, strict=True) if text and "." not in text]
    assert [identifier(value) for value, _ in whole] == [text for _, text in whole]


@pytest.mark.parametrize(("kind", "most"), [(pl.Float64, 2**53), (pl.Float32, 2**24)])
def test_floats_that_tell_ids_no_longer_apart_are_warned_of(kind, most, tmp_path):
    users = pl.Series("user_id", [most, most + 2, None], dtype=kind, strict=False)
    frame = pl.DataFrame({"user_id": users, "item_id": ["1", "2", "3"]})
    frame.write_parquet(tmp_path / "interactions.parquet")
    assert findings(tmp_path)["large_float_id"].count == 1
    frame.with_columns(pl.col("user_id").cast(pl.Int64)).write_parquet(tmp_path / "interactions.parquet")
    assert "large_float_id" not in findings(tmp_path)


def test_an_order_of_decimals_is_one(tmp_path):
    places = [Decimal("1.9"), Decimal("1.7"), Decimal("1.5")]
    frame = pl.DataFrame({"user_id": ["a"] * 3, "item_id": ["3", "2", "1"], "seq": places})
    frame.write_parquet(tmp_path / "log.parquet")
    assert read_interactions(tmp_path / "log.parquet").frame["item_id"].to_list() == ["1", "2", "3"]
    large = pl.Series("seq", [2**60 + 2, 2**60 + 1, 2**60]).cast(pl.Decimal(38, 0))
    frame.with_columns(large).write_parquet(tmp_path / "log.parquet")
    assert read_interactions(tmp_path / "log.parquet").frame["item_id"].to_list() == ["1", "2", "3"]


def test_lines_that_end_in_carriage_returns_alone_are_lines_where_they_are_not_utf8(tmp_path):
    path = written(tmp_path, "items.csv", b"item_id,title\r1,Caf\xe9\r2,Two\r")
    assert read_items(path).frame.rows() == [("1", "Café"), ("2", "Two")]


@pytest.mark.parametrize("kind", [pl.Int64, pl.String])
def test_an_order_of_large_whole_numbers_has_no_ties(kind, tmp_path):
    places = [2**60 + 1, 2**60, None]
    frame = pl.DataFrame({"user_id": ["a"] * 3, "item_id": ["late", "early", "last"], "seq": pl.Series(places)})
    frame.with_columns(pl.col("seq").cast(kind)).write_parquet(tmp_path / "log.parquet")
    assert read_interactions(tmp_path / "log.parquet").frame["item_id"].to_list() == ["early", "late", "last"]


def test_an_order_with_fractions_is_one(tmp_path):
    path = written(tmp_path, "log.csv", "user_id,item_id,seq\na,late,1.5\na,early,1.25\n")
    assert read_interactions(path).frame["item_id"].to_list() == ["early", "late"]


@pytest.mark.parametrize("minutes", [-210, 330, 120])
def test_times_of_any_zone_are_those_of_utc(minutes, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    zone = timezone(timedelta(minutes=minutes))
    at = datetime(2020, 9, 13, 12, 26, 40, tzinfo=UTC)
    name = at.astimezone(zone).strftime("%z")
    kind = pyarrow.timestamp("us", f"{name[:3]}:{name[3:]}")
    table = pyarrow.table({"user_id": ["a"], "item_id": ["1"], "timestamp": pyarrow.array([at], kind)})
    parquet.write_table(table, tmp_path / "log.parquet")
    assert read_interactions(tmp_path / "log.parquet").frame["timestamp"].to_list() == [1_600_000_000]


def test_a_new_item_without_text_has_none(tmp_path):
    path = written(tmp_path, "items.csv", "item_id,title,genres\n1,One,x\n")
    nothing = float("nan")
    more = read_items(path).with_items([{"item_id": 2.0, "title": nothing, "genres": nothing}])
    assert more.frame.rows()[-1] == ("2", None, None)
    for wrong in (True, [1], {"id": 1}, b"ab", float("inf"), {1}):
        with pytest.raises(RecllmError, match=r"item_id: .* is no id"):
            read_items(path).with_items([{"item_id": wrong, "title": "Two"}])
    with pytest.raises(RecllmError, match="needs 'item_id'"):
        read_items(path).with_items([{"item_id": nothing, "title": "Two"}])
    named = UUID(int=7)
    ids = [np.int64(5), np.float32(17), 2.5, named]
    more = read_items(path).with_items([{"item_id": item, "title": np.array(["a"])} for item in ids])
    assert more.ids[1:] == ("5", "17", "2.5", str(named))
    with pytest.raises(RecllmError, match="has half of a character"):
        read_items(path).with_items([{"item_id": "a\ud800"}])
    with pytest.raises(RecllmError, match="needs 'item_id'"):
        read_items(path).with_items([{"item_id": Decimal("NaN")}])


def test_a_bar_may_part_columns_a_header_may_name_one_twice_and_an_id_has_one_line(tmp_path):
    (tmp_path / "interactions.csv").write_text(
        "user_id|item_id|user_id|timestamp\nu|a|x|1600000000\nu|b|x|1600000001\n", encoding="utf-8"
    )
    (tmp_path / "items.csv").write_text('item_id|title\na|A\n"b\nc"|B\nb|B2\n', encoding="utf-8")
    found = read_dataset(str(tmp_path))
    assert found.interactions.frame.select("user_id", "item_id").rows() == [("u", "a"), ("u", "b")]
    assert found.catalog.ids == ("a", "b")
    told = [finding.text() for finding in found.report.findings]
    twice = "warning: the header has 'user_id' more than once, and the first is read: 1 (interactions.csv, line 1)"
    assert twice in told
    assert "warning: items whose id has a line break (is a quote not closed?), dropped: 1 (items.csv, line 3)" in told

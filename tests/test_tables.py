"""Tables of files: what parts their columns, texts that are kept once, and how much memory they would take."""

import csv

import polars as pl
import pytest

from recllm.data import read_interactions, read_items
from recllm.data.tables import LINE, open_table
from recllm.errors import RecllmError


@pytest.mark.parametrize("sign", [";", "\t"])
def test_commas_part_a_csv_whose_header_has_another_sign_in_a_name(tmp_path, sign):
    file = tmp_path / "log.csv"
    file.write_text(f"user_id,item_id,seen{sign}heard\na,x,1\n", encoding="utf-8")
    table = open_table(file)
    assert table.columns == ["user_id", "item_id", f"seen{sign}heard"]
    assert table.read(["item_id"])["item_id"].to_list() == ["x"]


@pytest.mark.parametrize("kind", [pl.Categorical(), pl.Enum(["b", "5", "a", "x", "4"])], ids=["categorical", "enum"])
def test_texts_that_a_parquet_file_keeps_once_are_texts(tmp_path, kind):
    file = tmp_path / "log.parquet"
    frame = pl.DataFrame({"user_id": ["a", "b"], "item_id": ["x", "x"], "rating": ["4", "5"]})
    frame.select(pl.all().cast(kind)).write_parquet(file)
    assert open_table(file).read(frame.columns).drop(LINE).equals(frame)
    assert read_interactions(file).frame["rating"].to_list() == [4.0, 5.0]


def test_long_texts_count_in_what_a_parquet_file_would_take(tmp_path):
    pytest.importorskip("pyarrow.parquet", reason="it knows how much the texts of a file take")
    file = tmp_path / "items.parquet"
    texts = [f"{item} {'word ' * 2000}" for item in range(100)]  # 1 MB in some kB of file
    pl.DataFrame({"item_id": range(100), "story": texts}).write_parquet(file)
    assert file.stat().st_size < 100_000
    assert open_table(file, budget=2_000_000).columns == ["item_id", "story"]
    with pytest.raises(RecllmError, match=r"would take about .* GiB in memory"):
        open_table(file, budget=500_000)


def test_a_file_without_a_header_may_begin_with_the_mark_of_utf8(tmp_path):
    (tmp_path / "ratings.dat").write_bytes(b"\xef\xbb\xbf1::2::5::100\n")
    assert read_interactions(tmp_path / "ratings.dat").frame["user_id"].to_list() == ["1"]


def test_a_header_that_is_not_utf8_does_not_begin_with_the_mark_of_it(tmp_path):
    (tmp_path / "log.csv").write_bytes(b"\xef\xbb\xbfuser_id,item_id,caf\xe9\na,x,1\n")
    table = open_table(tmp_path / "log.csv")
    assert (table.columns, table.not_utf8) == (["user_id", "item_id", "café"], (1,))


@pytest.mark.parametrize("order", ["le", "be"])
def test_utf_16_is_refused_in_both_orders_of_bytes(tmp_path, order):
    (tmp_path / "log.csv").write_bytes("\ufeffuser_id,item_id\na,x\n".encode(f"utf-16-{order}"))
    with pytest.raises(RecllmError, match=r"log.csv is UTF-16. Write it as UTF-8"):
        open_table(tmp_path / "log.csv")


def test_every_byte_that_windows_1252_has_no_letter_for_is_read(tmp_path):
    bare = [0x81, 0x8D, 0x8F, 0x90, 0x9D]
    lines = [b"item_id,title", *(b"%d,\xe9%c" % (place, byte) for place, byte in enumerate(bare)), b"9,\x80"]
    (tmp_path / "items.csv").write_bytes(b"\n".join(lines))
    titles = open_table(tmp_path / "items.csv").read(["title"])["title"].to_list()
    assert titles == [*(f"é{chr(byte)}" for byte in bare), "€"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('a,"two\nlines"\nb,c,d\n', r"line 4 has 3 fields, the header has 2; a text with commas needs quotes"),
        ('a\n"b","c",d\n', r"line 3 has 3 fields"),  # a short row is none: its other fields are empty
        ('a,"two\nlines"\nb,"c" d\n', r"line 4 is not CSV"),
    ],
)
def test_a_bad_row_is_named_by_the_line_on_which_it_begins(tmp_path, text, words):
    (tmp_path / "items.csv").write_text("item_id,title\n" + text, encoding="utf-8")
    with pytest.raises(RecllmError, match=rf"items\.csv cannot be read: {words}"):
        open_table(tmp_path / "items.csv").read(["item_id", "title"])


@pytest.mark.parametrize("line", ["[1, 2]", "5", "null"])
def test_a_line_of_json_that_is_no_object_is_named_and_blank_ones_are_none(tmp_path, line):
    text = f'{{"user_id": "a", "item_id": "1"}}\n\n{line}\n'
    (tmp_path / "log.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(RecllmError, match=r"log\.jsonl cannot be read: line 3 is not a JSON object"):
        read_interactions(tmp_path / "log.jsonl")


@pytest.mark.parametrize(
    ("text", "lines"), [('a,"one\ntwo"\nb,x\n', [2, 4]), ('a,x\nb,"one\ntwo\nthree"\nc,x', [2, 3, 6])]
)
def test_a_row_behind_a_text_of_several_lines_has_the_line_on_which_it_begins(tmp_path, text, lines):
    (tmp_path / "items.csv").write_text("item_id,title\n" + text, encoding="utf-8")
    assert open_table(tmp_path / "items.csv").read(["item_id"])[LINE].to_list() == lines


def test_a_text_of_several_lines_and_a_blank_one_are_read_in_one_file(tmp_path):
    (tmp_path / "items.csv").write_text('item_id,title\n\na,"one\ntwo"\nb,x\n', encoding="utf-8")
    rows = open_table(tmp_path / "items.csv").read(["item_id", "title"]).drop_nulls("item_id")
    assert rows.select("item_id", "title").rows() == [("a", "one\ntwo"), ("b", "x")]


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("movies.dat", ["item_id", "title", "genres"]),
        ("items.dat", ["item_id", "title", "genres"]),
        ("ratings.dat", ["user_id", "item_id", "rating", "timestamp"]),
    ],
)
def test_the_name_of_a_dat_file_says_what_its_columns_are(tmp_path, name, columns):
    (tmp_path / name).write_text("::".join("1234"[: len(columns)]) + "\n", encoding="utf-8")
    assert open_table(tmp_path / name).columns == columns


@pytest.mark.parametrize("sign", ["\t", ","])
def test_rows_that_an_open_quote_has_swallowed_are_told(tmp_path, sign):
    rows = ["user_id\titem_id\tquery\ttimestamp", 'u\ta\t"foo\t1577836800', "u\tb\tbar\t1577836801"]
    rows += ['u\tc\tbaz"\t1577836802', "u\td\tz\t1577836803"]
    path, said = tmp_path / ("log.tsv" if sign == "\t" else "log.csv"), []
    path.write_text("\n".join(rows).replace("\t", sign), encoding="utf-8")
    assert len(read_interactions(path, say=said.append)) == 2
    assert any("hold what look like whole rows" in line and f"1 ({path.name}, line 2)" in line for line in said)


def test_a_text_of_several_lines_is_no_row(tmp_path):
    path, said = tmp_path / "items.csv", []
    path.write_text('item_id,title,story\na,A,"Long, and\nlonger, and sad\n"\nb,B,short\n', encoding="utf-8")
    assert len(read_items(path, say=said.append)) == 2
    assert not said


def test_texts_may_be_longer_than_the_csv_module_reads_by_itself(tmp_path):
    path = tmp_path / "items.csv"
    before, long = csv.field_size_limit(), "word " * 40_000
    path.write_text(f'item_id,title,story\na,A,"{long}\nend"\nb,,\n', encoding="utf-8")
    said = []
    assert len(read_items(path, say=said.append)) == 2
    assert any("items without title: 1 (items.csv, line 4)" in line for line in said)
    path.write_text(f'item_id,title,story\na,A,"{long}\nend"\nb,B,x,y\n', encoding="utf-8")
    with pytest.raises(RecllmError, match="line 4 has 4 fields"):
        read_items(path)
    assert csv.field_size_limit() == before


def test_a_quote_inside_a_field_is_named(tmp_path):
    path = tmp_path / "items.csv"
    path.write_text(
        'item_id,title,colour\n0,"A ""good"" 22""",y\n2,"one, and\nlong",red\n1,TV 55" für,x\n', encoding="utf-8"
    )
    with pytest.raises(RecllmError, match=r'line 5 has a quote inside a field, TV 55" für; .* doubled, "TV 55"" für"'):
        read_items(path)


@pytest.mark.parametrize("end", ["", "\n"])
def test_lines_are_those_of_the_file_with_and_without_its_last_end(tmp_path, end):
    path, said = tmp_path / "log.csv", []
    path.write_text(f'user_id,item_id,rating,text\nu,a,5,"x\ny"\nu,b,zz,k{end}', encoding="utf-8")
    read_interactions(path, say=said.append)
    assert any("taken as missing: 1 (log.csv, line 4)" in line for line in said)


def test_a_column_may_have_any_name(tmp_path):
    for path in (tmp_path / "log.csv", tmp_path / "log.parquet", tmp_path / "log.jsonl"):
        frame = pl.DataFrame({"user_id": ["u"], "item_id": ["a"], "_line": ["1"]})
        {"csv": frame.write_csv, "parquet": frame.write_parquet, "jsonl": frame.write_ndjson}[path.suffix[1:]](path)
        assert open_table(path).columns == ["user_id", "item_id", "_line"]
        assert len(read_interactions(path)) == 1


def test_utf_16_without_a_mark_is_refused(tmp_path):
    path = tmp_path / "log.csv"
    path.write_bytes("user_id,item_id\nu,a\n".encode("utf-16-le"))
    with pytest.raises(RecllmError, match=r"log.csv has bytes of 0 between its letters, as UTF-16 has"):
        read_interactions(path)


def test_a_byte_of_nought_in_a_note_is_no_utf_16(tmp_path):
    path = tmp_path / "log.csv"
    path.write_bytes(b"user_id,item_id,note\nu,a,x\0y\nu,b,z\n")
    assert len(read_interactions(path)) == 2

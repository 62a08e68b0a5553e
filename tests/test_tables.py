"""Tables of files: what parts their columns, texts that are kept once, and how much memory they would take."""

import polars as pl
import pytest

from recllm.data import read_interactions
from recllm.data.tables import open_table
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
    assert open_table(file).read(frame.columns).drop("_line").equals(frame)
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
    assert open_table(tmp_path / "items.csv").read(["item_id"])["_line"].to_list() == lines


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

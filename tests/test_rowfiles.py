"""Files of rows: nothing that one row has wrong reaches the next one."""

import polars as pl
import pytest

from recllm.errors import RecllmError
from recllm.rowfiles import FIELD, SPAN, columns_of, count_rows, raw_rows

WANTED = ("user_id", "history")


def rows_of(path):
    return [(line, row if isinstance(row, dict) else row.reason) for line, row in raw_rows(path, WANTED)]


def write(path, *lines):
    path.write_text("user_id,history,note\n" + "".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


@pytest.mark.parametrize("users", [4, 3 * SPAN])
@pytest.mark.parametrize("stray", ['u1,"0 2,x', '"u1,0 2,x', 'u1,0 2,"x'])
def test_a_quote_that_nothing_closes_loses_its_own_line_only(users, stray, tmp_path):
    lines = [f"u{user},0 2,x" for user in range(users)]
    path = write(tmp_path / "rows.csv", *lines[:1], stray, *lines[2:])
    found = rows_of(path)
    assert [line for line, _ in found] == list(range(2, users + 2))
    bad = [row for _, row in found if not isinstance(row, dict)]
    assert len(bad) == 1
    assert bad[0].startswith("not CSV (")
    assert [row["user_id"] for _, row in found if isinstance(row, dict)] == [f"u{n}" for n in range(users) if n != 1]


def test_two_stray_quotes_do_not_make_one_row_of_what_stands_between(tmp_path):
    path = write(tmp_path / "rows.csv", 'u0,"0 2,x', "u1,4,x", 'u2,"6 8,x', 'u3,"1 3",x')
    found = rows_of(path)
    assert [line for line, _ in found] == [2, 3, 4, 5]
    assert [isinstance(row, dict) for _, row in found] == [False, True, False, True]
    path = write(tmp_path / "rows.csv", 'u0,"0 2,x', "u1,4,x", 'u2,6 8",x', "u3,1,x")
    assert [isinstance(row, dict) for _, row in rows_of(path)] == [False, True, True, True]


def test_a_line_break_in_a_note_is_part_of_the_note(tmp_path):
    path = write(tmp_path / "rows.csv", 'u0,0 2,"one\ntwo ""three"""', "u1,4,x")
    assert rows_of(path) == [
        (2, {"user_id": "u0", "history": "0 2", "note": 'one\ntwo "three"'}),
        (4, {"user_id": "u1", "history": "4", "note": "x"}),
    ]


def test_a_long_history_fits_into_a_field(tmp_path):
    long = " ".join(["1234567"] * 50_000)
    path = write(tmp_path / "rows.csv", f"u0,{long},x")
    assert len(long) < FIELD
    assert rows_of(path)[0][1]["history"] == long


@pytest.mark.parametrize("sign", [";", "\t"])
def test_semicolons_or_tabs_part_the_columns_of_a_csv_file_that_has_no_commas(sign, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text(f"user_id{sign}history\nu0{sign}0 2\n", encoding="utf-8")
    assert columns_of(path) == ["user_id", "history"]
    assert rows_of(path) == [(2, {"user_id": "u0", "history": "0 2"})]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_letters_of_another_encoding_are_a_reason_and_no_other_letter(suffix, tmp_path):
    path = tmp_path / f"rows{suffix}"
    if suffix == ".csv":
        path.write_bytes(b"user_id,history\nJos\xe9,0 2\nJos\xe8,4 6\nu,1\n")
    else:
        path.write_bytes(b'{"user_id": "Jos\xe9"}\n{"user_id": "Jos\xe8"}\n{"user_id": "u"}\n')
    found = [row for _, row in raw_rows(path, WANTED)]
    assert [row.reason for row in found[:2]] == ["not UTF-8; write the file as UTF-8"] * 2
    assert "Jos\ufffd" in found[0].text
    assert found[2]["user_id"] == "u"
    path.write_bytes(b"us\xe9r,history\nu,1\n")
    if suffix == ".csv":
        with pytest.raises(RecllmError, match=r"the header is not UTF-8"):
            list(raw_rows(path, WANTED))


def test_what_is_damaged_inside_a_parquet_file_is_one_message(tmp_path):
    path = tmp_path / "rows.parquet"
    pl.DataFrame({"user_id": [f"u{n}" for n in range(20_000)]}).write_parquet(path, compression="uncompressed")
    data = bytearray(path.read_bytes())
    data[4:40] = b"\xff" * 36
    path.write_bytes(data)
    assert columns_of(path) == ["user_id"]
    with pytest.raises(RecllmError, match=r"is not a Parquet file that can be read"):
        list(raw_rows(path, WANTED))


def test_a_column_that_polars_panics_at_is_one_message(tmp_path, monkeypatch):
    path = tmp_path / "in.parquet"
    pl.DataFrame({"user_id": ["a"]}).write_parquet(path)

    def panic(*_, **__):
        raise pl.exceptions.PanicException("not implemented: list view")

    monkeypatch.setattr(pl, "scan_parquet", panic)
    with pytest.raises(RecllmError, match=r"not a Parquet file that can be read: not implemented: list view"):
        columns_of(path)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".ndjson"])
def test_a_header_is_no_row_and_files_without_one_have_none(suffix, tmp_path):
    path = tmp_path / f"rows{suffix}"
    headed = suffix in (".csv", ".tsv")
    path.write_text("user_id\nu0\nu1\n" if headed else '{"user_id": "u0"}\n{"user_id": "u1"}\n', encoding="utf-8")
    assert count_rows(path) == 2
    path.write_bytes(path.read_bytes()[:-1])  # the last line may lack its end
    assert count_rows(path) == 2
    assert [row["user_id"] for _, row in rows_of(path)] == ["u0", "u1"]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_blank_lines_are_no_rows_and_count_as_lines(suffix, tmp_path):
    path = tmp_path / f"rows{suffix}"
    first, second = ('{"user_id": "u0"}', '{"user_id": "u1"}') if suffix == ".jsonl" else ("user_id\nu0", "u1")
    path.write_text(f"{first}\n\n\n{second}\n\n", encoding="utf-8")
    begins = 1 if suffix == ".jsonl" else 2
    assert rows_of(path) == [(begins, {"user_id": "u0"}), (begins + 3, {"user_id": "u1"})]


def test_a_line_of_blanks_is_blank(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(' \t\n{"user_id": "u0"}\n  \r\n', encoding="utf-8")
    assert rows_of(path) == [(2, {"user_id": "u0"})]


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ('"user_id,history\n' + "a,1 2\n" * 40_000, r"the header is not CSV \(unexpected end of data\)"),
        ("user_id,history,größe\na,1,2\n", "the header is not UTF-8; write the file as UTF-8"),
    ],
    ids=["quote", "latin-1"],
)
def test_a_header_that_cannot_be_read_says_why(raw, reason, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(raw.encode("latin-1"))
    with pytest.raises(RecllmError, match=reason):
        columns_of(path)

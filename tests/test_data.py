import json
import os
from pathlib import Path

import polars as pl
import pytest

from recllm.data import Catalog, Interactions, Query, read_dataset, read_interactions, read_items
from recllm.data.tables import open_table
from recllm.errors import RecllmError
from recllm.fetch import fetch

LOG = "user_id,item_id,rating,timestamp\na,x,5,100\na,y,3,200\nb,x,4,150\n"


def write(folder, **files):
    """Files by name, a dot in it written as two underscores."""
    for name, text in files.items():
        path = folder / name.replace("__", ".")
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(folder)


def events(dataset):
    return dataset.interactions.frame.select("user_id", "item_id", "rating", "timestamp").rows()


WANTED = [("a", "x", 5.0, 100), ("a", "y", 3.0, 200), ("b", "x", 4.0, 150)]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("interactions.csv", LOG),
        ("interactions.csv", "\ufeff" + LOG.replace("\n", "\r\n")),
        ("interactions.tsv", LOG.replace(",", "\t")),
        ("ratings.csv", LOG.replace("user_id,item_id,rating,timestamp", "userId,movieId,rating,timestamp")),
        ("ratings.csv", LOG.replace("user_id,item_id,rating,timestamp", "customer_id,product_id,stars,ts")),
        (
            "x.inter",
            LOG.replace("user_id,item_id,rating,timestamp", "uid:token,iid:token,score:float,time:float").replace(
                ",", "\t"
            ),
        ),
        ("ratings.dat", LOG.split("\n", 1)[1].replace(",", "::")),
        ("u.data", LOG.split("\n", 1)[1].replace(",", "\t")),
        (
            "interactions.jsonl",
            "".join(
                json.dumps({"reviewerID": user, "asin": item, "overall": rating, "unixReviewTime": at}) + "\n"
                for user, item, rating, at in WANTED
            ),
        ),
    ],
)
def test_every_format_gives_one_table(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    dataset = read_dataset(str(tmp_path))
    assert events(dataset) == WANTED
    assert dataset.interactions.frame.schema == {
        "user_id": pl.String,
        "item_id": pl.String,
        "rating": pl.Float32,
        "timestamp": pl.Int64,
        "seq": pl.Int32,
    }


def test_parquet_with_numbers_as_ids(tmp_path):
    pl.DataFrame({"user": [1.0, 2.0, None], "item": [7, 8, 9]}).write_parquet(tmp_path / "interactions.parquet")
    dataset = read_dataset(str(tmp_path))
    assert events(dataset) == [("1", "7", None, None), ("2", "8", None, None)]
    assert dataset.report.count("missing_id") == 1


def test_a_file_alone_and_files_given(tmp_path):
    write(tmp_path, log__csv=LOG, texts__csv="id,name\nx,Ex\ny,Why\n")
    alone = read_dataset(str(tmp_path / "log.csv"))
    assert (alone.name, alone.catalog.ids) == ("log", ("x", "y"))
    given = read_dataset("", interactions=str(tmp_path / "log.csv"), items="texts.csv")
    assert given.catalog.record("y") == {"item_id": "y", "title": "Why"}
    assert given.interactions.fingerprint() == alone.interactions.fingerprint()


def test_a_file_is_the_one_in_the_datas_folder_and_never_one_of_two(tmp_path, monkeypatch):
    logs, here = tmp_path / "logs", tmp_path / "here"
    logs.mkdir()
    here.mkdir()
    write(logs, orders__csv=LOG)
    monkeypatch.chdir(here)
    own = read_dataset(str(logs), interactions="orders.csv")
    write(here, orders__csv=LOG.replace("a,", "WRONG,"))
    with pytest.raises(
        RecllmError, match=r"There is a 'orders\.csv' in '.*logs', and another one in the working folder"
    ):
        read_dataset(str(logs), interactions="orders.csv")
    again = read_dataset(str(logs), interactions=str(logs / "orders.csv"))
    assert again.interactions.fingerprint() == own.interactions.fingerprint()
    monkeypatch.chdir(logs)  # one and the same file
    assert (
        read_dataset(str(logs), interactions="orders.csv").interactions.fingerprint() == own.interactions.fingerprint()
    )


def test_columns_given_stand_above_guesses(tmp_path):
    folder = write(tmp_path, interactions__csv="user,who,item_id\na,b,x\n")
    assert events(read_dataset(folder))[0][0] == "a"
    dataset = read_dataset(folder, columns={"user_id": "who"})
    assert events(dataset)[0][0] == "b"
    assert dataset.report.facts["columns"] == {"user_id": "who", "item_id": "item_id"}


def test_column_errors_say_what_the_file_has(tmp_path):
    folder = write(tmp_path, interactions__csv="klient,item_id\na,x\n")
    with pytest.raises(RecllmError, match=r"no column for 'user_id'.*klient, item_id.*--set data.columns.user_id=NAME"):
        read_dataset(folder)
    with pytest.raises(RecllmError, match=r"no column 'client'.*Did you mean 'klient'"):
        read_dataset(folder, columns={"user_id": "client"})
    with pytest.raises(RecllmError, match=r"Unknown key in data.columns 'userid'. Did you mean 'user_id'"):
        read_dataset(folder, columns={"userid": "klient"})


def test_empty_and_broken_files(tmp_path):
    with pytest.raises(RecllmError, match="is empty"):
        read_dataset(write(tmp_path, interactions__csv=""))
    with pytest.raises(RecllmError, match="no rows"):
        read_dataset(write(tmp_path, interactions__csv="user_id,item_id\n"))
    with pytest.raises(RecllmError, match="line 3 has 3 fields, the header has 2"):
        read_dataset(write(tmp_path, interactions__csv="user_id,item_id\na,x\na,y,z\n"))
    (tmp_path / "interactions.csv").unlink()
    with pytest.raises(RecllmError, match="line 2 is not JSON"):
        read_dataset(write(tmp_path, interactions__jsonl='{"user_id":"a","item_id":"x"}\n{"user_id":\n'))
    (tmp_path / "interactions.jsonl").unlink()
    with pytest.raises(RecllmError, match="cannot be read"):
        read_dataset(write(tmp_path, interactions__parquet="no parquet"))


def test_files_that_are_missing_or_ambiguous(tmp_path):
    with pytest.raises(RecllmError, match=r"has no file of interactions.*notes.txt.*data.interactions=FILE"):
        read_dataset(write(tmp_path, notes__txt="x"))
    with pytest.raises(RecllmError, match=r"several files.*interactions.csv, interactions.tsv"):
        read_dataset(write(tmp_path, interactions__csv=LOG, interactions__tsv=LOG))
    with pytest.raises(RecllmError, match=r"There is no file 'none\.csv'\. Paths are read from the folder that a com"):
        read_dataset(str(tmp_path), interactions="none.csv")
    with pytest.raises(RecllmError, match=r"Unknown kind of file 'notes\.txt'"):
        read_dataset(str(tmp_path), interactions="notes.txt")


def test_a_file_over_the_budget_is_refused(tmp_path):
    # One value repeated: 64 MB of rows in a few kB of file.
    pl.DataFrame({"user_id": ["a"], "item_id": ["x"]}).select(pl.all().repeat_by(1_000_000).explode()).write_parquet(
        tmp_path / "interactions.parquet"
    )
    assert (tmp_path / "interactions.parquet").stat().st_size < 1_000_000
    with pytest.raises(RecllmError, match=r"would take about .* GiB in memory; the limit is 0.0466 GiB"):
        open_table(tmp_path / "interactions.parquet", budget=50_000_000)
    with pytest.raises(RecllmError, match="the limit is"):
        read_dataset(write(tmp_path, log__csv=LOG), interactions="log.csv", budget=10)


def test_rows_without_ids_are_dropped_with_their_lines(tmp_path):
    folder = write(tmp_path, interactions__csv="user_id,item_id\n a ,x\n,x\na,  \n\na,y\n")
    dataset = read_dataset(folder)
    assert events(dataset) == [("a", "x", None, None), ("a", "y", None, None)]
    (finding,) = [finding for finding in dataset.report.findings if finding.code == "missing_id"]
    assert (finding.count, finding.lines, finding.file) == (3, (3, 4, 5), "interactions.csv")
    assert any("interactions.csv, lines 3, 4, 5" in line for line in dataset.report.lines())


def test_ids_that_say_missing_in_words_are_told(tmp_path):
    folder = write(tmp_path, interactions__csv="user_id,item_id\nNULL,x\nNULL,y\na,nan\nNadine,x\n")
    dataset = read_dataset(folder)
    assert len(events(dataset)) == 4
    found = [finding for finding in dataset.report.findings if finding.code == "missing_id_in_words"]
    assert [(finding.count, finding.lines) for finding in found] == [(2, (2, 3)), (1, (4,))]
    assert "rows with the user_id 'NULL'" in found[0].message


def test_bad_times_and_ratings(tmp_path):
    rows = [
        "a,i0,5,1000000000",
        "a,i1,5,soon",
        "a,i2,5,-4",
        "a,i3,good,1000000001",
        "a,i4,5,9000000000",
        "a,i5,,1000000002",
    ]
    dataset = read_dataset(write(tmp_path, interactions__csv="user_id,item_id,rating,timestamp\n" + "\n".join(rows)))
    assert [row[1:3] for row in events(dataset)] == [("i0", 5.0), ("i3", None), ("i5", None)]
    found = {finding.code: finding.lines for finding in dataset.report.findings}
    assert found["bad_time"] == (3, 4, 6)
    assert found["bad_rating"] == (5,)


def test_nothing_usable_says_why(tmp_path):
    folder = write(tmp_path, interactions__csv="user_id,item_id,timestamp\na,x,soon\n")
    with pytest.raises(RecllmError, match=r"no usable row: .*unreadable.*line 2"):
        read_dataset(folder)


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        ("1600000000", 1600000000),
        ("1600000000.9", 1600000000),
        ("1600000000123", 1600000000),
        ("1600000000123456", 1600000000),
        ("2020-09-13T12:26:40Z", 1600000000),
        ("2020-09-13 12:26:40 UTC", 1600000000),  # BigQuery
        ("2020-09-13T12:26:40 GMT", 1600000000),
        ("2020-09-13 12:26:40.5", 1600000000),
        ("2020-09-13T14:26:40+02:00", 1600000000),
        ("2020-09-13T07:56:40-0430", 1600000000),
        ("2020-09-13 12:26:40.123456+00", 1600000000),
        ("2020-09-13 07:26:40-05", 1600000000),
        ("2020-09-13", 1599955200),
        ("2020/09/13", 1599955200),
    ],
)
def test_times_of_any_form(tmp_path, written, seconds):
    dataset = read_dataset(write(tmp_path, interactions__csv=f"user_id,item_id,date\na,x,{written}\n"))
    assert events(dataset)[0][3] == seconds
    assert dataset.report.count("time_unit") == (1 if len(written) in {13, 16} and written.isdigit() else 0)


def test_dates_in_parquet(tmp_path):
    at = pl.Series(["2020-09-13 12:26:40"]).str.to_datetime()
    pl.DataFrame({"user_id": ["a"], "item_id": ["x"], "time": at}).write_parquet(tmp_path / "interactions.parquet")
    assert events(read_dataset(str(tmp_path)))[0][3] == 1600000000


def test_milliseconds_order_events_of_one_second(tmp_path):
    folder = write(tmp_path, interactions__csv="user_id,item_id,ts\na,y,1600000000900\na,x,1600000000100\n")
    dataset = read_dataset(folder)
    assert [row[1] for row in events(dataset)] == ["x", "y"]
    assert dataset.report.facts["ties_share"] == 0.0


@pytest.mark.parametrize("unit", [10**3, 10**6, 10**9])
@pytest.mark.parametrize("most", ["later", "earlier"])
def test_each_time_tells_its_own_unit(tmp_path, unit, most):
    """A log of two sources: whichever is the larger one, the order of events is that of time."""
    times = [1_500_000_000 + 1000 * event for event in range(9)]
    far = 6 if most == "earlier" else 3
    lines = [f"a,x{event},{at * unit if event < far else at}" for event, at in enumerate(times)]
    folder = write(tmp_path, interactions__csv="user_id,item_id,ts\n" + "\n".join([*lines[::-1], "a,y,0"]) + "\n")
    dataset = read_dataset(folder)
    assert [row[1] for row in events(dataset)] == ["y", *(f"x{event}" for event in range(9))]
    assert [row[3] for row in events(dataset)][1:] == times
    assert dataset.report.count("mixed_time_units") == min(far, 9 - far)


def test_a_time_of_nought_is_no_other_unit(tmp_path):
    folder = write(tmp_path, interactions__csv="user_id,item_id,ts\na,y,1600000000900\na,x,0\n")
    assert read_dataset(folder).report.count("mixed_time_units") == 0


@pytest.mark.parametrize(
    ("column", "value", "what"),
    [
        ("item_id", ["x", "y"], "lists"),
        ("rating", [3.0], "lists"),
        ("ts", {"date": "2020-09-13"}, "structures"),
        ("user_id", b"\xff\xfe", "bytes"),
    ],
)
def test_columns_that_hold_no_single_values_are_named(tmp_path, column, value, what):
    row = {"user_id": "a", "item_id": "x", "rating": 3.0, "ts": 1600000000} | {column: value}
    pl.DataFrame([row]).write_parquet(tmp_path / "interactions.parquet")
    with pytest.raises(RecllmError, match=rf"the column '{column}' holds {what} .*one value per row is expected"):
        read_dataset(str(tmp_path))


def test_a_set_is_called_as_its_folder_and_a_file_by_itself_as_the_file(tmp_path):
    folder = write(tmp_path, interactions__csv=LOG)
    assert read_dataset(folder).name == tmp_path.name
    (tmp_path / "events.csv").write_text(LOG, encoding="utf-8")
    assert read_dataset("", interactions=str(tmp_path / "events.csv")).name == "events"
    assert read_dataset(folder, interactions="events.csv").name == tmp_path.name


@pytest.mark.parametrize(
    ("column", "kinds", "told"),
    [("event_type", "view,cart", 1), ("Action", "1,2", 1), ("event_type", "view,view", 0), ("remark", "a,b", 0)],
)
def test_kinds_of_events_that_count_alike_are_warned_of(column, kinds, told, tmp_path):
    first, second = kinds.split(",")
    folder = write(tmp_path, interactions__csv=f"customer,isbn,{column}\na,x,{first}\nb,y,{second}\n")
    report = read_dataset(folder).report
    found = [finding.text() for finding in report.findings if finding.code == "kinds_of_events"]
    assert len(found) == told
    for text in found:
        assert f"kinds of events in '{column}' ({first}, {second})".replace("view, cart", "cart, view") in text
        assert "recllm data join picks and weighs them" in text


def test_dates_that_nobody_calls_the_time_are_warned_of(tmp_path):
    """The order of the file would be taken for that of time, without a word."""
    text = "customer,isbn,when_it_was,stars\na,x,2025-03-01T10:00:00+02:00,4\nb,y,2025-02-01,3\n"
    folder = write(tmp_path, interactions__csv=text)
    report = read_dataset(folder).report
    assert (report.count("no_times"), report.count("unnamed_time")) == (2, 2)
    told = next(finding.text() for finding in report.findings if finding.code == "unnamed_time")
    assert "dates in 'when_it_was', which no name says is the time (--column timestamp=when_it_was" in told
    named = read_dataset(folder, columns={"timestamp": "when_it_was"}).report
    assert named.count("no_times") == named.count("unnamed_time") == 0


@pytest.mark.parametrize("sign", [";", "\t"])
def test_a_csv_of_other_signs_is_read(tmp_path, sign):
    text = 'user_id,item_id,rating\na,"x",3\nb,y,4\n'.replace(",", sign)
    assert [row[:3] for row in events(read_dataset(write(tmp_path, interactions__csv=text)))] == [
        ("a", "x", 3.0),
        ("b", "y", 4.0),
    ]


@pytest.mark.parametrize(("sign", "called"), [(";", "semicolons"), ("\t", "tabs")])
def test_a_broken_line_of_such_a_csv_is_the_one_that_is_named(tmp_path, sign, called):
    text = f"item_id{sign}title\n1{sign}Good, bad\n2{sign}a{sign}b\n"
    folder = write(tmp_path, interactions__csv=LOG, items__csv=text)
    with pytest.raises(RecllmError, match=rf"line 3 has 3 fields, the header has 2; a text with {called} needs quotes"):
        read_dataset(folder)


def test_categories_of_pandas_are_texts(tmp_path):
    folder = write(tmp_path, interactions__csv=LOG)
    frame = pl.DataFrame(
        {"user_id": ["a", "a"], "item_id": ["x", "y"], "rating": ["3", "4"], "time": ["1600000000"] * 2}
    )
    frame.select(pl.all().cast(pl.Categorical)).write_parquet(tmp_path / "log.parquet")
    found = read_dataset("", interactions=str(tmp_path / "log.parquet"))
    assert [row[:4] for row in events(found)] == [("a", "x", 3.0, 1600000000), ("a", "y", 4.0, 1600000000)]
    assert folder


def test_order_by_time_then_file(tmp_path):
    folder = write(tmp_path, interactions__csv="user_id,item_id,ts\nb,z,9\na,y,5\na,x,5\na,w,1\n")
    dataset = read_dataset(folder)
    assert [row[:2] for row in events(dataset)] == [("a", "w"), ("a", "y"), ("a", "x"), ("b", "z")]
    assert dataset.report.facts["ties_share"] == 0.5
    assert dataset.report.facts["order"] == "time, ties in file order"
    assert dataset.interactions.frame["seq"].to_list() == [0, 1, 2, 0]


def test_order_by_seq_and_its_quarrel_with_time(tmp_path):
    folder = write(tmp_path, interactions__csv="user_id,item_id,seq,ts\na,x,30,5\na,y,4,9\n")
    dataset = read_dataset(folder)
    assert [row[1] for row in events(dataset)] == ["y", "x"]
    assert dataset.interactions.frame["seq"].to_list() == [0, 1]
    assert dataset.report.count("order_against_time") == 1


def test_without_times_file_order_stays(tmp_path):
    folder = write(tmp_path, interactions__csv="user_id,item_id\nb,z\na,y\nb,a\n")
    dataset = read_dataset(folder)
    assert [row[:2] for row in events(dataset)] == [("b", "z"), ("b", "a"), ("a", "y")]
    assert dataset.report.facts["order"] == "file order"


@pytest.mark.parametrize(("duplicates", "times"), [("first", [1, 3]), ("last", [3, 7]), ("keep", [1, 3, 7])])
def test_duplicates(tmp_path, duplicates, times):
    folder = write(tmp_path, interactions__csv="user_id,item_id,ts\na,x,7\na,y,3\na,x,1\n")
    dataset = read_dataset(folder, duplicates=duplicates)
    assert [row[3] for row in events(dataset)] == times
    assert dataset.report.count("duplicate_event") == 1


ITEMS = (
    "item_id,title,genres,url,released,price,imdbId,nothing\n"
    'x,"Heat,  the (1995)",Crime|Drama,http://a/1,1995-01-02,12.0,77,\n'
    "y,,unknown,https://a/2,1996-01-02,3.25,78,\n"
    ",Nobody,,,,,,\n"
    "x,Again,,,,,,\n"
)


def test_items_become_text(tmp_path):
    dataset = read_dataset(write(tmp_path, interactions__csv=LOG + "b,w,1,300\n", items__csv=ITEMS))
    catalog, report = dataset.catalog, dataset.report
    assert catalog.frame.columns == ["item_id", "title", "genres", "price"]
    assert set(catalog.frame.dtypes) == {pl.String}
    assert catalog.record("x") == {"item_id": "x", "title": "Heat, the (1995)", "genres": "Crime, Drama", "price": "12"}
    assert catalog.record("y") == {"item_id": "y", "price": "3.25"}
    assert catalog.record("w") == {"item_id": "w"}
    assert catalog.ids == ("x", "y", "w")
    left_out = " ".join(report.facts["item_columns_left_out"])
    assert left_out == "url (addresses) released (dates) imdbId (an id of elsewhere) nothing (empty)"
    lines = {finding.code: finding.lines for finding in report.findings}
    assert lines["missing_title"] == (3,)
    assert lines["missing_item_id"] == (4,)
    assert lines["duplicate_item"] == (5,)
    assert lines["item_not_listed"] == (5,)


def test_items_without_any_text_are_reported(tmp_path):
    dataset = read_dataset(write(tmp_path, interactions__csv=LOG, items__csv="item_id,title\nx,Ex\ny,\n"))
    assert dataset.report.count("missing_text") == 1


def test_lists_and_paths_in_json_items(tmp_path):
    rows = [{"asin": "x", "title": "Ex", "categories": [["A", "B"], ["C"]], "tags": ["t", "u"], "deep": {"k": 1}}]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    dataset = read_dataset(write(tmp_path, interactions__csv=LOG, items__jsonl=text))
    assert dataset.catalog.record("x") == {"item_id": "x", "title": "Ex", "categories": "A, B, C", "tags": "t, u"}
    assert dataset.report.facts["item_columns_left_out"] == ["deep (no text)"]


def test_structures_are_read_by_their_names(tmp_path):
    rows = [
        {
            "item_id": item,
            "title": "Ex",
            "genres": [{"id": 16, "name": "Animation"}, {"id": 35, "name": "Comedy"}],
            "paths": [[{"title": "A"}], [{"title": "B"}]],
            "maker": {"id": 4, "Label": "Toho"},
            "images": [{"large": "http://x/y.jpg"}],
        }
        for item in ("x", "y")
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    dataset = read_dataset(write(tmp_path, interactions__csv=LOG, items__jsonl=text))
    record = dataset.catalog.record("x")
    assert record == {"item_id": "x", "title": "Ex", "genres": "Animation, Comedy", "paths": "A, B", "maker": "Toho"}
    assert dataset.report.facts["item_columns_left_out"] == ["images (no text)"]


def test_item_columns_given(tmp_path):
    folder = write(tmp_path, interactions__csv=LOG, items__csv="item_id,title,label\nx,5,Ex\n")
    dataset = read_dataset(folder, item_columns={"title": "label"})
    assert dataset.catalog.record("x") == {"item_id": "x", "title": "Ex"}
    with pytest.raises(RecllmError, match=r"data.item_columns.title: items.csv has no column 'labl'"):
        read_dataset(folder, item_columns={"title": "labl"})


def test_three_forms_of_one_set_give_one_table(tmp_path):
    """By construction what ml-100k's three forms do: the year cut off, the genres in blanks, in bars, in flags."""
    log = [("196", "1", 3, 881250949), ("186", "2", 3, 881250949), ("196", "3", 1, 878887116)]
    flags = "|".join("1" if n in {3, 4} else "0" for n in range(19))
    none = "|".join("1" if n == 0 else "0" for n in range(19))
    for name in ("original", "atomic", "parquet"):
        (tmp_path / name).mkdir()
    write(
        tmp_path / "original",
        u__data="".join("\t".join(map(str, row)) + "\n" for row in log),
        u__item=(
            f"1|Misérables,  Les (1995)|01-Jan-1995||http://x/1|{flags}\n2|unknown||||{none}\n"
            f"3|Land, The (1995) (V)|01-Jan-1995||http://x/3|{flags}\n"
        ).encode("latin-1"),
    )
    write(
        tmp_path / "atomic",
        m__inter="user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
        + "".join("\t".join(map(str, row)) + "\n" for row in log),
        m__item=(
            "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
            "1\tMisérables, Les\t1995\tAnimation Children's\n2\tunkonwn\tunkonwn\tunknown\n"
            "3\tLand, The (1995)\tV\tAnimation Children's\n"
        ),
    )
    rows = pl.DataFrame(log, schema=["user_id", "item_id", "rating", "timestamp"], orient="row")
    rows = rows.with_columns(seq=pl.Series([1, 0, 0])).sort("user_id", "seq")
    rows.write_parquet(tmp_path / "parquet" / "interactions.parquet")
    pl.DataFrame(
        {
            "item_id": ["1", "2", "3"],
            "title": ["Misérables,  Les (1995)", "unknown", "Land, The (1995) (V)"],
            "release_date": ["01-Jan-1995", None, "01-Jan-1995"],
            "genres": ["Animation|Children's", "unknown", "Animation|Children's"],
        }
    ).write_parquet(tmp_path / "parquet" / "items.parquet")
    sets = [read_dataset(str(tmp_path / name)) for name in ("original", "atomic", "parquet")]
    assert len({dataset.interactions.fingerprint() for dataset in sets}) == 1
    assert len({dataset.catalog.fingerprint() for dataset in sets}) == 1
    assert sets[0].catalog.record("1") == {
        "item_id": "1",
        "title": "Misérables, Les (1995)",
        "genres": "Animation, Children's",
    }
    assert sets[0].catalog.record("2") == {"item_id": "2"}
    assert sets[1].catalog.record("3")["title"] == "Land, The (1995) (V)"


def test_movies_dat_in_latin_1(tmp_path):
    write(tmp_path, ratings__dat="1::7::4::100\n", movies__dat="7::Cité (1995)::Drama|War\n".encode("latin-1"))
    assert read_dataset(str(tmp_path)).catalog.record("7")["title"] == "Cité (1995)"
    write(tmp_path, movies__dat="7::Cité (1995)::Drama|War\n".encode())
    assert read_dataset(str(tmp_path)).catalog.record("7") == {
        "item_id": "7",
        "title": "Cité (1995)",
        "genres": "Drama, War",
    }


def test_csv_in_latin_1(tmp_path):
    folder = write(tmp_path, interactions__csv=LOG, items__csv="item_id,title\nx,Cité\n".encode("latin-1"))
    assert read_dataset(folder).catalog.record("x")["title"] == "Cité"


def test_source_and_licence(tmp_path):
    folder = write(tmp_path, interactions__csv=LOG)
    assert (read_dataset(folder).source, read_dataset(folder).licence) == ("not stated", "not stated")
    write(tmp_path, SOURCE__md="# x\n\n- origin: a shop: its log\n- licence: CC0 1.0\n")
    assert (read_dataset(folder).source, read_dataset(folder).licence) == ("a shop: its log", "CC0 1.0")


def test_report_is_readable_and_json(tmp_path):
    report = read_dataset(write(tmp_path, interactions__csv=LOG + "a,x,5,100\n")).report
    text = report.lines()
    assert "rows read: 4" in text
    assert "rows kept: 3" in text
    assert "columns: user_id = user_id, item_id = item_id, rating = rating, timestamp = timestamp" in text
    assert any(line.startswith("info: further events") and "line 5" in line for line in text)
    back = json.loads(json.dumps(report.to_dict()))
    assert back["facts"]["rows_kept"] == 3
    assert back["findings"][-1]["lines"] == [5]


def interactions(rows):
    schema = {"user_id": pl.String, "item_id": pl.String, "rating": pl.Float32, "timestamp": pl.Int64, "seq": pl.Int32}
    return Interactions(pl.DataFrame(rows, schema=schema, orient="row"))


def test_interactions():
    log = interactions([("b", "x", 5.0, 1, 0), ("b", "y", 3.0, 2, 1), ("a", "x", None, 3, 0)])
    assert len(log) == 3
    assert log.users() == ["b", "a"]
    assert log.item_counts() == {"x": 2, "y": 1}
    assert log.histories() == {"b": Query(("x", "y"), "b", (5.0, 3.0)), "a": Query(("x",), "a", None)}
    partly = interactions([("b", "x", 5.0, 1, 0), ("b", "y", None, 2, 1)])
    assert partly.histories() == {"b": Query(("x", "y"), "b", (5.0, None))}
    assert len({log.fingerprint(), *(interactions(rows).fingerprint() for rows in changed(log))}) == 6
    assert log.fingerprint() == Interactions(log.frame.clone()).fingerprint()
    assert interactions([]).users() == []


def changed(log):
    """The log with one value changed, in each column."""
    for place, value in enumerate(("c", "z", 0.0, 0, 5)):
        rows = log.frame.rows()
        rows[2] = (*rows[2][:place], value, *rows[2][place + 1 :])
        yield rows


def test_fingerprint_keeps_neighbours_apart():
    def catalog(first, second):
        return Catalog(pl.DataFrame({"item_id": ["1", "2"], "title": [first, second]})).fingerprint()

    assert len({catalog("ab", "c"), catalog("a", "bc"), catalog("abc", None), catalog("abc", "")}) == 4


def test_catalog():
    catalog = Catalog(pl.DataFrame({"item_id": ["x", "y"], "title": ["Ex", None], "genres": ["A", "B"]}))
    assert (catalog.ids, len(catalog), catalog.text_columns) == (("x", "y"), 2, ["title", "genres"])
    assert "x" in catalog
    assert "z" not in catalog
    with pytest.raises(KeyError):
        catalog.record("z")
    more = catalog.with_items([{"item_id": "z", "title": " Zed  "}])
    assert more.record("z") == {"item_id": "z", "title": "Zed"}
    assert (more.ids, len(catalog)) == (("x", "y", "z"), 2)
    assert more.fingerprint() != catalog.fingerprint()
    for record, message in (
        ({"item_id": "x"}, "'x' is in the catalog already"),
        ({"title": "T"}, "needs 'item_id'"),
        ({"item_id": "z", "titel": "T"}, "Did you mean 'title'"),
    ):
        with pytest.raises(RecllmError, match=message):
            catalog.with_items([record])
    with pytest.raises(RecllmError, match="already"):
        catalog.with_items([{"item_id": "z"}, {"item_id": "z"}])


FURTHER = Path(os.environ.get("RECLLM_DATA", "/nowhere"))


@pytest.mark.slow
@pytest.mark.skipif(not (FURTHER / "ml-100k").is_dir(), reason="RECLLM_DATA has no ml-100k")
def test_ml_100k_is_one_table_in_both_forms():
    ours, fetched = read_dataset(str(FURTHER / "ml-100k")), read_dataset(str(fetch("ml-100k")))
    assert len(ours.interactions) == 100_000
    assert ours.interactions.frame.equals(fetched.interactions.frame)
    assert ours.catalog.frame.equals(fetched.catalog.frame)
    assert ours.interactions.fingerprint() == fetched.interactions.fingerprint()
    assert ours.catalog.fingerprint() == fetched.catalog.fingerprint()
    assert ours.catalog.record("1") == {
        "item_id": "1",
        "title": "Toy Story (1995)",
        "genres": "Animation, Children's, Comedy",
    }
    assert "GroupLens" in fetched.licence


@pytest.mark.slow
@pytest.mark.skipif(not FURTHER.is_dir(), reason="RECLLM_DATA is not set")
def test_every_further_set_loads():
    for folder in sorted(path for path in FURTHER.iterdir() if (path / "interactions.parquet").is_file()):
        dataset = read_dataset(folder.name)
        assert set(dataset.interactions.frame["item_id"]) <= set(dataset.catalog.ids)
        assert dataset.licence != "not stated"


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("items.csv", 'item_id,title\na,"one\ntwo\nthree"\nb,\nc,x\n', 5),
        ("items.csv", "item_id,title\r\na,one\r\nb,\r\n", 3),
        ("items.tsv", "item_id\ttitle\na\tone\nb\t", 3),
        ("items.jsonl", '{"item_id": "a", "title": "one"}\n\n\n{"item_id": "b", "title": null}\n', 4),
    ],
)
def test_lines_are_those_that_an_editor_shows(name, text, line, tmp_path):
    (tmp_path / "interactions.csv").write_text("user_id,item_id\nu,a\nu,b\n", encoding="utf-8")
    (tmp_path / name).write_bytes(text.encode())
    report = read_dataset(str(tmp_path)).report
    (finding,) = [finding for finding in report.findings if finding.code == "missing_title"]
    assert finding.lines == (line,)


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_brackets_in_a_path_are_no_pattern(suffix, tmp_path):
    folder = tmp_path / "d[4]"
    folder.mkdir()
    frame = pl.DataFrame({"user_id": ["u", "u"], "item_id": ["a", "b"]})
    write = {"csv": frame.write_csv, "jsonl": frame.write_ndjson, "parquet": frame.write_parquet}[suffix]
    write(folder / f"interactions.{suffix}")
    assert len(read_dataset(str(folder)).interactions) == 2
    assert read_interactions(folder / f"interactions.{suffix}").histories()["u"].history == ("a", "b")


def test_a_log_and_items_that_have_nothing_in_common_are_refused(tmp_path):
    log, items = tmp_path / "log.csv", tmp_path / "items.csv"
    log.write_text("user_id,item_id,timestamp\n1,50.0,1\n1,51.0,2\n", encoding="utf-8")
    items.write_text("item_id,title\n50,Heat\n51,Casino\n", encoding="utf-8")
    with pytest.raises(RecllmError, match=r"no event is of an item .*'50.0', the item file such as '50'"):
        read_dataset("", interactions=str(log), items=str(items))


def test_rows_without_a_place_stand_last(tmp_path):
    (tmp_path / "interactions.csv").write_text("user_id,item_id,seq\nu,a,\nu,b,1\nu,c,2\n", encoding="utf-8")
    (tmp_path / "items.csv").write_text("item_id,title\na,A\nb,B\nc,C\n", encoding="utf-8")
    assert read_dataset(str(tmp_path)).interactions.frame["item_id"].to_list() == ["b", "c", "a"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("item_id,description,year\na,Long,1995\n", [("1995", None)]),
        ("item_id,title,year\na,,1995\nb,Heat,1995\n", [("1995", None), (None, "Heat (1995)")]),
        ("item_id,title,year\na,Old,c. 1890\nb,Heat,1995\n", [("c. 1890", "Old"), (None, "Heat (1995)")]),
        (
            "item_id,title,year\na,Old,0\nb,New,1995-03-02\nc,Film,1990s\n",
            [(None, "Old"), (None, "New"), ("1990s", "Film")],
        ),
    ],
)
def test_a_year_that_goes_into_no_title_stays(tmp_path, text, expected):
    path, said = tmp_path / "items.csv", []
    path.write_text(text, encoding="utf-8")
    assert read_items(path, say=said.append).frame.select("release_year", "title").rows() == expected
    assert not any("without any text" in line for line in said)


@pytest.mark.parametrize("columns", [{"item_id": "name", "title": "name"}, {"title": "name", "item_id": "name"}])
def test_one_column_may_be_both_id_and_title(tmp_path, columns):
    path = tmp_path / "items.csv"
    path.write_text("name,colour\nHeat,red\n", encoding="utf-8")
    assert read_items(path, columns=columns).frame.rows() == [("Heat", "Heat", "red")]


def test_ids_that_only_a_fraction_keeps_apart_are_told(tmp_path):
    events = "user_id,item_id\nu,1.0\nu,2\nu,3.0\nu,x.0\n"
    folder = write(tmp_path, interactions__csv=events, items__csv="item_id,title\n1,A\n2,B\n3,C\n")
    report = read_dataset(str(folder)).report
    assert report.count("item_not_listed") == 3
    assert report.count("id_with_fraction") == 2


@pytest.mark.parametrize(("year", "why"), [("0", "no years"), ("1995-03-02", "no years"), ("1995", "now in the title")])
def test_years_that_say_nothing_are_left_out(tmp_path, year, why):
    folder = write(
        tmp_path, interactions__csv="user_id,item_id\nu,a\n", items__csv=f"item_id,title,year\na,Heat,{year}\n"
    )
    dataset = read_dataset(str(folder))
    assert dataset.catalog.frame.columns == ["item_id", "title"]
    assert why in str(dataset.report.facts["item_columns_left_out"])

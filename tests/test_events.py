"""Events as one table: weights that count, and the same order of users whatever the order of the file."""

import numpy as np
import polars as pl
import pytest

from recllm.data import read_dataset, read_interactions
from recllm.errors import RecllmError


@pytest.mark.parametrize("weight", ["0", "-1", "", "much", "1e39"])
def test_an_event_weight_that_is_no_positive_number_is_refused(tmp_path, weight):
    file = tmp_path / "log.csv"
    file.write_text(f"user_id,item_id,event_weight\na,x,0.5\na,y,{weight}\nb,x,1\n", encoding="utf-8")
    with pytest.raises(
        RecllmError, match=r"line 3 has an event weight that is no positive number .*\(as 1 of 3 rows\)"
    ):
        read_interactions(file)


def test_users_who_began_in_one_second_stand_by_their_ids_whatever_the_order_of_the_file(tmp_path):
    file = tmp_path / "log.csv"
    users = [f"u{user:02}" for user in range(20)]
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(users)
        rows = [f"{user},{item},{at}\n" for user in order for item, at in (("x", 100), ("y", 200))]
        file.write_text("user_id,item_id,timestamp\nz,x,99\n" + "".join(rows), encoding="utf-8")
        assert read_interactions(file).users() == ["z", *users]


def found(file):
    """The ids that are read of a file, and what is told of it by its code."""
    dataset = read_dataset("", interactions=str(file))
    findings = {finding.code: finding for finding in dataset.report.findings}
    return dataset.interactions.frame.select("user_id", "item_id").rows(), findings


@pytest.mark.parametrize("name", ["log.jsonl", "log.ndjson"])
@pytest.mark.parametrize("strange", ['["b"]', "[]", '{"b": 1}', "{}"])
def test_ids_that_are_lists_or_objects_are_dropped_of_users_and_items(tmp_path, name, strange):
    rows = [('"a1"', '"x"'), ('"a2"', strange), (strange, '"y"'), ('"[a3]"', '"{z}"')]
    lines = [f'{{"user_id": {user}, "item_id": {item}}}' for user, item in rows]
    (tmp_path / name).write_text("\n".join(lines), encoding="utf-8")
    ids, findings = found(tmp_path / name)
    assert ids == [("a1", "x"), ("[a3]", "{z}")]
    assert "item_id is a list or an object, dropped" in findings["strange_id"].message


def test_ids_of_other_files_may_look_like_lists(tmp_path):
    (tmp_path / "log.csv").write_text('user_id,item_id\n[],{}\na,"[""b""]"\n', encoding="utf-8")
    ids, findings = found(tmp_path / "log.csv")
    assert ids == [("[]", "{}"), ("a", '["b"]')]
    assert "strange_id" not in findings


@pytest.mark.parametrize("column", ["user_id", "item_id"])
@pytest.mark.parametrize("end", ["\n", "\r"])
def test_an_id_of_several_lines_is_dropped_whatever_ends_them(tmp_path, column, end):
    frame = pl.DataFrame({"user_id": ["a", "b", "c"], "item_id": ["x", "y", "z"]})
    strange = pl.when(pl.int_range(pl.len()) == 1).then(pl.lit(f"1{end}2")).otherwise(column)
    frame.with_columns(strange.alias(column)).write_parquet(tmp_path / "log.parquet")
    ids, findings = found(tmp_path / "log.parquet")
    assert ids == [("a", "x"), ("c", "z")]
    assert (findings["strange_id"].count, findings["strange_id"].lines) == (1, (2,))


@pytest.mark.parametrize("column", ["user_id", "item_id"])
@pytest.mark.parametrize("sign", [1, -1])
def test_large_floats_are_warned_of_in_both_ids_and_below_nought_too(tmp_path, column, sign):
    frame = pl.DataFrame({"user_id": [1.0, 2.0], "item_id": [3.0, 4.0]})
    large = pl.Series(column, [sign * 2.0**53, sign * (2.0**53 + 2)])
    frame.with_columns(large).write_parquet(tmp_path / "log.parquet")
    told = found(tmp_path / "log.parquet")[1]["large_float_id"]
    assert told.count == 1
    assert f"rows with a {column} above {2**53:,} that" in told.message


def test_an_order_of_floats_keeps_its_fractions(tmp_path):
    frame = pl.DataFrame({"user_id": ["a"] * 2, "item_id": ["late", "early"], "seq": [1.5, 1.25]})
    frame.write_parquet(tmp_path / "log.parquet")
    assert read_interactions(tmp_path / "log.parquet").frame["item_id"].to_list() == ["early", "late"]


def test_an_order_that_parts_events_of_one_second_does_not_quarrel_with_time(tmp_path):
    (tmp_path / "log.csv").write_text("user_id,item_id,seq,timestamp\na,x,2,9\na,y,1,9\n", encoding="utf-8")
    ids, findings = found(tmp_path / "log.csv")
    assert ids == [("a", "y"), ("a", "x")]
    assert "order_against_time" not in findings


def test_a_rating_of_blanks_is_a_missing_one_and_one_without_an_end_is_no_number(tmp_path):
    rows = ["a,1, ", "a,2, 4 ", "a,3,inf", "a,4,-inf", "a,5,nan"]
    (tmp_path / "log.csv").write_text("user_id,item_id,rating\n" + "\n".join(rows), encoding="utf-8")
    assert read_interactions(tmp_path / "log.csv").frame["rating"].to_list() == [None, 4.0, None, None, None]
    assert found(tmp_path / "log.csv")[1]["bad_rating"].lines == (4, 5, 6)


@pytest.mark.parametrize(("rule", "line"), [("keep", 3), ("first", 3), ("last", 2)])
def test_the_further_events_that_are_told_are_those_that_the_rule_leaves_out(tmp_path, rule, line):
    (tmp_path / "log.csv").write_text("user_id,item_id,timestamp\na,x,1\na,x,2\na,y,3\n", encoding="utf-8")
    report = read_dataset("", interactions=str(tmp_path / "log.csv"), duplicates=rule).report
    (told,) = [finding for finding in report.findings if finding.code == "duplicate_event"]
    assert told.lines == (line,)


def items_of(path, text, **options):
    """The items of a log of one user in order, and what is doubtful in it."""
    path.write_text(text, encoding="utf-8")
    said = []
    frame = read_interactions(path, say=said.append, **options).frame
    return frame["item_id"].to_list(), "\n".join(said)


def test_blanks_around_numbers_and_empty_quotes_are_nothing(tmp_path):
    text = "user_id, item_id, rating, timestamp, event_weight\nu, a, 5, 1577836900, 2\nu, b, 4, 1577836800, 3\n"
    path = tmp_path / "log.csv"
    path.write_text(text.replace(", ", ",", 4), encoding="utf-8")
    frame = read_interactions(path).frame
    assert frame.select("item_id", "rating", "weight").rows() == [("b", 4.0, 3.0), ("a", 5.0, 2.0)]
    quoted = '"user_id","item_id","timestamp"\n"u","a",""\n"u","b",""\n'
    assert items_of(path, quoted)[0] == ["a", "b"]  # as if no time were there


@pytest.mark.parametrize(
    ("first", "second"), [(" 2", " 1"), ("2020-01-02", "2020-01-01"), ("2020-01-01T10:00:00Z", "2020-01-01")]
)
def test_places_in_the_order_may_have_blanks_around_them_and_be_dates(tmp_path, first, second):
    rows = f"user_id,item_id,seq,timestamp\nu,a,{first},1577836800\nu,b,{second},1577836900\n"
    assert items_of(tmp_path / "log.csv", rows)[0] == ["b", "a"]


def test_a_place_that_is_none_is_told_and_time_orders_its_users_events(tmp_path):
    rows = "user_id,item_id,seq,timestamp\n"
    rows += "u,a,x3,1577836900\nu,b,2,1577836800\nu,c,1,1577836950\nv,d,2,1577836800\nv,e,1,1577836900\n"
    found, said = items_of(tmp_path / "log.csv", rows)
    assert found == ["b", "a", "c", "e", "d"]
    assert "that are neither numbers nor times, taken as missing: 1 (log.csv, line 2)" in said
    assert "rows without a place in the order (seq), so that all events of their users are in order of time: 1" in said
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "interactions.csv").write_text(rows, encoding="utf-8")
    facts = read_dataset(str(folder)).report.facts
    assert facts["order"] == "by column 'seq', for users with rows without one time, ties in file order"


def test_one_event_with_a_place_does_not_go_before_all_that_have_a_time(tmp_path):
    rows = "user_id,item_id,seq,timestamp\nu,a,,1577836900\nu,b,,1577836800\nu,c,1,1577836950\n"
    assert items_of(tmp_path / "log.csv", rows)[0] == ["b", "a", "c"]


def test_a_rating_that_is_left_out_with_its_event_is_told(tmp_path):
    rows = "user_id,item_id,rating,timestamp\nu,a,,1577836800\nu,a,5,1577836900\nu,a,,1577837000\nu,b,3,1577837100\n"
    for rule, line in (("first", 2), ("last", 4)):
        said = items_of(tmp_path / "log.csv", rows, duplicates=rule)[1]
        assert "where one that is left out has a rating" in said
        assert f"takes the rating over): 1 (log.csv, line {line})" in said
    assert "rating" not in items_of(tmp_path / "log.csv", rows, duplicates="keep")[1]


def test_a_rating_beyond_single_precision_is_missing(tmp_path):
    said = items_of(tmp_path / "log.csv", "user_id,item_id,rating\nu,a,1e39\nu,b,4\n")[1]
    assert "ratings that are no number, or too large a one, taken as missing: 1 (log.csv, line 2)" in said


def test_a_blank_line_is_a_row_without_ids_in_a_log_with_weights_too(tmp_path):
    rows = "user_id,item_id,event_weight\nu,a,1\n\nu,b,2\n"
    assert items_of(tmp_path / "log.csv", rows)[0] == ["a", "b"]
    with pytest.raises(RecllmError, match=r"line 4 has an event weight .*as 1 of 2 rows"):
        items_of(tmp_path / "log.csv", rows.replace("u,b,2", "u,b,0"))


def test_of_events_of_one_time_those_with_a_place_stand_by_it(tmp_path):
    rows = "user_id,item_id,seq,timestamp\n" + "".join(f"u,i{seq},{seq},2020-01-01\n" for seq in (3, 2, 1))
    assert items_of(tmp_path / "log.csv", rows + "u,last,,2020-01-01\n")[0] == ["i1", "i2", "i3", "last"]


def test_a_place_in_the_order_may_be_a_duration(tmp_path):
    path = tmp_path / "log.parquet"
    frame = pl.DataFrame({"user_id": ["u", "u"], "item_id": ["a", "b"], "seq": [2, 1]})
    frame.with_columns(pl.col("seq").cast(pl.Duration("ms"))).write_parquet(path)
    assert read_interactions(path).frame["item_id"].to_list() == ["b", "a"]


def test_a_column_of_ratings_without_a_number_is_told_with_the_way_out(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("user_id,item_id,rating\nu,a,view\nu,b,buy\n", encoding="utf-8")
    assert "; that is all of them: name another column as rating" in found(path)[1]["bad_rating"].message

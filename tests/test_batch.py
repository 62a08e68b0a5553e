"""Batch: every format in and out gives the same answers, chunks join, bad rows are set aside with the reason."""

import json
import threading
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal

import recllm
from recllm import batch, parts
from recllm.batch import NOTHING_LEFT, Job, ahead, rank_file, recommend_file, score_file, score_items_file
from recllm.data import Query
from recllm.errors import RecllmError
from recllm.parts import Counts, Parts, folder_of
from recllm.query_rows import read_rows
from recllm.ranking import ItemIndex

HISTORIES = {"a": ["0", "2", "4"], "b": ["1", "3"], "c": ["10", "12", "14", "16"], "d": []}


@pytest.fixture(scope="module")
def recommender(tiny_bundle):
    return recllm.load(tiny_bundle)


def write(path, histories, **more):
    """The same rows in the format of the suffix."""
    rows = [{"user_id": user, "history": items, **more} for user, items in histories.items()]
    if path.suffix == ".parquet":
        pl.DataFrame(rows, schema_overrides={"history": pl.List(pl.String)}).write_parquet(path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        lines = [f"{row['user_id']},{' '.join(row['history'])}" for row in rows]
        path.write_text("\n".join(["user_id,history", *lines]) + "\n", encoding="utf-8")
    return path


def read(path):
    if path.suffix == ".parquet":
        return pl.read_parquet(path)
    if path.suffix == ".jsonl":
        return pl.DataFrame([json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()])
    return pl.read_csv(path, schema_overrides={"user_id": pl.String, "item_id": pl.String})


@pytest.mark.parametrize("given", [".parquet", ".jsonl", ".csv"])
@pytest.mark.parametrize("asked", [".parquet", ".jsonl", ".csv"])
def test_every_format_holds_what_the_recommender_says(given, asked, tmp_path, recommender):
    source, target = write(tmp_path / f"in{given}", HISTORIES), tmp_path / f"out{asked}"
    summary = recommend_file(recommender, Job(source, target), k=3)
    found = read(target)
    expected = recommender.recommend(list(HISTORIES.values()), k=3)
    shares = [f"share_{name}" for name in recommender.scorers]
    assert found.columns == ["user_id", "rank", "item_id", "score", *shares]
    assert found["user_id"].to_list() == [user for user in HISTORIES for _ in range(3)]
    assert found["rank"].to_list() == [1, 2, 3] * len(HISTORIES)
    assert found["item_id"].to_list() == [item for ids in expected.ids for item in ids]
    np.testing.assert_allclose(found["score"], expected.scores.ravel(), rtol=1e-5)
    np.testing.assert_allclose(found.select(pl.sum_horizontal(shares)).to_series(), found["score"], atol=1e-3)
    assert (summary.answered, summary.written, summary.rejected, summary.unknown) == (4, 12, 0, 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([source.name, target.name])


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".csv"])
def test_chunks_join_to_what_one_chunk_gives(suffix, tmp_path, recommender):
    many = {f"u{user}": [str(item) for item in range(user % 5)] for user in range(23)}
    source = write(tmp_path / "in.parquet", many)
    whole, parts = tmp_path / f"whole{suffix}", tmp_path / f"parts{suffix}"
    recommend_file(recommender, Job(source, whole), k=2)
    recommend_file(recommender, Job(source, parts, chunk=4), k=2)
    assert_frame_equal(read(whole), read(parts), abs_tol=1e-5)
    assert read(parts)["user_id"].unique(maintain_order=True).to_list() == list(many)


def test_seen_items_are_left_out_unless_asked_for(tmp_path, recommender):
    source = write(tmp_path / "in.jsonl", {"a": ["0", "2", "4"]})
    recommend_file(recommender, Job(source, tmp_path / "new.csv"), k=21)
    recommend_file(recommender, Job(source, tmp_path / "all.csv"), k=24, exclude_seen=False)
    new, every = read(tmp_path / "new.csv"), read(tmp_path / "all.csv")
    assert set(every["item_id"]) - set(new["item_id"]) == {"0", "2", "4"}


def test_places_are_kept_for_new_items_and_that_is_another_job(tmp_path, recommender, monkeypatch):
    grown = recommender.with_items([{"item_id": "new", "title": "Red film 40"}])
    source = write(tmp_path / "in.jsonl", {"b": ["1", "3", "5"], "c": ["7", "9"]})  # friends of blue films
    for count, target in ((0, "plain.csv"), (1, "kept.csv")):
        recommend_file(grown, Job(source, tmp_path / target), k=1, new_items=count)
    plain, kept = (read(tmp_path / name)["item_id"].to_list() for name in ("plain.csv", "kept.csv"))
    assert "new" not in plain
    assert kept == ["new", "new"]
    monkeypatch.setattr(grown, "recommend", once_only(grown.recommend))
    with pytest.raises(RuntimeError):
        recommend_file(grown, Job(source, tmp_path / "out.csv", chunk=1), k=1)
    with pytest.raises(RecllmError, match="what differs: new_items"):
        recommend_file(grown, Job(source, tmp_path / "out.csv", chunk=1), k=1, new_items=1)


def test_a_list_shorter_than_k_has_no_empty_lines(tmp_path, recommender):
    source = write(tmp_path / "in.jsonl", {"a": [str(item) for item in range(20)], "b": ["0"]})
    recommend_file(recommender, Job(source, tmp_path / "out.csv"), k=24)
    found = read(tmp_path / "out.csv")
    assert found.filter(user_id="a").height == 4
    assert found.filter(user_id="b").height == 23
    assert found["score"].null_count() == 0


@pytest.mark.parametrize("chunk", [1, 10])
def test_whoever_has_everything_is_set_aside_and_not_passed_over(chunk, tmp_path, recommender):
    every = [str(item) for item in range(24)]
    source = write(tmp_path / "in.jsonl", {"none": ["0", 7, None], "all": every, "one": ["0"]})
    summary = recommend_file(recommender, Job(source, tmp_path / "out.csv", chunk=chunk), k=3)
    rejects = [json.loads(line) for line in summary.rejects.read_text(encoding="utf-8").splitlines()]
    assert [(row["line"], row["reason"]) for row in rejects][1:] == [(2, NOTHING_LEFT)]
    assert rejects[1]["row"]["user_id"] == "all"
    assert (summary.answered, summary.rejected, summary.written) == (1, 2, 3)
    assert read(tmp_path / "out.csv")["user_id"].to_list() == ["one"] * 3
    shown = Job(source, tmp_path / "seen.csv", chunk=chunk)
    assert recommend_file(recommender, shown, k=3, exclude_seen=False).answered == 2


def test_of_two_rows_of_one_user_the_one_without_anything_left_is_named(tmp_path, recommender):
    every = [str(item) for item in range(24)]
    source = tmp_path / "in.jsonl"
    rows = [{"user_id": "a", "history": history} for history in (every, ["0"], every)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    summary = recommend_file(recommender, Job(source, tmp_path / "out.csv"), k=2)
    rejects = [json.loads(line) for line in summary.rejects.read_text(encoding="utf-8").splitlines()]
    assert [(row["line"], row["reason"]) for row in rejects] == [(1, NOTHING_LEFT), (3, NOTHING_LEFT)]
    assert (summary.answered, summary.rejected, summary.written) == (1, 2, 2)


def test_rejects_stand_by_their_lines_whatever_they_are_set_aside_for(tmp_path, recommender):
    source = write(tmp_path / "in.jsonl", {"all": [str(item) for item in range(24)], "bad": 7, "one": ["0"]})
    summary = recommend_file(recommender, Job(source, tmp_path / "out.csv"), k=2)
    rejects = [json.loads(line) for line in summary.rejects.read_text(encoding="utf-8").splitlines()]
    assert [(row["line"], row["row"]["user_id"]) for row in rejects] == [(1, "all"), (2, "bad")]


def test_rejects_are_json_whatever_the_rows_hold(tmp_path, recommender):
    source = tmp_path / "in.jsonl"
    source.write_text('{"user_id": NaN, "x": [1, {"y": Infinity}]}\n{"history": ["0"]}\n', encoding="utf-8")
    summary = recommend_file(recommender, Job(source, tmp_path / "out.csv"), k=2)
    row = json.loads(summary.rejects.read_text(encoding="utf-8"), parse_constant=pytest.fail)["row"]
    assert row == {"user_id": None, "x": [1, {"y": None}]}


def test_what_is_read_beside_the_rows_is_not_written_over(tmp_path, recommender):
    source, log = write(tmp_path / "in.jsonl", {"a": ["0"]}), tmp_path / "log.csv"
    log.write_text("user_id,item_id\n", encoding="utf-8")
    with pytest.raises(RecllmError, match=r"log\.csv' is itself read here"):
        recommend_file(recommender, Job(source, log, overwrite=True, others=(log, tmp_path / "none.csv")), k=1)
    assert log.read_text(encoding="utf-8") == "user_id,item_id\n"


BAD = [
    ("not json", "not JSON"),
    ("[1, 2]", "not a JSON object"),
    ('{"name": "x"}', "neither 'history' nor 'user_id'"),
    ('{"user_id": "u1"}', "no 'history'"),
    ('{"history": 7}', "'history' is 7, not a list"),
    ('{"history": ["0", null]}', "None is no id"),
    ('{"history": [["0"]]}', "is no id"),
    ('{"history": "[1, "}', "Expecting value"),
]


def test_bad_rows_are_set_aside_with_line_and_reason(tmp_path, recommender):
    good = '{"history": [0, 2.0, "4"]}'
    lines = [good, *(text for text, _ in BAD), "", good]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.csv"
    source.write_text("\n".join(lines), encoding="utf-8")
    summary = recommend_file(recommender, Job(source, target, chunk=3), k=1)
    rejects = [json.loads(line) for line in summary.rejects.read_text(encoding="utf-8").splitlines()]
    assert summary.rejects == tmp_path / "out.csv.rejects.jsonl"
    assert [row["line"] for row in rejects] == list(range(2, 2 + len(BAD)))
    for row, (_, reason) in zip(rejects, BAD, strict=True):
        assert reason in row["reason"]
    assert rejects[4]["row"] == {"history": 7}
    # Numbers are ids too, and a row without a user is named by its line.
    expected = recommender.recommend([["0", "2", "4"]], k=1).ids[0][0]
    assert read(target)["item_id"].to_list() == [expected, expected]
    assert read(target)["user_id"].to_list() == ["line 1", f"line {len(lines)}"]
    assert (summary.answered, summary.rejected) == (2, len(BAD))
    assert any(f"{len(BAD)} rows could not be answered" in line for line in summary.lines(target))


BAD_RATINGS = [
    ('"high"', "'ratings' is ['high'], not a list of numbers"),
    ("[4]", "'ratings' has 1 numbers, and 'history' 2 items; each item needs one"),
    ("[4, Infinity]", "not all of it are finite numbers"),
    (f"[4, {'9' * 400}]", "not a list of numbers"),
    ("7", "'ratings' is 7, not a list of numbers"),
]


@pytest.mark.parametrize(("ratings", "reason"), BAD_RATINGS)
def test_ratings_are_read_where_something_reads_them(tmp_path, recommender, ratings, reason):
    source = tmp_path / "in.jsonl"
    source.write_text(f'{{"history": ["0", "2"], "ratings": {ratings}}}\n', encoding="utf-8")
    (row,) = read_rows(source, ratings=True)
    assert reason in row.reason
    (row,) = read_rows(source)
    assert row.ratings is None
    assert recommend_file(recommender, Job(source, tmp_path / "out.csv"), k=1).answered == 1


def test_some_items_of_a_history_may_have_no_rating(tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text('{"history": ["0", "2"], "ratings": [4, null]}\n', encoding="utf-8")
    (row,) = read_rows(source, ratings=True)
    assert row.ratings == (4.0, None)
    assert row.query.ratings == (4.0, None)
    frame = pl.DataFrame({"history": [["0", "2"]], "ratings": [[4.0, float("nan")]]})
    frame.write_parquet(tmp_path / "in.parquet")
    (row,) = read_rows(tmp_path / "in.parquet", ratings=True)
    assert row.ratings == (4.0, None)  # pandas writes what is missing so


def test_a_csv_row_of_the_wrong_length_is_set_aside(tmp_path, recommender):
    source = tmp_path / "in.csv"
    source.write_text('user_id,history\na,0,2\nb,0|2\nc,0 2\nd,"[""0"", 2]"\n', encoding="utf-8")
    summary = recommend_file(recommender, Job(source, tmp_path / "out.csv"), k=1)
    (rejected,) = summary.rejects.read_text(encoding="utf-8").splitlines()
    assert json.loads(rejected)["line"] == 2
    assert "3 fields, the header has 2" in rejected
    assert read(tmp_path / "out.csv")["item_id"].n_unique() == 1


@pytest.mark.parametrize("candidates", ["", ', "candidates": null', ', "candidates": []'])
def test_rows_without_candidates_are_told_what_they_lack(candidates, tmp_path, recommender):
    source = tmp_path / "in.jsonl"
    source.write_text(f'{{"history": ["1"]{candidates}}}\n', encoding="utf-8")
    words = r"line 1: no 'candidates', the item ids to score\. Rows need 'history', .*, and 'candidates', the item ids"
    with pytest.raises(RecllmError, match=words):
        score_file(recommender, Job(source, tmp_path / "out.csv"))


def test_rows_without_a_good_one_leave_nothing_but_the_rejects(tmp_path, recommender):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.parquet"
    source.write_text('{"user_id": "x"}\n', encoding="utf-8")
    with pytest.raises(RecllmError, match=r"No row .* could be answered: line 1: unknown user 'x'"):
        recommend_file(recommender, Job(source, target, histories={}), k=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.parquet.rejects.jsonl"]


def test_rejects_of_an_earlier_job_do_not_stay(tmp_path, recommender):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.csv"
    source.write_text('{"history": ["0"]}\nnope\n', encoding="utf-8")
    assert recommend_file(recommender, Job(source, target), k=1).rejects.is_file()
    source.write_text('{"history": ["0"]}\n', encoding="utf-8")
    assert recommend_file(recommender, Job(source, target, overwrite=True), k=1).rejects is None
    assert not (tmp_path / "out.csv.rejects.jsonl").exists()


def test_histories_of_a_log_stand_in_for_missing_ones(tmp_path, recommender):
    log = {"u1": Query(("0", "2"), "u1"), "7": Query(("1",), "7")}
    source = tmp_path / "in.csv"
    source.write_text("user_id,history\nu1,\n7,\nu1,1\n", encoding="utf-8")
    recommend_file(recommender, Job(source, tmp_path / "out.csv", histories=log), k=1)
    expected = recommender.recommend([["0", "2"], ["1"], ["1"]], k=1).ids
    assert read(tmp_path / "out.csv")["item_id"].to_list() == [ids[0] for ids in expected]


def test_unknown_items_are_passed_over_and_counted(tmp_path, recommender):
    source = write(tmp_path / "in.jsonl", {"a": ["0", "x", "2", "y"]})
    summary = recommend_file(recommender, Job(source, tmp_path / "out.csv"), k=1)
    assert summary.unknown == 2
    assert summary.strangers == 0
    assert read(tmp_path / "out.csv")["item_id"].to_list() == recommender.recommend([["0", "2"]], k=1).ids[0]


def test_users_of_whose_history_nothing_is_known_are_counted_and_told(tmp_path, recommender):
    source, target = write(tmp_path / "in.csv", HISTORIES | {"b": ["shop:1", "shop:3"]}), tmp_path / "out.csv"
    summary = recommend_file(recommender, Job(source, target), k=3)
    assert summary.strangers == 1
    told = "1 of 4 users have a history of which no item is known, and are answered as if they had none"
    assert f"{told}; the catalogue's ids are like '0'" in summary.lines(target)


def test_a_file_that_exists_stays_unless_it_may_be_replaced(tmp_path, recommender):
    source, target = write(tmp_path / "in.jsonl", HISTORIES), tmp_path / "out.csv"
    target.write_text("mine", encoding="utf-8")
    with pytest.raises(RecllmError, match="exists already"):
        recommend_file(recommender, Job(source, target), k=1)
    assert target.read_text(encoding="utf-8") == "mine"
    recommend_file(recommender, Job(source, target, overwrite=True), k=1)
    assert read(target).height == len(HISTORIES)


def many(path, rows=23):
    """Rows of some histories, of which every seventh cannot be answered."""
    rng = np.random.default_rng(0)
    lines = []
    for row in range(rows):
        history = "nothing" if row % 7 == 5 else rng.integers(0, 24, rng.integers(0, 6)).astype(str).tolist()
        lines.append(json.dumps({"user_id": f"u{row}", "history": history if row % 7 != 5 else 3}) + "\n")
    path.write_text("".join(lines), encoding="utf-8")
    return path


def broken(*_, **__):
    raise RuntimeError("the lights went out")


def no_memory(*_, **__):
    raise RuntimeError("CUDA out of memory")


def once_only(answer):
    """The same function, which fails from the second call on."""
    calls = []

    def once(*given, **keys):
        calls.append(given)
        return answer(*given, **keys) if len(calls) == 1 else broken()

    return once


def files(folder):
    """The bytes of every file of a folder, but for the input."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "in.jsonl"}


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_a_job_that_breaks_goes_on_and_ends_with_the_same_bytes(suffix, tmp_path, recommender, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        folder.mkdir()
        many(folder / "in.jsonl")
    expected = recommend_file(recommender, Job(whole / "in.jsonl", whole / f"out{suffix}", chunk=4), k=3)
    asked, answer = [], recommender.recommend

    def fails(histories, k, **keys):
        asked.append(len(histories))
        if len(asked) in (3, 5):
            broken()
        return answer(histories, k, **keys)

    monkeypatch.setattr(recommender, "recommend", fails)
    job = Job(cut / "in.jsonl", cut / f"out{suffix}", chunk=4)
    for _ in range(2):
        with pytest.raises(RuntimeError):
            recommend_file(recommender, job, k=3)
        assert not job.target.exists()
    lines = []
    found = recommend_file(recommender, replace(job, say=lines.append), k=3)
    assert lines[0] == "Going on behind 12 rows that are done"
    assert len(asked) == 6 + 2
    assert files(cut) == files(whole)
    assert (found.answered, found.rejected, found.written) == (expected.answered, expected.rejected, expected.written)
    assert found.here == 23 - 12


def test_another_job_is_not_taken_for_the_one_that_was_begun(tmp_path, recommender, monkeypatch):
    source, target = many(tmp_path / "in.jsonl"), tmp_path / "out.csv"
    with monkeypatch.context() as patch:
        patch.setattr(recommender, "recommend", once_only(recommender.recommend))
        with pytest.raises(RuntimeError):
            recommend_file(recommender, Job(source, target, chunk=4), k=3)
    with pytest.raises(RecllmError, match=r"begun by another job and is not finished; what differs: k\. Run that one"):
        recommend_file(recommender, Job(source, target, chunk=4), k=2)
    many(source, rows=24)
    with pytest.raises(RecllmError, match=r"what differs: rows\."):
        recommend_file(recommender, Job(source, target, chunk=4), k=3)
    assert recommend_file(recommender, Job(source, target, chunk=4, overwrite=True), k=2).here == 24
    assert not (tmp_path / ".out.csv.parts").exists()


def test_a_job_that_is_running_is_left_alone(tmp_path, recommender):
    source, target = many(tmp_path / "in.jsonl"), tmp_path / "out.csv"
    job = Job(source, target)
    running = Parts(target, {}, overwrite=False)
    with pytest.raises(RecllmError, match="Another process is writing"):
        recommend_file(recommender, job, k=1)
    running.close()
    recommend_file(recommender, job, k=1)


def test_a_job_that_was_killed_while_it_joined_its_parts(tmp_path, recommender, monkeypatch):
    source, target = many(tmp_path / "in.jsonl"), tmp_path / "out.csv"
    with monkeypatch.context() as patch:
        patch.setattr(Parts, "remove", broken)
        with pytest.raises(RuntimeError):
            recommend_file(recommender, Job(source, target, chunk=4), k=2)
    assert target.exists()
    before = target.read_bytes()
    summary = recommend_file(recommender, Job(source, target, chunk=4), k=2)
    assert summary.here == 0
    assert files(tmp_path) == {
        "out.csv": before,
        "out.csv.rejects.jsonl": (tmp_path / "out.csv.rejects.jsonl").read_bytes(),
    }
    with pytest.raises(RecllmError, match="exists already"):
        recommend_file(recommender, Job(source, target, chunk=4), k=2)


def parts_of(recommender, source, target, monkeypatch):
    """A job that was killed when all of its parts were there."""
    with monkeypatch.context() as patch:
        patch.setattr(Parts, "finish", broken)
        with pytest.raises(RuntimeError):
            recommend_file(recommender, Job(source, target, chunk=4), k=2)
    return folder_of(target)


def test_a_part_that_is_gone_is_no_part_without_answers(tmp_path, recommender, monkeypatch):
    source, target = many(tmp_path / "in.jsonl"), tmp_path / "out.csv"
    folder = parts_of(recommender, source, target, monkeypatch)
    (folder / "00000002.csv").unlink()
    with pytest.raises(RecllmError, match=r"Part 2 of .* is gone from .* Remove that folder"):
        recommend_file(recommender, Job(source, target, chunk=4), k=2)
    assert not target.exists()


def test_a_kill_while_parts_are_removed_leaves_the_output_alone(tmp_path, recommender, monkeypatch):
    source, target = many(tmp_path / "in.jsonl"), tmp_path / "out.csv"
    with monkeypatch.context() as patch:
        patch.setattr(parts.shutil, "rmtree", broken)
        with pytest.raises(RuntimeError):
            recommend_file(recommender, Job(source, target, chunk=4), k=2)
    before = target.read_bytes()
    assert not folder_of(target).exists()
    with pytest.raises(RecllmError, match="exists already"):
        recommend_file(recommender, Job(source, target, chunk=4), k=2)
    assert files(tmp_path).keys() == {"out.csv", "out.csv.rejects.jsonl"}
    assert target.read_bytes() == before


def test_a_journal_is_read_whatever_stands_in_it(tmp_path, recommender, monkeypatch):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows = [
        {"user_id": "a\u2028b", "history": 3},
        {"history": 7, "name": "\ud83d"},
        {"user_id": "\ud83d", "history": []},
    ]
    rows += [{"user_id": "c", "history": ["1"]}] * 3
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    folder = parts_of(recommender, source, target, monkeypatch)
    with (folder / "journal.jsonl").open("ab") as stream:
        stream.write('{"answered": "ä'.encode()[:-1])  # torn inside a character
    summary = recommend_file(recommender, Job(source, target, chunk=4), k=2)
    assert (summary.answered, summary.rejected, summary.here) == (3, 3, 0)
    refused = [json.loads(line) for line in summary.rejects.read_text(encoding="utf-8").split("\n") if line]
    assert refused[1]["row"]["name"] == "\ud83d"
    assert "has half of a character" in refused[2]["reason"]


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_a_shard_without_an_answer_is_a_table_without_rows(suffix, tmp_path, recommender):
    source = tmp_path / "in.jsonl"
    source.write_text('{"history": 3}\n{"history": ["1"]}\n', encoding="utf-8")
    empty, full = (tmp_path / f"{part}{suffix}" for part in (1, 2))
    for part, target in enumerate((empty, full), start=1):
        recommend_file(recommender, Job(source, target, shard=(part, 2)), k=2)
    assert read(full).height == 2
    if suffix != ".jsonl":
        assert read(empty).columns == read(full).columns
        assert read(empty).height == 0


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_shards_together_are_the_whole(count, tmp_path, recommender):
    source = many(tmp_path / "in.jsonl")
    recommend_file(recommender, Job(source, tmp_path / "whole.jsonl", chunk=4), k=2)
    shards = [tmp_path / f"{part}.jsonl" for part in range(1, count + 1)]
    for part, target in enumerate(shards, start=1):
        recommend_file(recommender, Job(source, target, chunk=4, shard=(part, count)), k=2)
    together = pl.concat([read(target) for target in shards])
    assert_frame_equal(together, read(tmp_path / "whole.jsonl"), check_exact=False)
    with pytest.raises(RecllmError, match="shard 4/3: give I/N"):
        recommend_file(recommender, Job(source, tmp_path / "4.jsonl", shard=(4, 3)), k=2)


def test_where_memory_does_not_suffice_half_the_rows_are_tried(tmp_path, recommender, monkeypatch):
    source, target = many(tmp_path / "in.jsonl"), tmp_path / "out.jsonl"
    recommend_file(recommender, Job(source, tmp_path / "whole.jsonl"), k=2)
    asked, answer = [], recommender.recommend

    def small(histories, k, **keys):
        asked.append(len(histories))
        if len(histories) > 6:
            raise MemoryError
        return answer(histories, k, **keys)

    monkeypatch.setattr(recommender, "recommend", small)
    recommend_file(recommender, Job(source, target), k=2)
    assert asked == [20, 10, 5, 5, 10, 5, 5]
    assert read(target)["item_id"].to_list() == read(tmp_path / "whole.jsonl")["item_id"].to_list()
    monkeypatch.setattr(recommender, "recommend", no_memory)
    with pytest.raises(RecllmError, match="Memory does not suffice for line 1 alone"):
        recommend_file(recommender, Job(source, tmp_path / "none.jsonl"), k=2)


def test_candidates_of_each_row_get_their_scores(tmp_path, recommender):
    source = tmp_path / "in.jsonl"
    rows = [
        {"user_id": "a", "history": ["0", "2"], "candidates": ["4", "5"]},
        {"user_id": "b", "history": ["1"], "candidates": ["5", "x", 9]},
        {"user_id": "c", "history": ["1"]},
        {"user_id": "d", "history": ["1"], "candidates": ["x"]},
    ]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    summary = score_file(recommender, Job(source, tmp_path / "out.parquet"))
    found = read(tmp_path / "out.parquet")
    assert found.select("user_id", "item_id").rows() == [("a", "4"), ("a", "5"), ("b", "5"), ("b", "9")]
    expected = recommender.score([["0", "2"], ["1"]], ["4", "5", "9"])[0]
    np.testing.assert_allclose(found["score"], expected[[0, 0, 1, 1], [0, 1, 1, 2]], rtol=1e-5)
    assert (summary.rejected, summary.unknown) == (2, 1)


class Lengths:
    """Scores by the history's length; knows nothing of an empty one."""

    def score(self, queries, candidates):
        rows = [len(query.history) or np.nan for query in queries]
        return np.array(rows, dtype=np.float32)[:, None] + np.arange(len(candidates), dtype=np.float32)


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".csv"])
def test_any_scorer_scores_all_items_and_users_it_knows_nothing_of_are_set_aside(suffix, tmp_path):
    rows = {"a": ["0", "1"], "b": [], "c": ["x"]}
    source, target = write(tmp_path / "in.jsonl", rows), tmp_path / f"out{suffix}"
    summary = score_items_file(Lengths(), ItemIndex(["n1", "n2"]), ItemIndex(["0", "1"]), Job(source, target))
    assert read(target).rows() == [("a", "n1", 2.0), ("a", "n2", 3.0)]
    assert summary.rejected == 2
    assert "no item of the history is known" in batch.rejects_of(target).read_text(encoding="utf-8")


def test_a_ranker_sets_aside_whom_it_knows_nothing_of(tmp_path):
    class Ranks:
        def score_lists(self, queries, items):
            return [np.full(len(own), len(query.history)) for query, own in zip(queries, items, strict=True)]

    source = tmp_path / "in.jsonl"
    rows = [{"user_id": user, "history": own, "candidates": ["1"]} for user, own in {"a": ["0"], "b": []}.items()]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    summary = rank_file(Ranks(), ItemIndex(["0", "1"]), Job(source, tmp_path / "out.csv"))
    assert read(tmp_path / "out.csv").rows() == [("a", "1", 1.0)]
    assert summary.rejected == 1


def test_progress_says_how_many_how_fast_and_how_long(tmp_path, recommender, monkeypatch):
    monkeypatch.setattr(batch, "EVERY", 0.0)
    source, lines = write(tmp_path / "in.csv", HISTORIES), []
    recommend_file(recommender, Job(source, tmp_path / "out.csv", say=lines.append, chunk=2), k=1)
    assert len(lines) == 2
    assert lines[0].startswith("2 of 4 users, ")
    assert lines[0].endswith(" s left")
    assert "users/s" in lines[0]


def test_the_input_is_not_written_over(recommender, tmp_path):
    source = write(tmp_path / "in.jsonl", {"a": ["0", "1"]})
    before = source.read_bytes()
    with pytest.raises(RecllmError, match=r"in\.jsonl' is itself read here; name another file"):
        recommend_file(recommender, Job(source, source, overwrite=True), k=2)
    assert source.read_bytes() == before


def test_the_rejects_that_are_mended_are_not_taken_away(recommender, tmp_path):
    source = write(tmp_path / "out.csv.rejects.jsonl", {"a": ["0", "1"]})
    before = source.read_bytes()
    with pytest.raises(RecllmError, match=r"is where the rows of '.*out\.csv' go that cannot be answered\. Rename one"):
        recommend_file(recommender, Job(source, tmp_path / "out.csv"), k=2)
    assert source.read_bytes() == before


def test_answers_do_not_go_into_a_bundle_nor_where_nothing_can_lie(recommender, tiny_bundle, tmp_path):
    source = write(tmp_path / "in.jsonl", {"a": ["0", "1"]})
    with pytest.raises(RecllmError, match=r"would lie in a bundle, which holds its own files only"):
        recommend_file(recommender, Job(source, tiny_bundle / "out.csv"), k=2)
    with pytest.raises(RecllmError, match=r"would lie in a bundle, which holds its own files only"):
        recommend_file(recommender, Job(source, tiny_bundle / "answers" / "today" / "out.csv"), k=2)
    with pytest.raises(RecllmError, match=r"cannot be written: (Not a directory|File exists)\. Name another place"):
        recommend_file(recommender, Job(source, source / "out.csv"), k=2)


def test_the_next_part_is_made_while_one_is_used_and_no_more_than_that():
    made = [threading.Event() for _ in range(4)]

    def parts():
        for number, event in enumerate(made):
            event.set()
            yield number

    for number in ahead(parts()):
        if number < 3:
            assert made[number + 1].wait(timeout=60)
        assert not any(event.is_set() for event in made[number + 2 :])


def test_a_part_that_cannot_be_made_is_told_in_its_place():
    def parts():
        yield 1
        raise RecllmError("torn")

    used = []
    with pytest.raises(RecllmError, match="torn"):
        used.extend(ahead(parts()))
    assert used == [1]
    assert list(ahead(iter([]))) == []


def test_a_part_that_cannot_be_used_leaves_no_thread():
    parts = ahead(iter(range(9)))
    assert next(parts) == 0
    parts.close()
    assert not any(thread.name.startswith("read-ahead") for thread in threading.enumerate())


def test_a_job_of_other_parts_or_ratings_is_another_job(tmp_path):
    write(tmp_path / "in.jsonl", {"u": ["1"]})

    def identity(rating, **keys):
        histories = {"u": Query(("1",), "u", (rating,))}
        return Job(tmp_path / "in.jsonl", tmp_path / "out.csv", histories, **keys).identity()

    assert identity(5.0) == identity(5.0)
    assert identity(5.0) != identity(1.0)
    assert identity(5.0, chunk=2) != identity(5.0, chunk=3)


def test_a_job_with_seen_items_does_not_go_on_without_them(tmp_path, recommender, monkeypatch):
    job = Job(many(tmp_path / "in.jsonl"), tmp_path / "out.csv", chunk=4)
    monkeypatch.setattr(recommender, "recommend", once_only(recommender.recommend))
    with pytest.raises(RuntimeError):
        recommend_file(recommender, job, k=2, exclude_seen=True)
    with pytest.raises(RecllmError, match="what differs: exclude_seen"):
        recommend_file(recommender, job, k=2, exclude_seen=False)


def test_the_first_reason_is_known_to_who_goes_on(tmp_path):
    begun = Parts(tmp_path / "out.csv", {"a": 1}, overwrite=False)
    begun.add(None, [{"line": 7, "reason": "bad", "row": {}}], Counts(rejected=1))
    begun.close()
    again = Parts(tmp_path / "out.csv", {"a": 1}, overwrite=False)
    assert again.first == "line 7: bad"
    again.close()


def test_rows_that_are_named_by_their_lines_are_counted(tmp_path, recommender):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.csv"
    source.write_text('{"email": "a@x.de", "history": ["0"]}\n{"user_id": "b", "history": ["0"]}\n', encoding="utf-8")
    summary = recommend_file(recommender, Job(source, target), k=1)
    assert summary.nameless == 1
    assert "1 rows have no column 'user_id', or nothing in it, and are named by their lines" in summary.lines(target)[1]

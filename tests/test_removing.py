"""Items that no list has any more: as if left out of the list of the whole catalogue, and they come back."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest

import recllm
from recllm.bundle import read_manifest
from recllm.cli import main
from recllm.errors import RecllmError
from recllm.growing import add_items
from recllm.ranker import TwoStage
from recllm.removing import item_ids, remove_items
from recllm.runtime import MOST_BARRED

HISTORIES = [["0", "2", "4"], ["1"], [], ["3", "5", "7", "9"]]


@pytest.fixture
def bundle(tiny_bundle, tmp_path):
    return shutil.copytree(tiny_bundle, tmp_path / "bundle")


def says(capsys, *words):
    with pytest.raises(SystemExit) as left:
        main([str(word) for word in words])
    return left.value.code, capsys.readouterr()


def kept(found, gone, k):
    """Lists and scores without some items, the first k."""
    ids = [[item for item in line if item not in gone][:k] for line in found.ids]
    scores = [
        [score for item, score in zip(line, own, strict=False) if item not in gone][:k]
        for line, own in zip(found.ids, found.scores.tolist(), strict=True)
    ]
    return ids, scores


@pytest.mark.parametrize("index", ["exact", "int8"])
@pytest.mark.parametrize("new_items", [0, 2])
def test_lists_are_those_of_the_whole_catalogue_without_what_is_left_out(index, new_items, tiny_bundle):
    whole = recllm.load(tiny_bundle, index=index)
    if new_items:
        whole.check_k(5, 0)
        try:
            whole.check_k(5, new_items)
        except RecllmError:
            pytest.skip("the fusion tells new items not apart")
    gone = {"0", "7", *whole.recommend([[]], k=3).ids[0]}
    rest = whole.restricted(without=gone)
    found = rest.recommend(HISTORIES, k=6, new_items=new_items)
    assert not any(gone & set(line) for line in found.ids)
    if not new_items:
        ids, scores = kept(whole.recommend(HISTORIES, k=12), gone, 6)
        assert found.ids == ids
        assert found.scores == pytest.approx(np.array(scores), abs=1e-5)
    assert rest.restricted(without=["9"]).left_out == gone | {"9"}  # what is left out stays so
    only = whole.restricted(only=set(whole.index.ids) - gone)
    assert only.recommend(HISTORIES, k=6, new_items=new_items).ids == found.ids


def test_what_is_left_out_still_counts_in_histories_and_has_its_scores(tiny_bundle):
    whole = recllm.load(tiny_bundle)
    rest = whole.restricted(without=["0", "2"])
    with_them, without = rest.recommend([["0", "2"], []], k=3).scores
    assert not np.allclose(with_them, without)
    assert rest.score([["4"]], ["0", "6"])[0] == pytest.approx(whole.score([["4"]], ["0", "6"])[0])


def test_as_many_as_are_left_can_be_asked_for(tiny_bundle):
    whole = recllm.load(tiny_bundle)
    rest = whole.restricted(only=["1", "2", "no such item"])
    assert rest.most == 2
    assert [sorted(line) for line in rest.recommend([["0"], ["1"]], k=2).ids] == [["1", "2"], ["2"]]
    with pytest.raises(RecllmError, match=r"k=3 is not possible: .* of which 22 are left out. Take 1 to 2"):
        rest.recommend([["0"]], k=3)
    with pytest.raises(RecllmError, match="No item of the catalogue would be left"):
        whole.restricted(only=["no such item"])
    with pytest.raises(RecllmError, match="these are the text 'abc'"):
        whole.restricted(without="abc")


def test_a_ranker_behind_it_judges_what_is_left(tiny_bundle):
    whole = recllm.load(tiny_bundle)
    judged = []

    def score_lists(queries, items, *_, **__):
        judged.extend(items)
        return [np.zeros(len(own), dtype=np.float32) for own in items]

    ranker = SimpleNamespace(score_lists=score_lists)
    rest = TwoStage(whole.restricted(only=["1", "2", "3"]), ranker, top=100)
    assert all(set(line) <= {"1", "2", "3"} for line in rest.recommend([["0"], ["5"]], k=2).ids)
    assert {item for own in judged for item in own} == {"1", "2", "3"}


def test_an_index_goes_with_so_many(tiny_bundle, monkeypatch):
    monkeypatch.setattr("recllm.runtime.MOST_BARRED", 2)
    assert MOST_BARRED > 2
    recllm.load(tiny_bundle).restricted(without=["1", "2", "3"])
    with pytest.raises(
        RecllmError, match=r"3 items are left out of all lists, .* Leave it out, or export without them"
    ):
        recllm.load(tiny_bundle, index="int8").restricted(without=["1", "2", "3"])


def test_items_are_removed_from_a_bundle_and_come_back(bundle, tmp_path, capsys):
    gone, again = tmp_path / "gone.txt", tmp_path / "again.csv"
    gone.write_text("0\n7\n\nno such item\n7\n", encoding="utf-8")
    before = recllm.load(bundle).recommend(HISTORIES, k=12)
    code, said = says(capsys, "items", "remove", bundle, gone)
    assert (code, "2 items are in no list" in said.out, "1 ids that the bundle has not" in said.err) == (0, True, True)
    assert read_manifest(bundle)["removed"] == ["0", "7"]
    ids, _ = kept(before, {"0", "7"}, 5)
    assert recllm.load(bundle).recommend(HISTORIES, k=5).ids == ids
    code, said = says(capsys, "recommend", bundle, "--history", "0 2", "-k", "24")
    assert code == 2
    assert "of which 2 are left out" in said.err
    with pytest.raises(RecllmError, match=r"has no item that lists of .* may have"):
        remove_items(bundle, gone)
    again.write_text("item_id,title,genres\n7,Blue film 7,Comedy\n77,Blue film 77,Comedy\n1,x,y\n", encoding="utf-8")
    lines = []
    assert add_items(bundle, again, bundle, say=lines.append) == 2
    assert any("1 items were removed, and are recommended again" in line for line in lines)
    assert any("1 items are in the bundle already" in line for line in lines)
    grown = recllm.load(bundle)
    assert grown.left_out == {"0"}
    assert "77" in grown.index
    again.write_text("item_id,title\n0,Red film 0\n", encoding="utf-8")
    assert add_items(bundle, again, bundle) == 1  # nothing new, and one that comes back
    assert recllm.load(bundle).left_out == frozenset()


def test_a_batch_leaves_out_what_a_file_says_and_is_another_job_then(bundle, tmp_path, capsys):
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    rows.write_text("".join(json.dumps({"user_id": str(n), "history": own}) + "\n" for n, own in enumerate(HISTORIES)))
    gone = tmp_path / "gone.parquet"
    pl.DataFrame({"item_id": [0, 7, 11]}).write_parquet(gone)
    stock = tmp_path / "stock.csv"
    stock.write_text("sku,price\n" + "".join(f"{item},1\n" for item in range(9)), encoding="utf-8")
    code, _ = says(capsys, "recommend", bundle, rows, "--out", out, "-k", "4", "--without", gone, "--only", stock)
    assert code == 0
    listed = [json.loads(line) for line in out.read_text().splitlines()]
    assert {row["item_id"] for row in listed} <= {"1", "2", "3", "4", "5", "6", "8"}
    assert len(listed) == 4 * len(HISTORIES)


def test_files_of_ids(tmp_path):
    path = tmp_path / "jobs.csv"
    path.write_text("job,titel\n 7 ,Koch\n8,Arzt\n7,Koch\n,\n", encoding="utf-8")
    with pytest.raises(RecllmError, match=r"has no column for 'item_id'. Its columns: job, titel"):
        item_ids(path, {})
    assert item_ids(path, {"item_columns": {"item_id": "job", "title": "titel"}}) == ["7", "8"]
    assert item_ids(path, {}, {"item_id": "job"}) == ["7", "8"]
    (tmp_path / "none.txt").write_text("\n \n", encoding="utf-8")
    with pytest.raises(RecllmError, match=r"none.txt' has no item id"):
        item_ids(tmp_path / "none.txt", {})
    with pytest.raises(RecllmError, match="cannot be read"):
        item_ids(tmp_path / "gone.txt", {})


def test_all_items_of_a_bundle_cannot_be_removed(bundle, tmp_path):
    path = tmp_path / "all.txt"
    path.write_text("\n".join(recllm.load(bundle).index.ids), encoding="utf-8")
    with pytest.raises(RecllmError, match=r"has all items that lists of .* may have; nothing was changed"):
        remove_items(bundle, path)
    assert "removed" not in read_manifest(bundle)

"""Scoring: when a fusion is fitted anew, and which validation rows the weights of new items are fitted on."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from recllm import scoring
from recllm.collaborative import load_collaborative
from recllm.data import Query
from recllm.errors import RecllmError
from recllm.files import read_json, write_json
from recllm.fusion import Fusion
from recllm.runs import ENVIRONMENT, load_run
from recllm.splits import Example
from recllm.tasks import prepare
from recllm.weighing import FusionSettings


def test_new_items_are_fitted_on_so_many_rows_and_no_more_than_memory_has_room_for(monkeypatch):
    assert len(scoring._some_rows(100, 50, SimpleNamespace(fusion=FusionSettings(queries=8), seed=0))) == 8
    run = SimpleNamespace(fusion=FusionSettings(new_queries=30, choosing=5), seed=0)
    rows = scoring._some_rows(100, 50, run)
    assert len(rows) == len(set(rows.tolist())) == 30
    assert np.array_equal(rows, np.sort(rows))
    assert rows.max() < 100
    assert len(scoring._some_rows(20, 50, run)) == 20
    monkeypatch.setattr(scoring, "NEW_ITEM_SCORES", 500)
    assert len(scoring._some_rows(100, 50, run)) == 10


def test_a_fusion_that_was_fitted_before_keys_came_to_its_settings_is_kept(tmp_path, monkeypatch):
    """`new_queries` is younger than some runs, whose folders spell out what they were fitted with."""

    def scores(*_):
        raise AssertionError("fitted anew")

    monkeypatch.setattr(scoring, "known_scores", scores)
    before = {"queries": 2000, "l2": 0.001, "drop": 0.1}
    (tmp_path / "fusion.json").write_text("{}")
    (tmp_path / "fusion-settings.json").write_text(json.dumps(before))
    run = SimpleNamespace(folder=tmp_path, fusion=FusionSettings(**before))
    scoring.fit_fusion(run, None, None, print)
    for other in ({"l2": 0.01}, {"new_queries": 30}):
        run.fusion = FusionSettings(**before | other)
        with pytest.raises(AssertionError, match="fitted anew"):
            scoring.fit_fusion(run, None, None, print)


def test_scores_of_other_rows_are_not_paired_with_these(tiny_run, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "run")
    run = load_run(tmp_path / "run")
    task = prepare(run)
    parts = load_collaborative(run, task)
    path = run.folder / "scores" / "mf.npy"
    whole = np.load(path)
    np.save(path, whole[5:])
    scores = scoring.known_scores(run, task, parts, lambda _: None)
    assert np.array_equal(np.concatenate([scores["valid"]["mf"], scores["test"]["mf"]]), whole)


def test_what_has_to_be_scored_anew_is_scored_over_the_very_same_weights(tiny_run, tmp_path):
    run = load_run(shutil.copytree(tiny_run, tmp_path / "run"))
    task = prepare(run)
    parts = load_collaborative(run, task)
    facts = read_json(run.folder / ENVIRONMENT)
    write_json(run.folder / ENVIRONMENT, facts | {"models": dict.fromkeys(facts["models"], "0" * 16)})
    scoring.known_scores(run, task, parts, pytest.fail)  # all are there
    (run.folder / "scores" / "mf.npy").unlink()
    with pytest.raises(RecllmError, match=r"has other weights now .* was trained over"):
        scoring.known_scores(run, task, parts, lambda _: None)


def test_scores_are_written_in_the_order_of_the_rows_whatever_block_they_are_in(tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "QUERY_BATCH", 3)
    monkeypatch.setattr(scoring, "BLOCK_SCORES", 1)
    protocol = SimpleNamespace(
        shape=lambda rows: (rows, 2), score=lambda _, rows: np.array([[row, -row] for row in rows])
    )
    valid, test = list(range(7)), list(range(100, 111))
    scoring._write_scores(protocol, None, valid, test, tmp_path / "scores.npy")
    assert np.load(tmp_path / "scores.npy").tolist() == [[row, -row] for row in [*valid, *test]]


def test_where_memory_is_out_fewer_rows_are_scored_at_once_and_none_is_lost(tmp_path):
    asked = []

    def score(_, rows):
        asked.append(len(rows))
        if len(rows) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return np.array([[row, -row] for row in rows], dtype=np.float32)

    protocol, rows = SimpleNamespace(shape=lambda rows: (rows, 2), score=score), list(range(23))
    fits = 6
    scoring._write_scores(protocol, None, rows[:12], rows[12:], tmp_path / "scores.npy")
    assert np.load(tmp_path / "scores.npy")[:, 0].tolist() == rows
    assert asked == [23, 11, 5, 5, 5, 5, 3]
    fits = 0
    with pytest.raises(torch.OutOfMemoryError):
        scoring._write_scores(protocol, None, rows[:12], rows[12:], tmp_path / "none.npy")


def test_the_fusion_beside_is_of_all_scorers_but_the_language_model(tiny_run):
    whole, beside = (set(Fusion.load(tiny_run / name).names) for name in ("fusion.json", "fusion-without-lm.json"))
    assert "lm" in whole
    assert "light" in beside
    assert "lm" not in beside


def test_what_a_new_fusion_leaves_behind_is_said(tiny_run, tmp_path):
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    for name in ("evaluation.json", "report.html"):
        (folder / name).touch()
    (folder / "bundle-int8").mkdir(exist_ok=True)
    run = load_run(folder, ["fusion.kinds=['plain sum']"])
    task = prepare(run)
    said = []
    scoring.fit_fusion(run, task, load_collaborative(run, task), said.append)
    before = list(FusionSettings().kinds)
    assert f"The fusion is fitted anew, with another fusion.kinds ({before} before)" in said
    (removed,) = (line for line in said if line.startswith("Removed, for it tells of the fusion before: "))
    assert {"evaluation.json", "report.html"} <= set(removed.partition(": ")[2].split(", "))
    assert not list(folder.glob("evaluation*"))
    (left,) = (line for line in said if line.startswith("The fusion before is still that of "))
    assert "bundle-int8" in left
    fusions = [Fusion.load(folder / f"fusion{kind}.json") for kind in ("", "-without-lm")]
    best = [f"'plain sum', the best by NDCG@10 on validation: {own.candidates['plain sum']:.4f}" for own in fusions]
    assert said[-2:] == [f"The fusion is {best[0]}", f"Without 'lm' it is {best[1]}"]
    said.clear()
    scoring.fit_fusion(run, task, load_collaborative(run, task), said.append)
    assert said == []


def test_a_kill_while_a_fusion_is_fitted_anew_leaves_none_that_is_taken_for_done(tiny_run, tmp_path, monkeypatch):
    shutil.copytree(tiny_run, tmp_path / "run")
    before = load_run(tmp_path / "run")
    task = prepare(before)
    parts = load_collaborative(before, task)
    scoring.fit_fusion(before, task, parts, lambda _: None)
    files = [before.folder / name for name in ("fusion.json", "fusion-without-lm.json", "fusion-settings.json")]
    wanted = [path.read_bytes() for path in files]
    save, killed = Fusion.save, []

    def stop(fusion, path):
        save(fusion, path)
        killed.append(path.name)
        raise KeyboardInterrupt

    monkeypatch.setattr(Fusion, "save", stop)
    other = load_run(tmp_path / "run", ["fusion.kinds=['plain sum']"])
    with pytest.raises(KeyboardInterrupt):
        scoring.fit_fusion(other, task, parts, lambda _: None)
    assert killed == ["fusion-without-lm.json"]
    monkeypatch.setattr(Fusion, "save", save)
    scoring.fit_fusion(before, task, parts, lambda _: None)  # as it was asked for first
    assert [path.read_bytes() for path in files] == wanted


def test_the_rows_of_new_items_are_drawn_by_the_seed():
    first, again, other = (
        scoring._some_rows(100, 1, SimpleNamespace(fusion=FusionSettings(new_queries=30), seed=seed)).tolist()
        for seed in (0, 0, 1)
    )
    assert first == again != other


@pytest.fixture
def as_new(tmp_path, monkeypatch):
    """Scores as if all items were new, of so many examples; and for how many rows scorers were asked."""
    asked = []
    (tmp_path / "scores").mkdir()
    monkeypatch.setattr(scoring, "scorer_makers", lambda *_: {"mf": lambda: None})
    monkeypatch.setattr(
        scoring, "score_as_new", lambda _, queries, __: asked.append(len(queries)) or np.ones((len(queries), 3))
    )

    def scores(count, task="next_item", share=0.5):
        run = SimpleNamespace(
            folder=tmp_path, model=SimpleNamespace(task=task), fusion=FusionSettings(new_share=share), seed=0
        )
        examples = [SimpleNamespace(query=None)] * count
        return scoring._scores_as_new(run, SimpleNamespace(index=None), None, examples, lambda _: None)

    return scores, asked


def test_scores_as_new_are_kept_by_their_number_of_rows(as_new):
    scores, asked = as_new
    for count in (5, 5, 8, 5):
        assert scores(count)["mf"].shape == (count, 3)
    assert asked == [5, 8]


def test_scores_as_new_are_of_next_items_that_may_be_new(as_new):
    scores, asked = as_new
    assert scores(5, share=0.0) == {}
    assert scores(5, task="relevance") == {}
    assert asked == []


@pytest.mark.parametrize("sampled", [False, True])
def test_kept_scores_of_other_rows_are_made_again(sampled, tmp_path):
    rows = [Example(Query(("1",), "u"), "2", 1.0), Example(Query(("1", "2"), "u"), "3", 0.0)]

    def kept(rows):
        scoring._without_other_rows(tmp_path, rows, sampled=sampled)
        return (tmp_path / "mf.npy").exists()

    np.save(tmp_path / "mf.npy", np.zeros(2))
    assert kept(rows) is not sampled  # without a note: sampled rows were others before there was one
    np.save(tmp_path / "mf.npy", np.zeros(2))
    assert kept(rows)
    (tmp_path / "rows.json").write_text("{", encoding="utf-8")
    assert not kept(rows)
    np.save(tmp_path / "mf.npy", np.zeros(2))
    assert not kept([rows[0], replace(rows[1], item_id="4")])  # another negative under the same score

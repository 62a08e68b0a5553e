"""The outcome of a run: every scorer and the fusions on the same rows, by figures that can be counted."""

import shutil
from dataclasses import replace

import numpy as np
import pytest

from recllm.collaborative import load_collaborative
from recllm.files import read_json
from recllm.fusion import Fusion
from recllm.outcome import FUSION, WITHOUT_LM, evaluate_run, learning_curves, save_evaluation
from recllm.ranking import mask_seen
from recllm.results import Table
from recllm.runreport import run_report
from recllm.runs import load_run
from recllm.scoring import fit_fusion, known_scores
from recllm.tasks import prepare


@pytest.fixture(scope="module")
def outcome(tiny_run):
    run = load_run(tiny_run)
    task = prepare(run)
    scores = known_scores(run, task, load_collaborative(run, task), lambda _: None)
    return run, task, scores, {part: evaluate_run(run, task, scores[part], part=part) for part in scores}


def test_every_scorer_and_both_fusions_stand_in_the_table(outcome):
    _, task, scores, tables = outcome
    for part, table in tables.items():
        assert set(table.scorers) == {
            "popularity",
            "mf",
            "ease",
            "transitions",
            "text",
            "neighbours",
            "expected_popularity",
            "light",
            "lm",
            FUSION,
            WITHOUT_LM,
        }
        assert all(value.shape == (40, len(task.index)) for value in scores[part].values())


@pytest.mark.parametrize("part", ["valid", "test"])
@pytest.mark.parametrize("scorer", ["popularity", "ease", "light"])
def test_the_hit_rate_can_be_counted(part, scorer, outcome):
    _, task, scores, tables = outcome
    examples = task.split.valid if part == "valid" else task.split.test
    masked = mask_seen(np.asarray(scores[part][scorer]), [example.query for example in examples], task.index)
    targets = task.index.rows(example.item_id for example in examples)
    own = masked[np.arange(len(targets)), targets][:, None]
    better, tied = (masked > own).sum(1), (masked == own).sum(1)
    hits = np.clip((10 - better) / tied, 0, 1)  # the chance under random ties
    assert tables[part].interval(scorer, "HitRate@10")[0] == pytest.approx(hits.mean())


def test_on_validation_the_fusion_is_not_below_its_parts(outcome):
    _, _, _, tables = outcome
    figures = {scorer: tables["valid"].interval(scorer, "NDCG@10")[0] for scorer in tables["valid"].scorers}
    assert figures[FUSION] == pytest.approx(max(figures.values()))
    parts = [value for scorer, value in figures.items() if scorer not in {FUSION, WITHOUT_LM, "lm"}]
    assert figures[WITHOUT_LM] >= max(parts) - 1e-9


def test_the_models_that_read_the_order_know_what_comes_next(outcome):
    _, _, _, tables = outcome
    for part in ("valid", "test"):
        for scorer, least in (("light", 0.95), ("lm", 0.8), (FUSION, 0.95)):
            assert tables[part].interval(scorer, "NDCG@10")[0] >= least


def test_scores_are_kept_and_not_computed_again(outcome, monkeypatch):
    run, task, scores, _ = outcome
    monkeypatch.setattr("recllm.scoring.load_language", lambda *_: pytest.fail("the language model was loaded again"))
    again = known_scores(run, task, load_collaborative(run, task), pytest.fail)
    assert np.array_equal(again["test"]["lm"], scores["test"]["lm"])


def test_what_is_damaged_of_scores_and_fusion_is_made_again(outcome, tmp_path):
    run, task, scores, _ = outcome
    shutil.copytree(run.folder, tmp_path / run.folder.name)
    copied = run.model_copy(update={"output": str(tmp_path)})
    before = (copied.folder / "fusion.json").read_bytes()
    (copied.folder / "fusion.json").write_bytes(before[:50])
    path = copied.folder / "scores" / "ease.npy"
    path.write_bytes(path.read_bytes()[:10])
    parts = load_collaborative(copied, task)
    fit_fusion(copied, task, parts, lambda _: None)
    assert (copied.folder / "fusion.json").read_bytes() == before
    assert np.array_equal(known_scores(copied, task, parts, pytest.fail)["test"]["ease"], scores["test"]["ease"])


def test_tables_of_both_parts_are_kept_beside_each_other(outcome, tmp_path):
    run, _, _, tables = outcome
    copied = run.model_copy(update={"output": str(tmp_path)})
    save_evaluation(copied, {"valid": tables["valid"]})
    path = save_evaluation(copied, {"test": tables["test"]})
    found = read_json(path)
    assert set(found) == {"valid", "test"}
    assert {row["scorer"] for row in found["test"]["rows"]} == set(tables["test"].scorers)


def test_the_page_of_a_fusion_in_levels_says_who_speaks_first(outcome, tmp_path):
    run, task, _, tables = outcome
    assert run_report(run, task, tables["test"]).weights_by_user
    folder = shutil.copytree(run.folder, tmp_path / run.name)
    fusion = Fusion.load(folder / "fusion.json")
    first, second = fusion.names[-1], fusion.names[-2]
    levels = tuple(reversed(range(len(fusion.names))))
    replace(fusion, levels=levels, chosen="levels").save(folder / "fusion.json")
    report = run_report(load_run(folder), task, tables["test"])
    assert not report.weights_by_user
    assert not report.weights_by_item
    told = f"levels (chosen on validation): each scorer only where those before it are silent, {first}; then {second}"
    assert report.facts["Fusion"].startswith(told)


def test_the_page_says_of_what_its_figures_are(outcome):
    run, task, _, tables = outcome
    report = run_report(run, task, tables["test"])
    assert report.facts["Measured on"] == "40 rows of 40 users: the test rows"
    assert report.title == f"recllm: {run.name}"
    assert not {"Control", "Likelihood by"} & set(report.facts)
    assert not report.slices
    told = {
        "control": run.control.model_copy(update={"language_model": "random"}),
        "model": run.model.model_copy(update={"likelihood": "some-model"}),
    }
    cold = replace(tables["test"], counts=tables["test"].counts | {"cold item": (12, 7)})
    whole = cold.values | {(name, metric, "cold item"): 0.5 for name, metric, _ in cold.values}
    report = run_report(run.model_copy(update=told), task, replace(cold, values=whole, draws={}))
    assert report.facts["Control"] == "control.language_model = random: not for use"
    assert report.facts["Likelihood by"] == "some-model"
    assert list(report.slices) == ["cold item: 12 rows of 7 users"]
    assert {row.scorer for row in report.slices["cold item: 12 rows of 7 users"]} == set(cold.scorers)


def test_a_judge_is_said_to_be_measured_against_sampled_items(outcome):
    run, task, _, _ = outcome
    judging = run.model_copy(update={"model": run.model.model_copy(update={"task": "relevance"})})
    nan = {(name, "AUC", "all"): np.nan for name in ("light", "fusion")}
    table = Table(("light", "fusion"), ("AUC",), {"all": (80, 40)}, nan, {})
    report = run_report(judging, task, table)
    told = "80 rows of 40 users: the test rows, half of them sampled items that the user has no event with"
    assert report.facts["Measured on"] == told
    assert report.unknown == {"AUC": "not known, for all these rows have one label"}
    rated = [replace(row, label=float(place % 2)) for place, row in enumerate(task.split.test)]
    labelled = replace(task, split=replace(task.split, valid=rated, test=rated))
    assert run_report(judging, labelled, table).facts["Measured on"] == "80 rows of 40 users: the test rows"


def test_learning_curves(outcome, tmp_path):
    run = outcome[0]
    lines = learning_curves(run)
    assert {line["scorer"] for line in lines} == {"light", "lm"}
    for scorer in ("light", "lm"):
        figures = [line["eval_ndcg@10"] for line in lines if line["scorer"] == scorer and "eval_ndcg@10" in line]
        assert len(figures) >= 3
        assert max(figures[1:]) > figures[0]
    copied = run.model_copy(update={"output": str(tmp_path)})
    assert learning_curves(copied) == []
    copied.folder.mkdir()
    shutil.copy(run.folder / "metrics.jsonl", copied.folder)
    assert learning_curves(copied) == lines
    with (copied.folder / "metrics.jsonl").open("a", encoding="utf-8") as stream:
        stream.write('{"scorer": "l')  # cut off
    assert learning_curves(copied) == lines

"""The quality benchmark: pages say what the results say, bars are counted right, references answer as scorers do."""

import argparse
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from recllm.files import write_json
from recllm.outcome import FUSION, WITHOUT_LM
from recllm.results import Table

FOLDER = Path(__file__).parents[1] / "benchmarks"


def load(name):
    """A file of benchmarks/, which is no package."""
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def made(**figures):
    """A table of three draws around each scorer's NDCG@10 and HitRate@10."""
    values = {(name, metric, "all"): value for name, value in figures.items() for metric in ("NDCG@10", "HitRate@10")}
    draws = {key: np.array([value - 0.01, value, value + 0.01]) for key, value in values.items()}
    return Table(tuple(figures), ("HitRate@10", "NDCG@10"), {"all": (9, 9)}, values, draws)


def test_pages_say_what_the_results_say():
    tables = load("tables")
    found = tables.results()
    assert found
    for page in tables.PAGES:
        text = page.read_text(encoding="utf-8")
        assert tables.written(text, found) == text, f"{page.name} is behind; run: python benchmarks/tables.py"
        assert "<!-- table " in text


def test_every_result_says_how_it_was_made():
    for name, result in load("tables").results().items():
        assert result["command"].startswith("recllm bench quality -- "), name
        assert result["versions"]["torch"], name
        assert result["seeds"], name
        assert all({"value", "bar", "holds"} <= bar.keys() for bar in result["bars"].values()), name


def test_a_figure_that_nobody_knows_is_a_dash():
    assert load("tables").figure([None, None, None]) == "–"
    assert load("tables").figure([0.5, None, None]) == ".5000"


def test_other_settings_do_not_take_a_kept_results_name(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr("sys.argv", ["quality", "--data", "ml-100k", "--set", "model.layers=8"])
    with pytest.raises(SystemExit):
        load("quality").arguments()
    assert "name this one by --result" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", [*sys.argv, "--result", "mine"])
    assert load("quality").arguments().result == "mine"


@pytest.mark.parametrize(
    ("words", "missing"),
    [
        (["--seeds", "0", "--lm", "x", "--set", "a=1", "--result", "topk-ml-100k"], "seed 1"),
        (["--seeds", "0", "1", "--lm", "x", "--references", "ref ALS"], "ref EASE, --set a=1"),
        (["--seeds", "0", "1"], "the language model x, --set a=1"),
        (["--seeds", "0", "1", "--lm", "y", "--set", "a=1", "--result", "topk-ml-100k"], "the language model x"),
        (["--seeds", "0", "1", "2", "--lm", "x"], "--set a=1"),
        (["--seeds", "0", "1", "2", "--lm", "x", "--set", "a=1", "--set", "b=2", "--result", "topk-ml-100k"], None),
        (["--seeds", "0", "--result", "mine"], None),
    ],
    ids=str,
)
def test_a_kept_result_is_not_replaced_by_a_lesser_one(words, missing, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(FOLDER))
    quality = load("quality")
    kept = {"seeds": [0, 1], "language_model": "x", "references": [{"ref ALS": {}, "ref EASE": {}}, {}]}
    kept["command"] = "recllm bench quality -- --seeds 0 1 --lm x --set=a=1 --result topk-ml-100k"
    write_json(tmp_path / "topk-ml-100k.json", kept)
    monkeypatch.setattr(quality, "RESULTS", tmp_path)
    monkeypatch.setattr("sys.argv", ["quality", "--data", "ml-100k", *words])
    if missing is None:
        assert quality.arguments().data == "ml-100k"
        return
    with pytest.raises(SystemExit):
        quality.arguments()
    assert f"topk-ml-100k.json is kept with {missing}, which this would not have" in capsys.readouterr().err


def test_a_result_knows_its_commit(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(FOLDER))
    module = load("quality")
    commit = module.commit()
    assert commit is None or commit.removesuffix("-dirty").isalnum()
    script, kept = tmp_path / "benchmarks" / "quality.py", tmp_path / "benchmarks" / "results" / "one.json"
    kept.parent.mkdir(parents=True)
    monkeypatch.setattr(module, "__file__", str(script))
    assert module.commit() is None  # in no repository

    def git(*arguments):
        subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x", *arguments], cwd=tmp_path, check=True)

    git("init", "-q", ".")
    script.write_text("1")
    kept.write_text("1")
    git("add", "-A")
    git("commit", "-qm", "one")
    clean = module.commit()
    kept.write_text("2")
    assert module.commit() == clean
    assert clean.isalnum()
    script.write_text("2")
    assert module.commit() == f"{clean}-dirty"


def test_what_a_language_model_adds_is_of_the_slice_that_is_shown():
    tables = load("tables")
    rows = [{"slice": "all", "scorer": scorer, "NDCG@10": [0.5, 0.4, 0.6]} for scorer in ("lm", "fusion")]
    part = {"metrics": ["NDCG@10"], "rows": rows}
    result = {
        "seeds": [0],
        "tables": {"all": part, "among cold items": part},
        "differences": {
            "all": {"fusion without lm": [0.111, 0.1, 0.12]},
            "among cold items": {"fusion without lm": [0.01, 0.0, 0.02]},
        },
    }
    lines = list(tables.controls({"cold": result, "cold-no-text": result | {"control": "no-text"}}))
    assert len(lines) == 4
    assert all("+0.0100 (+0.0000 … +0.0200)" in line for line in lines[2:])


def test_kept_commands_make_their_own_result():
    for name, result in load("tables").results().items():
        command = result["command"]
        assert "--set" not in command or f"--result {name}" in command, name


def test_an_unknown_result_is_named():
    with pytest.raises(SystemExit, match="There is no result 'nothing'"):
        load("tables").table("nothing", {})


def ranked(control=None, **figures):
    """A kept result of a ranking."""
    rows = [{"scorer": name, "slice": "all", "NDCG@10": [value, None, None]} for name, value in figures.items()]
    tables = {"all": {"metrics": ["HitRate@10", "NDCG@10"], "rows": rows}}
    adds = {"fusion without lm": [0.01, -0.002, 0.03]} if WITHOUT_LM in figures else {}
    return {"protocol": "topk", "seeds": [0], "control": control, "tables": tables, "differences": {"all": adds}}


def test_controls_stand_under_what_they_are_controls_of():
    found = {
        "topk-a": ranked(lm=0.2, light=0.3, **{WITHOUT_LM: 0.3, FUSION: 0.4}),
        "topk-a-no-text": ranked("no-text", light=0.1, fusion=0.2),
        "topk-b-no-text-quick": ranked("no-text", fusion=0.2),
        "topk-c": ranked(fusion=0.2),
        "cold-d-no-text": ranked("no-text", fusion=0.1),
    }
    among = ranked(likelihood=0.5, fusion=0.6)
    for key in ("tables", "differences"):
        found["cold-d-no-text"][key]["among cold items"] = among[key]["all"]
    assert load("tables").table("controls", found)[2:] == [
        "| topk-a | 1 | nothing | .3000 | .2000 | – | .3000 | .4000 | +0.0100 (-0.0020 … +0.0300) |",
        "| topk-a | 1 | no-text | .1000 | – | – | – | .2000 | – |",
        "| topk-b-quick | 1 | no-text | – | – | – | – | .2000 | – |",
        "| cold-d | 1 | no-text | – | – | .5000 | – | .6000 | – |",
    ]


def test_bars_of_a_ranking():
    settings = load("settings")
    given = argparse.Namespace(protocol="topk", data="x-wines-slim", control=None)
    table = made(**{FUSION: 0.24, WITHOUT_LM: 0.23, "lm": 0.2, "ref EASE": 0.2, "ref ALS": 0.1})
    bars = settings.bars(given, {"all": table})
    assert bars["ratio_to_best_reference"] == {"value": 1.2, "bar": 1.1, "holds": True, "best": "ref EASE"}
    assert bars["above_best_reference_low_end"]["holds"]
    assert bars["language_model_contributes_low_end"]["value"] == pytest.approx(0.01)
    low = settings.bars(given, {"all": made(**{FUSION: 0.21, "ref EASE": 0.2})})
    assert not low["ratio_to_best_reference"]["holds"]
    assert "language_model_contributes_low_end" not in low


def test_nothing_is_no_gain_and_no_figure_is_divided_by_nothing():
    settings = load("settings")
    given = argparse.Namespace(protocol="topk", data="x-wines-slim", control=None)
    same = settings.bars(given, {"all": made(**{FUSION: 0.24, WITHOUT_LM: 0.24, "lm": 0.2, "ref EASE": 0.0})})
    assert same["language_model_contributes_low_end"] == {"value": 0.0, "bar": 0.0, "holds": False}
    assert same["ratio_to_best_reference"] == {"value": None, "bar": 1.1, "holds": True, "best": "ref EASE"}
    shown = load("tables").table("bars", {"topk-d": {"bars": same}})
    assert "| topk-d | ratio_to_best_reference | 1.1 | – | yes |" in shown
    nothing = settings.bars(given, {"all": made(**{FUSION: 0.0, "ref EASE": 0.0})})
    assert not nothing["ratio_to_best_reference"]["holds"]


@pytest.mark.parametrize("words", [["--runs", "place"], ["--runs=place"]], ids=str)
def test_the_kept_command_does_not_say_where_the_runs_are(words, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr("sys.argv", ["quality", "--data", "ml-100k", *words, "--seeds", "0"])
    assert load("quality").command() == "recllm bench quality -- --data ml-100k --seeds 0"


def test_half_lives_are_the_mean_of_the_seeds():
    seeds = [
        {"mf": {"None": 0.1, "3.0": 0.4, "10.0": 0.2}, "popularity": {}},
        {"mf": {"None": 0.2, "3.0": 0.1, "10.0": 0.4}, "popularity": {}},
    ]
    result = {"protocol": "topk", "data": "d", "half_lives": seeds}
    assert load("tables").table("fading", {"topk-d": result})[2:] == ["| d | mf | .1500 | .3000 | 10 events |"]


def test_bars_of_cold_items_are_against_the_text_cosine():
    settings = load("settings")
    tables = {
        "all": made(**{FUSION: 0.1}),
        "among cold items": made(**{FUSION: 0.3, "text": 0.2, "ref text cosine": 0.1}),
    }
    bars = settings.bars(argparse.Namespace(protocol="cold-item", data="x", control=None), tables)
    assert bars["ratio_to_text_cosine_among_cold_items"] == {"value": 3.0, "bar": 2.0, "holds": True}


def test_bars_of_few_shots_ask_for_users_and_for_the_language_model_alone():
    settings = load("settings")
    values = {(FUSION, "AUC", "all"): 0.77, ("relevance", "AUC", "all"): 0.67}
    values |= {(scorer, "UAUC", "all"): 0.5 for scorer in (FUSION, "relevance")}
    table = Table((FUSION, "relevance"), ("AUC", "UAUC"), {"all": (9, 9)}, values, {})
    given = argparse.Namespace(protocol="few-shot", shots=64, control=None)
    bars = settings.bars(given, {"all": table})
    assert {name: bar["holds"] for name, bar in bars.items()} == {
        "auc": True,
        "uauc": False,
        "language_model_alone": False,
    }


def test_every_protocol_has_a_run():
    from recllm.recipes import parse
    from recllm.runs import Run

    settings = load("settings")
    for name, protocol in settings.PROTOCOLS.items():
        for data in protocol.data:
            for quick in (False, True):
                values = settings.run_values(name, data, "none", quick=quick)
                assert parse(Run, values | {"name": "x"}, "test").data.split == protocol.split
    for name in settings.CONTROLS:
        values = settings.run_values("topk", "ml-100k", "minilm-l6", quick=False, control=name)
        assert parse(Run, values | {"name": "x"}, "test").control.lacking, name
    assert set(settings.FUSIONS) >= set(parse(Run, {"name": "x", "data": {"name": "y"}}, "test").fusion.kinds)


def test_references_are_tuned_on_validation_and_answer_as_scorers(checkerboard_folder, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    references = load("references")
    import sasrec

    from recllm.recipes import parse
    from recllm.runs import LightSettings, Run
    from recllm.tasks import prepare
    from recllm.vectors import RawVectors

    run = parse(Run, {"name": "x", "data": {"name": str(checkerboard_folder)}}, "test")
    task = prepare(run)
    vectors = np.random.default_rng(0).normal(size=(len(task.index), 4)).astype(np.float32)
    monkeypatch.setattr(sasrec, "EPOCHS", 8)
    grids = {name: {key: values[:2] for key, values in grid.items()} for name, grid in references.GRIDS.items()}
    monkeypatch.setattr(references, "GRIDS", grids)
    names, raw = list(references.GRIDS), RawVectors(task.index.ids, vectors)
    found = references.tuned_references(task, raw, 0, names, lambda _: None)
    queries = [example.query for example in task.split.test]
    for name, reference in found.items():
        scores = reference.scorer.score(queries, task.index)
        assert scores.shape == (len(queries), len(task.index)), name
        assert scores.dtype == np.float32, name
        best = max(reference.trials.values())
        chosen = " ".join(f"{key}={value}" for key, value in reference.chosen.items())
        assert reference.trials[chosen] == best, name
    again = references.tuned_references(task, raw, 0, ["ref BPR", "ref SASRec"], lambda _: None)
    for name, reference in again.items():
        same = found[name].scorer.score(queries, task.index)
        assert np.array_equal(reference.scorer.score(queries, task.index), same, equal_nan=True), name
    # Beside a deep light scorer it is tried as deep; its trials of two layers are those that were kept before.
    monkeypatch.setattr(sasrec, "EPOCHS", 1)
    deep = references.tuned_references(task, raw, 0, ["ref SASRec"], lambda _: None, LightSettings(layers=3), tmp_path)
    assert [key.split()[-1] for key in deep["ref SASRec"].trials] == ["layers=2", "layers=3"] * 2
    kept = {path.stem: len(torch.load(path)["model"]) for path in tmp_path.glob("*.pt")}
    sizes = {name: size for name, size in kept.items() if "dropout=0.5" in name}
    assert sorted(name.split()[-1] for name in sizes) == ["batch=32", "layers=3"]
    assert len(set(sizes.values())) == 2


@pytest.mark.parametrize("path", sorted((FOLDER / "results").glob("*.json")), ids=lambda path: path.stem)
def test_results_are_json_without_nan(path):
    json.loads(path.read_text(encoding="utf-8"), parse_constant=pytest.fail)


def test_scores_with_places_for_new_items_rank_as_the_list_does(monkeypatch):
    from recllm.data import Query
    from recllm.ranking import ItemIndex, mask_seen, top_k

    monkeypatch.syspath_prepend(str(FOLDER))
    quality = load("quality")
    rng = np.random.default_rng(0)
    index, new = ItemIndex([*"abcdefghij"]), np.arange(10) >= 7
    fused = rng.normal(size=(20, 10)).astype(np.float32)
    fused[:, 7:] -= 9.0  # new items are behind all others
    fused[rng.random(fused.shape) < 0.1] = np.nan
    queries = [Query((index.ids[row % 7],)) for row in range(20)]
    found = quality.with_places(fused, queries, index, new, k=4, count=2)
    assert np.array_equal(np.isnan(found), np.isnan(fused))
    rows, _ = top_k(mask_seen(found, queries, index), 4)
    known, _ = top_k(mask_seen(fused, queries, index), 4)
    others, _ = top_k(np.where(np.arange(10) >= 7, fused, np.nan), 2)
    for listed, before, kept in zip(rows, known, others, strict=True):
        count = int((kept >= 0).sum())
        assert listed.tolist() == [*before[: 4 - count].tolist(), *kept[:count].tolist()]


def test_sasrec_learns_nothing_of_what_was_chosen_before(checkerboard_folder, monkeypatch):
    """But where items come again: there it has to be found again."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import sasrec

    from recllm.recipes import parse
    from recllm.runs import Run
    from recllm.tasks import prepare

    given = []

    def loss(hidden, weight, bias, targets, barred):
        given.append((len(hidden), barred))
        return hidden.sum(), None

    monkeypatch.setattr(sasrec, "catalogue_loss", loss)
    for rule in ("first", "keep"):
        data = {"name": str(checkerboard_folder), "duplicates": rule}
        task = prepare(parse(Run, {"name": "x", "data": data}, "test"))
        given.clear()
        settings = {"dropout": 0.2, "width": 8, "positions": 4, "batch": 3}
        trial = sasrec.Trial(task, 0, None, settings)
        windows = list(trial.windows.epoch(0))
        trial.epoch()
        queries, barred = given[0]
        expected = [(row, item) for row, item in _seen(windows[:3])] if rule == "first" else []
        assert sorted(zip(barred.rows.tolist(), barred.items.tolist(), strict=True)) == sorted(expected)
        assert queries == sum(len(window) - 1 for window in windows[:3])


def _seen(windows):
    """What each place of some windows, counted through all, has chosen up to it."""
    place = 0
    for window in windows:
        for end in range(1, len(window)):
            yield from ((place, item) for item in window[:end].tolist())
            place += 1


def test_a_killed_sasrec_goes_on_to_the_same_scores(checkerboard_folder, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(FOLDER))
    import sasrec

    from recllm.recipes import parse
    from recllm.runs import Run
    from recllm.tasks import prepare

    task = prepare(parse(Run, {"name": "x", "data": {"name": str(checkerboard_folder)}}, "test"))
    queries = [example.query for example in task.split.test]
    monkeypatch.setattr(sasrec, "EPOCHS", 4)
    calls = 0

    def figure(scorer, *, killed_at=None):
        nonlocal calls
        calls += 1
        if calls == killed_at:
            raise KeyboardInterrupt
        return [0.1, 0.3, 0.2, 0.25][scorer.progress.epochs]

    def trained(folder, **given):
        nonlocal calls
        calls, lines = 0, []
        return sasrec.train_sasrec(
            task, lambda scorer: figure(scorer, **given), 0, lines.append, folder, dropout=0.2, batch=2
        ), lines

    whole, _ = trained(None)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, killed_at=3)
    again, lines = trained(tmp_path)
    assert lines[0] == "ref SASRec: goes on behind epoch 2"
    assert len(lines) == 3
    assert again.progress == whole.progress == sasrec.Progress(4, 0.3, 2)
    expected = whole.score(queries, task.index)
    assert np.array_equal(again.score(queries, task.index), expected, equal_nan=True)
    whole, lines = trained(tmp_path)
    assert lines == ["ref SASRec: goes on behind epoch 4"]  # nothing is left to train
    assert whole.progress.seconds == again.progress.seconds > 0  # and what it took is still known
    monkeypatch.setattr(type(task), "fingerprints", lambda self: {"interactions": "others"})
    _, lines = trained(tmp_path)
    assert len(lines) == 4  # other data: not these weights


def test_the_catalogue_benchmark_calls_what_there_is(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    catalogues = load("catalogues")
    monkeypatch.setattr(catalogues, "ROUNDS", 1)
    monkeypatch.setattr(catalogues, "USERS", (1, 3))
    found = catalogues.growth((300, 400), threads=1)
    assert [(row["items"], row["users"]) for row in found["calls"]] == [(300, 1), (300, 3), (400, 1), (400, 3)]
    assert found["recall"] > 0.9  # all that is listed is nearly all that there is
    assert set(catalogues.search_alone(300, 16, threads=1)) == {"1 users", "3 users"}

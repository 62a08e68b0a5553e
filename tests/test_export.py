"""Export: graphs equal torch, a recipe that breaks its tolerance leaves nothing behind and the others go on."""

import re
import shutil
from dataclasses import replace

import numpy as np
import onnxruntime as ort
import pytest
import torch
from safetensors.numpy import load_file

import recllm
from recllm import export
from recllm.bundle import read_manifest
from recllm.collaborative import load_collaborative
from recllm.data import Query
from recllm.errors import RecllmError
from recllm.export import export_run
from recllm.files import read_json
from recllm.fusion import FusedScorer, Fusion
from recllm.gate import load_recipe
from recllm.lm import load_base, mean_pool
from recllm.metrics import auc
from recllm.parity import GRID, Tolerance, auc_loss, failures_of, fidelity, metric_loss
from recllm.priors import Popularity
from recllm.protocols import evaluation_protocol
from recllm.quantise import quantise
from recllm.ranking import mask_seen, top_k
from recllm.recipes import find_recipe
from recllm.runs import load_run
from recllm.scoring import known_scores
from recllm.tasks import prepare
from recllm.trained import lenders, load_language, load_light, sequence_scorer
from recllm.weightonly import WeightSettings

IMPOSSIBLE = """
precision = "fp16"
opset = 23
[tolerance]
max_difference = 0.0
rank_correlation = 1.1
top10_overlap = 0.5
"""


@pytest.fixture(scope="module")
def loaded(tiny_run):
    """The run, its task and its collaborative parts."""
    run = load_run(tiny_run)
    task = prepare(run)
    return run, task, load_collaborative(run, task)


@pytest.fixture(scope="module")
def models(loaded):
    run, task, parts = loaded
    found = {"light": load_light(run, task, parts.features), "lm": load_language(run, task, parts.features)}
    return {name: (model.eval(), history) for name, (model, history) in found.items()}


@pytest.fixture(scope="module")
def exported(loaded, tiny_run, tiny_bundle, tmp_path_factory):
    """What becomes of all recipes at once; the fp32 graphs are the bundle's, which saves writing them again."""
    place = tmp_path_factory.mktemp("export")
    shutil.copytree(tiny_run, place / "tiny", ignore=shutil.ignore_patterns("bundle-*"))
    impossible = place / "impossible.toml"
    impossible.write_text(IMPOSSIBLE, encoding="utf-8")
    few = place / "few.toml"
    shipped = find_recipe("export", "int4").read_text(encoding="utf-8")
    few.write_text(re.sub("(rank_correlation|top10_overlap) = .*", r"\1 = 0.1", shipped), encoding="utf-8")

    def copied(folder, *_):
        folder.mkdir(parents=True)
        for path in tiny_bundle.glob("*.onnx"):
            if path.name != "catalogue.onnx":
                shutil.copy(path, folder)

    run, said = load_run(place / "tiny", [f"output={place}"]), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "_write_graphs", copied)
        results = export_run(run, loaded[1], [str(impossible), "fp16", "int8", str(few)], say=said.append)
    return run, {result.recipe: result for result in results}, str(impossible), said


def session(path):
    return ort.InferenceSession(path, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("name", ["light", "lm"])
@pytest.mark.parametrize(("rows", "length", "ends"), [(1, 2, 1), (1, 7, 3), (5, 9, 9), (3, 12, 1)])
def test_the_history_graph_equals_torch(name, rows, length, ends, models, tiny_bundle):
    random, (model, _) = np.random.default_rng([rows, length]), models[name]
    with torch.inference_mode():
        table = model.table()
        ids, places = random.integers(len(table), size=(rows, length)), random.integers(length, size=(rows, ends))
        expected = model.encode(torch.from_numpy(ids), torch.from_numpy(places), table).numpy()
    feeds = {"ids": ids, "ends": places, "table": table.numpy()}
    (found,) = session(tiny_bundle / f"{name}.onnx").run(None, feeds)
    assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", ["light", "lm"])
def test_the_item_graph_equals_torch_with_parts_missing(name, models, tiny_bundle):
    model, _ = models[name]
    text, factors = model.text_vectors.numpy().copy(), model.item_factors.numpy().copy()
    text[2], factors[3] = np.nan, np.nan
    with torch.inference_mode():
        given = torch.from_numpy(text), torch.from_numpy(factors)
        expected = model.tokens(*given).numpy(), model.heads(*given).numpy()
    graph = session(tiny_bundle / f"{name}-items.onnx")
    for rows in (1, len(text)):
        found = graph.run(["tokens", "heads"], {"text": text[:rows], "factors": factors[:rows]})
        for side, wanted in zip(found, expected, strict=True):
            assert side == pytest.approx(wanted[:rows], abs=1e-4)


@pytest.mark.parametrize("lengths", [[4], [9, 2, 5]])
def test_the_encoder_graph_equals_torch(lengths, tiny_bundle, tiny_lm_folder):
    random, base = np.random.default_rng(0), load_base(tiny_lm_folder)
    mask = (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int64)
    ids = random.integers(3, 60, size=mask.shape) * mask
    (found,) = session(tiny_bundle / "encoder.onnx").run(None, {"ids": ids, "mask": mask})
    for row, length in enumerate(lengths):
        with torch.inference_mode():
            hidden = base.model(input_ids=torch.from_numpy(ids[row : row + 1, :length])).last_hidden_state
            expected = mean_pool(hidden, torch.ones(1, length, dtype=torch.long))[0].numpy()
        assert found[row] == pytest.approx(expected, abs=1e-4)


def test_the_bundle_gives_the_torch_scorers_top_10_for_200_users(loaded, models, tiny_run, tiny_bundle):
    run, task, parts = loaded
    random, catalog = np.random.default_rng(0), task.index.ids
    histories = [tuple(random.choice(catalog, size=random.integers(0, 14), replace=False)) for _ in range(200)]
    queries = [Query(tuple(map(str, history))) for history in histories]
    scorers = parts.scorers() | {
        name: sequence_scorer(*found, task, lenders(run, parts)) for name, found in models.items()
    }
    fused = FusedScorer(scorers, Fusion.load(tiny_run / "fusion.json"), task.split.train.item_counts())
    scores = mask_seen(fused.score(queries, task.index), queries, task.index)
    _, best = top_k(scores, 10)
    found = recllm.load(tiny_bundle).recommend(histories, k=10)
    for row, items in enumerate(found.ids):
        own = scores[row, task.index.rows(items)]
        # Place by place the score that torch gives; another order only where scores are this close.
        assert own == pytest.approx(best[row], abs=1e-4)
        assert found.scores[row] == pytest.approx(own, abs=1e-4)


def test_every_recipe_is_reported_and_one_that_fails_is_left_out(exported):
    run, results, impossible, said = exported
    assert list(results)[:3] == [impossible, "fp16", "int8"]
    failed = results[impossible]
    assert failed.folder is None
    assert any("rank_correlation is" in line and "at least 1.1 is asked" in line for line in failed.failures)
    assert any("a score differs by" in line and "allowed 0.0" in line for line in failed.failures)
    kept = {result.folder.name for result in results.values() if result.folder is not None}
    assert {path.name for path in run.folder.glob("*bundle*")} == kept
    assert not (run.folder / "graphs").exists()
    assert len(said) >= len(results)


@pytest.mark.parametrize("name", ["fp16", "int8"])
def test_smaller_recipes_are_gated_and_load(name, exported):
    _run, results, _, _ = exported
    result = results[name]
    assert set(result.parity) == {"light", "lm", "encoder", "ranking", "light items", "lm items"}
    assert all(0 <= measured["top10_overlap"] <= 1 for measured in result.parity.values())
    assert (result.folder is None) == bool(result.failures)
    if result.folder is not None:
        assert read_manifest(result.folder)["recipe"] == name
        assert read_json(result.folder / "parity.json")["measured"] == result.parity
        assert len(recllm.load(result.folder).recommend([["0", "2"]], k=3).ids[0]) == 3


def test_half_precision_keeps_the_order_of_the_tiny_models(exported):
    _, results, _, _ = exported
    assert results["fp16"].failures == []
    assert all(measured["rank_correlation"] > 0.998 for measured in results["fp16"].parity.values())


@pytest.mark.parametrize(
    ("precision", "causal"),
    [("fp16", None), ("int8", WeightSettings()), ("int8", None), ("int4", WeightSettings(bits=4, algorithm="hqq"))],
)
def test_a_quantised_graph_differs_a_little_and_not_much(precision, causal, models, tiny_bundle, tmp_path):
    model, _ = models["lm"]
    target = tmp_path / "lm.onnx"
    quantise(tiny_bundle / "lm.onnx", target, precision, causal)
    assert target.read_bytes() != (tiny_bundle / "lm.onnx").read_bytes()
    feeds = {"ids": np.array([[0, 9, 11, 13]]), "ends": np.array([[3]]), "table": model.table().detach().numpy()}
    whole, small = (session(path).run(None, feeds)[0][0, 0] for path in (tiny_bundle / "lm.onnx", target))
    assert np.abs(whole - small).max() > 0
    assert np.corrcoef(whole, small)[0, 1] > 0.95


def test_few_bits_are_chosen_by_what_was_measured(exported, tiny_bundle):
    run, results, _, _ = exported
    (result,) = [own for name, own in results.items() if name.endswith("few.toml")]
    said = read_json(result.folder / "quantisation.json")
    assert set(said) == {"light", "lm", "encoder"}  # all causal here
    for name, own in said.items():
        damages = list(own["graph"].values())
        assert 0 < damages[-1] <= 0.01 or list(own["graph"])[-1] == "1"
        assert all(damage > 0.01 for damage in damages[:-1])
        assert len(own["layers"]) > 4
        assert set(own["higher"]) <= set(own["layers"])
        assert (result.folder / f"{name}.onnx").stat().st_size < (tiny_bundle / f"{name}.onnx").stat().st_size
    assert "quantisation.json" in read_manifest(result.folder)["files"]
    assert not (run.folder / "bundle-int8" / "quantisation.json").exists()


def test_the_manifest_says_what_is_inside(tiny_bundle, loaded):
    manifest, task = read_manifest(tiny_bundle), loaded[1]
    assert manifest["recipe"] == "fp32"
    assert manifest["scorers"]["lm"] == manifest["scorers"]["light"] == "sequence"
    assert tuple(manifest["scorers"]) == Fusion.load(tiny_bundle / "fusion.json").names
    assert manifest["data"]["fingerprints"] == task.fingerprints()
    parity = read_json(tiny_bundle / "parity.json")
    assert parity["tolerance"] == load_recipe("fp32").tolerance.model_dump()
    assert all(measured["max_difference"] <= 1e-3 for measured in parity["measured"].values())
    ranking = parity["measured"]["ranking"]
    assert ranking["ndcg"] == pytest.approx(ranking["ndcg_torch"], abs=1e-6)
    # The metric of the run's own fusion on the same queries of validation.
    run, _task, parts = loaded
    protocol, valid = evaluation_protocol(run, task), task.split.valid
    rows = np.sort(np.random.default_rng(run.seed).permutation(len(valid))[: run.export.gate_queries])
    scores = known_scores(run, task, parts, lambda _: None)["valid"]
    examples = [valid[row] for row in rows]
    some = {name: own[rows] for name, own in scores.items()}
    fused = protocol.fuse(Fusion.load(run.folder / "fusion.json"), some, examples)
    table = protocol.table({"fusion": fused}, examples, (10,))
    assert ranking["ndcg_torch"] == pytest.approx(table.interval("fusion", "NDCG@10")[0], abs=1e-6)


def test_a_bundle_answers_as_of_now_and_has_no_event(loaded, models, tiny_lm_folder, tmp_path):
    run, task, parts = loaded
    popularity = Popularity.fit(task.split.train, task.index.ids, half_life_days=0.1, as_of=True)
    parts = replace(parts, popularity=popularity)
    export._write_content(tmp_path / "bundle", run, task, parts, models, load_base(tiny_lm_folder))
    assert list(load_file(tmp_path / "bundle" / "cf" / "popularity.safetensors")) == ["log_counts"]
    kept = Popularity.load(tmp_path / "bundle" / "cf")
    queries = [row.query for row in task.split.valid]
    now = [replace(query, at=None) for query in queries]
    assert np.array_equal(kept.score(queries, task.index), popularity.score(now, task.index))
    assert not np.array_equal(popularity.score(queries, task.index), popularity.score(now, task.index))


def test_an_untrained_run_says_how_to_train_it(loaded, tmp_path):
    run = loaded[0].model_copy(update={"output": str(tmp_path)})
    with pytest.raises(RecllmError, match=r"has no fitted fusion. Train the run first: recllm train"):
        export_run(run, loaded[1], say=lambda _: None)


def test_activations_of_what_reads_histories_are_not_rounded(exported):
    run, *_ = exported
    with pytest.raises(RecllmError, match=r"Recipe w8a8 is for runs that judge pairs: .* Take int8 or int4"):
        export_run(run, prepare(run), ["fp32", "w8a8"], say=lambda _: None)


def test_two_recipes_do_not_take_one_bundles_name(loaded, tmp_path):
    own = tmp_path / "fp32.toml"
    own.write_text(find_recipe("export", "fp16").read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(RecllmError, match=r"Two recipes would be written as bundle-fp32"):
        export_run(loaded[0], loaded[1], ["fp32", str(own)], say=lambda _: None)


def test_an_unknown_recipe_is_named_before_anything_loads(loaded):
    with pytest.raises(RecllmError, match=r"'int9'. Did you mean 'int8'"):
        export_run(loaded[0], loaded[1], ["fp32", "int9"], say=lambda _: None)


def scores(*rows):
    return np.array(rows, dtype=np.float32)


def test_fidelity_of_equal_scores():
    given = np.random.default_rng(0).normal(size=(5, 30)).astype(np.float32)
    assert fidelity(given, given) == pytest.approx({"max_difference": 0.0, "rank_correlation": 1.0, "top10_overlap": 1})


def test_fidelity_by_hand():
    """Twelve columns; in one row of two the order is turned round, so of its ten best eight stay."""
    up = np.arange(12)
    found = fidelity(scores(up, up), scores(up + 0.5, up[::-1]))
    assert found == pytest.approx({"max_difference": 11.0, "rank_correlation": 0.0, "top10_overlap": 0.9})


def test_fidelity_leaves_out_what_nobody_scores():
    nan = np.nan
    found = fidelity(scores([1, 2, nan, 4], [nan] * 4), scores([1, 4, nan, 2], [nan] * 4))
    assert found == pytest.approx({"max_difference": 2.0, "rank_correlation": 0.5, "top10_overlap": 1.0})


def test_fidelity_of_rows_that_know_different_items():
    nan = np.nan
    found = fidelity(scores([1, 2, 3, nan], [nan, 5, 6, 7]), scores([1, 2, 3, nan], [nan, 7, 6, 5]))
    assert found == pytest.approx({"max_difference": 2.0, "rank_correlation": 0.0, "top10_overlap": 1.0})


def test_a_score_that_is_lost_or_no_number_fails_the_gate():
    """A quantised graph that overflows gives NaN; that is a failure to report, not a crash."""
    given = np.random.default_rng(0).normal(size=(2, 12)).astype(np.float32)
    broken = given.copy()
    broken[1, 3] = np.nan
    tolerance = Tolerance(rank_correlation=0.1, top10_overlap=0.1)
    for pair in ((given, broken), (broken, given), (given, np.full_like(given, np.inf))):
        (said,) = [line for line in failures_of({"lm": fidelity(*pair)}, tolerance) if "no numbers" in line]
        assert said == "lm: some of its scores are no numbers"


def test_nothing_to_compare_proves_nothing():
    measured = fidelity(scores([np.nan] * 3), scores([np.nan] * 3))
    assert len(failures_of({"lm": measured}, Tolerance(rank_correlation=0.1, top10_overlap=0.1))) == 2


def test_fidelity_does_not_count_what_rounding_does_to_a_gap_of_one_step():
    given = scores(np.arange(12) * GRID)
    moved = given + np.float32(1e-7) * scores(np.tile([1, -1], 6))
    assert fidelity(given, moved)["rank_correlation"] == 1.0


def test_fidelity_of_many_scores_close_by_each_other_is_not_always_perfect():
    """By way of others all of them would be equal, and any order the right one."""
    given = np.linspace(0, 0.9, 200_000, dtype=np.float32)[None]
    shuffled = np.random.default_rng(0).permutation(given[0])[None]
    found = fidelity(given, shuffled)
    assert abs(found["rank_correlation"]) < 0.02
    assert found["top10_overlap"] < 0.5
    assert fidelity(given, given + np.float32(GRID / 4)) == pytest.approx(
        {"max_difference": 0.0, "rank_correlation": 1.0, "top10_overlap": 1.0}, abs=GRID
    )


def test_fidelity_does_not_take_ties_for_an_order():
    """All scores equal is no order at all, whatever the columns' places say."""
    given = np.arange(12, dtype=np.float32)[None]
    assert fidelity(given, np.zeros_like(given))["rank_correlation"] == 0.0
    assert fidelity(np.ones_like(given), np.zeros_like(given))["rank_correlation"] == 1.0


def test_a_lost_metric_is_shown_by_more_than_chance():
    torch_gains = np.array([1.0, 0.0, 0.5, 0.5] * 25)
    found = metric_loss(torch_gains, torch_gains * 0.8)
    lost = torch_gains * 0.2
    low = lost.mean() - 1.984 * lost.std(ddof=1) / 10  # Student's t with 99 degrees of freedom
    assert found == pytest.approx({"ndcg": 0.4, "ndcg_torch": 0.5, "least_loss": low / 0.5}, rel=1e-4)
    # A single query that is lost of a hundred proves nothing; nor does a gain.
    one = torch_gains.copy()
    one[0] = 0.0
    assert metric_loss(torch_gains, one)["least_loss"] == 0.0
    assert metric_loss(one, torch_gains)["least_loss"] == 0.0
    assert metric_loss(np.zeros(3), np.zeros(3))["least_loss"] == 0.0
    assert np.isnan(metric_loss(np.zeros(0), np.zeros(0))["least_loss"])
    assert metric_loss(np.ones(1), np.array([0.63]))["least_loss"] == 0.0
    random = np.random.default_rng(0)
    shown = [metric_loss(np.full(3, 2.0), 2.0 + random.normal(size=3))["least_loss"] > 0 for _ in range(2000)]
    assert np.mean(shown) == pytest.approx(0.025, abs=0.015)  # of three queries, where nothing is lost


def test_a_lost_auc_is_shown_by_more_than_chance():
    random = np.random.default_rng(0)
    labels = (random.random(400) < 0.3).astype(np.float64)
    torch_scores = labels + random.normal(size=400)
    worse = torch_scores + 1.5 * random.normal(size=400)
    found = auc_loss(labels, torch_scores, worse)
    assert (found["auc"], found["auc_torch"]) == pytest.approx((auc(labels, worse), auc(labels, torch_scores)))
    drawn = random.integers(0, 400, (1000, 400))
    lost = [auc(labels[rows], torch_scores[rows]) - auc(labels[rows], worse[rows]) for rows in drawn]
    low = np.mean(lost) - 1.96 * np.std(lost)  # what the formula stands for, by a bootstrap over rows
    assert found["least_loss"] == pytest.approx(low / found["auc_torch"], abs=0.006)
    assert found["least_loss"] > 0.05
    assert auc_loss(labels, torch_scores, torch_scores)["least_loss"] == 0.0
    assert auc_loss(labels, worse, torch_scores)["least_loss"] == 0.0  # a gain
    nudged = torch_scores + 0.02 * random.normal(size=400)
    assert auc_loss(labels, torch_scores, nudged)["least_loss"] < 0.003
    assert auc_loss(np.array([1.0, 0.0, 0.0]), np.array([9.0, 1.0, 2.0]), np.arange(3.0))["least_loss"] == 0.0
    assert auc_loss(np.ones(3), np.arange(3.0), np.arange(3.0)) == {}
    assert auc_loss(np.array([1.0, 0.0]), np.array([1.0, 1.0]), np.array([1.0, 0.0]))["auc_torch"] == 0.5


@pytest.mark.parametrize(
    ("measured", "words"),
    [
        ({"max_difference": 0.2}, "lm: a score differs by 0.2, allowed 0.1"),
        ({"rank_correlation": 0.8}, r"lm: rank_correlation is 0.8000, at least 0.9 is asked"),
        ({"rank_correlation": float("nan")}, "lm: rank_correlation is nan"),
        ({"top10_overlap": 0.5}, r"lm: top10_overlap is 0.5000, at least 0.9 is asked"),
        (
            {"ndcg": 0.08, "ndcg_torch": 0.1, "least_loss": 0.12},
            "lm: NDCG@10 on validation is 0.0800 where torch has 0.1000: at least 12.0 % are lost, 2 % allowed",
        ),
        (
            {"auc": 0.7, "auc_torch": 0.8, "least_loss": 0.05},
            "lm: AUC on validation is 0.7000 where torch has 0.8000: at least 5.0 % are lost, 2 % allowed",
        ),
    ],
)
def test_what_breaks_a_tolerance_is_said(measured, words):
    fine = {"max_difference": 0.0, "rank_correlation": 1.0, "top10_overlap": 1.0}
    tolerance = Tolerance(max_difference=0.1, rank_correlation=0.9, top10_overlap=0.9, metric_loss=0.02)
    assert failures_of({"lm": fine}, tolerance) == []
    assert failures_of({"lm": fine | {"least_loss": 0.01}}, tolerance) == []
    (said,) = failures_of({"lm": fine | measured}, tolerance)
    assert words in said


def test_bundles_say_how_training_had_its_histories(tiny_run):
    """Those of a given split stand as they are, whatever is made of a log."""
    run = load_run(tiny_run)
    task = prepare(run)
    given = run.model_copy(update={"data": run.data.model_copy(update={"split": "given"})})
    said = [export._facts(own, of, "fp32", {})["each_once"] for own, of in ((run, task), (given, task))]
    assert said == ["first", None]
    assert export._facts(run, replace(task, repeats=True), "fp32", {})["each_once"] is None


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("causal", ['activations = "int8"\nmax_damage = 0.01', "bits = 4", "max_damage = 0.01"])
def test_a_recipe_of_floats_says_nothing_of_bits(precision, causal, tmp_path):
    text = find_recipe("export", precision).read_text(encoding="utf-8")
    (tmp_path / "own.toml").write_text(f"{text}\n[causal]\n{causal}\n", encoding="utf-8")
    with pytest.raises(RecllmError, match=rf"is for 8 and 4 bits, and the precision is {precision}"):
        load_recipe(str(tmp_path / "own.toml"))

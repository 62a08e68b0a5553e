"""Judging: a language model learns who likes what, on labelled pairs, beside the scorers of ratings."""

import json
import pickle
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import onnx
import polars as pl
import pytest
import torch
from safetensors.torch import load_file

import recllm
from recllm import judging, rankexport
from recllm.cli import main
from recllm.collaborative import load_collaborative
from recllm.commands import evaluate_folder
from recllm.data import Catalog, Query
from recllm.doctor import Finding, examine
from recllm.errors import RecllmError
from recllm.export import export_run
from recllm.files import read_json
from recllm.judging import AskedAbout, load_relevance, rating_scorers, relevance_stage
from recllm.outcome import FUSION, evaluate_run
from recllm.ranker import behind, load_ranker
from recllm.ranking import ItemIndex, score_pairs
from recllm.recency import choose_half_life
from recllm.recipes import find_recipe
from recllm.runs import Run, load_run
from recllm.scoring import known_scores
from recllm.tasks import prepare
from recllm.train import train_run
from recllm.vectors import ItemFeatures

WITHOUT = "fusion without relevance"


@pytest.fixture(scope="module")
def given_folder(rated_checkerboard, tmp_path_factory):
    """Everybody likes red (even) items and no blue ones; items 20 to 23 are in the test rows only.

    So who reads their text knows them, and who learns by id does not.
    """
    folder, rng = tmp_path_factory.mktemp("board"), np.random.default_rng(0)
    parts, events = {"train": [], "valid": [], "test": []}, []
    for user in range(40):
        rows = [(str(item), int(item % 2 == 0)) for item in rng.permutation(20)[:10]]
        events += [(f"u{user}", item, float(label), seq) for seq, (item, label) in enumerate(rows)]
        for place in range(1, 10):
            parts["train" if place < 8 else "valid"].append(_row(user, rows[:place], *rows[place]))
        parts["test"] += [_row(user, rows, str(item), int(item % 2 == 0)) for item in (20, 21, 22, 23)]
    schema = ["user_id", "item_id", "rating", "seq"]
    pl.DataFrame(events, schema=schema, orient="row").write_parquet(folder / "interactions.parquet")
    rated_checkerboard.catalog.frame.write_parquet(folder / "items.parquet")
    for part, made in parts.items():
        pl.DataFrame(made).write_parquet(folder / f"{part}.parquet")
    return folder


def _row(user, known, item, label):
    history, labels = ([entry[place] for entry in known] for place in (0, 1))
    return {"user_id": f"u{user}", "target": item, "label": label, "history": history, "history_label": labels}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECLLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def settings(data, model, output, encoder, **train):
    return Run.model_validate(
        {
            "name": "judge",
            "output": str(output),
            "data": {"name": str(data), "split": "given"},
            "model": {
                "name": str(model),
                "item_encoder": str(encoder),
                "task": "relevance",
                "max_history": 2,
                "history_stride": 2,
            },
            "adapter": {"lora_dropout": 0.0},
            "light": {"num_train_epochs": 0},
            "cf": {"factors": 4},
            "train": {
                "learning_rate": 1e-2,
                "head_learning_rate": 1e-2,
                "num_train_epochs": 3,
                "per_device_train_batch_size": 8,
                "eval_steps": 35,
                **train,
            },
        }
    )


@pytest.fixture(scope="module", params=["tiny_lm_folder", "tiny_encoder_folder"])
def trained(request, given_folder, tiny_encoder_folder, cache, tmp_path_factory):
    model = request.getfixturevalue(request.param)
    run = settings(given_folder, model, tmp_path_factory.mktemp("runs"), tiny_encoder_folder)
    return run, train_run(run, say=lambda _: None)


def tables(run, task, say=lambda _: None):
    scores = known_scores(run, task, load_collaborative(run, task), say)
    return {part: evaluate_run(run, task, scores[part], part=part) for part in ("valid", "test")}


def test_it_learns_what_is_liked_of_items_without_events_too(trained):
    run, task = trained
    table = tables(run, task)["test"]
    assert set(table.scorers) >= {"popularity", "item_mean", "user_mean", "mf", "explicit", "text", "relevance", FUSION}
    assert table.interval("relevance", "AUC")[0] > 0.95
    assert table.interval("item_mean", "scored")[0] == 0.0
    assert table.interval(FUSION, "AUC")[0] > 0.95
    assert WITHOUT in table.scorers
    assert table.counts == {"all": (160, 40), "cold item": (160, 40)}
    assert table.interval("relevance", "scored")[0] == 1.0


def test_the_run_folder_has_it_all(trained):
    run, _ = trained
    files = {str(path.relative_to(run.folder)) for path in run.folder.rglob("*") if path.is_file()}
    assert files >= {
        "lm/model.safetensors",
        "fusion.json",
        "fusion-without-relevance.json",
        "scores/relevance.npy",
        "cf/explicit_mf.json",
        "cf/item_mean.json",
        "metrics.jsonl",
    }
    assert not (run.folder / "checkpoints" / "relevance").exists()
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {line["scorer"] for line in lines} == {"relevance"}
    assert any("eval_auc" in line for line in lines)
    relevance = np.load(run.folder / "scores" / "relevance.npy")
    assert relevance.shape == (80 + 160,)
    assert "relevance" not in json.loads((run.folder / "fusion-without-relevance.json").read_text())["names"]


def test_it_is_evaluated_with_a_page_for_each_part(trained, capsys):
    run, _ = trained
    for part, name in (("test", "evaluation.html"), ("valid", "evaluation-valid.html")):
        evaluate_folder(run.folder, part)
        page = (run.folder / name).read_text(encoding="utf-8")
        assert "training rows" in page
        assert ("on which the fusion was fitted" in page) is (part == "valid")
        out = capsys.readouterr().out
        assert out.startswith("On the validation rows" if part == "valid" else "On the test rows:")
        (run.folder / name).unlink()
    (run.folder / "evaluation.json").unlink()


def test_what_a_user_rated_later_says_nothing_of_cold_items(trained):
    run, task = trained
    cold = replace(task, split=replace(task.split, cold_items=frozenset({"20"})))
    candidates = ItemIndex(["0", "1"])
    queries = [Query(("2",), "u1", (None,)), Query((), "u1", ()), Query(("2",), "u1")]
    for name in ("user_mean", "explicit", "rated_neighbours"):
        known = rating_scorers(run, task, load_collaborative(run, task))[name].score(queries, candidates)
        assert np.isfinite(known).all(), name  # all of training lies before the rows of this split
        asked = rating_scorers(run, cold, load_collaborative(run, task))[name].score(queries, candidates)
        assert np.isnan(asked[:2]).all(), name
        assert np.isfinite(asked[2]).all(), name


def test_a_finished_run_stays_as_it_is(trained):
    run, _ = trained
    files = ["lm/model.safetensors", "scores/relevance.npy", "fusion.json", "cf/explicit_mf.json"]
    before = [(run.folder / file).stat().st_mtime_ns for file in files]
    said = []
    train_run(run, resume=True, say=said.append)
    assert [(run.folder / file).stat().st_mtime_ns for file in files] == before
    assert len(said) == 1  # what was read


def test_the_loaded_scorer_gives_the_kept_scores(trained):
    run, task = trained
    scorer = load_relevance(run, task)
    assert not scorer.calibrated
    rows = task.split.test[:9]
    found = scorer.score_pairs([row.query for row in rows], [row.item_id for row in rows])
    kept = np.load(run.folder / "scores" / "relevance.npy")[len(task.split.valid) :][:9]
    assert found == pytest.approx(kept, abs=1e-4)


def test_an_interrupted_training_goes_on_to_the_same_weights(
    given_folder, tiny_lm_folder, tiny_encoder_folder, cache, tmp_path, monkeypatch
):
    from safetensors.numpy import load_file

    from recllm import loop

    keys = {"eval_steps": 5, "max_steps": 15}
    whole = settings(given_folder, tiny_lm_folder, tmp_path / "whole", tiny_encoder_folder, **keys)
    train_run(whole, say=lambda _: None)
    cut = settings(given_folder, tiny_lm_folder, tmp_path / "cut", tiny_encoder_folder, **keys)

    def stop(self, args, state, control, **_):
        if state.global_step == 8:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop.MetricsFile, "on_step_end", stop)
    with pytest.raises(KeyboardInterrupt):
        train_run(cut, say=lambda _: None)
    monkeypatch.undo()
    assert (cut.folder / "checkpoints" / "relevance" / "checkpoint-5").is_dir()
    train_run(cut, resume=True, say=lambda _: None)
    expected, found = (load_file(run.folder / "lm" / "model.safetensors") for run in (whole, cut))
    assert set(found) == set(expected)
    assert all(found[name] == pytest.approx(value, abs=1e-5) for name, value in expected.items())


def together(run, **model):
    keys = {"rows_together": 5, "max_history": 4, "history_stride": 3, "pairwise": 0.5} | model
    return run.model_copy(update={"model": run.model.model_copy(update=keys)})


def in_a_worker(examples):
    """What a worker that is not forked reads (Trainer's `dataloader_num_workers`), which has no use for the model."""
    data = pickle.dumps(examples)
    assert b"torch.nn" not in data
    return pickle.loads(data)


def test_rows_behind_one_history_are_the_rows_and_the_loss_of_whole_prompts(
    given_folder, tiny_lm_folder, tiny_encoder_folder, cache, tmp_path
):
    run = together(settings(given_folder, tiny_lm_folder, tmp_path, tiny_encoder_folder))
    task = prepare(run)
    trees, whole = (
        judging.relevance_stage(own, task, None, lambda _: None) for own in (run, together(run, rows_together=1))
    )
    rows = [row for block in trees.train for row in block]
    assert sorted((row.stem + row.branch, row.label) for row in rows) == sorted(row[:2] for row in whole.train)
    assert len(rows) == trees.train.rows_of_data == whole.train.rows_of_data == 3 * 280
    assert max(map(len, trees.train)) == 4  # as many as begin alike
    assert sum(map(len, trees.valid)) == len(whole.valid) == 80
    assert trees.options(tmp_path)["per_device_eval_batch_size"] == 6
    assert list(in_a_worker(trees.train)) == list(trees.train)
    assert list(in_a_worker(whole.train)) == list(whole.train)
    trees.model.eval()
    with torch.inference_mode():
        losses = [float(trees.model(**own.collator(list(own.valid)))["loss"]) for own in (trees, whole)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_rows_behind_one_history_teach_and_a_training_goes_on(
    given_folder, tiny_lm_folder, tiny_encoder_folder, cache, tmp_path, monkeypatch
):
    from safetensors.numpy import load_file

    from recllm import loop

    keys = {"per_device_train_batch_size": 3, "eval_steps": 20}
    whole, cut = (
        together(settings(given_folder, tiny_lm_folder, tmp_path / name, tiny_encoder_folder, **keys))
        for name in ("whole", "cut")
    )
    task = train_run(whole, say=lambda _: None)
    assert tables(whole, task)["test"].interval("relevance", "AUC")[0] > 0.95
    assert read_json(whole.folder / "lm" / "done.json")["rows"] == 3 * 280
    end = loop.MetricsFile.on_step_end

    def stop(self, args, state, control, **_):
        if state.global_step == 30:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop.MetricsFile, "on_step_end", stop)
    with pytest.raises(KeyboardInterrupt):
        train_run(cut, say=lambda _: None)
    monkeypatch.setattr(loop.MetricsFile, "on_step_end", end)
    train_run(cut, resume=True, say=lambda _: None)
    expected, found = (load_file(run.folder / "lm" / "model.safetensors") for run in (whole, cut))
    assert all(np.array_equal(found[name], value) for name, value in expected.items())
    # A run of before there was a stride was trained on the last items, whatever its run file says.
    assert load_relevance(whole, task).prompt.prompt.history_stride == 3
    done = read_json(whole.folder / "lm" / "done.json")
    del done["history_stride"]
    (whole.folder / "lm" / "done.json").write_text(json.dumps(done), encoding="utf-8")
    assert load_relevance(whole, task).prompt.prompt.history_stride == 1


def test_who_cannot_read_rows_behind_one_history_is_told(
    given_folder, tiny_lm_folder, tiny_encoder_folder, cache, tmp_path, monkeypatch
):
    encoder = together(settings(given_folder, tiny_encoder_folder, tmp_path, tiny_encoder_folder))
    with pytest.raises(RecllmError, match=r"is an encoder, which looks both ways: its rows cannot share a history"):
        train_run(encoder, say=lambda _: None)
    run = together(settings(given_folder, tiny_lm_folder, tmp_path, tiny_encoder_folder))
    monkeypatch.setattr(judging, "reads_trees", lambda _: False)
    with pytest.raises(RecllmError, match=r"cannot read several rows behind one history: that takes a causal model"):
        judging.relevance_stage(run, prepare(run), None, lambda _: None)
    with pytest.raises(ValueError, match=r"is for model\.task = 'relevance'; with 'next_item' it does nothing"):
        Run.model_validate(run.model_dump() | {"model": run.model.model_dump() | {"task": "next_item"}})


def test_without_an_adapter_a_causal_model_answers_zero_shot(
    given_folder, tiny_lm_folder, tiny_encoder_folder, cache, tmp_path
):
    run = settings(given_folder, tiny_lm_folder, tmp_path, tiny_encoder_folder)
    run = run.model_copy(update={"adapter": run.adapter.model_validate({"recipe": "none"})})
    task = train_run(run, say=lambda _: None)
    assert load_relevance(run, task).calibrated
    assert not (run.folder / "metrics.jsonl").exists()
    assert "relevance" in tables(run, task)["test"].scorers


def test_a_light_judge_alone_learns_what_is_liked(given_folder, tiny_encoder_folder, cache, tmp_path):
    run = settings(given_folder, "none", tmp_path, tiny_encoder_folder)
    light = {"width": 16, "heads": 2, "layers": 1, "num_train_epochs": 6, "learning_rate": 5e-3, "pairs_in_step": 16}
    light |= {"relative_positions": True, "gated": True}
    run = run.model_copy(update={"light": run.light.model_validate(run.light.model_dump() | light)})
    task = train_run(run, say=lambda _: None)
    weights = load_file(run.folder / "light" / "model.safetensors")
    assert weights["body.blocks.0.relative.bias.weight"].shape == (run.light.max_history + 1, 2)
    assert weights["body.blocks.0.gate.weight"].shape == (16, 16)
    table = tables(run, task)["test"]
    assert set(table.scorers) >= {"item_mean", "text", "light", FUSION}
    assert table.interval("light", "AUC")[0] > 0.95
    assert table.interval("light", "scored")[0] == 1.0
    assert load_run(run.folder).light == run.light
    train_run(run, resume=True, say=lambda _: None)  # nothing is left to do


def test_validation_of_one_label_says_so(given_folder, tiny_lm_folder, tiny_encoder_folder, cache, tmp_path):
    folder = tmp_path / "board"
    folder.mkdir()
    for path in given_folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    valid = pl.read_parquet(folder / "valid.parquet").with_columns(label=pl.lit(0))
    valid.write_parquet(folder / "valid.parquet")
    run = settings(folder, tiny_lm_folder, tmp_path, tiny_encoder_folder)
    with pytest.raises(RecllmError, match="its 80 rows that have a history and text do not have both labels"):
        train_run(run, say=lambda _: None)


def test_without_ratings_negatives_are_sampled(checkerboard, tiny_lm_folder, tiny_encoder_folder, cache, tmp_path):
    folder = tmp_path / "board"
    folder.mkdir()
    checkerboard.interactions.frame.drop("rating").write_parquet(folder / "interactions.parquet")
    checkerboard.catalog.frame.write_parquet(folder / "items.parquet")
    run = settings(folder, tiny_lm_folder, tmp_path, tiny_encoder_folder, max_steps=2)
    run = run.model_copy(update={"data": run.data.model_copy(update={"split": "leave-last-out"})})
    task = train_run(run, say=lambda _: None)
    table = tables(run, task)["test"]
    assert table.counts["all"] == (80, 40)
    assert set(table.scorers) == {"popularity", "mf", "ease", "text", "relevance", WITHOUT, FUSION}
    assert table.interval("mf", "AUC")[0] > 0.85  # the halves of the board
    stage = relevance_stage(run, task, load_collaborative(run, task).features, lambda _: None)
    assert stage.train.rows_of_data == 3 * 2 * (40 * 7)
    assert list(in_a_worker(stage.train)) == list(stage.train)
    read = 2 * run.train.per_device_train_batch_size
    assert read_json(run.folder / "lm" / "done.json")["rows"] == read


class HistoryLength:
    def score(self, queries, candidates):
        return np.array([[len(query.history)] * len(candidates) for query in queries], np.float32)


def test_a_scorer_can_be_asked_about_another_query():
    scorer = AskedAbout(HistoryLength(), lambda query: Query(query.history[:1]))
    assert scorer.score([Query(("a", "b")), Query(())], ItemIndex(["x"])).tolist() == [[1.0], [0.0]]


def test_half_lives_of_ratings_are_chosen_on_rows_with_ratings(trained, monkeypatch, tmp_path):
    """Rows whose user has rated nothing have no mean, and NaN has no place in an AUC."""
    run, task = trained
    unknown = [
        replace(row, query=Query(row.query.history, row.query.user_id, (None,) * len(row.query.history)))
        for row in task.split.valid[::2]
    ]
    both = replace(task, split=replace(task.split, valid=[*unknown, *task.split.valid[1::2]]))
    chosen = []

    def choose(scorer, half_lives, figure):
        scores = score_pairs(scorer, figure.keywords["queries"], figure.keywords["items"])
        chosen.append((type(scorer).__name__, len(scores), np.isfinite(scores).all()))
        return choose_half_life(scorer, half_lives, figure)

    monkeypatch.setattr("recllm.fading.choose_half_life", choose)
    parts = load_collaborative(run, task)
    shutil.copytree(run.folder, tmp_path / run.name)
    (tmp_path / run.name / "cf" / "explicit_mf.json").unlink()
    again = run.model_copy(update={"output": str(tmp_path)})
    rating_scorers(again, both, parts)
    rows = len(task.split.valid[1::2])
    assert chosen == [("UserMean", rows, True), ("ExplicitMF", rows, True)]
    # Who is known to have rated nothing in the history is known by the training ratings, as who says nothing of it.
    scorers, index = rating_scorers(run, task, load_collaborative(run, task)), ItemIndex(task.index.ids)
    silent = Query(unknown[0].query.history, unknown[0].query.user_id)
    for name in ("explicit", "rated_neighbours", "user_mean"):
        assert np.array_equal(
            *(scorers[name].score([query], index) for query in (silent, unknown[0].query)), equal_nan=True
        )


def test_scorers_of_likes_see_liked_items_only(trained):
    run, task = trained
    row = task.split.test[0]
    query = row.query
    liked = Query(
        tuple(item for item, rating in zip(query.history, query.ratings, strict=True) if rating),
        query.user_id,
        tuple(rating for rating in query.ratings if rating),
    )
    scorers, index = rating_scorers(run, task, load_collaborative(run, task)), ItemIndex(task.index.ids)
    assert liked != query
    # Who does not rate has not disliked.
    unrated = Query(query.history, query.user_id, tuple(rating or None for rating in query.ratings))
    bare = Query(query.history)
    assert np.array_equal(scorers["mf"].score([unrated], index), scorers["mf"].score([bare], index), equal_nan=True)
    for name in ("mf", "text"):
        assert np.array_equal(scorers[name].score([query], index), scorers[name].score([liked], index), equal_nan=True)
    # Explicit factors take the dislikes too, and a query without ratings is one of the training user.
    assert not np.array_equal(scorers["explicit"].score([query], index), scorers["explicit"].score([liked], index))
    bare = Query(query.history, query.user_id)
    own = task.split.train.histories()[query.user_id]
    assert np.array_equal(
        scorers["explicit"].score([bare], index), scorers["explicit"].score([own], index), equal_nan=True
    )


def test_the_given_split_is_prepared(given_folder, tiny_lm_folder, tiny_encoder_folder, tmp_path):
    task = prepare(settings(given_folder, tiny_lm_folder, tmp_path, tiny_encoder_folder))
    assert (len(task.split.train), len(task.split.valid), len(task.split.test)) == (320, 80, 160)


def test_no_integer_products_are_made_where_they_overflow(trained, monkeypatch):
    def overflows(folder, provider):
        raise RecllmError("as a bundle is refused")

    run, task = trained
    monkeypatch.setattr(rankexport, "check_integer_products", overflows)
    told = []
    with pytest.raises(RecllmError, match=r"Recipe w8a8 makes .* Export with int8, fp16 or fp32, or on another"):
        export_run(run, task, ["fp32", "w8a8"], say=told.append)
    assert not told  # nothing has been written


def _lenient(path, recipe):
    """A shipped recipe that lets nearly everything through."""
    shipped = find_recipe("export", recipe).read_text(encoding="utf-8")
    path.write_text(re.sub("(rank_correlation|top10_overlap) = .*", r"\1 = 0.1", shipped), encoding="utf-8")


def test_a_ranker_of_integer_products_says_on_what_it_runs(trained, tmp_path, overflows):
    run, task = trained
    if "encoder" in run.model.name:
        return  # refused whatever the recipe, as below
    if overflows:
        pytest.skip("this processor's integer products overflow (no VNNI)")
    path = tmp_path / "integer.toml"
    _lenient(path, "w8a8")
    (products,) = export_run(run, task, [str(path)], say=lambda _: None)
    said = read_json(products.folder / "quantisation.json")["ranker"]
    assert said["layers"].keys() > set(said["higher"])
    assert min(said["graph"].values()) == list(said["graph"].values())[-1] < 0.02
    nodes = onnx.load(products.folder / "suffix.onnx", load_external_data=False).graph.node
    integers = [node.input for node in nodes if node.op_type == "MatMulIntegerToFloat"]
    assert len(integers) >= 7
    # What q, k, v, gate and up of one layer at least read is behind norms.
    assert [own[2] for own in integers].count("product_normed_step") >= 5
    assert products.parity["ranker"]["rank_correlation"] > 0.95
    assert "processors without VNNI instructions" in (products.folder / "README.md").read_text(encoding="utf-8")
    assert Finding("ok", "integer products") in list(examine(products.folder))


def test_the_language_model_is_exported_as_a_ranker(trained, tmp_path):
    run, task = trained
    if "encoder" in run.model.name:
        with pytest.raises(RecllmError, match=r"Only causal models .* are exported for ranking"):
            export_run(run, task, ["fp32"], say=lambda _: None)
        return
    few = tmp_path / "few.toml"
    _lenient(few, "int4")
    result, small = export_run(run, task, ["fp32", str(few)], say=lambda _: None)
    assert "VNNI" not in (result.folder / "README.md").read_text(encoding="utf-8")
    said = read_json(small.folder / "quantisation.json")
    assert set(said) == {"prefix", "suffix"}
    assert all(own["layers"] and min(own["graph"].values()) > 0 for own in said.values())
    assert result.folder == run.folder / "bundle-fp32"
    assert result.parity["ranker"]["max_difference"] < 1e-3
    assert 0.5 < result.parity["ranker"]["auc"] == pytest.approx(result.parity["ranker"]["auc_torch"], abs=1e-3)
    ranker, scorer = load_ranker(result.folder), load_relevance(run, task, bf16=False)
    weights = 4 * sum(value.numel() for value in scorer.model.parameters())
    assert 0.9 * weights < (result.folder / "weights.data").stat().st_size < 1.3 * weights  # both graphs', not twice
    for name in ("prefix.onnx", "suffix.onnx"):
        graph = onnx.load(result.folder / name, load_external_data=False).graph
        assert max(len(tensor.raw_data) for tensor in graph.initializer) < 1024
    queries = [row.query for row in task.split.test[:7]]
    histories, ratings = [query.history for query in queries], [query.ratings for query in queries]
    found = ranker.rank(histories, task.index.ids, ratings)
    assert found == pytest.approx(scorer.score(queries, task.index), abs=1e-3, nan_ok=True)
    assert not np.allclose(ranker.rank(histories, task.index.ids), found, equal_nan=True)  # ratings are written
    with pytest.raises(RecllmError, match=r"is a bundle that ranks candidates. It recommends behind one"):
        recllm.load(result.folder)
    with pytest.raises(RecllmError, match=r"Row 1: 0 ratings for 2 items"):
        ranker.rank([(), ("1", "2")], task.index.ids, [(), ()])
    source, target = tmp_path / "rows.jsonl", tmp_path / "scores.jsonl"
    row = {"user_id": "a", "history": list(histories[0]), "candidates": [*task.index.ids[:3], "nothing"]}
    source.write_text(json.dumps(row), encoding="utf-8")
    with pytest.raises(SystemExit, match="0"):
        main(["score", "--bundle", str(result.folder), "--users", str(source), "--out", str(target)])
    scores = [json.loads(line)["score"] for line in target.read_text(encoding="utf-8").splitlines()]
    assert scores == pytest.approx(ranker.rank([histories[0]], task.index.ids[:3])[0], abs=1e-4)
    with pytest.raises(RecllmError, match=r"Unknown item .nothing."):
        ranker.rank([("1",)], ["nothing"])
    # An item that was added to the bundle before it is judged by its text, as one that reads alike is, also where
    # another bundle has taken the ranker's place by then.
    result.folder.rename(tmp_path / "gone")
    record, said = ranker.catalog.record(task.index.ids[0]), []
    catalog = Catalog(task.dataset.catalog.frame).with_items([record | {"item_id": "new"}])
    before = SimpleNamespace(index=ItemIndex(catalog.ids), catalog=catalog)
    grown = behind(before, ranker, "judge", said.append)
    assert len(said) == 1
    assert said[0].endswith("items; it reads the others' text in the bundle before it")
    assert grown.rank(histories, ["new"], ratings) == pytest.approx(found[:, :1], abs=1e-4, nan_ok=True)
    assert behind(SimpleNamespace(index=task.index, catalog=catalog), ranker, "judge", said.append) is ranker


def test_without_a_language_model_there_is_nothing_to_rank_with(trained):
    run, task = trained
    run = run.model_copy(update={"model": run.model.model_copy(update={"name": "none"})})
    with pytest.raises(RecllmError, match=r"judges pairs without a language model"):
        export_run(run, task, ["fp32"], say=lambda _: None)


def test_rows_that_were_disliked_are_no_events_to_predict(given_folder, tiny_lm_folder, tiny_encoder_folder, tmp_path):
    run = settings(given_folder, tiny_lm_folder, tmp_path, tiny_encoder_folder)
    run = run.model_copy(update={"model": run.model.model_copy(update={"task": "next_item"})})
    with pytest.raises(RecllmError, match=r"has rows with label 0.*model\.task = 'relevance'"):
        prepare(run)


def test_rows_without_a_rating_are_counted_and_said(rated_checkerboard, tiny_lm_folder, tiny_encoder_folder, tmp_path):
    class Told(Exception):
        """Enough was said."""

    events, said = rated_checkerboard.interactions.frame, []
    latest = pl.col("seq") == pl.col("seq").max().over("user_id")
    users = events["user_id"].unique(maintain_order=True)
    few, disliking = (pl.col("user_id").is_in(own.implode()) for own in (users.head(3), users.tail(3)))
    folder = tmp_path / "films"
    folder.mkdir()
    rating = pl.when(latest & few).then(None).when(latest & disliking).then(1.0).otherwise("rating").alias("rating")
    events.with_columns(rating).write_parquet(folder / "interactions.parquet")
    rated_checkerboard.catalog.frame.write_parquet(folder / "items.parquet")

    def say(line):
        said.append(line)
        if "test rows have no rating" in line:
            raise Told

    run = settings(folder, tiny_lm_folder, tmp_path, tiny_encoder_folder)
    data = run.data.model_copy(update={"split": "leave-last-out"})
    with pytest.raises(Told):
        train_run(run.model_copy(update={"data": data}), say=say)
    assert said[-1] == f"3 of {len(users)} test rows have no rating, and are left out: pairs are judged here"
    assert not any("validation rows have no rating" in line for line in said)


def test_the_light_judge_learns_from_histories_as_long_as_it_is_asked_about(rated_checkerboard, tmp_path):
    rated_checkerboard.interactions.frame.write_csv(tmp_path / "interactions.csv")
    rated_checkerboard.catalog.frame.write_csv(tmp_path / "items.csv")
    light = {"width": 8, "layers": 1, "heads": 2, "max_history": 3, "num_train_epochs": 1}
    values = {"name": "x", "output": str(tmp_path), "data": {"name": str(tmp_path)}, "light": light}
    run = Run.model_validate(values | {"model": {"task": "relevance", "name": "none", "item_encoder": "minilm-l6"}})
    task = prepare(run)
    count = len(task.index)
    features = ItemFeatures(task.index, np.ones((count, 4), np.float32), np.ones((count, 2), np.float32))
    stage = judging.light_judge_stage(run, task, features, lambda _: None)
    trained, asked = ([stage_part[row] for row in range(len(stage_part))] for stage_part in (stage.train, stage.valid))
    assert all(len(pair.ids) <= 4 for pair in trained)
    again = in_a_worker(stage.train)
    assert [list(again[row].ids) for row in range(len(again))] == [list(pair.ids) for pair in trained]
    longest, last = (max(np.expm1(pair.facts[4]) for pair in pairs) for pairs in (trained, asked))
    assert 3 < longest == pytest.approx(last, abs=2)

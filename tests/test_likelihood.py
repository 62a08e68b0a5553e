"""Likelihood: the same for every user, known of new items too, in a run, in its bundle and in what is added to it."""

import shutil

import numpy as np
import polars as pl
import pytest

import recllm
from recllm.collaborative import load_collaborative, name_model
from recllm.data import Query
from recllm.errors import RecllmError
from recllm.export import export_run
from recllm.files import read_json
from recllm.fusion import Fusion
from recllm.growing import add_items
from recllm.likelihood import Likelihood, first_token
from recllm.names import read_names
from recllm.prompts import compile_prompt, load_prompt
from recllm.ranking import ItemIndex
from recllm.runs import Run
from recllm.train import train_run

VALUES = Likelihood(ItemIndex(["a", "b", "c"]), np.array([-1.0, np.nan, -3.0], dtype=np.float32))


def silent(_):
    pass


def settings(folder, model, output, **tables):
    common = {
        "name": "told",
        "output": str(output),
        "data": {"name": str(folder), "split": "cold-items", "cold_share": 0.25},
        "model": {"name": "none", "item_encoder": str(model), "likelihood": str(model)},
        "light": {"num_train_epochs": 0},
        "cf": {"factors": 4},
        "fusion": {"kinds": ["plain sum"]},
    }
    return Run.model_validate(common | tables)


@pytest.fixture(scope="module")
def trained(checkerboard_folder, tiny_lm_folder, tmp_path_factory):
    place = tmp_path_factory.mktemp("told")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECLLM_CACHE", str(place / "cache"))
        run = settings(checkerboard_folder, tiny_lm_folder, place)
        yield run, train_run(run, say=silent)


def test_it_says_the_same_to_everybody_and_of_new_items(tmp_path):
    index = ItemIndex(["c", "x", "a", "b"])
    found = VALUES.score([Query(("a",)), Query(())], index)
    assert np.array_equal(found, [[-3.0, np.nan, -1.0, np.nan]] * 2, equal_nan=True)
    assert np.array_equal(VALUES.score_as_new([Query(())], index), found[:1], equal_nan=True)
    grown = VALUES.grown(ItemIndex(["a", "b", "c", "x"]), np.array([-2.0], dtype=np.float32))
    grown.save(tmp_path)
    again = Likelihood.load(tmp_path)
    assert np.array_equal(again.score([Query(())], index), [[-3.0, -2.0, -1.0, np.nan]], equal_nan=True)


def test_a_prompt_has_words_before_the_name_and_none_behind(tiny_tokenizer):
    prompt = load_prompt("likelihood")
    assert first_token(compile_prompt(prompt, tiny_tokenizer)) > 0
    for text in ("{candidate}", "A title: {candidate} is famous"):
        other = compile_prompt(prompt.model_copy(update={"text": text}), tiny_tokenizer)
        if not text.startswith("A"):
            other.start.clear()  # the tiny tokenizer begins every text with a token of its own
        with pytest.raises(
            RecllmError, match=r"has some words before .*, for a first token has no likelihood, and none"
        ):
            first_token(other)


def test_what_the_tokenizer_puts_behind_every_text_is_no_part_of_a_name(tiny_word_tokenizer):
    prompt = load_prompt("likelihood")
    record = {"title": "red apple"}
    whole = compile_prompt(prompt, tiny_word_tokenizer)
    own = compile_prompt(prompt, tiny_word_tokenizer, ended=False)
    assert whole.end
    assert whole.item_ids(record) == own.item_ids(record) + whole.end
    assert first_token(own) == len(own.start)
    with pytest.raises(RecllmError, match=r"none behind it"):
        first_token(whole)


def test_a_run_has_it_of_cold_items_too(trained):
    run, task = trained
    scorers = load_collaborative(run, task).scorers()
    assert "likelihood" in Fusion.load(run.folder / "fusion.json").names
    values = scorers["likelihood"].score([Query(())], task.index)[0]
    assert np.isfinite(values).all()
    model, prompt = name_model(run, silent)
    expected = read_names(model, prompt.encode_items(task.dataset.catalog))
    assert values == pytest.approx(expected, abs=2e-3)  # read in bf16 where that is fast
    cold = ItemIndex(sorted(task.split.cold_items))
    assert np.isnan(scorers["mf"].score([Query(task.index.ids[:3])], cold)).all()
    assert len(np.unique(scorers["likelihood"].score([Query(())], cold))) == len(cold)


def test_a_control_reads_names_with_random_weights(trained):
    run, task = trained
    control = run.control.model_copy(update={"language_model": "random"})
    drawn = run.model_copy(update={"control": control, "seed": 5})  # the tiny model itself is drawn by seed 0
    models = [name_model(own, silent) for own in (run, drawn)]
    told = [read_names(model, prompt.encode_items(task.dataset.catalog)) for model, prompt in models]
    assert not np.allclose(*told, atol=1e-3)


def test_what_is_added_to_a_bundle_is_as_likely_as_it_would_have_been(trained, tmp_path):
    run, task = trained
    exported, *others = export_run(run, task, ["fp32", "fp16", "int8", "int4"], say=silent)
    assert exported.folder is not None, exported.failures
    assert all(other.parity["likelihood"]["rank_correlation"] > 0.9 for other in others)
    assert read_json(exported.folder / "manifest.json")["likelihood"] == run.model.likelihood
    assert "| likelihood by |" in (exported.folder / "README.md").read_text(encoding="utf-8")
    assert exported.parity["likelihood"]["max_difference"] < 1e-4
    new = [{"item_id": "new", "title": "Red film 99"}, {"item_id": "bare", "title": None}]
    pl.DataFrame(new, schema={"item_id": pl.String, "title": pl.String}).write_csv(tmp_path / "new.csv")
    add_items(exported.folder, tmp_path / "new.csv", tmp_path / "grown")
    grown, model = recllm.load(tmp_path / "grown"), name_model(run, silent)
    (expected,) = read_names(model[0], [model[1].item_ids({"title": "Red film 99"})])
    found = grown.scorers["likelihood"].score([Query(())], ItemIndex(["new", "bare", *task.index.ids]))[0]
    assert found[0] == pytest.approx(expected, abs=1e-4)
    kept = load_collaborative(run, task).scorers()["likelihood"].score([Query(())], task.index)[0]
    assert np.array_equal(found[2:], kept)
    out = grown.recommend([["0", "2"], []], k=5)
    assert np.isfinite(out.shares["likelihood"]).all()
    # Names are read by a graph that is opened late: not by that of a bundle that lies there by then.
    late = recllm.load(tmp_path / "grown")
    (tmp_path / "grown").rename(tmp_path / "gone")
    shutil.copytree(exported.folder, tmp_path / "grown")
    with pytest.raises(RecllmError, match=r"grown' was replaced after it was loaded.*Load it again"):
        late.with_items([{"item_id": "newer", "title": "Red film 98"}])


def test_an_encoder_says_no_likelihood(checkerboard_folder, tiny_encoder_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("RECLLM_CACHE", str(tmp_path / "cache"))
    with pytest.raises(RecllmError, match=r"is an encoder, which says no word's likelihood. Name a causal model as"):
        train_run(settings(checkerboard_folder, tiny_encoder_folder, tmp_path), say=silent)


def test_the_prompt_is_kept_with_the_run(trained):
    run, _ = trained
    assert (run.folder / "recipes" / "likelihood.toml").is_file()
    assert read_json(run.folder / "cf" / "likelihood.json")["ids"]

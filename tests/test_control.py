"""Controls take away what they name and nothing else, in training, in scoring and in what is said of the run."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from recllm.cards import ADAPTER, CARD, write_adapter_card
from recllm.collaborative import load_collaborative
from recllm.control import ControlSettings, controlled
from recllm.errors import RecllmError
from recllm.export import export_run
from recllm.likeness import LikenessRidge
from recllm.lm import load_base
from recllm.ranking import ItemIndex
from recllm.runs import load_run
from recllm.scoring import known_scores
from recllm.tasks import prepare
from recllm.train import train_run
from recllm.trained import language_model, lenders, light_model, load_language, load_light, sequence_scorer
from recllm.vectors import ItemFeatures, Standard

TEXT = np.array([[1, 2], [3, -1], [np.nan, np.nan], [-4, 0], [0, -1], [5, 5]], dtype=np.float32)
FACTORS = np.array([[1], [2], [3], [4], [np.nan], [5]], dtype=np.float32)
NONE = ("model.name=none", "model.item_encoder=minilm-l6")
FEATURES = ItemFeatures(ItemIndex("abcdef"), Standard.fit(TEXT)(TEXT), Standard.fit(FACTORS)(FACTORS))


def test_without_a_control_nothing_changes():
    assert ControlSettings().lacking == ""
    found = controlled(FEATURES, ControlSettings(), 0)
    assert np.array_equal(found.text, FEATURES.text, equal_nan=True)
    assert np.array_equal(found.factors, FEATURES.factors, equal_nan=True)


@pytest.mark.parametrize("part", ["text", "factors"])
def test_shuffled_vectors_are_those_of_other_items(part):
    before, settings = getattr(FEATURES, part).copy(), ControlSettings(**{part: "shuffled"})
    found, again, other = (getattr(controlled(FEATURES, settings, seed), part) for seed in (1, 1, 2))
    assert np.array_equal(found, again, equal_nan=True)
    assert not np.array_equal(found, other, equal_nan=True)
    assert np.array_equal(np.isnan(found), np.isnan(before))  # an item without a vector has none afterwards
    assert sorted(map(tuple, found[~np.isnan(found[:, 0])])) == sorted(map(tuple, before[~np.isnan(before[:, 0])]))
    rest = "factors" if part == "text" else "text"
    assert np.array_equal(getattr(controlled(FEATURES, settings, 1), rest), getattr(FEATURES, rest), equal_nan=True)
    assert np.array_equal(getattr(FEATURES, part), before, equal_nan=True)


def test_text_and_factors_are_not_shuffled_in_one_order():
    rows = np.arange(40, dtype=np.float32)[:, None]
    found = controlled(
        ItemFeatures(ItemIndex(map(str, range(40))), rows, rows),
        ControlSettings(text="shuffled", factors="shuffled"),
        0,
    )
    assert not np.array_equal(found.text, found.factors)


@pytest.mark.parametrize("part", ["text", "factors"])
def test_the_same_vector_for_all_is_the_mean(part):
    found = getattr(controlled(FEATURES, ControlSettings(**{part: "same"}), 0), part)
    raw = TEXT if part == "text" else FACTORS
    mean = Standard.fit(raw)(np.nanmean(raw, axis=0)[None])[0]
    known = ~np.isnan(found[:, 0])
    assert found[known] == pytest.approx(np.tile(mean, (known.sum(), 1)), abs=1e-6)
    assert np.array_equal(known, ~np.isnan(getattr(FEATURES, part)[:, 0]))


@pytest.fixture(scope="module")
def control(tiny_run, tmp_path_factory):
    """A run whose language model was drawn, over items whose text is another's."""
    place = tmp_path_factory.mktemp("control")
    overrides = ["control.language_model=random", "control.text=shuffled", "name=control", "seed=5", f"output={place}"]
    run = load_run(tiny_run / "run.toml", [*overrides, "train.max_steps=3", "light.num_train_epochs=1"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECLLM_CACHE", str(place / "cache"))
        train_run(run, say=lambda _: None)
    return run


def test_a_control_trains_scores_and_says_what_it_lacks(control, tiny_lm_folder):
    task = prepare(control)
    whole = control.model_copy(update={"control": ControlSettings()})
    parts, plain = load_collaborative(control, task), load_collaborative(whole, task)
    assert not np.array_equal(parts.features.text, plain.features.text)
    assert np.array_equal(parts.features.factors, plain.features.factors)
    assert np.array_equal(parts.text.vectors, plain.text.vectors)  # what is not trained has all
    scores = known_scores(control, task, parts, lambda _: None)
    assert np.isfinite(scores["test"]["lm"]).all()
    assert control.control.lacking == "control.language_model = random, control.text = shuffled"
    write_adapter_card(control)
    card = (control.folder / "lm" / ADAPTER / CARD).read_text(encoding="utf-8")
    assert f"| control | {control.control.lacking}: not for use |" in card
    merged, _ = load_language(control, task, parts.features)
    frozen = merged.body.model.embed_tokens.weight  # no adapter is on it
    assert torch.equal(frozen, load_base(tiny_lm_folder, drawn_by=control.seed).model.embed_tokens.weight)
    assert not torch.equal(frozen, load_base(tiny_lm_folder).model.embed_tokens.weight)


def test_a_control_that_is_to_know_no_events_learns_no_vectors_of_items(tiny_run):
    for control, width in (("factors=same", 0), ("text=same", 3)):
        run = load_run(tiny_run, ["model.learnt_width=3", f"control.{control}"])
        task = prepare(run)
        features = load_collaborative(run, task).features
        for model, _, *_ in (
            light_model(run, task, features),
            language_model(run, task, features, None, lambda _: None),
        ):
            assert (0 if model.learnt is None else model.learnt.shape[1]) == width


def test_a_controls_new_items_borrow_nothing_that_is_found_by_their_text(control):
    """The like of an item are found by its true text, and would say of it what the model cannot know."""
    task = prepare(control)
    parts = load_collaborative(control, task)
    assert parts.ridge is not None
    model, history = load_light(control, task, parts.features)
    queries = [example.query for example in task.split.test]
    scored = known_scores(control, task, parts, lambda _: None)["test"]["light"]
    own, lent = (sequence_scorer(model, history, task, who).score(queries, task.index) for who in (None, parts.ridge))
    assert np.allclose(scored, own, atol=1e-5, equal_nan=True)
    plain = control.model_copy(update={"control": ControlSettings()})
    assert lenders(plain, parts) is parts.ridge
    assert lenders(plain, replace(parts, ridge=None)) is parts.neighbours  # as in runs from before
    part = LikenessRidge(
        *(getattr(parts.ridge, key) for key in ("known", "rows", "operator", "share", "scale")), whole=False
    )
    assert lenders(plain, replace(parts, ridge=part)) is parts.neighbours
    assert lenders(plain, replace(parts, ridge=part, neighbours=None)) is part
    assert lenders(control, parts) is None  # whatever of the tiny items has too few events
    assert np.allclose(own, lent, equal_nan=True) is bool(parts.ridge.known.all())


def test_a_control_is_not_shipped(control):
    with pytest.raises(RecllmError, match=r"is a control \(control.language_model = random, .*not for shipping"):
        export_run(control, prepare(control), say=lambda _: None)


def test_a_control_of_a_model_that_is_not_there_is_refused(tiny_run):
    with pytest.raises((RecllmError, ValidationError), match="there is nothing to draw"):
        load_run(tiny_run / "run.toml", ["control.language_model=random", *NONE])


@pytest.mark.parametrize("key", ["model.history=text", "model.task=relevance"])
def test_text_vectors_are_no_control_of_who_reads_the_words(key, tiny_run):
    with pytest.raises((RecllmError, ValidationError), match="this run's language model reads their words"):
        load_run(tiny_run / "run.toml", ["control.text=shuffled", key])
    load_run(tiny_run / "run.toml", ["control.text=shuffled", "model.task=relevance", *NONE])


def test_drawn_weights_are_not_quantised(tiny_run, tmp_path):
    overrides = ["control.language_model=random", "adapter.recipe=qlora", f"output={tmp_path}"]
    with pytest.raises(RecllmError, match=r"draws weights in full precision, and the recipe 'qlora'.*recipe=lora"):
        train_run(load_run(tiny_run / "run.toml", overrides), say=lambda _: None)
    assert not (tmp_path / "tiny" / "vectors.safetensors").exists()

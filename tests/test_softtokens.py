"""Soft tokens: items behind the vocabulary; trained, merged, exported and served they score as in training."""

import json

import numpy as np
import polars as pl
import pytest
import torch

from recllm.adapters import AdapterRecipe, attach
from recllm.errors import RecllmError
from recllm.export import export_run
from recllm.judging import load_relevance
from recllm.lm import embedding_scale, load_base
from recllm.planning import plan_run
from recllm.ranker import load_ranker
from recllm.ranking import ItemIndex
from recllm.runs import Run
from recllm.softtokens import SoftTokens, add_soft_tokens, bake_soft_tokens
from recllm.train import train_run
from recllm.vectors import ItemFeatures

ITEMS = 9


def features(items=ITEMS):
    random = np.random.default_rng(0)
    text, factors = (random.normal(size=(items, width)).astype(np.float32) for width in (6, 4))
    text[2], factors[[3, 5]] = np.nan, np.nan
    return ItemFeatures(ItemIndex(map(str, range(items))), text, factors)


def test_words_stay_and_items_stand_behind_them(tiny_lm_folder):
    base = load_base(tiny_lm_folder)
    words, scale = base.model.get_input_embeddings(), embedding_scale(base)
    ids = torch.tensor([[5, 7, 9]])
    with torch.no_grad():
        before = base.model(input_ids=ids, use_cache=False).last_hidden_state
    torch.manual_seed(0)
    first = add_soft_tokens(base.model, features(), scale)
    assert first == words.num_embeddings
    soft = base.model.get_input_embeddings()
    with torch.no_grad():
        after = base.model(input_ids=ids, use_cache=False).last_hidden_state
        items = soft(torch.arange(first, first + ITEMS))
        mixed = soft(torch.tensor([[5, first + 4], [first + 1, 9]]))
    assert torch.equal(before, after)
    assert torch.equal(mixed[0, 0], words(torch.tensor(5)))
    assert torch.allclose(mixed[0, 1], items[4], atol=1e-6)  # products of other sizes
    assert torch.isfinite(items).all()  # also of an item without text, or without factors
    assert items.pow(2).mean(1).sqrt().numpy() == pytest.approx(np.full(ITEMS, scale), rel=1e-3)
    bake_soft_tokens(base.model)
    with torch.no_grad():
        assert torch.equal(soft(torch.arange(first, first + ITEMS)), items)


def test_only_the_projection_and_the_adapter_train(tiny_lm_folder):
    base = load_base(tiny_lm_folder)
    recipe = AdapterRecipe(tuner="lora", config={"r": 2, "target_modules": "all-linear"})
    body = attach(base.model, recipe)
    add_soft_tokens(body, features(), 1.0)
    trained = [name for name, value in body.named_parameters() if value.requires_grad]
    assert all("lora_" in name or ".items." in name for name in trained)
    assert sum(isinstance(module, SoftTokens) for module in body.modules()) == 1
    assert not any("words" in name for name in trained)


def test_factors_are_dropped_in_training_only(tiny_lm_folder):
    base = load_base(tiny_lm_folder)
    first = add_soft_tokens(base.model, features(), 1.0, factor_dropout=0.999)
    soft, known = base.model.get_input_embeddings(), torch.tensor([[4, first + 4, first + 3]])
    with torch.no_grad():
        trained, read = soft.train()(known), soft.eval()(known)
        without = soft.items(soft.text_vectors[[4]], torch.full_like(soft.item_factors[[4]], torch.nan))
    assert torch.equal(trained[0, 0], read[0, 0])
    assert torch.allclose(trained[0, 1], without[0])
    assert not torch.allclose(read[0, 1], without[0])
    assert torch.equal(trained[0, 2], read[0, 2])  # has no factors anyway


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Every title is the same, and even items are liked: only what was liked before tells the items apart."""
    place, rng = tmp_path_factory.mktemp("alike"), np.random.default_rng(0)
    parts, events = {"train": [], "valid": [], "test": []}, []
    for user in range(60):
        items = rng.permutation(20)[:12]
        rated = [(str(item), int(item % 2 == 0)) for item in items]
        events += [(f"u{user}", item, float(label), seq) for seq, (item, label) in enumerate(rated)]
        for at in range(4, 12):
            history, labels = ([row[part] for row in rated[:at]] for part in (0, 1))
            row = {"user_id": f"u{user}", "target": rated[at][0], "label": rated[at][1], "history": history}
            parts["train" if at < 9 else "valid" if at < 10 else "test"].append(row | {"history_label": labels})
    schema = ["user_id", "item_id", "rating", "seq"]
    pl.DataFrame(events, schema=schema, orient="row").write_parquet(place / "interactions.parquet")
    titles = pl.DataFrame({"item_id": [str(item) for item in range(20)], "title": ["A film"] * 20})
    titles.write_parquet(place / "items.parquet")
    for part, made in parts.items():
        pl.DataFrame(made).write_parquet(place / f"{part}.parquet")
    return place


def run_of(folder, model, output, encoder, *, soft):
    return Run.model_validate(
        {
            "name": "soft" if soft else "words",
            "output": str(output),
            "data": {"name": str(folder), "split": "given", "like_at": 1.0},
            "model": {
                "name": str(model), "item_encoder": str(encoder), "task": "relevance", "max_history": 8,
                "soft_tokens": soft, "factor_dropout": 0.0,
            },
            "adapter": {"lora_dropout": 0.0},
            "light": {"num_train_epochs": 0},
            "cf": {"factors": 4},
            "train": {
                "learning_rate": 5e-3, "head_learning_rate": 5e-3, "num_train_epochs": 8,
                "per_device_train_batch_size": 8, "precision": "fp32",
            },
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(folder, tiny_lm_folder, tiny_encoder_folder, tmp_path_factory):
    place = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECLLM_CACHE", str(place / "cache"))
        run = run_of(folder, tiny_lm_folder, place, tiny_encoder_folder, soft=True)
        yield run, train_run(run, say=lambda _: None)


def told_apart(run, task):
    """The share of (liked, disliked) pairs of test rows of which the liked one has the higher score."""
    scorer, rows = load_relevance(run, task), task.split.test
    scores = scorer.score_pairs([row.query for row in rows], [row.item_id for row in rows])
    labels = np.array([row.label for row in rows])
    return (scores[labels == 1][:, None] > scores[labels == 0]).mean()


def test_items_that_read_alike_are_told_apart(trained):
    assert told_apart(*trained) > 0.75  # by their words alone .5


def test_an_export_scores_as_torch_does(trained):
    run, task = trained
    (result,) = export_run(run, task, ["fp32"], say=lambda _: None)
    assert result.failures == []
    ranker, scorer = load_ranker(result.folder), load_relevance(run, task, bf16=False)
    with pytest.raises(RecllmError, match=r"knows its items by tokens of their own"):
        ranker.with_items([{"item_id": "new", "title": "A film"}])
    queries = [row.query for row in task.split.test[:6]]
    found = ranker.rank([query.history for query in queries], task.index.ids, [query.ratings for query in queries])
    assert found == pytest.approx(scorer.score(queries, task.index), abs=1e-4, nan_ok=True)
    assert (
        json.loads((result.folder / "ranker.json").read_text(encoding="utf-8"))["soft_from"] == scorer.model.soft_from
    )


def test_a_plan_shows_items_in_brackets(trained):
    run, _ = trained
    plan = plan_run(run, lambda _: None)
    assert "[A film]" in plan.examples[0]
    assert plan.examples[0].count("[A film]") >= 5


def test_soft_tokens_are_for_runs_that_judge():
    with pytest.raises(ValueError, match=r"model\.soft_tokens is for model\.task = 'relevance'"):
        Run.model_validate({"name": "x", "data": {"name": "y"}, "model": {"soft_tokens": True}})

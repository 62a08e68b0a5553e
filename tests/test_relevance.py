"""Relevance: reading the history once equals reading every prompt whole; training tells the halves apart."""

import numpy as np
import polars as pl
import pytest
import torch
from transformers import AutoModelForCausalLM

from recllm import relevance
from recllm.adapters import AdapterRecipe, attach
from recllm.data import Catalog, Query
from recllm.errors import RecllmError
from recllm.examples import Examples
from recllm.lm import BaseModel, load_base
from recllm.loop import Stage, fit
from recllm.metrics import auc
from recllm.pointwise import PairPrompts
from recllm.prompts import compile_prompt, load_prompt
from recllm.ranking import ItemIndex, score_pairs
from recllm.relevance import AnswerDifference, RelevanceCollator, RelevanceModel, RelevanceScorer, answer_output


def model_of(folder, prompt):
    base = load_base(folder)
    torch.manual_seed(0)
    return RelevanceModel(base, base.model, answer_output(base), prompt.answer_ids).eval()


@pytest.fixture(scope="module")
def prompt(tiny_tokenizer):
    return compile_prompt(load_prompt("relevance"), tiny_tokenizer)


@pytest.fixture(scope="module")
def causal(tiny_lm_folder, prompt):
    return model_of(tiny_lm_folder, prompt)


@pytest.fixture(scope="module")
def encoder_prompt(tiny_word_tokenizer):
    return compile_prompt(load_prompt("relevance"), tiny_word_tokenizer)


@pytest.fixture(scope="module")
def encoder(tiny_encoder_folder, encoder_prompt):
    return model_of(tiny_encoder_folder, encoder_prompt)


QUERIES = [Query(("2", "4", "6")), Query(("1",)), Query(tuple(map(str, range(20)))), Query(("x", "8"))]


def naive(folder, prompt, catalog, query, item):
    """The logits of the two answers after the whole prompt, by the model as transformers gives it."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = prompt.prefix(query, catalog) + prompt.suffix(catalog.record(item))
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
    positive, negative = prompt.answer_ids
    return float(logits[positive] - logits[negative])


def test_a_shared_prefix_equals_the_whole_prompt(causal, prompt, checkerboard, tiny_lm_folder):
    catalog = checkerboard.catalog
    found = RelevanceScorer(causal, prompt, catalog, calibrated=False).score(QUERIES, ItemIndex(catalog.ids))
    for row, query in enumerate(QUERIES):
        for column in (0, 5, 17, 23):
            assert found[row, column] == pytest.approx(
                naive(tiny_lm_folder, prompt, catalog, query, catalog.ids[column]), abs=1e-5
            )


def test_calibration_takes_off_the_score_after_an_empty_history(causal, prompt, checkerboard, tiny_lm_folder):
    catalog, index = checkerboard.catalog, ItemIndex(["3", "12", "23"])
    raw, calibrated = (
        RelevanceScorer(causal, prompt, catalog, calibrated=on).score(QUERIES, index) for on in (False, True)
    )
    empty = [naive(tiny_lm_folder, prompt, catalog, Query(()), item) for item in index.ids]
    assert raw - calibrated == pytest.approx(np.tile(empty, (len(QUERIES), 1)), abs=1e-5)


@pytest.mark.parametrize("which", ["causal", "encoder"])
def test_nothing_known_is_nan(which, request, checkerboard):
    model = request.getfixturevalue(which)
    prompt = request.getfixturevalue("prompt" if which == "causal" else "encoder_prompt")
    records = [{"item_id": "1", "title": "Red film"}, {"item_id": "2", "title": None}]
    catalog = Catalog(pl.DataFrame(records, schema={"item_id": pl.String, "title": pl.String}))
    found = RelevanceScorer(model, prompt, catalog).score(
        [Query(()), Query(("x",)), Query(("2",)), Query(("1",))], ItemIndex(["1", "2", "x"])
    )
    assert np.isnan(found[:3]).all()
    assert np.isnan(found[3]).tolist() == [False, True, True]


@pytest.mark.parametrize("which", ["causal", "encoder"])
def test_batches_and_order_do_not_change_a_score(which, request, checkerboard, monkeypatch):
    model = request.getfixturevalue(which)
    prompt = request.getfixturevalue("prompt" if which == "causal" else "encoder_prompt")
    scorer = RelevanceScorer(model, prompt, checkerboard.catalog)
    index = ItemIndex(checkerboard.catalog.ids)
    whole = scorer.score(QUERIES, index)
    order = np.random.default_rng(0).permutation(len(index))
    shuffled = scorer.score(QUERIES[::-1], ItemIndex(index.ids[place] for place in order))
    assert shuffled[::-1] == pytest.approx(whole[:, order], abs=1e-5)
    monkeypatch.setattr(relevance, "TOKENS_AT_ONCE", (40, 40))
    assert scorer.score(QUERIES, index) == pytest.approx(whole, abs=1e-5)
    items = [index.ids[place] for place in order[: len(QUERIES)]]
    pairs = score_pairs(scorer, QUERIES, items)
    assert pairs == pytest.approx([whole[row, index.rows([item])[0]] for row, item in enumerate(items)], abs=1e-5)
    many = score_pairs(scorer, [QUERIES[0]] * 24 + [Query(())], [*index.ids, "1"])
    assert many == pytest.approx([*whole[0], np.nan], abs=1e-5, nan_ok=True)


def test_histories_that_go_on_from_one_another_are_read_once(causal, prompt, checkerboard, tiny_tokenizer, monkeypatch):
    """The end of a long history begins at a multiple of the stride; who begins alike stands in one tree."""
    strided = compile_prompt(prompt.prompt.model_copy(update={"max_history": 6, "history_stride": 3}), tiny_tokenizer)
    scorer = RelevanceScorer(causal, strided, checkerboard.catalog)
    index, read = ItemIndex(checkerboard.catalog.ids), []
    whole = causal.logits
    monkeypatch.setattr(causal, "logits", lambda ids, lengths: read.append(len(ids)) or whole(ids, lengths))
    queries = [Query(tuple(map(str, range(length))), user) for user in "ab" for length in (7, 2, 14, 6, 8, 13, 20)]
    queries += [Query(("5", "4"), "a"), Query((), "a"), Query(("x",), "b")]
    items = [index.ids[place % 24] for place in range(len(queries))]
    expected = np.array(
        [scorer.score([query], ItemIndex([item]))[0, 0] for query, item in zip(queries, items, strict=True)]
    )
    assert np.isnan(expected[-2:]).all()
    found = scorer.score_pairs(queries, items)
    assert found == pytest.approx(expected, abs=1e-5, nan_ok=True)
    assert sum(read) == 2 * 1 + 1  # only who begins like nobody else (20 events, and 5 before 4) is a whole prompt
    monkeypatch.setattr(relevance, "TREE_TOKENS", 40)
    assert scorer.score_pairs(queries, items) == pytest.approx(expected, abs=1e-5, nan_ok=True)


@pytest.mark.parametrize("which", ["causal", "encoder"])
def test_weights_rounded_once_score_as_those_rounded_at_every_pass(which, request, checkerboard):
    folder = request.getfixturevalue("tiny_lm_folder" if which == "causal" else "tiny_encoder_folder")
    prompt = request.getfixturevalue("prompt" if which == "causal" else "encoder_prompt")
    index = ItemIndex(checkerboard.catalog.ids)
    model = model_of(folder, prompt)
    scorer = RelevanceScorer(model, prompt, checkerboard.catalog)
    exact, scorer._bf16 = scorer.score(QUERIES, index), True  # autocast over float32 weights
    scorer._empty.clear()
    expected = scorer.score(QUERIES, index)
    lean = RelevanceScorer(model, prompt, checkerboard.catalog, bf16=True)
    kinds = {module.weight.dtype for module in model.body.modules() if type(module) is torch.nn.Linear}
    assert kinds == {torch.bfloat16}
    assert lean.reader.shares == (which == "causal")
    assert np.array_equal(lean.score(QUERIES, index), expected)
    assert not np.array_equal(expected, exact)


def test_the_scores_of_an_encoder_are_those_of_whole_pairs(encoder, encoder_prompt, checkerboard):
    catalog = checkerboard.catalog
    found = RelevanceScorer(encoder, encoder_prompt, catalog).score(QUERIES[:1], ItemIndex(["5"]))
    ids = encoder_prompt.prefix(QUERIES[0], catalog) + encoder_prompt.suffix(catalog.record("5")) + encoder_prompt.end
    with torch.inference_mode():
        hidden = encoder.body(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(0)
        expected = float(encoder.difference(hidden))
    assert found[0, 0] == pytest.approx(expected, abs=1e-5)


def test_a_history_that_does_not_fit_loses_its_oldest_items(causal, prompt, checkerboard, monkeypatch):
    catalog, query = checkerboard.catalog, Query(tuple(map(str, range(20))))
    whole = PairPrompts(prompt, catalog, causal)
    monkeypatch.setattr(causal, "max_tokens", len(whole.whole(query, "3")) - 30)
    short = PairPrompts(prompt, catalog, causal)
    assert all(len(short.whole(query, item)) <= causal.max_tokens for item in catalog.ids)
    kept = [short.prefix(query) == prompt.prefix(Query(query.history[-count:]), catalog) for count in range(1, 20)]
    assert sum(kept) == 1


def test_a_long_history_gives_way_by_strides_as_long_as_half_of_it_stays(
    causal, prompt, checkerboard, tiny_tokenizer, monkeypatch
):
    strided = compile_prompt(prompt.prompt.model_copy(update={"max_history": 20, "history_stride": 4}), tiny_tokenizer)
    whole = PairPrompts(strided, checkerboard.catalog, causal)
    query = Query(tuple(map(str, range(20))))
    assert whole.beginning(query) == (None, 0, "0")
    for over, first in ((1, 4), (len(whole.stem(query)) - len(whole.stem(Query(("1", "2", "3")))), 17)):
        monkeypatch.setattr(causal, "max_tokens", len(whole.whole(query, "3")) - over)
        short = PairPrompts(strided, checkerboard.catalog, causal)
        assert short.beginning(query)[1] == first
        assert short.stem(query) == whole.stem(Query(query.history[first:]))
        assert all(len(short.whole(query, item)) <= causal.max_tokens for item in checkerboard.catalog.ids)


def test_scoring_leaves_the_training_mode_as_it_was(causal, prompt, checkerboard):
    causal.train()
    try:
        RelevanceScorer(causal, prompt, checkerboard.catalog).score(QUERIES[:1], ItemIndex(["1"]))
        assert causal.training
    finally:
        causal.eval()


def test_no_output_matrix_no_answers(causal, encoder, tiny_lm_folder, tiny_encoder_folder):
    base = load_base(tiny_lm_folder)
    with pytest.raises(RecllmError, match=r"has no output matrix, so it has no answer words. Use a causal"):
        answer_output(BaseModel(base.model, base.tokenizer, True, base.folder))
    assert answer_output(load_base(tiny_encoder_folder)) is None


def test_an_answer_is_the_difference_of_logits_with_the_output_matrix_own_bias():
    output = torch.nn.Linear(4, 9)  # Phi's has one
    hidden = torch.randn(3, 4)
    logits = output(hidden)
    assert torch.allclose(AnswerDifference(output, (7, 2))(hidden), logits[:, 7] - logits[:, 2], atol=1e-6)


def train_rows(dataset, prompts, rng, sides):
    """The liked items of the users of `sides` with label 1, as many of the other half with label 0, after a history."""
    rows = []
    for query in dataset.interactions.histories().values():
        side = int(query.history[0]) % 2
        for cut in (2, 4, 6, 8) if side in sides else ():
            other = str(2 * rng.integers(12) + 1 - side)
            rows += [
                (prompts.whole(Query(query.history[:cut]), item), label, -1)
                for item, label in ((query.history[cut], 1.0), (other, 0.0))
            ]
    return [rows[place] for place in rng.permutation(len(rows))]


def widely_drawn(base):
    """The base model with larger random weights: at the usual scale a tiny attention is flat and passes nothing on."""
    drawn = torch.Generator().manual_seed(0)
    for parameter in base.model.parameters():
        if parameter.dim() == 2:
            parameter.data.normal_(0.0, 0.15, generator=drawn)
    return base


# Whether history and candidate have one colour is more than a two-layer encoder with a mean pool finds in a few
# seconds; it learns which colour the users of one side like.
@pytest.mark.parametrize(("which", "sides"), [("causal", (0, 1)), ("encoder", (0,))])
def test_training_tells_the_halves_apart(which, sides, request, checkerboard, tmp_path):
    folder = request.getfixturevalue("tiny_lm_folder" if which == "causal" else "tiny_encoder_folder")
    prompt = request.getfixturevalue("prompt" if which == "causal" else "encoder_prompt")
    base = widely_drawn(load_base(folder))
    body = attach(
        base.model, AdapterRecipe(tuner="lora", config={"r": 8, "lora_alpha": 32, "target_modules": "all-linear"})
    )
    torch.manual_seed(0)
    model = RelevanceModel(base, body, answer_output(base), prompt.answer_ids).eval()
    frozen = {name: value.clone() for name, value in model.named_parameters() if not value.requires_grad}
    rng, prompts = np.random.default_rng(0), PairPrompts(prompt, checkerboard.catalog, model)
    rows = [row for _ in range(8) for row in train_rows(checkerboard, prompts, rng, sides)]
    stage = Stage(
        "relevance",
        model,
        Examples(rows),
        Examples(rows[:64]),
        collator=RelevanceCollator(),
        valid_collator=RelevanceCollator(),
        arguments={"learning_rate": 3e-3, "per_device_train_batch_size": 16, "eval_steps": 40, "warmup_steps": 5},
        compute_metrics=lambda found: {"auc": auc(found.label_ids[:, 0], found.predictions.reshape(-1))},
        measures=("auc",),
    )
    fit(stage, folder=tmp_path, say=lambda _: None)
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in frozen.items())
    scorer = RelevanceScorer(model, prompt, checkerboard.catalog)
    queries = [Query(tuple(map(str, range(start, start + 10, 2)))) for start in (0, 1, 4, 7) if start % 2 in sides]
    scores = scorer.score(queries, ItemIndex(checkerboard.catalog.ids))
    for query, row in zip(queries, scores, strict=True):
        own = np.arange(24) % 2 == int(query.history[0]) % 2
        assert auc(own.astype(float), row) >= 0.95

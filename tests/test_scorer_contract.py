"""One contract for everything that scores: shape, dtype, NaN for unknown, and no influence between rows or columns."""

from functools import partial

import numpy as np
import pytest

import recllm
from recllm.data import Query
from recllm.encoding import SequenceScorer
from recllm.evaluate import KnownScores
from recllm.fusion import FusedScorer, Fusion
from recllm.histories import HistoryFormat, item_token_history, text_history
from recllm.itemitem import EASE, Transitions
from recllm.mf import ExplicitMF, FactorSettings, ImplicitMF
from recllm.priors import ItemMean, Popularity, TextSimilarity, UserMean
from recllm.prompts import compile_prompt, load_prompt
from recllm.ranking import ItemIndex
from recllm.vectors import ItemFeatures


def text_similarity(dataset, train):
    vectors = np.random.default_rng(0).normal(size=(len(dataset.catalog), 6)).astype(np.float32)
    return TextSimilarity(ItemIndex(dataset.catalog.ids), vectors)


def known_scores(dataset, train):
    queries = [*train.histories().values(), Query(())]
    scores = np.random.default_rng(0).normal(size=(len(queries), len(dataset.catalog))).astype(np.float32)
    scores[-1] = np.nan
    return KnownScores(queries, ItemIndex(dataset.catalog.ids), scores)


def fused(dataset, train):
    scorers = {
        "popularity": Popularity.fit(train, dataset.catalog.ids),
        "mf": implicit_mf(dataset, train),
        "text": text_similarity(dataset, train),
    }
    return FusedScorer(scorers, Fusion.plain([*scorers, "absent"]), train.item_counts())


def implicit_mf(dataset, train):
    return ImplicitMF.fit(train, FactorSettings(factors=4, iterations=3), seed=1, threads=1)


def features(dataset):
    random, items = np.random.default_rng(0), len(dataset.catalog)
    text, factors = random.normal(size=(items, 6)), random.normal(size=(items, 4))
    return ItemFeatures(ItemIndex(dataset.catalog.ids), text.astype(np.float32), factors.astype(np.float32))


def sequence(model, history, given):
    from recllm.heads import item_heads
    from recllm.trained import torch_encode

    return SequenceScorer(torch_encode(model), history, given.index, *item_heads(model))


def light(dataset, train):
    import torch

    from recllm.sequence import LightBody, NextItemModel

    torch.manual_seed(0)
    given, warm = features(dataset), np.ones(len(dataset.catalog), dtype=bool)
    body = LightBody(16, layers=1, heads=2, positions=6, dropout=0.1)
    model = NextItemModel(body, given, width=16, head_width=16, warm=warm, token_scale=1.0)
    return sequence(model, HistoryFormat((), (), 6, 1), given)


def language(dataset, train, folder, kind):
    import torch

    from recllm.lm import load_base, next_item_model
    from recllm.runs import ModelSettings

    base, given, warm = load_base(folder), features(dataset), np.ones(len(dataset.catalog), dtype=bool)
    compiled = compile_prompt(load_prompt("next_item"), base.tokenizer)
    texts = compiled.encode_items(dataset.catalog)
    history = item_token_history(compiled.start, 6, 2) if kind == "items" else text_history(compiled.start, texts, 6, 2)
    torch.manual_seed(0)
    return sequence(next_item_model(base, None, given, warm, history, ModelSettings(head_width=16)), history, given)


def relevance(dataset, train, folder):
    import torch

    from recllm.lm import load_base
    from recllm.relevance import RelevanceModel, RelevanceScorer, answer_output

    base = load_base(folder)
    prompt = compile_prompt(load_prompt("relevance"), base.tokenizer)
    torch.manual_seed(0)
    model = RelevanceModel(base, base.model, answer_output(base), prompt.answer_ids)
    return RelevanceScorer(model, prompt, dataset.catalog)


def onnx(name):
    """A scorer of the bundle, whose catalogue is the checkerboard's."""
    return lambda dataset, train, folder: recllm.load(folder).scorers[name]


def onnx_fused(dataset, train, folder):
    bundle = recllm.load(folder)
    return FusedScorer(bundle.scorers, bundle.fusion, bundle.item_counts)


# (name, factory(dataset, its train interactions, *fixtures) -> Scorer, whether an empty history without ratings is
# unknown to it, names of the fixtures)
SCORERS = [
    ("popularity", lambda dataset, train: Popularity.fit(train, dataset.catalog.ids), False),
    ("item mean", lambda dataset, train: ItemMean.fit(train), False),
    ("user mean", lambda dataset, train: UserMean.fit(train), True),
    ("text similarity", text_similarity, True),
    ("implicit mf", implicit_mf, True),
    ("explicit mf", lambda dataset, train: ExplicitMF.fit(train, seed=1), True),
    ("ease", lambda dataset, train: EASE.fit(train), True),
    ("transitions", lambda dataset, train: Transitions.fit(train), True),
    ("known scores", known_scores, True),
    ("fused", fused, False),
    ("light", light, True),
    ("lm over item tokens", partial(language, kind="items"), True, "tiny_lm_folder"),
    ("lm over text", partial(language, kind="text"), True, "tiny_lm_folder"),
    ("relevance", relevance, True, "tiny_lm_folder"),
    ("relevance by an encoder", relevance, True, "tiny_encoder_folder"),
    ("onnx light", onnx("light"), True, "tiny_bundle"),
    ("onnx lm", onnx("lm"), True, "tiny_bundle"),
    ("onnx fused", onnx_fused, False, "tiny_bundle"),
]
ANY_ITEM = {"user mean"}
"""Scorers that judge the user alone, so that an unknown item is as good as any."""


@pytest.fixture(scope="module", params=SCORERS, ids=lambda entry: entry[0])
def entry(request, rated_checkerboard):
    name, factory, needs_history, *fixtures = request.param
    train, given = rated_checkerboard.interactions, [request.getfixturevalue(fixture) for fixture in fixtures]

    def build():
        return factory(rated_checkerboard, train, *given)

    return name, build, build(), needs_history


@pytest.fixture(scope="module")
def queries(rated_checkerboard):
    return [*list(rated_checkerboard.interactions.histories().values())[:6], Query(())]


@pytest.fixture(scope="module")
def candidates(rated_checkerboard):
    return ItemIndex([*rated_checkerboard.catalog.ids, "never seen"])


def equal(a, b):
    """Equal up to float32 rounding (another shape of matrix product sums in another order), NaN in the same places."""
    return a == pytest.approx(b, rel=1e-4, abs=1e-5, nan_ok=True)


def test_shape_and_dtype(entry, queries, candidates):
    scores = entry[2].score(queries, candidates)
    assert scores.shape == (len(queries), len(candidates))
    assert scores.dtype == np.float32
    assert not np.isinf(scores).any()
    assert not np.isnan(scores[:-1, :-1]).any()


def test_unknown_is_nan(entry, queries, candidates):
    name, _, scorer, needs_history = entry
    scores = scorer.score(queries, candidates)
    assert np.isnan(scores[-1]).all() if needs_history else not np.isnan(scores[-1, :-1]).any()
    if name not in ANY_ITEM:
        assert np.isnan(scores[:, -1]).all()


def test_permuted_candidates_permute_scores(entry, queries, candidates):
    order = np.random.default_rng(0).permutation(len(candidates))
    permuted = entry[2].score(queries, ItemIndex(candidates.ids[place] for place in order))
    assert equal(permuted, entry[2].score(queries, candidates)[:, order])


def test_a_batch_equals_its_rows_one_by_one(entry, queries, candidates):
    single = np.concatenate([entry[2].score([query], candidates) for query in queries])
    assert equal(single, entry[2].score(queries, candidates))


def test_same_seed_same_result(entry, queries, candidates):
    _, build, scorer, _ = entry
    assert np.array_equal(build().score(queries, candidates), scorer.score(queries, candidates), equal_nan=True)

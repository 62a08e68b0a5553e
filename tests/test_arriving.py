"""Scorers of a bundle that come to know new items: who knows them by text, who by their like, who not at all."""

import numpy as np
import pytest

import recllm
from recllm.arriving import knowing
from recllm.data import Query
from recllm.neighbours import Neighbours

RECORDS = [{"item_id": "red", "title": "Red film 99", "genres": "Drama"}, {"item_id": "bare"}]
HISTORY = [Query(("0", "2"))]


@pytest.fixture(scope="module")
def bundle(tiny_bundle):
    return recllm.load(tiny_bundle)


@pytest.fixture
def given(bundle):
    """The catalogue with the new items, and their text vectors."""
    catalog = bundle.catalog.with_items(RECORDS)
    return catalog, bundle._item_encoder([catalog.record(record["item_id"]) for record in RECORDS])


def scores(scorers, catalog):
    index = recllm.ranking.ItemIndex(catalog.ids)
    return {name: scorer.score(HISTORY, index)[0] for name, scorer in scorers.items()}


def test_who_knows_a_new_item(bundle, given):
    catalog, text = given
    found = scores(knowing(bundle.scorers, catalog, text, bundle._item_graphs), catalog)
    red = {name for name, own in found.items() if np.isfinite(own[-2])}
    assert red >= {"popularity", "text", "neighbours", "expected_popularity", "light", "lm"}
    assert not red & {"mf", "ease", "transitions"}
    assert found["popularity"][-2] == 0.0
    for name in ("popularity", "text", "light", "lm"):
        assert np.isnan(found[name][-1]), name  # nothing is known of what has neither text nor likeness
    for name, own in scores(bundle.scorers, bundle.catalog).items():
        assert found[name][:-2] == pytest.approx(own, abs=1e-5, nan_ok=True), name


def test_without_text_vectors_nothing_is_told_of_the_like(bundle, given):
    catalog, text = given
    without = {name: scorer for name, scorer in bundle.scorers.items() if name != "text"}
    grown = knowing(without, catalog, text, bundle._item_graphs)
    assert grown["neighbours"] is bundle.scorers["neighbours"]
    own = bundle._item_graphs["light"].run(["heads"], {"text": text[:1], "factors": factors(bundle)})[0]
    assert grown["light"].items[-2, :-1] == pytest.approx(own[0], abs=1e-5)


def factors(bundle):
    width = bundle._item_graphs["light"].get_inputs()[1].shape[1]
    return np.full((1, width), np.nan, dtype=np.float32)


def test_neighbours_lend_where_no_regression_tells(bundle, given):
    """As in a bundle from before there was regression."""
    catalog, text = given
    light = bundle.scorers["light"]
    before = recllm.graphscorer.TableScorer(
        light.graph, light.table, light.history, light.index, light.items[:, :-1], light.items[:, -1], light.cold_bias
    )
    grown = knowing({**bundle.scorers, "light": before}, catalog, text, bundle._item_graphs)
    alike = grown["neighbours"]
    assert isinstance(alike, Neighbours)
    mean = alike.means(np.concatenate([light.items, np.zeros((2, light.items.shape[1]), np.float32)]), np.array([24]))
    assert grown["light"].items[-2] == pytest.approx(mean[0], abs=1e-5)
    told = knowing(bundle.scorers, catalog, text, bundle._item_graphs)["light"]
    assert told.items[-2] != pytest.approx(mean[0], abs=1e-3)

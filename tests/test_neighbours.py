"""Neighbours: shared columns and words, means of a collaborative scorer's vectors, new items only."""

import numpy as np
import polars as pl
import pytest

from recllm.data import Catalog, Query
from recllm.itemitem import EASE
from recllm.mf import FactorSettings, ImplicitMF
from recllm.neighbours import (
    MOST_FEW,
    Neighbours,
    NeighbourSettings,
    SharedFeatures,
    features_of,
    few_events,
    nearest,
)
from recllm.ranking import ItemIndex

WINES = [
    {"item_id": "a", "title": "Casa Red", "grapes": "Merlot, Malbec", "country": "Brazil"},
    {"item_id": "b", "title": "Casa White", "grapes": "Chardonnay", "country": "Brazil"},
    {"item_id": "c", "title": "Haus Weiss", "grapes": "Riesling", "country": "Germany"},
    {"item_id": "d", "title": "Casa Rosso", "grapes": "merlot", "country": "Brazil"},
    {"item_id": "e", "title": "Nothing alike", "grapes": None, "country": None},
]
CATALOG = Catalog(pl.DataFrame(WINES))
KNOWN = np.array([True, True, True, False, False])
TEXT = np.full((5, 2), np.nan, dtype=np.float32)


def test_what_items_may_share():
    assert list(features_of(WINES[0])) == [
        "title casa",
        "title red",
        "grapes merlot",
        "grapes malbec",
        "country brazil",
    ]
    assert list(features_of({"item_id": "x", "title": None, "plot": "a long story " * 9})) == []


def test_rare_features_count_more_and_only_known_items_are_found():
    shared = SharedFeatures(WINES, KNOWN)
    cosines = shared.cosines(3)
    assert cosines[0] > cosines[1] > cosines[2] == 0.0
    assert cosines[3] == 0.0
    assert shared.cosines(0)[0] == pytest.approx(1.0)
    assert shared.rarity["country brazil"] < shared.rarity["grapes merlot"]


def test_nobody_is_its_own_neighbour_and_nothing_alike_weighs_nothing():
    places, weights = nearest(CATALOG, TEXT, KNOWN, range(5), 2)
    assert places.shape == weights.shape == (5, 2)
    assert all(row not in places[row][weights[row] > 0] for row in range(5))
    assert places[3].tolist() == [0, 1]
    assert weights[3].sum() == pytest.approx(1.0)
    assert weights[3, 0] > weights[3, 1] > 0
    assert weights[4].tolist() == [0.0, 0.0]
    text = np.array([[1, 0], [0, 1], [0, 1], [0, 1], [1, 0]], dtype=np.float32)
    places, weights = nearest(CATALOG, text, KNOWN, [4], 2)
    assert places[0, 0] == 0  # by its text alone
    assert weights[0].tolist() == [1.0, 0.0]


def test_an_item_is_new_below_a_share_of_the_usual_number_of_events():
    counts, settings = np.array([0, 0, 40, 60, 80, 3]), NeighbourSettings()
    assert few_events(counts, settings) == 25  # half of 50, the median of 40, 60, 80 and 3
    assert few_events(counts * 100, settings) == MOST_FEW
    assert few_events(np.array([0, 1, 2]), settings) == 1
    assert few_events(np.zeros(3, dtype=np.int64), settings) == 1
    assert few_events(counts, NeighbourSettings(few_share=0.0)) == 1
    assert few_events(counts, NeighbourSettings(neighbours=0)) == 25
    assert few_events(counts, NeighbourSettings(neighbours=0, regression=False)) == 1


@pytest.fixture(scope="module", params=["ease", "mf"])
def fitted(request, checkerboard):
    train = checkerboard.interactions
    base = EASE.fit(train) if request.param == "ease" else ImplicitMF.fit(train, FactorSettings(factors=4), seed=1)
    known = np.array([int(item) < 20 for item in checkerboard.catalog.ids])
    text = np.full((len(known), 2), np.nan, dtype=np.float32)
    return Neighbours.fit(checkerboard.catalog, text, known, base, count=3)


def test_a_new_item_is_scored_as_the_mean_of_its_neighbours(fitted, checkerboard):
    index = ItemIndex(checkerboard.catalog.ids)
    queries = [Query(("0", "2", "4")), Query(("1", "3"))]
    scores, base = fitted.score(queries, index), fitted.base.score(queries, index)
    new = ~fitted.known
    assert np.isnan(scores[:, fitted.known]).all()
    places, weights = fitted.places[new], fitted.weights[new]
    assert scores[:, new] == pytest.approx(np.einsum("qik,ik->qi", base[:, places], weights), abs=1e-5)
    as_new = fitted.score_as_new(queries, index)
    assert as_new[:, new] == pytest.approx(scores[:, new], abs=1e-6)
    # Even items are red and odd ones blue, and whoever likes one colour likes its other items too.
    assert as_new[0, 0::2].mean() > as_new[0, 1::2].mean()
    assert as_new[1, 1::2].mean() > as_new[1, 0::2].mean()
    assert np.isnan(fitted.score([Query(())], index)).all()
    assert np.isnan(fitted.score(queries, ItemIndex(["zz"]))).all()


def test_saved_and_grown_neighbours_score_the_same(fitted, checkerboard, tmp_path):
    fitted.base.save(tmp_path)
    fitted.save(tmp_path)
    again = Neighbours.load(tmp_path)
    index, queries = ItemIndex(checkerboard.catalog.ids), [Query(("0", "2"))]
    assert np.array_equal(again.score(queries, index), fitted.score(queries, index), equal_nan=True)
    catalog = checkerboard.catalog.with_items([{"item_id": "new", "title": "Red film 99"}])
    text = np.full((len(catalog.ids), 2), np.nan, dtype=np.float32)
    grown = again.grown(catalog, text)
    scores = grown.score([*queries, Query(("1", "3"))], ItemIndex([*index.ids, "new"]))
    assert scores[:1, :-1] == pytest.approx(fitted.score(queries, index), abs=1e-6, nan_ok=True)
    assert scores[0, -1] > scores[1, -1]


def test_running_text_is_no_list_of_features():
    plot = "Sid, a boy, tears toys apart, and Woody saves one of them from the house beyond the fence of the garden"
    found = set(features_of({"item_id": "1", "title": "Toy", "genres": "Drama, Comedy", "plot": plot}))
    assert found == {"title toy", "genres drama", "genres comedy"}

"""Rated neighbours: ratings of like items, above their means, also for items that nobody has rated."""

import numpy as np
import polars as pl
import pytest

from recllm.data import Catalog, Query
from recllm.neighbours import TEXT_SHARE
from recllm.priors import ItemMean
from recllm.ranking import ItemIndex
from recllm.ratedneighbours import SHRINKAGE, RatedNeighbours

ITEMS = Catalog(
    pl.DataFrame(
        {
            "item_id": ["a", "b", "c", "d"],
            "title": ["one", "two", "three", "four"],
            "genre": ["war", "war", "love", "love"],
        }
    )
)
TEXT = np.array([[1.0, 0.0], [0.6, 0.8], [-1.0, 0.0], [np.nan, np.nan]], dtype=np.float32)
MEANS = ItemMean(ItemIndex(["a", "c"]), np.array([3.0, 4.0], dtype=np.float32))


@pytest.fixture
def scorer():
    return RatedNeighbours(ITEMS, TEXT, MEANS)


def test_likeness_is_that_of_columns_and_text(scorer):
    shared = np.log(5 / 3) ** 2 / (np.log(5 / 3) ** 2 + np.log(5 / 2) ** 2)  # one of two features, by their rarity
    assert scorer.alike[0, 1] == pytest.approx(shared + TEXT_SHARE * 0.6)
    assert scorer.alike[0, 2] == 0.0  # opposite texts are no reason to dislike
    assert scorer.alike[2, 3] == pytest.approx(shared)
    assert np.array_equal(scorer.alike, scorer.alike.T)
    assert scorer.means.tolist() == [3.0, 3.5, 4.0, 3.5]


def test_scores_by_hand(scorer):
    query = Query(("a", "c", "zz"), ratings=(5.0, 1.0, 5.0))
    found = scorer.score([query], ItemIndex(["b", "d", "zz"]))[0]
    for place, row in ((0, 1), (1, 3)):
        near_a, near_c = scorer.alike[row, [0, 2]]
        expected = (near_a * 2.0 + near_c * -3.0) / (near_a + near_c + SHRINKAGE)
        assert found[place] == pytest.approx(expected, abs=1e-6)
    assert found[0] > 0 > found[1]  # "b" and "d" have no rating at all
    assert np.isnan(found[2])


def test_who_has_not_rated_is_not_judged(scorer):
    queries = [Query(("a",)), Query(()), Query(("zz",), ratings=(5.0,)), Query(("a", "c"), ratings=(None, None))]
    assert np.isnan(scorer.score(queries, ItemIndex(["b"]))).all()
    partly, bare = Query(("c", "a"), ratings=(None, 5.0)), Query(("a",), ratings=(5.0,))
    assert np.array_equal(*(scorer.score([query], ItemIndex(["b"])) for query in (partly, bare)))
    assert scorer.score([], ItemIndex(["b"])).shape == (0, 1)

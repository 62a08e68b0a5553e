"""Expected popularity: of new items only, the same for everybody, and told of items that are added."""

import numpy as np
import polars as pl
import pytest

from recllm.data import Catalog, Query
from recllm.expectation import ExpectedPopularity
from recllm.likeness import LikenessRidge, likeness_to
from recllm.ranking import ItemIndex, score_as_new

BRANDS, ITEMS = 5, 60
QUERIES = [Query(()), Query(("i1",))]


def shop(items=ITEMS):
    rows = [{"item_id": f"i{row}", "title": f"thing {row}", "brand": f"brand {row % BRANDS}"} for row in range(items)]
    return Catalog(pl.DataFrame(rows))


def no_text(items=ITEMS):
    return np.full((items, 2), np.nan, dtype=np.float32)


def fitted(items, counts):
    ridge = LikenessRidge.fit(shop(items), no_text(items), counts, counts >= 20)
    return ExpectedPopularity.fit(ItemIndex(shop(items).ids), ridge, counts)


@pytest.fixture
def counts():
    drawn = np.tile([300, 100, 30, 10, 3], ITEMS // BRANDS)
    drawn[50:] = 0
    return drawn


def test_it_speaks_of_new_items_and_as_if_all_were_new_where_that_is_asked(counts):
    told, index = fitted(ITEMS, counts), ItemIndex(["x", *shop().ids])
    found, as_new = told.score(QUERIES, index), score_as_new(told, QUERIES, index)
    assert found.shape == as_new.shape == (2, ITEMS + 1)
    assert np.array_equal(np.isnan(found[1, 1:]), counts >= 20)
    assert np.isnan(as_new[:, 0]).all()
    assert np.array_equal(as_new[:, 1:], np.tile(told.values, (2, 1)))
    new = ~np.isnan(found)
    assert np.array_equal(found[new], as_new[new])
    assert (np.diff(found[0, 51:56]) < 0).all()


def test_items_that_are_added_are_told_as_if_they_had_been_there(counts, tmp_path):
    first, whole = fitted(50, counts[:50]), fitted(ITEMS, counts)
    first.save(tmp_path)
    again = ExpectedPopularity.load(tmp_path)
    assert np.array_equal(again.values, first.values)
    for end in (55, ITEMS):  # in two rounds
        near = likeness_to(shop(end), no_text(end), again.told.rows, range(len(again.items), end))
        again = again.grown(ItemIndex(shop(end).ids), near)
    assert again.items.ids == whole.items.ids
    assert again.values == pytest.approx(whole.values, abs=1e-4)
    scores = [told.score(QUERIES, whole.items) for told in (again, whole)]
    assert np.allclose(*scores, atol=1e-4, equal_nan=True)
    assert np.array_equal(again.known, counts >= 20)

"""Expected popularity: told by columns, words and text, not by own events; new items are told when added."""

import numpy as np
import polars as pl
import pytest

from recllm.data import Catalog, Query
from recllm.expectation import BY_CHANCE, MOST_FITTED, RIDGES, ExpectedPopularity
from recllm.neighbours import Likeness
from recllm.ranking import ItemIndex

BRANDS, ITEMS = 5, 60
USUAL = np.array([300, 100, 30, 10, 3])
"""Events of an item of each brand, which is all that tells how popular an item is."""


def shop(items=ITEMS):
    """A catalogue in which brands tell how popular an item is, and colours do not."""
    rows = [
        {"item_id": f"i{row}", "title": f"thing {row}", "brand": f"brand {row % BRANDS}", "colour": f"shade {row % 7}"}
        for row in range(items)
    ]
    return Catalog(pl.DataFrame(rows))


def no_text(items=ITEMS):
    return np.full((items, 2), np.nan, dtype=np.float32)


@pytest.fixture
def counts():
    drawn = np.random.default_rng(3).poisson(USUAL[np.arange(ITEMS) % BRANDS]) + 1
    drawn[50:] = 0
    return drawn


@pytest.fixture
def told(counts):
    return ExpectedPopularity.fit(shop(), no_text(), counts, counts >= 5)


def test_new_items_are_as_popular_as_the_like_of_them(told):
    for brand, usual in enumerate(USUAL):
        new = told.values[50:][np.arange(50, ITEMS) % BRANDS == brand]
        assert new == pytest.approx(np.log1p(usual), abs=0.6)
    by_brand = told.values[50:].reshape(-1, BRANDS)
    assert (np.diff(by_brand, axis=1) < 0).all()


def test_an_item_with_events_is_told_by_the_others_alone(counts):
    """The closed form is what fitting without the item gives, at the same penalty and mean."""
    told = ExpectedPopularity.fit(shop(), no_text(), counts, counts >= 5)
    rows = np.flatnonzero(counts)
    kernel = np.stack([Likeness(shop(), no_text(), counts > 0).of(row)[rows] for row in rows.tolist()])
    wanted, noise = np.log1p(counts[rows]) - told.middle, 1 + BY_CHANCE / (1 + counts[rows])
    errors = {}
    for ridge in RIDGES:
        inner = kernel + np.diag(ridge * noise)
        found = np.empty(len(rows))
        for place in range(len(rows)):
            others = np.arange(len(rows)) != place
            dual = np.linalg.solve(inner[np.ix_(others, others)], wanted[others])
            found[place] = told.middle + kernel[place, others] @ dual
        errors[ridge] = float(((found - told.middle - wanted) ** 2 / noise).sum()), found
    best = min(errors.values(), key=lambda own: own[0])[1]
    assert told.values[rows] == pytest.approx(best, abs=1e-5)


def test_its_own_events_do_not_move_what_an_item_is_expected_to_have(counts):
    """Of a brand that an item has for itself the others know nothing: whatever its events, it is told the middle."""
    frame = shop().frame.with_columns(pl.all().exclude("item_id"))
    lonely = {"item_id": "i0", "title": "unlike", "brand": "alone", "colour": "none"}
    catalog = Catalog(pl.concat([pl.DataFrame([lonely]), frame.slice(1)]))
    counts[0] = 100_000
    told = ExpectedPopularity.fit(catalog, no_text(), counts, counts >= 5)
    assert np.isnan(told.values[0])  # like no other
    assert not np.isnan(told.values[1:]).any()


def test_it_speaks_of_new_items_and_as_if_all_were_new_where_that_is_asked(told, counts):
    index, queries = ItemIndex(["x", *shop().ids]), [Query(()), Query(("i1",))]
    found, as_new = told.score(queries, index), told.score_as_new(queries, index)
    assert found.shape == as_new.shape == (2, ITEMS + 1)
    assert np.array_equal(np.isnan(found[0, 1:]), counts >= 5)
    assert np.isnan(as_new[:, 0]).all()
    assert np.array_equal(as_new[:, 1:], np.tile(told.values, (2, 1)))
    new = ~np.isnan(found)
    assert np.array_equal(found[new], as_new[new])


def test_items_that_are_added_are_told_as_if_they_had_been_there(counts, tmp_path):
    first = ExpectedPopularity.fit(shop(50), no_text(50), counts[:50], counts[:50] >= 5)
    first.save(tmp_path)
    grown = ExpectedPopularity.load(tmp_path).grown(shop(), no_text())
    whole = ExpectedPopularity.fit(shop(), no_text(), counts, counts >= 5)
    assert grown.values == pytest.approx(whole.values, abs=1e-6)
    assert grown.items.ids == whole.items.ids
    again = ExpectedPopularity.load(tmp_path)
    assert np.array_equal(again.values, first.values)
    scores = [told.score([Query(())], told.items) for told in (grown, whole)]
    assert np.allclose(*scores, equal_nan=True)


def test_text_tells_where_columns_do_not(counts):
    catalog = Catalog(pl.DataFrame({"item_id": [f"i{row}" for row in range(ITEMS)], "title": [None] * ITEMS}))
    text = np.eye(BRANDS, dtype=np.float32)[np.arange(ITEMS) % BRANDS]
    text[59] = np.nan
    told = ExpectedPopularity.fit(catalog, text, counts, counts >= 5)
    assert (np.diff(told.values[50:55]) < 0).all()
    assert np.isnan(told.values[59])  # nothing is said of it


def test_a_large_catalogue_is_learnt_from_a_part(counts, monkeypatch):
    assert MOST_FITTED < 20_000  # the largest catalogue that is compared at all
    monkeypatch.setattr("recllm.expectation.MOST_FITTED", 20)
    told = ExpectedPopularity.fit(shop(), no_text(), counts, counts >= 5, seed=1)
    assert np.isfinite(told.weights).sum() == 20
    assert np.isfinite(told.values).all()
    assert told.values[50] > told.values[54]


@pytest.mark.parametrize("events", [0, 1])
def test_of_hardly_any_events_nothing_is_learnt(events):
    counts = np.zeros(3, dtype=np.int64)
    counts[0] = events
    told = ExpectedPopularity.fit(shop(3), no_text(3), counts, counts >= 1)
    assert np.unique(told.values[~np.isnan(told.values)]).size <= 1

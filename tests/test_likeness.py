"""Regression on likeness: told by columns, words and text, never by own events; later items are told alike."""

import json

import numpy as np
import polars as pl
import pytest

from recllm.data import Catalog
from recllm.likeness import BY_CHANCE, RIDGES, Dual, LikenessRidge, ToldVectors, likeness_to, shrinkage

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


def events(counts):
    return np.log1p(counts.astype(np.float32))[:, None]


def everything(counts):
    return np.arange(len(counts))


def test_new_items_are_told_what_the_like_of_them_have(counts):
    ridge = LikenessRidge.fit(shop(), no_text(), counts, counts >= 5)
    new = ridge.means(events(counts), np.arange(50, ITEMS))[:, 0].reshape(-1, BRANDS)
    assert (np.diff(new, axis=1) < 0).all()
    assert new == pytest.approx(np.tile(np.log1p(USUAL), (2, 1)), abs=1.2)  # of 4.3 in all, drawn to the middle
    assert np.isnan(ridge.means(events(counts), np.array([-1, 3]))).tolist() == [[True], [False]]


def test_an_item_with_events_is_told_by_the_others_alone(counts):
    """The closed form is what fitting without the item gives, at the penalty by which popularity is told best."""
    ridge = LikenessRidge.fit(shop(), no_text(), counts, counts >= 5)
    rows = np.flatnonzero(counts)
    kernel = likeness_to(shop(), no_text(), rows, rows.tolist())
    noise = 1 + BY_CHANCE / (1 + counts[rows])
    share = 1 / noise / (1 / noise).sum()
    wanted = events(counts)[rows, 0]
    middle, errors = share @ wanted, {}
    for penalty in RIDGES:
        inner = kernel + np.diag(penalty * noise)
        found = np.empty(len(rows))
        for place in range(len(rows)):
            others = np.arange(len(rows)) != place
            found[place] = middle + kernel[place, others] @ np.linalg.solve(
                inner[np.ix_(others, others)], wanted[others] - middle
            )
        errors[penalty] = float(share @ (found - wanted) ** 2), found
    best = min(errors.values(), key=lambda own: own[0])[1]
    assert ridge.means(events(counts), rows)[:, 0] == pytest.approx(best, abs=1e-4)


def test_what_an_item_has_itself_does_not_move_what_it_is_told(counts):
    ridge = LikenessRidge.fit(shop(), no_text(), counts, counts >= 5)
    random = np.random.default_rng(0)
    values = random.normal(size=(ITEMS, 3)).astype(np.float32)
    told = ridge.means(values, everything(counts))
    for item in (0, 7, 55):
        other = values.copy()
        other[item] += 100.0
        moved = np.abs(ridge.means(other, everything(counts)) - told).max(axis=1)
        # By the mean of all alone, which each has a small part in.
        shift = 100.0 * (ridge.share[ridge.rows == item].sum())
        assert moved[item] <= shift + 1e-3
        assert moved.max() > 3 * shift or item == 55  # those like it are told more


def test_an_item_without_events_is_told_what_it_was_told_with_them():
    """A word that it has alone counts in its length whether or not it has events: else new items were all too like."""
    items = 400
    counts = np.random.default_rng(3).poisson(USUAL[np.arange(items) % BRANDS]) + 1
    before = LikenessRidge.fit(shop(items), no_text(items), counts, counts >= 5)
    gone = np.arange(0, 50)
    left = counts.copy()
    left[gone] = 0
    after = LikenessRidge.fit(shop(items), no_text(items), left, left >= 5)
    told, left_out = (ridge.means(events(own), gone)[:, 0] for ridge, own in ((after, left), (before, counts)))
    assert told == pytest.approx(left_out, abs=0.25)
    assert told.std() == pytest.approx(left_out.std(), rel=0.05)


def test_likeness_is_positive_definite_also_where_texts_are_opposite():
    text = np.random.default_rng(0).normal(size=(ITEMS, 2)).astype(np.float32)
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    alike = likeness_to(shop(), text, np.arange(ITEMS), range(ITEMS))
    assert alike.min() < -0.1
    assert np.linalg.eigvalsh(alike).min() > -1e-6  # texts are float32
    assert alike == pytest.approx(alike.T)
    assert alike.diagonal() == pytest.approx(1.25)


def test_an_item_that_is_like_no_other_is_told_nothing(counts):
    lonely = pl.DataFrame([{"item_id": "i0", "title": "unlike", "brand": "alone", "colour": "none"}])
    catalog = Catalog(pl.concat([lonely, shop().frame.slice(1)]))
    for own in (counts[0], 0):
        counts[0] = own
        told = LikenessRidge.fit(catalog, no_text(), counts, counts >= 5).means(events(counts), everything(counts))
        assert np.isnan(told[0]).all()
        assert not np.isnan(told[1:]).any()


def test_items_that_come_later_are_told_as_if_they_had_been_there(counts, tmp_path):
    first = LikenessRidge.fit(shop(50), no_text(50), counts[:50], counts[:50] >= 5)
    first.save(tmp_path)
    values = np.random.default_rng(0).normal(size=(ITEMS, 3)).astype(np.float32)
    values[4] = np.nan  # an item may have events and no vector
    whole = LikenessRidge.fit(shop(), no_text(), counts, counts >= 5).means(values, np.arange(50, ITEMS))
    again = LikenessRidge.load(tmp_path)
    assert again.whole
    assert again.shrunk
    told = again.dual(values[:50]).of(likeness_to(shop(), no_text(), again.rows, range(50, ITEMS)))
    assert told == pytest.approx(whole, abs=1e-4)
    assert np.array_equal(again.means(values[:50], everything(counts[:50])), first.means(values[:50], np.arange(50)))
    unlike = np.zeros((1, len(again.rows)))
    assert np.isnan(again.dual(values[:50]).of(unlike)).all()


def test_text_tells_where_columns_do_not(counts):
    catalog = Catalog(pl.DataFrame({"item_id": [f"i{row}" for row in range(ITEMS)], "title": [None] * ITEMS}))
    text = np.eye(BRANDS, dtype=np.float32)[np.arange(ITEMS) % BRANDS]
    text[59] = np.nan
    told = LikenessRidge.fit(catalog, text, counts, counts >= 5).means(events(counts), np.arange(50, ITEMS))[:, 0]
    assert (np.diff(told[:5]) < 0).all()
    assert np.isnan(told[-1])


def test_of_a_large_catalogue_a_part_is_learnt_from(counts, tmp_path, monkeypatch):
    monkeypatch.setattr("recllm.likeness.MOST_FITTED", 20)
    ridge = LikenessRidge.fit(shop(), no_text(), counts, counts >= 5, seed=1)
    assert len(ridge.rows) == 20 == ridge.operator.shape[1]
    assert not ridge.whole
    ridge.save(tmp_path)
    assert not LikenessRidge.load(tmp_path).whole
    told = ridge.means(events(counts), everything(counts))[:, 0]
    assert np.isfinite(told).all()
    assert told[50] > told[54]
    assert not np.array_equal(ridge.rows, LikenessRidge.fit(shop(), no_text(), counts, counts >= 5, seed=2).rows)


def test_of_one_item_nothing_is_learnt():
    counts = np.array([7, 0, 0])
    ridge = LikenessRidge.fit(shop(3), no_text(3), counts, counts >= 5)
    assert np.isnan(ridge.means(events(counts), everything(counts))).all()  # what all have tells nothing


def test_told_vectors_count_for_as_much_as_they_are_right():
    random = np.random.default_rng(0)
    own = random.normal(size=(1000, 8)).astype(np.float32)
    own[3] = np.nan  # an item without text and factors
    right = own * np.array([[2.0]], dtype=np.float32)
    for told, expected in (
        (own, 1.0),
        (right, 0.5),  # twice as long as they should be
        (own / 2, 1.0),  # never longer than they are told
        (own + random.normal(size=own.shape).astype(np.float32), 0.5),  # half of what is told is noise
        (-own, 0.0),
        (np.full_like(own, np.nan), 1.0),
        (np.zeros_like(own), 1.0),
    ):
        assert shrinkage(own, told) == pytest.approx(expected, abs=0.02)


def test_told_vectors_are_read_as_they_were_kept():
    random = np.random.default_rng(0)
    rows = np.array([0, 2, 3])
    parts = {
        part: Dual(rows, random.normal(size=(3, width)).astype(np.float32), np.zeros(width, dtype=np.float32))
        for part, width in (("text", 4), ("factors", 2), ("own", 2))
    }
    kept = ToldVectors(parts, 0.25)
    near = np.array([[0.5, 0.0, 0.1], [0.0, 0.0, 0.0]])
    given = []

    def make_heads(text, factors):
        given.append(factors)
        return text / 2

    found = kept.of(near, make_heads)
    assert found[0, :-1] == pytest.approx(parts["text"].of(near)[0] / 8)
    assert found[0, -1] == pytest.approx(parts["own"].of(near)[0, -1])
    assert np.isnan(found[1]).all()  # like nothing
    learnt = parts["own"].of(near)[:, :1]
    assert np.array_equal(given[0], np.concatenate([parts["factors"].of(near), learnt], axis=1), equal_nan=True)
    arrays = kept.arrays("light")
    again = ToldVectors.read(arrays, "light")
    assert again.shrinkage == 0.25
    assert again.rows.tolist() == [0, 2, 3]
    assert np.array_equal(again.of(near, make_heads), found, equal_nan=True)
    assert ToldVectors.read(arrays, "lm") is None
    del arrays["light.told.shrinkage"]  # a bundle of before
    assert ToldVectors.read(arrays, "light").shrinkage == 1.0


def test_what_was_learnt_before_told_heads_were_shrunk_stays_so(counts, tmp_path):
    """Kept scores and a fusion that stands on them were made with heads of length 1."""
    LikenessRidge.fit(shop(), no_text(), counts, counts >= 5).save(tmp_path)
    facts = json.loads((tmp_path / "likeness.json").read_text(encoding="utf-8"))
    del facts["shrunk"]
    (tmp_path / "likeness.json").write_text(json.dumps(facts), encoding="utf-8")
    assert not LikenessRidge.load(tmp_path).shrunk

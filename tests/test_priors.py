"""Priors: their formulas by hand, NaN for unknown, and saving."""

import numpy as np
import polars as pl
import pytest

from recllm.askedat import DAY
from recllm.data import Interactions, Query
from recllm.errors import RecllmError
from recllm.priors import ItemMean, Popularity, TextSimilarity, UserMean, write_arrays
from recllm.ranking import ItemIndex

SCHEMA = {"user_id": pl.String, "item_id": pl.String, "rating": pl.Float32, "timestamp": pl.Int64, "seq": pl.Int32}
NOBODY = Query(())


def events(rows):
    return Interactions(pl.DataFrame(rows, schema=SCHEMA, orient="row"))


@pytest.fixture(scope="module")
def train():
    rows = [("u", "a", 5.0, 0, 0), ("u", "b", 1.0, DAY, 1), ("v", "a", 4.0, DAY, 0), ("w", "a", None, 2 * DAY, 0)]
    return events(rows)


def test_popularity_counts_events_and_tells_zero_from_unknown(train):
    scores = Popularity.fit(train, ["a", "b", "new"]).score([NOBODY, NOBODY], ItemIndex(["new", "a", "zz"]))
    assert scores[0, :2] == pytest.approx([0.0, np.log1p(3)])
    assert np.isnan(scores[:, 2]).all()
    assert np.array_equal(scores[0], scores[1], equal_nan=True)


def test_popularity_halves_old_events(train):
    scores = Popularity.fit(train, half_life_days=1.0).score([NOBODY], ItemIndex(["a", "b"]))
    faded = np.array([0.25 + 0.5 + 1.0, 0.5])
    assert scores[0] == pytest.approx(np.log1p(faded * 4 / faded.sum()))  # as many in all as there are events
    weights = pl.Series("weight", [2.0, 1.0, 1.0, 4.0], dtype=pl.Float32)
    weighted = Interactions(train.frame.with_columns(weights))
    scores = Popularity.fit(weighted, half_life_days=1.0).score([NOBODY], ItemIndex(["a", "b"]))
    faded = np.array([2 * 0.25 + 0.5 + 4.0, 0.5])
    assert scores[0] == pytest.approx(np.log1p(faded * 8 / faded.sum()))
    with pytest.raises(
        RecllmError, match=r"half_life_days=1\.0 needs a timestamp on every event, and 1 of 1 have none"
    ):
        Popularity.fit(events([("u", "a", None, None, 0)]), half_life_days=1.0)


def test_a_clock_that_is_ahead_leaves_other_items_their_popularity():
    rows = [(f"u{day}", "ab"[day % 2], None, day * DAY, 0) for day in range(1000)]
    whole = Popularity.fit(events(rows), half_life_days=100.0)
    with_one = Popularity.fit(events([*rows, ("v", "c", None, 40 * 365 * DAY, 0)]), half_life_days=100.0)
    assert with_one.values[:2] == pytest.approx(whole.values, rel=0.01)


def dated(*rows):
    """Events of users of their own: (item, day)."""
    return events([(f"u{place}", item, None, int(day * DAY), 0) for place, (item, day) in enumerate(rows)])


def asked(*days):
    return [Query((), at=None if day is None else int(day * DAY)) for day in days]


def test_popularity_as_of_a_moment_counts_what_was_before_it():
    train = dated(("a", 0), ("a", 1), ("b", 1), ("b", 9), ("c", 9))
    popularity = Popularity.fit(train, ["new"], half_life_days=1.0, as_of=True)
    scores = popularity.score(asked(1.5, 9, 10, 0), ItemIndex(["a", "b", "new", "zz"]))
    faded = np.exp2(-0.5), np.exp2(-1.5)
    assert scores[0, :3] == pytest.approx(np.log1p([faded[0] + faded[1], faded[0], 0.0]))
    # Of the day itself nothing counts yet: which event of a second came first is not known.
    assert scores[1, :3] == pytest.approx(np.log1p([2.0**-9 + 2.0**-8, 2.0**-8, 0.0]))
    assert np.isnan(scores[:, 3]).all()
    assert (scores[3, :3] == 0.0).all()
    assert np.array_equal(
        popularity.score(asked(10, 0), popularity.items), popularity.score(asked(10, 0, 5), popularity.items)[:2]
    )


def test_popularity_of_now_is_that_of_the_logs_end_however_late_it_is():
    days = [(item, day) for day in range(1000) for item in ("a" if day < 500 else "b")]
    popularity = Popularity.fit(dated(*days, ("c", 40_000)), half_life_days=30.0, as_of=True)
    late = popularity.score(asked(None, 1001, 5000, 40_001), popularity.items)
    assert (late[:, :2] == late[0, :2]).all()  # nothing fades behind the end
    assert late[:, 2] == pytest.approx([np.log(2), 0.0, 0.0, np.log(2)], abs=1e-6)  # and what is ahead comes later
    assert late[0] == pytest.approx(popularity.values, abs=1e-6)
    assert late[0, 1] > late[0, 2] > late[0, 0]
    assert popularity.as_of_now().counts is None
    assert np.array_equal(popularity.as_of_now().score(asked(3), popularity.items)[0], popularity.values)


def test_popularity_as_of_moments_is_the_same_when_it_is_read_again(tmp_path):
    popularity = Popularity.fit(dated(("a", 0), ("b", 3), ("a", 4)), half_life_days=2.0, as_of=True)
    popularity.save(tmp_path)
    queries = asked(None, 1, 3.5, 9)
    expected = popularity.score(queries, popularity.items)
    assert np.array_equal(Popularity.load(tmp_path).score(queries, popularity.items), expected)
    popularity.as_of_now().save(tmp_path)
    assert Popularity.load(tmp_path).counts is None
    assert len(np.unique(expected, axis=0)) == 3


def test_item_mean_is_shrunk_to_the_global_mean(train):
    scores = ItemMean.fit(train, shrinkage=2.0).score([NOBODY], ItemIndex(["b", "a", "zz"]))
    middle = 10 / 3
    assert scores[0, :2] == pytest.approx([(1 + 2 * middle) / 3, (9 + 2 * middle) / 4])
    assert np.isnan(scores[0, 2])
    with pytest.raises(RecllmError, match="mean rating per item needs ratings"):
        ItemMean.fit(events([("u", "a", None, None, 0)]))


def test_user_mean_fades_with_the_querys_ratings(train, tmp_path):
    prior = UserMean.fit(train, shrinkage=2.0)
    prior.half_life = 1.0
    query = Query(("x", "y", "z"), ratings=(5.0, 1.0, 1.0))
    expected = (0.25 * 5.0 + 0.5 + 1.0 + 2.0 * prior.middle) / (1.75 + 2.0)
    assert prior.score([query], ItemIndex(["x"]))[0, 0] == pytest.approx(expected)
    unrated = Query(("x", "w", "y", "z", "w"), "u", (5.0, None, 1.0, 1.0, None))  # not rated: not there
    assert prior.score([unrated], ItemIndex(["x"]))[0, 0] == pytest.approx(expected)
    train_mean = prior.score([Query(("x",), "u")], ItemIndex(["x"]))
    assert np.array_equal(prior.score([Query(("x",), "u", (None,))], ItemIndex(["x"])), train_mean)
    prior.save(tmp_path)
    assert UserMean.load(tmp_path).half_life == 1.0


def test_user_mean_takes_the_query_then_train_then_nothing(train):
    prior = UserMean.fit(train, shrinkage=2.0)
    queries = [Query(("a",), "u", (2.0,)), Query(("a",), "u"), Query(("a",), "w"), Query(("a",)), Query((), None, ())]
    scores = prior.score(queries, ItemIndex(["a", "zz"]))
    middle = 10 / 3
    assert scores[:2, 0] == pytest.approx([(2 + 2 * middle) / 3, (6 + 2 * middle) / 4])
    assert np.isnan(scores[2:]).all()
    assert np.array_equal(scores[:, 0], scores[:, 1], equal_nan=True)


def test_text_similarity_is_a_cosine():
    vectors = np.array([[2, 0], [0, 3], [1, 1], [0, 0]], np.float32)
    scorer = TextSimilarity(ItemIndex(["x", "y", "xy", "blank"]), vectors)
    queries = [Query(("x",)), Query(("x", "y", "blank", "zz")), Query(()), Query(("blank",))]
    scores = scorer.score(queries, ItemIndex(["x", "y", "xy", "blank", "zz"]))
    half = np.sqrt(0.5)
    assert scores[0, :3] == pytest.approx([1, 0, half], abs=1e-6)
    assert scores[1, :3] == pytest.approx([half, half, 1], abs=1e-6)
    assert np.isnan(scores[2:]).all()
    assert np.isnan(scores[:, 3:]).all()
    with pytest.raises(ValueError, match="1 items, but vectors for 4"):
        TextSimilarity(ItemIndex(["x"]), vectors)


def test_saved_priors_score_the_same(train, tmp_path):
    candidates = ItemIndex(["b", "a", "zz"])
    queries = [Query(("a",), "u"), Query(("b", "a"), "v", (1.0, 2.0))]
    vectors = TextSimilarity(ItemIndex(["a", "b"]), np.eye(2, dtype=np.float32))
    for prior in (Popularity.fit(train), ItemMean.fit(train), UserMean.fit(train), vectors):
        prior.save(tmp_path)
        again = type(prior).load(tmp_path).score(queries, candidates)
        assert np.array_equal(again, prior.score(queries, candidates), equal_nan=True)
    assert not [path for path in tmp_path.iterdir() if path.suffix not in {".json", ".safetensors"}]


def test_a_missing_or_damaged_file_is_named(tmp_path):
    with pytest.raises(RecllmError, match=r"popularity\.json cannot be read .*No such file.*\. Bring it back, or make"):
        Popularity.load(tmp_path)
    write_arrays(tmp_path, "popularity", {"log_counts": np.zeros(1, np.float32)}, {"ids": ["a"]})
    (tmp_path / "popularity.safetensors").write_bytes(b"junk")
    with pytest.raises(RecllmError, match=r"popularity\.safetensors' is damaged"):
        Popularity.load(tmp_path)

"""Matrix factorization and EASE: fold-in against implicit, formulas against naive code, NaN for unknown."""

from collections import Counter

import numpy as np
import polars as pl
import pytest
from scipy.sparse import csr_matrix
from threadpoolctl import threadpool_limits

from recllm import itemitem
from recllm.data import Interactions, Query
from recllm.errors import RecllmError
from recllm.itemitem import EASE, Transitions
from recllm.mf import ExplicitMF, ExplicitSettings, FactorSettings, ImplicitMF
from recllm.ranking import ItemIndex

SMALL = FactorSettings(factors=8, regularization=0.5, alpha=3.0, iterations=5)
SCHEMA = {"user_id": pl.String, "item_id": pl.String, "rating": pl.Float32, "timestamp": pl.Int64, "seq": pl.Int32}
NONE = Interactions(pl.DataFrame(schema=SCHEMA))


@pytest.fixture(scope="module")
def implicit_mf(checkerboard):
    return ImplicitMF.fit(checkerboard.interactions, SMALL, seed=1, threads=1)


@pytest.fixture(scope="module")
def explicit_mf(rated_checkerboard):
    return ExplicitMF.fit(rated_checkerboard.interactions, ExplicitSettings(factors=4, regularization=1.0), seed=1)


def prefers_own_colour(scorer, dataset):
    """Every unseen item of the user's own colour outranks every item of the other."""
    candidates = ItemIndex(dataset.catalog.ids)
    queries = list(dataset.interactions.histories().values())
    scores = scorer.score(queries, candidates)
    even = np.array([int(item) % 2 == 0 for item in candidates.ids])
    for query, row in zip(queries, scores, strict=True):
        unseen = np.array([item not in query.history for item in candidates.ids])
        own = even == (int(query.user_id[1:]) % 2 == 0)
        if row[own & unseen].min() <= row[~own & unseen].max():
            return False
    return True


def test_all_models_learn_the_checkerboard(explicit_mf, checkerboard, rated_checkerboard):
    two = FactorSettings(factors=2, regularization=0.5, alpha=3.0)  # one factor per colour
    assert prefers_own_colour(ImplicitMF.fit(checkerboard.interactions, two, seed=1), checkerboard)
    assert prefers_own_colour(EASE.fit(checkerboard.interactions, regularization=1.0), checkerboard)
    assert prefers_own_colour(explicit_mf, rated_checkerboard)


@pytest.mark.parametrize("alpha", [0.5, 3.0])
def test_fold_in_equals_implicits_own(checkerboard, alpha):
    from implicit.cpu.als import AlternatingLeastSquares

    settings = SMALL.model_copy(update={"alpha": alpha})
    ours = ImplicitMF.fit(checkerboard.interactions, settings, seed=1, threads=1)
    queries = [Query(("0", "2", "2", "8")), Query(("1",)), Query(tuple(map(str, range(1, 24, 2))))]
    rows = [Counter(ours.items.known(query.history).tolist()) for query in queries]
    dense = np.zeros((len(rows), len(ours.items)), np.float32)
    for row, counts in enumerate(rows):
        dense[row, list(counts)] = list(counts.values())
    with threadpool_limits(1, "blas"):
        model = AlternatingLeastSquares(factors=8, regularization=0.5, alpha=alpha, num_threads=1)
        model.item_factors = ours.item_factors
        theirs = model.recalculate_user(np.arange(len(rows)), csr_matrix(dense))
    assert ours.user_factors(queries) == pytest.approx(theirs, abs=1e-4)


def test_fold_in_solves_the_published_equation(implicit_mf):
    factors = implicit_mf.item_factors.astype(np.float64)
    rows = implicit_mf.items.known(["0", "2", "6"])
    confidence = np.ones(len(factors))
    confidence[rows] = SMALL.alpha
    wanted = np.zeros(len(factors))
    wanted[rows] = 1.0
    left = factors.T @ np.diag(confidence) @ factors + SMALL.regularization * np.eye(8)
    expected = np.linalg.solve(left, factors.T @ (confidence * wanted))
    assert implicit_mf.user_factors([Query(("0", "2", "6"))])[0] == pytest.approx(expected, abs=1e-5)


def test_unknown_is_nan_and_never_junk(implicit_mf, explicit_mf):
    for model in (implicit_mf, explicit_mf):
        queries = [Query(()), Query(("zz",), ratings=(5.0,)), Query(("0", "zz"), ratings=(5.0, 5.0))]
        scores = model.score(queries, ItemIndex(["0", "zz", "1"]))
        assert np.isnan(scores).tolist() == [[True] * 3, [True] * 3, [False, True, False]]
        assert np.isnan(model.user_factors(queries)).all(axis=1).tolist() == [True, True, False]
    assert np.isnan(explicit_mf.score([Query(("0",))], ItemIndex(["0"]))).all()  # no ratings
    assert np.isnan(implicit_mf.item_vectors(ItemIndex(["zz", "0"]))).all(axis=1).tolist() == [True, False]


def test_an_unknown_item_in_the_history_changes_nothing(implicit_mf):
    found = implicit_mf.user_factors([Query(("0", "2")), Query(("zz", "0", "2"))])
    assert np.array_equal(found[0], found[1])


def test_same_seed_same_factors_on_any_number_of_threads(checkerboard, implicit_mf):
    again = ImplicitMF.fit(checkerboard.interactions, SMALL, seed=1, threads=2)
    other = ImplicitMF.fit(checkerboard.interactions, SMALL, seed=2, threads=1)
    assert np.array_equal(again.item_factors, implicit_mf.item_factors)
    assert not np.array_equal(other.item_factors, implicit_mf.item_factors)


def test_explicit_fold_in_is_a_ridge_regression(explicit_mf):
    known = explicit_mf.item_factors[explicit_mf.items.rows(["0", "1"])].astype(np.float64)
    design = np.column_stack([known[:, :-1], np.ones(2)])
    target = np.array([5.0, 1.0]) - explicit_mf.mean - known[:, -1]
    penalty = np.diag([1.0] * 4 + [explicit_mf.settings.bias_regularization])
    expected = np.linalg.solve(design.T @ design + penalty, design.T @ target)
    query = Query(("0", "1"), ratings=(5.0, 1.0))
    assert explicit_mf.user_factors([query])[0] == pytest.approx(expected, abs=1e-5)
    partly = Query(("4", "0", "1"), ratings=(None, 5.0, 1.0))
    assert np.array_equal(explicit_mf.user_factors([partly]), explicit_mf.user_factors([query]))
    assert np.isnan(explicit_mf.user_factors([Query(("0", "1"), ratings=(None, None))])).all()
    predicted = explicit_mf.mean + expected[-1] + known[0, -1] + expected[:-1] @ known[0, :-1]
    assert explicit_mf.score([query], ItemIndex(["0"]))[0, 0] == pytest.approx(predicted, abs=1e-5)


def test_later_ratings_count_more_where_they_fade(explicit_mf):
    facts = explicit_mf.items, explicit_mf.item_factors, explicit_mf.mean, explicit_mf.settings
    fading = ExplicitMF(*facts, half_life=1.0)
    known = explicit_mf.item_factors[explicit_mf.items.rows(["0", "1"])].astype(np.float64)
    design = np.concatenate([known[:, :-1], np.ones((2, 1))], axis=1)
    target = np.array([5.0, 1.0]) - explicit_mf.mean - known[:, -1]
    penalty = np.diag([1.0] * 4 + [explicit_mf.settings.bias_regularization])
    weights = np.diag([0.25, 1.0])  # the rating between them is of an item that is not known, and has its place
    expected = np.linalg.solve(design.T @ weights @ design + penalty, design.T @ weights @ target)
    query = Query(("0", "strange", "x", "1"), ratings=(5.0, 3.0, None, 1.0))
    assert fading.user_factors([query])[0] == pytest.approx(expected, abs=1e-5)
    one = Query(("0",), ratings=(5.0,))
    assert np.array_equal(fading.user_factors([one]), explicit_mf.user_factors([one]))


def test_explicit_ratings_have_a_sign(explicit_mf):
    liked, disliked = Query(("0", "2"), ratings=(5.0, 5.0)), Query(("0", "2"), ratings=(1.0, 1.0))
    scores = explicit_mf.score([liked, disliked], ItemIndex(["4", "5"]))
    assert scores[0, 0] - scores[0, 1] > scores[1, 0] - scores[1, 1]


def test_ease_equals_its_definition(checkerboard):
    scorer = EASE.fit(checkerboard.interactions, regularization=2.0)
    users = {user: set(query.history) for user, query in checkerboard.interactions.histories().items()}
    matrix = np.array([[float(item in seen) for item in scorer.items.ids] for seen in users.values()])
    # Each column is a ridge regression of that item on all the others (Steck 2019, section 2).
    for column in (0, 7):
        others = np.delete(matrix, column, axis=1)
        left = others.T @ others + 2.0 * np.eye(others.shape[1])
        expected = np.linalg.solve(left, others.T @ matrix[:, column])
        assert np.delete(scorer.weights[:, column], column) == pytest.approx(expected, abs=1e-4)
    assert not np.diag(scorer.weights).any()
    again = checkerboard.interactions.frame.filter(pl.col("user_id") < "u2").with_columns(pl.col("seq") + 100)
    repeated = Interactions(pl.concat([checkerboard.interactions.frame, again]))
    assert np.array_equal(EASE.fit(repeated, regularization=2.0).weights, scorer.weights)  # that, not how often
    scores = scorer.score([Query(("0", "2", "2")), Query(("zz",))], ItemIndex(["4", "zz"]))
    place = scorer.items.rows(["0", "2", "4"])
    assert scores[0, 0] == pytest.approx(scorer.weights[place[:2], place[2]].sum())
    assert np.isnan(scores[[0, 1, 1], [1, 0, 1]]).all()


def test_transitions_equal_their_definition():
    frame = pl.DataFrame(
        {
            "user_id": list("aaaabbb"),
            "item_id": list("xyzxzyx"),
            "rating": None,
            "timestamp": None,
            "seq": [0, 1, 2, 3, 0, 1, 2],
        },
        schema_overrides={"rating": pl.Float32, "timestamp": pl.Int64, "seq": pl.Int32},
    )
    scorer = Transitions.fit(Interactions(frame), half_life=1.0, regularization=2.0, max_history=2)
    place = {item: row for row, item in enumerate(scorer.items.ids)}
    # Beginnings of at most two items, the last one whole and the one before it half, and the items after them.
    beginnings = [({"x": 1.0}, "y"), ({"x": 0.5, "y": 1.0}, "z"), ({"y": 0.5, "z": 1.0}, "x")]
    beginnings += [({"z": 1.0}, "y"), ({"z": 0.5, "y": 1.0}, "x")]
    before, after = np.zeros((5, 3)), np.zeros((5, 3))
    for row, (items, item) in enumerate(beginnings):
        before[row, [place[own] for own in items]] = list(items.values())
        after[row, place[item]] = 1.0
    expected = np.linalg.solve(before.T @ before + 2.0 * np.eye(3), before.T @ after)
    assert scorer.weights == pytest.approx(expected, abs=1e-6)
    scores = scorer.score([Query(("x", "y", "zz"))], ItemIndex(["z"]))
    assert scores[0, 0] == pytest.approx(0.5 * expected[place["x"], place["z"]] + expected[place["y"], place["z"]])


def test_a_fading_history_is_the_last_item_in_the_end(checkerboard, implicit_mf):
    index = ItemIndex(checkerboard.catalog.ids)
    long, last = [Query(("0", "1", "3", "5"))], [Query(("5",))]
    ease = EASE.fit(checkerboard.interactions, regularization=1.0)
    ease.half_life = 0.05
    assert ease.score(long, index) == pytest.approx(ease.score(last, index), abs=1e-4)
    faded = ImplicitMF(implicit_mf.items, implicit_mf.item_factors, implicit_mf.settings, half_life=0.05)
    assert faded.score(long, index) != pytest.approx(implicit_mf.score(long, index), abs=1e-3)
    # Not equal: an event that has faded away is not known to be disliked either, as an item without an event is.
    assert np.corrcoef(faded.score(long, index)[0], implicit_mf.score(last, index)[0])[0, 1] > 0.98


def test_saved_models_score_the_same(implicit_mf, explicit_mf, checkerboard, tmp_path):
    queries = [Query(("0", "2"), ratings=(5.0, 4.0)), Query(())]
    fading = Transitions.fit(checkerboard.interactions)
    for model in (implicit_mf, explicit_mf, EASE.fit(checkerboard.interactions), fading):
        model.save(tmp_path)
        again = type(model).load(tmp_path)
        candidates = ItemIndex(["1", "0", "zz"])
        assert np.array_equal(again.score(queries, candidates), model.score(queries, candidates), equal_nan=True)


def test_mistakes_are_named(checkerboard, monkeypatch):
    with pytest.raises(RecllmError, match=r"the training part has none\. Check the split; and .*data\.like_at"):
        ImplicitMF.fit(NONE)
    with pytest.raises(RecllmError, match="needs ratings, and the interactions have none"):
        ExplicitMF.fit(Interactions(checkerboard.interactions.frame.with_columns(rating=pl.lit(None, pl.Float32))))
    monkeypatch.setattr(itemitem, "MOST_ITEMS", 20)
    with pytest.raises(RecllmError, match=r"EASE over 24 items needs a dense matrix .* Use matrix factorization"):
        EASE.fit(checkerboard.interactions)

"""The catalogue graph: the same items, scores and shares as the fusion in numpy, for any weights."""

from dataclasses import replace

import numpy as np
import onnxruntime as ort
import pytest

from recllm import catalogue
from recllm.catalogue import KNOWN_BARRED, prepare
from recllm.fitting import Evidence
from recllm.fusion import BACKUP, Fusion
from recllm.graphs import catalogue_graph
from recllm.ranking import dot_scores, top_k

USERS, ITEMS = 6, 30
WIDTHS = {"a": 3, "b": 1, "c": 5}


def fusion(seed=0, gates=(1.0, 1.0, 1.0), even=False):
    """Of random weights; with `even` ones that are the same for all items, and so go into one product."""
    theta = np.random.default_rng(seed).normal(size=(3, 3)) * [1, 1, not even]
    return Fusion(tuple(WIDTHS), theta, gates, user=Evidence.of([0, 3, 9]), item=Evidence.of([1, 5, 50]))


def vectors(seed=0):
    random = np.random.default_rng([seed, 1])
    rows = {"queries": USERS, "items": ITEMS}
    return {
        f"{name}_{side}": random.normal(size=(count, width)).astype(np.float32)
        for name, width in WIDTHS.items()
        for side, count in rows.items()
    }


def counts(seed=0):
    random = np.random.default_rng([seed, 2])
    return random.integers(0, 30, USERS), random.integers(0, 80, ITEMS)


def run(tmp_path, given, feeds, n_user, n_item, seen, k, write=catalogue_graph):
    write(given, WIDTHS, ITEMS, tmp_path / "catalogue.onnx")
    session = ort.InferenceSession(tmp_path / "catalogue.onnx", providers=["CPUExecutionProvider"])
    inputs = {own.name for own in session.get_inputs()}
    ready = prepare(given, {name: feeds[f"{name}_items"] for name in WIDTHS}, n_item, inputs)
    queries = {name: value for name, value in feeds.items() if name.endswith("_queries") or name == KNOWN_BARRED}
    facts = {"n_user": n_user, "seen": np.where(seen < 0, -1, ready.places[seen]), "k": np.array([k])}
    rows, *found = session.run(["rows", "scores", "shares"], ready.feeds | queries | facts)
    return np.where(rows < 0, -1, ready.order[rows]), *found


def expected(given, feeds, n_user, n_item, seen, k):
    scores = {name: dot_scores(feeds[f"{name}_queries"], feeds[f"{name}_items"]) for name in WIDTHS}
    fused, shares = given.fuse(scores, n_user, n_item)
    for row, columns in enumerate(seen):
        fused[row, columns[columns >= 0]] = np.nan
    rows, best = top_k(fused, k)
    return rows, best, np.stack([np.take_along_axis(share, np.maximum(rows, 0), 1) for share in shares.values()], 1)


def agree(found, wanted):
    rows, scores, shares = wanted
    assert np.array_equal(found[0], rows)
    assert found[1] == pytest.approx(scores, abs=2e-5, nan_ok=True)
    there = np.broadcast_to((rows >= 0)[:, None], shares.shape)
    assert found[2][there] == pytest.approx(shares[there], abs=2e-5)
    assert found[2].sum(axis=1)[rows >= 0] == pytest.approx(scores[rows >= 0], abs=2e-5)


NONE_SEEN = np.full((USERS, 1), -1)


EVEN = pytest.mark.parametrize("even", [False, True], ids=["by counts", "even"])


@EVEN
@pytest.mark.parametrize("seed", range(5))
def test_equals_the_fusion_for_any_weights(seed, even, tmp_path):
    random = np.random.default_rng([seed, 3])
    feeds = vectors(seed)
    feeds["a_queries"][1] = feeds["c_queries"][4] = np.nan
    feeds["a_items"][random.permutation(ITEMS)[:5]] = np.nan
    feeds["c_items"][random.permutation(ITEMS)[:9]] = np.nan
    seen = np.where(random.random((USERS, 7)) < 0.7, random.integers(0, ITEMS, (USERS, 7)), -1)
    given = (fusion(seed, even=even), feeds, *counts(seed), seen, 10)
    agree(run(tmp_path, *given), expected(*given))


@EVEN
def test_items_that_nobody_knows_and_seen_ones_are_left_out(even, tmp_path):
    feeds = vectors()
    for name in WIDTHS:
        feeds[f"{name}_items"][[4, 5]] = np.nan
        feeds[f"{name}_queries"][2] = np.nan
    seen = np.array([[0, ITEMS - 1], [-1, -1], [-1, 3], [7, 7], [4, -1], [-1, 0]])
    given = (fusion(even=even), feeds, *counts(), seen, ITEMS)
    found = run(tmp_path, *given)
    agree(found, expected(*given))
    missing = (found[0] < 0).sum(axis=1)
    assert missing.tolist() == [4, 2, ITEMS, 3, 2, 3]
    assert {0, ITEMS - 1, 4, 5}.isdisjoint(found[0][0])


def test_ties_go_to_the_earlier_item(tmp_path):
    feeds = {name: np.ones_like(value) for name, value in vectors().items()}
    for name in WIDTHS:
        feeds[f"{name}_items"][10:20] = 2.0
    flat = replace(fusion(), theta=np.zeros((3, 3)))  # no evidence: all of a kind have the same score
    found = run(tmp_path, flat, feeds, *counts(), NONE_SEEN, 15)
    assert (found[0] == [*range(10, 20), *range(5)]).all()


@EVEN
def test_a_constant_scorer_says_nothing(even, tmp_path):
    feeds = vectors()
    feeds["b_items"][:] = 3.3
    given = (fusion(even=even), feeds, *counts(), NONE_SEEN, ITEMS)
    found = run(tmp_path, *given)
    agree(found, expected(*given))
    assert not found[2][:, 1].any()


def test_a_single_chosen_scorer_leaves_the_others_as_backup(tmp_path):
    feeds = vectors()
    feeds["a_queries"][0] = np.nan
    given = (replace(fusion(gates=(1.0, BACKUP, BACKUP)), levels=(0, 1, 1)), feeds, *counts(), NONE_SEEN, 8)
    found = run(tmp_path, *given)
    agree(found, expected(*given))
    assert (found[0][0] >= 0).all()


@pytest.mark.parametrize("standardise", ["query", "borda"])
@pytest.mark.parametrize("levels", [(), (0, 1, 1)], ids=str)
@EVEN
def test_items_without_events_have_weights_of_their_own(even, levels, standardise, tmp_path):
    new = np.random.default_rng(3).normal(size=(3, 2))
    given = replace(fusion(3, (1.0, BACKUP, BACKUP), even=even), levels=levels, new=new, standardise=standardise)
    feeds, (n_user, n_item) = vectors(3), counts(3)
    n_item[::4] = 0
    feeds["b_items"][::4] = np.nan
    found = run(tmp_path, given, feeds, n_user, n_item, NONE_SEEN, ITEMS)
    agree(found, expected(given, feeds, n_user, n_item, NONE_SEEN, ITEMS))
    few = replace(given, few=20)
    agree(
        run(tmp_path, few, feeds, n_user, n_item, NONE_SEEN, ITEMS),
        expected(few, feeds, n_user, n_item, NONE_SEEN, ITEMS),
    )
    barred = {KNOWN_BARRED: np.ones(1, dtype=np.float32)}
    rows, scores, shares = run(tmp_path, few, feeds | barred, n_user, n_item, NONE_SEEN, ITEMS)
    every = expected(few, feeds, n_user, n_item, NONE_SEEN, ITEMS)
    for user, own in enumerate(every[0]):  # the same items at the same scores, without those of many events
        new_ones = (own >= 0) & (n_item[own] < 20)
        assert rows[user][rows[user] >= 0].tolist() == own[new_ones].tolist()
        assert scores[user, : new_ones.sum()] == pytest.approx(every[1][user, new_ones], abs=2e-5)
        assert shares[user, :, : new_ones.sum()] == pytest.approx(every[2][user][:, new_ones], abs=2e-5)
        assert np.isnan(scores[user, new_ones.sum() :]).all()
    plain = run(tmp_path, replace(given, new=None), feeds, n_user, n_item, NONE_SEEN, ITEMS)
    assert not np.array_equal(found[0], plain[0])


@EVEN
@pytest.mark.parametrize("new_items", [1, 9])
def test_popularity_places_new_items_the_same_however_many_there_are(new_items, even, tmp_path, monkeypatch):
    for module in ("recllm.fusion", "recllm.catalogue"):
        monkeypatch.setattr(f"{module}.PLACING", "b")
    new = np.array([[0.5, 0.1], [-2.0, 0.0], [1.0, 0.0]])
    given = replace(fusion(3, even=even), new=new, unseen=-1.5, few=5)
    feeds, (n_user, n_item) = vectors(3), counts(3)
    n_item = np.where(np.arange(ITEMS) < new_items, np.arange(ITEMS) % 5, n_item % 3 + 40)  # known ones are much alike
    feeds["b_queries"][:], feeds["b_items"] = 1.0, np.log1p(n_item).astype(np.float32)[:, None]
    feeds["b_items"][new_items // 2] = 99.0  # its first events are of today, where popularity fades
    feeds["b_items"][6:new_items] = np.nan  # of what has no text nothing is known
    wanted = expected(given, feeds, n_user, n_item, NONE_SEEN, ITEMS)
    agree(run(tmp_path, given, feeds, n_user, n_item, NONE_SEEN, ITEMS), wanted)
    of_new, unknown = n_item[wanted[0]] < 5, np.isnan(feeds["b_items"][wanted[0], 0])
    assert wanted[2][:, 1][of_new & ~unknown] == pytest.approx(3.0, rel=1e-4)  # −2 times −1.5
    assert not wanted[2][:, 1][unknown].any()
    assert of_new.sum() == new_items * USERS


@EVEN
@pytest.mark.parametrize("new_items", [1, 2, 9])
def test_what_is_said_of_new_items_alone_does_not_hang_on_how_many_there_are(new_items, even, tmp_path):
    """One of them, or two that hardly differ, would have a deviation of nothing, or the two ends of it."""
    new = np.array([[0.5, 0.1], [2.0, 0.0], [1.0, 0.0]])
    given = replace(fusion(3, even=even), new=new, few=5, scales={"b": (3.0, 0.5)})
    feeds, (n_user, _) = vectors(3), counts(3)
    n_item = np.where(np.arange(ITEMS) < new_items, 0, 40)
    feeds["b_queries"][:], feeds["b_items"][:] = 1.0, np.nan
    feeds["b_items"][:new_items] = 4.0 + 0.01 * np.arange(new_items)[:, None]
    wanted = expected(given, feeds, n_user, n_item, NONE_SEEN, ITEMS)
    agree(run(tmp_path, given, feeds, n_user, n_item, NONE_SEEN, ITEMS), wanted)
    of_new = n_item[wanted[0]] < 5
    assert wanted[2][:, 1][of_new] == pytest.approx(4.0, abs=0.4)  # twice the (4 − 3) / .5 of the fit
    assert not wanted[2][:, 1][~of_new].any()
    assert of_new.sum() == new_items * USERS


@pytest.mark.parametrize(
    "other",
    [{"standardise": "reciprocal rank"}, {"standardise": "borda"}, {"levels": (2, 0, 1)}, {"signed": True}],
    ids=str,
)
def test_every_kind_of_fusion_is_exported(other, tmp_path):
    given = replace(fusion(4), **other)
    feeds, (n_user, n_item) = vectors(4), counts(4)
    feeds["a_items"][::3], feeds["b_queries"][2] = np.nan, np.nan
    found = run(tmp_path, given, feeds, n_user, n_item, NONE_SEEN, ITEMS)
    agree(found, expected(given, feeds, n_user, n_item, NONE_SEEN, ITEMS))


@pytest.mark.parametrize("standardise", ["reciprocal rank", "borda"])
def test_equal_scores_have_equal_ranks_whichever_side_they_stand_on(standardise, tmp_path):
    """Known items stand before new ones in a graph, and in the catalogue as it comes."""
    new = np.array([[0.5, 0.1], [2.0, 0.0], [1.0, 0.0]])
    given = replace(fusion(3), new=new, few=5, standardise=standardise)
    feeds, (n_user, _) = vectors(3), counts(3)
    n_item = np.where(np.arange(ITEMS) % 3 == 0, 0, 40)
    feeds["a_queries"][:], feeds["a_items"][:] = 0.0, 0.0
    feeds["a_queries"][:, 0], feeds["a_items"][:, 0] = 1.0, np.arange(ITEMS) // 4
    wanted = expected(given, feeds, n_user, n_item, NONE_SEEN, ITEMS)
    agree(run(tmp_path, given, feeds, n_user, n_item, NONE_SEEN, ITEMS), wanted)


@pytest.mark.parametrize("n_item", [0, 50], ids=["all new", "none new"])
def test_one_side_may_be_empty(n_item, tmp_path):
    given = replace(fusion(2, even=True), new=np.random.default_rng(2).normal(size=(3, 2)))
    facts = (given, vectors(2), counts(2)[0], np.full(ITEMS, n_item), NONE_SEEN, ITEMS)
    found = run(tmp_path, *facts)
    agree(found, expected(*facts))
    assert (found[0] >= 0).all()


def roots_of(limits, monkeypatch):
    for name, limit in zip(("WIDE", "WIDEST", "ITEMS_TO_A_NUMBER"), limits, strict=True):
        monkeypatch.setattr(catalogue, name, limit)
    return catalogue.rooted(fusion(), WIDTHS, ITEMS)


@pytest.mark.parametrize(
    ("limits", "roots"),
    [((1024, 2048, 4), "abc"), ((4, 2048, 4), "abc"), ((4, 2048, 8), "ab"), ((4, 4, 4), "ab"), ((2, 0, 4), "b")],
    ids=str,
)
@EVEN
def test_wide_scorers_stay_apart_where_items_are_few_and_change_nothing(even, limits, roots, tmp_path, monkeypatch):
    given, random = (fusion(5, even=even), vectors(5), *counts(5), NONE_SEEN, ITEMS), np.random.default_rng(5)
    given[1]["c_items"][random.permutation(ITEMS)[:9]] = np.nan
    found = roots_of(limits, monkeypatch)
    assert found == tuple(roots)
    assert catalogue.folded(given[0], found) == (tuple(roots) if even else ())
    agree(run(tmp_path, *given), expected(*given))


@EVEN
def test_an_older_graph_is_given_what_it_asks_for(even, tmp_path, monkeypatch):
    """Its own rule kept other scorers apart."""
    given = (fusion(5, even=even), vectors(5), *counts(5), NONE_SEEN, ITEMS)

    def written_before(*facts):
        with monkeypatch.context() as before:
            assert roots_of((4, 0, 4), before) == ("a", "b")
            catalogue_graph(*facts)

    agree(run(tmp_path, *given, written_before), expected(*given))


def test_a_query_across_the_items_spread_keeps_its_digits(tmp_path):
    """Scores that are all but equal: their deviation is what is left of large terms."""
    feeds, random = vectors(6), np.random.default_rng(6)
    line = random.normal(size=(ITEMS, 1)).astype(np.float32)
    feeds["c_items"] = (100 * line * np.ones(5) + 0.01 * random.normal(size=(ITEMS, 5))).astype(np.float32)
    feeds["c_queries"] -= feeds["c_queries"].mean(axis=1, keepdims=True)
    given = (fusion(6, even=True), feeds, *counts(6), NONE_SEEN, ITEMS)
    found, wanted = run(tmp_path, *given), expected(*given)
    assert found[2][:, 2] == pytest.approx(wanted[2][:, 2], abs=0.02)


def test_counts_outside_what_was_fitted_are_clipped(tmp_path):
    given = (fusion(), vectors(), np.full(USERS, 10**6), np.zeros(ITEMS, dtype=np.int64), NONE_SEEN, 5)
    agree(run(tmp_path, *given), expected(*given))

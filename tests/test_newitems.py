"""New items in a fusion: weights of their own, and what they may cost known ones."""

from dataclasses import replace

import numpy as np
import pytest

from recllm import newitems
from recllm.fitting import cross_entropy, sample_candidates
from recllm.fusion import Fusion
from recllm.metrics import ndcg
from recllm.newitems import AmongKnown, _Price, _Queries, fit_new_items
from recllm.ranking import target_ranks
from recllm.weighing import FusionSettings, fit_ranking

NAN = np.float32(np.nan)
QUERIES, ITEMS = 200, 60
QUICK = FusionSettings(negatives=40, iterations=40)


def figure(fused, targets):
    return ndcg(target_ranks(fused, targets), 10).mean()


def cold_start(seed=0):
    """Scores of `a` that know events only, of `b` that knows text; the target stands out in both."""
    rng = np.random.default_rng(seed)
    targets, n_item = rng.integers(ITEMS, size=QUERIES), rng.integers(1, 200, size=ITEMS)
    scores = {name: rng.normal(size=(QUERIES, ITEMS)).astype(np.float32) for name in "ab"}
    scores["popularity"] = np.tile(np.log1p(n_item).astype(np.float32), (QUERIES, 1))
    scores["a"][np.arange(QUERIES), targets] += 4.0
    scores["b"][np.arange(QUERIES), targets] += 2.0
    as_new = {
        "a": np.full_like(scores["a"], NAN),
        "b": scores["b"],
        "popularity": np.zeros_like(scores["popularity"]),
    }
    return scores, as_new, targets, rng.integers(3, 50, size=QUERIES), n_item, np.zeros((QUERIES, ITEMS), dtype=bool)


def test_new_items_are_fitted_beside_what_the_plain_sum_ranks_highest(monkeypatch):
    scores, as_new, targets, n_user, n_item, seen = cold_start()
    targets = np.where(targets == 7, 8, targets)
    for own in (*scores.values(), *as_new.values()):
        own[:, 7] = NAN  # nobody knows it
    settings, drawn, fused, losses = QUICK.model_copy(update={"new_queries": 30, "queries": 50}), [], [], []
    original = AmongKnown.fused

    def fuse(self, theta):
        fused.append((theta, original(self, theta)))
        return fused[-1][1]

    def sample(targets, given, barred, most, rng):
        assert given is fused[0][1]
        drawn.append(sample_candidates(targets, given, barred, most, rng))
        return drawn[0]

    def loss(stands_for):
        losses.append(stands_for)
        return cross_entropy(stands_for)

    monkeypatch.setattr(AmongKnown, "fused", fuse)
    monkeypatch.setattr(newitems, "sample_candidates", sample)
    monkeypatch.setattr(newitems, "cross_entropy", loss)
    before = fit_ranking(scores, targets, n_user, n_item, seen, settings=settings)
    fit_new_items(before, scores, as_new, targets, n_user, n_item, seen, settings=settings)
    assert fused[0][0].tolist() == [[0.0, 0.0], [1.0, 0.0], [1.0, 0.0]]  # `a` has no say of new items
    [(columns, stands_for)] = drawn
    assert columns.shape == (30, 41)
    assert not (columns == 7).any()
    assert (stands_for[:, 21:] > 0).all()  # 20 of 58 for themselves, 20 for what is left
    assert np.array_equal(losses[0], stands_for)
    assert [len(own) for own in losses[1:]] == [24] * 5  # what they are measured on made none of them


@pytest.mark.parametrize("by_row", [False, True])
def test_new_items_among_known_ones_are_fused_as_the_fusion_does(by_row):
    scores, _, _, n_user, n_item, _ = cold_start()
    scores["a"][:, ::3] = NAN
    rng = np.random.default_rng(0)
    events = np.where(rng.random((len(n_user), len(n_item))) < 0.2, 0, n_item) if by_row else n_item
    theta = rng.normal(size=(len(scores), 3))
    fusion = replace(Fusion.plain(tuple(scores)), theta=theta, few=int(np.median(n_item)), unseen=-1.5)
    among = AmongKnown.of(fusion, scores, n_user, events)
    for new in rng.normal(size=(3, len(scores), 2)):
        expected = replace(fusion, new=new).fuse(scores, n_user, events)[0]
        np.testing.assert_array_equal(among.fused(new), expected)


def test_new_items_get_weights_of_their_own_and_known_ones_keep_theirs():
    scores, as_new, targets, n_user, n_item, seen = cold_start()
    before = fit_ranking(scores, targets, n_user, n_item, seen, settings=QUICK)
    by_the_fit = QUICK.model_copy(update={"new_cost": 1.0})
    after = fit_new_items(before, scores, as_new, targets, n_user, n_item, seen, settings=by_the_fit)
    assert set(after.candidates_new) == {"fitted", "plain sum"}
    assert after.candidates_new[after.chosen_new] == max(after.candidates_new.values())
    assert np.array_equal(before.fuse(scores, n_user, n_item)[0], after.fuse(scores, n_user, n_item)[0])
    # Now a fifth of the items is new, and only their targets are asked for.
    given, _, wanted, users, counts, _ = cold_start(seed=1)
    new = np.arange(ITEMS) % 5 == 0
    counts = np.where(new, 0, counts)
    mixed = {
        name: np.where(new, (as_new[name] * 0 if name == "popularity" else given[name]), given[name]) for name in given
    }
    mixed["a"][:, new] = np.nan
    rows = new[wanted]
    old, fused = (fusion.fuse(mixed, users, counts)[0] for fusion in (before, after))
    assert figure(fused[rows], wanted[rows]) > figure(old[rows], wanted[rows]) + 0.1
    assert figure(fused[~rows], wanted[~rows]) > figure(old[~rows], wanted[~rows]) - 0.1
    shares = after.fuse(mixed, users, counts)[1]
    assert np.allclose(sum(shares.values()), fused)


def test_what_is_said_alike_of_new_items_keeps_the_scale_of_the_fit(tmp_path):
    scores, as_new, targets, n_user, n_item, seen = cold_start()
    popular = np.log1p(n_item.astype(np.float32))
    scores["expected_popularity"] = np.full_like(as_new["popularity"], np.nan)
    as_new["expected_popularity"] = np.tile(popular, (len(targets), 1))
    before = fit_ranking(scores, targets, n_user, n_item, seen, settings=QUICK)
    by_the_fit = QUICK.model_copy(update={"new_cost": 1.0})
    after = fit_new_items(before, scores, as_new, targets, n_user, n_item, seen, settings=by_the_fit)
    assert before.scales == {}
    mean, deviation = after.scales["expected_popularity"]
    assert (mean, deviation) == pytest.approx((popular.mean(), popular.std()), rel=0.1)
    after.save(tmp_path / "fusion.json")
    assert Fusion.load(tmp_path / "fusion.json").scales == after.scales
    told = np.full((1, 3), np.nan, dtype=np.float32)
    told[0, 1] = mean + 2 * deviation
    assert after.z("expected_popularity", told) == pytest.approx(np.array([[0.0, 2.0, 0.0]]), abs=1e-5)


def test_where_items_of_few_events_are_known_their_scores_keep_their_own_scale(monkeypatch):
    scores, as_new, targets, n_user, n_item, seen = cold_start()
    scores["expected_popularity"] = as_new["expected_popularity"] = np.tile(
        np.log1p(n_item.astype(np.float32)), (len(targets), 1)
    )
    before = fit_ranking(scores, targets, n_user, n_item, seen, settings=QUICK)
    tried = []

    def paid(_, fusion, given):
        tried.append((fusion.few, dict(fusion.scales)))
        return next(iter(given)) if fusion.few == 1 else None

    monkeypatch.setattr(newitems._Price, "first_paid", paid)
    after = fit_new_items(before, scores, as_new, targets, n_user, n_item, seen, few=3, settings=QUICK)
    assert [few for few, _ in tried] == [3, 1]
    assert tried[0][1].keys() == {"expected_popularity"}
    assert (after.few, after.scales) == (1, {})


def test_idle_items_are_not_lifted_above_known_ones():
    scores, as_new, targets, n_user, n_item, seen = cold_start()
    idle = np.arange(ITEMS) % 2 == 0
    targets = np.where(idle[targets], targets + 1, targets)  # half of the items has no events, and nobody wants them
    scores = {name: own.copy() for name, own in scores.items()}
    scores["a"][np.arange(QUERIES), targets] += 1.0
    n_item = np.where(idle, 0, n_item)
    scores["a"][:, idle], scores["popularity"][:, idle] = np.nan, 0.0
    before = fit_ranking(scores, targets, n_user, n_item, seen, settings=QUICK)
    after = fit_new_items(before, scores, as_new, targets, n_user, n_item, seen, settings=QUICK)
    without, found = (figure(fusion.fuse(scores, n_user, n_item)[0], targets) for fusion in (before, after))
    assert found >= 0.998 * without


@pytest.mark.parametrize("coming", [1, 10])
def test_what_comes_tomorrow_is_not_lifted_above_known_items(coming):
    """A shop in which all items are known: nobody has asked for what is added, and it says nothing."""
    scores, as_new, targets, n_user, n_item, seen = cold_start()
    n_item = 30 + n_item % 5  # so much alike that an item without events lies far off
    scores["popularity"] = np.tile(np.log1p(n_item).astype(np.float32), (QUERIES, 1))
    before = fit_ranking(scores, targets, n_user, n_item, seen, settings=QUICK)
    after = fit_new_items(before, scores, as_new, targets, n_user, n_item, seen, settings=QUICK)
    assert after.new is not None
    added = {
        "a": np.full((QUERIES, coming), NAN, dtype=np.float32),
        "b": np.random.default_rng(5).normal(size=(QUERIES, coming)).astype(np.float32),
        "popularity": np.zeros((QUERIES, coming), dtype=np.float32),
    }
    grown = {name: np.concatenate([scores[name], added[name]], axis=1) for name in scores}
    fused, shares = after.fuse(grown, n_user, np.append(n_item, np.zeros(coming, dtype=np.int64)))
    alone = before.fuse(scores, n_user, n_item)[0]
    assert figure(fused, targets) >= 0.985 * figure(alone, targets)  # of 200 queries one or two move by draws
    listed = np.argsort(-fused, axis=1)[:, :10] >= ITEMS
    assert listed.sum() < 2 * 10 / ITEMS * QUERIES * coming  # as often as any item, more or less
    place = after.names.index("popularity")
    expected = (after.new[place, 0] + after.new[place, 1] * after.user(n_user)) * after.unseen
    assert shares["popularity"][:, ITEMS:] == pytest.approx(np.tile(expected[:, None], (1, coming)), rel=1e-3)


def test_an_items_first_few_events_leave_it_new():
    scores, as_new, targets, n_user, n_item, seen = cold_start()
    n_item = np.maximum(n_item, 5)
    before = fit_ranking(scores, targets, n_user, n_item, seen, settings=QUICK)
    after = fit_new_items(before, scores, as_new, targets, n_user, n_item, seen, few=5, settings=QUICK)
    assert after.few == 5
    counts = np.array([0, 4, 5, 100])
    weights = after.weights(np.array([[9]]), counts)
    assert weights["a"][0, 0] == weights["a"][0, 1] == 0.0  # it lives on events
    assert weights["b"][0, 0] == weights["b"][0, 1]
    assert weights["a"][0, 2] == before.weights(np.array([[9]]), counts)["a"][0, 2]


def test_where_few_events_say_much_only_items_without_any_are_new():
    scores, as_new, targets, n_user, n_item, seen = cold_start()
    n_item = np.where(np.arange(ITEMS) % 2 == 0, 3, n_item + 10)  # half of them has few, and is in demand
    settings = QUICK.model_copy(update={"kinds": ("best single",)})
    before = fit_ranking(scores, targets, n_user, n_item, seen, settings=settings)
    assert before.chosen == "only a"
    after = fit_new_items(before, scores, as_new, targets, n_user, n_item, seen, few=5, settings=settings)
    assert after.few == 1
    assert after.chosen_new
    known = (fusion.fuse(scores, n_user, n_item)[0] for fusion in (before, after))
    assert np.array_equal(*known)
    weights = after.weights(np.array([[9]]), np.array([0, 1]))
    assert weights["b"][0, 0] > 0.1 > weights["b"][0, 1]


def test_without_a_share_of_new_items_nothing_changes():
    scores, as_new, targets, n_user, n_item, seen = cold_start()
    before = fit_ranking(scores, targets, n_user, n_item, seen, settings=QUICK)
    settings = QUICK.model_copy(update={"new_share": 0.0})
    assert fit_new_items(before, scores, as_new, targets, n_user, n_item, seen, settings=settings) is before


def test_a_target_is_taken_for_new_as_often_as_any_item_and_never_while_prices_are_measured(monkeypatch):
    scores, as_new, targets, n_user, n_item, seen = cold_start()
    before = fit_ranking(scores, targets, n_user, n_item, seen, settings=QUICK)
    taken, with_new = [], _Queries.with_new

    def spied(queries, new, given):
        taken.append(new[np.arange(len(new)), queries.targets])
        return with_new(queries, new, given)

    monkeypatch.setattr(_Queries, "with_new", spied)
    fit_new_items(before, scores, as_new, targets, n_user, n_item, seen, settings=QUICK)
    fitted, priced = taken
    assert abs(fitted.mean() - QUICK.new_share) < 4 * (QUICK.new_share * (1 - QUICK.new_share) / QUERIES) ** 0.5
    assert not priced.any()


def paid(lost, *, today, weight=-20.0):
    """Whether new items may have the weight 5 for `b` where that puts one above this share of 1,000 targets.

    Today an idle item stands above them, else one that is taken for new; without weights of its own `b` has `weight`.
    """
    queries, items = 1000, 20
    targets = np.random.default_rng(0).integers(2, items, size=queries)
    n_item, n_user = np.where(np.arange(items) == 0, 0, 9), np.full(queries, 9)
    a, b = (np.zeros((queries, items), dtype=np.float32) for _ in "ab")
    a[np.arange(queries), targets] = 1.0
    a[:, 0] = b[:, 0] = NAN
    found = np.where(np.arange(queries) < round(lost * queries), 1.0, -1.0)
    before = replace(Fusion.plain(("a", "b")), theta=np.array([[2.0, 0.0, 0.0], [weight, 0.0, 0.0]]))
    barred = np.zeros((queries, items), dtype=bool)
    now = later = _Queries({"a": a, "b": b}, targets, n_user, n_item, barred)
    as_new = {"a": np.full_like(a, NAN), "b": np.broadcast_to(found[:, None], b.shape).astype(np.float32)}
    if today:
        now = replace(now, scores={"a": a, "b": np.where(n_item == 0, as_new["b"], b)})
    taken = np.zeros_like(barred)
    taken[:, 1] = not today
    price = _Price(before, now, later.with_new(taken, as_new), cost=0.002)
    return price.first_paid(before, {"": np.array([[0.0, 0.0], [5.0, 0.0]])}) is not None


@pytest.mark.parametrize("today", [True, False])
def test_new_items_may_cost_what_the_settings_say(today):
    # Second in place of first is .631 in place of 1: of these targets' NDCG .0015 or .0037 are lost, .002 allowed.
    assert paid(0.004, today=today)
    assert not paid(0.010, today=today)


def test_an_empty_place_of_a_list_shows_no_new_item():
    scores = np.array([[3.0, NAN, NAN, 2.0, 1.0]], np.float32)
    new = np.array([[True, False, False, False, False]])
    barred = np.array([[True, False, False, False, False]])
    queries = _Queries({}, np.array([4]), np.array([1]), np.ones(5, int), barred, new)
    assert queries.share_of_new(scores) == 0.0
    assert replace(queries, barred=np.zeros_like(barred)).share_of_new(scores) == pytest.approx(1 / 3)
    assert queries.share_of_new(np.full_like(scores, NAN)) == 0.0


def test_fitted_weights_are_measured_on_queries_that_made_none_of_them():
    """Six scorers that say nothing, on few rows: what is fitted to them is no better than by chance."""
    found = []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        names, rows = tuple("abcdef"), 30
        scores = {name: rng.normal(size=(rows, 100)).astype(np.float32) for name in names}
        targets, n_item, seen = rng.integers(100, size=rows), np.full(100, 9), np.zeros((rows, 100), dtype=bool)
        before, settings = Fusion.plain(names), QUICK.model_copy(update={"new_cost": 1.0, "l2": 0.0})
        given = (before, scores, scores, targets, np.full(rows, 9), n_item, seen)
        found.append(fit_new_items(*given, settings=settings, seed=seed).candidates_new["fitted"])
    assert np.mean(found) == pytest.approx(0.045, abs=0.025)  # ten of a hundred places; in sample it is .1 and more


def test_what_new_items_cost_is_measured_against_lists_without_them():
    # Without weights of their own they stand as high already; that is no excuse.
    assert not paid(0.010, today=False, weight=5.0)

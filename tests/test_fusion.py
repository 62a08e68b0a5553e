"""Fusion: exact shares, NaN semantics, gradients, fitting that finds what is there, choosing by validation."""

import json
from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import check_grad
from scipy.stats import rankdata

from recllm import fitting
from recllm.data import Query
from recllm.errors import RecllmError
from recllm.evaluate import KnownScores
from recllm.fitting import Evidence, Problem, cross_entropy, drop_scorers, inside_users, logistic, sample_candidates
from recllm.fusion import BACKUP, FusedScorer, Fusion, Scaled, evidence
from recllm.metrics import auc, ndcg
from recllm.ranking import ItemIndex, target_ranks
from recllm.weighing import FusionSettings, alone, fit_labels, fit_ranking

NAN = np.float32(np.nan)
QUERIES, ITEMS = 200, 60
QUICK = FusionSettings(negatives=40, iterations=40)


def made(seed=0, strength=(2.0, 1.0, 0.0)):
    """Scores that are noise plus `strength` on the target; counts that mean nothing."""
    rng = np.random.default_rng(seed)
    targets = rng.integers(ITEMS, size=QUERIES)
    scores = {}
    for place, plus in enumerate(strength):
        own = rng.normal(size=(QUERIES, ITEMS)).astype(np.float32)
        own[np.arange(QUERIES), targets] += plus
        scores["abc"[place]] = own * 10 ** (2 * place) + 7  # scale and offset must not matter
    return scores, targets, rng.integers(3, 50, size=QUERIES), rng.integers(0, 200, size=ITEMS)


@pytest.fixture(scope="module")
def fitted():
    return fit_ranking(*made(), settings=QUICK, seed=1)


def figure(fused, targets):
    return ndcg(target_ranks(fused, targets), 10).mean()


def test_score_is_exactly_the_sum_of_its_shares(fitted):
    scores, _, n_user, n_item = made(1)
    scores["b"][:, :5] = np.nan
    fused, shares = fitted.fuse(scores, n_user, n_item)
    total = np.zeros_like(fused)
    for share in shares.values():
        assert share.dtype == np.float32
        total += share
    assert fused.dtype == np.float32
    assert np.array_equal(fused, total)
    assert not shares["b"][:, :5].any()


def test_share_is_weight_times_standardised_score(fitted):
    scores, _, n_user, n_item = made(1)
    _, shares = fitted.fuse(scores, n_user, n_item)
    weights = fitted.weights(n_user[:, None], n_item[None, :])
    for name, own in scores.items():
        z = (own - own.mean(axis=1, keepdims=True)) / own.std(axis=1, keepdims=True)
        assert shares[name] == pytest.approx(weights[name] * z, rel=1e-3, abs=1e-4)


def test_weights_find_the_better_scorer_and_beat_the_parts(fitted):
    weights = {name: float(value) for name, value in fitted.weights(10, 20).items()}
    assert weights["a"] > weights["b"] > weights["c"]
    scores, targets, n_user, n_item = made(9)
    fused = figure(fitted.fuse(scores, n_user, n_item)[0], targets)
    assert fused > max(figure(own, targets) for own in scores.values())


def test_on_validation_no_part_ranks_above_the_fusion(fitted):
    scores, targets, n_user, n_item = made()
    own = figure(fitted.fuse(scores, n_user, n_item)[0], targets)
    assert fitted.candidates[fitted.chosen] == max(fitted.candidates.values())
    for name, part in scores.items():
        assert fitted.candidates[f"only {name}"] == pytest.approx(figure(part, targets))
        assert own > figure(part, targets)


def test_what_was_fitted_is_measured_on_other_queries():
    scores, targets, n_user, n_item = made(2, strength=(1.5, *[0.0] * 2))
    scores |= {f"noise {place}": made(place + 10)[0]["c"] for place in range(9)}
    few = np.arange(QUERIES) < 30
    settings = FusionSettings(negatives=40, l2=0.0, drop=0.0, kinds=("stacker", "best single"))
    own = {name: given[few] for name, given in scores.items()}
    fusion = fit_ranking(own, targets[few], n_user[few], n_item, settings=settings)
    forced = fit_ranking(
        own, targets[few], n_user[few], n_item, settings=settings.model_copy(update={"kinds": ("stacker",)})
    )
    looks = figure(forced.fuse(own, n_user[few], n_item)[0], targets[few])
    is_worth = figure(
        forced.fuse({name: given[~few] for name, given in scores.items()}, n_user[~few], n_item)[0], targets[~few]
    )
    assert looks > fusion.candidates["only a"] > is_worth + 0.05  # chosen by what it looks like, the stacker had won
    assert fusion.candidates["stacker"] == pytest.approx(is_worth, abs=0.1)
    assert fusion.chosen == "only a"
    more = settings.model_copy(update={"queries": 20})  # the other ten choose too, by weights that all twenty made
    assert fit_ranking(own, targets[few], n_user[few], n_item, settings=more).chosen == "only a"


@pytest.mark.parametrize("queries", [1, 2, 3])
def test_few_queries_are_enough_to_choose(queries):
    scores, targets, n_user, n_item = made()
    part = slice(0, queries)
    given = {name: own[part] for name, own in scores.items()}
    fusion = fit_ranking(given, targets[part], n_user[part], n_item, settings=QUICK.model_copy(update={"choosing": 1}))
    assert fusion.chosen in fusion.candidates
    assert all(np.isfinite(value) for value in fusion.candidates.values())


def test_useless_company_leaves_one_scorer_alone_with_backup():
    rng = np.random.default_rng(0)
    targets = rng.integers(ITEMS, size=QUERIES)
    perfect = rng.normal(size=(QUERIES, ITEMS)).astype(np.float32)
    perfect[np.arange(QUERIES), targets] = 9.0
    wrong = rng.normal(size=(QUERIES, ITEMS)).astype(np.float32)
    wrong[np.arange(QUERIES), targets] = -40.0
    settings = FusionSettings(l2=100.0)  # held at the plain sum, which the wrong one spoils
    counts = np.ones(QUERIES, dtype=np.int64), np.ones(ITEMS, dtype=np.int64)
    fusion = fit_ranking({"wrong": wrong, "perfect": perfect}, targets, *counts, settings=settings)
    assert fusion.chosen == "only perfect"
    assert fusion.gates == (BACKUP, 1.0)
    fused, _ = fusion.fuse({"wrong": wrong, "perfect": perfect}, *counts)
    assert np.array_equal(fused.argmax(1), targets)
    silent = np.full_like(perfect, np.nan)  # where the chosen one is silent, the other ranks
    fused, _ = fusion.fuse({"wrong": wrong, "perfect": silent}, *counts)
    assert np.array_equal(fused.argsort(1), wrong.argsort(1))


def test_ties_are_decided_in_the_stated_order():
    same = made()[0]["a"]
    _, targets, n_user, n_item = made()
    n_user[:], n_item[:] = 5, 5  # no evidence to weigh by, and two copies: every candidate ranks the same
    fusion = fit_ranking({"x": same, "y": same}, targets, n_user, n_item, settings=QUICK)
    assert len(set(fusion.candidates.values())) == 1
    assert fusion.chosen == "by counts"


def test_weights_follow_the_evidence():
    rng = np.random.default_rng(3)
    targets = rng.integers(ITEMS, size=600)
    n_user = np.where(np.arange(600) % 2, 100, 2)
    scores = {name: rng.normal(size=(600, ITEMS)).astype(np.float32) for name in ("cf", "text")}
    rows = np.arange(600)
    scores["cf"][rows, targets] += np.where(n_user == 100, 3.0, 0.0)  # knows users with a long history
    scores["text"][rows, targets] += np.where(n_user == 100, 0.0, 3.0)  # knows the others
    fusion = fit_ranking(scores, targets, n_user, np.full(ITEMS, 9))
    assert fusion.chosen == "by counts"
    few, many = fusion.weights(2, 9), fusion.weights(100, 9)
    assert many["cf"] > 3 * few["cf"]
    assert few["text"] > 3 * many["text"]
    assert fusion.weights(10**6, 9) == many  # beyond the evidence of the fit nothing changes
    assert fusion.candidates["by counts"] > fusion.candidates["without counts"] + 0.05


def test_nan_constant_and_absent_scorers():
    fusion = Fusion.plain(["pop", "cf", "text"])
    scores = {
        "pop": np.array([[1, 2, 3, NAN], [1, 2, 3, NAN]], np.float32),
        "cf": np.array([[NAN] * 4, [5, 5, 5, NAN]], np.float32),  # an empty history; constant scores
    }
    fused, shares = fusion.fuse(scores, np.array([0, 4]), np.ones(4, dtype=np.int64))
    assert np.isnan(fused).tolist() == [[False, False, False, True]] * 2
    assert (np.diff(fused[:, :3]) > 0).all()  # popularity leads
    assert not shares["cf"].any()
    assert not shares["text"].any()
    assert shares["text"].shape == (2, 4)
    with pytest.raises(RecllmError, match=r"Unknown scorer of the fusion 'txt'\. Did you mean 'text'"):
        fusion.fuse({"txt": scores["pop"]}, np.array([0, 4]), np.ones(4, dtype=np.int64))
    with pytest.raises(RecllmError, match="at least one of: pop, cf, text"):
        fusion.fuse({}, np.array([0, 4]), np.ones(4, dtype=np.int64))


def test_without_a_scorer_equals_its_absence(fitted):
    scores, _, n_user, n_item = made(2)
    rest = {name: own for name, own in scores.items() if name != "a"}
    fewer = fitted.without("a")
    assert fewer.names == ("b", "c")
    assert np.array_equal(fewer.fuse(rest, n_user, n_item)[0], fitted.fuse(rest, n_user, n_item)[0])
    with pytest.raises(RecllmError, match="Unknown scorer of the fusion 'z'"):
        fitted.without("z")


@pytest.mark.parametrize("kind", ["stacker", "reciprocal rank", "borda", "levels"])
def test_other_kinds_are_chosen_by_name_and_split_into_shares(kind, tmp_path):
    scores, targets, n_user, n_item = made()
    scores["a"][:, ::3] = np.nan
    fusion = fit_ranking(scores, targets, n_user, n_item, settings=QUICK.model_copy(update={"kinds": (kind,)}))
    assert fusion.chosen == kind
    assert set(fusion.candidates) == {kind}
    fused, shares = fusion.fuse(scores, n_user, n_item)
    assert np.array_equal(fused, sum(shares.values()))
    assert figure(fused, targets) > figure(scores["c"], targets) + 0.05
    fusion.save(tmp_path / "fusion.json")
    assert np.array_equal(Fusion.load(tmp_path / "fusion.json").fuse(scores, n_user, n_item)[0], fused)
    # A scorer that is missing is silent, and the others still say what they know.
    rest = fusion.fuse({name: scores[name] for name in "bc"}, n_user, n_item)
    assert not np.isnan(rest[0]).any()
    assert not rest[1]["a"].any()


def test_every_kind_is_measured_as_it_then_ranks():
    scores, targets, n_user, n_item = made()
    every = ("by counts", "without counts", "plain sum", "best single", "stacker", "reciprocal rank", "borda", "levels")
    fusion = fit_ranking(scores, targets, n_user, n_item, settings=QUICK.model_copy(update={"kinds": every}))
    assert set(every) - {"best single"} | {"only a", "only b", "only c"} == set(fusion.candidates)
    for kind, margin in {"plain sum": 1e-6, "reciprocal rank": 1e-6, "borda": 1e-6, "stacker": 0.02}.items():
        one = fit_ranking(scores, targets, n_user, n_item, settings=QUICK.model_copy(update={"kinds": (kind,)}))
        fused, _ = one.fuse(scores, n_user, n_item)
        # A stacker has weights, and is measured on queries that made none of them.
        assert fusion.candidates[kind] == pytest.approx(figure(fused, targets), abs=margin)
        assert fusion.candidates[fusion.chosen] >= fusion.candidates[kind]


def test_ranks_and_points_by_hand():
    scores = np.array([[3.0, NAN, 1.0, 3.0]], dtype=np.float32)
    places = fitting.places_of(scores)
    assert places.tolist() == [[1.5, 4.0, 3.0, 1.5]]
    assert fitting.reciprocal_ranks(scores, places)[0] == pytest.approx([1 / 61.5, 0.0, 1 / 63, 1 / 61.5])
    assert fitting.borda_points(scores, places)[0] == pytest.approx([0.995, 0.0, 0.98, 0.995])


def test_places_are_mean_ranks_and_take_no_order_of_columns_for_evidence():
    rng = np.random.default_rng(0)
    scores = rng.integers(4, size=(30, 20)).astype(np.float32)
    scores[rng.random(scores.shape) < 0.1] = NAN
    worst_last = np.where(np.isnan(scores), np.inf, -scores)
    assert np.array_equal(fitting.places_of(scores), rankdata(worst_last, axis=1))
    assert fitting.places_of(np.ones((1, 5), np.float32)).tolist() == [[3.0] * 5]


def test_the_plain_sum_knows_nothing_of_how_new_items_were_fitted():
    scores, _, n_user, n_item = made()
    plain = Fusion.plain(tuple(scores))
    new = np.ones((len(scores), 2))
    fitted = replace(plain, new=new, unseen=-3.0, scales={"b": (1.0, 2.0)}, gates=(0.5,) * len(scores))
    np.testing.assert_array_equal(
        fitted.plain_sum().fuse(scores, n_user, n_item)[0], plain.fuse(scores, n_user, n_item)[0]
    )


def test_softplus_and_its_slope_are_exact_also_far_out():
    x = np.array([-800.0, -40.0, -1.0, 0.0, 1e-9, 2.5, 40.0, 800.0])
    value, slope = fitting.softplus_and_slope(x)
    np.testing.assert_allclose(value, np.logaddexp(0.0, x), rtol=1e-14)
    np.testing.assert_allclose(slope, fitting.sigmoid(x), rtol=1e-12, atol=1e-17)


@pytest.mark.parametrize("scale", ["query", "global", "reciprocal rank", "borda"])
def test_scores_that_are_scaled_once_for_several_fusions_are_the_same(scale):
    scores, _, n_user, n_item = made()
    fusion = replace(Fusion.plain(tuple(scores)), standardise=scale)
    if scale == "global":
        fusion = replace(fusion, means=(0.1,) * len(scores), deviations=(2.0,) * len(scores))
    scaled = Scaled()
    other = replace(fusion, standardise="borda" if scale == "reciprocal rank" else "reciprocal rank")
    for own in (other, fusion, fusion):
        np.testing.assert_array_equal(
            own.fuse(scores, n_user, n_item, scaled=scaled)[0], own.fuse(scores, n_user, n_item)[0]
        )


def test_levels_speak_where_those_before_are_silent():
    fusion = replace(Fusion.plain(("a", "b", "c")), levels=(0, 1, 2))
    scores = {
        "a": np.array([[1.0, 2.0, NAN, NAN]], dtype=np.float32),
        "b": np.array([[NAN, 5.0, 6.0, NAN]], dtype=np.float32),
        "c": np.array([[1.0, 2.0, 3.0, 5.0]], dtype=np.float32),
    }
    shares = fusion.fuse(scores, np.array([3]), np.full(4, 3))[1]
    assert [(shares[name][0] != 0).tolist() for name in "abc"] == [
        [True, True, False, False],
        [False, False, True, False],
        [False, False, False, True],
    ]


def test_pairs_have_no_ranks():
    scores = {"a": np.array([1.0, 2.0, 3.0], dtype=np.float32)}
    settings = FusionSettings(kinds=("borda", "network"))
    with pytest.raises(RecllmError, match="ranks need several candidates"):
        fit_labels(scores, [0, 1, 1], np.ones(3, int), np.ones(3, int), settings=settings)
    several = FusionSettings(kinds=("borda", "stacker", "levels", "network"))
    fusion = fit_labels(scores, [0, 1, 1], np.ones(3, int), np.ones(3, int), settings=several)
    assert set(fusion.candidates) == {"stacker", "levels"}


def test_weights_of_new_items_are_saved_and_leave_with_their_scorer(tmp_path):
    fusion = replace(Fusion.plain(("a", "b")), new=np.array([[1.0, 0.5], [-2.0, 0.0]]))
    fusion = replace(fusion, gates=(1.0, BACKUP), levels=(0, 1))
    fusion.save(tmp_path / "fusion.json")
    again = Fusion.load(tmp_path / "fusion.json")
    assert np.array_equal(again.new, fusion.new)
    assert again.without("a").new.tolist() == [[-2.0, 0.0]]
    weights = again.weights(np.array([[3]]), np.array([0, 5]))
    assert weights["b"][0] == pytest.approx([-2.0, BACKUP], rel=1e-5)
    # Beside a chosen scorer the others are silent, but not on new items, whose weights say how they are weighed.
    scores = {"a": np.array([[1.0, 2.0]], dtype=np.float32), "b": np.array([[2.0, 1.0]], dtype=np.float32)}
    shares = again.fuse(scores, np.array([3]), np.array([0, 5]))[1]
    assert shares["b"][0, 0] != 0.0
    assert shares["b"][0, 1] == 0.0


def test_seen_candidates_are_not_ranked_while_fitting():
    scores, targets, n_user, n_item = made()
    seen = np.zeros((QUERIES, ITEMS), dtype=bool)
    seen[:, :20] = True
    fusion = fit_ranking(scores, targets, n_user, n_item, seen, settings=QUICK)
    masked = np.where(seen, np.nan, scores["b"])
    masked[np.arange(QUERIES), targets] = scores["b"][np.arange(QUERIES), targets]
    assert fusion.candidates["only b"] == pytest.approx(figure(masked, targets))
    columns, stands_for = sample_candidates(targets, scores["a"], seen, 50, np.random.default_rng(0))
    assert np.array_equal(columns[:, 0], targets)
    others = np.where(np.isfinite(stands_for), columns, ITEMS)[:, 1:]
    assert (others >= 20).all()
    for row, target in zip(others, targets, strict=True):
        drawn = row[row < ITEMS].tolist()
        assert target not in drawn
        assert len(set(drawn)) == len(drawn) >= 39


def test_queries_without_a_target_are_left_out():
    scores, targets, n_user, n_item = made()
    targets[:150] = -1
    fusion = fit_ranking(scores, targets, n_user, n_item, settings=QUICK)
    kept = {name: own[150:] for name, own in scores.items()}
    again = fit_ranking(kept, targets[150:], n_user[150:], n_item, settings=QUICK)
    assert fusion.candidates["only a"] == pytest.approx(again.candidates["only a"])
    with pytest.raises(RecllmError, match="one validation query with a target"):
        fit_ranking(scores, np.full(QUERIES, -1), n_user, n_item)


def test_same_seed_same_fusion(fitted):
    again = fit_ranking(*made(), settings=QUICK, seed=1)
    other = fit_ranking(*made(), settings=QUICK, seed=2)
    assert np.array_equal(again.theta, fitted.theta)
    assert not np.array_equal(other.theta, fitted.theta)


@pytest.mark.parametrize("kind", ["ranking", "labels", "inside users"])
def test_gradient_equals_finite_differences(kind, monkeypatch):
    rng = np.random.default_rng(0)
    columns = 6 if kind == "ranking" else 1
    valid = rng.random((20, columns)) < 0.8
    valid[:, 0] = True
    labels = rng.integers(2, size=20).astype(np.float64)
    pairs = inside_users(labels, np.sort(rng.integers(4, size=20)), 0.7) if kind == "inside users" else logistic(labels)
    stands_for = np.where(valid, rng.random(valid.shape), -np.inf)
    loss = cross_entropy(stands_for) if kind == "ranking" else pairs
    z = rng.normal(size=(3, 20, columns)).astype(np.float32)
    problem = Problem(z, rng.normal(size=(20, 1)), rng.normal(size=(20, columns)), loss)
    monkeypatch.setattr(fitting, "BLOCK_CELLS", 30)  # several blocks

    class Check:
        @staticmethod
        def minimize(objective, first, **kwargs):
            at = first + rng.normal(size=first.shape)
            error = check_grad(lambda x: objective(x)[0], lambda x: objective(x)[1], at)
            assert error < 1e-5
            return type("Found", (), {"x": at})

    monkeypatch.setattr(fitting, "require", lambda *_: Check)
    assert fitting.minimise(problem, counts=True, l2=0.1, iterations=1).shape == (3, 3)


def test_dropping_never_leaves_a_row_empty():
    kept = drop_scorers(np.ones((2, 5000, 1), np.float32), 0.5, np.random.default_rng(0))
    assert kept.any(axis=0).all()
    assert kept.mean() == pytest.approx(0.5 + 0.25, abs=0.03)  # a row that lost both keeps both


def test_labels_are_fused_over_all_rows():
    rng = np.random.default_rng(0)
    labels = rng.integers(2, size=800)
    scores = {
        name: (rng.normal(size=800) * 5 + strength * 5 * labels + 3).astype(np.float32)
        for name, strength in (("item", 1.0), ("user", 1.0), ("noise", 0.0))
    }
    scores["user"][:50] = np.nan
    n_user, n_item = rng.integers(0, 30, size=800), rng.integers(0, 30, size=800)
    fusion = fit_labels(scores, labels, n_user, n_item)
    assert fusion.standardise == "global"
    assert fusion.candidates[fusion.chosen] == max(fusion.candidates.values())
    assert fusion.candidates[fusion.chosen] > auc(labels, scores["item"]) + 0.03
    weights = fusion.weights(10, 10)
    assert min(weights["item"], weights["user"]) > 3 * weights["noise"]
    pairs = {name: own[:, None] for name, own in scores.items()}
    fused, _ = fusion.fuse(pairs, n_user, n_item[:, None])
    one, _ = fusion.fuse({name: own[7:8] for name, own in pairs.items()}, n_user[7:8], n_item[7:8])
    assert fused.shape == (800, 1)
    assert one[0, 0] == fused[7, 0]  # a row's score does not depend on its neighbours
    with pytest.raises(RecllmError, match="both labels"):
        fit_labels(scores, np.ones(800), n_user, n_item)


def test_the_loss_inside_users_by_hand(monkeypatch):
    labels, users = np.array([1.0, 0.0, 0.0, 1.0, 1.0, 0.0]), np.array([7, 7, 7, 2, 2, 5])
    scores = np.array([[0.5], [1.0], [-1.0], [3.0], [2.0], [0.0]])
    rows, plain = slice(0, 6), logistic(labels)
    total, _, slope = inside_users(labels, users, 2.0)(rows, scores, 0.3)
    # Only user 7 has both labels: the mean over two pairs, as if all rows were that user's.
    expected = 6 * 2.0 * (np.log1p(np.exp(0.5)) + np.log1p(np.exp(-1.5))) / 2
    assert total - plain(rows, scores, 0.3)[0] == pytest.approx(expected)
    assert slope == plain(rows, scores, 0.3)[2]
    # Alone in their blocks the rows are compared with nobody.
    apart = [inside_users(labels, users, 2.0)(slice(at, at + 1), scores[at : at + 1], 0.3)[0] for at in range(6)]
    assert apart == [plain(slice(at, at + 1), scores[at : at + 1], 0.3)[0] for at in range(6)]
    later = inside_users(np.append(0.0, labels), np.append(9, users), 2.0)
    moved = later(slice(1, 7), scores, 0.3)[1] - plain(rows, scores, 0.3)[1]
    pushed = 7 * 2.0 / 2 / (1 + np.exp([-0.5, 1.5]))  # of both pairs of user 7, who stands behind another row here
    assert moved[:, 0] == pytest.approx([-pushed.sum(), *pushed, 0, 0, 0])
    monkeypatch.setattr(fitting, "ROWS_OF_A_USER", 1)
    capped = inside_users(labels, users, 2.0)(rows, scores, 0.3)[0] - plain(rows, scores, 0.3)[0]
    assert capped == pytest.approx(6 * 2.0 * np.log1p(np.exp(0.5)))
    alone = inside_users(labels, np.arange(6), 2.0)(rows, scores, 0.3)
    assert alone[0] == plain(rows, scores, 0.3)[0]


def test_users_of_few_rows_count_as_much_as_those_of_many():
    """One user's rows say that the second scorer is right, those of twenty others that the first one is."""
    rng = np.random.default_rng(0)
    users = np.concatenate([np.zeros(600, dtype=np.int64), np.repeat(np.arange(1, 21), 6)])
    labels = rng.integers(2, size=len(users)).astype(np.float64)
    many = users == 0
    scores = {
        "few": (rng.normal(size=len(users)) + 2.0 * labels * ~many).astype(np.float32),
        "many": (rng.normal(size=len(users)) + 2.0 * labels * many).astype(np.float32),
    }
    n_user = n_item = np.full(len(users), 9)
    found = {}
    for pairwise in (0.0, 5.0):
        settings = FusionSettings(kinds=("without counts",), pairwise=pairwise, drop=0.0)
        weights = fit_labels(scores, labels, n_user, n_item, users=users, settings=settings).weights(9, 9)
        found[pairwise] = weights["few"] / weights["many"]
    assert found[5.0] > 2 * found[0.0]


def test_weights_of_pairs_are_judged_on_other_users():
    rng = np.random.default_rng(0)
    users, labels = np.repeat(np.arange(6), 40), rng.integers(2, size=240)
    # What most scorers know is who the user is; one knows a little of the labels.
    scores = {f"noise {n}": rng.normal(size=6)[users] + 0.1 * rng.normal(size=240) for n in range(12)}
    scores["good"] = labels + rng.normal(size=240) * 1.5
    scores = {name: own.astype(np.float32) for name, own in scores.items()}
    counts = np.full(240, 9), np.full(240, 9)
    settings = FusionSettings(kinds=("stacker", "best single"), l2=0.0, drop=0.0)
    fusion = fit_labels(scores, labels, *counts, users=users, settings=settings)
    apart = fit_labels(scores, labels, *counts, settings=settings)
    fused = fusion.fuse({name: own[:, None] for name, own in scores.items()}, counts[0], counts[1][:, None])[0][:, 0]
    alone = auc(labels, scores["good"])
    assert fusion.candidates["stacker"] < apart.candidates["stacker"]
    assert fusion.candidates["only good"] == pytest.approx(alone)
    assert auc(labels, fused) >= alone - 1e-9  # on these rows no part tells labels apart better


def test_saved_fusion_is_json_and_fuses_the_same(fitted, tmp_path):
    fitted.save(tmp_path / "fusion.json")
    again = Fusion.load(tmp_path / "fusion.json")
    scores, _, n_user, n_item = made(4)
    assert np.array_equal(again.fuse(scores, n_user, n_item)[0], fitted.fuse(scores, n_user, n_item)[0])
    assert (again.chosen, again.candidates) == (fitted.chosen, fitted.candidates)
    facts = json.loads((tmp_path / "fusion.json").read_text())
    assert set(facts) >= {"names", "theta", "gates", "standardise", "means", "deviations", "user", "item", "candidates"}
    with pytest.raises(RecllmError, match="cannot be read"):
        Fusion.load(tmp_path / "none.json")


def test_fused_scorer_counts_known_evidence():
    counts = {"i0": 3, "i1": 1}
    queries, candidates = [Query(("i0", "zz", "i1")), Query(())], ItemIndex(["i1", "zz"])
    n_user, n_item = evidence(queries, candidates, counts)
    assert n_user.tolist() == [2, 0]
    assert n_item.tolist() == [1, 0]
    part = KnownScores(queries, candidates, np.array([[1, 2], [3, NAN]], np.float32))
    scorer = FusedScorer({"a": part}, Fusion.plain(["a", "b"]), counts)
    scores, shares = scorer.explain(queries, candidates)
    assert scores.tolist()[0] == pytest.approx([-1, 1])
    assert np.array_equal(scores, scorer.score(queries, candidates), equal_nan=True)
    assert list(shares) == ["a", "b"]


def test_evidence_is_standardised_and_clipped():
    known = Evidence.of([0, 10, 100])
    assert known([0, 10, 100]).mean() == pytest.approx(0, abs=1e-9)
    assert known([0, 10, 100]).std() == pytest.approx(1)
    assert known(10**9) == known(100)


def test_a_backup_is_hardly_heard():
    one = np.array([[3.0, 2.99, 0.0, -3.0]], np.float32)
    other = np.array([[-9.0, 9.0, 0.0, 0.0]], np.float32)
    fusion = alone(Fusion.plain(("one", "other")), "one")
    assert fusion.fuse({"one": one, "other": other}, np.array([1]), np.ones(4, int))[0].argmax() == 0
    silent = np.array([[3.0, -3.0, 1.0, -1.0, NAN]], np.float32)
    known = np.array([[0.0, 0.0, 0.0, 0.0, 9.0]], np.float32)
    fused = fusion.fuse({"one": silent, "other": known}, np.array([1]), np.ones(5, int))[0]
    assert abs(fused[0, 4]) < 1e-4


def test_an_item_of_just_enough_events_is_known():
    fusion = replace(Fusion.plain(("popularity",)), new=np.array([[1.0, 0.0]]), few=2, unseen=-5.0)
    scores, counts = {"popularity": np.array([[0.5, 1.0, 2.0]], np.float32)}, np.array([1, 2, 9])
    found, plain = (own.fuse(scores, np.array([3]), counts)[0][0] for own in (fusion, Fusion.plain(("popularity",))))
    assert found[1:] == pytest.approx(plain[1:])
    assert found[0] == pytest.approx(-5.0)


def test_first_events_of_yesterday_do_not_move_a_new_item():
    """New items' weights were fitted as if none of them had events, and popularity may fade: late events weigh much."""
    fusion = replace(Fusion.plain(("popularity",)), new=np.array([[-0.5, 0.0]]), few=3, unseen=-2.0)
    scores = np.array([[0.0, 3.0, 1.0, 2.0, np.nan], [1.0, 1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0, 0.0]], np.float32)
    found = fusion.fuse({"popularity": scores}, np.array([9, 9, 9]), np.array([0, 2, 9, 9, 0]))[0]
    assert found[0, :2].tolist() == [1.0, 1.0]
    assert np.isnan(found[0, 4])
    assert not found[1:].any()  # popularity that tells nothing apart places nobody


def test_evidence_of_a_user_counts_events_and_not_items():
    query = Query(("a", "a", "b", "strange"))
    assert evidence([query], ItemIndex(["a"]), {"a": 1, "b": 2})[0].tolist() == [3]


def test_a_fusion_of_pairs_keeps_the_scale_of_those_that_stay():
    rng, ones = np.random.default_rng(0), np.ones(50, int)
    scores = {name: (scale * rng.normal(size=50)).astype(np.float32) for name, scale in (("a", 1.0), ("b", 100.0))}
    settings = FusionSettings(kinds=("plain sum",))
    fusion = fit_labels(scores, np.arange(50) % 2, ones, ones, settings=settings)
    both = {name: own[:, None] for name, own in scores.items()}
    share = fusion.fuse(both, ones, ones[:, None])[1]["b"]
    assert fusion.without("a").fuse({"b": both["b"]}, ones, ones[:, None])[0] == pytest.approx(share)

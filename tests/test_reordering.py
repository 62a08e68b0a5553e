"""The network over the first places: exact slopes, what no sum can say, nothing behind what was not looked at."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest

from recllm import fusion as fusing
from recllm import runtime
from recllm.batch import Job, recommend_file
from recllm.bundle import FORMAT, MANIFEST, WITH_NETWORK, read_manifest, seal
from recllm.collaborative import load_collaborative
from recllm.data import Query
from recllm.distil import taught_windows
from recllm.files import read_json
from recllm.fusion import FusedScorer, Fusion
from recllm.growing import SEALED, add_items
from recllm.metrics import ndcg
from recllm.parity import ranking_parity
from recllm.protocols import WholeCatalogue
from recllm.ranker import RANKER_SHARE, TwoStage
from recllm.ranking import ItemIndex, mask_seen, target_ranks
from recllm.reordering import FIRST, Reordering, features, learn, loss_and_slopes
from recllm.runs import load_run
from recllm.splits import Example
from recllm.tasks import prepare
from recllm.trained import lenders, load_language, load_light, sequence_scorer
from recllm.weighing import FusionSettings, fit_ranking

NAN = np.float32(np.nan)
ITEMS = 120


def drawn(scorers=3, units=5, seed=0):
    """A network of random weights."""
    rng, width = np.random.default_rng(seed), 2 * scorers + 3
    shapes = {"means": width, "deviations": width, "inner": (width, units), "bias": units, "outer": units}
    made = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return Reordering(**made | {"deviations": np.abs(made["deviations"]) + 1})


def either_or(queries=600, seed=0):
    """Scores of which exactly one is high for the target, and both for what is never wanted."""
    rng = np.random.default_rng(seed)
    targets = rng.integers(ITEMS, size=queries)
    scores = {name: rng.normal(size=(queries, ITEMS)).astype(np.float32) / 10 for name in "ab"}
    lines = np.arange(queries)
    for shift in range(1, 9):
        for own in scores.values():
            own[lines, (targets + shift) % ITEMS] += 1
    first = rng.random(queries) < 0.5
    scores["a"][lines[first], targets[first]] += 1
    scores["b"][lines[~first], targets[~first]] += 1
    return scores, targets, rng.integers(3, 50, size=queries), rng.integers(1, 9, size=ITEMS)


def test_slopes_equal_finite_differences():
    rng = np.random.default_rng(0)
    weights = [rng.normal(size=shape) for shape in ((4, 3), 3, 3)]
    x, scores, wanted = rng.normal(size=(5, 6, 4)), rng.normal(size=(5, 6)), rng.integers(4, size=5)
    scores[0, 4:] = -np.inf
    kept = 2.0 * (rng.random((5, 6, 3)) < 0.5)
    for given in (None, kept):
        _, slopes = loss_and_slopes(weights, x, scores, wanted, given)
        for own, slope in zip(weights, slopes, strict=True):
            for at in np.ndindex(own.shape):
                before, both = own[at], []
                for step in (1e-6, -1e-6):
                    own[at] = before + step
                    both.append(loss_and_slopes(weights, x, scores, wanted, given)[0])
                own[at] = before
                assert slope[at] == pytest.approx((both[0] - both[1]) / 2e-6, abs=1e-6)


def test_features_by_hand():
    shares = np.array([[[3.0, 1.0, NAN], [2.0, 2.0, NAN]]], dtype=np.float32)
    x = features(shares, np.array([4]), np.array([[0, 9, 0]]))
    logs = np.log([1.0, 2.0, 1.5, 5.0, 10.0])
    assert x[0, 0] == pytest.approx([1.0, 0.0, logs[0], logs[2], logs[0], 0.0, logs[3]])
    assert x[0, 1] == pytest.approx([-1.0, 0.0, logs[1], logs[2], logs[1], logs[4], logs[3]])
    assert not x[0, 2, :2].any()


def test_what_no_sum_can_say_is_learnt_and_chosen(monkeypatch):
    monkeypatch.setattr("recllm.reordering.PASSES", 20)
    monkeypatch.setattr("recllm.weighing.FOLDS", 2)
    settings = FusionSettings(kinds=("by counts", "best single", "network"), negatives=60, iterations=40)
    fusion = fit_ranking(*either_or(), settings=settings)
    assert fusion.chosen == "network"
    assert fusion.candidates["network"] > fusion.candidates["by counts"] + 0.2
    scores, targets, n_user, n_item = either_or(seed=1)
    both = fusion.fuse(scores, n_user, n_item)
    again, _ = fusion.reordered(*both, n_user, n_item)
    plain, better = (ndcg(target_ranks(own, targets), 10).mean() for own in (both[0], again))
    assert better > plain + 0.2


def test_a_network_that_has_learnt_noise_is_not_chosen():
    rng = np.random.default_rng(0)
    targets, counts = rng.integers(ITEMS, size=80), rng.integers(1, 9, size=ITEMS)
    scores = {name: rng.normal(size=(80, ITEMS)).astype(np.float32) for name in "ab"}
    scores["a"][np.arange(80), targets] += 3
    settings = FusionSettings(kinds=("by counts", "network"), negatives=60)
    fusion = fit_ranking(scores, targets, np.full(80, 5), counts, settings=settings)
    assert fusion.chosen == "by counts"
    assert fusion.network is None


def test_the_same_seed_learns_the_same():
    rng = np.random.default_rng(0)
    given = rng.normal(size=(40, 20, 7)).astype(np.float32), rng.normal(size=(40, 20)).astype(np.float32)
    wanted = rng.integers(20, size=40)
    one, two, other = (learn(*given, wanted, seed) for seed in (0, 0, 1))
    for part in ("means", "deviations", "inner", "bias", "outer"):
        assert np.array_equal(getattr(one, part), getattr(two, part))
    assert not np.array_equal(one.inner, other.inner)


def test_nothing_falls_behind_what_was_not_looked_at():
    rng = np.random.default_rng(0)
    scores = {name: rng.normal(size=(8, 300)).astype(np.float32) for name in "abc"}
    scores["a"][0, 50:] = scores["b"][0, 50:] = scores["c"][0, 50:] = NAN
    n_user, n_item = np.arange(8), rng.integers(0, 9, size=300)
    fusion = replace(Fusion.plain(tuple("abc")), network=drawn())
    barred = rng.random((8, 300)) < 0.2
    fused, shares = fusion.fuse(scores, n_user, n_item)
    again, more = fusion.reordered(fused, shares, n_user, n_item, barred)
    assert list(more) == [*"abc", "network"] == list(fusion.share_names)
    known = ~np.isnan(fused)
    assert again[known] == pytest.approx(sum(more.values())[known], abs=1e-5)
    assert np.array_equal(np.isnan(again), ~known)
    for row in range(8):
        free = np.flatnonzero(~barred[row] & ~np.isnan(fused[row]))
        first = free[np.argsort(-fused[row, free])][:FIRST]
        rest = np.setdiff1d(np.arange(300), first)
        assert not more["network"][row, rest].any()
        assert more["network"][row, first].min() == 0.0
        assert more["network"][row, first].max() > 0.1
        behind = np.setdiff1d(free, first)
        assert not len(behind) or again[row, first].min() >= again[row, behind].max()


def test_new_items_do_not_gain_on_each_other():
    rng = np.random.default_rng(0)
    shares = rng.normal(size=(2, 3, 10)).astype(np.float32)
    counts = np.array([[0, 5, 5, 2, 5, 5, 5, 1, 5, 5]] * 2)
    added = drawn().added(shares, np.array([3, 4]), counts, few=3)
    new = counts < 3
    assert np.ptp(added[0, new[0]]) == 0.0
    assert added[0, new[0]][0] == pytest.approx(added[0, ~new[0]].mean(), rel=1e-5)
    assert np.ptp(added[0, ~new[0]]) > 0.1


def test_is_saved_and_goes_with_a_scorer(tmp_path):
    rng = np.random.default_rng(0)
    scores = {name: rng.normal(size=(4, 200)).astype(np.float32) for name in "abc"}
    counts = np.arange(4), rng.integers(0, 9, size=200)
    fusion = replace(Fusion.plain(tuple("abc")), network=drawn())
    fusion.save(tmp_path / "fusion.json")
    loaded = Fusion.load(tmp_path / "fusion.json")
    expected, found = (own.reordered(*own.fuse(scores, *counts), *counts)[0] for own in (fusion, loaded))
    assert np.array_equal(expected, found)
    assert fusion.without("b").network is None
    assert fusion.plain_sum().network is None
    fusion.plain_sum().save(tmp_path / "fusion.json")
    assert '"network"' not in (tmp_path / "fusion.json").read_text()


def test_what_a_history_has_takes_no_first_place(monkeypatch):
    monkeypatch.setattr(fusing, "FIRST", 3)
    index = ItemIndex([str(item) for item in range(8)])
    own = np.arange(8, 0, -1, dtype=np.float32)[None]

    class Scorer:
        def score(self, queries, candidates):
            return np.tile(own, (len(queries), 1))

    network = drawn(scorers=1)
    fusion = replace(Fusion.plain(("a",)), network=network)
    fused = FusedScorer({"a": Scorer()}, fusion, dict.fromkeys(index.ids, 5))
    _, shares = fused.explain([Query(("0", "1")), Query(())], index)
    assert not shares["network"][0][[0, 1, 5, 6, 7]].any()
    assert shares["network"][0][2:5].any()
    assert shares["network"][1][:3].any()
    _, again = replace(fused, exclude_seen=False).explain([Query(("0", "1"))], index)
    assert again["network"][0][:3].any()


def test_a_bundle_ranks_as_its_scores_say(tiny_bundle, monkeypatch):
    """The graph's lists, put in order again, against numpy's fusion of all items."""
    monkeypatch.setattr(fusing, "FIRST", 8)
    monkeypatch.setattr(runtime, "FIRST", 8)
    bundle = runtime.load(tiny_bundle)
    plain = bundle.recommend([["0", "2"], [], ["x"]], k=24)
    bundle.fusion = replace(bundle.fusion, network=drawn(len(bundle.fusion.names), seed=3))
    histories = [["0", "2"], ["1", "3", "5"], [], ["x"]]
    scores, shares = bundle.score(histories, bundle.index.ids)
    expected = mask_seen(scores, [Query(tuple(own)) for own in histories], bundle.index)
    assert list(shares) == list(bundle.share_names)
    for k in (3, 8, 20):
        found = bundle.recommend(histories, k=k)
        for row, ids in enumerate(found.ids):
            at = bundle.index.rows(ids)
            assert found.scores[row] == pytest.approx(
                np.sort(expected[row][~np.isnan(expected[row])])[::-1][:k], abs=1e-4
            )
            assert found.scores[row] == pytest.approx(expected[row, at], abs=1e-4)
            assert found.shares["network"][row] == pytest.approx(shares["network"][row, at], abs=1e-4)
    assert found.ids[0] != plain.ids[0][:20]


@pytest.fixture
def saved(tiny_bundle, tmp_path, monkeypatch):
    """A bundle on the disk whose fusion has a network, over first places that its catalogue is longer than."""
    monkeypatch.setattr(fusing, "FIRST", 8)
    monkeypatch.setattr(runtime, "FIRST", 8)
    folder = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, folder)
    fusion = Fusion.load(folder / "fusion.json")
    replace(fusion, network=drawn(len(fusion.names), seed=3)).save(folder / "fusion.json")
    seal(folder, {key: value for key, value in read_json(folder / MANIFEST).items() if key not in SEALED})
    return folder


def test_older_versions_are_told_that_they_cannot_read_a_network(saved, tiny_bundle):
    assert read_json(tiny_bundle / MANIFEST)["format"] == FORMAT
    assert read_json(saved / MANIFEST)["format"] == WITH_NETWORK
    assert runtime.load(saved).fusion.network is not None


@pytest.mark.parametrize("index", ["exact", "int8"])
def test_places_are_kept_for_new_items_behind_a_network(saved, index):
    bundle = runtime.load(saved, index=index)
    assert bundle.fusion.new is not None
    new = [{"item_id": str(item), "title": f"{colour} film 30"} for item, colour in ((100, "Red"), (101, "Blue"))]
    grown = bundle.with_items(new)
    histories = [["0", "2"], ["3"], []]
    whole = grown.recommend(histories, k=26)
    scores, _ = grown.score(histories, grown.index.ids)
    for count in (1, 2, 3):
        for k in (3, 12):
            found = grown.recommend(histories, k=k, new_items=count)
            assert sum(found.shares.values()) == pytest.approx(found.scores, abs=1e-5)
            for row, ids in enumerate(found.ids):
                must = [item for item in whole.ids[row] if item in {"100", "101"}][:count]
                rest = [item for item in whole.ids[row] if item not in must][: k - len(must)]
                assert ids == [item for item in whole.ids[row] if item in {*must, *rest}]
                assert found.scores[row] == pytest.approx(scores[row, grown.index.rows(ids)], abs=1e-4)


def test_places_for_more_new_items_than_there_are(tiny_bundle):
    for index in ("exact", "int8"):
        bundle = runtime.load(tiny_bundle, index=index)
        assert bundle.recommend([["1"]], k=5, new_items=2).ids == bundle.recommend([["1"]], k=5).ids


def test_seen_items_stand_in_lists_that_have_them(saved):
    bundle = runtime.load(saved)
    found = bundle.recommend([["0", "2", "4"]], k=24, exclude_seen=False)
    scores, shares = bundle.score([["0", "2", "4"]], found.ids[0], exclude_seen=False)
    assert found.scores == pytest.approx(scores, abs=1e-4)
    assert found.shares["network"] == pytest.approx(shares["network"], abs=1e-4)
    assert not bundle.score([["0", "2", "4"]], ["0", "2", "4"])[1]["network"].any()
    short = bundle.recommend([["0", "2", "4"]], k=24)
    assert np.isnan(short.shares["network"][0, 21:]).all()
    assert not np.isnan(short.shares["network"][0, :21]).any()


def test_recall_is_of_the_lists_that_are_served(saved, monkeypatch):
    bundle = runtime.load(saved, index="int8")
    assert bundle.recall(k=3) == 1.0
    monkeypatch.setattr(runtime, "PLACES_AT_ONCE", 5)
    assert bundle.recall(k=3) == 1.0


def test_batches_name_the_share(saved, tmp_path):
    rows = tmp_path / "users.jsonl"
    rows.write_text("".join(json.dumps({"user_id": str(user), "history": [str(user)]}) + "\n" for user in range(4)))
    recommend_file(runtime.load(saved), Job(rows, tmp_path / "out.parquet"), k=3)
    found = pl.read_parquet(tmp_path / "out.parquet")
    total = found.select(pl.sum_horizontal(pl.col("^share_.*$"))).to_series()
    assert total.to_numpy() == pytest.approx(found["score"].to_numpy(), abs=1e-5)
    assert found["share_network"].max() > 0.1


def test_items_are_added_behind_a_network(saved, tmp_path):
    new = [{"item_id": str(item), "title": f"{colour} film 30"} for item, colour in ((100, "Red"), (101, "Blue"))]
    pl.DataFrame(new).write_csv(tmp_path / "new.csv")
    assert add_items(saved, tmp_path / "new.csv", tmp_path / "grown") == 2
    assert read_manifest(tmp_path / "grown")["format"] == WITH_NETWORK
    grown, histories = runtime.load(tmp_path / "grown"), [["0", "2", "4"], ["3"], []]
    expected = runtime.load(saved).with_items(new).recommend(histories, k=26)
    found = grown.recommend(histories, k=26)
    assert found.ids == expected.ids
    assert any({"100", "101"} & set(ids) for ids in found.ids)
    for name, share in expected.shares.items():
        assert found.shares[name] == pytest.approx(share, abs=1e-5, nan_ok=True)
    assert found.shares["network"][0, :8].max() > 0.1


class Backwards:
    """Likes best what comes last."""

    def score_lists(self, queries, items):
        return [np.arange(len(own), dtype=np.float32) for own in items]


def test_a_ranker_behind_a_network_has_its_lists(saved):
    bundle, histories = runtime.load(saved), [["0", "2", "4"], ["3"]]
    first = bundle.recommend(histories, k=6)
    kept = TwoStage(bundle, Backwards(), top=6, weight=0.0).recommend(histories, 6)
    assert kept.ids == first.ids
    assert list(kept.shares) == [*bundle.fusion.names, "network", RANKER_SHARE]
    turned = TwoStage(bundle, Backwards(), top=6, weight=1e6).recommend(histories, 6)
    assert turned.ids == [ids[::-1] for ids in first.ids]
    for found in (kept, turned):
        assert sum(found.shares.values()) == pytest.approx(found.scores, rel=1e-4, abs=1e-3)
    for row, ids in enumerate(first.ids):
        own = first.shares["network"][row, [ids.index(item) for item in turned.ids[row]]]
        expected = (own - own.mean()) / first.scores[row].std()
        assert turned.shares["network"][row] == pytest.approx(expected, abs=1e-5)


def test_an_export_holds_the_sum_to_torchs_and_the_lists_to_their_gain(saved, tiny_run):
    run = load_run(tiny_run)
    task = prepare(run)
    bundle = runtime.load(saved)
    parts = load_collaborative(run, task)
    models = {"light": load_light(run, task, parts.features), "lm": load_language(run, task, parts.features)}
    lent = lenders(run, parts)
    read = {name: sequence_scorer(model.eval(), own, task, lent) for name, (model, own) in models.items()}
    scorers = parts.scorers() | read
    rows = [replace(row, query=replace(row.query, at=None)) for row in task.split.valid]  # asked now, as a bundle is
    found = ranking_parity(bundle, task, scorers, rows)
    summed = ranking_parity(bundle.with_fusion(replace(bundle.fusion, network=None)), task, scorers, rows)
    gains = {"ndcg", "ndcg_torch", "least_loss"}
    assert {name: found[name] for name in found.keys() - gains} == {
        name: summed[name] for name in summed.keys() - gains
    }
    assert found["max_difference"] < 1e-4
    assert found["ndcg"] == pytest.approx(found["ndcg_torch"], abs=0.02)
    assert found["ndcg"] < summed["ndcg"] - 0.01  # the fixture's network has learnt nothing


def test_a_teachers_network_teaches_nothing(saved, tiny_run, tmp_path, monkeypatch):
    """It reaches a hundred places, and what is taught is a softmax over all items."""
    monkeypatch.setenv("RECLLM_CACHE", str(tiny_run.parent / "cache"))
    other = shutil.copytree(tiny_run, tmp_path / "teacher", ignore=shutil.ignore_patterns("*bundle*"))
    shutil.copy(saved / "fusion.json", other / "fusion.json")
    taught = []
    for number, teacher in enumerate((tiny_run, other)):
        given = {"name": f"student-{number}", "output": tmp_path, "model.name": "none", "light.teacher": teacher}
        given |= {"model.item_encoder": load_run(tiny_run).model.name}
        keys = [f"{key}={json.dumps(str(value))}" for key, value in given.items()]
        student = load_run(tiny_run / "run.toml", [*keys, "light.taught=40"])
        taught.append(taught_windows(student, prepare(student), lambda _: None))
    plain, reordered = taught
    assert len(plain) == 40
    for one, two in zip(plain, reordered, strict=True):
        assert np.array_equal(one.items, two.items)
        assert np.array_equal(one.shares, two.shares)


def test_evaluation_sees_the_network():
    """What is measured is what is served: the first places without what the user has seen."""
    rng = np.random.default_rng(0)
    items = [str(item) for item in range(150)]
    index, n_item = ItemIndex(items), np.full(150, 5)
    examples = [Example(Query(tuple(rng.permutation(items)[:20])), "1") for _ in range(3)]
    scores = {name: rng.normal(size=(3, 150)).astype(np.float32) for name in "abc"}
    fusion = replace(Fusion.plain(tuple("abc")), network=drawn())
    counts = dict(zip(items, n_item.tolist(), strict=True))
    split = SimpleNamespace(train=SimpleNamespace(item_counts=lambda: counts))
    task = SimpleNamespace(index=index, split=split, repeats=False)
    found = WholeCatalogue(None, task).fuse(fusion, scores, examples)
    barred = np.zeros((3, 150), dtype=bool)
    for row, example in enumerate(examples):
        barred[row, index.rows(example.query.history)] = True
    both = fusion.fuse(scores, np.full(3, 20), n_item)
    assert np.array_equal(found, fusion.reordered(*both, np.full(3, 20), n_item, barred)[0])
    assert not np.array_equal(found, fusion.reordered(*both, np.full(3, 20), n_item)[0])


def test_learns_on_the_lists_that_are_measured(monkeypatch):
    """What the history has, always scored highest, would fill all first places."""
    monkeypatch.setattr("recllm.weighing.FIRST", 12)
    monkeypatch.setattr(fusing, "FIRST", 12)
    monkeypatch.setattr("recllm.reordering.PASSES", 20)
    monkeypatch.setattr("recllm.weighing.FOLDS", 2)
    scores, targets, n_user, n_item = either_or(300)
    seen = np.zeros((300, ITEMS), dtype=bool)
    for shift in range(20, 40):
        at = (targets + shift) % ITEMS
        seen[np.arange(300), at] = True
        for own in scores.values():
            own[np.arange(300), at] += 3
    settings = FusionSettings(kinds=("by counts", "network"), negatives=60, iterations=40)
    fusion = fit_ranking(scores, targets, n_user, n_item, seen, settings=settings)
    assert fusion.candidates["network"] > fusion.candidates["by counts"] + 0.04


def test_without_a_target_on_its_lists_there_is_no_network(monkeypatch):
    monkeypatch.setattr("recllm.weighing.FIRST", 1)
    scores, targets, n_user, n_item = either_or(60)
    for own in scores.values():
        own[np.arange(60), (targets + 5) % ITEMS] += 9
    settings = FusionSettings(kinds=("network",), negatives=60, iterations=10)
    fusion = fit_ranking(scores, targets, n_user, n_item, settings=settings)
    assert fusion.network is None
    assert fusion.chosen == "by counts"


def test_what_stands_far_out_says_no_more():
    network, rng = drawn(), np.random.default_rng(0)
    network = replace(network, deviations=np.full_like(network.deviations, 1e-3))
    shares = rng.normal(size=(1, 3, 10)).astype(np.float32)
    given = np.array([4]), np.full((1, 10), 5)
    reach = 8 * np.abs(network.inner).sum(axis=0) + np.abs(network.bias)
    assert network.added(shares, *given, few=1).max() <= 2 * float(np.abs(network.outer) @ reach)
    assert network.added(shares, *given, few=1) == pytest.approx(
        replace(network, deviations=network.deviations / 100).added(shares, *given, few=1), rel=0.3
    )

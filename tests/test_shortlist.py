"""The shortlist of a large catalogue: it holds the exact best, and the graph behind it says the very scores."""

import json
from dataclasses import replace

import numpy as np
import onnxruntime as ort
import pytest

import recllm
from recllm import catalogue as cataloguing
from recllm import runtime, shortlist
from recllm.catalogue import prepare
from recllm.cli import main
from recllm.errors import RecllmError
from recllm.fitting import Evidence
from recllm.fusion import Fusion
from recllm.graphs import catalogue_graph
from recllm.shortlist import FaissSearch, Int8Search, Shortlist, merged, recall

USERS, ITEMS, LISTED = 12, 2500, 60
WIDTHS = {"a": 16, "b": 1, "c": 40}


def fusion(kind, seed=0):
    random = np.random.default_rng(seed)
    theta = random.normal(size=(3, 3)) * [0.5, 0.3, 0.3 * (kind != "even")]
    given = Fusion(tuple(WIDTHS), theta, (1.0,) * 3, user=Evidence.of([0, 3, 9]), item=Evidence.of([1, 5, 50]))
    return replace(given, new=random.normal(size=(3, 2)) * 0.3, few=3) if kind == "new items" else given


def catalogue(seed=0):
    """Clustered item vectors of very different lengths by scorer, some unknown; queries, some unknown; counts."""
    random = np.random.default_rng([seed, 1])
    centres = random.integers(0, 40, ITEMS)
    vectors, queries = {}, {}
    for name, width in WIDTHS.items():
        length = {"a": 20.0, "b": 1.0, "c": 0.05}[name]
        middle = random.normal(size=(40, width))
        vectors[name] = (length * (middle[centres] + 0.7 * random.normal(size=(ITEMS, width)))).astype(np.float32)
        queries[name] = (middle[random.integers(0, 40, USERS)] + 0.3).astype(np.float32)
    vectors["c"][random.permutation(ITEMS)[:300]] = np.nan
    queries["a"][3] = np.nan
    return vectors, queries, random.integers(0, 30, USERS), random.integers(0, 80, ITEMS)


@pytest.fixture(params=[1024, 20], ids=["narrow", "wide"])
def width(request, monkeypatch):
    """From where on scorers are wide: 'c' is with the second one, and has items enough to be searched all the same."""
    monkeypatch.setattr(cataloguing, "WIDE", request.param)


@pytest.fixture(params=["even", "by counts", "new items"])
def ready(request, width, tmp_path):
    """A fusion, its prepared catalogue, queries, counts, and what ranks feeds of the graph."""
    given = fusion(request.param)
    vectors, queries, n_user, n_item = catalogue()
    catalogue_graph(given, WIDTHS, ITEMS, tmp_path / "catalogue.onnx")
    session = ort.InferenceSession(tmp_path / "catalogue.onnx", providers=["CPUExecutionProvider"])
    prepared = prepare(given, vectors, n_item)

    def rank(feeds, k, seen=None):
        facts = {"n_user": n_user, "seen": np.full((USERS, 1), -1) if seen is None else seen, "k": np.array([k])}
        own = {f"{name}_queries": value for name, value in queries.items()}
        return session.run(["rows", "scores"], feeds | own | facts)

    return given, prepared, queries, n_user, np.append(n_item, 0)[prepared.order], rank


def made(ready, kind="int8"):
    given, prepared, queries, _, n_item, _ = ready
    return Shortlist(given, prepared, n_item, kind=kind, samples=queries)


@pytest.mark.parametrize(("kind", "least"), [("int8", 0.99), ("faiss", 0.9)])
def test_a_shortlist_holds_the_exact_best(ready, kind, least):
    _, prepared, queries, n_user, _, rank = ready
    listed = made(ready, kind).find(queries, n_user, np.full(len(n_user), LISTED))
    assert listed.shape == (USERS, LISTED)
    assert all(len(set(row.tolist())) == LISTED for row in listed)
    best, _ = rank(prepared.feeds, 10)
    assert recall(best, listed) >= least
    drawn = np.random.default_rng(0).integers(0, ITEMS, listed.shape)
    assert recall(best, drawn) < 0.2


def test_the_graph_gives_the_listed_items_their_exact_scores(ready):
    _, prepared, queries, n_user, _, rank = ready
    shortlisted = made(ready)
    listed = shortlisted.find(queries, n_user, np.full(len(n_user), LISTED))
    places = shortlisted.together(listed)
    rows, scores = rank(shortlisted.feeds(places), len(places))
    exact_rows, exact = rank(prepared.feeds, len(prepared.order))
    for user in range(USERS):
        known = dict(zip(exact_rows[user].tolist(), exact[user].tolist(), strict=True))
        there = rows[user] >= 0
        wanted = [known[place] for place in places[rows[user][there]]]
        assert scores[user][there] == pytest.approx(wanted, abs=2e-5)


def test_int8_products_are_near_and_best_first(monkeypatch):
    random = np.random.default_rng(0)
    items, queries = random.normal(size=(700, 32)).astype(np.float32), random.normal(size=(5, 32)).astype(np.float32)
    items[17], queries[2] = 0.0, 0.0
    whole = Int8Search(items)(queries, 700)
    assert (np.diff(whole[1], axis=1) <= 0).all()
    exact = np.take_along_axis(queries @ items.T, whole[0], 1)
    assert whole[1] == pytest.approx(exact, abs=0.6)
    monkeypatch.setattr(shortlist, "ITEMS_IN_GRAPH", 128)
    parts = Int8Search(items)(queries, 50)
    assert parts[1] == pytest.approx(whole[1][:, :50], abs=1e-6)
    assert all(len(set(row.tolist())) == 50 for row in parts[0])


def test_faiss_looks_into_more_lists_until_it_finds_enough():
    random = np.random.default_rng(0)
    items = random.normal(size=(3000, 24)).astype(np.float32)
    samples = random.normal(size=(20, 24)).astype(np.float32)
    search = FaissSearch(items, samples)
    assert search.probes > 1
    best = np.argsort(-(samples @ items.T), axis=1)[:, :10]
    assert recall(best, search(samples, shortlist.LISTED)[0]) >= shortlist.PROBED_FOR


def test_faiss_gives_as_many_as_are_asked_for():
    random = np.random.default_rng(0)
    items = np.repeat(random.normal(size=(40, 16)), 50, axis=0) + 0.05 * random.normal(size=(2000, 16))
    items, queries = items.astype(np.float32), random.normal(size=(3, 16)).astype(np.float32)
    search = FaissSearch(items, queries)
    search.probes = 1
    few, many = search(queries, 5)[0], search(queries, 1500)[0]
    assert (few >= 0).all()
    assert all(len(set(row.tolist())) == 1500 and row.min() >= 0 for row in many)
    one_needs = search(queries, 1500, np.array([5, 1500, 5]))[0]
    assert (one_needs[1] == many[1]).all()
    assert (one_needs[[0, 2], :5] == few[[0, 2]]).all()
    alone = [search(query[None], 1500)[0][0].tolist() for query in queries]
    assert alone == many.tolist()  # whoever else is asked about


def test_merging_and_recall_by_hand():
    first = np.array([[4, 2]]), np.array([[0.9, 0.1]], dtype=np.float32)
    second = np.array([[7, -1]]), np.array([[0.5, -9.0]], dtype=np.float32)
    assert merged([first, second], 3)[0].tolist() == [[4, 7, 2]]
    assert recall(np.array([[4, 7, -1], [1, 2, 3]]), np.array([[7, 5], [1, 2]])) == 0.6
    assert recall(np.array([[-1]]), np.array([[3]])) == 1.0


def test_a_bundle_answers_the_same_with_an_index(tiny_bundle, monkeypatch):
    exact = recllm.load(tiny_bundle)
    histories = [["1", "2", "3"], [], ["9"], [str(item) for item in range(20)]]
    whole = recllm.load(tiny_bundle, index="int8")
    assert whole.recommend(histories, k=5).ids == exact.recommend(histories, k=5).ids
    assert whole.recall() == whole.recall(histories, k=3) == 1.0
    monkeypatch.setattr(runtime, "LISTED", 4)
    short = recllm.load(tiny_bundle, index="int8")
    found, wanted = short.recommend(histories, k=2), exact.recommend(histories, k=2)
    assert sum(own == other for own, other in zip(found.ids, wanted.ids, strict=True)) >= 3
    alone = [short.recommend([history], k=2).ids[0] for history in histories]
    assert alone == found.ids  # whoever else stands in the batch
    for history, ids in zip(histories, found.ids, strict=True):
        assert not set(history) & set(ids)
    with_seen = short.recommend([["1", "2", "3"]], k=4, exclude_seen=False)
    assert with_seen.ids == exact.recommend([["1", "2", "3"]], k=4, exclude_seen=False).ids


def test_new_items_are_found_through_an_index(tiny_bundle, monkeypatch):
    """They stand behind what is known of their half, and before the other half."""
    monkeypatch.setattr(runtime, "LISTED", 1)
    records = [{"item_id": f"new {number}", "title": f"Red film number {number}"} for number in range(3)]
    exact, grown = (recllm.load(tiny_bundle, index=index).with_items(records) for index in ("exact", "int8"))
    history = [str(item) for item in range(0, 18, 2)]
    (wanted,), (found,) = (own.recommend([history], k=5).ids for own in (exact, grown))  # out of nineteen of 27 items
    assert any(item.startswith("new") for item in wanted)
    assert found == wanted


@pytest.mark.parametrize("index", ["int8", "faiss"])
def test_a_short_list_of_a_bundle_holds_its_best(tiny_bundle, monkeypatch, index):
    monkeypatch.setattr(runtime, "LISTED", 1)
    monkeypatch.setattr(shortlist, "PER_LIST", 6)
    short, exact = recllm.load(tiny_bundle, index=index), recllm.load(tiny_bundle)
    histories = [[str(item)] for item in range(12)]
    assert short.recall(histories, k=2) >= 0.8
    found, wanted = (one.recommend(histories, k=2) for one in (short, exact))
    scores = dict(zip(wanted.ids[0], wanted.scores[0], strict=True))
    same = [item for item in found.ids[0] if item in scores]
    assert same
    for item in same:
        assert found.scores[0][found.ids[0].index(item)] == pytest.approx(scores[item], abs=1e-4)
    assert [len(ids) for ids in found.ids] == [2] * 12


def test_an_index_is_not_for_a_gpu(tiny_bundle):
    with pytest.raises(RecllmError, match=r"The index 'int8' searches on the CPU"):
        recllm.load(tiny_bundle, provider="cuda", index="int8")
    with pytest.raises(RecllmError, match=r"k=99 is not possible"):
        recllm.load(tiny_bundle, index="int8").recall(k=99)


def test_the_command_says_what_an_index_finds(tiny_bundle, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(runtime, "LISTED", 10)
    source = tmp_path / "users.jsonl"
    source.write_text(json.dumps({"user_id": "a", "history": ["1", "2"]}) + "\n", encoding="utf-8")
    answers = {}
    for index in ("exact", "int8"):
        out = tmp_path / f"{index}.csv"
        with pytest.raises(SystemExit, match="0"):
            main(["recommend", str(tiny_bundle), str(source), "--out", str(out), "--index", index, "-k", "5"])
        answers[index] = out.read_text(encoding="utf-8")
    assert "The index 'int8' gives 100.0 % of the exact ten best" in capsys.readouterr().err
    lines = {index: [line.split(",")[:3] for line in text.splitlines()] for index, text in answers.items()}
    assert lines["int8"] == lines["exact"]


def test_an_unknown_index_is_refused(tiny_bundle):
    with pytest.raises(RecllmError, match=r"Unknown index 'hnsw'\. Choices: exact, faiss, int8"):
        recllm.load(tiny_bundle, index="hnsw")


def test_a_fusion_by_ranks_is_not_searched(ready):
    given, _, queries, _, n_item, _ = ready
    by_ranks = replace(given, standardise="borda")
    prepared = prepare(by_ranks, *catalogue()[::3])
    with pytest.raises(RecllmError, match=r"'a', 'b', 'c' of this bundle cannot be one: .* Leave the index out"):
        Shortlist(by_ranks, prepared, n_item, kind="int8", samples=queries)


def test_a_bundle_that_kept_wide_scorers_apart_is_not_searched(ready):
    given, _, queries, _, n_item, _ = ready
    vectors, _, _, counts = catalogue()
    prepared = prepare(given, vectors, counts, {"a_root", "b_root"})
    assert prepared.roots == ("a", "b")
    with pytest.raises(RecllmError, match=r"'c' of this bundle cannot be one: .* an older recllm .* export it again"):
        Shortlist(given, prepared, n_item, kind="int8", samples=queries)

"""A loaded bundle: without torch, the same answer in a batch as alone, new items by their text, shares that add up."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import recllm
from recllm import sessions
from recllm.bundle import seal
from recllm.data import Query
from recllm.errors import RecllmError
from recllm.files import read_json, write_json
from recllm.ranking import ItemIndex
from recllm.sessions import open_session

ROOT = Path(__file__).parents[1]
RED, BLUE = [str(item) for item in range(0, 24, 2)], [str(item) for item in range(1, 24, 2)]
HISTORIES = [RED[:4], BLUE[2:9], [], ["x"], [*RED[5:], "x"], BLUE[:1], RED[:4][::-1]]
NEW = [
    {"item_id": "100", "title": "Red film 30", "genres": "Drama"},
    {"item_id": "101", "title": "Blue film 31", "genres": "Comedy"},
]


@pytest.fixture(scope="module")
def bundle(tiny_bundle):
    return recllm.load(tiny_bundle)


BARE = """
import json, sys
for name in ("torch", "transformers", "peft", "accelerate", "onnx", "onnxscript", "implicit", "scipy", "sklearn"):
    sys.modules[name] = None  # importing it fails
import recllm
rec = recllm.load(sys.argv[1])
out = rec.recommend([["0", "2"], []], k=3)
new = rec.with_items([{"item_id": "100", "title": "Red film 30", "genres": "Drama"}]).recommend([["0", "2"]], k=3)
print(json.dumps([out.ids, new.ids]))
"""


def test_loads_and_takes_new_items_without_torch(tiny_bundle, bundle):
    done = subprocess.run(
        [sys.executable, "-c", BARE, str(tiny_bundle)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    plain, grown = json.loads(done.stdout)
    assert plain == bundle.recommend([["0", "2"], []], k=3).ids
    assert grown == bundle.with_items(NEW[:1]).recommend([["0", "2"]], k=3).ids


def test_the_cycle_goes_on(bundle):
    """The models of the run know what comes next: (i + 2) % 24."""
    histories = [[str((start + 2 * step) % 24) for step in range(8)] for start in range(24)]
    found = bundle.recommend(histories, k=1).ids
    right = sum(ids == [str((start + 16) % 24)] for start, ids in enumerate(found))
    assert right >= 22


def test_ids_scores_and_shares_have_their_shapes(bundle):
    out = bundle.recommend(HISTORIES, k=5)
    assert [len(ids) for ids in out.ids] == [5] * len(HISTORIES)
    assert out.scores.shape == (len(HISTORIES), 5)
    assert out.scores.dtype == np.float32
    assert (np.diff(out.scores, axis=1) <= 0).all()
    assert set(out.shares) == set(bundle.manifest["scorers"])
    assert sum(out.shares.values()) == pytest.approx(out.scores, abs=1e-5)


def test_seen_items_are_left_out_unless_asked_for(bundle):
    out = bundle.recommend(HISTORIES, k=5)
    for history, ids in zip(HISTORIES, out.ids, strict=True):
        assert not set(history) & set(ids)
    everything = bundle.recommend(HISTORIES, k=24, exclude_seen=False)
    assert all(sorted(ids) == sorted(bundle.index.ids) for ids in everything.ids)


def test_rows_end_where_no_item_is_left(bundle):
    out = bundle.recommend([RED], k=24)
    assert sorted(out.ids[0]) == sorted(BLUE)
    assert np.isfinite(out.scores[0, :12]).all()
    assert np.isnan(out.scores[0, 12:]).all()
    for name, share in out.shares.items():
        assert np.isfinite(share[0, :12]).all(), name
        assert np.isnan(share[0, 12:]).all(), name


def test_a_batch_equals_its_rows_one_by_one(bundle, monkeypatch):
    whole = bundle.recommend(HISTORIES, k=6)
    for row, history in enumerate(HISTORIES):
        alone = bundle.recommend([history], k=6)
        assert alone.ids[0] == whole.ids[row]
        assert alone.scores[0] == pytest.approx(whole.scores[row], abs=1e-5)
    monkeypatch.setattr("recllm.runtime.USERS_IN_BATCH", 2)
    assert bundle.recommend(HISTORIES, k=6).ids == whole.ids


def test_no_answer_hangs_on_what_a_search_lists_for_others(tiny_bundle, monkeypatch):
    monkeypatch.setattr("recllm.runtime.LISTED", 1)
    monkeypatch.setattr("recllm.shortlist.PER_LIST", 6)
    monkeypatch.setattr("recllm.shortlist.PROBED_FOR", 0.0)  # one list of several: it misses what others may find
    short = recllm.load(tiny_bundle, index="faiss")
    histories = [[str(item)] for item in range(24)]
    together = short.recommend(histories, k=2).ids
    assert [short.recommend([history], k=2).ids[0] for history in histories] == together
    assert short.recommend(histories[::-1], k=2).ids == together[::-1]


def test_long_lists_are_made_for_few_users_at_once(bundle, monkeypatch):
    whole = bundle.recommend(HISTORIES, k=3)
    scorer, asked = bundle.scorers["popularity"], []
    answer = scorer.query_vectors

    def counted(queries):
        asked.append(len(queries))
        return answer(queries)

    monkeypatch.setattr(scorer, "query_vectors", counted)
    monkeypatch.setattr("recllm.runtime.PLACES_AT_ONCE", 7)
    assert bundle.recommend(HISTORIES, k=3).ids == whole.ids
    assert asked == [2, 2, 2, 1]
    asked.clear()
    assert len(bundle.recommend(HISTORIES, k=9).ids) == len(HISTORIES)  # more places than at once: one by one
    assert asked == [1] * len(HISTORIES)


def test_no_histories_no_rows(bundle):
    out = bundle.recommend([], k=4)
    assert out.ids == []
    assert out.scores.shape == (0, 4)


def test_an_empty_history_gets_the_order_of_popularity(bundle):
    popular = bundle.scorers["popularity"].item_vectors(bundle.index)[:, 0]
    expected = np.argsort(-popular, kind="stable")
    out = bundle.recommend([[], ["x", "y"]], k=24)
    for ids, scores in zip(out.ids, out.scores, strict=True):
        assert popular[bundle.index.rows(ids)].tolist() == popular[expected].tolist()
        assert np.isfinite(scores).all()
    silent = set(out.shares) - {"popularity"}
    assert not any(out.shares[name].any() for name in silent)


@pytest.mark.parametrize("k", [0, -1, 25])
def test_k_has_bounds(bundle, k):
    with pytest.raises(RecllmError, match=rf"k={k} is not possible: the catalogue has 24 items\. Take 1 to 24"):
        bundle.recommend([RED[:2]], k=k)


@pytest.mark.parametrize("count", [2.5, "3", True])
def test_counts_are_whole_numbers(bundle, count):
    with pytest.raises(RecllmError, match=rf"k={count!r} is not possible: a whole number is expected"):
        bundle.recommend([RED[:2]], k=count)
    with pytest.raises(RecllmError, match=rf"new_items={count!r} is not possible"):
        bundle.recommend([RED[:2]], k=5, new_items=count)
    assert len(bundle.recommend([RED[:2]], k=np.int64(3)).ids[0]) == 3


def test_scores_of_given_items_are_those_of_the_ranking(bundle):
    out = bundle.recommend(HISTORIES, k=24, exclude_seen=False)
    scores, shares = bundle.score(HISTORIES, ["7", "0", "12"])
    assert sum(shares.values()) == pytest.approx(scores, abs=1e-5)
    for row, ids in enumerate(out.ids):
        places = [ids.index(item) for item in ("7", "0", "12")]
        assert scores[row] == pytest.approx(out.scores[row, places], abs=2e-5)


def test_an_item_that_is_not_there_is_named(bundle):
    with pytest.raises(RecllmError, match=r"Unknown item '99'"):
        bundle.score([RED[:2]], ["1", "99"])


def test_no_histories_have_no_scores(bundle):
    scores, shares = bundle.score([], ["7", "0"])
    assert scores.shape == (0, 2)
    assert all(share.shape == (0, 2) for share in shares.values())


@pytest.mark.parametrize(
    ("histories", "words"),
    [
        (["50 181"], r"the one at 0 is the text '50 181'"),
        ([["1"], [2]], r"The history at 1 has 2, and item ids are text: str\(2\)"),
        ([[None, "1"]], r"The history at 0 has None, and item ids are text"),
        ([["1"], None], r"the one at 1 is None"),
        ([["1"], 5], r"the one at 1 is 5"),
        ([iter(["1"])], r"the one at 0 is <list_iterator"),
        (iter([["1"]]), r"Histories are a list of lists of item ids, and these are <list_iterator"),
    ],
)
def test_histories_that_are_no_lists_of_ids_are_named(bundle, histories, words):
    with pytest.raises(RecllmError, match=words):
        bundle.recommend(histories, k=3)


@pytest.mark.parametrize("histories", [["50 181"], [["1"], [2]]])
def test_scores_and_recall_take_lists_of_ids_only(bundle, histories):
    with pytest.raises(RecllmError, match=r"is the text|has 2, and item ids are text"):
        bundle.score(histories, ["1"])
    with pytest.raises(RecllmError, match=r"is the text|has 2, and item ids are text"):
        bundle.recall(histories)


@pytest.mark.parametrize(
    ("items", "words"),
    [
        ("02", "these are the text '02'"),
        ([0], r"Items have 0 among them"),
        (["1", None], r"Items have None among them"),
        (iter(["1"]), r"Items are a list of ids, and these are <list_iterator"),
    ],
)
def test_items_that_are_no_list_of_ids_are_named(bundle, items, words):
    with pytest.raises(RecllmError, match=words):
        bundle.score(HISTORIES, items)


def test_scores_do_not_hang_on_who_is_asked_about_together(bundle, monkeypatch):
    scores, shares = bundle.score(HISTORIES, ["7", "0"])
    monkeypatch.setattr("recllm.runtime.USERS_IN_BATCH", 2)
    again, parts = bundle.score(HISTORIES, ["7", "0"])
    np.testing.assert_allclose(again, scores, atol=1e-6)
    assert all(np.allclose(parts[name], shares[name], atol=1e-6) for name in shares)


def test_a_new_item_by_its_text_goes_to_the_right_half(bundle):
    grown = bundle.with_items(NEW)
    histories = [RED[:6], BLUE[:6], RED[4:10], BLUE[5:]]
    scores, _ = grown.score(histories, ["100", "101"])
    assert ((scores[:, 0] > scores[:, 1]) == [True, False, True, False]).all()
    out = grown.recommend(histories, k=12)
    own, other = ("100", "101") * 2, ("101", "100") * 2
    for ids, mine, others in zip(out.ids, own, other, strict=True):
        assert mine in ids[:10]  # behind all known ones of its half: what is new costs them nothing
        assert others not in ids[: ids.index(mine)]


@pytest.mark.parametrize("index", ["exact", "int8"])
def test_places_are_kept_for_new_items(tiny_bundle, index, monkeypatch):
    monkeypatch.setattr("recllm.runtime.PLACES_AT_ONCE", 6)
    grown = recllm.load(tiny_bundle, index=index).with_items([*NEW, {"item_id": "102", "title": "Blue film 32"}])
    new = {"100", "101", "102"}
    whole = grown.recommend(HISTORIES, k=27)
    for count in range(4):
        found = grown.recommend(HISTORIES, k=5, new_items=count)
        for row, ids in enumerate(found.ids):
            must = [item for item in whole.ids[row] if item in new][:count]
            rest = [item for item in whole.ids[row] if item not in must][: 5 - len(must)]
            assert ids == [item for item in whole.ids[row] if item in {*must, *rest}]
            places = [whole.ids[row].index(item) for item in ids]
            assert found.scores[row] == pytest.approx(whole.scores[row][places], abs=1e-5)
            total = sum(share[row] for share in found.shares.values())
            assert total == pytest.approx(found.scores[row], abs=1e-5)
    seen = grown.recommend([["100", "101", "2"]], k=4, new_items=3).ids[0]
    assert new & set(seen) == {"102"}
    assert len(seen) == 4


def test_places_for_new_items_have_bounds_and_reasons(bundle, tiny_bundle, monkeypatch):
    with pytest.raises(RecllmError, match=r"6 new items do not go into a list of 5\. Take 0 to 5"):
        bundle.recommend([["1"]], k=5, new_items=6)
    assert bundle.recommend([["1"]], k=5, new_items=2).ids == bundle.recommend([["1"]], k=5).ids  # there is none
    old = recllm.load(tiny_bundle)
    monkeypatch.setattr(old, "_catalogue", SimpleNamespace(get_overridable_initializers=list))
    with pytest.raises(RecllmError, match=r"exported before places could be kept.*Export it again"):
        old.recommend([["1"]], k=5, new_items=1)
    monkeypatch.setattr(old, "fusion", replace(old.fusion, new=None))
    with pytest.raises(RecllmError, match="New items have no weights of their own in this bundle"):
        old.recommend([["1"]], k=5, new_items=1)


def test_new_items_leave_the_old_scores_of_every_scorer_alone(bundle):
    grown = bundle.with_items(NEW)
    queries = [recllm.data.Query(tuple(history)) for history in HISTORIES]
    for name, scorer in bundle.scorers.items():
        before, after = scorer.score(queries, bundle.index), grown.scorers[name].score(queries, grown.index)
        assert after[:, :24] == pytest.approx(before, abs=1e-5, nan_ok=True), name
        new = after[:2, 24:]
        assert np.isnan(new).all() if name in {"mf", "ease", "transitions"} else np.isfinite(new).all(), name


def test_the_recommender_that_was_grown_from_stays_as_it_was(bundle):
    before = bundle.recommend(HISTORIES, k=4)
    bundle.with_items(NEW)
    after = bundle.recommend(HISTORIES, k=4)
    assert after.ids == before.ids
    assert np.array_equal(after.scores, before.scores)
    assert len(bundle.catalog) == 24


def test_a_new_item_in_a_history_counts(bundle):
    """Who has only chosen a new red film gets red films."""
    grown = bundle.with_items(NEW)
    scores, _ = grown.score([["100"], ["101"]], [*RED, *BLUE])
    own = scores[:, :12].mean(axis=1), scores[:, 12:].mean(axis=1)
    assert own[0][0] > own[1][0]
    assert own[0][1] < own[1][1]


def test_items_are_added_twice_as_at_once(bundle):
    twice = bundle.with_items(NEW[:1]).with_items(NEW[1:])
    assert twice.recommend(HISTORIES, k=9).ids == bundle.with_items(NEW).recommend(HISTORIES, k=9).ids


def test_a_new_item_without_text_is_known_to_no_text_scorer(bundle):
    grown = bundle.with_items([{"item_id": "102"}])
    out = grown.recommend([RED[:3]], k=22)
    assert len(out.ids[0]) == 21  # of 25 items less three of the history, all but the one of which nothing is known
    assert "102" not in out.ids[0]
    for name in ("text", "light", "lm"):
        scores = grown.scorers[name].score([recllm.data.Query(tuple(RED[:3]))], ItemIndex(["102", "8"]))
        assert np.isnan(scores[0]).tolist() == [True, False], name


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"item_id": "3", "title": "Red"}, "3"),
        ({"item_id": "100", "titel": "Red"}, "Unknown item field 'titel'. Did you mean 'title'"),
        ({"title": "Red"}, "A new item needs 'item_id'"),
    ],
)
def test_wrong_new_items_are_named(bundle, record, message):
    with pytest.raises(RecllmError, match=message):
        bundle.with_items([record])


def test_a_provider_that_is_not_there_is_an_error(tiny_bundle, monkeypatch):
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(RecllmError, match=r"The provider 'cuda' is not in this ONNX Runtime .it has CPUExecution"):
        recllm.load(tiny_bundle, provider="cuda")


def test_a_silent_fall_back_is_an_error(tiny_bundle, monkeypatch, capsys):
    """The provider is compiled in, but its libraries cannot be loaded: ONNX Runtime takes the CPU without a word."""
    import onnxruntime as ort

    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    session, loaded = ort.InferenceSession, []
    monkeypatch.setattr(
        ort, "InferenceSession", lambda path, options, **_: session(path, options, ["CPUExecutionProvider"])
    )
    monkeypatch.setattr(ort, "preload_dlls", lambda: loaded.append(sys.stdout.write("said to nobody")))
    sessions._load_libraries.cache_clear()
    with pytest.raises(RecllmError, match=r"could not load the libraries of 'cuda' and would have run on the CPU"):
        recllm.load(tiny_bundle, provider="cuda")
    assert len(loaded) == 1  # what pip has brought of CUDA is looked for first
    assert capsys.readouterr().out == ""


def test_an_unknown_provider_is_named(tiny_bundle):
    with pytest.raises(RecllmError, match=r"Unknown provider 'cud'. Did you mean 'cuda'"):
        open_session(tiny_bundle / "catalogue.onnx", "cud")


def test_no_onnx_runtime_says_what_to_install(tiny_bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(RecllmError, match=r'Running a bundle needs .*onnxruntime.*pip install "recllm\[gpu\]"'):
        recllm.load(tiny_bundle)


def test_a_damaged_bundle_does_not_load(tiny_bundle, tmp_path):
    shutil.copytree(tiny_bundle, tmp_path / "b")
    weights = bytearray((tmp_path / "b" / "vectors.safetensors").read_bytes())
    weights[-1] ^= 1
    (tmp_path / "b" / "vectors.safetensors").write_bytes(weights)
    with pytest.raises(RecllmError, match=r"vectors\.safetensors' is damaged"):
        recllm.load(tmp_path / "b")


def test_a_scorer_of_an_unknown_kind_is_named(tiny_bundle, tmp_path):
    shutil.copytree(tiny_bundle, tmp_path / "b")
    manifest = read_json(tmp_path / "b" / "manifest.json")
    manifest["scorers"]["lm"] = "sequences"
    write_json(tmp_path / "b" / "manifest.json", manifest)
    with pytest.raises(RecllmError, match=r"Unknown kind of scorer in the bundle 'sequences'. Did you mean 'sequence'"):
        recllm.load(tmp_path / "b")


def test_a_bundle_without_an_encoder_takes_no_new_items(bundle, monkeypatch):
    monkeypatch.setattr(bundle, "_item_encoder", None)
    with pytest.raises(RecllmError, match=r"has no item encoder, so it cannot take new items"):
        bundle.with_items(NEW)


@pytest.mark.parametrize(("rule", "once"), [("first", ["2", "4", "6"]), ("last", ["2", "6", "4"]), (None, None)])
def test_a_history_has_each_item_as_often_as_in_training(bundle, rule, once, monkeypatch):
    given = ["2", "4", "2", "2", "6", "4"]
    monkeypatch.setattr(bundle, "manifest", {**bundle.manifest, "each_once": rule})
    found = bundle.recommend([given], k=5, exclude_seen=True)
    if once is None:
        assert bundle.learnt(Query(tuple(given))).history == tuple(given)
        return
    expected = bundle.recommend([once], k=5, exclude_seen=True)
    assert found.ids == expected.ids
    assert found.scores == pytest.approx(expected.scores)
    assert bundle.score([given], ["8"])[0] == pytest.approx(bundle.score([once], ["8"])[0])
    rated = bundle.learnt(Query(tuple(given), "u", (1.0, 2.0, 3.0, 4.0, 5.0, 6.0)))
    assert rated.history == tuple(once)
    assert rated.ratings == ((1.0, 2.0, 5.0) if rule == "first" else (4.0, 5.0, 6.0))


def test_a_scorer_is_no_path_out_of_the_bundle(tiny_bundle, tmp_path):
    folder = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    manifest = read_json(folder / "manifest.json")
    write_json(folder / "manifest.json", manifest | {"scorers": {"../side/lm": "sequence"}})
    with pytest.raises(RecllmError, match=r"has a scorer '../side/lm', which is no name of a file in it"):
        recllm.load(folder)


def test_a_bundle_whose_files_contradict_each_other_is_told(tiny_bundle, tmp_path):
    folder = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    facts = read_json(folder / "fusion.json")
    write_json(folder / "fusion.json", facts | {"of_a_later_version": 1})
    seal(folder, {key: own for key, own in read_json(folder / "manifest.json").items() if key not in ("files", "made")})
    with pytest.raises(RecllmError, match=r"its files do not go together \(TypeError: .*of_a_later_version"):
        recllm.load(folder)

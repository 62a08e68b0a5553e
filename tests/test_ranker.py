"""Two stages: the catalogue's best, reordered by a ranker; shares sum to scores, a limit of time loses nothing."""

import numpy as np
import polars as pl
import pytest

import recllm
from recllm import ranker
from recllm.batch import Job, recommend_file
from recllm.errors import RecllmError
from recllm.ranker import RANKER_SHARE, TwoStage, load_ranker

HISTORIES = [["0", "2", "4"], ["1"], [], ["x"]]
KNOWN = {str(item) for item in range(1000)} - {"7"}


class Opinionated:
    """Likes items with a high number; knows nothing of item 7, of those without a number, nor of an empty history."""

    def __init__(self):
        self.asked, self.ratings = [], []

    def score_lists(self, queries, items):
        self.asked.append([list(own) for own in items])
        self.ratings += [query.ratings for query in queries]
        return [
            np.array([float(item) if query.history and item in KNOWN else np.nan for item in own], dtype=np.float32)
            for query, own in zip(queries, items, strict=True)
        ]


@pytest.fixture(scope="module")
def recommender(tiny_bundle):
    return recllm.load(tiny_bundle)


def test_the_best_are_reordered_and_shares_sum(recommender):
    judge = Opinionated()
    found = TwoStage(recommender, judge, top=8, weight=1e6).recommend(HISTORIES, 5)
    first = recommender.recommend(HISTORIES, 8)
    assert judge.asked == [first.ids]
    for row in (0, 1):
        order = sorted((int(item) for item in first.ids[row] if item != "7"), reverse=True)
        assert found.ids[row][:3] == [str(item) for item in order[:3]]
    assert found.ids[2] == first.ids[2][:5]  # nothing was said of an empty history
    assert list(found.shares) == [*first.shares, "ranker"]
    assert sum(found.shares.values()) == pytest.approx(found.scores, rel=1e-4, abs=1e-3)
    assert (np.diff(found.scores, axis=1) <= 0).all()


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_batch_hands_its_ratings_to_the_ranker(recommender, tmp_path, suffix):
    rows = {"history": [["0", "2"], ["1"], []], "ratings": [[5.0, 1.0], None, []]}
    frame, source = pl.DataFrame(rows), tmp_path / f"rows{suffix}"
    if suffix == ".csv":
        source.write_text("history,ratings\n0 2,5|1.0\n1,\n[],[]\n", encoding="utf-8")
    else:
        (frame.write_parquet if suffix == ".parquet" else frame.write_ndjson)(source)
    judge = Opinionated()
    recommend_file(TwoStage(recommender, judge, top=3), Job(source, tmp_path / "out.csv"), k=2)
    assert judge.ratings == [(5.0, 1.0), None, ()]


def test_ratings_that_are_no_numbers_are_none(recommender):
    judge = Opinionated()
    TwoStage(recommender, judge, top=2).recommend([["0", "2"]], 2, ratings=[np.array([5.0, np.nan])])
    assert judge.ratings == [(5.0, None)]


def test_ratings_of_another_length_are_refused(recommender):
    with pytest.raises(RecllmError, match=r"Row 1: 1 ratings for 2 items of the history"):
        TwoStage(recommender, Opinionated()).recommend([["0"], ["0", "2"]], 2, ratings=[None, [4.0]])
    with pytest.raises(RecllmError, match=r"1 lists of ratings for 2 histories"):
        TwoStage(recommender, Opinionated()).recommend([["0"], ["2"]], 2, ratings=[[4.0]])


@pytest.mark.parametrize("top", [6, 12])
def test_places_for_new_items_stay_behind_a_ranker(recommender, top, tmp_path):
    assert recommender.fusion.new is not None
    grown = recommender.with_items([{"item_id": f"n{place}", "title": f"Red film {place}"} for place in range(3)])
    new = [item for item in grown.index.ids if grown.is_new(item)]
    assert set(new) >= {"n0", "n1", "n2"}
    stages = TwoStage(grown, Opinionated(), top=top, weight=1e-3)
    for count in (0, 2):
        found = stages.recommend(HISTORIES, 6, new_items=count)
        assert all(len(set(ids)) == 6 and sum(map(grown.is_new, ids)) >= count for ids in found.ids)
        assert (np.diff(found.scores, axis=1) <= 0).all()
        assert sum(found.shares.values()) == pytest.approx(found.scores, rel=1e-4, abs=1e-3)
    rows = tmp_path / "in.jsonl"
    rows.write_text('{"history": ["0"]}', encoding="utf-8")
    recommend_file(stages, Job(rows, tmp_path / "out.csv"), k=6, new_items=2)
    assert pl.read_csv(tmp_path / "out.csv")["item_id"].is_in(new).sum() >= 2


def test_of_a_list_longer_than_what_is_judged_new_items_are_judged_too(recommender):
    grown = recommender.with_items([{"item_id": f"n{place}", "title": f"Red film {place}"} for place in range(3)])
    judge = Opinionated()
    found = TwoStage(grown, judge, top=3, weight=1e-3).recommend(HISTORIES, 6, new_items=2)
    first = grown.recommend(HISTORIES, 6, new_items=2)
    for own, before, asked in zip(found.ids, first.ids, judge.asked[0], strict=True):
        assert sorted(own) == sorted(before)
        assert len(asked) == 3
        assert sum(map(grown.is_new, asked)) >= 2
        assert asked[0] == before[0]  # the best stays
        assert set(own[:3]) == set(asked)
    assert (np.diff(found.scores, axis=1) <= 0).all()
    assert sum(found.shares.values()) == pytest.approx(found.scores, rel=1e-4, abs=1e-3)


def test_without_weight_the_first_order_stays(recommender):
    found = TwoStage(recommender, Opinionated(), top=8, weight=0.0).recommend(HISTORIES, 12)
    assert found.ids == recommender.recommend(HISTORIES, 12).ids
    assert (np.diff(found.scores, axis=1) <= 0).all()


def test_what_is_not_judged_stands_behind(recommender):
    found = TwoStage(recommender, Opinionated(), top=4, weight=1e6).recommend(HISTORIES, 12)
    first = recommender.recommend(HISTORIES, 12)
    for own, before in zip(found.ids, first.ids, strict=True):
        assert sorted(own[:4]) == sorted(before[:4])
        assert own[4:] == before[4:]
    assert (np.diff(found.scores, axis=1) <= 0).all()


def test_when_the_time_is_up_the_rest_stays_behind(recommender, monkeypatch):
    monkeypatch.setattr(ranker, "CANDIDATES_AT_ONCE", 3)
    clock = iter([0.0, 1.0, 5.0])  # the start, after three candidates, after six
    monkeypatch.setattr(ranker.time, "monotonic", lambda: next(clock))
    judge = Opinionated()
    found = TwoStage(recommender, judge, top=12, weight=1e6, seconds=1.0).recommend(HISTORIES, 12)
    first = recommender.recommend(HISTORIES, 12)
    assert [len(part[0]) for part in judge.asked] == [3, 3]
    assert [own[6:] for own in found.ids] == [own[6:] for own in first.ids]
    assert [sorted(own) for own in found.ids] == [sorted(own) for own in first.ids]


def test_more_than_there_is(recommender):
    items = len(recommender.index)
    found = TwoStage(recommender, Opinionated(), top=1000).recommend([["0"], list(recommender.index.ids)], items)
    assert [len(own) for own in found.ids] == [items - 1, 0]
    assert np.isnan(found.scores[1]).all()
    with pytest.raises(RecllmError, match="k=0 is not possible"):
        TwoStage(recommender, Opinionated()).recommend([["0"]], 0)


@pytest.mark.parametrize(
    "given", [{"top": 0}, {"weight": -1.0}, {"seconds": 0.0}, {"weight": np.nan}, {"seconds": np.nan}]
)
def test_settings_are_checked(recommender, given):
    with pytest.raises(RecllmError, match="the first must be at least 1"):
        TwoStage(recommender, Opinionated(), **given)


def test_a_bundle_that_recommends_is_no_ranker(tiny_bundle):
    with pytest.raises(RecllmError, match=r"is a bundle that recommends, not one that ranks"):
        load_ranker(tiny_bundle)


def test_a_batch_in_two_stages_has_the_rankers_share(recommender, tmp_path):
    source, target = tmp_path / "users.jsonl", tmp_path / "out.csv"
    source.write_text('{"user_id": "a", "history": ["0", "2"]}\n{"user_id": "b", "history": ["1"]}\n', encoding="utf-8")
    stages = TwoStage(recommender, Opinionated(), top=8)
    recommend_file(stages, Job(source, target), k=3)
    frame = pl.read_csv(target, schema_overrides={"item_id": pl.String})
    expected = stages.recommend([["0", "2"], ["1"]], 3)
    assert frame["item_id"].to_list() == [item for ids in expected.ids for item in ids]
    assert frame["share_ranker"].to_list() == pytest.approx(expected.shares["ranker"].ravel(), abs=1e-5)


def test_a_ranker_that_hardly_tells_items_apart_has_no_say(recommender):
    """Its last digits hang on what is computed beside them."""

    class Flat:
        def score_lists(self, queries, items):
            drawn = np.random.default_rng(0)
            return [(1.009 + 1e-5 * drawn.random(len(own))).astype(np.float32) for own in items]

    found = TwoStage(recommender, Flat(), top=8, weight=1e3).recommend(HISTORIES, 5)
    assert found.ids == recommender.recommend(HISTORIES, 5).ids
    assert not found.shares[RANKER_SHARE].any()


@pytest.mark.parametrize("given", [None, [["1"], 5]], ids=str)
def test_what_are_no_histories_is_one_message_behind_a_ranker_too(recommender, given):
    with pytest.raises(RecllmError, match="Histories are"):
        TwoStage(recommender, Opinionated()).recommend(given)


def test_a_weight_is_finite(recommender):
    with pytest.raises(RecllmError, match="the second finite and not negative"):
        TwoStage(recommender, Opinionated(), weight=float("inf"))

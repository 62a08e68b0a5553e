"""A bundle for clusters: each batch is answered as the batch runner answers it, and bad rows say why."""

import numpy as np
import pandas as pd
import polars as pl
import pytest

from recllm.batch import Job, recommend_file
from recllm.distributed import BatchRecommender
from recllm.errors import RecllmError
from recllm.ranker import RANKER_SHARE

ROWS = [
    {"user_id": "a", "history": ["0", "2", "4"]},
    {"user_id": "b", "history": []},
    {"user_id": "c", "history": ["x", "1"]},
]


def arrays(rows):
    """A batch as Ray Data hands it over: arrays of objects."""
    histories = np.empty(len(rows), dtype=object)
    for place, row in enumerate(rows):
        histories[place] = np.array(row["history"], dtype=object)
    return {"user_id": np.array([row["user_id"] for row in rows], dtype=object), "history": histories}


@pytest.mark.parametrize("kind", ["arrays", "pandas"])
def test_a_batch_is_answered_as_by_the_batch_runner(tiny_bundle, tmp_path, kind):
    source, target = tmp_path / "in.parquet", tmp_path / "out.parquet"
    pl.DataFrame(ROWS).write_parquet(source)
    answer = BatchRecommender(tiny_bundle, k=4)
    recommend_file(answer.recommender, Job(source, target), k=4)
    found = pl.DataFrame(answer(arrays(ROWS) if kind == "arrays" else pd.DataFrame(ROWS)))
    expected = pl.read_parquet(target)
    assert found["error"].null_count() == len(found) == 12
    assert found.columns == [*expected.columns, "error"]
    for name in ("user_id", "rank", "item_id"):
        assert found[name].to_list() == expected[name].to_list()
    for name in expected.columns[3:]:
        assert found[name].to_numpy() == pytest.approx(expected[name].to_numpy(), abs=1e-5, nan_ok=True), name


def test_a_bad_row_says_why_and_stops_nothing(tiny_bundle):
    rows = {"user_id": ["a", "b", None, pd.NA, "c\ud83d", "d"], "history": [["0"], 7, ["1"], ["1"], ["1"], None]}
    found = pl.DataFrame(BatchRecommender(tiny_bundle, k=2)(rows))
    bad = found.filter(pl.col("error").is_not_null())
    assert bad.select("user_id", "rank", "item_id").rows() == [
        ("b", 0, None),
        (None, 0, None),
        (None, 0, None),
        ("c\\ud83d", 0, None),
        ("d", 0, None),
    ]
    assert "half of a character" in bad["error"][3]
    assert bad["error"][4] == "no 'history'; an empty list is one"
    assert "'history' is 7, not a list" in bad["error"][0]
    assert "no 'user_id'" in bad["error"][1]
    assert found.filter(user_id="a")["rank"].to_list() == [1, 2]
    nothing = BatchRecommender(tiny_bundle, k=2)({"user_id": [], "history": []})
    assert list(nothing) == found.columns
    assert all(len(column) == 0 for column in nothing.values())


def test_a_user_is_known_by_the_id_only(tiny_bundle):
    with pytest.raises(RecllmError, match=r"The batch has no column 'user_id'\. Its columns: history"):
        BatchRecommender(tiny_bundle)({"history": [["0"]]})
    with pytest.raises(RecllmError, match=r"k=99 is not possible"):
        BatchRecommender(tiny_bundle, k=99)


@pytest.mark.parametrize("blank", ["", "  ", "\t"])
def test_a_blank_is_nobodys_id(tiny_bundle, blank):
    found = BatchRecommender(tiny_bundle, k=2)({"user_id": [blank, "a"], "history": [["0"], ["0"]]})
    assert found["user_id"][:2].tolist() == ["a", "a"]
    assert found["rank"].tolist() == [1, 2, 0]
    assert "no 'user_id', by which an answer of a cluster is known" in found["error"][2]


def test_seen_items_stay_where_that_is_asked_for(tiny_bundle):
    rows = {"user_id": ["a"], "history": [["0", "2", "4"]]}
    every = BatchRecommender(tiny_bundle, k=24, exclude_seen=False)(rows)["item_id"].tolist()
    unseen = BatchRecommender(tiny_bundle, k=24)(rows)["item_id"].tolist()
    assert sorted(every) == sorted(str(item) for item in range(24))
    assert unseen == [item for item in every if item not in {"0", "2", "4"}]


def test_an_index_answers_the_same(tiny_bundle, monkeypatch):
    monkeypatch.setattr("recllm.runtime.LISTED", 10)
    exact, searched = (BatchRecommender(tiny_bundle, k=3, index=index)(arrays(ROWS)) for index in ("exact", "int8"))
    assert searched["item_id"].tolist() == exact["item_id"].tolist()
    with pytest.raises(RecllmError, match=r"Unknown index 'hnsw'\. Choices: exact, faiss, int8"):
        BatchRecommender(tiny_bundle, index="hnsw")


class Judge:
    """A ranker that keeps what it was asked."""

    def __init__(self):
        self.ratings, self.catalog = [], [str(item) for item in range(24)]

    def score_lists(self, queries, items):
        self.ratings += [query.ratings for query in queries]
        return [np.arange(len(own), dtype=np.float32) for own in items]


def test_a_ranker_reads_the_ratings(tiny_bundle, monkeypatch):
    judge = Judge()
    monkeypatch.setattr("recllm.distributed.load_ranker", lambda *_, **__: judge)
    answer = BatchRecommender(tiny_bundle, k=2, ranker="judge", rank_top=3)
    rows = {"user_id": ["a", "b"], "history": [[np.int64(1), np.int64(2)], ["0"]], "ratings": [[5, 1.0], pd.NA]}
    found = answer(rows)
    assert judge.ratings == [(5.0, 1.0), None]
    assert f"share_{RANKER_SHARE}" in found


def test_a_user_for_whom_nothing_is_left_is_told(tiny_bundle):
    items = [str(item) for item in range(24)]
    rows = {"user_id": ["a", "b"], "history": [["0"], items]}
    found = BatchRecommender(tiny_bundle, k=2)(rows)
    assert found["user_id"].tolist() == ["a", "a", "b"]
    assert found["rank"].tolist() == [1, 2, 0]
    assert [error is None for error in found["error"]] == [True, True, False]
    assert "every item" in found["error"][2]


@pytest.mark.filterwarnings("default")  # ray's own
def test_on_ray_data(tiny_bundle):
    ray = pytest.importorskip("ray", reason="the extra 'distributed' is not installed")
    ray.init(num_cpus=1, include_dashboard=False, logging_level="ERROR")
    try:
        rows = ray.data.from_items(ROWS).map_batches(
            BatchRecommender, fn_constructor_args=(str(tiny_bundle), 4), batch_size=2, concurrency=1
        )
        found = pl.DataFrame(rows.take_all()).sort("user_id", "rank")
    finally:
        ray.shutdown()
    expected = pl.DataFrame(BatchRecommender(tiny_bundle, k=4)(arrays(ROWS))).sort("user_id", "rank")
    assert found["item_id"].to_list() == expected["item_id"].to_list()

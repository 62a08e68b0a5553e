"""The seam: item index, masks, top-k, ranks and pairs."""

import numpy as np
import pytest

from recllm.data import Query
from recllm.ranking import ItemIndex, batches, mask_seen, score_pairs, target_ranks, top_k

NAN = np.float32(np.nan)


def test_item_index_finds_rows_and_refuses_repeats():
    index = ItemIndex(["a", "b", "c"])
    assert len(index) == 3
    assert "b" in index
    assert "z" not in index
    assert index.rows(["c", "z", "a"]).tolist() == [2, -1, 0]
    assert index.known(["c", "z", "a"]).tolist() == [2, 0]
    with pytest.raises(ValueError, match="occurs twice"):
        ItemIndex(["a", "a"])


def test_batches_cut_all_queries_in_order():
    queries = [Query((str(n),)) for n in range(7)]
    parts = list(batches(queries, 3))
    assert [place for place, _ in parts] == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert [query for _, part in parts for query in part] == queries
    assert list(batches([])) == []


def test_mask_seen_blanks_the_history_and_copies():
    scores = np.ones((2, 3), np.float32)
    masked = mask_seen(scores, [Query(("a", "zz")), Query(())], ItemIndex("abc"))
    assert np.isnan(masked).tolist() == [[True, False, False], [False] * 3]
    assert not np.isnan(scores).any()


def test_top_k_breaks_ties_by_position_and_never_ranks_nan():
    places, best = top_k(np.array([[1, 3, NAN, 3], [NAN, NAN, NAN, 0]], np.float32), 3)
    assert places.tolist() == [[1, 3, 0], [3, -1, -1]]
    assert best[0].tolist() == [3, 3, 1]
    assert np.isnan(best[1]).tolist() == [False, True, True]
    assert top_k(np.ones((1, 2), np.float32), 9)[0].shape == (1, 2)


def test_target_ranks_count_ties_half_and_know_no_place_for_nan():
    scores = np.array([[3, 2, 1, 0], [1, 1, 1, 1], [NAN, NAN, 5, 6], [NAN, 1, 2, 3]], np.float32)
    assert target_ranks(scores, np.array([1, 0, 2, 0])).middle.tolist() == [2.0, 2.5, 2.0, np.inf]


class ByLength:
    """Scores a pair by the history's length and the candidate's place in the alphabet; counts its calls."""

    calls = 0

    def score(self, queries, candidates):
        self.calls += 1
        return np.array([[len(q.history) * 100 + ord(item) for item in candidates.ids] for q in queries], np.float32)


def test_score_pairs_scores_the_queries_of_a_batch_at_once():
    scorer = ByLength()
    queries = [Query(("x",)), Query(()), Query(("x",)), Query(("x",))]
    found = score_pairs(scorer, queries, ["a", "b", "c", "a"])
    assert found.tolist() == [197.0, 98.0, 199.0, 197.0]
    assert found.dtype == np.float32
    assert scorer.calls == 1

"""Recency: weights of a history's events, and the half-life that ranks best on validation."""

from functools import partial

import numpy as np
import pytest

from recllm.data import Query
from recllm.priors import TextSimilarity
from recllm.ranking import ItemIndex
from recllm.recency import choose_half_life, pair_figure, ranking_figure, recency_weights


def test_weights_halve_and_the_last_event_is_whole():
    assert recency_weights(3, 1.0).tolist() == [0.25, 0.5, 1.0]
    assert recency_weights(3, None).tolist() == [1.0, 1.0, 1.0]
    assert recency_weights(0, 2.0).shape == (0,)


def test_where_only_the_last_item_counts_the_shortest_half_life_is_chosen():
    random = np.random.default_rng(0)
    directions = random.normal(size=(10, 16))
    vectors = np.concatenate([directions, directions + 0.01 * random.normal(size=(10, 16))]).astype(np.float32)
    index = ItemIndex(map(str, range(20)))
    # What comes next is the twin of the last item; those before it are noise.
    histories = [[int(item) for item in random.permutation(10)[:6]] for _ in range(40)]
    queries = [Query(tuple(map(str, history))) for history in histories]
    targets = np.array([history[-1] + 10 for history in histories])
    scorer = TextSimilarity(index, vectors)
    figures = choose_half_life(
        scorer, (0.5, 30.0), partial(ranking_figure, queries=queries, targets=targets, index=index)
    )
    assert scorer.half_life == 0.5
    assert figures[0.5] == pytest.approx(1.0)
    assert figures[0.5] > figures[30.0] >= figures[None]


def test_on_a_tie_nothing_fades():
    index = ItemIndex(["a", "b"])
    scorer = TextSimilarity(index, np.eye(2, dtype=np.float32))
    figure = partial(ranking_figure, queries=[Query(("a",))], targets=np.array([1]), index=index)
    assert set(choose_half_life(scorer, (1.0, 2.0), figure)) == {None, 1.0, 2.0}
    assert scorer.half_life is None


def test_pairs_choose_by_auc_of_those_that_are_known():
    index = ItemIndex(["a", "b", "c", "d"])
    vectors = np.eye(4, dtype=np.float32)
    vectors[3] = np.nan
    scorer = TextSimilarity(index, vectors)
    # Liked is what is like the last item; of the third and the fourth pair nothing is known.
    queries = [Query(("a", "a", "b")), Query(("a", "a", "b")), Query(("d",)), Query(())]
    given = {"queries": queries, "items": ["a", "b", "a", "b"]}
    figure = partial(pair_figure, **given, labels=np.array([0.0, 1.0, 1.0, 1.0]))
    assert choose_half_life(scorer, (0.5,), figure) == {None: 0.0, 0.5: 1.0}
    assert scorer.half_life == 0.5
    assert pair_figure(scorer, **given, labels=np.array([1.0, 1.0, 0.0, 0.0])) == -1.0


def test_what_is_bought_again_is_found_where_it_may_be():
    index = ItemIndex(["a", "b"])
    scorer, query = TextSimilarity(index, np.eye(2, dtype=np.float32)), Query(("a",))
    given = {"queries": [query], "targets": np.array([0]), "index": index}
    assert ranking_figure(scorer, **given, exclude_seen=False) == 1.0
    assert ranking_figure(scorer, **given) == 0.0

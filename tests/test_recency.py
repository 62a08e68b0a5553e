"""Recency: weights of a history's events, and the half-life that ranks best on validation."""

import numpy as np
import pytest

from recllm.data import Query
from recllm.priors import TextSimilarity
from recllm.ranking import ItemIndex
from recllm.recency import choose_half_life, recency_weights


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
    figures = choose_half_life(scorer, (0.5, 30.0), queries, targets, index)
    assert scorer.half_life == 0.5
    assert figures[0.5] == pytest.approx(1.0)
    assert figures[0.5] > figures[30.0] >= figures[None]


def test_on_a_tie_nothing_fades():
    index = ItemIndex(["a", "b"])
    scorer = TextSimilarity(index, np.eye(2, dtype=np.float32))
    choose_half_life(scorer, (1.0, 2.0), [Query(("a",))], np.array([1]), index)
    assert scorer.half_life is None

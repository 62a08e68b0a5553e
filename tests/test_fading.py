"""Fading: which validation rows choose a half-life, and when there is none to choose."""

from types import SimpleNamespace

import numpy as np

from recllm.data import Query
from recllm.fading import fade, judges
from recllm.priors import TextSimilarity
from recllm.ranking import ItemIndex
from recllm.splits import Example


def run_of(half_lives=(0.5,), queries=100):
    return SimpleNamespace(seed=0, recency=SimpleNamespace(half_lives=half_lives, queries=queries))


def rows(*labels):
    return [Example(Query(("a", "a", "b", "c")), "b" if label else "a", label) for label in labels]


def test_a_scorer_is_asked_about_what_it_reads_and_fades_as_labels_say():
    scorer = TextSimilarity(ItemIndex(["a", "b", "c"]), np.eye(3, dtype=np.float32))
    figure = judges(run_of(), rows(1.0, 0.0, 1.0), lambda query: Query(query.history[:3]))
    assert fade(run_of(), scorer, figure) == {None: 0.0, 0.5: 1.0}
    assert scorer.half_life == 0.5


def test_where_nothing_can_choose_nothing_fades():
    scorer = TextSimilarity(ItemIndex(["a", "b", "c"]), np.eye(3, dtype=np.float32))
    assert judges(run_of(), rows(1.0, 1.0), lambda query: query) is None
    assert fade(run_of(), scorer, None) == {}
    assert fade(run_of(half_lives=()), scorer, judges(run_of(), rows(1.0, 0.0), lambda query: query)) == {}
    assert scorer.half_life is None


def test_of_many_rows_a_part_chooses_the_same_one_every_time():
    many = [Example(Query((str(row),)), "b", float(row % 2)) for row in range(50)]
    one, other = (judges(run_of(queries=10), many, lambda query: query).keywords for _ in range(2))
    assert len(one["queries"]) == len(one["items"]) == len(one["labels"]) == 10
    assert one["queries"] == other["queries"]

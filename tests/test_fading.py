"""Fading: which validation rows choose a half-life, and when there is none to choose."""

from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest

from recllm.collaborative import HALF_LIVES, collaborative
from recllm.data import Interactions, Query
from recllm.fading import fade, faded_popularity, judges
from recllm.files import read_json
from recllm.priors import Popularity, TextSimilarity
from recllm.ranking import ItemIndex
from recllm.runs import Run
from recllm.splits import Example
from recllm.tasks import prepare


def run_of(half_lives=(0.5,), queries=100, days=(), task="next_item", as_of=True):
    recency = SimpleNamespace(half_lives=half_lives, queries=queries, popularity_days=days, as_of=as_of)
    return SimpleNamespace(seed=0, recency=recency, model=SimpleNamespace(task=task))


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


@pytest.fixture
def fashion():
    """A task whose forty items come into fashion one after the other, a day each; the latest are asked for."""
    days = np.repeat(np.arange(40), 5)
    columns = {
        "user_id": [f"u{row}" for row in range(200)],
        "item_id": [f"i{day}" for day in days],
        "rating": None,
        "timestamp": days * 86_400,
        "seq": 0,
    }
    kinds = {"rating": pl.Float32, "timestamp": pl.Int64, "seq": pl.Int32}
    valid = [Example(Query(()), f"i{day}") for day in range(30, 40)]
    index = ItemIndex([f"i{day}" for day in range(40)])
    split = SimpleNamespace(train=Interactions(pl.DataFrame(columns, schema_overrides=kinds)), valid=valid)
    return SimpleNamespace(split=split, index=index, repeats=False)


def test_popularity_fades_as_ranks_best_on_validation(fashion):
    run = run_of(days=(3.0, 1000.0))
    popularity, figures = faded_popularity(run, fashion)
    assert list(figures) == [None, 3.0, 1000.0]
    assert figures[3.0] == figures[1000.0] > 2 * figures[None]  # any fading ranks them by day; the first is taken
    train = fashion.split.train
    expected = Popularity.fit(train, fashion.index.ids, half_life_days=3.0, as_of=True)
    assert np.array_equal(popularity.values, expected.values)


def test_popularity_is_as_of_when_the_rows_are_asked_unless_it_shall_not(fashion):
    # Each of the forty items asked for on the day after its own: as of then it leads, as of the end it does not.
    days = range(1, 41)
    fashion.split.valid = [Example(Query((), at=day * 86_400), f"i{day - 1}") for day in days]
    popularity, figures = faded_popularity(run_of(days=(3.0,)), fashion)
    assert figures[3.0] == 1.0 > figures[None]
    queries = [row.query for row in fashion.split.valid]
    assert (popularity.score(queries, fashion.index).argmax(1) == np.arange(40)).all()
    popularity, figures = faded_popularity(run_of(days=(3.0,), as_of=False), fashion)
    assert figures[3.0] < 0.2
    assert popularity.counts is None


def test_popularity_without_times_or_choices_counts_all_events_alike(fashion):
    train = fashion.split.train
    plain = Popularity.fit(train, fashion.index.ids).values
    without = train.frame.with_columns(timestamp=pl.when(pl.col("user_id") != "u7").then("timestamp"))
    untimed = SimpleNamespace(
        split=SimpleNamespace(train=Interactions(without), valid=fashion.split.valid),
        index=fashion.index,
        repeats=False,
    )
    judging = run_of(days=(3.0,), task="relevance")
    for run, task in ((run_of(days=(3.0,)), untimed), (run_of(), fashion), (judging, fashion)):
        popularity, figures = faded_popularity(run, task)
        assert (popularity.values.tolist(), figures) == (plain.tolist(), {})


def test_a_run_keeps_the_popularity_that_it_has_chosen(tmp_path, tiny_encoder_folder):
    early = [(f"e{user}", str((user + event) % 10), event) for user in range(60) for event in range(3)]
    late = [(f"l{user}", str(20 + (user + 3 * event) % 10), 300 + event) for user in range(20) for event in range(6)]
    frame = pl.DataFrame([*early, *late], schema=["user_id", "item_id", "timestamp"], orient="row")
    frame.with_columns(pl.col("timestamp") * 86_400).write_csv(tmp_path / "interactions.csv")
    pl.DataFrame({"item_id": map(str, range(30)), "title": [f"Film {item}" for item in range(30)]}).write_csv(
        tmp_path / "items.csv"
    )
    values = {
        "name": "fashion",
        "output": str(tmp_path / "runs"),
        "data": {"name": str(tmp_path)},
        "model": {"name": "none", "item_encoder": str(tiny_encoder_folder)},
        "cf": {"factors": 4, "iterations": 3},
    }
    run = Run.model_validate(values)
    task = prepare(run)
    kept = collaborative(run, task, lambda _: None).popularity
    figures = read_json(run.folder / "cf" / HALF_LIVES)["popularity"]
    assert list(figures) == ["None", "3.0", "10.0", "30.0", "100.0", "300.0"]
    best = max(figures, key=figures.__getitem__)
    assert figures[best] > 2 * figures["None"]
    chosen = Popularity.fit(task.split.train, task.index.ids, half_life_days=float(best), as_of=True)
    assert np.array_equal(kept.values, chosen.values)
    queries = [task.split.test[0].query, Query((), at=2 * 86_400)]
    assert np.array_equal(kept.score(queries, task.index), chosen.score(queries, task.index))
    late, early = kept.score(queries, task.index)
    assert late.argmax() >= 20 > early.argmax()  # the items of the late users have no event yet

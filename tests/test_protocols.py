"""Protocols: the whole catalogue or labelled pairs, chosen by what the language model is trained for."""

from dataclasses import replace

import numpy as np
import pytest

from recllm.data import Query
from recllm.priors import ItemMean, Popularity
from recllm.protocols import LabelledPairs, WholeCatalogue, evaluation_protocol
from recllm.ranking import ItemIndex
from recllm.runs import Run
from recllm.splits import Example, leave_last_out
from recllm.tasks import Task


@pytest.fixture(scope="module")
def task(rated_checkerboard):
    dataset = rated_checkerboard
    return Task(dataset, leave_last_out(dataset.interactions), ItemIndex(dataset.catalog.ids))


def made(task, kind):
    return evaluation_protocol(Run.model_validate({"name": "r", "data": {"name": "d"}, "model": {"task": kind}}), task)


def test_the_task_of_the_model_chooses(task):
    assert isinstance(made(task, "next_item"), WholeCatalogue)
    assert isinstance(made(task, "relevance"), LabelledPairs)


@pytest.mark.parametrize(("kind", "metric"), [("next_item", "NDCG@10"), ("relevance", "AUC")])
def test_a_scorer_is_scored_fused_and_measured(task, kind, metric):
    protocol = made(task, kind)
    valid, test = protocol.examples("valid"), protocol.examples("test")
    scorers = {
        "popularity": Popularity.fit(task.split.train, task.index.ids),
        "item_mean": ItemMean.fit(task.split.train),
    }
    known = {name: protocol.score(scorer, valid) for name, scorer in scorers.items()}
    fusion = protocol.fit(known, valid)
    later = {name: protocol.score(scorer, test) for name, scorer in scorers.items()}
    fused = protocol.fuse(fusion, later, test)
    assert fused.shape == later["popularity"].shape == ((40, 24) if kind == "next_item" else (80,))
    assert fused.dtype == np.float32
    table = protocol.table(later | {"fusion": fused}, test, (10,))
    assert metric in table.metrics
    assert table.counts["all"] == (len(test), 40)


def test_a_pair_has_the_score_of_its_cell(task):
    whole, pairs, scorer = made(task, "next_item"), made(task, "relevance"), ItemMean.fit(task.split.train)
    rows = pairs.examples("test")
    matrix = whole.score(scorer, rows)
    cells = matrix[np.arange(len(rows)), task.index.rows(row.item_id for row in rows)]
    assert np.array_equal(pairs.score(scorer, rows), cells)


def test_positives_are_the_liked_events_where_pairs_are_judged(task):
    assert made(task, "next_item").positives() is task.split.train
    liked = made(task, "relevance").positives().frame["rating"]
    assert liked.min() == 5.0
    assert len(liked) < len(task.split.train)


def test_rows_of_new_users_are_measured_apart(task):
    rows = [
        Example(Query(("1",), user), item, label) for user in ("u1", "new") for item, label in (("3", 1.0), ("4", 0.0))
    ]
    protocol = made(Task(task.dataset, replace(task.split, test=rows), task.index), "relevance")
    table = protocol.table({"flat": np.zeros(4, np.float32)}, rows, (10,))
    assert table.counts == {"all": (4, 2), "warm": (2, 1), "cold user": (2, 1)}


def test_seen_items_do_not_count_when_the_catalogue_is_ranked(task):
    protocol, rows = made(task, "next_item"), task.split.valid
    # Seen items score best, then the target: it ranks first, for seen items are not ranked.
    scores = np.zeros((len(rows), len(task.index)), np.float32)
    for row, example in enumerate(rows):
        scores[row, task.index.rows(example.query.history)] = 2.0
        scores[row, task.index.rows([example.item_id])] = 1.0
    assert protocol.table({"made": scores}, rows, (10,)).interval("made", "MRR")[0] == 1.0
    again = made(replace(task, repeats=True), "next_item").table({"made": scores}, rows, (10,))
    assert again.per_row["made"]["rank"].tolist() == [1 + len(row.query.history) for row in rows]
    assert protocol.fit({"made": scores}, rows).candidates["only made"] == 1.0


def test_a_target_that_the_history_has_is_not_fitted_on(task):
    protocol = made(task, "next_item")
    rows = [Example(Query(("1", "3"), "u"), "3"), Example(Query(("1",), "u"), "3")]
    assert protocol._targets(rows, protocol._seen(rows)).tolist() == [-1, task.index.rows(["3"])[0]]


def test_cold_users_are_those_that_training_has_not_seen(task):
    users = [*task.split.train.frame["user_id"].unique(maintain_order=True)[:2], "new"]
    rows = [Example(Query(("1",), user), item, label) for user in users for item, label in (("3", 1.0), ("4", 0.0))]
    table = made(task, "relevance").table({"flat": np.zeros(6, np.float32)}, rows, (10,))
    assert table.counts == {"all": (6, 3), "warm": (4, 2), "cold user": (2, 1)}

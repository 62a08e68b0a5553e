"""Labelled pairs: labels by rating, sampled negatives, the same rows for the same seed."""

from dataclasses import replace

import polars as pl
import pytest

from recllm.data import Interactions, Query
from recllm.errors import RecllmError
from recllm.pairs import Made, Negatives, labelled_rows, training_blocks
from recllm.ranking import ItemIndex
from recllm.splits import Example, Split, leave_last_out
from recllm.tasks import Task


def task_of(dataset, split=None):
    return Task(dataset, split or leave_last_out(dataset.interactions), ItemIndex(dataset.catalog.ids))


def rows_of(task, **changed):
    keys = {"items": task.index, "like_at": 4.0, "max_history": 3, "limit": 1000, "epochs": 1, "seed": 0} | changed
    return training_blocks(task, **keys).each


@pytest.fixture(scope="module")
def rated(rated_checkerboard):
    return task_of(rated_checkerboard)


@pytest.fixture(scope="module")
def bare(checkerboard):
    frame = checkerboard.interactions.frame.with_columns(rating=pl.lit(None, pl.Float32))
    return task_of(replace(checkerboard, interactions=Interactions(frame)))


def test_a_made_sequence_is_a_sequence():
    made = Made(4, lambda row: row * row)
    assert list(made) == [0, 1, 4, 9]
    assert made[-1] == 9
    assert made[1:3] == [1, 4]
    with pytest.raises(IndexError):
        made[4]


def test_with_ratings_every_event_after_the_first_is_a_row(rated):
    rows = rows_of(rated)
    histories = rated.split.train.histories()
    assert len(rows) == len(rated.split.train) - len(histories)
    assert {row.label for row in rows} == {0.0, 1.0}
    for row in rows:
        whole = histories[row.query.user_id]
        place = whole.history.index(row.item_id)
        assert row.query.history == whole.history[max(0, place - 3) : place]
        assert row.query.ratings == whole.ratings[max(0, place - 3) : place]
        assert row.label == float(whole.ratings[place] >= 4)


def test_zero_and_one_are_labels_whatever_like_at(rated_checkerboard):
    frame = rated_checkerboard.interactions.frame.with_columns(rating=(pl.col("rating") > 3).cast(pl.Float32))
    task = task_of(replace(rated_checkerboard, interactions=Interactions(frame)))
    assert {row.label for row in rows_of(task)} == {0.0, 1.0}


def test_rows_are_a_pure_function_of_seed_and_epoch(rated, bare):
    for task in (rated, bare):
        two = rows_of(task, epochs=2, limit=40)
        assert list(two) == list(rows_of(task, epochs=2, limit=40))
        assert list(two[:40]) == list(rows_of(task, limit=40))
        assert len(two) == 80
        assert list(two[:40]) != list(two[40:])
        assert list(rows_of(task, limit=40, seed=1)) != list(two[:40])


def test_without_ratings_a_positive_is_followed_by_an_item_the_user_has_not(bare):
    rows = rows_of(bare)
    histories = bare.split.train.histories()
    sampled = set()
    for positive, negative in zip(rows[::2], rows[1::2], strict=True):
        assert (positive.label, negative.label) == (1.0, 0.0)
        assert positive.query == negative.query
        own = histories[positive.query.user_id].history
        assert positive.item_id in own
        assert negative.item_id not in own
        sampled.add(negative.item_id)
    assert len(sampled) == 24


def test_another_epoch_samples_other_negatives(bare):
    rows = rows_of(bare, epochs=2)
    half = len(rows) // 2
    pairs = [{rows[place]: rows[place + 1].item_id for place in range(start, start + half, 2)} for start in (0, half)]
    assert pairs[0].keys() == pairs[1].keys()
    assert pairs[0] != pairs[1]


def test_only_items_that_can_be_written_are_candidates(rated, bare):
    for task in (rated, bare):
        rows = rows_of(task, items={"0", "1", "2", "3", "4", "5", "6"})
        assert rows
        assert all(int(row.item_id) < 7 for row in rows)


def test_what_is_alike_stands_together(rated, bare):
    for task, rows_of_an_event in ((rated, 1), (bare, 2)):
        keys = {"items": task.index, "like_at": 4.0, "max_history": 4, "limit": 1000, "epochs": 2, "seed": 0}
        blocks = training_blocks(task, **keys, block=3, stride=2, alike=lambda query: (query.user_id, query.history[0]))
        assert list(blocks.sizes) == [len(block) for block in blocks]
        assert max(blocks.sizes) == 3 * rows_of_an_event
        for block in blocks:
            assert len({(row.query.user_id, row.query.history[0]) for row in block}) == 1
        assert list(blocks.each) == [row for block in blocks for row in block]
        alone = rows_of(task, max_history=4, epochs=2)
        assert len(blocks.each) == len(alone)
        # Only the histories are longer or shorter: they begin at every second event.
        assert {(row.query.user_id, row.item_id) for row in blocks.each} >= {
            (row.query.user_id, row.item_id) for row in alone if row.label
        }
        assert {len(row.query.history) for row in blocks.each} == {1, 2, 3, 4}


def test_there_are_blocks_enough_for_the_steps(bare):
    keys = {"items": bare.index, "like_at": 4.0, "max_history": 4, "limit": 1000, "epochs": 1, "seed": 0, "block": 3}
    once = training_blocks(bare, **keys)
    more = training_blocks(bare, **keys, blocks_at_least=len(once) + 1)
    assert len(more) == 2 * len(once)
    assert list(more[: len(once)]) == list(once)
    assert list(more[len(once) :]) != list(once)
    scattered = training_blocks(bare, **keys, scattered=True)
    assert sorted(scattered.sizes) == sorted(once.sizes)
    assert list(scattered) != list(once)
    assert sorted(map(hash, map(tuple, scattered))) == sorted(map(hash, map(tuple, once)))


def test_given_rows_keep_their_histories(rated):
    given = [
        Example(Query(("1", "2"), "u0"), "3", 1.0),
        Example(Query((), "u0"), "4", 1.0),
        Example(Query(("5",), "u1"), "6", 0.0),
    ]
    task = task_of(rated.dataset, replace(rated.split, train_rows=given))
    assert sorted(rows_of(task), key=lambda row: row.item_id) == [given[0], given[2]]


def test_nothing_to_train_on_says_so(rated):
    with pytest.raises(RecllmError, match="Relevance needs training events with a history whose item has text"):
        rows_of(rated, items=set())


def test_positives_alone_get_a_negative_each(rated):
    rows = labelled_rows(rated, "test", 0)
    events = rated.dataset.interactions.histories()
    assert [row.label for row in rows] == [1.0, 0.0] * 40
    assert all((row.item_id in events[row.query.user_id].history) == bool(row.label) for row in rows)
    assert rows == labelled_rows(rated, "test", 0) != labelled_rows(rated, "test", 1)


def test_labelled_rows_stay_as_they_are_but_for_when_they_are_asked(rated):
    rows = [Example(Query(("1",), "u1"), "2", label) for label in (1.0, None, 0.0)]
    timed = [replace(row, query=replace(row.query, at=at)) for at, row in enumerate(rows)]
    split = Split("made", rated.split.train, timed, timed)
    assert labelled_rows(task_of(rated.dataset, split), "valid", 0) == [rows[0], rows[2]]


def test_a_cold_target_has_a_cold_negative(rated):
    split = replace(rated.split, cold_items=frozenset({"0", "1", "2", "3"}))
    task = task_of(rated.dataset, split)
    negatives = Negatives(task, {}, task.index)
    row = Example(Query(("7", "9")), "1", 1.0)
    assert {negatives.pair(row, (0, key))[1].item_id for key in range(60)} == {"0", "2", "3"}


def test_a_user_with_every_item_is_named(rated):
    negatives = Negatives(rated, {"all": Query(rated.index.ids)}, rated.index)
    with pytest.raises(RecllmError, match="User 'all' has an event with every item: there is no negative to sample"):
        negatives.pair(Example(Query(("1",), "all"), "2"), (0, 0))


def test_users_with_every_item_are_left_out(bare):
    frame = bare.dataset.interactions.frame
    everything = pl.DataFrame({"user_id": "all", "item_id": list(bare.index.ids)}).with_columns(
        rating=pl.lit(None, pl.Float32), timestamp=pl.lit(None, pl.Int64), seq=pl.int_range(pl.len(), dtype=pl.Int32)
    )
    more = replace(bare.dataset, interactions=Interactions(pl.concat([frame, everything.select(frame.columns)])))
    train = Interactions(pl.concat([bare.split.train.frame, everything.select(frame.columns)]))
    asked = Example(Query(bare.index.ids[:-1], "all"), bare.index.ids[-1], None)
    task = task_of(more, replace(bare.split, train=train, valid=[*bare.split.valid, asked]))
    lines = []
    rows = rows_of(task, say=lines.append)
    assert {row.query.user_id for row in rows} == {row.query.user_id for row in rows_of(bare)}
    assert len(rows) == len(rows_of(bare))
    (line,) = lines
    assert "1 users have an event with every item, such as 'all'" in line
    assert "23 of " in line
    assert [row.query.user_id for row in labelled_rows(task, "valid", 0)].count("all") == 0
    lone = replace(bare.split, train=Interactions(everything.select(frame.columns)))
    with pytest.raises(RecllmError, match=r"Every user, such as 'all', has an event with every item"):
        rows_of(task_of(more, lone))


def test_validation_means_what_test_does(rated):
    likes = [Example(Query(("1",), "u1"), item, 1.0) for item in ("2", "3")]
    both = [*likes, Example(Query(("1",), "u1"), "4", 0.0)]
    split = replace(rated.split, valid=likes, test=both)
    with pytest.raises(RecllmError, match="No validation row is a dislike, and some test rows are"):
        labelled_rows(task_of(rated.dataset, split), "valid", 0)
    split = replace(rated.split, valid=both, test=likes)
    assert labelled_rows(task_of(rated.dataset, split), "test", 0) == likes  # no sampled negatives among real ones


def test_the_last_free_item_is_found(rated):
    negatives = Negatives(rated, {"most": Query(rated.index.ids[1:])}, rated.index)
    found = {negatives.pair(Example(Query(("1",), "most"), "2"), (0, key))[1].item_id for key in range(5)}
    assert found == {rated.index.ids[0]}


@pytest.mark.parametrize("part", ["valid", "test"])
def test_a_measured_negative_is_nowhere_in_what_the_user_has_by_then(rated, part):
    split, whole = rated.split, rated.dataset.interactions.histories()
    known = {row.query.user_id: {*row.query.history, row.item_id} for row in split.valid}
    known |= {user: set(query.history) for user, query in whole.items()} if part == "test" else {}
    liked = {part: [replace(row, label=1.0) for row in getattr(split, part)] for part in ("valid", "test")}
    task = replace(rated, split=replace(split, **liked))
    for seed in range(5):
        rows = labelled_rows(task, part, seed)
        assert [row.label for row in rows] == [1.0, 0.0] * (len(rows) // 2)
        assert not [row for row in rows[1::2] if row.item_id in known[row.query.user_id]]


def test_validation_negatives_know_nothing_of_test(bare):
    """What is chosen on them would else be chosen by who is asked for later."""
    user = bare.split.valid[0].query.user_id
    tests = [replace(row, item_id=None) if row.query.user_id == user else row for row in bare.split.test]
    place = next(place for place, row in enumerate(tests) if row.item_id is None)
    items = [item for item in bare.index.ids if item not in {*tests[place].query.history}]

    def negatives(item):
        tests[place] = replace(tests[place], item_id=item)
        asked = bare.split.test[place].item_id
        events = bare.dataset.interactions.frame.with_columns(
            item_id=pl.when((pl.col("user_id") == user) & (pl.col("item_id") == asked))
            .then(pl.lit(item))
            .otherwise("item_id")
        )
        dataset = replace(bare.dataset, interactions=Interactions(events))
        task = replace(bare, dataset=dataset, split=replace(bare.split, test=list(tests)))
        return [labelled_rows(task, "valid", seed)[1].item_id for seed in range(150)]

    first = negatives(items[0])
    assert first == negatives(items[1])
    assert set(first) == set(items)


def test_liked_is_by_the_scale_of_the_whole_log(rated_checkerboard):
    """What is left to learn from may have zeros and ones only, where test has fives: the labels of the split know."""
    frame = rated_checkerboard.interactions.frame.with_columns(rating=pl.lit(1.0, pl.Float32))
    last = pl.col("seq") == pl.col("seq").max().over("user_id")
    frame = frame.with_columns(rating=pl.when(last).then(5.0).otherwise("rating").cast(pl.Float32))
    task = task_of(replace(rated_checkerboard, interactions=Interactions(frame)))
    assert task.split.train.frame["rating"].unique().to_list() == [1.0]
    assert {row.label for row in task.split.valid} == {0.0}
    assert task.liked_from(4.0) == 4.0
    assert {row.label for row in rows_of(task)} == {0.0}
    given = replace(task, split=replace(task.split, name="given"))
    assert given.liked_from(4.0) == 1.0  # its histories have a scale of their own


def test_training_negatives_know_nothing_of_what_is_measured(bare):
    """Else the items that are never negatives would be the ones asked for."""
    held = {(row.query.user_id, row.item_id) for row in (*bare.split.valid, *bare.split.test)}
    drawn = {(row.query.user_id, row.item_id) for row in rows_of(bare, epochs=40, limit=100_000)[1::2]}
    assert drawn & held

from dataclasses import replace

import polars as pl
import pytest

from recllm.data import Interactions, Query
from recllm.errors import RecllmError
from recllm.splits import Example, Split, check_no_leak, cold_items, leave_last_out, liked_part, sampled, temporal


def made(events):
    """Interactions of (user, item, rating, timestamp) rows, which stand in order."""
    frame = pl.DataFrame(
        events,
        schema={"user_id": pl.String, "item_id": pl.String, "rating": pl.Float32, "timestamp": pl.Int64},
        orient="row",
    )
    return Interactions(frame.with_columns(seq=pl.int_range(pl.len(), dtype=pl.Int32).over("user_id")))


def grid(users=10, items=8):
    """Every user goes through the items from another start; one event a second over all."""
    rows = [
        (f"u{u}", f"i{(u + n) % items}", float(1 + (u + n) % 5), 100 * n + u)
        for u in range(users)
        for n in range(items)
    ]
    return made(rows)


def pairs(interactions):
    return set(interactions.frame.select("user_id", "item_id").iter_rows())


def asked(examples):
    return {(example.query.user_id, example.item_id) for example in examples}


def test_leave_last_out_by_construction():
    events = made(
        [("a", "w", 5, 1), ("a", "x", 3, 2), ("a", "y", 4, 3), ("a", "z", 2, 4), ("b", "w", 1, 1), ("b", "z", 1, 2)]
    )
    split = leave_last_out(events)
    (valid,), (test,) = split.valid, split.test
    assert (valid.query.history, valid.item_id, valid.label) == (("w", "x"), "y", 1.0)
    assert (test.query.history, test.item_id, test.label) == (("w", "x", "y"), "z", 0.0)
    assert test.query.user_id == "a"
    assert test.query.ratings == (5.0, 3.0, 4.0)
    assert pairs(split.train) == {("a", "w"), ("a", "x"), ("b", "w"), ("b", "z")}
    check_no_leak(split)


def test_leave_last_out_parts_are_the_whole():
    events = grid()
    split = leave_last_out(events)
    assert len(split.train) + len(split.valid) + len(split.test) == len(events)
    assert [example.query.user_id for example in split.test] == events.users()


def test_labels():
    def labels(ratings, like_at=4.0):
        rows = [("a", f"i{n}", rating, n) for n, rating in enumerate(ratings)]
        split = leave_last_out(made(rows), like_at=like_at)
        return [split.valid[0].label, split.test[0].label]

    assert labels([1, 5, 4, 3.5]) == [1.0, 0.0]
    assert labels([1, 5, 4, 3.5], like_at=3.5) == [1.0, 1.0]
    assert labels([0, 1, 1, 0]) == [1.0, 0.0]
    assert labels([None, None, None, None]) == [None, None]
    assert labels([5, 5, None, 5]) == [None, 1.0]


def test_leave_last_out_errors():
    with pytest.raises(RecllmError, match="at least 3"):
        leave_last_out(grid(), min_events=2)
    with pytest.raises(RecllmError, match=r"lower data\.min_events to 3"):
        leave_last_out(grid(), min_events=9)


def test_temporal_sees_nothing_after_the_cut():
    events = grid()
    split = temporal(events, (0.5, 0.25, 0.25))
    first, second = split.cuts
    when = {(user, item): at for user, item, _, at, _ in events.frame.iter_rows()}
    assert split.train.frame["timestamp"].max() < first
    for examples, start, end in ((split.valid, first, second), (split.test, second, 10**9)):
        assert examples
        for example in examples:
            assert start <= when[example.query.user_id, example.item_id] < end
            before = [(at, item) for (user, item), at in when.items() if user == example.query.user_id and at < start]
            assert example.query.history == tuple(item for _, item in sorted(before))
    assert len(split.train) + len(split.valid) + len(split.test) == len(events)
    check_no_leak(split)


def test_temporal_keeps_one_second_on_one_side():
    events = made([(f"u{n}", "i", None, second) for n, second in enumerate([1, 1, 2, 2, 2, 2, 3, 3, 4, 4])])
    split = temporal(events, (0.4, 0.3, 0.3))  # the cut falls into the second 2
    assert split.train.frame["timestamp"].to_list() == [1, 1]
    assert split.cuts == (2, 3)
    assert len(split.valid) == 4


def test_temporal_user_who_was_not_there_has_an_empty_history():
    rows = [("a", f"i{n}", None, n) for n in range(9)] + [("new", "i0", None, 99)]
    split = temporal(made(rows), (0.6, 0.2, 0.2))
    last = split.test[-1]
    assert (last.query.user_id, last.query.history) == ("new", ())


def test_rows_are_asked_when_their_events_happen_and_at_the_cut_of_a_cut_in_time():
    events = grid()
    when = {(user, item): at for user, item, _, at, _ in events.frame.iter_rows()}
    whole, cold = leave_last_out(events), cold_items(events, share=0.3)
    for example in (*whole.valid, *whole.test, *cold.valid, *cold.test):
        assert example.query.at == when[example.query.user_id, example.item_id]
    cut = temporal(events)
    assert {example.query.at for example in cut.valid} == {cut.cuts[0]}
    assert {example.query.at for example in cut.test} == {cut.cuts[1]}
    known = {example.query for example in (*cut.valid, *temporal(events, (0.2, 0.4, 0.4)).test)}
    assert len({(query.user_id, query.at) for query in known}) == len(known)  # a user's rows share one query
    bare = made([("a", f"i{n}", None, None) for n in range(5)])
    assert leave_last_out(bare).test[0].query.at is None


def test_temporal_examples_stand_in_time():
    events = grid()
    when = {(user, item): at for user, item, _, at, _ in events.frame.iter_rows()}
    times = [when[example.query.user_id, example.item_id] for example in temporal(events).test]
    assert times == sorted(times)


def test_temporal_errors():
    with pytest.raises(RecllmError, match="time stamp for every event"):
        temporal(made([("a", "x", None, None)]))
    with pytest.raises(RecllmError, match="add up to 1"):
        temporal(grid(), (0.8, 0.1, 0.2))
    with pytest.raises(RecllmError, match="share one second"):
        temporal(made([("a", f"i{n}", None, 7) for n in range(20)]))


def test_cold_items_are_nowhere_but_in_test():
    events = grid()
    split = cold_items(events, share=0.25, seed=3)
    assert len(split.cold_items) == 2
    assert not split.cold_items & set(split.train.item_counts())
    assert {example.item_id for example in split.test} == split.cold_items
    assert asked(split.test) == {pair for pair in pairs(events) if pair[1] in split.cold_items}
    histories = events.histories()
    for example in split.test:
        whole = histories[example.query.user_id].history
        before = whole[: whole.index(example.item_id)]
        assert example.query.history == tuple(item for item in before if item not in split.cold_items)
    for example in split.valid:
        warm = tuple(i for i in histories[example.query.user_id].history if i not in split.cold_items)
        assert (example.query.history, example.item_id) == (warm[:-1], warm[-1])
    assert len(split.valid) == 10
    assert len(split.train) + len(split.valid) + len(split.test) == len(events)
    check_no_leak(split)


def test_the_first_events_of_cold_items_are_given_back():
    events = grid()
    none, some = cold_items(events, share=0.25, seed=3), cold_items(events, share=0.25, seed=3, given_back=3)
    assert some.cold_items == none.cold_items
    times = {(user, item): time for user, item, time in events.frame.select("user_id", "item_id", "timestamp").rows()}
    for item in some.cold_items:
        learnt = [times[pair] for pair in pairs(some.train) if pair[1] == item]
        tested = [times[pair] for pair in asked(some.test) if pair[1] == item]
        assert len(learnt) == 3
        assert len(tested) == 7
        assert max(learnt) < min(tested)
    assert pairs(some.train) - pairs(none.train) == asked(none.test) - asked(some.test)
    assert some.valid == none.valid
    check_no_leak(some)
    with pytest.raises(RecllmError, match="Leak: the cold item"):
        check_no_leak(replace(some, given_back=2))


def test_rows_are_sampled_by_the_seed_and_stay_in_order():
    rows = cold_items(grid(), share=0.25, seed=3).test
    some = sampled(rows, 7, seed=1)
    assert len(some) == 7
    assert some == sampled(rows, 7, seed=1) != sampled(rows, 7, seed=2)
    places = [rows.index(row) for row in some]
    assert places == sorted(places)
    assert sampled(rows, 100, seed=1) is rows


def test_cold_items_follow_the_seed_only():
    events = grid()
    back = Interactions(events.frame.sort("user_id", descending=True, maintain_order=True))
    assert cold_items(events, 0.25, seed=1).cold_items == cold_items(back, 0.25, seed=1).cold_items
    assert len({cold_items(events, 0.25, seed=seed).cold_items for seed in range(8)}) > 1


def test_cold_items_errors():
    with pytest.raises(RecllmError, match="between 0 and 1"):
        cold_items(grid(), share=1.0)
    with pytest.raises(RecllmError, match="lower share"):
        cold_items(grid(), share=0.99)


def with_train(split, row):
    row = pl.DataFrame([row], schema=split.train.frame.schema, orient="row")
    train = Interactions(pl.concat([split.train.frame, row]))
    return Split(split.name, train, split.valid, split.test, split.cold_items, split.cuts)


@pytest.mark.parametrize("part", ["valid", "test"])
def test_leaked_event_is_found(part):
    split = leave_last_out(grid())
    example = getattr(split, part)[4]
    leaked = with_train(split, (example.query.user_id, example.item_id, 1.0, 0, 99))
    with pytest.raises(RecllmError, match=f"user '{example.query.user_id}' with item '{example.item_id}'"):
        check_no_leak(leaked)


def test_return_to_an_item_is_no_leak():
    events = made([("a", "x", None, 1), ("a", "y", None, 2), ("a", "z", None, 3), ("a", "x", None, 4)])
    split = leave_last_out(events)
    check_no_leak(split)
    with pytest.raises(RecllmError, match="Leak"):
        check_no_leak(with_train(split, ("a", "x", None, 4, 3)))


def test_late_train_event_is_found():
    split = temporal(grid())
    with pytest.raises(RecllmError, match=r"user 'late' with item 'i0'.*not before the cut"):
        check_no_leak(with_train(split, ("late", "i0", 1.0, split.cuts[0], 0)))


def test_cold_item_in_train_or_history_is_found():
    split = cold_items(grid(), 0.25)
    cold = sorted(split.cold_items)[0]
    with pytest.raises(RecllmError, match=f"cold item '{cold}' is in train"):
        check_no_leak(with_train(split, ("nobody", cold, 1.0, 0, 0)))
    seen = split.test[-1].query.history[0]
    dirty = Split(
        split.name, Interactions(split.train.frame.filter(pl.col("item_id") != seen)), [], split.test, frozenset({seen})
    )
    with pytest.raises(RecllmError, match=f"cold item '{seen}' is in a history"):
        check_no_leak(dirty)


def test_the_shares_of_a_temporal_split_are_those_asked_for():
    split = temporal(made([("a", f"i{n}", None, n) for n in range(100)]), (0.5, 0.4, 0.1))
    assert split.cuts == (50, 90)
    ten = temporal(made([("a", f"i{n}", None, n) for n in range(10)]), (0.7, 0.1, 0.2))
    assert ten.cuts == (7, 8)  # though .7 + .1 is less than .8


def by_user(rows):
    return made(sorted(rows, key=lambda row: (row[0], row[3])))


def test_users_who_come_back_to_an_item_do_not_leak():
    rows = [(f"u{u}", f"i{i}", None, 10 * u + i + later) for later in (0, 1000) for u in range(6) for i in range(6)]
    split = cold_items(by_user(rows), share=0.3, seed=0, given_back=2)
    assert split.cold_items
    check_no_leak(split)


def test_the_least_number_of_events_is_enough():
    rows = [(f"u{u}", f"i{i}", None, 10 * u + i) for u in range(6) for i in range(5)]
    split = cold_items(by_user(rows), share=0.2, seed=0, min_events=4)  # one of five items is cold: four are left
    assert len(split.cold_items) == 1
    assert len(split.valid) == 6


def test_a_cold_item_in_a_validation_history_is_a_leak():
    valid = [Example(Query(("c",), "a"), "y")]
    with pytest.raises(RecllmError, match="is in a history"):
        check_no_leak(Split("cold-items", made([("a", "x", None, 1)]), valid, [], frozenset({"c"})))


def test_the_liked_part_of_a_history_has_what_nobody_has_rated():
    query = Query(("a", "b", "c", "d"), "u", (5.0, None, 1.0, 4.0))
    assert liked_part(query, 4.0) == Query(("a", "b", "d"), "u", (5.0, None, 4.0))
    unrated = Query(("a", "b"), "u")
    assert liked_part(unrated, 4.0) == unrated

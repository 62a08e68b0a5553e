"""Training windows are a pure function of the seed, of like length together, and taught ones come in whole batches."""

import numpy as np
import pytest

from recllm.windows import Taught, Windows, with_taught

SEQUENCES = [np.arange(count) + 100 * count for count in (0, 1, 2, 5, 9, 30)]


def test_windows_are_a_pure_function_of_seed_and_epoch():
    def epoch(seed, number):
        return [window.tolist() for window in Windows(SEQUENCES, 4, epochs=3, seed=seed).epoch(number)]

    assert epoch(1, 2) == epoch(1, 2)
    assert epoch(1, 2) != epoch(1, 1)
    assert epoch(1, 2) != epoch(2, 2)
    every = Windows(SEQUENCES, 4, epochs=3, seed=1).all()
    assert [window.tolist() for window in every] == [window for number in range(3) for window in epoch(1, number)]


@pytest.mark.parametrize("seed", range(5))
def test_every_event_but_a_users_first_is_a_target_once_an_epoch(seed):
    windows = list(Windows(SEQUENCES, 4, epochs=1, seed=seed).epoch(0))
    assert all(2 <= len(window) <= 5 for window in windows)
    assert sorted(target for window in windows for target in window[1:]) == sorted(
        event for events in SEQUENCES for event in events[1:]
    )
    for events in SEQUENCES:
        last = events[-5:].tolist()
        assert len(events) < 2 or last in [window.tolist() for window in windows]


def test_cuts_move_from_epoch_to_epoch():
    starts = [
        {int(window[0]) for window in Windows(SEQUENCES[-1:], 4, epochs=9, seed=0).epoch(number)} for number in range(9)
    ]
    assert len(set(map(frozenset, starts))) > 1


def test_recent_keeps_each_users_last_window_only():
    windows = Windows(SEQUENCES, 4, epochs=1, seed=0, recent=True).epoch(0)
    assert sorted(window.tolist() for window in windows) == sorted(
        events[-5:].tolist() for events in SEQUENCES if len(events) > 1
    )


def test_windows_of_like_length_stand_together():
    sequences = [np.arange(length) for length in np.random.default_rng(0).integers(2, 40, size=203)]
    windows = Windows(sequences, 50, epochs=3, seed=1, batch=8)
    rows = windows.all()
    assert len(rows) == 3 * 203
    # The rest of every epoch, three windows of 203, stands at the end, so that no batch is shifted.
    batches = [[len(row) for row in rows[start : start + 8]] for start in range(0, 600, 8)]
    alone = [len(row) for row in Windows(sequences, 50, epochs=3, seed=1).all()]
    assert sorted(alone) == sorted(len(row) for row in rows)

    def padding(parts):
        return 1 - sum(map(sum, parts)) / sum(max(part) * len(part) for part in parts)

    assert padding(batches) < 0.1 < padding([alone[start : start + 8] for start in range(0, 600, 8)])
    order = [max(lengths) for lengths in batches]
    assert order != sorted(order)
    assert [row.tolist() for row in rows] == [row.tolist() for row in windows.all()]


def test_windows_go_on_with_new_epochs_until_there_are_enough():
    windows = Windows([np.arange(20), np.arange(7)], length=4, epochs=1, seed=0)
    once, more = windows.all(), windows.all(at_least=60)
    assert len(more) >= 60
    assert all(np.array_equal(left, right) for left, right in zip(once, more, strict=False))
    second = list(windows.epoch(1))
    assert all(np.array_equal(left, right) for left, right in zip(second, more[len(once) :], strict=False))
    assert Windows([np.arange(1)], length=4, epochs=1, seed=0).all(at_least=9) == []


def test_what_is_taught_does_not_come_in_the_order_of_the_first_epochs():
    sequences = [np.array([user, user + 40]) for user in range(40)]
    taught = [Taught(row, np.zeros(0, int), row[:1], np.ones(1)) for row in sequences]
    rows = with_taught([], taught, passes=1, batch=1, seed=7)
    assert sorted(row.window[0] for row in rows) == list(range(40))
    for number in range(2):
        windows = Windows(sequences, 4, epochs=2, seed=7, recent=True).epoch(number)
        assert [row.window[0] for row in rows] != [window[0] for window in windows]


@pytest.mark.parametrize("count", [3, 21])
def test_all_taught_windows_come_in_every_pass_in_whole_batches(count):
    batch, passes = 4, 3
    windows = Windows([np.arange(start, start + 30) for start in range(7)], 5, epochs=passes, seed=0, batch=batch).all()
    taught = [
        Taught(np.arange(2 + place % 9), np.zeros(0, int), np.array([place]), np.ones(1)) for place in range(count)
    ]
    rows = with_taught(windows, taught, passes=passes, batch=batch, seed=0)
    is_taught = [isinstance(row, Taught) for row in rows]
    for start in range(0, len(rows), batch):
        assert len(set(is_taught[start : start + batch])) == 1
    assert [row.tolist() for row in rows if not isinstance(row, Taught)] == [row.tolist() for row in windows]
    learnt = [int(row.items[0]) for row in rows if isinstance(row, Taught)]
    per_pass = -(-count // batch) * batch
    assert len(learnt) == passes * per_pass
    for number in range(passes):
        part = learnt[number * per_pass : (number + 1) * per_pass]
        assert set(part) == set(range(count))  # and a few twice
    places = np.flatnonzero(is_taught)[::batch]
    assert places[-1] > len(rows) / 2 > places[0]  # among the others, not behind them
    again = with_taught(windows, taught, passes=passes, batch=batch, seed=0)
    assert [isinstance(row, Taught) for row in again] == is_taught
    assert with_taught(windows, [], passes=passes, batch=batch, seed=0) == windows

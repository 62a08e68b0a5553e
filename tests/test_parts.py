"""Parts of a batch job: what a kill tears is taken away, so that the job can go on as often as it is killed."""

import json
import sys
from functools import partial

import polars as pl
import pytest

from recllm import parts as module
from recllm.errors import RecllmError
from recllm.parts import JOURNAL, Counts, Parts, folder_of, sweep


def test_a_torn_line_of_the_journal_is_in_the_way_of_no_later_one(tmp_path):
    target = tmp_path / "out.csv"
    for done in range(3):
        parts = Parts(target, {"k": 1}, overwrite=False)
        assert (parts.done, parts.counts.rejected) == (done, done)
        parts.add(None, [{"line": done + 1, "reason": "bad", "row": {}}], Counts(rejected=1))
        parts.close()
        with (folder_of(target) / JOURNAL).open("ab") as journal:
            journal.write(b'{"answered": 1')  # killed while it wrote the next one
    last = Parts(target, {"k": 1}, overwrite=False)
    assert (last.done, last.first) == (3, "line 1: bad")
    last.remove()


def test_a_lock_on_what_is_no_longer_there_keeps_nobody_out_and_is_not_taken(tmp_path, monkeypatch):
    target, real, begun = tmp_path / "out.csv", module.locked, []
    first = Parts(target, {"k": 1}, overwrite=False)

    def locked(opened):
        if not begun:  # between opening and locking the first job ends, and another one begins
            begun.append(None)
            first.remove()
            begun.append(Parts(target, {"k": 2}, overwrite=False))
        return real(opened)

    monkeypatch.setattr(module, "locked", locked)
    with pytest.raises(RecllmError, match="Another process is writing"):
        Parts(target, {"k": 3}, overwrite=True)
    begun[1].remove()


def test_a_job_without_rows_leaves_the_next_ones_parts_alone(tmp_path):
    target, empty = tmp_path / "out.csv", pl.DataFrame({"user_id": ["a"]})
    first = Parts(target, {"k": 1}, overwrite=False)
    first.finish(tmp_path / "rejects", empty)
    second = Parts(target, {"k": 2}, overwrite=True)
    second.add(empty, [], Counts(answered=1, written=1))
    first.close()
    assert second.finish(tmp_path / "rejects", empty) is None
    assert not folder_of(target).exists()
    third = Parts(target, {"k": 3}, overwrite=True)
    third.close()  # with no part there is nothing to go on with
    assert not folder_of(target).exists()


@pytest.mark.parametrize("depth", [3, 700])
def test_lists_in_lists_are_set_aside_however_deep(depth, tmp_path, request):
    request.addfinalizer(partial(sys.setrecursionlimit, sys.getrecursionlimit()))
    sys.setrecursionlimit(1000)  # Python's own: torch's compiler raises it for the process
    row = json.loads("[" * depth + "]" * depth)
    parts = Parts(tmp_path / "out.csv", {}, overwrite=False)
    parts.add(None, [{"line": 1, "reason": "bad", "row": row}], Counts(rejected=1))
    parts.refuse(tmp_path / "rejects")
    found = json.loads((tmp_path / "rejects").read_text(encoding="utf-8"))
    parts.remove()
    assert found == {"line": 1, "reason": "bad", "row": row if depth == 3 else "too deep to be written"}
    parts.remove()


def test_brackets_in_a_name_are_no_pattern(tmp_path):
    target = tmp_path / "out[1].csv"
    left = folder_of(target).with_name(f"{folder_of(target).name}.7.gone")
    left.mkdir()
    sweep(target)
    assert not left.exists()


def test_something_in_the_place_of_the_parts_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PAUSE", 0.0)
    target = tmp_path / "out.csv"
    folder_of(target).symlink_to(tmp_path / "gone" / "far")
    with pytest.raises(RecllmError, match="where parts are kept, cannot be made"):
        Parts(target, {}, overwrite=False)


def test_a_target_that_another_job_wrote_meanwhile_is_not_replaced(tmp_path):
    target = tmp_path / "out.csv"
    target.touch()
    with pytest.raises(RecllmError, match=r"out.csv' has appeared since this job was begun"):
        Parts(target, {"k": 1}, overwrite=False)
    assert list(tmp_path.iterdir()) == [target]
    begun = Parts(target, {"k": 1}, overwrite=True)
    begun.add(None, [], Counts(answered=1))
    begun.close()
    going_on = Parts(target, {"k": 1}, overwrite=False)  # what was begun with --overwrite
    assert going_on.done == 1
    going_on.close()

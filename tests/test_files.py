"""Files and folders are whole or not there, whatever an earlier process left behind."""

import errno
import os
import pickle
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from recllm.arrayfiles import read_tensors
from recllm.errors import RecllmError
from recllm.files import (
    _sweep,
    alone,
    only_one,
    own_folder,
    read_json,
    restore,
    whole_folder,
    write_json,
    written,
)


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_who_serves_may_read_what_another_has_trained(umask, tmp_path):
    """safetensors writes for its owner alone, whatever the umask says."""
    before = os.umask(umask)
    try:
        with written(tmp_path / "a.safetensors") as temporary:
            save_file({"a": np.ones(2)}, temporary)
        with whole_folder(tmp_path / "bundle") as folder:
            (folder / "inside").mkdir()
            save_file({"a": np.ones(2)}, folder / "inside" / "b.safetensors")
    finally:
        os.umask(before)
    for path in (tmp_path / "a.safetensors", tmp_path / "bundle" / "inside" / "b.safetensors"):
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask
    assert (tmp_path / "bundle").stat().st_mode & 0o777 == 0o777 & ~umask


def test_a_damaged_file_is_one_message_with_the_way_out(tmp_path):
    (tmp_path / "x.json").write_text('{"a": ', encoding="utf-8")
    with pytest.raises(RecllmError, match=r"x\.json' is damaged .*\. Bring it back, or make what it belongs to anew"):
        read_json(tmp_path / "x.json")
    (tmp_path / "x.safetensors").write_bytes(b"\x08")
    with pytest.raises(RecllmError, match=r"x\.safetensors' is damaged") as error:
        read_tensors(tmp_path / "x.safetensors")
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)  # as from a worker


def test_a_folder_takes_the_place_of_the_old_one_when_it_is_whole(tmp_path):
    folder = tmp_path / "bundle"
    (tmp_path / f".bundle.{os.getpid()}.part").mkdir()  # of a process that was killed, with the number of this one
    for text in ("old", "new"):
        with whole_folder(folder) as part:
            (part / "file").write_text(text, encoding="utf-8")
            assert not folder.exists() or (folder / "file").read_text(encoding="utf-8") == "old"
        assert (folder / "file").read_text(encoding="utf-8") == text
    assert sorted(path.name for path in tmp_path.iterdir()) == [f".bundle.{os.getpid()}.part", "bundle"]
    assert folder.stat().st_mode & 0o777 == 0o755


def test_what_breaks_off_leaves_the_old_one(tmp_path):
    write_json(tmp_path / "a.json", {"old": 1})
    before = (tmp_path / "a.json").read_bytes()

    def fail():
        with written(tmp_path / "a.json") as temporary:
            temporary.write_text("half", encoding="utf-8")
            raise RuntimeError("power")

    with pytest.raises(RuntimeError, match=r"power"):
        fail()
    assert (tmp_path / "a.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_folder_is_replaced_where_the_system_cannot_exchange_names_too(can_exchange, tmp_path, monkeypatch):
    if not can_exchange:
        monkeypatch.setattr("recllm.files._exchanged", lambda *_: False)
    for text in ("old", "new"):
        with whole_folder(tmp_path / "bundle") as part:
            (part / "file").write_text(text, encoding="utf-8")
    assert (tmp_path / "bundle" / "file").read_text(encoding="utf-8") == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_one_process_after_the_other_changes_what_lies_in_a_folder(tmp_path):
    order = []

    def change(name):
        with alone(tmp_path / "bundle"):
            order.append(name)
            time.sleep(0.05)
            order.append(name)

    threads = [threading.Thread(target=change, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert order[::2] == order[1::2]


def test_whoever_waits_says_so(tmp_path):
    said, inside = [], threading.Event()

    def wait():
        with alone(tmp_path / "other", said.append):
            inside.set()

    with alone(tmp_path / "one", said.append):
        waiting = threading.Thread(target=wait)
        waiting.start()
        while not said:
            time.sleep(0.01)
        assert not inside.is_set()
    waiting.join()
    assert said == [f"Another process writes in '{tmp_path}'; waiting for it"]
    assert inside.is_set()


@pytest.mark.parametrize("kind", [errno.EBADF, errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_a_file_system_without_locks_keeps_nobody_out(kind, tmp_path, monkeypatch):
    def none(*_):
        raise OSError(kind, "no locks")

    monkeypatch.setattr("recllm.files.fcntl.flock", none)
    with alone(tmp_path / "one"), only_one(tmp_path) as free:
        assert free
    left = tmp_path / ".one.12345678.part"
    left.mkdir()
    os.utime(left, (0, 0))
    with whole_folder(tmp_path / "one") as part:
        (part / "file").touch()
    assert left.is_dir()  # it may be another process's


def test_what_a_killed_process_left_goes_and_what_another_holds_stays(tmp_path):
    names = [".one.deadbeef.part", ".one.nowyoung.part", ".one.heldhere.part", ".two.deadbeef.part", ".one.x.part"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "large").touch()
        if "young" not in name:
            os.utime(tmp_path / name, (0, 0))
    with only_one(tmp_path / names[2]), whole_folder(tmp_path / "one") as part:
        (part / "file").touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names[1:], "one"])


def test_a_folder_of_ones_own_goes_with_its_work(tmp_path):
    with own_folder(tmp_path) as one, own_folder(tmp_path) as other:
        assert one != other
        (one / "file").touch()
    assert list(tmp_path.iterdir()) == []


def test_two_writers_of_one_file_have_a_temporary_name_each(tmp_path):
    path = tmp_path / "vectors"
    with written(path) as one, written(path) as other:
        one.write_text("half", encoding="utf-8")
        other.write_text("whole", encoding="utf-8")
    assert path.read_text(encoding="utf-8") == "half"  # the outer one ends last, and each is what it wrote
    assert list(tmp_path.iterdir()) == [path]


def test_a_temporary_file_that_a_killed_process_left_goes_after_a_day(tmp_path):
    left, young = tmp_path / ".one.deadbeef.part", tmp_path / ".one.abcdef01.part"
    for path in (left, young):
        path.touch()
    os.utime(left, (0, 0))
    write_json(tmp_path / "one", 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [young.name, "one"]


def test_a_folder_is_replaced_from_inside_of_it_and_none_where_it_is_mounted(tmp_path, monkeypatch):
    folder = tmp_path / "bundle"
    folder.mkdir()
    monkeypatch.chdir(folder)
    with whole_folder(Path()) as part:
        assert part.parent == tmp_path
        (part / "file").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert (folder / "file").is_file()
    monkeypatch.setattr("recllm.files.os.path.ismount", lambda path: path == folder)
    with pytest.raises(RecllmError, match=r"bundle' is a mount point"), whole_folder(folder):
        pytest.fail("told too late")


def test_a_folder_that_was_taken_away_by_a_kill_comes_back(tmp_path, monkeypatch):
    """Where two folders cannot change names, there is a moment in which none has it."""
    monkeypatch.setattr("recllm.files._exchanged", lambda *_: False)
    folder, replace = tmp_path / "bundle", Path.replace
    folder.mkdir()
    (folder / "old").touch()

    def killed(path, target):
        if path.suffix == ".part":
            raise KeyboardInterrupt
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt), whole_folder(folder) as part:
            (part / "new").touch()
    assert not folder.exists()
    held = tmp_path / ".bundle.heldhere.part"
    held.mkdir()
    with only_one(held):
        restore(folder)
    assert not folder.exists()  # the other process is about to put its own there
    restore(folder)
    assert [path.name for path in folder.iterdir()] == ["old"]
    (tmp_path / ".bundle.deadbeef.old").mkdir()
    with whole_folder(folder) as part:
        (part / "new").touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == [held.name, "bundle"]
    assert [path.name for path in folder.iterdir()] == ["new"]


def test_what_cannot_be_looked_at_is_left_alone(tmp_path, monkeypatch):
    left = tmp_path / ".one.deadbeef.part"
    left.mkdir()
    os.utime(left, (0, 0))

    def denied(*_):
        raise PermissionError(errno.EACCES, "another user's", str(left))

    with monkeypatch.context() as patch:
        patch.setattr("recllm.files.os.open", denied)
        _sweep(left)
    assert left.is_dir()


def test_a_folder_of_ones_own_that_a_killed_process_left_goes_with_the_next(tmp_path):
    left, held = tmp_path / ".work.one", tmp_path / ".work.two"
    for path in (left, held):
        path.mkdir()
        os.utime(path, (0, 0))
    with only_one(held), own_folder(tmp_path):
        assert not left.exists()
        assert held.is_dir()

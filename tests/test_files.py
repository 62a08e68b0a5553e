"""Files and folders are whole or not there, whatever an earlier process left behind."""

import errno
import os
import pickle
import threading
import time

import numpy as np
import pytest
from safetensors.numpy import save_file

from recllm.arrayfiles import read_tensors
from recllm.errors import RecllmError
from recllm.files import alone, only_one, own_folder, read_json, whole_folder, write_json, written


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

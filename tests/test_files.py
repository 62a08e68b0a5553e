"""Files and folders are whole or not there, whatever an earlier process left behind."""

import os

import pytest

from recllm.files import whole_folder, write_json, written


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

"""The bundle on disk: sealed with checksums, refused when anything is missing, damaged, newer or outside."""

import json
import shutil

import polars as pl
import pytest

import recllm
from recllm.bundle import (
    FORMAT,
    WITH_NETWORK,
    new_bundle,
    read_catalog,
    read_manifest,
    read_steadily,
    understood,
    write_catalog,
)
from recllm.data import Catalog
from recllm.errors import RecllmError
from recllm.files import read_json, sha256_of, write_json


@pytest.fixture
def folder(tmp_path):
    with new_bundle(tmp_path / "bundle", {"name": "films", "scorers": {}}) as part:
        (part / "weights.bin").write_bytes(b"12345")
        (part / "cf").mkdir()
        (part / "cf" / "facts.json").write_text("{}", encoding="utf-8")
    return tmp_path / "bundle"


def changed(folder, **facts):
    write_json(folder / "manifest.json", read_json(folder / "manifest.json") | facts)


def test_the_manifest_knows_every_file(folder):
    manifest = read_manifest(folder)
    assert manifest["name"] == "films"
    assert (manifest["format"], manifest["recllm"]) == (FORMAT, recllm.__version__)
    assert set(manifest["files"]) == {"weights.bin", "cf/facts.json"}
    assert manifest["files"]["weights.bin"] == {"bytes": 5, "sha256": sha256_of(folder / "weights.bin")}


@pytest.mark.parametrize("content", [b"12346", b"1234", b"123456", b""], ids=["one bit", "short", "long", "empty"])
def test_a_damaged_file_is_named(folder, content):
    (folder / "weights.bin").write_bytes(content)
    with pytest.raises(
        RecllmError, match=r"weights\.bin' is damaged: its sha256 is not the manifest's\. Copy or export"
    ):
        read_manifest(folder)


def test_a_missing_file_is_named(folder):
    (folder / "cf" / "facts.json").unlink()
    with pytest.raises(RecllmError, match=r"lacks the file 'cf/facts\.json'\. Copy the bundle again, whole"):
        read_manifest(folder)


def test_an_added_file_is_named(folder):
    (folder / "cf" / "more.json").write_text("{}", encoding="utf-8")
    with pytest.raises(RecllmError, match=r"has the file 'cf/more\.json', which its manifest does not name"):
        read_manifest(folder)


def test_what_copying_and_version_control_leave_is_passed_over(folder):
    for name in (".git/HEAD", ".cache/huggingface/download/README.md.metadata", "cf/.DS_Store"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x", encoding="utf-8")
    assert not any(name.startswith(".") for name in read_manifest(folder)["files"])


def test_a_bundle_that_is_replaced_while_it_is_read_is_read_again(folder):
    reads = []

    def read():
        first = read_manifest(folder)["name"]
        if len(reads) < 2:
            with new_bundle(folder, {"name": f"new {len(reads)}"}) as part:
                (part / "file").write_text("x", encoding="utf-8")
        reads.append((first, read_manifest(folder)["name"]))
        if len(reads) == 1:
            raise OSError("a file is gone")
        return reads[-1]

    assert read_steadily(folder, read) == ("new 1", "new 1")
    assert len(reads) == 3

    def always():
        with new_bundle(folder, {"name": "newer"}) as part:
            (part / "file").write_text("x", encoding="utf-8")

    with pytest.raises(RecllmError, match=r"is replaced again and again while it is read"):
        read_steadily(folder, always)

    def fails():
        raise OSError("broken for good")

    with pytest.raises(OSError, match=r"broken for good"):
        read_steadily(folder, fails)


def test_a_newer_format_says_which_recllm_made_it(folder):
    changed(folder, format=WITH_NETWORK + 1, recllm="9.9.9")
    with pytest.raises(
        RecllmError,
        match=rf"has bundle format {WITH_NETWORK + 1}, this recllm .* reads {FORMAT} and {WITH_NETWORK}.*9\.9\.9",
    ):
        read_manifest(folder)


@pytest.mark.parametrize("name", ["../secret.txt", "cf/../../secret.txt", "/etc/hostname"])
def test_a_path_outside_is_not_opened(folder, name):
    secret = folder.parent / "secret.txt"
    secret.write_bytes(b"12345")
    changed(folder, files={name: {"bytes": 5, "sha256": sha256_of(secret)}})
    with pytest.raises(RecllmError, match=r"outside of itself; such a bundle is not opened"):
        read_manifest(folder)


def test_a_link_to_the_outside_is_not_opened(folder):
    secret = folder.parent / "secret.txt"
    secret.write_bytes(b"12345")
    (folder / "weights.bin").unlink()
    (folder / "weights.bin").symlink_to(secret)
    with pytest.raises(RecllmError, match=r"outside of itself"):
        read_manifest(folder)


def test_a_link_to_another_folder_is_not_opened(folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (folder / "side").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RecllmError, match=r"has 'side', a link to another folder; such a bundle is not opened"):
        read_manifest(folder)


def test_a_bundle_that_a_kill_took_away_is_brought_back_by_whoever_reads_it(folder):
    folder.rename(folder.with_name(f".{folder.name}.deadbeef.old"))
    assert read_manifest(folder)["files"]
    assert folder.is_dir()


@pytest.mark.parametrize(
    "error", [KeyError("mf"), TypeError("unexpected"), FileNotFoundError(2, "gone"), Exception("x")]
)
def test_files_that_do_not_go_together_are_told_without_a_traceback(error, tmp_path):
    def read():
        raise error

    with pytest.raises(RecllmError, match=rf"its files do not go together \({type(error).__name__}: "):
        understood(tmp_path, read)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory"), PermissionError(13, "closed")])
def test_what_is_no_fault_of_a_bundle_is_not_told_as_one(error, tmp_path):
    def read():
        raise error

    with pytest.raises(type(error)):
        understood(tmp_path, read)


def test_a_snapshot_in_the_hubs_cache_is_links_to_its_blobs(folder, tmp_path):
    blobs, snapshot = (
        tmp_path / "models--acme--films" / "blobs",
        tmp_path / "models--acme--films" / "snapshots" / "c0ffee",
    )
    blobs.mkdir(parents=True)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            link = snapshot / path.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(shutil.copy(path, blobs / sha256_of(path)))
    assert read_manifest(snapshot) == read_manifest(folder)
    secret = tmp_path / "secret.txt"
    secret.write_bytes((folder / "weights.bin").read_bytes())
    (snapshot / "weights.bin").unlink()
    (snapshot / "weights.bin").symlink_to(secret)
    with pytest.raises(RecllmError, match=r"outside of itself"):
        read_manifest(snapshot)


def test_what_is_no_bundle(tmp_path):
    with pytest.raises(RecllmError, match=r"is not a bundle \(it has no manifest\.json\)\. Make .* recllm export"):
        read_manifest(tmp_path)
    with pytest.raises(RecllmError, match=r"'.*nowhere' is not there"):
        read_manifest(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '"x"', '{"format": 3}', '{"format": 3, "files": []}', '{"format": 3, "files": {"weights.bin": 3}}'],
)
def test_a_broken_manifest(folder, text):
    (folder / "manifest.json").write_text(text, encoding="utf-8")
    with pytest.raises(RecllmError, match=r"manifest\.json is damaged .* Export the bundle again"):
        read_manifest(folder)


def test_a_bundle_that_failed_is_not_there_and_an_older_one_stays(folder):
    before = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))

    def fail():
        with new_bundle(folder, {}) as part:
            (part / "new.bin").write_bytes(b"x")
            raise RuntimeError("gate")

    with pytest.raises(RuntimeError, match=r"gate"):
        fail()
    assert read_manifest(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == ["bundle"]


def test_a_new_bundle_takes_the_place_of_the_old_one(folder):
    with new_bundle(folder, {"name": "new"}) as part:
        (part / "new.bin").write_bytes(b"x")
    assert set(read_manifest(folder)["files"]) == {"new.bin"}
    assert not (folder / "weights.bin").exists()


def test_the_catalogue_comes_back(tmp_path):
    frame = pl.DataFrame({"item_id": ["1", "2"], "title": ["Red", None], "genres": ["", "Drama"]})
    write_catalog(tmp_path, Catalog(frame))
    assert read_catalog(tmp_path).fingerprint() == Catalog(frame).fingerprint()

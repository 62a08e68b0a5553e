"""Push and pull: what goes up is sound, what comes down is whole and checked, and a failure says the way out."""

import json
import shutil
from types import SimpleNamespace

import huggingface_hub
import pytest

import recllm
from recllm.cli import main
from recllm.errors import RecllmError
from recllm.hub import pull, push


class Hub:
    """A hub in a folder, with the two calls of the client that are used."""

    def __init__(self, place, monkeypatch):
        self.place, self.branches, self.private, self.public = place, [], [], set()
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: self)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.download)

    def create_repo(self, repository, *, private, repo_type, exist_ok):
        assert (repo_type, exist_ok) == ("model", True)
        self.private.append(private)
        (self.place / repository).mkdir(parents=True, exist_ok=True)
        (self.place / repository / ".gitattributes").write_text("*.onnx filter=lfs\n", encoding="utf-8")
        return f"https://hub.example/{repository}"

    def repo_info(self, repository, *, repo_type):
        return SimpleNamespace(private=repository not in self.public)

    def create_branch(self, repository, *, branch, exist_ok):
        self.branches.append((repository, branch, exist_ok))

    def upload_folder(self, *, repo_id, folder_path, revision, commit_message, ignore_patterns, delete_patterns):
        assert delete_patterns == "*"
        target = self.place / repo_id
        for path in target.iterdir():
            if not path.name.startswith("."):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.copytree(folder_path, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".*"))

    def download(self, repository, *, revision, local_dir):
        if not (self.place / repository).is_dir():
            raise OSError(f"404: no repository {repository}\nand a long story")
        shutil.copytree(self.place / repository, local_dir, dirs_exist_ok=True)
        (local_dir / ".cache" / "huggingface").mkdir(parents=True)
        (local_dir / ".cache" / "huggingface" / "notes.json").write_text("{}", encoding="utf-8")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    return Hub(tmp_path / "hub", monkeypatch)


def test_a_bundle_comes_back_as_it_went(hub, tiny_bundle, tmp_path, capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["push", str(tiny_bundle), "acme/films", "--private", "--revision", "v1"])
    assert "is at https://hub.example/acme/films" in capsys.readouterr().out
    assert hub.private == [True]
    assert hub.branches == [("acme/films", "v1", True)]
    with pytest.raises(SystemExit, match="0"):
        main(["pull", "acme/films", str(tmp_path / "films")])
    assert "the bundle of acme/films. Next: recllm recommend" in capsys.readouterr().out
    histories = [["1", "2"]]
    found, expected = (recllm.load(folder).recommend(histories, k=3) for folder in (tmp_path / "films", tiny_bundle))
    assert found.ids == expected.ids
    assert not (tmp_path / "films" / ".cache").exists()


def test_an_earlier_bundle_leaves_nothing_behind(hub, tiny_bundle, tmp_path):
    old = tmp_path / "hub" / "acme" / "films" / "old"
    old.mkdir(parents=True)
    (old / "more.onnx").write_bytes(b"old")
    push(tiny_bundle, "acme/films")
    assert pull("acme/films", tmp_path / "films") == "bundle"


def test_an_adapter_is_pushed_and_pulled(hub, tiny_run, tmp_path):
    push(tiny_run / "lm" / "adapter", "acme/films-lora")
    assert pull("acme/films-lora", tmp_path / "lora") == "adapter"
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["peft_type"] == "LORA"


def test_what_is_neither_is_not_pushed(hub, tiny_run, tmp_path):
    with pytest.raises(RecllmError, match=r"is neither a bundle .* nor an adapter .*lm/adapter"):
        push(tiny_run, "acme/films")
    assert not hub.place.exists()


def test_a_damaged_bundle_goes_neither_up_nor_down(hub, tiny_bundle, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(tiny_bundle, damaged)
    (damaged / "fusion.json").write_text("{}", encoding="utf-8")
    with pytest.raises(RecllmError, match=r"fusion\.json' is damaged"):
        push(damaged, "acme/films")
    shutil.copytree(damaged, hub.place / "acme" / "films")
    with pytest.raises(RecllmError, match=r"acme/films cannot be used: 'acme/films/fusion\.json' is damaged"):
        pull("acme/films", tmp_path / "films")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged", "hub"]


def test_only_a_bundle_or_an_adapter_is_replaced(hub, tiny_bundle, tmp_path):
    push(tiny_bundle, "acme/films")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").write_bytes(b"x")
    with pytest.raises(RecllmError, match=r"photos' is there already\. .*--overwrite"):
        pull("acme/films", tmp_path / "photos")
    with pytest.raises(RecllmError, match=r"photos' is neither a bundle"):
        pull("acme/films", tmp_path / "photos", overwrite=True)
    pull("acme/films", tmp_path / "films")
    assert pull("acme/films", tmp_path / "films", overwrite=True) == "bundle"


@pytest.mark.parametrize("name", ["films", "/films", "acme/", "a/b/c"])
def test_a_name_without_an_owner_is_refused(name, tiny_bundle):
    with pytest.raises(RecllmError, match=r"is no name of a repository\. Give owner/name"):
        push(tiny_bundle, name)


def test_a_failure_of_the_hub_is_one_message_with_the_way_out(hub, tmp_path):
    with pytest.raises(RecllmError, match=r"did not do it for acme/none: 404: no repository acme/none\. Log in with"):
        pull("acme/none", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_nothing_private_goes_to_a_repository_that_is_public(hub, tiny_bundle):
    hub.public.add("acme/open")
    with pytest.raises(RecllmError, match=r"'acme/open' is there already and public; nothing was uploaded"):
        push(tiny_bundle, "acme/open", private=True)
    assert not (hub.place / "acme" / "open" / "manifest.json").exists()
    push(tiny_bundle, "acme/open", private=False)
    assert (hub.place / "acme" / "open" / "manifest.json").is_file()


def test_nothing_is_pulled_into_a_bundle(hub, tiny_bundle, tmp_path):
    push(tiny_bundle, "acme/films")
    pull("acme/films", tmp_path / "there")
    with pytest.raises(RecllmError, match="would lie in a bundle"):
        pull("acme/films", tmp_path / "there" / "inner")

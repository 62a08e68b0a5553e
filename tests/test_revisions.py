"""A run knows which weights it was trained over, and says so when others lie behind the same name."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from recllm.errors import RecllmError
from recllm.files import read_json, sha256_of, write_json
from recllm.revisions import check_same_models, known_revision, revision, revisions
from recllm.runs import ENVIRONMENT, load_run, write_environment, write_run


@pytest.fixture
def model(tiny_lm_folder, tmp_path):
    """A copy of the tiny language model, whose weights may be changed."""
    return shutil.copytree(tiny_lm_folder, tmp_path / "model")


@pytest.fixture
def run(model, tiny_run, tmp_path):
    """A run over that copy, as far as its environment goes."""
    there = load_run(tiny_run)
    names = {"name": str(model), "item_encoder": None, "likelihood": None}
    own = there.model_copy(update={"output": str(tmp_path), "model": there.model.model_copy(update=names)})
    own.folder.mkdir()
    write_run(own, own.folder / "run.toml")
    write_environment(own, {"interactions": "a"}, revisions(own), device="cpu")
    return own


def change(model):
    path = model / "model.safetensors"
    weights = load_file(path)
    save_file({name: value + torch.ones_like(value) for name, value in weights.items()}, path)


def test_a_revision_is_the_weights(model):
    before = revision(str(model))
    assert before == sha256_of(model / "model.safetensors")[:16]
    (model / "README.md").write_text("other words", encoding="utf-8")
    assert revision(str(model)) == before
    change(model)
    assert revision(str(model)) != before


def test_a_finished_run_knows_its_models(tiny_run):
    run = load_run(tiny_run)
    kept = read_json(tiny_run / ENVIRONMENT)["models"]
    assert kept == revisions(run)
    assert run.model.name in kept
    check_same_models(run)


def test_other_weights_behind_the_name_are_an_error(run, model):
    check_same_models(run)
    before = known_revision(run, str(model))
    change(model)
    with pytest.raises(RecllmError, match=r"has other weights now .* than those that .* Bring the old files back into"):
        check_same_models(run)
    # What the run's card says stays true.
    assert known_revision(run, str(model)) == before != revision(str(model))


def test_a_moved_hub_id_is_mended_by_naming_its_commit(run, model, monkeypatch):
    write_json(run.folder / ENVIRONMENT, {"data": {}, "models": {"owner/model": "0" * 16}})
    monkeypatch.setattr("recllm.revisions.model_folder", lambda _name: model)
    for name in ("owner/model", "owner/model@0a1b"):
        moved = run.model_copy(update={"model": run.model.model_copy(update={"name": name})})
        with pytest.raises(RecllmError, match=r"Name that commit of it in .*run\.toml \(owner/model@COMMIT\)"):
            check_same_models(moved)
    write_json(run.folder / ENVIRONMENT, {"data": {}, "models": {"owner/model": revision("owner/model")}})
    check_same_models(moved)


def test_a_run_from_before_they_were_kept_goes_on(run, model):
    facts = read_json(run.folder / ENVIRONMENT)
    del facts["models"]
    write_json(run.folder / ENVIRONMENT, facts)
    change(model)
    check_same_models(run)
    assert known_revision(run, str(model)) == revision(str(model))

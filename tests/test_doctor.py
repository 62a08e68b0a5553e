"""The doctor: what is there is found, what is wrong is named with its mend."""

import base64
import shutil
import tomllib
import zlib
from pathlib import Path

import onnx
import pytest

from recllm import doctor
from recllm.bundle import seal
from recllm.cli import main
from recllm.doctor import Finding, examine
from recllm.files import read_json, write_json
from recllm.integer import write_probe

ROOT = Path(__file__).parents[1]


def marks(findings):
    return {finding.text.split(",")[0].split(" >=")[0]: finding.mark for finding in findings}


def test_this_installation_is_well(capsys, tiny_bundle):
    with pytest.raises(SystemExit) as left:
        main(["doctor", str(tiny_bundle)])
    said = capsys.readouterr().out
    assert left.value.code == 0
    assert "ok     onnxruntime-gpu" in said
    assert "ok     provider cpu" in said
    assert "ok     extra 'train'" in said
    assert "recommends by popularity, mf" in said
    assert "ok     graph catalogue.onnx" in said
    assert "WRONG" not in said


def test_a_provider_that_is_missing_is_no_fault_without_a_gpu(monkeypatch):
    monkeypatch.setattr(doctor, "_has_gpu", lambda provider: provider == "cpu")
    assert doctor._provider("cuda").mark == "none"
    monkeypatch.setattr(doctor, "_has_gpu", lambda provider: True)
    found = doctor._provider("cuda")
    assert found.mark == "wrong"
    assert "Install CUDA and cuDNN" in found.mend


def test_whether_this_processor_multiplies_integers_is_said(monkeypatch, overflows):
    assert doctor._products().mark == ("none" if overflows else "ok")
    monkeypatch.setattr(doctor, "integer_products_hold", lambda _: False)
    assert "int8, fp16 and fp32 run here" in doctor._products().mend
    monkeypatch.setattr(doctor, "integer_products_hold", lambda _: 1 / 0)
    assert doctor._products() == Finding("none", "integer products: not tried")


def test_the_product_that_is_tried_is_one_that_bundles_have(tmp_path):
    write_probe(tmp_path / "probe.onnx")
    tried = onnx.load_from_string(zlib.decompress(base64.b64decode(doctor.PRODUCT)))
    assert tried == onnx.load(tmp_path / "probe.onnx")


def test_a_package_whose_files_are_gone(monkeypatch):
    def gone(*_):
        raise AttributeError("module 'onnxruntime' has no attribute 'get_available_providers'")

    monkeypatch.setattr(doctor, "open_session", gone)
    found = doctor._provider("cpu")
    assert (found.mark, "pip uninstall -y" in found.mend) == ("wrong", True)


@pytest.mark.parametrize(
    ("installed", "mark", "text"),
    [
        ({}, "wrong", 'pip install "recllm[gpu]"'),
        ({"onnxruntime": "1.30"}, "ok", ""),
        ({"onnxruntime": "1.30", "onnxruntime-gpu": "1.31"}, "wrong", "pip uninstall -y onnxruntime onnxruntime-gpu,"),
    ],
)
def test_one_runtime_and_no_more(monkeypatch, installed, mark, text):
    monkeypatch.setattr(doctor, "_installed", lambda: installed)
    found = doctor._runtime()
    assert (found.mark, text in found.mend) == (mark, True)


def test_an_extra_that_is_half_there_or_too_old_is_named(monkeypatch):
    whole = dict(doctor._requirements("train"))
    assert whole["torch"] == "2.10"
    monkeypatch.setattr(doctor, "_installed", lambda: whole | {"peft": "0.18.9", "torch": "2.13.0+cpu"})
    found = doctor._extra("train", "train")
    assert found.mark == "wrong"
    assert "lacks peft >= 0.19 (there is 0.18.9)" in found.text
    monkeypatch.setattr(doctor, "_installed", dict)
    assert doctor._extra("train", "train").mark == "none"


def test_another_extra_is_wrong_only_where_it_is_too_old(monkeypatch):
    monkeypatch.setattr(doctor, "_requirements", lambda _: [("faiss-cpu", "1.12"), ("onnx", "1.21")])
    monkeypatch.setattr(doctor, "_installed", lambda: {"onnx": "1.23"})  # "train" brings it
    found = doctor._extra("index", "search")
    assert (found.mark, "lacks faiss-cpu" in found.text) == ("none", True)
    monkeypatch.setattr(doctor, "_installed", lambda: {"onnx": "1.23", "faiss-cpu": "1.10"})
    assert doctor._extra("index", "search").mark == "wrong"


@pytest.mark.parametrize("extra", doctor.EXTRAS)
def test_every_extra_is_known(monkeypatch, extra):
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    told = [f'{text}; extra == "{extra}"' for text in wanted[extra]]
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda _: told)
    assert len(dict(doctor._requirements(extra))) == len(wanted[extra])


def test_a_cache_that_cannot_be_written(monkeypatch):
    monkeypatch.setattr(doctor.os, "access", lambda *_: False)
    assert "export RECLLM_CACHE=FOLDER" in doctor._cache().mend


def test_a_cache_that_is_a_file(monkeypatch, tmp_path):
    (tmp_path / "cache").write_text("")
    for place in (tmp_path / "cache", tmp_path / "cache" / "below"):
        monkeypatch.setenv("RECLLM_CACHE", str(place))
        found = doctor._cache()
        assert (found.mark, f"'{tmp_path / 'cache'}' is a file" in found.text) == ("wrong", True)


def test_a_damaged_bundle_and_one_of_another_opset(tiny_bundle, tmp_path):
    folder = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, folder)
    model = onnx.load(folder / "light.onnx")
    model.opset_import[0].version = 99
    onnx.save(model, folder / "light.onnx")
    assert "is damaged" in [finding.mend for finding in examine(folder)][-1]
    manifest = doctor.read_manifest(tiny_bundle)
    seal(folder, {key: manifest[key] for key in ("scorers", "recipe")})
    found = {finding.text: finding for finding in examine(folder)}
    assert found["graph light.onnx"].mark == "wrong"
    assert "export the bundle again by a recipe with a lower opset" in found["graph light.onnx"].mend
    assert found["graph catalogue.onnx"].mark == "ok"


def test_a_finding_is_a_line_and_its_mend():
    assert Finding("wrong", "a", "b").line() == "WRONG  a\n         b"
    assert Finding("none", "a").line() == "-      a"


def test_a_bundle_that_is_whole_and_does_not_load_is_wrong(tiny_bundle, tmp_path):
    place = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, place)
    manifest = read_json(place / "manifest.json")
    manifest["scorers"]["mf"] = "newer"
    write_json(place / "manifest.json", manifest)
    (last,) = [found for found in examine(place) if found.mark == "wrong"]
    assert last.text == "the bundle as a whole"
    assert "Unknown kind of scorer in the bundle 'newer'" in last.mend

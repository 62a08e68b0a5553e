"""Graphs that are too large for one file: weights beside them, and everything else as with those that are not."""

import json
import shutil

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

import recllm
from recllm import graphfiles, tracing
from recllm.errors import RecllmError
from recllm.export import export_run
from recllm.graphfiles import copy_graph, is_large, open_model, save_graph, share_weights, weights_file
from recllm.quantise import quantise
from recllm.runs import load_run
from recllm.sessions import open_session
from recllm.tasks import prepare
from recllm.weightonly import WeightSettings

WIDTH = 64
FEEDS = {"x": np.random.default_rng(1).normal(size=(5, WIDTH)).astype(np.float32)}


@pytest.fixture
def small_files(monkeypatch):
    """No more than a thousand bytes of weights in a graph's own file."""
    monkeypatch.setattr(graphfiles, "MOST_BYTES", 1000)
    monkeypatch.setattr(tracing, "MOST_BYTES", 1000)


def product():
    """A model of one layer."""
    weights = numpy_helper.from_array(np.random.default_rng(0).normal(size=(WIDTH, WIDTH)).astype(np.float32), "w")
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", WIDTH]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", value[:1], value[1:], [weights])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def answers(session):
    return session.run(None, FEEDS)[0]


def test_weights_that_fit_stay_in_the_file_of_the_graph(tmp_path):
    assert not is_large(product())
    save_graph(product(), tmp_path / "one.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["one.onnx"]


def test_large_weights_lie_beside_their_graph_and_go_with_it(tmp_path, small_files):
    expected = answers(open_session(product().SerializeToString()))
    path = tmp_path / "one.onnx"
    for _ in range(2):  # the second time over what is there
        save_graph(product(), path)
        assert path.stat().st_size < 1000
        assert weights_file(path).stat().st_size == WIDTH * WIDTH * 4
        assert answers(open_session(path)) == pytest.approx(expected, abs=0)
    (tmp_path / "other").mkdir()
    copy_graph(path, tmp_path / "other" / "one.onnx")
    path.unlink(), weights_file(path).unlink()
    assert answers(open_session(tmp_path / "other" / "one.onnx")) == pytest.approx(expected, abs=0)


@pytest.mark.parametrize("most", [1000, graphfiles.MOST_BYTES])
def test_what_graphs_have_in_common_lies_once(most, tmp_path, monkeypatch):
    monkeypatch.setattr(graphfiles, "MOST_BYTES", most)
    paths, target = [tmp_path / f"{name}.onnx" for name in ("one", "other", "turned")], tmp_path / "weights.data"
    turned = product()
    weights = numpy_helper.to_array(turned.graph.initializer[0]).T
    turned.graph.initializer[0].CopyFrom(numpy_helper.from_array(weights.copy(), "w"))
    small = numpy_helper.from_array(np.zeros(WIDTH, dtype=np.float32), "small")
    turned.graph.initializer.append(small)
    for model, path in zip((product(), product(), turned), paths, strict=True):
        save_graph(model, path)
    expected = [answers(open_session(path)) for path in paths]
    share_weights(paths, target)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([target.name, *(path.name for path in paths)])
    assert all(path.stat().st_size < 1000 for path in paths)
    assert target.stat().st_size == 2 * WIDTH * WIDTH * 4  # the third one's are of the same size, and others
    for path, before in zip(paths, expected, strict=True):
        assert np.array_equal(answers(open_session(path)), before)


def test_a_large_model_in_memory_is_run_and_stays(small_files):
    model = product()
    expected = answers(open_session(model.SerializeToString()))
    assert answers(open_model(model)) == pytest.approx(expected, abs=0)
    assert len(model.graph.initializer[0].raw_data) == WIDTH * WIDTH * 4


@pytest.mark.parametrize(
    ("precision", "causal"),
    [
        ("fp32", None),
        ("fp16", None),
        ("int8", None),
        ("int8", WeightSettings()),
        ("int4", WeightSettings(bits=4, algorithm="hqq", max_damage=0.01)),
    ],
)
def test_quantised_large_graphs_are_what_small_ones_are(precision, causal, tmp_path, monkeypatch):
    found = []
    for name, most in (("small", graphfiles.MOST_BYTES), ("large", 1000)):
        monkeypatch.setattr(graphfiles, "MOST_BYTES", most)
        source, target = tmp_path / name / "from" / "one.onnx", tmp_path / name / "to" / "one.onnx"
        source.parent.mkdir(parents=True), target.parent.mkdir()
        save_graph(product(), source)
        quantise(source, target, precision, causal, [FEEDS])
        assert weights_file(target).is_file() == (name == "large")
        found.append(answers(open_session(target)))
    assert found[0] == pytest.approx(found[1], abs=0)


def test_a_bundle_of_large_graphs(tiny_run, tiny_bundle, tmp_path, small_files):
    run = load_run(shutil.copytree(tiny_run, tmp_path / "run"))
    (exported,) = export_run(run, prepare(run), ["fp32"], say=lambda _: None)
    folder = exported.folder
    named = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["files"]
    assert {"lm.onnx", "lm.onnx.data", "encoder.onnx", "encoder.onnx.data"} <= named.keys()
    moved = folder.rename(tmp_path / "moved")
    expected, found = (recllm.load(own).recommend([["2", "4", "6"], ["1"]], k=5) for own in (tiny_bundle, moved))
    assert found.ids == expected.ids
    assert found.scores == pytest.approx(expected.scores, abs=1e-4)
    weights = moved / "lm.onnx.data"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(RecllmError, match=r"lm\.onnx\.data' is damaged"):
        recllm.load(moved)

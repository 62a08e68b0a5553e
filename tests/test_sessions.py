"""Sessions: feeds that stay where a graph computes give the same answers, and nothing that was handed out changes."""

import gc
import json
import weakref
from pathlib import Path

import numpy as np
import pytest

from recllm.sessions import compute, open_session, placed

onnx = pytest.importorskip("onnx")


@pytest.fixture(scope="module")
def product():
    """x · y, with y = 2 where it is left out."""
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    x, y, z = (helper.make_tensor_value_info(name, kind, ["n"]) for name in "xyz")
    two = helper.make_tensor("y", kind, [1], [2.0])
    y = helper.make_tensor_value_info("y", kind, [1])
    graph = helper.make_graph([helper.make_node("Mul", ["x", "y"], ["z"])], "product", [x, y], [z], [two])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return open_session(model.SerializeToString(), threads=1)


def test_arrays_placed_values_and_inputs_that_are_left_out_go_together(product):
    x = np.arange(5, dtype=np.float32)
    there = placed(product, {"y": np.full(1, 3, dtype=np.float32)})
    assert compute(product, {"x": x})[0].tolist() == [0, 2, 4, 6, 8]
    assert compute(product, {"x": x} | there)[0].tolist() == [0, 3, 6, 9, 12]
    assert compute(product, {"x": x[::2], "y": np.full(1, 3, dtype=np.float32)})[0].tolist() == [0, 6, 12]


def test_a_sum_and_its_layer_norm_stay_two_kernels_on_a_cpu(monkeypatch, tmp_path):
    import onnxruntime as ort

    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    x, y, z = (helper.make_tensor_value_info(name, kind, ["rows", "length", 8]) for name in "xyz")
    ones = helper.make_tensor("ones", kind, [8], [1.0] * 8)
    nodes = [
        helper.make_node("Add", ["x", "y"], ["sum"]),
        helper.make_node("LayerNormalization", ["sum", "ones", "ones"], ["z"], axis=-1),
    ]
    graph = helper.make_graph(nodes, "residual", [x, y], [z], [ones])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString()

    plain = ort.SessionOptions

    def profiled():
        options = plain()
        options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
        return options

    def kernels(session):
        rows = np.random.default_rng(0).normal(size=(2, 3, 8)).astype(np.float32)
        found = session.run(None, {"x": rows, "y": rows})[0]
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        return found, {event["args"]["op_name"] for event in events if event.get("cat") == "Node"}

    fused, names = kernels(ort.InferenceSession(model, profiled(), providers=["CPUExecutionProvider"]))
    assert names == {"SkipLayerNormalization"}  # as it is left to itself
    monkeypatch.setattr(ort, "SessionOptions", profiled)
    apart, names = kernels(open_session(model))
    assert names == {"Add", "LayerNormalization"}
    assert np.abs(fused - apart).max() < 1e-5


class Forgetful:
    """A session whose bindings hold none of their inputs, as before onnxruntime 1.30."""

    def __init__(self, session):
        self.session, self.given = session, []

    def __getattr__(self, name):
        return getattr(self.session, name)

    def io_binding(self):
        binding = self.session.io_binding()
        binding.bind_ortvalue_input = lambda name, value: self.bind(binding, name, value)
        return binding

    def bind(self, binding, name, value):
        binding._iobinding.bind_ortvalue_input(name, value._ortvalue)
        self.given.append(weakref.ref(value))

    def run_with_iobinding(self, binding):
        gc.collect()
        assert len(self.given) == 2
        assert all(value() is not None for value in self.given)
        self.session.run_with_iobinding(binding)


def test_what_a_graph_reads_is_held_until_it_has_run(product):
    x = np.arange(10, dtype=np.float32)[::2]  # copied on the way, so that nobody else holds it
    assert compute(Forgetful(product), {"x": x, "y": np.full(1, 3, dtype=np.float32)})[0].tolist() == [0, 6, 12, 18, 24]


def test_outputs_that_stay_feed_the_next_call_without_being_fetched(product):
    (first,) = compute(product, {"x": np.ones(4, dtype=np.float32)}, stay=True)
    assert not isinstance(first, np.ndarray)
    (second,) = compute(product, {"x": first})
    assert second.tolist() == [4, 4, 4, 4]
    assert first.numpy().tolist() == [2, 2, 2, 2]


def test_answers_and_placed_arrays_outlive_what_made_them(product):
    answers = [compute(product, {"x": np.full(1000, row, dtype=np.float32)})[0] for row in range(100)]
    there = placed(product, {"y": np.full(1, 7, dtype=np.float32)})
    gc.collect()
    junk = [np.full(1000, -1, dtype=np.float32) for _ in range(100)]
    assert all((answer == 2 * row).all() for row, answer in enumerate(answers))
    assert (compute(product, {"x": -junk[0]} | there)[0] == 7).all()

"""Weight-only quantisation: damage is measured on samples, and the layers that lose most get 8 bits."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from recllm import weightonly
from recllm.errors import RecllmError
from recllm.gate import ExportRecipe
from recllm.recipes import parse
from recllm.sessions import open_session
from recllm.weightonly import WeightSettings, layer_damages, quantise_weights

WIDTH = 64
FOUR = WeightSettings(bits=4, algorithm="hqq", max_damage=0.001)


def weights_of(seed, outliers=False):
    weights = np.random.default_rng(seed).normal(size=(WIDTH, WIDTH)).astype(np.float32)
    if outliers:
        weights[::8] *= 40.0  # in every block a few that leave the others no steps
    return weights


@pytest.fixture
def graph(tmp_path):
    """Two layers beside each other and one behind them; `hard` has outliers, and reads what is small there."""
    layers = {"easy": weights_of(1), "hard": weights_of(2, outliers=True), "last": weights_of(3)}
    nodes = [
        helper.make_node("MatMul", ["x", "easy"], ["a"], name="node easy"),
        helper.make_node("MatMul", ["x", "hard"], ["b"], name="node hard"),
        helper.make_node("Add", ["a", "b"], ["c"]),
        helper.make_node("MatMul", ["c", "last"], ["y"], name="node last"),
    ]
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", WIDTH]) for name in ("x", "y")]
    tensors = [numpy_helper.from_array(array, name) for name, array in layers.items()]
    made = helper.make_graph(nodes, "g", value[:1], value[1:], tensors)
    path = tmp_path / "graph.onnx"
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


@pytest.fixture
def samples():
    x = np.random.default_rng(0).normal(size=(6, WIDTH)).astype(np.float32)
    x[:, ::8] *= 0.01  # the outliers of `hard` say little, and cost the others their steps
    return [{"x": x[:2]}, {"x": x[2:]}]


def answers(path, samples):
    return np.concatenate([open_session(path).run(None, feeds)[0] for feeds in samples])


def lost(path, other, samples):
    expected, found = answers(path, samples), answers(other, samples)
    return float(((expected - found) ** 2).sum() / (expected**2).sum())


def test_the_damage_of_a_layer_is_what_its_own_output_loses(graph, samples, tmp_path):
    seen = []

    def quantised(model):
        seen.append([node.op_type for node in model.graph.node])
        return weightonly._quantised(model, FOUR, frozenset())

    damages = layer_damages(onnx.load(graph), samples, quantised)
    assert list(damages) == ["node easy", "node hard", "node last"]
    assert seen == [["MatMul"]] * 3
    assert damages["node hard"] > 5 * damages["node easy"] > 0
    # By hand: only the layer itself in few bits, on what it reads in the unharmed graph.
    model = onnx.load(graph)
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info("b", TensorProto.FLOAT, ["rows", WIDTH]))
    only = tmp_path / "only.onnx"
    onnx.save(weightonly._quantised(model, FOUR, frozenset()), only)
    x = np.concatenate([feeds["x"] for feeds in samples])
    expected = x @ weights_of(2, outliers=True)
    found = answers(only, samples)
    assert damages["node hard"] == pytest.approx(((expected - found) ** 2).sum() / (expected**2).sum(), rel=1e-3)


def bits(path):
    """Bits of every quantised layer."""
    nodes = [node for node in onnx.load(path).graph.node if node.op_type == "MatMulNBits"]
    return [next(key.i for key in node.attribute if key.name == "bits") for node in nodes]


def test_the_worst_layers_get_8_bits_until_the_graph_keeps_its_limit(graph, samples, tmp_path, monkeypatch):
    monkeypatch.setattr(weightonly, "SHARES", (0.0, 1 / 3, 1.0))
    alike = tmp_path / "alike.onnx"
    assert quantise_weights(graph, alike, FOUR.model_copy(update={"max_damage": None})) is None
    assert bits(alike) == [4, 4, 4]
    assert lost(graph, alike, samples) > 0.01

    target = tmp_path / "mixed.onnx"
    report = quantise_weights(graph, target, FOUR.model_copy(update={"max_damage": 0.02}), samples)
    assert report["higher"] == ["node hard"]
    assert sorted(bits(target)) == [4, 4, 8]
    assert list(report["graph"]) == ["0", "0.333333"]
    assert report["graph"]["0"] > 0.02 >= report["graph"]["0.333333"]
    assert lost(graph, target, samples) < lost(graph, alike, samples) / 2

    strict = quantise_weights(graph, target, FOUR.model_copy(update={"max_damage": 1e-9}), samples)
    assert bits(target) == [8, 8, 8]  # the best there is, and the gate judges it
    assert len(strict["higher"]) == 3
    assert strict["graph"]["1"] < strict["graph"]["0"] / 2


def test_a_graph_loses_what_the_worst_of_its_outputs_does(graph, samples, tmp_path, monkeypatch):
    monkeypatch.setattr(weightonly, "SHARES", (0.0,))
    model = onnx.load(graph)
    model.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", WIDTH]) for name in "ba")
    onnx.save(model, graph)
    report = quantise_weights(graph, tmp_path / "out.onnx", FOUR, samples)
    found = [[open_session(path).run(None, feeds) for feeds in samples] for path in (graph, tmp_path / "out.onnx")]
    losses = [
        ((expected - own) ** 2).sum() / (expected**2).sum()
        for one, other in zip(*found, strict=True)
        for expected, own in zip(one, other, strict=True)
    ]
    assert report["graph"]["0"] == pytest.approx(max(losses), rel=1e-3)
    assert max(losses) > 1.5 * min(losses)


def test_without_samples_nothing_can_be_measured(graph, tmp_path):
    target = tmp_path / "out.onnx"
    with pytest.raises(RecllmError, match=r"measured on training histories, and there is none for graph.onnx"):
        quantise_weights(graph, target, FOUR)
    assert not target.exists()
    assert quantise_weights(graph, target, WeightSettings()) is None
    assert bits(target) == [8, 8, 8]


@pytest.mark.parametrize("bias", [True, False])
def test_layers_that_add_a_bias_are_quantised_too(bias, graph, samples, tmp_path):
    """As GPT-2's are exported; one that is scaled or turned is left as it is."""
    model = onnx.load(graph)
    first, second = model.graph.node[:2]
    first.op_type = second.op_type = "Gemm"
    first.input.extend(["bias"] if bias else [])
    second.attribute.append(helper.make_attribute("alpha", 0.5))
    model.graph.initializer.append(numpy_helper.from_array(np.arange(WIDTH, dtype=np.float32), "bias"))
    onnx.save(model, graph)
    target = tmp_path / "out.onnx"
    report = quantise_weights(graph, target, FOUR.model_copy(update={"max_damage": 10.0}), samples)
    assert bits(target) == [4, 4]
    assert list(report["layers"]) == ["node easy", "node last"]
    kinds = [node.op_type for node in onnx.load(target).graph.node]
    assert (kinds.count("Gemm"), kinds.count("Add")) == (1, 1 + bias)
    assert 0 < lost(graph, target, samples) < 0.05


@pytest.mark.parametrize("key", [{"alpha": 0.5}, {"beta": 2.0}, {"transA": 1}, {"transB": 1}], ids=str)
def test_what_is_scaled_or_turned_is_no_plain_product(key):
    nodes = [
        helper.make_node("Gemm", ["x", "w", "b"], ["y"], name="plain", alpha=1.0, transB=0),
        helper.make_node("Gemm", ["y", "w", ""], ["z"], name="without"),
        helper.make_node("Gemm", ["z", "w", "b"], ["own"], name="own", **key),
        helper.make_node("Gemm", ["own", "given", "b"], ["last"], name="no weight"),
    ]
    graph = helper.make_graph(nodes, "g", [], [], [numpy_helper.from_array(np.eye(4, dtype=np.float32), "w")])
    model = helper.make_model(graph)
    weightonly.split_products(model)
    found = [(node.op_type, list(node.input), list(node.output), node.name) for node in model.graph.node]
    assert found[:3] == [
        ("MatMul", ["x", "w"], ["y product"], "plain"),
        ("Add", ["y product", "b"], ["y"], ""),
        ("MatMul", ["y", "w"], ["z"], "without"),
    ]
    assert [(kind, name) for kind, _, _, name in found[3:]] == [("Gemm", "own"), ("Gemm", "no weight")]


def test_a_graph_without_layers_has_no_bits_to_choose(graph, samples, tmp_path):
    model = onnx.load(graph)
    for node in model.graph.node:
        node.op_type = "Gemm" if node.op_type == "MatMul" else node.op_type
        if node.op_type == "Gemm":
            node.attribute.append(helper.make_attribute("alpha", 0.5))
    onnx.save(model, graph)
    with pytest.raises(RecllmError, match=r"graph\.onnx has none that is exported so\. Take the export recipe fp16"):
        quantise_weights(graph, tmp_path / "out.onnx", FOUR, samples)


def test_layers_without_a_name_and_with_one_weight_are_told_apart(graph, samples, tmp_path, monkeypatch):
    monkeypatch.setattr(weightonly, "SHARES", (0.0, 0.2))
    model = onnx.load(graph)
    del model.graph.node[2:]
    more = [("b", "easy", "c"), ("a", "hard", "d"), ("d", "last", "e")]
    nodes = [helper.make_node("MatMul", [left, weight], [out]) for left, weight, out in more]
    model.graph.node.extend([*nodes, helper.make_node("Add", ["c", "e"], ["y"])])
    onnx.save(model, graph)
    target = tmp_path / "out.onnx"
    report = quantise_weights(graph, target, FOUR.model_copy(update={"max_damage": 1e-9}), samples)
    assert len(report["layers"]) == 5
    assert list(report["graph"]) == ["0", "0.2"]
    assert len(report["higher"]) == 2  # both layers of one weight, though a fifth is one layer
    assert sorted(bits(target)) == [4, 4, 4, 8, 8]


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"precision": "int4"}, "precision 'int4' and .causal. bits = 8 do not fit together"),
        ({"precision": "int8", "causal": {"bits": 4}}, "precision 'int8' and .causal. bits = 4 do not fit together"),
        ({"precision": "int8", "causal": {"algorithm": "hqq"}}, "'hqq' is for bits = 4"),
        ({"precision": "int4", "causal": {"bits": 4, "algorithm": "hqq", "accuracy_level": 4}}, "accuracy_level = 0"),
        ({"precision": "int4", "causal": {"bits": 4, "block_size": 20}}, "block_size"),
        (
            {"precision": "int8", "opset": 20, "causal": {"activations": "int8", "max_damage": 0.01}},
            "activations = 'int8' needs opset 21 or more, and not 20",
        ),
    ],
)
def test_a_recipe_whose_keys_do_not_fit_is_refused(recipe, message):
    whole = {"opset": 23, "tolerance": {"rank_correlation": 0.9, "top10_overlap": 0.9}} | recipe
    with pytest.raises(RecllmError, match=message):
        parse(ExportRecipe, whole, "few.toml")


def test_half_quadratic_quantisation_does_less_damage_than_rounding(graph, samples, tmp_path):
    found = {}
    for algorithm in ("rtn", "hqq"):
        target = tmp_path / f"{algorithm}.onnx"
        quantise_weights(graph, target, WeightSettings(bits=4, algorithm=algorithm))
        found[algorithm] = lost(graph, target, samples)
    assert found["hqq"] < found["rtn"]


@pytest.fixture
def reading(tmp_path):
    """Two tables of embeddings, one of which is a matrix too, and a small one; a layer behind their sum."""
    rng = np.random.default_rng(0)
    sizes = {"words": 2000, "tied": 1024, "places": 32}
    tables = {name: rng.normal(size=(rows, WIDTH)).astype(np.float32) for name, rows in sizes.items()}
    tables["words"] *= rng.exponential(size=(2000, 1)).astype(np.float32)  # rows of many sizes
    tables["words"][7] = 0.0
    nodes = [
        *(helper.make_node("Gather", [name, f"{name}_ids"], [f"{name} found"], name=name) for name in tables),
        helper.make_node("Sum", [f"{name} found" for name in tables], ["sum"]),
        helper.make_node("MatMul", ["sum", "layer"], ["y"], name="layer"),
        helper.make_node("Gemm", ["sum", "tied"], ["logits"], transB=1, name="output"),
    ]
    given = [helper.make_tensor_value_info(f"{name}_ids", TensorProto.INT64, ["rows"]) for name in tables]
    results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", None]) for name in ("y", "logits")]
    tensors = [numpy_helper.from_array(own, name) for name, own in (tables | {"layer": weights_of(1)}).items()]
    path = tmp_path / "reading.onnx"
    made = helper.make_graph(nodes, "g", given, results, tensors)
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path, {
        name: np.array([0, 7, rows - 1, 3]) % rows for name, rows in ((f"{n}_ids", r) for n, r in sizes.items())
    }


@pytest.mark.parametrize("settings", [WeightSettings(), WeightSettings(bits=4, algorithm="hqq", max_damage=0.01)])
def test_large_tables_of_embeddings_take_8_bits(settings, reading, tmp_path):
    path, feeds = reading
    quantise_weights(path, tmp_path / "small.onnx", settings, [feeds])
    tensors = {own.name: own for own in onnx.load(tmp_path / "small.onnx").graph.initializer}
    assert tensors["words_steps"].data_type == TensorProto.INT8
    assert "words" not in tensors
    assert {"tied", "places"} <= tensors.keys()  # one is read as a matrix too, the other is small
    expected, found = (open_session(own).run(["words found"], feeds)[0] for own in shown(path, tmp_path))
    step = np.abs(expected).max(1, keepdims=True) / 127
    assert (np.abs(found - expected) <= step / 2 + 1e-6).all()
    assert not np.array_equal(found, expected)


def shown(path, folder):
    """The graphs with what is read of the words as an output."""
    for name in (path, folder / "small.onnx"):
        model = onnx.load(name)
        model.graph.output.append(helper.make_tensor_value_info("words found", TensorProto.FLOAT, None))
        onnx.save(model, folder / f"shown-{name.name}")
        yield folder / f"shown-{name.name}"

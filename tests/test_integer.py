"""Integer products: near the float ones, one weight for several graphs, and floats where too much is lost."""

import sys

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from recllm import integer
from recllm.errors import RecllmError
from recllm.graphfiles import open_model
from recllm.integer import _Layer, _round, quantise_products
from recllm.sessions import INTEGERS, check_integer_products
from recllm.turning import hadamard
from recllm.weightonly import WeightSettings

SETTINGS = WeightSettings(activations="int8", max_damage=0.01)
WIDTH = 64


def weight(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32) / shape[0] ** 0.5


def write(path, layers):
    """A chain of products with weights, by their names."""
    names = ["x", *(f"h{place}" for place in range(len(layers)))]
    nodes = [helper.make_node("MatMul", [names[at], name], [names[at + 1]]) for at, name in enumerate(layers)]
    given = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", "rows", WIDTH])
    found = helper.make_tensor_value_info(names[-1], onnx.TensorProto.FLOAT, None)
    held = [numpy_helper.from_array(value, name) for name, value in layers.items()]
    graph = helper.make_graph(nodes, "chain", [given], [found], held)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10), path)


@pytest.fixture
def graphs(tmp_path):
    """Two graphs that share their first weight; the second one has a layer that turns as well."""
    (tmp_path / "fp32").mkdir()
    (tmp_path / "out").mkdir()
    first, turn = weight(0, WIDTH, WIDTH), hadamard(WIDTH).numpy()
    write(tmp_path / "fp32" / "a.onnx", {"one": first, "two": weight(1, WIDTH, 32)})
    write(tmp_path / "fp32" / "b.onnx", {"uno": first, "turn": turn, "tre": weight(2, WIDTH, 16)})
    return sorted((tmp_path / "fp32").glob("*.onnx")), tmp_path / "out"


def samples():
    rng = np.random.default_rng(3)
    mixed = rng.normal(size=(8, WIDTH)).astype(
        np.float32
    )  # eight directions: what one place loses another makes up for
    draw = [rng.normal(size=(2, 50, 8)).astype(np.float32) @ mixed for _ in range(3)]
    return {"a": [{"x": rows} for rows in draw], "b": [{"x": rows} for rows in draw]}


def in_floats(model):
    """The same sums in float32, which holds them whole: for processors whose 8-bit products overflow."""
    nodes = []
    for node in model.graph.node:
        if node.op_type != "MatMulIntegerToFloat":
            nodes.append(node)
            continue
        rows, steps, step, scales, middle = node.input
        found = node.output[0]
        # Not DequantizeLinear: ONNX Runtime would make the integer product of it again.
        casts = {name: f"{found} {name}" for name in (rows, steps, middle)}
        nodes += [helper.make_node("Cast", [name], [cast], to=onnx.TensorProto.FLOAT) for name, cast in casts.items()]
        nodes += [
            helper.make_node("Sub", [casts[rows], casts[middle]], [f"{found} whole"]),
            helper.make_node("Mul", [f"{found} whole", step], [f"{found} rows"]),
            helper.make_node("Mul", [casts[steps], scales], [f"{found} weight"]),
            helper.make_node("MatMul", [f"{found} rows", f"{found} weight"], [found]),
        ]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def as_it_is(model):
    return model


@pytest.fixture(autouse=True)
def exact(overflows, monkeypatch):
    """Graphs are run as they are made, where the processor can."""
    monkeypatch.setattr(sys.modules[__name__], "run_as", in_floats if overflows else as_it_is)


run_as = as_it_is


def outputs(path, feeds):
    return open_model(run_as(onnx.load(path))).run(None, feeds)


def answers(path, rows):
    return outputs(path, {"x": rows})[0]


def kinds(path):
    return [node.op_type for node in onnx.load(path).graph.node if "MatMul" in node.op_type]


def test_products_of_integers_are_near_those_of_floats(graphs):
    sources, out = graphs
    report = quantise_products(sources, out, SETTINGS, samples(), lambda folder: 0.001)
    assert report["graph"] == {"floats 0": 0.001}
    assert report["higher"] == []
    assert len(report["layers"]) == 4  # both graphs' but for the one that turns
    assert all(0 < damage < 1e-3 for damage in report["layers"].values())
    assert kinds(out / "a.onnx") == ["MatMulIntegerToFloat"] * 2
    assert kinds(out / "b.onnx") == ["MatMulIntegerToFloat", "MatMul", "MatMulIntegerToFloat"]
    rows = samples()["a"][0]["x"][:, :7].copy()
    rows[0, 0] *= 1e4  # a row's own scale: the others lose nothing by it
    rows[1, 0] = 0.0
    for path in sources:
        expected, found = answers(path, rows), answers(out / path.name, rows)
        off = np.linalg.norm(found - expected, axis=-1) / np.maximum(np.linalg.norm(expected, axis=-1), 1e-6)
        assert off.max() < 0.03
        assert not found[1, 0].any()


def test_a_weight_of_two_graphs_is_rounded_once(graphs):
    sources, out = graphs
    quantise_products(sources, out, SETTINGS, samples(), lambda folder: 0.0)
    held = [
        {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(out / path.name).graph.initializer}
        for path in sources
    ]
    for part in ("steps", "scales"):
        assert np.array_equal(held[0][f"one_{part}"], held[1][f"uno_{part}"])
    assert held[0]["one_steps"].dtype == np.int8
    assert "one" not in held[0]


def test_layers_that_are_rounded_a_few_at_a_time_are_the_same(graphs, monkeypatch):
    """A few at a time, for what GPTQ keeps of the inputs of all layers at once is larger than the model."""
    sources, out = graphs
    made, runs, opened = [], [], integer.open_model
    monkeypatch.setattr(integer, "open_model", lambda model: runs.append(len(model.graph.output)) or opened(model))
    for room, expected in ((1 << 30, [2, 2]), (2 * 8 * WIDTH**2, [2, 1, 1]), (1, [1, 1, 1, 1])):
        monkeypatch.setattr(integer, "PRODUCT_BYTES", room)
        runs.clear()
        report = quantise_products(sources, out, SETTINGS, samples(), lambda folder: 0.0)
        assert runs == expected  # inputs that were looked at, graph by graph; both read the first layer's
        made.append(([path.read_bytes() for path in sorted(out.glob("*.onnx"))], report))
    assert made[0] == made[1] == made[2]


def test_a_weight_of_two_graphs_is_rounded_for_what_both_give_it(graphs):
    sources, out = graphs
    given = samples()
    given["b"] = [{"x": feeds["x"][:, ::-1, ::-1] * 3.0} for feeds in given["b"]]
    report = quantise_products(sources, out, SETTINGS, given, lambda folder: 0.0)
    rows = [np.concatenate([feeds["x"].reshape(-1, WIDTH) for feeds in given[name]]) for name in "ab"]
    products = sum((own.T @ own).astype(np.float64) for own in rows)
    alone = _Layer(weight(0, WIDTH, WIDTH), products, sum(float((np.abs(own).max(1) ** 2).sum()) for own in rows))
    _round(alone)
    shared = [damage for name, damage in report["layers"].items() if name in ("a: layer 0", "b: layer 0")]
    assert shared == pytest.approx([alone.damage] * 2, rel=1e-5)


def test_as_many_layers_are_rounded_at_once_as_have_room(monkeypatch):
    monkeypatch.setattr(integer, "PRODUCT_BYTES", 2 * 8 * WIDTH**2)
    layers = {str(width): _Layer(np.zeros((width, 4), np.float32)) for width in (WIDTH, 63, 62, 61, 2 * WIDTH, 8)}
    assert [list(group) for group in integer._groups(layers)] == [["64", "63"], ["62", "61"], ["128"], ["8"]]


def test_the_worst_layers_keep_floats_until_enough_is_kept(graphs):
    sources, out = graphs
    left = iter([0.5, 0.2, 0.001])
    report = quantise_products(sources, out, SETTINGS, samples(), lambda folder: next(left))
    # Three weights: an eighth of them is none, a quarter is one, half are two.
    assert report["graph"] == {"floats 0": 0.5, "floats 0.25": 0.2, "floats 0.5": 0.001}
    damages = report["layers"]
    assert min(damages[name] for name in report["higher"]) >= max(
        damages[name] for name in damages if name not in report["higher"]
    )
    made = [*kinds(out / "a.onnx"), *kinds(out / "b.onnx")]
    assert made.count("MatMulNBits") == len(report["higher"])
    assert made.count("MatMul") == 1  # what turns stays as it is


def test_rounding_by_what_the_inputs_have_in_common_loses_less():
    rows = samples()["a"][0]["x"].reshape(-1, WIDTH).astype(np.float64)
    layer = _Layer(weight(4, WIDTH, 24), rows.T @ rows)
    _round(layer)
    scales = np.abs(layer.weight).max(0) / 127
    nearest = np.rint(layer.weight / scales) * scales
    assert layer.scales == pytest.approx(scales)
    by_common = np.linalg.norm(rows @ (layer.weight - layer.steps * layer.scales))
    assert by_common < 0.5 * np.linalg.norm(rows @ (layer.weight - nearest))


def test_settings_that_do_not_fit_are_refused():
    for keys in ({"max_damage": None}, {"bits": 4, "max_damage": 0.01}):
        with pytest.raises(ValueError, match="activations = 'int8' goes with bits = 8 and max_damage"):
            WeightSettings(activations="int8", **keys)


def held_whole(rng, *shape):
    """Weights that 8 bits hold."""
    whole = rng.integers(-127, 128, size=shape).astype(np.float32)
    whole[0] = 127
    return whole


def with_answers(path):
    """Let a graph be told where answers are read, of three candidates with four, one and two tokens of five."""
    model = onnx.load(path)
    ends = helper.make_tensor_value_info("ends", onnx.TensorProto.INT64, ["users", "candidates"])
    read = [
        helper.make_node("Reshape", ["ends", "flat"], ["ends_flat"]),
        helper.make_node("Identity", ["ends_flat"], ["read"]),
    ]
    model.graph.input.append(ends)
    model.graph.node.extend(read)
    model.graph.initializer.append(numpy_helper.from_array(np.array([-1], np.int64), "flat"))
    model.graph.output.append(helper.make_tensor_value_info("read", onnx.TensorProto.INT64, None))
    onnx.save(model, path)
    return {"x": samples()["a"][0]["x"][0, :15].reshape(3, 5, WIDTH), "ends": np.array([[3, 0, 1]])}


def lost(path, made, feeds, output=0):
    """What rows of an output are off by, as a share of their length: those of answers, and the others."""
    expected, found = (outputs(own, feeds)[output] for own in (path, made))
    off = np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    answers = np.zeros(off.shape, dtype=bool)
    answers[[0, 1, 2], [3, 0, 1]] = True
    return off[answers], off[~answers]


@pytest.mark.parametrize("losses", [(0.0,), (0.5, 0.0), (0.5, 0.5, 0.0), (0.5, 0.5, 0.5, 0.0)])
def test_rows_that_answers_are_read_at_are_rounded_twice_in_as_many_layers_as_it_takes(tmp_path, losses):
    (tmp_path / "out").mkdir()
    rng, left = np.random.default_rng(0), iter(losses)
    path, made = tmp_path / "suffix.onnx", tmp_path / "out" / "suffix.onnx"
    write(path, {f"layer {place}": held_whole(rng, WIDTH, WIDTH) for place in range(6)})
    feeds = with_answers(path)
    report = quantise_products([path], made.parent, SETTINGS, {"suffix": [feeds] * 20}, lambda folder: next(left))
    tried = {
        f"answers twice {share}, floats 0": loss for share, loss in zip((0.33, 0.5, 0.67, 1), losses, strict=False)
    }
    assert report["graph"] == tried
    twice = (2, 3, 4, 6)[len(losses) - 1]
    assert [node.op_type for node in onnx.load(made).graph.node].count("ScatterND") == twice
    answers, others = lost(path, made, feeds)
    assert others.min() > 2e-3
    assert (answers.max() < 2e-4) == (twice == 6)


def test_a_model_of_few_layers_is_tried_once_as_it_is(tmp_path):
    """A third, half and two thirds of two layers are one."""
    (tmp_path / "out").mkdir()
    path, left = tmp_path / "suffix.onnx", iter((0.5, 0.0))
    write(path, {"one": weight(0, WIDTH, WIDTH), "two": weight(1, WIDTH, WIDTH)})
    feeds = with_answers(path)
    report = quantise_products([path], tmp_path / "out", SETTINGS, {"suffix": [feeds] * 20}, lambda folder: next(left))
    assert report["graph"] == {"answers twice 0.33, floats 0": 0.5, "answers twice 1, floats 0": 0.0}


@pytest.mark.parametrize("losses", [(0.0,), (0.5, 0.0)])
def test_answers_behind_a_turned_models_norm_are_rounded_twice_where_two_layers_read_them(tmp_path, losses):
    (tmp_path / "out").mkdir()
    rng, left = np.random.default_rng(0), iter(losses)
    path, made = tmp_path / "suffix.onnx", tmp_path / "out" / "suffix.onnx"
    write(path, {"one": held_whole(rng, WIDTH, WIDTH), "turn": hadamard(WIDTH).numpy()})
    model = onnx.load(path)
    model.graph.node[0].input[0] = "normed"
    model.graph.node.insert(0, helper.make_node("RMSNormalization", ["x", "norm"], ["normed"], epsilon=1e-6))
    model.graph.node.append(helper.make_node("MatMul", ["normed", "other"], ["side"]))
    model.graph.output.append(helper.make_tensor_value_info("side", onnx.TensorProto.FLOAT, None))
    for value, name in ((np.ones(WIDTH, np.float32), "norm"), (held_whole(rng, WIDTH, 32), "other")):
        model.graph.initializer.append(numpy_helper.from_array(value, name))
    onnx.save(model, path)
    feeds = with_answers(path)
    report = quantise_products([path], made.parent, SETTINGS, {"suffix": [feeds] * 20}, lambda folder: next(left))
    kinds = [node.op_type for node in onnx.load(made).graph.node]
    assert kinds.count("ReduceMax") == 1  # of what rounding has lost of the answers, once for both layers
    both = len(losses) == 2
    assert kinds.count("ScatterND") == 1 + both
    for output, twice in ((0, both), (1, True)):
        answers, others = lost(path, made, feeds, output)
        assert others.min() > 2e-3
        assert (answers.max() < 1e-4) == twice
    # Damage is what is measured, but for the answers, which it takes for rows like others.
    for damage, output in zip(report["layers"].values(), (0, 1), strict=True):
        assert damage == pytest.approx((lost(path, made, feeds, output)[1] ** 2).mean(), rel=0.4)


def test_the_same_sums_in_floats_are_those_of_integers(graphs, overflows):
    if overflows:
        pytest.skip("this processor's integer products overflow (no VNNI)")
    sources, out = graphs
    quantise_products(sources, out, SETTINGS, samples(), lambda folder: 0.0)
    feeds = {"x": samples()["a"][0]["x"][:, :7]}
    for path in out.glob("?.onnx"):
        expected = outputs(path, feeds)[0]
        (found, *_) = open_model(in_floats(onnx.load(path))).run(None, feeds)
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_a_bundle_with_integer_products_is_refused_where_they_overflow(graphs, overflows):
    sources, out = graphs
    check_integer_products(out, "cuda")  # it has none yet
    quantise_products(sources, out, SETTINGS, samples(), lambda folder: 0.0)
    if not overflows:
        check_integer_products(out, "cpu")
    with pytest.raises(RecllmError, match=r"for a CPU only, not for 'cuda'. Export the run with another recipe"):
        check_integer_products(out, "cuda")
    probe = onnx.load(out / INTEGERS)
    scales = next(tensor for tensor in probe.graph.initializer if tensor.name == "scales")
    scales.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scales) * np.float32(0.99), "scales"))
    onnx.save(probe, out / INTEGERS)  # as a processor whose sums fall short
    with pytest.raises(RecllmError, match=r"this processor's overflow .* Export the run with another recipe"):
        check_integer_products(out, "cpu")


@pytest.mark.parametrize(("turned", "weights"), [(True, 1.0), (True, 2.0), (False, 1.0)])
def test_rows_behind_the_norms_of_a_turned_model_share_one_step(graphs, turned, weights):
    """Others have their own, for they may be of any size or have outliers."""
    sources, out = graphs
    path = sources[1] if turned else sources[0]
    model = onnx.load(path)
    name = model.graph.input[0].name
    for node in model.graph.node:
        node.input[:] = ["normed" if own == name else own for own in node.input]
    model.graph.initializer.append(numpy_helper.from_array(np.full(WIDTH, weights, np.float32), "norm"))
    model.graph.node.insert(0, helper.make_node("RMSNormalization", [name, "norm"], ["normed"], epsilon=1e-6))
    onnx.save(model, path)
    given = samples()[path.stem]
    report = quantise_products([path], out, SETTINGS, {path.stem: given}, lambda folder: 0.0)
    largest = [node.input[0] for node in onnx.load(out / path.name).graph.node if node.op_type == "ReduceMax"]
    shared = turned and weights == 1.0
    assert ("normed" in largest) != shared
    rows = np.concatenate([given[0]["x"][:, :7] * 100.0, given[0]["x"][:, 7:9] * 0.01], 1)
    expected, found = answers(path, rows), answers(out / path.name, rows)
    off = np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert off.max() < 0.03
    assert all(0 < damage < 1e-3 for damage in report["layers"].values())


def test_where_all_layers_keep_floats_no_product_is_tried(graphs):
    sources, out = graphs
    quantise_products(sources, out, SETTINGS, samples(), lambda folder: 0.5)
    assert not (out / INTEGERS).exists()


def test_a_model_without_products_of_weights_is_told_what_to_take(tmp_path):
    write(tmp_path / "a.onnx", {"one": weight(0, WIDTH, WIDTH)})
    model = onnx.load(tmp_path / "a.onnx")
    model.graph.node[0].op_type = "Gemm"  # as GPT-2's layers are exported
    onnx.save(model, tmp_path / "a.onnx")
    with pytest.raises(RecllmError, match=r"this model has none .* Take the export recipe int8, fp16 or fp32"):
        quantise_products([tmp_path / "a.onnx"], tmp_path, SETTINGS, {"a": []}, lambda folder: 0.0)

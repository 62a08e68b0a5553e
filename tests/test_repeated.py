"""Layers traced once: the graphs are those of the whole model, whatever kinds of layers it has."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers

from recllm.adapters import attach, load_adapter
from recllm.cascade import read_prefix
from recllm.lm import given_positions
from recllm.repeated import DOMAIN, repeated_layers
from recllm.runs import AdapterSettings
from recllm.tracing import write_graph

FOUR = {"num_hidden_layers": 4}
WINDOWS = {"sliding_window": 7, "max_window_layers": 2}
KINDS = {
    "Llama": (FOUR, [0, 0, 0, 0]),
    "Qwen2": (FOUR | WINDOWS, [0, 0, 2, 2]),
    "Qwen3": (FOUR, [0, 0, 0, 0]),
    "Mistral": (FOUR, [0, 0, 0, 0]),
    "Gemma": (FOUR, [0, 0, 0, 0]),
    "Gemma2": (FOUR, [0, 1, 0, 1]),
    "Gemma3Text": (FOUR | {"layer_types": ["sliding_attention", "full_attention"] * 2}, [0, 1, 0, 1]),
    "Phi3": (FOUR, [0, 0, 0, 0]),
}


class Reading(torch.nn.Module):
    """Hidden states of ids."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, ids):
        given = given_positions(ids.shape[0], ids.shape[1], ids.device)
        return self.body(input_ids=ids, use_cache=False, **given).last_hidden_state


class Prefixes(Reading):
    """Keys and values of ids."""

    def forward(self, ids):
        prefix = read_prefix(self.body, ids, torch.zeros(0, dtype=torch.long))
        return torch.stack(prefix.keys), torch.stack(prefix.values)


def written(module, path, *names):
    """The graph of a module of ids, which are float32 answers; other batches and lengths are asked of it."""
    example = {name: (torch.ones(2, 5, dtype=torch.long), ("batch", f"{name}_length")) for name in names}
    write_graph(module, example, path, ("first", "second") if isinstance(module, Prefixes) else ("first",), 23)
    return onnx.load(path)


def differences(module, path, *shapes):
    """Largest differences of the graph's answers from torch's, each as a share of the largest answer."""
    rng = np.random.default_rng(0)
    asked = [rng.integers(1, 64, shape) for shape in shapes]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = ["first", "second"][: len(session.get_outputs())]
    found = session.run(names, dict(zip([own.name for own in session.get_inputs()], asked, strict=True)))
    with torch.no_grad():
        expected = module(*map(torch.from_numpy, asked))
    expected = expected if isinstance(expected, tuple) else (expected,)
    return [float(np.abs(one - two.numpy()).max() / two.abs().max()) for one, two in zip(found, expected, strict=True)]


IDS = (torch.ones(2, 5, dtype=torch.long),)


@pytest.mark.parametrize("family", list(KINDS))
def test_layers_of_a_family_are_of_few_kinds(family, tiny_family):
    config, kinds = KINDS[family]
    assert repeated_layers(Reading(tiny_family(family, **config)), IDS).kinds == kinds


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Gemma2", "Gemma3Text", "Phi3"])
def test_each_kind_of_layer_is_traced_once(family, tiny_family, tmp_path):
    module = Reading(tiny_family(family, **KINDS[family][0]))
    graph = written(module, tmp_path / "graph.onnx", "ids").graph
    assert not any(node.domain == DOMAIN for node in graph.node)
    assert any(own.name.startswith("layers.3.") for own in graph.initializer)
    assert [own.name for own in graph.input] == ["ids"]
    assert max(differences(module, tmp_path / "graph.onnx", (3, 20))) < 1e-4


@pytest.mark.parametrize("family", ["Llama", "Gemma3Text"])
def test_keys_and_values_go_in_and_out(family, tiny_family, tmp_path):
    body = tiny_family(family, **KINDS[family][0])
    graph = written(Prefixes(body), tmp_path / "prefix.onnx", "ids").graph
    assert any(own.name.startswith("layers.2.") for own in graph.initializer)
    assert max(differences(Prefixes(body), tmp_path / "prefix.onnx", (3, 20))) < 1e-4
    session = onnxruntime.InferenceSession(tmp_path / "prefix.onnx", providers=["CPUExecutionProvider"])
    assert session.run(None, {"ids": np.ones((1, 9), dtype=np.int64)})[0].shape[:2] == (4, 1)


def test_an_encoder_reads_both_ways(tmp_path):
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=64, hidden_size=32, num_attention_heads=4, intermediate_size=48, **FOUR)
    body = transformers.BertModel(config, add_pooling_layer=False).eval()

    class Masked(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body = body

        def forward(self, ids, mask):
            return self.body(input_ids=ids, attention_mask=mask).last_hidden_state

    example = {name: (torch.ones(2, 5, dtype=torch.long), ("batch", "length")) for name in ("ids", "mask")}
    write_graph(Masked(), example, tmp_path / "encoder.onnx", ("vectors",), 23)
    names = [own.name for own in onnx.load(tmp_path / "encoder.onnx").graph.initializer]
    assert any(name.startswith("layers.3.") for name in names)
    ids, mask = np.random.default_rng(0).integers(1, 64, (3, 9)), np.ones((3, 9), dtype=np.int64)
    mask[1, 4:] = 0
    session = onnxruntime.InferenceSession(tmp_path / "encoder.onnx", providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = Masked()(torch.from_numpy(ids), torch.from_numpy(mask)).numpy()
    assert session.run(["vectors"], {"ids": ids, "mask": mask})[0] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("recipe", ["houlsby", "parallel"])
def test_adapters_that_stay_are_weights_like_others(recipe, tiny_family, tmp_path):
    body = attach(tiny_family("Llama", **FOUR), load_adapter(AdapterSettings(recipe=recipe)))
    for name, weight in body.named_parameters():
        if weight.requires_grad:  # they start as nothing
            torch.nn.init.normal_(weight, std=0.3, generator=torch.Generator().manual_seed(len(name)))
    module = Reading(body.eval())
    assert repeated_layers(module, IDS).kinds == [0, 0, 0, 0]
    written(module, tmp_path / "graph.onnx", "ids")
    assert once(tmp_path / "graph.onnx")
    assert max(differences(module, tmp_path / "graph.onnx", (3, 20))) < 1e-4


def once(path):
    """Whether the graph was made of layers that were traced once."""
    return any(own.name.startswith("layers.") for own in onnx.load(path).graph.initializer)


def scaled(layer, share=2):
    """Somebody has put something in the place of what a part of a layer does."""
    own = layer.forward
    layer.forward = lambda *given, **named: share * own(*given, **named)


class Counted(torch.nn.Linear):
    """Says what it does by a private attribute only."""

    def forward(self, hidden):
        return self._times * super().forward(hidden)


def by_an_attribute(body):
    body.layers[1].self_attn.scaling *= 2


def by_a_private_attribute(body):
    for number, layer in enumerate(body.layers):
        layer.self_attn.k_proj.__class__, layer.self_attn.k_proj._times = Counted, 1 + (number == 1)


def by_what_stands_in_a_place(body):
    scaled(body.layers[1].self_attn.q_proj, 3)


def by_a_hook_of_a_part(body):
    body.layers[1].mlp.register_forward_hook(lambda _, given, found: 2 * found)


def by_what_it_does_only(body):
    parts = {id(body.layers[1].mlp)}

    def doubled(module, hidden):
        return (1 + (id(module) in parts)) * type(body.layers[0].mlp).plain(module, hidden)

    kind = type("Odd", (type(body.layers[0].mlp),), {"plain": type(body.layers[0].mlp).forward, "forward": doubled})
    for layer in body.layers:
        layer.mlp.__class__ = kind


def by_what_it_does_beside_a_huge_channel(body):
    by_what_it_does_only(body)
    with torch.no_grad():
        body.embed_tokens.weight[:, 3] = 3000.0
    for layer in body.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.data[3] = 1e-3


@pytest.mark.parametrize(
    "odd",
    [
        by_an_attribute,
        by_a_private_attribute,
        by_what_stands_in_a_place,
        by_a_hook_of_a_part,
        by_what_it_does_only,
        by_what_it_does_beside_a_huge_channel,
    ],
)
def test_layers_that_do_something_else_are_kinds_of_their_own(odd, tiny_family, tmp_path):
    body = tiny_family("Llama", **FOUR)
    odd(body)
    module = Reading(body)
    assert repeated_layers(module, IDS).kinds == [0, 1, 0, 0]
    if odd in (by_an_attribute, by_what_it_does_only):
        written(module, tmp_path / "graph.onnx", "ids")
        assert once(tmp_path / "graph.onnx")
        assert max(differences(module, tmp_path / "graph.onnx", (3, 20))) < 1e-4


def test_layers_that_somebody_has_changed_are_left_alone(tiny_family, tmp_path):
    hooked, changed = tiny_family("Llama"), tiny_family("Llama")
    hooked.layers[1].register_forward_hook(lambda _, given, found: 2 * found)
    scaled(changed.layers[1])
    assert repeated_layers(Reading(hooked), IDS) is repeated_layers(Reading(changed), IDS) is None
    before = changed.layers[1].forward
    written(Reading(changed), tmp_path / "graph.onnx", "ids")
    assert not once(tmp_path / "graph.onnx")
    assert changed.layers[1].forward is before
    assert max(differences(Reading(changed), tmp_path / "graph.onnx", (3, 20))) < 1e-4


class Inner(transformers.modeling_layers.GradientCheckpointingLayer):
    """A layer of a family that gives more than hidden states."""

    def __init__(self, give):
        super().__init__()
        self.linear, self.give = torch.nn.Linear(8, 8), give

    def forward(self, hidden):
        return self.give(hidden + self.linear(hidden))


class Stack(torch.nn.Module):
    """Such layers one after the other, and what is cut of the hidden states between them."""

    def __init__(self, give, take, cut=None):
        super().__init__()
        self.words, self.take, self.cut = torch.nn.Embedding(64, 8), take, cut
        self.layers = torch.nn.ModuleList(Inner(give) for _ in range(4))

    def forward(self, ids):
        hidden = self.words(ids)
        for number, layer in enumerate(self.layers):
            if number == 2 and self.cut is not None:
                hidden = hidden[:, : self.cut]
            hidden = self.take(layer(hidden))
        return hidden


@pytest.mark.parametrize(
    "module",
    [
        Stack(lambda hidden: (hidden,), lambda found: found[0]),
        Stack(lambda hidden: (hidden, hidden.sum()), lambda found: found[0]),
        Stack(lambda hidden: {"hidden": hidden}, lambda found: found["hidden"]),
    ],
)
def test_layers_that_give_more_than_hidden_states_are_traced_whole(module, tmp_path):
    assert repeated_layers(module, IDS) is None
    written(module, tmp_path / "graph.onnx", "ids")
    assert max(differences(module, tmp_path / "graph.onnx", (3, 20))) < 1e-5


def test_layers_of_other_lengths_are_kinds_of_their_own(tmp_path):
    module = Stack(lambda hidden: hidden, lambda found: found, cut=1)
    give = module.layers[0].give
    for layer in module.layers:
        layer.give = give
    assert repeated_layers(module, IDS).kinds == [0, 0, 2, 2]
    written(module, tmp_path / "graph.onnx", "ids")
    assert once(tmp_path / "graph.onnx")
    assert max(differences(module, tmp_path / "graph.onnx", (3, 20))) < 1e-5


def test_an_output_matrix_that_is_the_words_is_kept_once(tiny_family, tmp_path):
    class Tied(Reading):
        def forward(self, ids):
            return super().forward(ids) @ self.body.embed_tokens.weight.T

    module = Tied(tiny_family("Llama", vocab_size=512))  # smaller ones are folded by the exporter itself
    written(module, tmp_path / "graph.onnx", "ids")
    assert once(tmp_path / "graph.onnx")
    sizes = [list(own.dims) for own in onnx.load(tmp_path / "graph.onnx").graph.initializer]
    assert sizes.count([512, 32]) + sizes.count([32, 512]) == 1
    assert max(differences(module, tmp_path / "graph.onnx", (3, 20))) < 1e-4


def test_a_layer_of_another_number_of_weights_is_a_kind_of_its_own(tiny_family):
    body = tiny_family("Llama", num_hidden_layers=4)
    body.layers[3].input_layernorm.register_buffer("further", torch.ones(1))
    assert repeated_layers(Reading(body), IDS).kinds == [0, 0, 0, 3]


def test_what_hardly_repeats_is_traced_whole(tiny_family, tmp_path):
    assert repeated_layers(Reading(tiny_family("Llama", num_hidden_layers=2)), IDS) is None
    assert repeated_layers(torch.nn.Embedding(4, 3), IDS) is None
    body = tiny_family("Llama", **FOUR)
    for number in (1, 2):
        body.layers[number].self_attn.scaling *= 1 + number
    module = Reading(body)
    assert repeated_layers(module, IDS) is None
    written(module, tmp_path / "graph.onnx", "ids")
    assert max(differences(module, tmp_path / "graph.onnx", (3, 20))) < 1e-4


def test_layers_that_are_called_twice_are_traced_whole(tiny_family, tmp_path):
    class Twice(Reading):
        def forward(self, ids):
            return super().forward(ids) + super().forward(ids.flip(1))

    module = Twice(tiny_family("Llama"))
    assert repeated_layers(module, IDS) is None
    written(module, tmp_path / "graph.onnx", "ids")
    assert not once(tmp_path / "graph.onnx")
    assert max(differences(module, tmp_path / "graph.onnx", (3, 20))) < 1e-4


def test_what_layers_give_from_one_to_another_is_traced_whole(tiny_family, tmp_path):
    """As where a layer leaves something behind that a later one takes: no call says it."""
    body = tiny_family("Llama", **FOUR)
    left = []
    for layer in body.layers:
        own = layer.mlp.forward

        def forward(hidden, own=own):
            found = own(hidden)
            left.append(found)
            return found

        layer.mlp.forward = forward

    class Behind(Reading):
        def forward(self, ids):
            left.clear()
            hidden = super().forward(ids)
            return hidden + left[0]

    module = Behind(body)
    written(module, tmp_path / "graph.onnx", "ids")
    assert not once(tmp_path / "graph.onnx")
    assert max(differences(module, tmp_path / "graph.onnx", (3, 20))) < 1e-4


def test_a_model_is_left_as_it_was(tiny_family, tmp_path):
    module = Reading(tiny_family("Llama", **FOUR))
    before = {name: own.clone() for name, own in module.state_dict().items()}
    written(module, tmp_path / "graph.onnx", "ids")
    assert all("forward" not in vars(layer) for layer in module.body.layers)
    assert all(torch.equal(own, before[name]) for name, own in module.state_dict().items())

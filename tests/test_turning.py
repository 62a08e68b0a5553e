"""Turned models: they say the same, nothing that is read stands out any more, and unknown families are left alone."""

import copy

import pytest
import torch

from recllm.relevance import AnswerDifference, RelevanceModel
from recllm.turning import TurnedProjection, hadamard, turned


class OfFamily(torch.nn.Module):
    """A relevance model over the bare body of a family."""

    answer = RelevanceModel.answer

    def __init__(self, body):
        super().__init__()
        self.body = body
        output = torch.nn.Linear(body.config.hidden_size, body.config.vocab_size, bias=False)
        self.difference = AnswerDifference(output, (3, 4))

    def forward(self, ids):
        return self.answer(self.body(input_ids=ids, use_cache=False).last_hidden_state)


@pytest.fixture
def model_of(tiny_family):
    def made(family):
        torch.manual_seed(0)
        body = tiny_family(family, num_hidden_layers=2)
        for name, value in body.named_parameters():
            if "norm" in name:
                torch.nn.init.normal_(value, mean=1.0, std=0.3)  # norms with weights: they have to be folded in
            elif "bias" in name:
                torch.nn.init.normal_(value, std=0.3)
        return OfFamily(body).eval()

    return made


def peaks(model, ids):
    """How far the largest number of a row that a layer reads stands out, by the layer's name."""
    found = {}

    def seen(name):
        def hook(_, given):
            rows = given[0].flatten(0, -2)
            found[name] = float((rows.abs().amax(-1) / rows.pow(2).mean(-1).sqrt()).mean())

        return hook

    layers = {name: own for name, own in model.body.named_modules() if isinstance(own, torch.nn.Linear)}
    hooks = [own.register_forward_pre_hook(seen(name)) for name, own in layers.items()]
    model(ids)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3", "Mistral"])
@torch.inference_mode()
def test_a_turned_model_says_the_same(family, model_of):
    model, ids = model_of(family), torch.randint(1, 64, (3, 11))
    before = copy.deepcopy(model.state_dict())
    made = turned(model)
    assert made(ids) == pytest.approx(model(ids), abs=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    weights = [value for name, value in made.body.named_parameters() if name.endswith("layernorm.weight")]
    assert len(weights) == 4
    assert all((value == 1).all() for value in weights)
    assert not torch.equal(made.body.embed_tokens.weight, model.body.embed_tokens.weight)
    assert torch.equal(turned(model)(ids), made(ids))  # by the seed


@torch.inference_mode()
def test_no_place_stands_out_any_more(model_of):
    model, ids = model_of("Llama"), torch.randint(1, 64, (3, 11))
    model.body.embed_tokens.weight[:, 5] *= 300.0
    for layer in model.body.layers:
        layer.mlp.up_proj.weight[7] *= 300.0
    before, after = peaks(model, ids), peaks(turned(model), ids)
    for name in ("layers.0.self_attn.q_proj", "layers.0.mlp.gate_proj"):
        assert before[name] > 4.0  # of the 5.7 of a row that is one number
        assert after[name] < 0.75 * before[name]
    assert before["layers.0.mlp.down_proj"] > 1.5 * after["layers.0.mlp.down_proj.projection"]


@pytest.mark.parametrize("family", ["Gemma2", "GPTNeoX"])
def test_a_family_that_is_built_otherwise_is_left_alone(family, model_of):
    assert turned(model_of(family)) is None


def test_a_projection_behind_blocks_says_the_same():
    torch.manual_seed(0)
    plain = torch.nn.Linear(24, 5)
    made = TurnedProjection(copy.deepcopy(plain), 8)
    rows = torch.randn(2, 3, 24)
    assert torch.allclose(made(rows), plain(rows), atol=1e-6)
    assert torch.allclose(hadamard(8) @ hadamard(8).T, torch.eye(8), atol=1e-6)

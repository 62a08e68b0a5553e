"""Lean training: short attention is the same attention, and rounding what is frozen moves no gradient."""

import pytest
import torch

from recllm.adapters import attach, load_adapter
from recllm.errors import RecllmError
from recllm.lean import NAME, SHORT, compile_layers, lean
from recllm.lm import load_base
from recllm.runs import AdapterSettings

RECIPES = ["lora", "dora", "rslora", "adalora", "ia3", "vera", "oft", "ln_tuning", "houlsby", "pfeiffer", "parallel"]
FAMILIES = ["Llama", "Qwen3", "Gemma2", "Gemma3Text", "Mistral"]


def gradients(model, kind=None):
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 40, (3, 9), generator=random)
    model.zero_grad()
    with torch.autocast("cpu", dtype=kind or torch.bfloat16, enabled=kind is not None):
        hidden = model(input_ids=ids, use_cache=False).last_hidden_state.float()
    (hidden * torch.randn(hidden.shape, generator=random)).sum().backward()
    return hidden.detach(), {name: own.grad.clone() for name, own in model.named_parameters() if own.grad is not None}


@pytest.mark.parametrize("kind", FAMILIES)
def test_short_attention_is_the_fused_one(tiny_family, kind):
    model = tiny_family(kind).train()
    before, found = gradients(model)
    lean(model, None, cpu=True)
    after, again = gradients(model)
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-4)
    assert found.keys() == again.keys()
    for name, value in found.items():
        torch.testing.assert_close(again[name], value, atol=1e-4 * float(value.abs().max()) + 1e-6, rtol=1e-3)
    if kind != "Gemma2":  # which has a soft cap, and with it an attention of its own
        assert model.config._attn_implementation == NAME


@pytest.mark.parametrize("length", [5, SHORT, SHORT + 1])
def test_an_encoder_looks_both_ways_and_leaves_padding_out(tiny_encoder_folder, length):
    model = load_base(tiny_encoder_folder).model.requires_grad_(True)
    ids = torch.arange(2 * length).reshape(2, length) % 20
    mask = torch.ones_like(ids)
    mask[1, 3:] = 0
    before = model(input_ids=ids, attention_mask=mask).last_hidden_state
    lean(model, None, cpu=True)
    after = model(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(after[0], before[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(after[1, :3], before[1, :3], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", RECIPES)
def test_rounding_what_is_frozen_moves_no_gradient(tiny_lm_folder, name):
    torch.manual_seed(0)
    model = attach(load_base(tiny_lm_folder).model, load_adapter(AdapterSettings(recipe=name))).train()
    torch.manual_seed(1)
    for value in model.parameters():
        if value.requires_grad:
            value.data += 0.05 * torch.randn_like(value)
    torch.manual_seed(2)
    before, found = gradients(model, torch.bfloat16)
    frozen = {name for name, own in model.named_parameters() if not own.requires_grad}
    lean(model, torch.bfloat16, cpu=False)
    torch.manual_seed(2)
    after, again = gradients(model, torch.bfloat16)
    assert torch.equal(after, before)
    assert all(torch.equal(again[key], value) for key, value in found.items())
    kinds = {key: own.dtype for key, own in model.named_parameters()}
    assert all(kinds[key] == torch.float32 for key in kinds if key not in frozen)
    halved = [key for key, own in kinds.items() if own == torch.bfloat16]
    assert bool(halved) is (name != "dora"), halved


def test_on_an_accelerator_attention_stays_as_it_is(tiny_lm_folder):
    model = load_base(tiny_lm_folder).model
    lean(model, None, cpu=False)
    assert model.config._attn_implementation == "sdpa"
    assert all(own.dtype == torch.float32 for own in model.parameters())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # Dynamo looks at every input's
def test_layers_are_compiled_in_place_and_keep_their_names(tiny_lm_folder):
    model = load_base(tiny_lm_folder).model
    names, before = [name for name, _ in model.named_parameters()], gradients(model.requires_grad_(True))
    compiled = []

    def backend(graph, inputs):
        compiled.append(len(inputs))
        return graph.forward

    compile_layers(model, cpu=True, backend=backend)
    after = gradients(model)
    assert [name for name, _ in model.named_parameters()] == names
    assert len(compiled) == 1  # all layers are one graph
    torch.testing.assert_close(after[0], before[0])
    assert all(torch.allclose(after[1][name], value, atol=1e-5) for name, value in before[1].items())
    for _ in range(10):  # a search trains many models in one process, more than Dynamo compiles by itself
        compiled.clear()
        other = load_base(tiny_lm_folder).model.requires_grad_(True)
        compile_layers(other, cpu=True, backend=backend)
        gradients(other)
        assert len(compiled) == 1


def test_without_a_compiler_or_layers_compiling_is_refused(tiny_lm_folder, monkeypatch):
    with pytest.raises(RecllmError, match=r"train\.torch_compile found no layers"):
        compile_layers(torch.nn.Linear(2, 2), cpu=False)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(RecllmError, match="needs a C\\+\\+ compiler on a CPU, and there is no 'no-such-compiler'"):
        compile_layers(load_base(tiny_lm_folder).model, cpu=True)

"""Lean training: short attention is the same attention, and rounding what is frozen moves no gradient."""

import pytest
import torch
from transformers import FalconConfig, FalconModel

from recllm.adapters import attach, load_adapter
from recllm.errors import RecllmError
from recllm.lean import NAME, SHORT, CheapDropout, compile_layers, lean
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
    for module in model.modules():
        if type(module) is torch.nn.Dropout:
            module.p = 0.0  # in bf16 it draws other numbers
    before, found = gradients(model, torch.bfloat16)
    frozen = {name for name, own in model.named_parameters() if not own.requires_grad}
    lean(model, torch.bfloat16, cpu=False)
    after, again = gradients(model, torch.bfloat16)
    assert torch.equal(after, before)
    # Gradients of the copies that are not made any more are added up in half precision.
    for key, value in found.items():
        torch.testing.assert_close(again[key], value, rtol=0.02, atol=0.02 * float(value.abs().max()))
    kinds = {key: own.dtype for key, own in model.named_parameters()}
    assert all(kinds[key] == torch.float32 for key in kinds if key not in frozen)
    halved = [key for key, own in kinds.items() if own == torch.bfloat16]
    assert bool(halved) is (name != "dora"), halved


@pytest.mark.parametrize("family", FAMILIES)
def test_inputs_are_rounded_once_where_all_that_reads_them_would(family, tiny_family):
    model = tiny_family(family).train()
    given = []
    for module in model.modules():
        if type(module) is torch.nn.Linear:
            module.register_forward_pre_hook(lambda _, args: given.append(args[0].dtype))
    before, _ = gradients(model, torch.bfloat16)
    assert torch.float32 in given
    given.clear()
    for _ in range(2):  # a model is made lean anew when its training goes on
        lean(model, torch.bfloat16, cpu=False)
    after, _ = gradients(model, torch.bfloat16)
    assert set(given) == {torch.bfloat16}
    assert torch.equal(after, before)
    assert sum(len(module._forward_pre_hooks) for module in model.layers[0].children()) == 2
    plain, _ = gradients(model.float())  # without autocast nothing is rounded
    assert (plain - after).abs().max() > 0


def test_what_an_encoder_adds_its_residual_to_is_not_rounded(tiny_encoder_folder):
    model = load_base(tiny_encoder_folder).model
    lean(model, torch.bfloat16, cpu=False)
    layer = next(module for name, module in model.named_modules() if name.endswith("layer.0"))
    assert [bool(part._forward_pre_hooks) for part in (layer.attention, layer.intermediate, layer.output)] == [
        False,
        True,
        False,
    ]


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [0.05, 0.5])
def test_cheap_dropout_drops_its_share_and_scales_the_rest(kind, share):
    dropout = CheapDropout(share).train()
    torch.manual_seed(0)
    given = torch.ones(37, 53, 71, dtype=kind, requires_grad=True)
    found = dropout(given)
    kept = found != 0
    assert float(kept.float().mean()) == pytest.approx(1 - share, abs=0.005)
    assert found.dtype == kind
    assert torch.equal(found[kept], torch.full_like(found[kept], 1 / (1 - share)))
    # None depends on its neighbours, which come from the same number, nor on its place.
    flat = kept.flatten().float()
    for step in (1, 2, 3, 4):
        assert float(torch.corrcoef(torch.stack([flat[:-step], flat[step:]]))[0, 1]) == pytest.approx(0, abs=0.01)
    assert all(float(flat[start::4].mean()) == pytest.approx(1 - share, abs=0.005) for start in range(4))
    found.sum().backward()
    assert torch.equal(given.grad, found)
    torch.manual_seed(0)
    assert torch.equal(dropout(given), found)
    assert not torch.equal(dropout(given), found)
    assert torch.equal(dropout.eval()(given), given)


def test_dropout_is_cheap_on_a_cpu_only(tiny_lm_folder):
    model = attach(load_base(tiny_lm_folder).model, load_adapter(AdapterSettings(recipe="lora")))
    plain = [module for module in model.modules() if type(module) is torch.nn.Dropout]
    assert plain
    lean(model, None, cpu=False)
    assert not any(isinstance(module, CheapDropout) for module in model.modules())
    lean(model, None, cpu=True)
    assert all(isinstance(module, CheapDropout) for module in plain)


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


@pytest.mark.parametrize("alibi", [False, True])
def test_a_family_that_knows_attention_by_its_name_keeps_it(alibi):
    """Falcon adds up its mask in another way where attention is not called "sdpa"."""
    shape = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "alibi": alibi}
    torch.manual_seed(0)
    model = FalconModel(FalconConfig(**shape, hidden_dropout=0.0, attention_dropout=0.0)).train()
    before, _ = gradients(model)
    lean(model, None, cpu=True)
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(gradients(model)[0], before)

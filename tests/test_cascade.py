"""Cascade attention: continuations of a kept prefix are read as whole prompts are, in every family that shares one."""

import pytest
import torch

from recllm.cascade import joined, read_prefix, read_suffixes, shares_prefixes

FAMILIES = ["Llama", "Qwen2", "Qwen3", "Mistral", "Gemma", "Gemma2", "Gemma3Text", "Phi3"]


def ids_of(*shape):
    return torch.randint(1, 64, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_continuations_are_read_as_whole_prompts(family, tiny_family):
    model = tiny_family(family)
    own_attention = model.config._attn_implementation
    assert shares_prefixes(model)
    texts, lengths, suffixes = ids_of(3, 12), torch.tensor([12, 5, 9]), ids_of(3, 4, 6)
    prefix = read_prefix(model, texts, lengths)
    found = read_suffixes(model, prefix, suffixes)
    assert found.shape == (3, 4, 6, 32)
    for user in range(3):
        for own in range(4):
            ids = torch.cat([texts[user, : lengths[user]], suffixes[user, own]])[None]
            whole = model(input_ids=ids, use_cache=False).last_hidden_state[0, -6:]
            assert torch.allclose(found[user, own], whole, atol=1e-4), (user, own)
    assert model.config._attn_implementation == own_attention


@torch.inference_mode()
def test_prefixes_that_were_kept_one_by_one_are_as_good(tiny_family):
    model = tiny_family("Llama")
    texts, lengths, suffixes = ids_of(3, 12), torch.tensor([12, 5, 9]), ids_of(3, 4, 6)
    prefix = read_prefix(model, texts, lengths)
    own = [prefix.of(row) for row in (2, 0, 1)]
    assert [part.keys[0].shape[2] for part in own] == [9, 12, 5]
    assert sum(part.bytes for part in own) == 26 * 3 * 2 * 2 * 8 * 4  # tokens, layers, both, heads, width, float32
    again = read_suffixes(model, joined(own), suffixes[[2, 0, 1]])
    assert torch.allclose(again, read_suffixes(model, prefix, suffixes)[[2, 0, 1]], atol=1e-5)


@torch.inference_mode()
def test_under_autocast_a_prefix_is_kept_in_its_precision(tiny_family):
    model = tiny_family("Llama")
    text, suffix = ids_of(1, 12), ids_of(1, 1, 6)
    whole = torch.cat([text, suffix[0]], dim=1)
    full = model(input_ids=whole, use_cache=False).last_hidden_state[0, -6:]
    with torch.autocast("cpu", torch.bfloat16):
        prefix = read_prefix(model, text, torch.tensor([12]))
        found = read_suffixes(model, prefix, suffix)[0, 0]
        rounded = model(input_ids=whole, use_cache=False).last_hidden_state[0, -6:]
    assert prefix.keys[0].dtype == prefix.values[0].dtype == torch.bfloat16
    assert (found - full).abs().mean() <= 1.5 * (rounded - full).abs().mean()


@pytest.mark.parametrize(
    ("family", "config"),
    [
        # Attention sinks: a share of the softmax that cascade attention does not know of.
        ("GptOss", {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 64}),
        ("Mamba", {"state_size": 4, "num_hidden_layers": 2}),  # no keys and values at all
    ],
)
def test_a_family_that_cannot_share_is_found_out(family, config, tiny_family):
    model = tiny_family(family, **config)
    if family == "GptOss":
        for layer in model.layers:
            torch.nn.init.constant_(layer.self_attn.sinks, 3.0)
    assert not shares_prefixes(model)
    assert not model.training


def test_a_window_that_attention_is_not_told_of_is_not_trusted(tiny_family):
    model = tiny_family("Mistral", sliding_window=64)
    assert shares_prefixes(model)
    assert model.config.sliding_window == 64
    # Phi-MoE states a window for all layers, has it in its mask and does not tell its attention.
    model = tiny_family("Phimoe", sliding_window=64, num_local_experts=2, num_experts_per_tok=1)
    assert not shares_prefixes(model)
    assert model.config.sliding_window == 64
    model.config.sliding_window = None
    assert shares_prefixes(model)
    model = tiny_family("Mistral")
    model.config.layer_types = ["full_attention", "sliding_attention", "chunked_attention"]
    assert not shares_prefixes(model)
    model = tiny_family("Llama")
    model.config.layer_types = ["sliding_attention"] * 3  # its attention knows no window
    assert not shares_prefixes(model)

"""Where models run: on a GPU where there is one and nobody said to keep off it, by stand-ins of CUDA."""

import errno

import numpy as np
import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, LlamaConfig

from recllm import devices, loop, planning
from recllm.errors import RecllmError, out_of_memory
from recllm.lm import scoring_device
from recllm.mf import FactorSettings, ImplicitMF
from recllm.relevance import TOKENS_AT_ONCE, tokens_on_gpu


@pytest.fixture
def cuda(monkeypatch):
    """A machine with a GPU that multiplies bf16."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)


def test_a_gpu_is_taken_for_all_that_runs(cuda):
    assert devices.on_gpu()
    assert scoring_device() == "cuda"
    assert devices.precision_keys("auto") == {"bf16": True, "fp16": False}


def test_who_keeps_off_the_gpu_keeps_off_it_everywhere(cuda, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    for used in ("empty_cache", "synchronize", "max_memory_reserved", "get_device_name"):
        monkeypatch.setattr(torch.cuda, used, lambda *_: pytest.fail("the GPU was asked"))
    assert not devices.on_gpu()
    assert scoring_device() == "cpu"
    assert devices.precision_keys("auto") == {"bf16": False, "fp16": False}
    assert planning.peak_memory() > 0
    devices.free_memory()


def test_factors_are_fitted_on_the_cpu_where_implicit_has_cuda(monkeypatch, checkerboard):
    """Its solver for CUDA leaves alpha out while it fits, and draws by the clock where the seed is 0."""
    gpu = pytest.importorskip("implicit.gpu")
    settings = FactorSettings(factors=4, iterations=2)
    fitted = ImplicitMF.fit(checkerboard.interactions, settings, threads=1).item_factors
    monkeypatch.setattr(gpu, "HAS_CUDA", True)
    again = ImplicitMF.fit(checkerboard.interactions, settings, threads=1).item_factors
    assert np.array_equal(fitted, again)


@pytest.mark.parametrize(
    "said",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB.",
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "Failed to allocate memory for requested buffer of size 1024",
        "[enforce fail at alloc_cpu.cpp:119] data. DefaultCPUAllocator: can't allocate memory: you tried to allocate",
    ],
)
def test_what_devices_say_where_memory_runs_out_is_known(said):
    assert out_of_memory(RuntimeError(said))
    assert not out_of_memory(RuntimeError("CUDA error: device-side assert triggered"))
    assert not out_of_memory(KeyError(said))
    assert not out_of_memory(FileNotFoundError(errno.ENOENT, "No such file", f"{said}.csv"))
    assert not out_of_memory(RecllmError(said))


def test_memory_that_the_system_has_not_is_known():
    assert out_of_memory(OSError(errno.ENOMEM, "Cannot allocate memory"))
    assert out_of_memory(RuntimeError("std::bad_alloc"))


def test_tokens_on_a_gpu_go_by_the_heads_and_layers_of_the_model():
    smollm = LlamaConfig(hidden_size=576, num_attention_heads=9, num_key_value_heads=3, num_hidden_layers=30)
    llama = LlamaConfig(hidden_size=4096, num_attention_heads=32, num_key_value_heads=8, num_hidden_layers=32)
    assert tokens_on_gpu(smollm) == TOKENS_AT_ONCE[1]
    # 7 bytes for each of 1,024 logits of 32 heads, and 2 · 32 layers · 8 heads · 128 floats: 8 GiB in all.
    assert tokens_on_gpu(llama) == (8 << 30) // (7 * 1024 * 32 + 2 * 32 * 8 * 128 * 4)


@pytest.mark.parametrize("kind", ["mamba", "gemma4_text", "musicgen", "fnet"])
def test_models_whose_heads_are_not_told_read_as_many_tokens_as_a_cpu(kind):
    assert tokens_on_gpu(CONFIG_MAPPING[kind]()) == TOKENS_AT_ONCE[0]


def test_half_precision_is_inside_of_what_deepspeed_runs(monkeypatch, tmp_path):
    """Its engine switches off, on a GPU, what is around it."""

    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x):
            return self.layer(x).dtype

    model = Product()
    for _ in range(2):  # a second attempt puts nothing around the first one's
        loop.round_inside(model, "cpu", torch.bfloat16)
    with torch.autocast("cpu", enabled=False):
        assert model(torch.ones(1, 2)) == torch.bfloat16
    assert model.forward.__wrapped__.__func__ is Product.forward

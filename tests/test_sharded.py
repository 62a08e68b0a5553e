"""Sharded training: two processes with half of the weights each learn what one learns, and go on where they were."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.utils import DistributedType
from safetensors.numpy import load_file
from torch import nn

from recllm import loop, sharded
from recllm.adapters import AdapterRecipe
from recllm.commands import profile_flags
from recllm.errors import RecllmError
from recllm.files import read_json
from recllm.runs import load_run
from recllm.sharded import check_shardable, name_layers, put, whole
from recllm.train import train_run

ROOT = Path(__file__).parents[1]
ON_CPU = """
# accelerate shards on accelerators only. Here two processes of a CPU pass for them.
import os, sys
from accelerate.state import PartialState
from accelerate.utils import DistributedType

begin = PartialState.__init__

def init(self, *given, **named):
    begin(self, *given, **named)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU

PartialState.__init__ = init

from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from recllm import loop, train

class Kill(loop.Seal):
    def on_save(self, args, state, control, **given):
        sharded = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "2" or any(
            isinstance(value, DTensor) or hasattr(value, "ds_id") for value in given["model"].parameters()
        )
        assert sharded
        super().on_save(args, state, control, **given)
        if "lm" in str(args.output_dir) and state.global_step == int(os.environ["KILLED_AT"]):
            torch.distributed.barrier()
            os._exit(9)

import torch
loop.Seal = Kill
train.main(sys.argv[1:])
"""


def launch(profile, script, run, *arguments, killed_at=0):
    """`accelerate launch` with a profile and two processes."""
    environment = os.environ | {
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "KILLED_AT": str(killed_at),
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-m", "accelerate.commands.launch", *profile_flags(profile), str(script), str(run)]
    return subprocess.run(
        [*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {(line["scorer"], line["step"]): line["loss"] for line in lines if "loss" in line}


ZERO = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed")


@pytest.mark.slow
@pytest.mark.parametrize("profile", ["fsdp2", pytest.param("zero2", marks=ZERO), pytest.param("zero3", marks=ZERO)])
def test_sharded_processes_learn_what_one_learns_and_resume_to_the_same_bits(profile, tiny_run, tmp_path, monkeypatch):
    monkeypatch.setenv("RECLLM_CACHE", str(tmp_path / "cache"))
    without_dropout = ["light.dropout=0", "light.factor_dropout=0", "model.factor_dropout=0", "train.logging_steps=1"]
    without_dropout += ["model.learnt_width=3"]
    without_dropout += ["adapter.lora_dropout=0", "train.precision=fp32", "train.save_steps=3", "train.eval_steps=3"]
    one = load_run(tiny_run, [f"output={tmp_path / 'one'}", *without_dropout, "light.per_device_train_batch_size=8"])
    train_run(one, say=lambda _: None)
    script = tmp_path / "on_cpu.py"
    script.write_text(ON_CPU, encoding="utf-8")
    halves = [*without_dropout, "light.per_device_train_batch_size=4", "train.per_device_train_batch_size=8"]
    settings = [part for override in halves for part in ("--set", override)]
    for name, killed_at in (("two", 0), ("killed", 3)):
        done = launch(profile, script, tiny_run, *settings, "--set", f"output={tmp_path / name}", killed_at=killed_at)
        assert (done.returncode == 0) is (killed_at == 0), done.stderr[-3000:]
    assert not (tmp_path / "killed" / "tiny" / "lm").exists()
    done = launch(profile, script, tmp_path / "killed" / "tiny", "--resume")
    assert done.returncode == 0, done.stderr[-3000:]
    folder = one.folder
    for other in ("two", "killed"):
        found = losses(tmp_path / other / "tiny")
        assert found == pytest.approx(losses(folder), abs=1e-3)
    for scorer in ("light", "lm"):
        straight, resumed = (
            load_file(tmp_path / name / "tiny" / scorer / "model.safetensors") for name in ("two", "killed")
        )
        alone = load_file(folder / scorer / "model.safetensors")
        assert {name: value.shape for name, value in straight.items()} == {
            name: value.shape for name, value in alone.items()
        }
        assert all(np.array_equal(straight[name], resumed[name]) for name in straight)
    assert read_json(tmp_path / "two" / "tiny" / "fusion.json")["names"]


@pytest.mark.slow
@pytest.mark.parametrize("profile", ["fsdp2", pytest.param("zero3", marks=ZERO)])
def test_sharded_processes_that_were_killed_behind_their_last_step_take_no_more(
    profile, tiny_run, tmp_path, monkeypatch
):
    monkeypatch.setenv("RECLLM_CACHE", str(tmp_path / "cache"))
    script = tmp_path / "on_cpu.py"
    script.write_text(ON_CPU, encoding="utf-8")
    keys = [f"output={tmp_path}", "light.per_device_train_batch_size=4", "train.per_device_train_batch_size=8"]
    keys += ["light.num_train_epochs=1", "train.max_steps=2", "train.save_steps=1", "train.eval_steps=1"]
    keys += ["train.load_best_model_at_end=false", "train.logging_steps=1"]
    settings = [part for key in keys for part in ("--set", key)]
    done = launch(profile, script, tiny_run, *settings, killed_at=2)
    assert done.returncode != 0
    folder = tmp_path / "tiny"
    behind = load_file(folder / "checkpoints" / "lm" / "checkpoint-2" / "model.safetensors")
    done = launch(profile, script, folder, "--resume")
    assert done.returncode == 0, done.stderr[-3000:]
    found = load_file(folder / "lm" / "model.safetensors")
    assert all(np.array_equal(value, found[name]) for name, value in behind.items())
    assert max(step for scorer, step in losses(folder) if scorer == "lm") == 2


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.TransformerEncoderLayer(4, 1, 4) for _ in range(2)])
        self.gain = nn.Parameter(torch.ones(3))


def test_layers_are_named_for_accelerate():
    model = Stack()
    name_layers(model)
    assert model._no_split_modules == ["TransformerEncoderLayer"]


def test_what_is_not_sharded_is_whole_already():
    model = Stack()
    put(model, {"gain": torch.tensor([1.0, 2.0, 3.0])})
    assert whole(model.gain).tolist() == [1.0, 2.0, 3.0]
    assert not whole(model.gain).requires_grad


@pytest.fixture
def sharding_by_fsdp(monkeypatch):
    """As in a process of a launcher that shards over accelerators."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setattr(sharded, "process_state", lambda: SimpleNamespace(distributed_type=DistributedType.MULTI_GPU))
    return monkeypatch


def test_what_can_be_cut_is_not_refused(sharding_by_fsdp):
    for recipe in (None, AdapterRecipe(tuner="lora", config={})):
        for half in (None, torch.bfloat16):
            check_shardable(recipe, half=half, compiled=False)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["adapter.recipe=adalora"], "AdaLoRA counts ranks over whole matrices"),
        (["adapter.recipe=qlora"], "A quantised base model is not sharded"),
        (["train.precision=fp16"], "Sharded training has no fp16"),
        (["train.torch_compile=true"], "torch_compile has not been tried on sharded layers"),
        (["model.task=relevance", "model.rows_together=4"], "rows_together has not been tried on sharded layers"),
    ],
)
def test_what_cannot_be_cut_is_refused_before_any_work(overrides, words, sharding_by_fsdp, tiny_run, tmp_path):
    run = load_run(tiny_run / "run.toml", [*overrides, f"output={tmp_path}"])
    with pytest.raises(RecllmError, match=words):
        train_run(run, say=lambda _: None)
    assert not run.folder.exists()


def test_the_recipe_that_is_asked_for_counts_and_not_the_one_that_is_overwritten(sharding_by_fsdp, tiny_run, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "tiny")  # was trained with LoRA
    run = load_run(tmp_path / "tiny" / "run.toml", ["adapter.recipe=adalora", f"output={tmp_path}"])
    with pytest.raises(RecllmError, match="AdaLoRA counts ranks"):
        train_run(run, overwrite=True, say=lambda _: None)
    assert (tmp_path / "tiny" / "fusion.json").is_file()


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("FSDP_VERSION", "1", r"Sharding by FSDP needs 'fsdp_version: 2'.* Take --profile fsdp2"),
        ("FSDP_CPU_RAM_EFFICIENT_LOADING", "true", "needs 'fsdp_cpu_ram_efficient_loading: false'"),
    ],
)
def test_another_way_of_sharding_is_refused(key, value, words, sharding_by_fsdp):
    sharding_by_fsdp.setenv(key, value)
    with pytest.raises(RecllmError, match=words):
        check_shardable(None, half=None, compiled=False)


@pytest.mark.parametrize(
    ("cpu", "words"), [(True, r"there is none here\. Take --profile cpu"), (False, r"one process .* --profile gpu")]
)
def test_sharding_needs_several_accelerators(cpu, words, sharding_by_fsdp):
    alone = SimpleNamespace(distributed_type=DistributedType.NO)
    sharding_by_fsdp.setattr(sharded, "process_state", lambda: alone)
    sharding_by_fsdp.setattr(sharded, "on_cpu", lambda: cpu)
    with pytest.raises(RecllmError, match=words):
        check_shardable(None, half=None, compiled=False)


def test_what_is_sharded_is_rounded_by_autocast():
    trainer = object.__new__(loop.OrderedTrainer)
    trainer.args = SimpleNamespace(device=torch.device("cpu"))
    for half in (torch.bfloat16, None):
        trainer.half = half
        with trainer.autocast_smart_context_manager():
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == (half or torch.float32)

"""A training run that is killed again and again ends with the same bytes as one that was not."""

import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from recllm.runs import load_run, write_run

KILLS = 5
KEPT = ("lm/model.safetensors", "light/model.safetensors", "fusion.json", "cf/mf.safetensors")


def start(file, *flags):
    """A training in a process of its own, from the moment on when it has read its data."""
    command = [sys.executable, "-m", "recllm.train", str(file), *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    # Before it stands what reading the data has warned of.
    begun = any("training events" in line for line in iter(process.stdout.readline, ""))
    assert begun, "".join(process.communicate())
    return process


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_with_the_same_bytes(tiny_run, tmp_path):
    rng = np.random.default_rng(0)
    overrides = ["train.save_steps=3", "train.eval_steps=3", "train.gradient_accumulation_steps=2"]
    overrides += ["train.per_device_train_batch_size=4", "adapter.lora_dropout=0.1", "light.num_train_epochs=4"]
    files = {}
    for name in ("straight", "killed"):
        run = load_run(tiny_run, [*overrides, f"name={name}", f"output={tmp_path}"])
        files[name] = tmp_path / f"{name}.toml"
        write_run(run, files[name])
    process = start(files["straight"])
    began = time.monotonic()
    said = "".join(process.communicate(timeout=300))
    assert process.returncode == 0, said
    takes, killed, done = time.monotonic() - began, 0, False
    while killed < KILLS or not done:
        if done:  # it was faster than the kills: another one
            shutil.rmtree(tmp_path / "killed")
        process = start(files["killed"], "--resume")
        if killed < KILLS:
            time.sleep(rng.uniform(0.0, 0.5 * takes))
            process.send_signal(signal.SIGKILL)
        said = "".join(process.communicate(timeout=300))
        assert process.returncode in (0, -signal.SIGKILL), said
        killed += process.returncode == -signal.SIGKILL
        done = process.returncode == 0
        if done:
            for name in KEPT:
                assert (tmp_path / "straight" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes(), name

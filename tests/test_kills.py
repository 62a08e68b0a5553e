"""A batch job that is killed again and again ends with the bytes of one that was not."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from recllm.parts import folder_of

KILLS = 10
ROWS, CHUNK = 2000, 8
JOB = """
import sys
from pathlib import Path
import recllm
from recllm.batch import Job, recommend_file

bundle, source, target = map(Path, sys.argv[1:4])
recommender = recllm.load(bundle, threads=1)
print("ready", flush=True)
recommend_file(recommender, Job(source, target, chunk=int(sys.argv[4])), k=3)
"""


def start(bundle, source, target):
    """The job in a process of its own, from the moment on when its bundle is loaded."""
    command = [sys.executable, "-c", JOB, str(bundle), str(source), str(target), str(CHUNK)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n", process.communicate()[1]
    return process


def end(process):
    _, said = process.communicate(timeout=120)
    return process.returncode, said


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_killed_at_any_moment_it_ends_with_the_same_bytes(suffix, tiny_bundle, tmp_path):
    rng = np.random.default_rng(0)
    source = tmp_path / "in.jsonl"
    with source.open("w", encoding="utf-8") as stream:
        for row in range(ROWS):
            history = 3 if row % 97 == 0 else rng.integers(0, 24, rng.integers(0, 6)).astype(str).tolist()
            stream.write(json.dumps({"user_id": f"u{row}", "history": history}) + "\n")
    whole, cut = tmp_path / f"whole{suffix}", tmp_path / f"cut{suffix}"
    began = time.monotonic()
    assert end(start(tiny_bundle, source, whole)) == (0, "")
    takes = time.monotonic() - began
    killed = 0
    for _ in range(KILLS // 2):
        process = start(tiny_bundle, source, cut)
        time.sleep(rng.uniform(0.0, takes / KILLS))
        process.send_signal(signal.SIGKILL)
        killed += end(process)[0] == -signal.SIGKILL
        assert killed == 0 or not cut.exists() or cut.read_bytes() == whole.read_bytes()
    if not cut.exists():
        assert end(start(tiny_bundle, source, cut)) == (0, "")
    assert killed >= 2  # a machine so fast that it is done before would test nothing
    assert cut.read_bytes() == whole.read_bytes()
    refused = [path.with_name(f"{path.name}.rejects.jsonl").read_bytes() for path in (whole, cut)]
    assert refused[0] == refused[1]
    assert not folder_of(cut).exists()

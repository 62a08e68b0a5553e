"""The batch runner under fire and at length: `recllm bench batch -- [--quick] [--bundle FOLDER]`.

Kills a job 300 times at random moments and compares what it ends with to a job that was not killed, byte for byte; and
runs jobs of more and more users, whose memory must stay flat. Ends with one line of JSON that has the bars.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import recllm
from recllm.batch import Job, recommend_file
from recllm.parts import folder_of

FLAT = 64.0
"""Megabytes by which the peak memory of a large job may exceed a small one's."""


def job(bundle: str, source: str, target: str, chunk: str) -> None:
    """The child: load, say so, recommend, say the peak memory and the users per second."""
    recommender = recllm.load(bundle, threads=1)
    print("ready", flush=True)
    # Loading a graph takes more for a moment than running it; the peak is counted from here on.
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    summary = recommend_file(recommender, Job(Path(source), Path(target), chunk=int(chunk)), k=10)
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    print(json.dumps({"peak": peak / 1024, "users_per_second": summary.here / summary.seconds}), flush=True)


def start(bundle: Path, source: Path, target: Path, chunk: int) -> subprocess.Popen[str]:
    """A job in a process of its own, from the moment on when its bundle is loaded."""
    command = [sys.executable, __file__, "--job", str(bundle), str(source), str(target), str(chunk)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert process.stdout is not None
    if process.stdout.readline() != "ready\n":
        raise SystemExit(f"The job did not start: {' '.join(command)}")
    return process


def finished(process: subprocess.Popen[str]) -> dict[str, float]:
    """Wait for the end of a job; what it says of itself."""
    said, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"The job ended with {process.returncode}.")
    result: dict[str, float] = json.loads(said)
    return result


def write_users(path: Path, items: list[str], users: int) -> None:
    """Rows of random histories of up to 20 items, of which every 97th cannot be answered."""
    rng = np.random.default_rng(0)
    with path.open("w", encoding="utf-8") as stream:
        for row in range(users):
            chosen = [items[place] for place in rng.integers(0, len(items), rng.integers(0, 21))]
            stream.write(json.dumps({"user_id": f"u{row}", "history": 3 if row % 97 == 0 else chosen}) + "\n")


def kills(bundle: Path, place: Path, items: list[str], number: int) -> dict[str, int]:
    """Kill jobs at random moments, a new one begun whenever one is done; how many ended with other bytes."""
    rng = np.random.default_rng(1)
    source, whole, cut = place / "in.jsonl", place / "whole.parquet", place / "cut.parquet"
    write_users(source, items, 4000)
    began = time.monotonic()
    finished(start(bundle, source, whole, 16))
    takes, killed, jobs, wrong = time.monotonic() - began, 0, 0, 0
    done = False
    while killed < number or not done:
        process = start(bundle, source, cut, 16)
        if killed < number:
            time.sleep(rng.uniform(0.0, takes / 5))
            process.send_signal(signal.SIGKILL)
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
        done = cut.exists() and not folder_of(cut).exists()
        if done:
            jobs += 1
            wrong += _bytes(cut) != _bytes(whole)
            cut.unlink()
        if killed and killed % 25 == 0:
            print(f"{killed} kills, {jobs} jobs done, {wrong} with other bytes", flush=True)
    return {"kills": killed, "jobs": jobs, "wrong": wrong}


def _bytes(path: Path) -> list[bytes]:
    return [path.read_bytes(), path.with_name(f"{path.name}.rejects.jsonl").read_bytes()]


def memory(bundle: Path, place: Path, items: list[str], sizes: list[int]) -> dict[int, dict[str, float]]:
    """Peak megabytes and users per second by the number of users."""
    found = {}
    for users in sizes:
        source = place / f"{users}.jsonl"
        write_users(source, items, users)
        found[users] = finished(start(bundle, source, place / f"{users}.parquet", 512))
        print(
            f"{users:,} users: " + ", ".join(f"{name} {value:,.0f}" for name, value in found[users].items()), flush=True
        )
    return found


def small_bundle(place: Path) -> Path:
    """A bundle of a run on ml-100k whose only trained model is one epoch of a small light scorer."""
    from recllm.export import export_run
    from recllm.runs import Run
    from recllm.train import train_run

    run = Run.model_validate(
        {
            "name": "small",
            "output": str(place),
            "data": {"name": "ml-100k"},
            "model": {"name": "none", "item_encoder": "minilm-l6"},
            "light": {"width": 32, "num_train_epochs": 1},
        }
    )
    (exported,) = export_run(run, train_run(run, say=print), ["fp32"], print)
    if exported.folder is None:
        raise SystemExit(f"The bundle failed its gate: {exported.failures}")
    return exported.folder


def main() -> None:
    """Measure and end with the line of bars."""
    if sys.argv[1:2] == ["--job"]:
        job(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(prog="recllm bench batch", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="30 kills, and up to 30,000 users in place of a million")
    parser.add_argument("--bundle", type=Path, help="default: a small one is trained on ml-100k")
    given = parser.parse_args()
    sizes = [10_000, 30_000] if given.quick else [10_000, 100_000, 1_000_000]
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        bundle = given.bundle or small_bundle(place)
        items = list(recllm.load(bundle).index.ids)
        killed = kills(bundle, place, items, 30 if given.quick else 300)
        sized = memory(bundle, place, items, sizes)
    grown = sized[sizes[-1]]["peak"] - sized[sizes[0]]["peak"]
    bars: dict[str, dict[str, Any]] = {
        "jobs_with_other_bytes": {"value": killed["wrong"], "bar": 0, "holds": killed["wrong"] == 0},
        "memory_growth_megabytes": {"value": round(grown, 1), "bar": FLAT, "holds": grown <= FLAT},
    }
    print(json.dumps({"benchmark": "batch", "kills": killed, "memory": sized, "bars": bars}))


if __name__ == "__main__":
    main()

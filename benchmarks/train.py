"""What training costs, and whether it can be killed: `recllm bench train -- [--quick]`.

Supervised targets per second of next-item training against a plain pair-per-prompt loop on the same model, bf16 against
fp32, pairs behind one history against whole prompts, padding, the plan of `--dry-run` against what training then took,
and runs that are killed at random moments and must end with the same bits. Ends with one line of JSON that has the
bars.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from recllm.examples import lengths_of
from recllm.judging import relevance_stage
from recllm.lean import lean
from recllm.loop import Stage, fit
from recllm.nextitem import language_stage, light_stage
from recllm.planning import measure, peak_memory, random_features
from recllm.recipes import parse
from recllm.runs import Run, write_run
from recllm.tasks import prepare

MODEL, ENCODER = "smollm2-135m-instruct", "minilm-l6"
HISTORY = 50
ROWS, PAIRS, TREE_ROWS = 16, 4, 30
"""Histories and pairs in a step; pairs of one user and items of a history where they are read together."""
KEPT = ("lm/model.safetensors", "light/model.safetensors", "fusion.json")
Bar = dict[str, Any]

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "item tokens": {"train": {"per_device_train_batch_size": 16, "max_steps": 24, "eval_steps": 12}},
    "accumulated": {
        "adapter": {"recipe": "houlsby"},
        "train": {
            "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": 2,
            "max_steps": 12,
            "eval_steps": 12,
            "precision": "fp32",
        },
    },
    "pairs": {
        "model": {"task": "relevance", "max_history": 4},
        "train": {"per_device_train_batch_size": 8, "max_steps": 16, "eval_steps": 16},
    },
}
"""Runs whose plan is compared with what they took."""
SHORTER = {
    "item tokens": {"max_steps": 16, "eval_steps": 8},
    "accumulated": {"max_steps": 8, "eval_steps": 8},
    "pairs": {"max_steps": 8, "eval_steps": 8},
}
"""The same in a quick run."""


def say(line: str) -> None:
    """Progress goes to standard error."""
    print(line, file=sys.stderr, flush=True)


def run_of(place: Path, **tables: dict[str, Any]) -> Run:
    """A run on ml-100k, with `tables` over what is common to all of them."""
    common: dict[str, Any] = {
        "name": "bench",
        "output": str(place),
        "data": {"name": "ml-100k"},
        "model": {"name": MODEL, "item_encoder": ENCODER, "max_history": HISTORY},
    }
    for name, table in tables.items():
        common[name] = common.get(name, {}) | table
    return parse(Run, common, "benchmark")


def stage_of(run: Run) -> Stage:
    """The fine-tuning of a run, over item vectors of the right shape."""
    task = prepare(run, say)
    if run.model.task == "relevance":
        return relevance_stage(run, task, random_features(run, task), say)
    return language_stage(run, task, random_features(run, task), say)


def stepper(stage: Stage, batch: dict[str, Tensor], *, bf16: bool) -> Callable[[], None]:
    """One step on a batch as training makes it: forward, back, AdamW, and the model made lean for its precision."""
    lean(stage.model, torch.bfloat16 if bf16 else None, cpu=True)
    optimizer = torch.optim.AdamW([value for value in stage.model.parameters() if value.requires_grad], lr=1e-4)
    model: nn.Module = stage.model.train()

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            loss = model(**batch)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def in_turns(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median seconds of each, interleaved; the first round is not counted."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    for place in range(rounds + 1):
        for name, step in steps.items():
            began = time.monotonic()
            step()
            if place:
                found[name].append(time.monotonic() - began)
    return {name: statistics.median(times) for name, times in found.items()}


def targets(place: Path, rounds: int) -> dict[str, float]:
    """Supervised targets and tokens per second of whole histories and of pairs, in this machine's best precision."""
    whole, exact = stage_of(run_of(place)), stage_of(run_of(place))
    pairs = stage_of(run_of(place, model={"task": "relevance"}))
    long = [row for row in whole.train.rows if len(row) == HISTORY + 1][:ROWS]
    histories = whole.collator(long)
    asked = [pairs.train[row] for row in range(64)]
    asked = sorted(asked, key=lambda row: len(row[0]))[-PAIRS:]  # full histories, as on the other side
    prompts = pairs.collator(asked)
    seconds = in_turns(
        {
            "histories": stepper(whole, histories, bf16=True),
            "histories in fp32": stepper(exact, histories, bf16=False),
            "pairs": stepper(pairs, prompts, bf16=True),
        },
        rounds,
    )
    labels = int((histories["labels"] >= 0).sum())
    tokens = {"histories": int(lengths_of(histories).sum()), "pairs": int(lengths_of(prompts).sum())}
    return {
        "targets_per_second": labels / seconds["histories"],
        "targets_per_second_of_pairs": len(asked) / seconds["pairs"],
        "tokens_of_a_target": tokens["histories"] / labels,
        "tokens_of_a_pair": tokens["pairs"] / len(asked),
        "tokens_per_second": tokens["histories"] / seconds["histories"],
        "tokens_per_second_of_pairs": tokens["pairs"] / seconds["pairs"],
        "bf16_to_fp32": seconds["histories in fp32"] / seconds["histories"],
    }


def behind_one_history(place: Path, rounds: int) -> dict[str, float]:
    """Rows of pairs per second, read by whole prompts and behind one history, over the same rows of one user."""
    keys = {"task": "relevance", "max_history": TREE_ROWS, "history_stride": TREE_ROWS // 2}
    trees = stage_of(run_of(place, model=keys | {"rows_together": TREE_ROWS}))
    whole = stage_of(run_of(place, model=keys))
    block = max((trees.train[place] for place in range(min(len(trees.train), 500))), key=len)[: TREE_ROWS // 2]
    prompts = [(row.stem + row.branch, row.label, row.user) for row in block]
    batches = {"behind one history": trees.collator([block]), "whole prompts": whole.collator(prompts)}
    stages = {"behind one history": trees, "whole prompts": whole}
    seconds = in_turns({name: stepper(stages[name], batch, bf16=True) for name, batch in batches.items()}, rounds)
    tokens = {name: int(lengths_of(batch).sum()) / len(block) for name, batch in batches.items()}
    return {f"rows_per_second_{name.replace(' ', '_')}": len(block) / own for name, own in seconds.items()} | {
        f"tokens_of_a_row_{name.replace(' ', '_')}": own for name, own in tokens.items()
    }


def padding(place: Path, _: int = 0) -> dict[str, float]:
    """Share of the ids in the batches of one pass that are padding, by stage."""
    found = {}
    run = run_of(place)
    task = prepare(run, say)
    features = random_features(run, task)
    for stage in (language_stage(run, task, features, say), light_stage(run, task, features)):
        rows = stage.arguments["per_device_train_batch_size"]
        wasted = whole = 0
        for start in range(0, len(stage.train), rows):
            batch = stage.collator([stage.train[row] for row in range(start, min(start + rows, len(stage.train)))])
            whole += batch["ids"].numel()
            wasted += batch["ids"].numel() - int(lengths_of(batch).sum())
        found[stage.scorer] = wasted / whole
    return found


MEASURED: dict[str, Callable[[Path, int], dict[str, float]]] = {
    "targets": targets,
    "rows": behind_one_history,
    "padding": padding,
}
"""Measurements that share nothing with the others."""


def apart(kind: str, *arguments: object) -> dict[str, Any]:
    """A part in a process of its own, whose memory goes with it: pairs with full histories take 18 GB."""
    command = [sys.executable, __file__, "--child", kind, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def child(kind: str, file: str, rounds: str = "0") -> None:
    """In a process of its own: a measurement in a folder, the plan of a run, or what its training takes."""
    if kind in MEASURED:
        print(json.dumps(MEASURED[kind](Path(file), int(rounds))))
        return
    run = parse(Run, json.loads(Path(file).read_text(encoding="utf-8")), file)
    stage = stage_of(run)
    if kind == "plan":
        cost = measure(stage, say)
        print(json.dumps({"memory": cost.memory, "seconds": cost.seconds, "tokens": cost.tokens}))
        return
    read = [0]

    def count(model: nn.Module, _: object, batch: dict[str, Tensor]) -> None:
        read[0] += int(lengths_of(batch).sum()) if model.training else 0

    stage.model.register_forward_pre_hook(count, with_kwargs=True)
    began = time.monotonic()
    fit(stage, folder=run.folder, say=say)
    print(json.dumps({"memory": peak_memory(), "seconds": time.monotonic() - began, "tokens": read[0]}))


def plans(place: Path, *, quick: bool) -> dict[str, dict[str, float]]:
    """Plan over outcome of every configuration: memory and time as ratios, the difference of tokens."""
    found = {}
    for name, whole in CONFIGURATIONS.items():
        tables = whole | {"train": whole["train"] | SHORTER[name]} if quick else whole
        said = {}
        for kind in ("plan", "outcome"):
            run = run_of(place / kind / name.replace(" ", "-"), **tables)
            file = place / f"{kind}-{name}.json"
            file.write_text(run.model_dump_json(), encoding="utf-8")
            said[kind] = apart(kind, file)
        plan, outcome = said["plan"], said["outcome"]
        found[name] = {
            "memory": plan["memory"] / outcome["memory"],
            "seconds": plan["seconds"] / outcome["seconds"],
            "tokens": plan["tokens"] - outcome["tokens"],
        }
        say(f"Plan over outcome, {name}: " + ", ".join(f"{key} {value:.3g}" for key, value in found[name].items()))
    return found


def small_model(place: Path) -> Path:
    """A random language model of two narrow layers with SmolLM2's tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from recllm.lm import load_tokenizer, model_folder

    folder = place / "small"
    tokenizer = load_tokenizer(model_folder(MODEL))
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def start(file: Path) -> subprocess.Popen[str]:
    """A training in a process of its own, from the moment on when it has read its data."""
    command = [sys.executable, "-m", "recllm.train", str(file), "--resume"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    # Before it stands what reading the data has warned of.
    if not any("training events" in line for line in iter(process.stdout.readline, "")):
        raise SystemExit(f"The training did not start: {process.communicate()[1]}")
    return process


def kills(place: Path, number: int) -> dict[str, int]:
    """Kill trainings at random moments, in two rows of one thread each; how many ended with other bits."""
    model = small_model(place)
    files = {}
    for name in ("straight", "one", "other"):
        run = run_of(
            place,
            model={"name": str(model), "max_history": 20, "head_width": 32, "learnt_width": 4},
            light={"width": 32, "num_train_epochs": 1, "per_device_train_batch_size": 64, "max_history": 20},
            train={
                "per_device_train_batch_size": 8,
                "gradient_accumulation_steps": 2,
                "max_steps": 60,
                "save_steps": 6,
                "eval_steps": 6,
                "recent_windows": True,
                "precision": "fp32",
            },
            ease={"max_items": 0},
            transitions={"max_items": 0},
            neighbours={"neighbours": 0, "regression": False},
        )
        files[name] = place / f"{name}.toml"
        write_run(run.model_copy(update={"name": name}), files[name])
    process = start(files["straight"])
    began = time.monotonic()
    process.communicate()
    takes = time.monotonic() - began
    rows = [(files["one"], number - number // 2, 1), (files["other"], number // 2, 2)]
    with ThreadPoolExecutor(len(rows)) as pool:
        found = list(pool.map(lambda row: _kills_in_a_row(place, *row, takes=takes), rows))
    return {key: sum(each[key] for each in found) for key in found[0]}


def _kills_in_a_row(place: Path, file: Path, number: int, seed: int, *, takes: float) -> dict[str, int]:
    """Kill one training after the other, a new one begun whenever one is done; it `takes` so many seconds."""
    rng, name = np.random.default_rng(seed), file.stem
    killed, runs, wrong, done = 0, 0, 0, False
    while killed < number or not done:
        if done:
            file = _renamed(file, place, f"{name}-{runs}")
        process = start(file)
        if killed < number:
            time.sleep(rng.uniform(0.0, takes / 2))
            process.send_signal(signal.SIGKILL)
        said = process.communicate()[1]
        if process.returncode not in (0, -signal.SIGKILL):
            raise SystemExit(f"A training ended with {process.returncode}: {said}")
        killed += process.returncode == -signal.SIGKILL
        done = process.returncode == 0
        if done:
            runs += 1
            wrong += any(
                (place / file.stem / kept).read_bytes() != (place / "straight" / kept).read_bytes() for kept in KEPT
            )
        if killed % 5 == 0:
            say(f"{name}: {killed} kills, {runs} runs done, {wrong} with other bits")
    return {"kills": killed, "runs": runs, "wrong": wrong}


def _renamed(file: Path, place: Path, name: str) -> Path:
    other = place / f"{name}.toml"
    other.write_text(
        file.read_text(encoding="utf-8").replace(f'name = "{file.stem}"', f'name = "{other.stem}"', 1), encoding="utf-8"
    )
    return other


def bar(value: float, limit: float, *, least: bool) -> Bar:
    """A figure against its limit."""
    return {"value": round(value, 4), "bar": limit, "holds": value >= limit if least else value <= limit}


def main() -> None:
    """Measure and end with the line of bars."""
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(prog="recllm bench train", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="6 kills in place of 100, three rounds, shorter trainings, and bars alone"
    )
    parser.add_argument("--only", choices=["targets", "padding", "plans", "kills"], help="one part")
    given = parser.parse_args()
    asked = [given.only] if given.only else ["targets", "padding", "plans", "kills"]
    result: dict[str, Any] = {"benchmark": "train", "threads": torch.get_num_threads(), "took": {}}
    bars: dict[str, Bar] = {}
    began = time.monotonic()

    def took(part: str) -> None:
        result["took"][part] = round(time.monotonic() - began - sum(result["took"].values()))

    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        if "targets" in asked:
            rounds = 3 if given.quick else 7
            found = result["targets"] = apart("targets", place, rounds)
            if not given.quick:  # no bar hangs on it
                result["rows"] = apart("rows", place, rounds)
            ratio = found["targets_per_second"] / found["targets_per_second_of_pairs"]
            bars["targets_to_pairs"] = bar(ratio, 20.0, least=True)
            bars["bf16_to_fp32"] = bar(found["bf16_to_fp32"], 1.8, least=True)
            if not torch.cpu._is_amx_tile_supported():
                bars["bf16_to_fp32"] |= {"holds": None, "why": "asked of a CPU with AMX; this one has none"}
            took("targets")
        if "padding" in asked:
            result["padding"] = apart("padding", place)
            bars["padding"] = bar(max(result["padding"].values()), 0.02, least=False)
            took("padding")
        if "plans" in asked:
            result["plans"] = plans(place, quick=given.quick)
            for name, limit in (("memory", 0.1), ("seconds", 0.25), ("tokens", 0.0)):
                off = [abs(found[name] - (name != "tokens")) for found in result["plans"].values()]
                bars[f"plan_{name}"] = bar(max(off), limit, least=False)
            took("plans")
        if "kills" in asked:
            result["kills"] = kills(place, 6 if given.quick else 100)
            bars["runs_with_other_bits"] = bar(result["kills"]["wrong"], 0, least=False)
            took("kills")
    print(json.dumps(result | {"bars": bars}))


if __name__ == "__main__":
    main()

"""Ranking quality by a fixed protocol: `recllm bench quality -- [--quick] [--protocol topk] [--data NAME]`.

Trains the scorers of a run for every seed, tunes the classical references as hard on the same validation rows, prints
one table with 95 % intervals (paired bootstrap over users) and ends with one line of JSON that has the bars. What was
measured is kept in benchmarks/results/, from which benchmarks/tables.py makes the tables of README.md and
docs/quality.md.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import settings
from numpy.typing import NDArray
from references import GRIDS, Reference, tuned_references

from recllm.collaborative import load_collaborative
from recllm.data import Query
from recllm.evaluate import KnownScores, evaluate_ranking
from recllm.files import read_json, write_json
from recllm.fusion import Fusion
from recllm.outcome import FUSION, evaluate_run
from recllm.protocols import evaluation_protocol
from recllm.ranking import ItemIndex, mask_seen, top_k
from recllm.recipes import parse
from recllm.reserved import Lists, reserve
from recllm.results import Table, averaged
from recllm.runs import ENVIRONMENT, Run, set_key
from recllm.scoring import known_scores
from recllm.tasks import Task
from recllm.train import train_run

RESULTS = Path(__file__).parent / "results"
PLAIN_SUM = "plain sum"
KEPT = "fusion, 1 of 10 places for new items"


def say(line: str) -> None:
    """Progress goes to standard error: standard output has the tables and the line of JSON."""
    print(line, file=sys.stderr, flush=True)


def arguments() -> argparse.Namespace:
    """What was asked for, with the protocol's own data set and metric filled in."""
    parser = argparse.ArgumentParser(prog="recllm bench quality", description=__doc__)
    parser.add_argument("--protocol", default="topk", choices=settings.PROTOCOLS)
    parser.add_argument("--data", help="a name, a folder, or a folder under RECLLM_DATA; default: the protocol's first")
    parser.add_argument("--quick", action="store_true", help="ml-100k, one seed, a short run of the language model")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--lm", default="none", help="language model; none leaves it out")
    parser.add_argument("--events", type=int, default=0, help="events given back of each cold item (cold-item)")
    parser.add_argument("--shots", type=int, default=64, help="training rows (few-shot)")
    parser.add_argument(
        "--references", nargs="*", default=list(GRIDS), choices=[*GRIDS, []], metavar="NAME", help="which; default all"
    )
    parser.add_argument("--control", choices=settings.CONTROLS, help="what the trained models lack; no references")
    parser.add_argument("--runs", type=Path, help="keep the runs here, and go on with those that are there")
    parser.add_argument("--result", help="names the kept result; default by protocol and data")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the run file"
    )
    given = parser.parse_args()
    if given.quick:
        given.seeds = given.seeds[:1]
        given.lm = "smollm2-135m-instruct" if given.protocol == "topk" else given.lm
    if given.control is not None:
        given.references = []  # they know nothing of the control
        names = any(key.startswith("model.likelihood=") for key in given.set)  # a language model reads those
        if given.lm == "none" and not names and settings.CONTROLS[given.control].get("language_model"):
            parser.error(f"--control {given.control} is about the language model: name it by --lm.")
    if given.set and given.result is None:
        parser.error("--set measures something else than the kept result of that name: name this one by --result.")
    given.data = given.data or settings.PROTOCOLS[given.protocol].data[0]
    if missing := lost(given):
        parser.error(f"{place_of(given).name} is kept with {missing}, which this would not have: name it by --result.")
    return given


def run_of(given: argparse.Namespace, seed: int, output: Path) -> Run:
    """The run of one seed."""
    values = settings.run_values(given.protocol, given.data, given.lm, quick=given.quick, control=given.control)
    values |= {"name": f"{'-'.join(name_parts(given))}-seed-{seed}", "output": str(output), "seed": seed}
    if given.protocol == "cold-item":
        values["data"]["given_back"] = given.events
    if given.protocol == "few-shot":
        values["data"]["shots"] = given.shots
    for override in given.set:
        set_key(values, override)
    return parse(Run, values, "benchmark")


def references_of(run: Run, task: Task, names: list[str]) -> dict[str, Reference]:
    """The tuned references of a run that ranks; a run that judges pairs has its priors among its own scorers."""
    if run.model.task != "next_item" or not names:
        return {}
    vectors = load_collaborative(run, task).vectors
    return tuned_references(task, vectors, run.seed, names, say, run.light, run.folder / "references")


def measure(run: Run, names: list[str]) -> tuple[dict[str, Table], dict[str, Reference], dict[str, Any]]:
    """Tables by slice of candidates, the references, and what the run says of itself."""
    task = train_run(run, resume=(run.folder / "run.toml").is_file(), say=say)
    scores = known_scores(run, task, load_collaborative(run, task), say)["test"]
    references = references_of(run, task, names)
    protocol = evaluation_protocol(run, task)
    examples = protocol.examples("test")
    plain = Fusion.load(run.folder / "fusion.json").plain_sum()
    others: dict[str, Any] = {name: reference.scorer for name, reference in references.items()}
    others[PLAIN_SUM] = protocol.fuse(plain, scores, examples)
    if task.split.cold_items:
        fusion = Fusion.load(run.folder / "fusion.json")
        fused, queries = protocol.fuse(fusion, scores, examples), [example.query for example in examples]
        others[KEPT] = with_places(fused, queries, task.index, task.item_counts < fusion.few)
    tables = {"all": evaluate_run(run, task, scores, others=others)}
    if task.split.cold_items:
        tables["among cold items"] = among_cold(run, task, scores, others)
    facts = {
        "fusion": read_json(run.folder / "fusion.json"),
        "environment": read_json(run.folder / ENVIRONMENT),
        "half_lives": read_json(run.folder / "cf" / "half_lives.json"),
    }
    return tables, references, facts


def with_places(
    fused: NDArray[np.float32],
    queries: Sequence[Query],
    index: ItemIndex,
    new: NDArray[np.bool_],
    k: int = 10,
    count: int = 1,
) -> NDArray[np.float32]:
    """Scores that rank as a list of `k` does which keeps places for new items: the negative place of every item."""
    shown = mask_seen(fused, queries, index)
    only_new = np.where(new, shown, np.float32(np.nan))
    empty = np.zeros((len(shown), 0, k), dtype=np.float32)
    kept = reserve(Lists(*top_k(shown, k), empty), Lists(*top_k(only_new, count), empty[:, :, :count])).rows
    # What is no longer among the best stands behind them, in its old order.
    order = np.argsort(np.argsort(np.where(np.isnan(fused), np.inf, -fused), axis=1, kind="stable"), axis=1)
    places = (order + k).astype(np.float32)
    rows, columns = np.nonzero(kept >= 0)
    places[rows, kept[rows, columns]] = columns
    return np.where(np.isnan(fused), np.float32(np.nan), -places)


def among_cold(run: Run, task: Task, scores: dict[str, Any], others: dict[str, Any]) -> Table:
    """The same rows with only the cold items as candidates."""
    protocol = evaluation_protocol(run, task)
    examples = protocol.examples("test")
    queries = [example.query for example in examples]
    every = dict(scores) | others
    for name, file in ((f"{FUSION} without lm", "fusion-without-lm.json"), (FUSION, "fusion.json")):
        if (run.folder / file).is_file():
            every[name] = protocol.fuse(Fusion.load(run.folder / file), scores, examples)
    known = {
        name: value if hasattr(value, "score") else KnownScores(queries, task.index, np.asarray(value))
        for name, value in every.items()
    }
    return evaluate_ranking(known, examples, ItemIndex(sorted(task.split.cold_items)), slices={}, seed=0)


def main() -> None:
    """Measure every seed, print the tables, keep the result and end with the line of bars."""
    given = arguments()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    found = []
    with tempfile.TemporaryDirectory() as temporary:
        output = given.runs or Path(temporary)
        for seed in given.seeds:
            say(f"{given.protocol} on {given.data}, seed {seed}")
            found.append(measure(run_of(given, seed, output), given.references))
    tables = {part: averaged([each[0][part] for each in found]) for part in found[0][0]}
    for part, table in tables.items():
        print(f"{given.protocol}, {given.data}, {part}: mean of {len(found)} seeds", *table.lines(), sep="\n")
    result = {
        "benchmark": "quality",
        "protocol": given.protocol,
        "data": Path(given.data).name,
        "command": command(),
        "seeds": given.seeds,
        "language_model": given.lm,
        "control": given.control,
        "commit": commit(),
        "versions": found[0][2]["environment"]["versions"],
        "device": found[0][2]["environment"]["device"],
        "tables": {part: table.to_dict() for part, table in tables.items()},
        "differences": {part: differences(table, given.protocol) for part, table in tables.items()},
        "references": [
            {
                name: {"chosen": own.chosen, "trials": own.trials, "epochs": own.epochs, "seconds": own.seconds}
                for name, own in each[1].items()
            }
            for each in found
        ],
        "fusion": [
            {key: each[2]["fusion"].get(key) for key in ("chosen", "candidates", "chosen_new", "candidates_new")}
            for each in found
        ],
        "half_lives": [each[2]["half_lives"] for each in found],
        "bars": settings.bars(given, tables),
    }
    keep(result, given)
    print(json.dumps({key: result[key] for key in ("benchmark", "protocol", "data", "seeds", "bars")}))


def command() -> str:
    """What makes this result again; where the runs are kept has no part in it."""
    words = sys.argv[1:]
    if "--runs" in words:
        place = words.index("--runs")
        words = words[:place] + words[place + 2 :]
    words = [word for word in words if not word.startswith("--runs=")]
    return "recllm bench quality -- " + shlex.join(words)


def differences(table: Table, protocol: str) -> dict[str, list[float | None]]:
    """The fusion less every other row, with the interval, in the protocol's first metric."""
    metric = settings.PROTOCOLS[protocol].metric
    result = {}
    for name in table.scorers:
        if name != FUSION:
            interval = table.difference(FUSION, name, metric)
            result[name] = [None if np.isnan(value) else round(float(value), 5) for value in interval]
    return result


def name_parts(given: argparse.Namespace) -> list[str]:
    """What names a result and its runs."""
    parts = [given.protocol, Path(given.data).name]
    parts += [f"{given.events}-events"] if given.protocol == "cold-item" else []
    parts += [f"{given.shots}-shots"] if given.protocol == "few-shot" else []
    parts += [given.control] if given.control is not None else []
    return [*parts, "quick"] if given.quick else parts


def place_of(given: argparse.Namespace) -> Path:
    """Where the result is kept."""
    return RESULTS / f"{given.result or '-'.join(name_parts(given))}.json"


def lost(given: argparse.Namespace) -> str:
    """What a kept result has that this one would not have; empty where nothing would be lost."""
    if not place_of(given).is_file():
        return ""
    kept = read_json(place_of(given))
    references = kept["references"][0] if isinstance(kept["references"], list) else kept["references"]
    gone = [f"seed {seed}" for seed in kept["seeds"] if seed not in given.seeds]
    gone += [name for name in references if name not in given.references]
    model = kept["language_model"]
    gone += [f"the language model {model}"] if model not in ("none", given.lm) else []
    gone += [f"--set {key}" for key in set_of(kept["command"]) if key not in given.set]
    return ", ".join(gone)


def set_of(command: str) -> list[str]:
    """The overrides of a kept command."""
    words = shlex.split(command)
    after = [words[place + 1] for place, word in enumerate(words[:-1]) if word == "--set"]
    return after + [word.removeprefix("--set=") for word in words if word.startswith("--set=")]


def commit() -> str | None:
    """The commit that is measured, with a sign where files differ from it; None where that is not known.

    Results that were kept since are no difference.
    """

    def git(*arguments: str) -> str:
        root = Path(__file__).parents[1]
        told = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True)
        return told.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)benchmarks/results")
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def keep(result: dict[str, Any], given: argparse.Namespace) -> None:
    """Write the result under benchmarks/results/, in place of an older one of the same kind."""
    path = place_of(given)
    path.parent.mkdir(exist_ok=True)
    write_json(path, result)
    say(f"Kept in {path.name}")


if __name__ == "__main__":
    main()

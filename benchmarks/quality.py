"""Ranking quality of every scorer of a run on one data set: `recllm bench quality [--quick] [--data NAME]`.

Trains under a temporary folder, prints the tables with intervals, and ends with one line of JSON that has the bars.
"""

import argparse
import json
import os
import sys
import tempfile

import numpy as np

from recllm.outcome import FUSION, WITHOUT_LM, evaluate_run
from recllm.recipes import parse
from recllm.runs import Run
from recllm.train import known_scores, train_run
from recllm.trained import load_collaborative

METRIC = "NDCG@10"


def run_of(arguments: argparse.Namespace, seed: int, output: str) -> Run:
    """The run of one seed."""
    model = "smollm2-135m-instruct" if arguments.lm_steps else "none"
    values = {
        "name": f"seed-{seed}",
        "output": output,
        "seed": seed,
        "data": {"name": arguments.data, "split": arguments.split},
        "model": {"name": model, "item_encoder": "minilm-l6", "max_history": 30},
        "light": {"width": 128, "learning_rate": 2e-3, "num_train_epochs": 4 if arguments.quick else 10},
        "train": {"max_steps": arguments.lm_steps or 1, "num_train_epochs": 8, "recent_windows": True},
    }
    return parse(Run, values, "benchmark")


def measure(run: Run) -> tuple[dict[str, dict[str, float]], list[str], tuple[float, float, float]]:
    """Figures by scorer and metric, the table, and the fusion's difference to matrix factorization."""
    task = train_run(run, say=lambda line: print(line, file=sys.stderr))
    scores = known_scores(run, task, load_collaborative(run, task), lambda line: print(line, file=sys.stderr))
    table = evaluate_run(run, task, scores["test"])
    figures = {name: {metric: table.interval(name, metric)[0] for metric in table.metrics} for name in table.scorers}
    return figures, table.lines(), table.difference(FUSION, "mf", METRIC)


def main() -> None:
    """Measure every seed, print tables and the line of bars."""
    parser = argparse.ArgumentParser(prog="recllm bench quality", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed, few epochs")
    parser.add_argument("--data", default="ml-100k", help="a name, a folder, or a folder under RECLLM_DATA")
    parser.add_argument("--split", default="leave-last-out", choices=["leave-last-out", "temporal", "cold-items"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--lm-steps", type=int, default=0, help="training steps of SmolLM2; 0 leaves it out")
    arguments = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    found, lows = [], []
    for seed in arguments.seeds[:1] if arguments.quick else arguments.seeds:
        with tempfile.TemporaryDirectory() as output:
            figures, lines, difference = measure(run_of(arguments, seed, output))
        print(f"seed {seed}", *lines, f"fusion − mf: {METRIC} {difference}", sep="\n")
        found.append(figures)
        lows.append(difference[1])
    means = {
        name: {metric: float(np.mean([figures[name][metric] for figures in found])) for metric in found[0][name]}
        for name in found[0]
    }
    ratio = means[FUSION][METRIC] / means["mf"][METRIC]
    bars = {
        "ndcg_ratio_fusion_to_mf": {"value": round(ratio, 3), "bar": 1.4, "holds": ratio >= 1.4}
        if arguments.data.rstrip("/").endswith("ml-100k") and arguments.split == "leave-last-out"
        else {
            "value": round(ratio, 3),
            "bar": 1.4,
            "holds": None,
            "why": "the bar is stated for ml-100k, leave-last-out",
        },
        "fusion_above_mf_with_interval": {"value": round(min(lows), 4), "bar": 0.0, "holds": min(lows) > 0},
    }
    shown = {name: means[name] for name in means if name != WITHOUT_LM or arguments.lm_steps}
    facts = {"data": arguments.data, "split": arguments.split, "seeds": len(found)}
    print(json.dumps({"benchmark": "quality", **facts, "metrics": shown, "bars": bars}))


if __name__ == "__main__":
    main()

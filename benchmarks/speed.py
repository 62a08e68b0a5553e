"""Seconds of what a user waits for: `recllm bench speed [--quick]`.

Ranks candidates for one user by the relevance prompt, naively (a full prompt per candidate) and with the history read
once, interleaved in one run; and measures `recllm --help`. Ends with one line of JSON that has the bars.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

import numpy as np
import torch

from recllm.data import Catalog, Query
from recllm.lm import model_folder
from recllm.ranking import ItemIndex
from recllm.relevance import RelevanceScorer, zero_shot_scorer

HELP_SECONDS = 0.3
SPEED_UP = 5.0
"""The history is read once, not once per candidate: the token bound of the default sizes is about 14."""


def catalogue(items: int) -> Catalog:
    """Items with made-up titles of about ten tokens."""
    import polars as pl

    words = ["red", "blue", "old", "night", "river", "city", "song", "winter", "garden", "stone"]
    titles = [
        f"The {words[i % 10]} {words[i // 10 % 10]} of {words[i // 100 % 10]} {words[(i * 7) % 10]} ({1950 + i % 60})"
        for i in range(items)
    ]
    return Catalog(pl.DataFrame({"item_id": [str(i) for i in range(items)], "title": titles}))


def naive(scorer: RelevanceScorer, query: Query, candidates: ItemIndex) -> np.ndarray:
    """A full prompt per candidate, in length order, in the same batches; less the same for an empty history."""
    suffixes = [scorer.prompt.suffix(scorer.catalog.record(item)) or [] for item in candidates.ids]
    result = np.zeros(len(suffixes))
    for sign, prefix in ((1, scorer.prompt.prefix(query, scorer.catalog)), (-1, scorer.prompt.empty_prefix)):
        for start in range(0, len(suffixes), 16):
            rows = [prefix + suffix for suffix in suffixes[start : start + 16]]
            lengths = torch.tensor([len(row) for row in rows])
            ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
            for place, row in enumerate(rows):
                ids[place, : len(row)] = torch.tensor(row)
            with torch.inference_mode():
                result[start : start + len(rows)] += sign * scorer.model.logits(ids, lengths).numpy()
    return result


def help_seconds() -> float:
    """Median of seven starts of the command line, the interpreter's included."""
    command = [sys.executable, "-c", "from recllm.cli import main; main(['--help'])"]
    times = []
    for _ in range(7):
        start = time.perf_counter()
        subprocess.run(command, capture_output=True, check=False)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    """Measure, print rounds and the line of bars."""
    parser = argparse.ArgumentParser(prog="recllm bench speed", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer candidates and rounds")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    arguments = parser.parse_args()
    candidates, rounds = (32, 3) if arguments.quick else (100, 7)
    catalog = catalogue(400)
    model_folder(arguments.model, lambda line: print(line, file=sys.stderr))
    query = Query(tuple(str(item) for item in range(0, 300, 10)))
    times: dict[str, list[float]] = {"naive": [], "shared prefix": []}
    difference = 0.0
    for round_ in range(rounds):
        index = ItemIndex(str(300 + (place + round_) % 100) for place in range(candidates))
        scorer = zero_shot_scorer(arguments.model, "relevance", catalog, lambda _: None)
        scorer.bf16 = False  # both sides in float32
        start = time.perf_counter()
        shared = scorer.score([query], index)[0]
        middle = time.perf_counter()
        full = naive(scorer, query, index)
        times["shared prefix"].append(middle - start)
        times["naive"].append(time.perf_counter() - middle)
        difference = max(difference, float(np.abs(shared - full).max()))
        print(f"round {round_ + 1}: naive {times['naive'][-1]:.2f} s, shared prefix {times['shared prefix'][-1]:.2f} s")
    ratio = statistics.median(times["naive"]) / statistics.median(times["shared prefix"])
    helped = help_seconds()
    bars = {
        "shared_prefix_speed_up": {"value": round(ratio, 2), "bar": SPEED_UP, "holds": ratio >= SPEED_UP},
        "scores_equal": {"value": difference, "bar": 1e-3, "holds": difference <= 1e-3},
        "help_seconds": {"value": round(helped, 3), "bar": HELP_SECONDS, "holds": helped <= HELP_SECONDS},
    }
    seconds = {name: round(statistics.median(values), 3) for name, values in times.items()}
    print(json.dumps({"benchmark": "speed", "candidates": candidates, "seconds": seconds, "bars": bars}))


if __name__ == "__main__":
    main()

"""The outcome of a run: every scorer and the fusion on the test rows, with and without the language model."""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np

from recllm.files import alone, read_json, write_json
from recllm.fusion import Fusion
from recllm.protocols import evaluation_protocol
from recllm.ranking import Scorer, Scores
from recllm.results import Table
from recllm.runs import Run
from recllm.tasks import Task

FUSION, WITHOUT_LM = "fusion", "fusion without lm"


def evaluate_run(
    run: Run,
    task: Task,
    scores: dict[str, Scores],
    *,
    part: str = "test",
    ks: tuple[int, ...] = (10,),
    others: Mapping[str, Scores | Scorer] | None = None,
) -> Table:
    """Measure every scorer and the fusions on the rows of `part`, by the protocol of the run.

    Args:
        run: a trained run.
        task: its data.
        scores: of that part by scorer, as `known_scores` gives them.
        part: "valid" or "test".
        ks: the lengths of the top, where the whole catalogue is ranked.
        others: further rows of the table, scores or scorers.
    """
    protocol = evaluation_protocol(run, task)
    examples = protocol.examples(part)
    every: dict[str, Scores | Scorer] = {name: np.asarray(value) for name, value in scores.items()}
    every |= others or {}
    without = protocol.language
    files = {f"{FUSION} without {without}": f"fusion-without-{without}.json", FUSION: "fusion.json"}
    for name, file in files.items():
        if (run.folder / file).is_file():
            every[name] = protocol.fuse(Fusion.load(run.folder / file), scores, examples)
    return protocol.table(every, examples, ks)


def save_evaluation(run: Run, tables: dict[str, Table]) -> Path:
    """Keep the tables beside the weights, with those of other parts that are there."""
    path = run.folder / "evaluation.json"
    with alone(run.folder / "scores" / path.name):  # of two evaluations at once neither loses the other's
        before = read_json(path) if path.is_file() else {}
        write_json(path, before | {part: table.to_dict() for part, table in tables.items()})
    return path


def learning_curves(run: Run) -> list[dict[str, float | str]]:
    """What the metrics file holds, one dict per log line."""
    path = run.folder / "metrics.jsonl"
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError):  # a line that was cut off says nothing, and the others do
            found.append(json.loads(line))
    return found

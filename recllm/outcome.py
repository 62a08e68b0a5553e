"""The outcome of a run: every scorer and the fusion on the test rows, with and without the language model."""

import json
from pathlib import Path

import numpy as np

from recllm.evaluate import KnownScores, evaluate_ranking
from recllm.files import write_json
from recllm.fusion import Fusion, evidence
from recllm.ranking import Scores
from recllm.results import Table
from recllm.runs import Run
from recllm.tasks import Task

FUSION, WITHOUT_LM = "fusion", "fusion without lm"


def fused_scores(fusion: Fusion, scores: dict[str, Scores], task: Task, part: str) -> Scores:
    """Fused scores of the validation or test rows: float32[rows, items]."""
    examples = task.split.valid if part == "valid" else task.split.test
    queries = [example.query for example in examples]
    n_user, n_item = evidence(queries, task.index, task.split.train.item_counts())
    given = {name: np.asarray(scores[name]) for name in fusion.names}
    return fusion.fuse(given, n_user, n_item)[0]


def evaluate_run(
    run: Run, task: Task, scores: dict[str, Scores], *, part: str = "test", ks: tuple[int, ...] = (10,)
) -> Table:
    """Rank the whole catalogue for every row of `part`, by every scorer and by the fusions.

    Args:
        run: a trained run.
        task: its data.
        scores: float32[rows, items] of that part by scorer.
        part: "valid" or "test".
        ks: the lengths of the top.
    """
    examples = task.split.valid if part == "valid" else task.split.test
    queries = [example.query for example in examples]
    every = {name: np.asarray(value) for name, value in scores.items()}
    for name, file in ((WITHOUT_LM, "fusion-without-lm.json"), (FUSION, "fusion.json")):
        if (run.folder / file).is_file():
            every[name] = fused_scores(Fusion.load(run.folder / file), scores, task, part)
    return evaluate_ranking(
        {name: KnownScores(queries, task.index, value) for name, value in every.items()},
        examples,
        task.index,
        ks=ks,
        slices=task.slices(examples),
        seed=run.seed,
    )


def save_evaluation(run: Run, tables: dict[str, Table]) -> Path:
    """Keep the tables beside the weights."""
    path = run.folder / "evaluation.json"
    write_json(path, {part: table.to_dict() for part, table in tables.items()})
    return path


def learning_curves(run: Run) -> list[dict[str, float | str]]:
    """What the metrics file holds, one dict per log line."""
    path = run.folder / "metrics.jsonl"
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]

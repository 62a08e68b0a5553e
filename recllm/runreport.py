"""The report of any trained run: its facts, metrics, learning curves and fusion weights as the data of a page."""

from typing import Any

import numpy as np

from recllm.files import read_json
from recllm.fusion import Fusion
from recllm.outcome import learning_curves
from recllm.pairs import samples_negatives
from recllm.reordering import FIRST
from recllm.report import CurvePoint, Report, TableRow, WeightCurve
from recllm.results import UNKNOWN, Table, differences
from recllm.runs import Run
from recllm.tasks import Task

LEFT_OUT = ("Recall", "Coverage", "scored")
"""Beginnings of the metrics that the page does without: with one target per row recall is the hit rate."""
FIGURES = {"next_item": ("eval_ndcg@10", "NDCG@10"), "relevance": ("eval_auc", "AUC")}
"""By what the language model is trained for, the validation metric in the metrics file and its name on the page."""

MEASURED = {
    "test": "the test rows",
    "valid": "the validation rows, on which the fusion was fitted: not what it is worth",
}
"""By part, what the page says of its figures."""
DONE = {"steps": "steps", "rows": "training rows"}
"""What the file of a finished language model counts, and how the page calls it."""


def run_report(run: Run, task: Task, table: Table, part: str = "test") -> Report:
    """Gather what the page shows of a run that is trained to its end and measured in `table`, on that part."""
    fusion = Fusion.load(run.folder / "fusion.json")
    user_counts = np.unique(np.geomspace(1, 300, 24).astype(int))
    item_counts = np.unique(np.concatenate([[0], np.geomspace(1, 500, 24)]).astype(int))
    middle_user = int(np.median([len(example.query.history) for example in task.split.valid]))
    middle_item = int(np.median(task.item_counts[task.warm]))
    by_user, by_item = fusion.weights(user_counts, middle_item), fusion.weights(middle_user, item_counts)
    weighed = () if fusion.levels else fusion.names  # where scorers speak one after the other, no weight tells who does
    key, name = FIGURES[run.model.task]
    metrics = [metric for metric in table.metrics if not metric.startswith(LEFT_OUT)]

    def rows(part: str) -> list[TableRow]:
        return [
            TableRow(scorer, {metric: table.interval(scorer, metric, part) for metric in metrics})
            for scorer in table.scorers
        ]

    return Report(
        title=f"recllm: {run.name}",
        facts={
            "Data": f"{task.dataset.name}, {len(task.dataset.interactions):,} events, {len(task.index):,} items",
            "Licence of the data": task.dataset.licence,
            "Split": f"{task.split.name}: {len(task.split.valid):,} validation and {len(task.split.test):,} test rows",
            "Measured on": f"{_counted(table)}: {MEASURED[part]}{_sampled(run, task)}",
            **({"Control": f"{run.control.lacking}: not for use"} if run.control.lacking else {}),
            "Language model": _language(run),
            **({"Likelihood by": run.model.likelihood} if run.model.likelihood is not None else {}),
            "Item text by": run.model.item_encoder or run.model.name,
            "Fusion": f"{fusion.chosen} (chosen on validation){_order(fusion)}",
            "Seed": str(run.seed),
        },
        learning_curve=[
            CurvePoint(str(line["scorer"]), int(line["step"]), _number(line, "loss"), _number(line, key))
            for line in learning_curves(run)
            if "loss" in line or key in line
        ],
        valid_metric=name,
        table=rows("all"),
        slices={f"{own}: {_counted(table, own)}": rows(own) for own in table.counts if own != "all"},
        unknown={metric: UNKNOWN[metric] for metric in metrics if metric in UNKNOWN and table.lacks(metric)},
        ahead={
            f"{scorer}, {metric}": f"{value} ({low}\N{NO-BREAK SPACE}…\N{NO-BREAK SPACE}{high})"
            for metric, found in [differences(table)]
            for scorer, (value, low, high) in found.items()
        },
        weights_by_user=[WeightCurve(own, user_counts.tolist(), by_user[own].tolist()) for own in weighed],
        weights_by_item=[WeightCurve(own, item_counts.tolist(), by_item[own].tolist()) for own in weighed],
    )


def _counted(table: Table, part: str = "all") -> str:
    rows, users = table.counts[part]
    return f"{rows:,} rows of {users:,} users"


def _sampled(run: Run, task: Task) -> str:
    """Of labelled pairs whether the disliked ones are sampled."""
    judges = run.model.task == "relevance"
    return ", half of them sampled items that the user has no event with" if judges and samples_negatives(task) else ""


def _order(fusion: Fusion) -> str:
    """Of a fusion in levels who speaks before whom, and of one with a network what that does."""
    if fusion.network is not None:
        return f": the weights below, and a network that puts the first {FIRST} places in order again"
    if not fusion.levels:
        return ""
    levels = [
        [name for name, own in zip(fusion.names, fusion.levels, strict=True) if own == level]
        for level in sorted(set(fusion.levels))
    ]
    told = "; then ".join(", ".join(names) for names in levels)
    return f": each scorer only where those before it are silent, {told}"


def _language(run: Run) -> str:
    if run.model.name == "none":
        return "none"
    path = run.folder / "lm" / "done.json"
    facts = read_json(path) if path.is_file() else {}
    # A model of the next item keeps its steps, one of pairs the rows that it was asked about.
    done = "".join(f", {facts[key]:,} {text}" for key, text in DONE.items() if key in facts)
    return f"{run.model.name}, adapter {run.adapter.recipe}{done}"


def _number(line: dict[str, Any], key: str) -> float | None:
    return float(line[key]) if key in line else None

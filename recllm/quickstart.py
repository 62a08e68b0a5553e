"""The whole road on ml-100k in one command: train, fuse, evaluate, export, recommend, report: `recllm quickstart`."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np

from recllm.cards import write_adapter_card
from recllm.collaborative import load_collaborative
from recllm.errors import RecllmError
from recllm.export import export_run
from recllm.gate import Exported
from recllm.mf import ImplicitMF
from recllm.outcome import FUSION, WITHOUT_LM, evaluate_run, save_evaluation
from recllm.ranking import Scores
from recllm.recipes import parse
from recllm.report import Recommendations, Recommended, write_report
from recllm.results import Table
from recllm.runreport import run_report
from recllm.runs import FILE, Run, load_run
from recllm.runtime import Recommender, load
from recllm.scoring import known_scores
from recllm.tasks import Task
from recllm.train import Clock, train_run

Say = Callable[[str], None]
SECONDS = 480
"""What the whole command may take on two cores."""
RATIO = 1.4
"""NDCG@10 of the fusion against plain matrix factorization's."""
PLAIN_MF = "mf unfaded"
"""The row of matrix factorization as it is in the literature, beside `mf`, whose histories fade."""
K = 10
NEW_ITEM = {"item_id": "new", "title": "The Matrix (1999)", "genres": "Action, Sci-Fi, Thriller"}
"""A film that came out after the last event of ml-100k, so nobody can have rated it."""
NEW_ITEM_USERS = 24
"""Users among whom those are looked for whom the new film suits best."""
SHOWN = 5


def quickstart_run(output: Path, steps: int, seed: int) -> Run:
    """The run file of the demo: SmolLM2 over item tokens, within a budget of `steps` training steps."""
    values = {
        "name": output.name,
        "output": str(output.parent),
        "seed": seed,
        "data": {"name": "ml-100k"},
        "model": {"name": "smollm2-135m-instruct", "item_encoder": "minilm-l6", "max_history": 30, "head_width": 128},
        "adapter": {"recipe": "lora", "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.0},
        "light": {"width": 128, "learning_rate": 2e-3, "num_train_epochs": 6},
        "train": {
            "learning_rate": 1e-3,
            "head_learning_rate": 2e-3,
            "per_device_train_batch_size": 16,
            "max_steps": steps,
            "recent_windows": True,
            "logging_steps": 4,
            "eval_steps": -(-steps // 3),
        },
        "export": {"recipes": ["int8"], "gate_queries": 32},
    }
    return parse(Run, values, "quickstart")


def quickstart(
    output: Path, *, steps: int = 48, seed: int = 0, resume: bool = False, say: Say = print
) -> dict[str, Any]:
    """Run the demo.

    Args:
        output: the run's folder.
        steps: training steps of the language model.
        seed: of everything random.
        resume: keep what an earlier call finished; else what an earlier call left is replaced.
        say: gets the lines for the user.

    Returns:
        Plain data: metrics, paths, seconds of each stage, bars.

    Raises:
        RecllmError: the folder holds something else than a quickstart, or data or models cannot be fetched.
    """
    started, clock = time.monotonic(), Clock()
    run = quickstart_run(output, steps, seed)
    _check_own(run.folder)
    resumed = resume and (run.folder / FILE).is_file()
    say(f"1/5  Training on ml-100k: {steps} steps of {run.model.name} with LoRA, and the scorers beside it")
    task = train_run(run, resume=resume, overwrite=not resume, say=lambda line: say(f"     {line}"), clock=clock)
    say("2/5  Evaluating on the last event of every user, whole catalogue")
    with clock.stage("evaluate"):
        parts = load_collaborative(run, task)
        scores = known_scores(run, task, parts, say)
        others = {PLAIN_MF: unfaded(parts.mf)}
        tables = {part: evaluate_run(run, task, scores[part], part=part, others=others) for part in ("valid", "test")}
        save_evaluation(run, tables)
        write_adapter_card(run)
    for line in _table_lines(tables["test"]):
        say(f"     {line}")
    say("3/5  Exporting to ONNX")
    with clock.stage("export"):
        exported = _export(run, task, lambda line: say(f"     {line}"))
    assert exported.folder is not None
    say("4/5  Recommending from the bundle, without torch")
    with clock.stage("recommend"):
        recommender = load(exported.folder)
        users = recommend_users(recommender, task)
        newcomer = recommend_new_item(recommender, task)
    for part in [*users, newcomer]:
        for line in _list_lines(part):
            say(f"     {line}")
    say("5/5  Writing the report")
    page = run.folder / "report.html"
    commands = _next_commands(run, exported.folder)
    with clock.stage("report"):
        report = run_report(run, task, tables["test"])
        lists = {"users": [*users], "cold_items": [newcomer], "seconds": clock.seconds, "next_commands": commands}
        note = "Of the last call, which went on with what was there." if resumed else ""
        write_report(page, replace(report, seconds_note=note, **lists))  # type: ignore[arg-type]
    seconds = clock.seconds | {"total": round(time.monotonic() - started, 1)}
    say(f"Done in {seconds['total']:.0f} s. Open {page}, or type next:")
    for command in commands:
        say(f"     {command}")
    return {
        "metrics": {part: table.to_dict() for part, table in tables.items()},
        "parity": exported.parity,
        "paths": {"run": str(run.folder), "bundle": str(exported.folder), "report": str(page)},
        "seconds": seconds,
        "bars": bars(tables, seconds["total"]),
    }


def _check_own(folder: Path) -> None:
    """Only what a quickstart left may be replaced by one."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if (folder / FILE).is_file():
        found = load_run(folder)
        before = quickstart_run(folder, max(found.train.max_steps, 1), found.seed)
        same = {"data", "model", "adapter", "light", "train"}
        if found.model_dump(include=same) == before.model_dump(include=same):
            return
    raise RecllmError(f"'{folder}' holds something that is not a quickstart's. Name another folder: --out FOLDER.")


def _export(run: Run, task: Task, say: Say) -> Exported:
    """The int8 bundle; where it fails its gate, fp32, which has nothing to round."""
    for recipe in (*run.export.recipes, "fp32"):
        (exported,) = export_run(run, task, [recipe], say)
        for failure in exported.failures:
            say(f"'{recipe}' is left out. {failure}")
        if exported.folder is not None:
            return exported
    raise RecllmError(
        f"The fp32 graphs differ from torch, which they should nowhere: {'; '.join(exported.failures)}. Please report "
        "it with what `recllm doctor` says."
    )


def unfaded(mf: ImplicitMF) -> ImplicitMF:
    """The same factorization with histories that do not fade, as it is in the literature."""
    return ImplicitMF(mf.items, mf.item_factors, mf.settings)


def bars(tables: dict[str, Table], seconds: float) -> dict[str, dict[str, Any]]:
    """What the demo has to reach, from what was just measured."""
    test, valid = tables["test"], tables["valid"]
    metric = f"NDCG@{K}"
    single = [name for name in test.scorers if name not in (FUSION, WITHOUT_LM)]
    ratio = test.interval(FUSION, metric)[0] / test.interval(PLAIN_MF, metric)[0]
    # The upper end of fusion − scorer: below zero, the fusion is significantly worse than that scorer.
    worst = min(test.difference(FUSION, name, metric)[2] for name in single)
    lead = valid.interval(FUSION, metric)[0] - max(valid.interval(name, metric)[0] for name in single)
    return {
        "seconds_total": {"value": seconds, "bar": SECONDS, "holds": seconds <= SECONDS},
        "ndcg_ratio_fusion_to_mf": {"value": round(ratio, 3), "bar": RATIO, "holds": ratio >= RATIO},
        "fusion_not_below_a_scorer": {"value": round(worst, 4), "bar": 0.0, "holds": worst >= 0},
        "fusion_best_on_validation": {"value": round(lead, 4), "bar": 0.0, "holds": lead >= -1e-9},
    }


def _table_lines(table: Table) -> list[str]:
    metric = f"NDCG@{K}"
    value, low, high = table.difference(FUSION, WITHOUT_LM, metric)
    return [
        *table.lines(["all"]),
        f"The language model's part in the fusion: {value:+.4f} {metric} (95 % interval {low:+.4f} … {high:+.4f})",
    ]


def recommend_users(recommender: Recommender, task: Task) -> list[Recommendations]:
    """The best films of three users, one with few, one with some and one with many events."""
    rows = sorted(task.split.test, key=lambda example: len(example.query.history))
    chosen = [rows[int(share * (len(rows) - 1))] for share in (0.05, 0.5, 0.95)]
    found = recommender.recommend([example.query.history for example in chosen], K)
    result = []
    for row, example in enumerate(chosen):
        history = example.query.history
        last = "; ".join(title(recommender, item) for item in history[-SHOWN:])
        lines = [
            Recommended(
                rank + 1,
                title(recommender, item),
                float(found.scores[row, rank]),
                {name: float(share[row, rank]) for name, share in found.shares.items()},
            )
            for rank, item in enumerate(found.ids[row][:SHOWN])
        ]
        name = f"User {example.query.user_id}, {len(history)} events"
        result.append(Recommendations(name, f"Last: {last}", lines))
    return result


def recommend_new_item(recommender: Recommender, task: Task) -> Recommendations:
    """A film that nobody has rated: for whom among some users it comes highest, by its text alone."""
    grown = recommender.with_items([NEW_ITEM])
    users = [example.query for example in task.split.test][:: max(1, len(task.split.test) // NEW_ITEM_USERS)]
    scores, shares = grown.score([query.history for query in users], grown.index.ids)
    ranks = _rank_of_last(scores, [grown.index.known(query.history) for query in users])
    lines = []
    for row in np.argsort(ranks, kind="stable")[:SHOWN]:
        last = "; ".join(title(grown, item) for item in users[row].history[-2:])
        lines.append(
            Recommended(
                int(ranks[row]),
                f"User {users[row].user_id} (last: {last})",
                float(scores[row, -1]),
                {name: float(share[row, -1]) for name, share in shares.items()},
            )
        )
    text = f"{NEW_ITEM['title']} ({NEW_ITEM['genres']})"
    return Recommendations(
        f"New item: {text}",
        f"Nobody has rated it; its rank among the films that each of {len(users)} users has not rated, the best first",
        lines,
        column="User",
    )


def _rank_of_last(scores: Scores, seen: list[Any]) -> np.ndarray[Any, np.dtype[np.int64]]:
    ranks = np.empty(len(scores), dtype=np.int64)
    for row, line in enumerate(scores):
        others = np.delete(line, [*seen[row], len(line) - 1])
        ranks[row] = 1 + int((others > line[-1]).sum())
    return ranks


def title(recommender: Recommender, item: str) -> str:
    """An item's title, or its id where it has none."""
    return recommender.catalog.record(item).get("title", item)


def _list_lines(part: Recommendations) -> list[str]:
    lines = ["", part.name, f"  {part.context}"]
    for row in part.rows:
        shares = "  ".join(f"{name} {share:+.2f}" for name, share in row.shares.items())
        lines.append(f"  {row.rank:>4}  {row.title[:44]:44}  {row.score:6.2f} = {shares}")
    return lines


def _next_commands(run: Run, bundle: Path) -> list[str]:
    return [
        f"recllm recommend {quote(str(bundle))} --history '50 181 172'",
        f"recllm train {quote(str(run.folder / FILE))} --set name=longer --set train.max_steps=400",
        f"recllm export {quote(str(run.folder))} --recipe fp32 --recipe fp16",
    ]

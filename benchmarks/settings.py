"""The protocols of the quality benchmark: data sets, run settings and bars, one place for all of them."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from recllm.outcome import FUSION
from recllm.results import Table
from recllm.weighing import Kind

Bar = dict[str, Any]


@dataclass(frozen=True)
class Protocol:
    """What a protocol is run on."""

    data: tuple[str, ...]
    split: str
    metric: str
    task: str = "next_item"


PROTOCOLS = {
    "topk": Protocol(("ml-100k", "x-wines-slim", "amazon-beauty-2014", "ml-1m"), "leave-last-out", "NDCG@10"),
    "temporal": Protocol(("x-wines-slim", "ml-100k"), "temporal", "NDCG@10"),
    "cold-item": Protocol(("x-wines-slim", "ml-1m", "amazon-beauty-2014"), "cold-items", "NDCG@10"),
    "ctr": Protocol(("collm-ml-1m",), "given", "AUC", "relevance"),
    "few-shot": Protocol(("tallrec-movie",), "given", "AUC", "relevance"),
}
SHORT_PROMPTS = {task: str(Path(__file__).parent / f"{task}_short.toml") for task in ("next_item", "relevance")}
FUSIONS = list(get_args(Kind))
"""Every kind, so that the results compare them; the best on validation is the fusion of the table."""
CONTROLS: dict[str, dict[str, str]] = {
    "random-weights": {"language_model": "random"},
    "shuffled-text": {"text": "shuffled"},
    "no-text": {"text": "same"},
    "no-factors": {"factors": "same"},
}
"""By name the `[control]` table of a run that lacks something: a gain that survives that does not come from it."""
FEW_SHOT_BARS = {"AUC": 0.76, "UAUC": 0.60}
LANGUAGE_MODEL_ALONE = {16: 0.672, 64: 0.675, 256: 0.720}
"""AUC that is asked of the language model alone after so many rows: TALLRec's with 7 billion weights."""
QUICK_STEPS = 60
"""Steps of the language model in a quick run."""
TEST_ROWS = 20_000
"""The most test rows of a protocol with more of them than users, drawn by seed 0."""

DATA: dict[str, dict[str, Any]] = {
    # The first layers of the language model have time for more passes, here and further down.
    # Long histories of few users: smaller steps, else there are too few of them.
    "ml-100k": {
        "model": {"layers": 8},
        "train": {"num_train_epochs": 6, "per_device_train_batch_size": 16, "torch_compile": True},
    },
    "x-wines-slim": {"model": {"layers": 8}, "train": {"num_train_epochs": 6, "torch_compile": True}},
    # A million events in long histories, 250 of a film: a wider light scorer that reads further back, learns how much
    # distances count and a vector of each film, and the first layers of the language model, which so have time for
    # more passes.
    "ml-1m": {
        "model": {"head_width": 256, "layers": 6, "max_history": 100, "learnt_width": 128},
        "light": {
            "width": 256,
            "learning_rate": 1e-3,
            "max_history": 100,
            "relative_positions": True,
            "gated": True,
            "per_device_train_batch_size": 32,
            "num_train_epochs": 12,
        },
        "train": {"num_train_epochs": 12, "per_device_train_batch_size": 16, "torch_compile": True},
    },
    # The longer a history with likes and dislikes, the more the judge knows of its user (LOG.md).
    # Its language model reads the rows of a user's films together, half its layers in one pass.
    "collm-ml-1m": {
        "light": {"max_history": 80},
        "model": {
            "layers": 15,
            "max_history": 30,
            "history_stride": 15,
            "rows_together": 30,
            "relevance_rows": 40_000,
            "pairwise": 0.5,
        },
        "train": {
            "num_train_epochs": 1,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 4,
            "learning_rate": 5e-4,
            "torch_compile": True,
        },
    },
    # Short histories and a large catalogue: more of them in a step, and item-item matrices of 12,101 items. The first
    # layers of the language model for more passes: one pass of all 30 added nothing.
    "amazon-beauty-2014": {
        "model": {"layers": 8},
        "light": {"per_device_train_batch_size": 128, "max_history": 20, "num_train_epochs": 14},
        "ease": {"max_items": 15_000},
        "transitions": {"max_items": 15_000},
        "train": {"num_train_epochs": 8, "torch_compile": True},
    },
}
"""What differs from one data set to another; everything else is equal."""


def run_values(protocol: str, data: str, lm: str, *, quick: bool, control: str | None = None) -> dict[str, Any]:
    """The tables of a run file; the split is drawn by seed 0 whatever the run's own seed is."""
    own = PROTOCOLS[protocol]
    values: dict[str, Any] = {
        "data": {"name": data, "split": own.split, "seed": 0},
        "model": {"name": lm, "item_encoder": "minilm-l6", "task": own.task, "head_width": 128},
        "light": {"width": 128, "learning_rate": 2e-3, "num_train_epochs": 10},
        # On a CPU adapters on all linear layers, with dropout, cost more than the frozen model itself.
        "adapter": {"recipe": "lora", "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.0},
        "fusion": {"kinds": FUSIONS},
        "prompt": dict(SHORT_PROMPTS),
        "train": {
            "num_train_epochs": 3,
            "per_device_train_batch_size": 64,
            "learning_rate": 1e-3,
            "head_learning_rate": 2e-3,
        },
    }
    if own.task == "relevance":
        # A few thousand labelled rows: a small judge, few passes, else it learns them by heart (LOG.md).
        values["light"] = {"width": 64, "learning_rate": 1e-3, "num_train_epochs": 5, "max_history": 30}
    if own.split in ("temporal", "cold-items"):
        values["data"]["test_rows"] = TEST_ROWS
    if quick:
        values["train"] |= {"max_steps": QUICK_STEPS, "num_train_epochs": 8}
    for table, keys in DATA.get(Path(data).name, {}).items():
        values[table] = values.get(table, {}) | keys
    if quick:  # too short for compiling, and the whole model as it was
        values["train"].pop("torch_compile", None), values["model"].pop("layers", None)
    if control is not None:
        values["control"] = dict(CONTROLS[control])
    return values


def _bar(value: float, bar: float) -> Bar:
    return {"value": round(float(value), 4), "bar": bar, "holds": bool(value >= bar)}


def _above_nothing(low: float) -> Bar:
    """The lower end of a difference's interval: of two fusions that are the same it is 0, and that is no gain."""
    return {"value": round(float(low), 4), "bar": 0.0, "holds": bool(low > 0.0)}


def _ratio(value: float, other: float, bar: float) -> Bar:
    """How many times another figure; without a value where that is 0."""
    return _bar(value / other, bar) if other else {"value": None, "bar": bar, "holds": bool(value > 0.0)}


def bars(given: argparse.Namespace, tables: dict[str, Table]) -> dict[str, Bar]:
    """The bars of a protocol and data set, each with what was measured and whether it holds."""
    table = tables["all"]
    if given.control is not None:
        return {}  # asked of what is shipped, not of what lacks a part on purpose
    if given.protocol == "topk":
        return _topk(given, table)
    if given.protocol == "cold-item":
        return _cold(tables)
    if given.protocol == "ctr":
        auc, uauc = (table.interval(FUSION, metric)[0] for metric in ("AUC", "UAUC"))
        return {"auc": _bar(auc, 0.758), "uauc": _bar(uauc, 0.711)} | {
            "auc_above_small_published_and_priors": _bar(auc, 0.740),
            "uauc_above_small_published_and_priors": _bar(uauc, 0.695),
        }
    if given.protocol == "few-shot":
        result = {name.lower(): _bar(table.interval(FUSION, name)[0], bar) for name, bar in FEW_SHOT_BARS.items()}
        if "relevance" in table.scorers and given.shots in LANGUAGE_MODEL_ALONE:
            alone = table.interval("relevance", "AUC")[0]
            result["language_model_alone"] = _bar(alone, LANGUAGE_MODEL_ALONE[given.shots])
        return result
    return {}


def _topk(given: argparse.Namespace, table: Table) -> dict[str, Bar]:
    ndcg, hits = (table.interval(FUSION, metric)[0] for metric in ("NDCG@10", "HitRate@10"))
    references = [name for name in table.scorers if name.startswith("ref ")]
    result: dict[str, Bar] = {}
    if Path(given.data).name == "amazon-beauty-2014":
        result |= {"ndcg": _bar(ndcg, 0.0565), "hit_rate": _bar(hits, 0.098)}
    if Path(given.data).name == "ml-100k":
        result |= {"ndcg": _bar(ndcg, 0.135)}
    if references:
        best = max(references, key=lambda name: table.interval(name, "NDCG@10")[0])
        wanted = {"x-wines-slim": 1.10, "ml-1m": 1.15}.get(Path(given.data).name, 1.0)
        result["ratio_to_best_reference"] = _ratio(ndcg, table.interval(best, "NDCG@10")[0], wanted) | {"best": best}
        result["above_best_reference_low_end"] = _above_nothing(table.difference(FUSION, best, "NDCG@10")[1])
    if "lm" in table.scorers:
        low = table.difference(FUSION, f"{FUSION} without lm", "NDCG@10")[1]
        result["language_model_contributes_low_end"] = _above_nothing(low)
    return result


def _cold(tables: dict[str, Table]) -> dict[str, Bar]:
    table = tables["among cold items"]
    text = "ref text cosine" if "ref text cosine" in table.scorers else "text"
    ndcg, other = (table.interval(name, "NDCG@10")[0] for name in (FUSION, text))
    return {"ratio_to_text_cosine_among_cold_items": _ratio(ndcg, other, 2.0)}

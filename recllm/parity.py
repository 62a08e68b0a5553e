"""Parity: how well a bundle's graphs keep the scores and the order of torch, and what a recipe tolerates."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import stdtrit
from scipy.stats import rankdata

from recllm.collaborative import Collaborative, item_prompt
from recllm.encoding import SequenceScorer
from recllm.fusion import FusedScorer
from recllm.histories import HistoryFormat
from recllm.likelihood import NAME_GRAPH, NameReader
from recllm.lm import BaseModel
from recllm.metrics import auc, ndcg
from recllm.names import NameModel, read_names
from recllm.prompts import CompiledPrompt
from recllm.ranking import Scorer, mask_seen, target_ranks
from recllm.recipes import Settings
from recllm.runs import Run
from recllm.runtime import Recommender, load
from recllm.sequence import NextItemModel
from recllm.sessions import open_session
from recllm.splits import Example
from recllm.tasks import Task
from recllm.textvectors import encode_ids

GRID = 1e-5
"""Scores nearer than this, or this share of the largest one, are equal: of their order float32 says nothing."""
WIDEST = 10
"""Such distances that scores which are equal by way of others may lie apart."""
ENCODER_TEXTS = 64
"""Item texts on which the item encoder's graph is compared."""


class Tolerance(Settings):
    """How far a graph's scores may lie from torch's before its recipe fails."""

    max_difference: float | None = None
    """Largest difference of a score; not asked where the weights are rounded."""
    rank_correlation: float
    """Least mean Spearman correlation over the candidates of a history."""
    top10_overlap: float
    """Least mean share of torch's ten best that stay among the ten best."""
    metric_loss: float | None = None
    """The largest share of NDCG@10 on the gate's validation queries, of a ranker of AUC on its labelled rows, that may
    be lost, as far as the loss is more than chance; not asked where not given."""


def measure(
    folder: Path,
    run: Run,
    task: Task,
    parts: Collaborative,
    sequences: dict[str, tuple[NextItemModel, HistoryFormat]],
    base: BaseModel,
    names: tuple[NameModel, CompiledPrompt] | None,
    reference: dict[str, SequenceScorer],
) -> dict[str, dict[str, float]]:
    """Fidelity of each history graph, of the whole ranking, of the item graphs and of the item encoder."""
    random = np.random.default_rng(run.seed)
    places = np.sort(random.permutation(len(task.split.valid))[: run.export.gate_queries])
    # All asked now, as a bundle is.
    rows = [task.split.valid[place] for place in places]
    examples = [replace(row, query=replace(row.query, at=None)) for row in rows]
    queries = [example.query for example in examples]
    bundle = load(folder)
    result = {
        name: fidelity(scorer.score(queries, task.index), bundle.scorers[name].score(queries, task.index))
        for name, scorer in reference.items()
        if name in bundle.scorers
    }
    result["ranking"] = ranking_parity(bundle, task, parts.scorers() | reference, examples)
    items = random.permutation(len(task.index))[:ENCODER_TEXTS]
    for name, (model, _) in sequences.items():
        result[f"{name} items"] = _item_parity(folder / f"{name}-items.onnx", model, items)
    result["encoder"] = _encoder_parity(folder, run, task, base, random)
    if names is not None:
        result["likelihood"] = _name_parity(folder / NAME_GRAPH, task, *names, random=random)
    return result


def ranking_parity(
    bundle: Recommender, task: Task, scorers: Mapping[str, Scorer], examples: Sequence[Example]
) -> dict[str, float]:
    """Fidelity of the catalogue graph, all items ranked, with the fusion of torch's scores; and NDCG@10 of both.

    Fidelity is that of the sums: a network reads places, so that where two scores differ by rounding alone its answer
    jumps. What that does to lists is in their NDCG@10.
    """
    expected, found, *gains = _lists_of_both(bundle, task, scorers, examples)
    if bundle.fusion.network is not None:
        summed = bundle.with_fusion(replace(bundle.fusion, network=None))
        expected, found, *_ = _lists_of_both(summed, task, scorers, examples)
    return fidelity(expected, found) | metric_loss(*gains)


def _lists_of_both(
    bundle: Recommender, task: Task, scorers: Mapping[str, Scorer], examples: Sequence[Example]
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float64], NDArray[np.float64]]:
    """Scores of all items by torch and by the bundle, float32[queries, items], and NDCG@10 of both, float64[queries].

    NDCG@10 is of the queries whose target the catalogue has.
    """
    queries = [example.query for example in examples]
    own = {name: scorers[name] for name in bundle.fusion.names}
    fused = FusedScorer(own, bundle.fusion, bundle.item_counts, exclude_seen=not task.repeats)
    expected = fused.score(queries, task.index)
    expected = expected if task.repeats else mask_seen(expected, queries, task.index)
    out = bundle.recommend([query.history for query in queries], k=len(task.index))
    found = np.full_like(expected, np.nan)
    for row, ids in enumerate(out.ids):
        found[row, task.index.rows(ids)] = out.scores[row, : len(ids)]
    targets = task.index.rows(example.item_id for example in examples)
    rows = np.flatnonzero(targets >= 0)
    gains = [ndcg(target_ranks(scores[rows], targets[rows]), 10) for scores in (expected, found)]
    return expected, found, gains[0], gains[1]


def metric_loss(expected: NDArray[np.float64], found: NDArray[np.float64]) -> dict[str, float]:
    """What a graph loses of a metric that is a mean over queries, float64[queries] by torch and by the graph.

    Returns:
        ndcg and ndcg_torch; and least_loss, the share of torch's that is lost at least: the lower end of a 95 %
        interval of the paired differences (Student's t), 0 where none is shown, as by a single query. NaN without one.
    """
    if not len(expected):
        return {"ndcg": np.nan, "ndcg_torch": np.nan, "least_loss": np.nan}
    lost = expected - found
    low = float(lost.mean() - _half_width(lost.var(ddof=1) / len(lost), len(lost))) if len(lost) > 1 else 0.0
    whole = float(expected.mean())
    least = max(0.0, low) / whole if whole else 0.0
    return {"ndcg": float(found.mean()), "ndcg_torch": whole, "least_loss": least}


def auc_loss(
    labels: NDArray[np.float64], expected: NDArray[np.floating], found: NDArray[np.floating]
) -> dict[str, float]:
    """What a graph loses of AUC, from its scores float[rows] and torch's.

    Returns:
        auc and auc_torch; and least_loss, the share of torch's that is lost at least: the lower end of a 95 % interval
        of the paired difference (DeLong et al. 1988; Student's t by the label with fewer rows), 0 where none is shown,
        as where a label has a single row. Empty with labels of one kind only.
    """
    liked = labels > 0
    if liked.all() or not liked.any():
        return {}
    # Of each row, the share of the rows with the other label that stand on the right side of it.
    lost = _right_sides(liked, expected) - _right_sides(liked, found)
    parts = lost[liked], lost[~liked]
    fewest, whole, least = min(map(len, parts)), auc(liked, expected), 0.0
    if fewest > 1:
        variance = sum(float(own.var(ddof=1)) / len(own) for own in parts)
        least = max(0.0, float(parts[0].mean() - _half_width(variance, fewest)))
    return {"auc": auc(liked, found), "auc_torch": whole, "least_loss": least / whole if whole else 0.0}


def _half_width(variance: float, rows: int) -> float:
    """Half a 95 % interval of a mean of that variance over two rows or more; of few 1.96 would be too little."""
    return float(stdtrit(rows - 1, 0.975) * np.sqrt(variance))


def _right_sides(liked: NDArray[np.bool_], scores: NDArray[np.floating]) -> NDArray[np.float64]:
    ranks = rankdata(scores)
    result = np.empty(len(scores))
    for kind in (liked, ~liked):
        below = ranks[kind] - rankdata(scores[kind])  # how many of the others, a tie counts half
        result[kind] = below / (~kind).sum()
    result[~liked] = 1.0 - result[~liked]
    return result


def _item_parity(path: Path, model: NextItemModel, rows: NDArray[np.int64]) -> dict[str, float]:
    """Fidelity of the similarities among item vectors as the item graph makes them."""
    given = {"text": model.text_vectors[rows], "factors": model.factors(torch.from_numpy(rows))}  # type: ignore[index]
    with torch.inference_mode():
        expected = model.heads(given["text"], given["factors"]).numpy()
    found = open_session(path).run(["heads"], {name: value.detach().numpy() for name, value in given.items()})[0]
    return fidelity(_similarities(expected), _similarities(found))


def _encoder_parity(
    folder: Path, run: Run, task: Task, base: BaseModel, random: np.random.Generator
) -> dict[str, float]:
    """Fidelity of the similarities among item texts."""
    prompt = item_prompt(run, base)
    token_ids = [ids for ids in prompt.encode_items(task.dataset.catalog) if ids is not None]
    chosen = [token_ids[place] for place in random.permutation(len(token_ids))[:ENCODER_TEXTS]]
    session, found = open_session(folder / "encoder.onnx"), []
    for ids in chosen:
        tokens = np.array([ids], dtype=np.int64)
        found.append(session.run(None, {"ids": tokens, "mask": np.ones_like(tokens)})[0][0])
    return fidelity(_similarities(encode_ids(base, chosen)), _similarities(np.stack(found)))


def _name_parity(
    path: Path, task: Task, model: NameModel, prompt: CompiledPrompt, *, random: np.random.Generator
) -> dict[str, float]:
    """Fidelity of the likelihoods of names."""
    records = [task.dataset.catalog.record(item) for item in random.permutation(task.index.ids)[:ENCODER_TEXTS]]
    found = NameReader(lambda: open_session(path), prompt)(records)
    expected = read_names(model, [prompt.item_ids(record) for record in records])
    # Half of the names at a time, as if each were a history: of one row the ten best say little.
    rows = np.stack([random.permutation(len(records))[: max(2, len(records) // 2)] for _ in range(ENCODER_TEXTS)])
    return fidelity(expected[rows], found[rows])


def _similarities(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    centred = vectors - vectors.mean(axis=0)
    unit = centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-9)
    cosines: NDArray[np.float32] = unit @ unit.T
    return cosines


def fidelity(expected: NDArray[np.float32], found: NDArray[np.float32]) -> dict[str, float]:
    """How well `found` keeps the order of `expected`, float32[rows, columns]: means over the rows.

    Each row is compared on the columns that `expected` scores; a row without any is left out.

    Returns:
        max_difference (infinite where only one side is a number), rank_correlation (Spearman, ties share their mean
        rank) and top10_overlap; NaN where there is nothing to compare.
    """
    known = ~np.isnan(expected)
    pairs = [(left[here], right[here]) for left, right, here in zip(expected, found, known, strict=True) if here.any()]
    same = np.array_equal(known, ~np.isnan(found))
    if not pairs:
        return {"max_difference": 0.0 if same else np.inf, "rank_correlation": np.nan, "top10_overlap": np.nan}
    filled = [(left, np.where(np.isnan(right), -np.inf, right)) for left, right in pairs]
    ranked = [_both_levels(left, right) for left, right in filled]
    return {
        "max_difference": max(float(np.abs(left - right).max()) for left, right in filled) if same else np.inf,
        "rank_correlation": float(np.mean([_rank_correlation(*pair) for pair in ranked])),
        "top10_overlap": float(np.mean([_top_overlap(*pair, min(10, len(pair[0]))) for pair in ranked])),
    }


def _both_levels(left: NDArray[np.float32], right: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    step = GRID * max(1.0, float(np.abs(left).max()))
    # Equal scores are made equal first: else a gap of about one step counts on one side only.
    with np.errstate(invalid="ignore"):  # −∞ beside −∞
        right = np.where(np.abs(left - right) <= step, left, right)
    return _levels(left, step), _levels(right, step)


def _levels(scores: NDArray[np.float32], step: float) -> NDArray[np.int64]:
    """The place of each score among the distinct ones, int64[scores]; neighbours within `step` are one level.

    Where they string together more than `WIDEST` steps, as many scores close by each other do, a level is a cell of a
    grid so wide: else all of them were one, and any order of them right.
    """
    order = np.argsort(scores, kind="stable")
    levels = np.zeros(len(scores), dtype=np.int64)
    ordered = scores[order].astype(np.float64)
    if not len(ordered):
        return levels
    with np.errstate(invalid="ignore"):  # −∞ beside −∞
        apart = np.diff(ordered) > step
        ends = np.flatnonzero(np.append(apart, True))
        starts = np.concatenate([[0], ends[:-1] + 1])
        wide = np.repeat(ordered[ends] - ordered[starts] > WIDEST * step, ends - starts + 1)
        cells = np.diff(np.floor(ordered / (WIDEST * step))) > 0
    levels[order[1:]] = np.cumsum(apart | (cells & wide[1:]))
    return levels


def _rank_correlation(left: NDArray[np.int64], right: NDArray[np.int64]) -> float:
    ranks = rankdata(np.stack([left, right]), axis=1)
    constant = ranks.std(axis=1) == 0
    if constant.any():
        return float(constant.all())
    return float(np.corrcoef(ranks)[0, 1])


def _top_overlap(left: NDArray[np.int64], right: NDArray[np.int64], k: int) -> float:
    best, kept = (set(np.argsort(-side, kind="stable")[:k].tolist()) for side in (left, right))
    return len(best & kept) / k


def failures_of(parity: dict[str, dict[str, float]], tolerance: Tolerance) -> list[str]:
    """What breaks the tolerance, in words; empty where nothing does."""
    found = []
    for graph, measured in parity.items():
        if not np.isfinite(measured["max_difference"]):
            found.append(f"{graph}: some of its scores are no numbers")
        elif tolerance.max_difference is not None and measured["max_difference"] > tolerance.max_difference:
            found.append(
                f"{graph}: a score differs by {measured['max_difference']:.2g}, allowed {tolerance.max_difference}"
            )
        for key, least in (
            ("rank_correlation", tolerance.rank_correlation),
            ("top10_overlap", tolerance.top10_overlap),
        ):
            if not measured[key] >= least:
                found.append(f"{graph}: {key} is {measured[key]:.4f}, at least {least} is asked")
        lost = measured.get("least_loss", 0.0)
        if tolerance.metric_loss is not None and lost > tolerance.metric_loss:
            name, key = ("AUC", "auc") if "auc" in measured else ("NDCG@10", "ndcg")
            found.append(
                f"{graph}: {name} on validation is {measured[key]:.4f} where torch has {measured[f'{key}_torch']:.4f}: "
                f"at least {100 * lost:.1f} % are lost, {100 * tolerance.metric_loss:g} % allowed"
            )
    return found

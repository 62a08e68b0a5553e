"""Evaluation: rank candidates or score labelled pairs with every scorer, paired bootstrap intervals over users."""

from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import product

import numpy as np
from numpy.typing import NDArray

from recllm import metrics
from recllm.data import Query
from recllm.errors import RecllmError
from recllm.ranking import ItemIndex, Scorer, Scores, batches, mask_seen, score_pairs, target_ranks, top_k
from recllm.results import Key, Table, bootstrap_means, resampled
from recllm.splits import Example

Progress = Callable[[int, int], None]
"""Called with the number of rows done and of all rows."""
Masks = Mapping[str, NDArray[np.bool_]]
"""Slices of the rows by name, bool[rows]."""


class KnownScores:
    """Scores that were computed before, as a scorer: for language models, whose scores are expensive."""

    def __init__(self, queries: Sequence[Query], candidates: ItemIndex, scores: Scores) -> None:
        """Keep `scores`, float32[queries, candidates]."""
        assert scores.shape == (len(queries), len(candidates))
        self.candidates, self.scores = candidates, scores
        self._row = {query: row for row, query in enumerate(queries)}

    def score(self, queries: Sequence[Query], candidates: ItemIndex) -> Scores:
        """Look up: float32[queries, candidates], NaN for a query or an item that was not scored."""
        rows = np.array([self._row.get(query, -1) for query in queries], dtype=np.int64)
        columns = self.candidates.rows(candidates.ids)
        found: Scores = self.scores[np.ix_(rows, columns)].astype(np.float32)
        found[rows < 0] = np.nan
        found[:, columns < 0] = np.nan
        return found


class KnownPairs:
    """Scores of labelled pairs that were computed before, as a scorer."""

    def __init__(self, queries: Sequence[Query], items: Sequence[str], scores: NDArray[np.float32]) -> None:
        """Keep `scores`, float32[pairs]."""
        self._scores = dict(zip(zip(queries, items, strict=True), scores.tolist(), strict=True))

    def score(self, queries: Sequence[Query], candidates: ItemIndex) -> Scores:
        """Look up: float32[queries, candidates], NaN for a pair that was not scored."""
        rows = [[self._scores.get((query, item), np.nan) for item in candidates.ids] for query in queries]
        return np.array(rows, dtype=np.float32).reshape(len(queries), len(candidates))

    def score_pairs(self, queries: Sequence[Query], items: Sequence[str]) -> NDArray[np.float32]:
        """Look up one item per query: float32[queries]."""
        found = (self._scores.get(pair, np.nan) for pair in zip(queries, items, strict=True))
        return np.fromiter(found, dtype=np.float32)


def warm_and_cold(
    examples: Sequence[Example], *, item_counts: Mapping[str, int] | None = None, cold_items: Collection[str] = ()
) -> dict[str, NDArray[np.bool_]]:
    """Slices of the rows: "warm", "cold item" (no train event), "no history" and "with history".

    A row may be of a cold item and of either of the last two, which are there where some have no history. With nothing
    cold there is nothing to tell apart, and the result is empty.
    """
    cold = np.array(
        [e.item_id in cold_items or (item_counts is not None and not item_counts.get(e.item_id)) for e in examples],
        dtype=bool,
    )
    new = np.array([not e.query.history for e in examples], dtype=bool)
    slices = {"warm": ~(cold | new), "cold item": cold, "no history": new}
    if new.any() and (cold & ~new).any():  # else those with a history are the warm ones
        slices["with history"] = ~new
    return {name: mask for name, mask in slices.items() if mask.any()} if (cold | new).any() else {}


def user_codes(examples: Sequence[Example]) -> NDArray[np.int64]:
    """A number per user, int64[rows]; a row without user_id is a user of its own."""
    codes: dict[object, int] = {}
    users = (e.query.user_id if e.query.user_id is not None else row for row, e in enumerate(examples))
    return np.array([codes.setdefault(user, len(codes)) for user in users], dtype=np.int64)


def evaluate_ranking(
    scorers: Mapping[str, Scorer],
    examples: Sequence[Example],
    candidates: ItemIndex,
    *,
    ks: Sequence[int] = (10,),
    exclude_seen: bool = True,
    cold_items: Collection[str] = (),
    item_counts: Mapping[str, int] | None = None,
    slices: Masks | None = None,
    seed: int = 0,
    resamples: int = 1000,
    progress: Progress | None = None,
) -> Table:
    """Rank all `candidates` for every example: HitRate@k, Recall@k, NDCG@k, MRR and Coverage@k.

    Args:
        scorers: by name; scores that are known already go in as `KnownScores`.
        examples: the rows; rows of one `user_id` are drawn together.
        candidates: what is ranked.
        ks: the lengths of the top.
        exclude_seen: leave the history's items out, as a served list does; a target among them is not found.
        cold_items: items without training events, for the slices.
        item_counts: train events per item, for the slices; see `warm_and_cold`.
        slices: masks bool[rows] by name beside "all", in place of warm and cold.
        seed: of the bootstrap.
        resamples: of the bootstrap.
        progress: called after every batch.

    Returns:
        The table; `per_row[scorer]` has "rank" and every metric but coverage as float64[rows].

    Raises:
        RecllmError: no examples, or a target that is not among the candidates.
    """
    ranks, tops = _rank_all(scorers, examples, candidates, max(ks), exclude_seen, progress)
    per_row = {name: _ranking_metrics(ranks[name], ks) for name in scorers}
    names = [name for name in next(iter(per_row.values()), {}) if name != "rank"]
    codes, masks = user_codes(examples), _masks(examples, slices, cold_items, item_counts)
    columns = {
        (name, metric, part): (codes[mask], per_row[name][metric][mask])
        for name, metric, (part, mask) in product(scorers, names, masks.items())
    }
    values = {key: float(figures.mean()) for key, (_, figures) in columns.items()}
    for k, (name, top), (part, mask) in product(ks, tops.items(), masks.items()):
        values[name, f"Coverage@{k}", part] = metrics.coverage(top[mask, :k], len(candidates))
    draws = bootstrap_means(columns, int(codes.max()) + 1, resamples, seed)
    shown = (*names, *(f"Coverage@{k}" for k in ks))
    return Table(tuple(scorers), shown, _counts(codes, masks), values, draws, per_row)


def _rank_all(
    scorers: Mapping[str, Scorer],
    examples: Sequence[Example],
    candidates: ItemIndex,
    k: int,
    exclude_seen: bool,
    progress: Progress | None,
) -> tuple[dict[str, metrics.Ranks], dict[str, NDArray[np.int64]]]:
    """By scorer, the targets' ranks and the first `k` candidates, int64[rows, k]."""
    targets = _targets(examples, candidates)
    queries = [example.query for example in examples]
    ranks = {name: metrics.Ranks(np.empty(len(queries)), np.empty(len(queries))) for name in scorers}
    tops = {name: np.empty((len(queries), min(k, len(candidates))), dtype=np.int64) for name in scorers}
    for place, batch in batches(queries):
        wanted = targets[place]
        for name, scorer in scorers.items():
            scores = scorer.score(batch, candidates)
            scores = mask_seen(scores, batch, candidates) if exclude_seen else scores
            ranks[name].first[place], ranks[name].last[place] = target_ranks(scores, wanted)
            tops[name][place] = top_k(scores, k)[0]
        if progress:
            progress(place.stop, len(queries))
    return ranks, tops


def evaluate_labels(
    scorers: Mapping[str, Scorer],
    examples: Sequence[Example],
    *,
    cold_items: Collection[str] = (),
    item_counts: Mapping[str, int] | None = None,
    slices: Masks | None = None,
    seed: int = 0,
    resamples: int = 1000,
    progress: Progress | None = None,
) -> Table:
    """Score the examples' own items: AUC over all rows, UAUC inside users, and the share of rows that has a score.

    A row without a score counts as the mean of the scorer's known scores. Arguments as for `evaluate_ranking`;
    `progress` is called after every scorer. `per_row[scorer]["score"]` has the scores, float64[rows].

    Raises:
        RecllmError: no examples, or one without a label.
    """
    labels = _labels(examples)
    codes, masks = user_codes(examples), _masks(examples, slices, cold_items, item_counts)
    queries, items = [example.query for example in examples], [example.item_id for example in examples]
    values: dict[Key, float] = {}
    draws: dict[Key, NDArray[np.float64]] = {}
    per_row: dict[str, dict[str, NDArray[np.float64]]] = {}
    for done, (name, scorer) in enumerate(scorers.items(), 1):
        given = score_pairs(scorer, queries, items).astype(np.float64)
        known = ~np.isnan(given)
        scores = np.where(known, given, given[known].mean() if known.any() else 0.0)
        per_row[name] = {"score": scores}
        for part, mask in masks.items():
            each = _label_figures(codes[mask], labels[mask], scores[mask], int(codes.max()) + 1, resamples, seed)
            for metric, (value, drawn) in each.items():
                values[name, metric, part], draws[name, metric, part] = value, drawn
            values[name, "scored", part] = float(known[mask].mean())
        if progress:
            progress(done, len(scorers))
    return Table(tuple(scorers), ("AUC", "UAUC", "scored"), _counts(codes, masks), values, draws, per_row)


def _ranking_metrics(ranks: metrics.Ranks, ks: Sequence[int]) -> dict[str, NDArray[np.float64]]:
    at_k = {"HitRate": metrics.hit_rate, "Recall": metrics.recall, "NDCG": metrics.ndcg}
    figures = {f"{name}@{k}": metric(ranks, k) for k in ks for name, metric in at_k.items()}
    return {"rank": ranks.middle, **figures, "MRR": metrics.mrr(ranks)}


def _label_figures(
    users: NDArray[np.int64],
    labels: NDArray[np.float64],
    scores: NDArray[np.float64],
    count: int,
    resamples: int,
    seed: int,
) -> dict[str, tuple[float, NDArray[np.float64]]]:
    """AUC and UAUC with their draws, float64[resamples]."""
    levels, level = np.unique(scores, return_inverse=True)
    drawn = [
        metrics.auc_of_levels(labels > 0, level, len(levels), weights[users])
        for block in resampled(count, resamples, seed)
        for weights in block
    ]
    first, each = metrics.user_aucs(users, labels, scores)
    known = ~np.isnan(each)
    key = ("", "UAUC", "")
    inside = bootstrap_means({key: (users[first[known]], each[known])}, count, resamples, seed)[key]
    return {
        "AUC": (metrics.auc(labels, scores), np.array(drawn)),
        "UAUC": (float(each[known].mean()) if known.any() else float("nan"), inside),
    }


def _masks(
    examples: Sequence[Example],
    slices: Masks | None,
    cold_items: Collection[str],
    item_counts: Mapping[str, int] | None,
) -> dict[str, NDArray[np.bool_]]:
    parts = warm_and_cold(examples, item_counts=item_counts, cold_items=cold_items) if slices is None else slices
    return {"all": np.ones(len(examples), dtype=bool), **{name: mask for name, mask in parts.items() if mask.any()}}


def _counts(codes: NDArray[np.int64], masks: Masks) -> dict[str, tuple[int, int]]:
    return {part: (int(mask.sum()), len(np.unique(codes[mask]))) for part, mask in masks.items()}


def _some(examples: Sequence[Example]) -> None:
    if not examples:
        raise RecllmError("There is no example to evaluate on. Check the split: it may leave this part empty.")


def _targets(examples: Sequence[Example], candidates: ItemIndex) -> NDArray[np.int64]:
    _some(examples)
    targets = candidates.rows(example.item_id for example in examples)
    missing = np.flatnonzero(targets < 0)
    if len(missing):
        raise RecllmError(
            f"{len(missing)} of {len(examples)} target items are not among the {len(candidates)} candidates, first "
            f"'{examples[missing[0]].item_id}' (example {missing[0]}). Add them to the candidates, or drop those rows."
        )
    return targets


def _labels(examples: Sequence[Example]) -> NDArray[np.float64]:
    _some(examples)
    bare = [row for row, example in enumerate(examples) if example.label is None]
    if bare:
        raise RecllmError(
            f"AUC needs labels, and {len(bare)} of {len(examples)} examples have none (first: example {bare[0]}). "
            "Give ratings or labels in the data, or rank instead."
        )
    return np.array([example.label for example in examples], dtype=np.float64)

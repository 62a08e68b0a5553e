"""New items in a fusion: weights of their own, fitted by taking known items for new, kept where these lose nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from recllm.fitting import Problem, cross_entropy, drop_scorers, minimise, moments, sample_candidates
from recllm.fusion import ALIKE_FOR_ALL, PLACING, Counts, Fusion
from recllm.metrics import ndcg
from recllm.ranking import QUERY_BATCH, Scores, target_ranks, top_k
from recllm.weighing import NDCG_AT, FusionSettings, user_parts

NEW_AT_ONCE = 0.05
"""The share of the catalogue that is taken for new while it is measured what new items cost known ones."""
Theta = NDArray[np.float64]
"""Weights of new items, float64[scorers, 2]: for every user, and by how much is known of the user."""


def fit_new_items(
    fusion: Fusion,
    scores: Mapping[str, Scores],
    as_new: Mapping[str, Scores],
    targets: NDArray[np.int64],
    n_user: Counts,
    n_item: Counts,
    seen: NDArray[np.bool_],
    *,
    few: int = 1,
    users: NDArray[np.int64] | None = None,
    settings: FusionSettings | None = None,
    seed: int = 0,
) -> Fusion:
    """The same fusion with weights for new items, fitted by taking a part of the known ones for new.

    In every row `settings.new_share` of the known items, drawn anew, lose what is known from their events, the target
    as likely as any other. Known items keep their weights; those of new ones are fitted by softmax cross-entropy, and
    kept if they rank the mixed catalogue better than the plain sum does, by NDCG@10 on queries of users that they were
    not fitted on, in `FOLDS` parts; in the end they are fitted on all.

    Items that have few events because nobody wants them look as new as those of tomorrow, and a shop without any such
    item has new ones tomorrow. So what was fitted is tried on the real validation rows, as they are and with a few
    known items taken for new, none of them the target: new items are placed lower, then only those without any event
    are new, then they are left without weights of their own, until neither NDCG@10 is lower by more than
    `settings.new_cost` than without them, and lists of ten show a new item no more often than any other.

    Args:
        fusion: for items with events.
        scores: by scorer, float32[queries, candidates].
        as_new: the same, as if no candidate had events.
        targets: column of each query's target, int64[queries].
        n_user: length of each query's known history, int[queries].
        n_item: train events per candidate, int[candidates].
        seen: candidates that are not ranked, bool[queries, candidates].
        few: events from which an item is known.
        users: number of each query's user, int[queries]; every query its own when not given.
        settings: how to fit.
        seed: of the draws.
    """
    settings, rng = settings or FusionSettings(), np.random.default_rng(seed)
    warm, most = n_item >= few, min(settings.queries, settings.new_queries)
    rows = np.flatnonzero((targets >= 0) & warm[targets])
    sample = np.sort(rng.permutation(rows)[:most])
    if not len(sample) or settings.new_share == 0.0:
        return fusion
    every = _Queries(scores, targets, n_user, n_item, seen)
    mixed = every.part(sample).with_new(
        warm & (rng.random((len(sample), len(n_item))) < settings.new_share),
        {name: as_new[name][sample] for name in fusion.names},
    )
    before = fusion
    fusion = replace(fusion, few=few, unseen=_unseen(mixed.scores.get(PLACING)), scales=_scales(mixed))
    # What lives on events has no say of a new item, also where it has seen its first few.
    speaks = np.array([[not np.isnan(as_new[name][sample]).all()] for name in fusion.names])
    numbers = np.arange(len(targets)) if users is None else users
    made, figures = _fitted(fusion, mixed, numbers[sample], speaks, settings, rng)
    best = max(figures, key=figures.__getitem__)

    now = every.part(np.sort(rng.permutation(np.flatnonzero(targets >= 0))[:most]))
    # What comes tomorrow: a few of the known items as new ones beside the target, which is none of them.
    coming = warm & (rng.random(now.barred.shape) < NEW_AT_ONCE)
    coming[np.arange(len(coming)), now.targets] = False
    later = now.with_new(coming, {name: as_new[name][now.rows] for name in fusion.names})
    price = _Price(before, now, later, settings.new_cost)
    tried = {best: made[best], **_lowered(fusion.names, best, made[best])}
    for limit in dict.fromkeys((few, 1)):
        # The scorers speak of items of few events as well: where these count as known, theirs are the scales.
        limited = replace(fusion, few=limit, scales=fusion.scales if limit == few else {})
        if (name := price.first_paid(limited, tried)) is not None:
            return replace(limited, new=tried[name], chosen_new=name, candidates_new=figures)
    return before


@dataclass(frozen=True, eq=False)
class _Queries:
    """Queries with their scores.

    Attributes:
        scores: by scorer, float32[queries, candidates].
        targets: column of each query's target, int64[queries].
        n_user: length of each query's known history, int[queries].
        n_item: train events, int[candidates] or int[queries, candidates].
        barred: candidates that are not ranked, bool[queries, candidates].
        new: candidates that are taken for new, bool[queries, candidates]; None: no one is.
        rows: which of all queries they are, int64[queries]; None: all.
    """

    scores: Mapping[str, Scores]
    targets: NDArray[np.int64]
    n_user: Counts
    n_item: Counts
    barred: NDArray[np.bool_]
    new: NDArray[np.bool_] | None = None
    rows: NDArray[np.int64] | None = None

    def part(self, rows: NDArray[np.int64]) -> "_Queries":
        """Some of them; their targets are ranked always."""
        barred, targets = self.barred[rows], self.targets[rows]
        barred[np.arange(len(rows)), targets] = False
        scores = {name: own[rows] for name, own in self.scores.items()}
        return _Queries(scores, targets, self.n_user[rows], self.n_item, barred, rows=rows)

    def with_new(self, new: NDArray[np.bool_], as_new: Mapping[str, Scores]) -> "_Queries":
        """The same with some candidates as if they had no events."""
        scores = {name: np.where(new, as_new[name], self.scores[name]) for name in as_new}
        return replace(self, scores=scores, n_item=np.where(new, 0, self.n_item), new=new)

    def each_ndcg(self, fused: Scores) -> NDArray[np.float64]:
        """NDCG@10 of each target, float64[queries]."""
        return ndcg(target_ranks(np.where(self.barred, np.nan, fused), self.targets), NDCG_AT)

    def ndcg(self, fused: Scores) -> float:
        """NDCG@10 of the targets."""
        return float(self.each_ndcg(fused).mean())

    def share_of_new(self, fused: Scores) -> float:
        """The share of places in lists of ten that candidates have which are taken for new; 0 of empty lists."""
        assert self.new is not None
        listed = top_k(np.where(self.barred, np.nan, fused), NDCG_AT)[0]
        new = np.take_along_axis(self.new, np.maximum(listed, 0), axis=1) & (listed >= 0)
        return float(new.sum() / max((listed >= 0).sum(), 1))


def _fitted(
    fusion: Fusion,
    mixed: _Queries,
    users: NDArray[np.int64],
    speaks: NDArray[np.bool_],
    settings: FusionSettings,
    rng: np.random.Generator,
) -> tuple[dict[str, Theta], dict[str, float]]:
    """Weights of new items by what they are, and the NDCG@10 of the mixed catalogue with each, on users apart."""
    # What the known items' weights say stays as it is; new items' part of z is what is weighed anew.
    among = AmongKnown.of(fusion, mixed.scores, mixed.n_user, mixed.n_item)
    plain = np.tile([1.0, 0.0], (len(fusion.names), 1)) * speaks
    fused = among.fused(plain)
    barred = mixed.barred | np.isnan(fused)  # what nobody knows is never ranked
    columns, stands_for = sample_candidates(mixed.targets, fused, barred, settings.negatives, rng)

    def at(values: NDArray[Any]) -> NDArray[Any]:
        return np.take_along_axis(values, columns, 1)

    z = drop_scorers(np.stack([at(among.spread(own)) for own in among.z]), settings.dropped, rng)
    fixed, user = np.nan_to_num(at(among.total)).astype(np.float64), fusion.user(mixed.n_user)[:, None]

    def weights(part: NDArray[np.bool_]) -> Theta:
        base, known = cross_entropy(stands_for[part]), fixed[part]

        def loss(rows: slice, own: NDArray[np.float64], intercept: float) -> tuple[float, NDArray[np.float64], float]:
            return base(rows, own + known[rows], intercept)

        problem = Problem(z[:, part], user[part], np.zeros(known.shape), loss)
        fitted = minimise(problem, counts=True, signed=True, l2=settings.l2, iterations=settings.iterations)
        return fitted[:, :2] * speaks

    made = {"fitted": weights(np.ones(len(users), dtype=bool)), "plain sum": plain}
    apart = np.zeros(len(users))
    for inside in user_parts(users):
        own = made["fitted"] if inside.all() else weights(~inside)
        apart[inside] = mixed.each_ndcg(among.fused(own))[inside]
    return made, {"fitted": float(apart.mean()), "plain sum": mixed.ndcg(fused)}


class _Price:
    """What new items cost known ones, and what they may.

    Args:
        before: the fusion without weights of new items.
        now: validation queries as they are.
        later: the same, a few known items taken for new, no target among them.
        cost: the share of NDCG@10 that may be lost; 1 also asks for no place in the lists.
    """

    def __init__(self, before: Fusion, now: _Queries, later: _Queries, cost: float) -> None:
        assert later.new is not None
        self.now, self.later = now, later
        without = replace(later, barred=later.barred | later.new)
        # The scores, events and candidates of each, fused as if no item had weights of its own.
        today, tomorrow = (fused_rows(before, each.scores, each.n_user, each.n_item) for each in (now, later))
        self.least = (1.0 - cost) * now.ndcg(today), (1.0 - cost) * without.ndcg(tomorrow)
        ranked = ~later.barred
        self.most = 1.0 if cost == 1.0 else float((later.new & ranked).sum() / max(ranked.sum(), 1))

    def first_paid(self, fusion: Fusion, tried: Mapping[str, Theta]) -> str | None:
        """The first of the weights, by name, that new items can have in the fusion; None for none."""
        today, tomorrow = (
            AmongKnown.of(fusion, each.scores, each.n_user, each.n_item) for each in (self.now, self.later)
        )
        for name, theta in tried.items():
            if self.now.ndcg(today.fused(theta)) < self.least[0]:
                continue
            fused = tomorrow.fused(theta)
            if self.later.ndcg(fused) >= self.least[1] and self.later.share_of_new(fused) <= self.most:
                return name
        return None


def fused_rows(fusion: Fusion, scores: Mapping[str, Scores], n_user: Counts, n_item: Counts) -> Scores:
    """`Fusion.fuse`'s scores, float32[queries, candidates], a few queries at a time: their shares take much memory."""
    parts = np.array_split(np.arange(len(n_user)), max(1, -(-len(n_user) // QUERY_BATCH)))
    found = []
    for part in parts:
        events = n_item if n_item.ndim == 1 else n_item[part]
        found.append(fusion.fuse({name: own[part] for name, own in scores.items()}, n_user[part], events)[0])
    return np.concatenate(found)


@dataclass(frozen=True, eq=False)
class AmongKnown:
    """Fused scores of some queries for many weights of new items: known items' do not change with these.

    Attributes:
        total: with weights of zero for new items, float32[queries, candidates].
        at: rows and columns of the new items, int64[cells] each.
        user: evidence of each cell's user, float64[cells].
        z: per scorer what is weighed there, float32[cells].
    """

    total: Scores
    at: tuple[NDArray[np.int64], NDArray[np.int64]]
    user: NDArray[np.float64]
    z: list[Scores]

    @classmethod
    def of(cls, fusion: Fusion, scores: Mapping[str, Scores], n_user: Counts, n_item: Counts) -> Self:
        """Fuse what does not change.

        Args:
            fusion: has everything but the weights of new items.
            scores: by scorer, float32[queries, candidates].
            n_user: length of each query's known history, int[queries].
            n_item: train events, int[candidates] or int[queries, candidates].
        """
        silent = replace(fusion, new=np.zeros((len(fusion.names), 2)))
        total = fused_rows(silent, scores, n_user, n_item)
        cold = np.broadcast_to(n_item < fusion.few, total.shape)
        rows, columns = np.nonzero(cold)
        z = []
        for name in fusion.names:
            given = scores[name]
            z.append(fusion.placed(name, given, fusion.z(name, given), cold)[rows, columns])
        return cls(total, (rows, columns), fusion.user(n_user)[rows], z)

    def fused(self, theta: Theta) -> Scores:
        """The scores where new items have the weights `theta`, float64[scorers, 2]."""
        added = np.zeros(len(self.user), dtype=np.float32)
        for (bias, by_user), own in zip(theta, self.z, strict=True):
            added += (bias + by_user * self.user).astype(np.float32) * own
        result = self.total.copy()
        result[self.at] += added  # NaN, where nobody knows the item, stays
        return result

    def spread(self, values: Scores) -> Scores:
        """Values of the new items' cells, float32[cells], in the shape of the scores; 0 elsewhere."""
        result = np.zeros_like(self.total)
        result[self.at] = values
        return result


def _unseen(popularity: Scores | None) -> float | None:
    """Popularity's z of an item without events, the mean over rows of its scores, float32[queries, candidates]."""
    if popularity is None:
        return None
    mean, deviation = moments(popularity)
    rows = (deviation > 0) & (mean > 0)
    return -float((mean[rows] / deviation[rows]).mean()) if rows.any() else None


def _scales(mixed: _Queries) -> dict[str, tuple[float, float]]:
    """Mean and deviation of what is said of new items, of scorers that say the same of them to everybody."""
    result = {}
    for name in ALIKE_FOR_ALL:
        if name in mixed.scores:
            mean, deviation = moments(mixed.scores[name])
            if (rows := deviation > 0).any():
                result[name] = float(mean[rows].mean()), float(deviation[rows].mean())
    return result


def _lowered(names: Sequence[str], chosen: str, theta: Theta) -> dict[str, Theta]:
    """The same weights with new items placed lower and lower among known ones, by popularity's weight."""
    result: dict[str, Theta] = {}
    if PLACING not in names:
        return result
    place = names.index(PLACING)
    first = min(float(theta[place, 0]), 0.0)  # negative: its z is low for new items, so that it lifts them
    for weight in (0.75 * first, 0.5 * first, 0.25 * first, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0):
        result[f"{chosen}, popularity {weight:.2f}"] = lowered = theta.copy()
        lowered[place] = weight, 0.0
    return result

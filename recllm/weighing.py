"""Weighing: fit the fusion's weights on validation, for rankings, for labelled pairs and for items without events."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field

from recllm.errors import RecllmError
from recllm.fitting import (
    Evidence,
    Problem,
    cross_entropy,
    drop_scorers,
    inside_users,
    minimise,
    moments,
    sample_candidates,
)
from recllm.fusion import BACKUP, PLACING, Counts, Fusion, Scaled
from recllm.metrics import auc, ndcg
from recllm.ranking import QUERY_BATCH, Scores, target_ranks, top_k
from recllm.recipes import Settings

NDCG_AT = 10
NEW_AT_ONCE = 0.05
"""The share of the catalogue that is taken for new while it is measured what new items cost known ones."""
FOLDS = 5
"""Parts of the validation rows on which what was fitted on the others is measured in turn."""

ONLY = "only "
"""What the name of a scorer alone begins with, among what is tried."""

Kind = Literal[
    "by counts", "without counts", "plain sum", "best single", "stacker", "reciprocal rank", "borda", "levels"
]
RANKS: tuple[Kind, ...] = ("reciprocal rank", "borda")
"""Kinds that need several candidates to a query."""


class FusionSettings(Settings):
    """`[fusion]`: which fusions are tried, and how their weights are fitted."""

    kinds: tuple[Kind, ...] = Field(("by counts", "without counts", "plain sum", "best single"), min_length=1)
    """What is tried, the best on validation is kept: softplus weights by event counts or the same everywhere, the plain
    sum of standardised scores, each scorer alone with the others as backup, signed weights by counts (stacker), sums of
    reciprocal ranks or of Borda points, and scorers one after the other (levels), each only where those before it are
    silent. An item on which a scorer alone is silent stands at the mean of those that it knows. What has weights is
    measured on rows that it was not fitted on; with "best single" among the kinds no scorer alone is better than the
    fusion on the rows that choose."""
    queries: int = Field(2000, ge=1)
    """The most validation queries to fit on."""
    choosing: int = Field(5000, ge=1)
    """The most validation queries to choose on."""
    negatives: int = Field(200, ge=1)
    """The most sampled candidates beside each target."""
    l2: float = Field(1e-3, ge=0)
    """Pull of the weights towards the plain sum."""
    new_share: float = Field(0.3, ge=0, lt=1)
    """Share of items that are taken for new while the weights of items without events are fitted; 0 leaves it out."""
    new_cost: float = Field(0.002, ge=0, le=1)
    """The share of NDCG@10 on validation that new items may cost by standing among known ones, in whose lists they are
    then no more often than any item; 1 places them by the fit alone, as if tomorrow's items were as much in demand as
    today's."""
    pairwise: float = Field(0.5, ge=0)
    """Weight of the loss over one user's liked and disliked rows beside that over all rows (labelled pairs)."""
    drop: float = Field(0.1, ge=0, lt=1)
    """Probability that a scorer is left out of a row while fitting."""
    iterations: int = Field(100, ge=1)
    """The most steps of L-BFGS."""


def fit_ranking(
    scores: Mapping[str, Scores],
    targets: NDArray[np.int64],
    n_user: Counts,
    n_item: Counts,
    seen: NDArray[np.bool_] | None = None,
    *,
    settings: FusionSettings | None = None,
    seed: int = 0,
) -> Fusion:
    """Fit on validation queries by softmax cross-entropy of the target; choose by NDCG@10.

    Weights look better on the queries that they were fitted on, the more so the more of them there are. So what is
    tried is measured on others, in `FOLDS` parts, and the best of `settings.kinds`, on a tie the earlier, is fitted on
    all in the end; if a single scorer then is better on these rows, it is kept instead.

    Args:
        scores: by scorer, float32[queries, candidates].
        targets: column of each query's target, int64[queries]; −1 leaves the query out.
        n_user: length of each query's known history, int[queries]; see `evidence`.
        n_item: train events per candidate, int[candidates].
        seen: candidates that are not ranked, bool[queries, candidates]; a target is ranked always.
        settings: how to fit.
        seed: of sampling and dropping.

    Raises:
        RecllmError: no scorer, or no query with a target.
    """
    settings, rng = settings or FusionSettings(), np.random.default_rng(seed)
    rows = np.flatnonzero(targets >= 0)
    if not scores or not len(rows):
        raise RecllmError("The fusion needs at least one scorer and one validation query with a target candidate.")
    barred = np.zeros((len(targets), len(n_item)), dtype=bool) if seen is None else seen.copy()
    barred[rows, targets[rows]] = False
    base = replace(Fusion.plain(tuple(scores)), user=Evidence.of(n_user[rows]), item=Evidence.of(n_item))
    order = rng.permutation(rows)
    sample, choosing = np.sort(order[: settings.queries]), np.sort(order[: settings.choosing])
    columns, valid = sample_candidates(targets[sample], barred[sample], settings.negatives, rng)
    z = np.stack([np.take_along_axis(base.z(name, scores[name][sample]), columns, 1) for name in base.names])
    z, user, item = drop_scorers(z, settings.drop, rng), base.user(n_user[sample])[:, None], base.item(n_item)[columns]

    def figures(fusions: Mapping[str, Fusion], rows: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
        """NDCG@10 of each of the queries, by each fusion; what they share of the work is done once."""
        found: dict[str, list[NDArray[np.float64]]] = {name: [np.zeros(0)] for name in fusions}
        for part in np.array_split(rows, -(-len(rows) // QUERY_BATCH)) if len(rows) else []:
            given, scaled = {name: own[part] for name, own in scores.items()}, Scaled()
            for name, fusion in fusions.items():
                fused, _ = fusion.fuse(given, n_user[part], n_item, scaled=scaled)
                found[name].append(ndcg(target_ranks(np.where(barred[part], np.nan, fused), targets[part]), NDCG_AT))
        return {name: np.concatenate(parts) for name, parts in found.items()}

    @cache
    def singles() -> dict[str, NDArray[np.float64]]:
        """NDCG@10 of the queries that choose, by each scorer alone."""
        return figures({name: alone(base, name) for name in base.names}, choosing)

    def made(part: NDArray[np.bool_]) -> dict[str, Fusion]:
        """What is tried, fitted on this part of the sample, bool[queries]."""
        problem = Problem(z[:, part], user[part], item[part], cross_entropy(valid[part]))
        known = ~np.isin(choosing, sample[~part])
        return _made(base, problem, settings, lambda name: float(singles()[name][known].mean()) if known.any() else 0.0)

    def figures_of(fusions: Mapping[str, Fusion], part: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
        """`figures` of a part of the queries that choose; of a scorer alone they are known."""
        at = np.searchsorted(choosing, part)
        found = {name: singles()[name.removeprefix(ONLY)][at] for name in fusions if name.startswith(ONLY)}
        found |= figures({name: fusion for name, fusion in fusions.items() if name not in found}, part)
        return {name: found[name] for name in fusions}  # in their order: of a tie the earlier is taken

    every = made(np.ones(len(sample), dtype=bool))
    others = np.setdiff1d(choosing, sample)  # nothing was fitted on these
    measured = {name: [found] for name, found in figures_of(every, others).items()}
    folds = np.arange(len(sample)) % min(FOLDS, len(sample))
    for fold in np.unique(folds):
        inside = folds == fold
        fitted = every if inside.all() else made(~inside)
        for name, found in figures_of(fitted, np.intersect1d(sample[inside], choosing)).items():
            measured[name].append(found)
    outside = {name: float(np.concatenate(found).mean()) for name, found in measured.items()}
    return _best(every, outside, lambda fusion: float(figures({"": fusion}, choosing)[""].mean()))


def fit_labels(
    scores: Mapping[str, NDArray[np.float32]],
    labels: ArrayLike,
    n_user: Counts,
    n_item: Counts,
    *,
    users: NDArray[np.int64] | None = None,
    settings: FusionSettings | None = None,
    seed: int = 0,
) -> Fusion:
    """Fit on labelled validation pairs by logistic loss, over rows and inside users; choose by AUC.

    Scores are standardised over all rows.

    Labelled rows are often many of few users, and weights that were fitted on a user look better there than they are.
    So what is tried is measured on users that it was not fitted on, in `FOLDS` parts, and the best is fitted on all
    rows in the end; if a single scorer then is better on these rows, it is kept instead. Kinds that need several
    candidates to a query are passed over.

    Args:
        scores: by scorer, float32[rows].
        labels: 1 and 0, [rows].
        n_user: length of each row's known history, int[rows].
        n_item: train events of each row's item, int[rows].
        users: number of each row's user, int[rows]; every row its own when not given.
        settings: how to fit.
        seed: of dropping and of the parts.

    Raises:
        RecllmError: no scorer, labels of one kind only, or no kind of fusion that pairs can have.
    """
    settings, rng = settings or FusionSettings(), np.random.default_rng(seed)
    label = np.asarray(labels, dtype=np.float64)
    if not scores or len(np.unique(label)) < 2:
        raise RecllmError("The fusion needs at least one scorer and validation rows with both labels, 0 and 1.")
    kinds = tuple(kind for kind in settings.kinds if kind not in RANKS)
    if not kinds:
        raise RecllmError(
            f"fusion.kinds is {list(settings.kinds)}: ranks need several candidates to a query, and pairs have one. "
            "Add 'by counts' or another kind."
        )
    both = [moments(given[None, :]) for given in scores.values()]
    base = replace(
        Fusion.plain(tuple(scores)),
        standardise="global",
        means=tuple(float(mean[0, 0]) for mean, _ in both),
        deviations=tuple(float(deviation[0, 0]) for _, deviation in both),
        user=Evidence.of(n_user),
        item=Evidence.of(n_item),
    )
    pairs = {name: given[:, None] for name, given in scores.items()}
    z = drop_scorers(np.stack([base.z(name, pairs[name]) for name in base.names]), settings.drop, rng)
    user, item = base.user(n_user)[:, None], base.item(n_item)[:, None]
    numbers = np.arange(len(label)) if users is None else users
    settings = settings.model_copy(update={"kinds": kinds})

    def fused(fusion: Fusion) -> NDArray[np.float64]:
        return np.nan_to_num(fusion.fuse(pairs, n_user, n_item[:, None])[0][:, 0]).astype(np.float64)

    def figure(fusion: Fusion) -> float:
        return auc(label, fused(fusion))

    def made(rows: NDArray[np.int64]) -> dict[str, Fusion]:
        rows = rows[np.argsort(numbers[rows], kind="stable")]  # blocks are cut between users, not through all of them
        loss = inside_users(label[rows], numbers[rows], settings.pairwise)
        problem = Problem(z[:, rows], user[rows], item[rows], loss)
        return _made(base, problem, settings, lambda name: figure(alone(base, name)))

    outside: dict[str, NDArray[np.float64]] = {}
    for inside in _folds(numbers, label, rng):
        for name, fusion in made(np.flatnonzero(~inside)).items():
            outside.setdefault(name, np.zeros(len(label)))[inside] = fused(fusion)[inside]
    every = made(np.arange(len(label)))
    figures = {name: auc(label, outside[name] if outside else fused(fusion)) for name, fusion in every.items()}
    return _best(every, figures, figure)


def _folds(users: NDArray[np.int64], label: NDArray[np.float64], rng: np.random.Generator) -> list[NDArray[np.bool_]]:
    """Up to `FOLDS` parts of the users, bool[rows] each; none where what is left of one would have one label only."""
    known = rng.permutation(np.unique(users))
    count = min(FOLDS, len(known))
    parts = [np.isin(users, known[start::count]) for start in range(count)] if count > 1 else []
    return parts if all(len(np.unique(label[~inside])) == 2 for inside in parts) else []


def _best(made: Mapping[str, Fusion], figures: Mapping[str, float], figure: Callable[[Fusion], float]) -> Fusion:
    """What has the best of `figures`, on a tie the earlier; a scorer alone, if it has more by `figure`."""
    best = max(figures, key=figures.__getitem__)
    singles = {name: figures[name] for name in made if name.startswith(ONLY)}
    better = max(singles, key=singles.__getitem__, default=best)
    best = better if better != best and figure(made[better]) > figure(made[best]) else best
    return replace(made[best], chosen=best, candidates=figures)


def _made(
    base: Fusion, problem: Problem, settings: FusionSettings, single: Callable[[str], float]
) -> dict[str, Fusion]:
    """Everything that is tried, by name, fitted on the problem; what each scorer has alone orders the levels."""
    made: dict[str, Fusion] = {}
    for kind in settings.kinds:
        if kind == "by counts" or kind == "without counts" or kind == "stacker":
            theta = minimise(
                problem,
                counts=kind != "without counts",
                signed=kind == "stacker",
                l2=settings.l2,
                iterations=settings.iterations,
            )
            made[kind] = replace(base, theta=theta, signed=kind == "stacker")
        elif kind == "plain sum":
            made[kind] = base
        elif kind == "best single":
            made |= {f"{ONLY}{name}": alone(base, name) for name in base.names}
        elif kind == "levels":
            # The better alone on validation, the earlier its level.
            order = sorted(base.names, key=lambda name: -single(name))
            made[kind] = replace(base, levels=tuple(order.index(name) for name in base.names))
        elif kind in ("reciprocal rank", "borda"):
            made[kind] = replace(base, standardise=kind)
    return made


def alone(base: Fusion, name: str) -> Fusion:
    """One scorer, and the others, hardly audible, where it is silent."""
    return replace(
        base,
        gates=tuple(1.0 if own == name else BACKUP for own in base.names),
        levels=tuple(int(own != name) for own in base.names),
    )


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
    settings: FusionSettings | None = None,
    seed: int = 0,
) -> Fusion:
    """The same fusion with weights for new items, fitted by taking a part of the known ones for new.

    In every row `settings.new_share` of the known items, drawn anew, lose what is known from their events, the target
    as likely as any other. Known items keep their weights; those of new ones are fitted by softmax cross-entropy, and
    kept if they rank the mixed catalogue better than the plain sum does, by NDCG@10.

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
        settings: how to fit.
        seed: of the draws.
    """
    settings, rng = settings or FusionSettings(), np.random.default_rng(seed)
    warm, names = n_item >= few, fusion.names
    rows = np.flatnonzero((targets >= 0) & warm[targets])
    sample = np.sort(rng.permutation(rows)[: settings.queries])
    if not len(sample) or settings.new_share == 0.0:
        return fusion
    new = warm & (rng.random((len(sample), len(n_item))) < settings.new_share)
    counts = np.where(new, 0, n_item)
    mixed = {name: np.where(new, as_new[name][sample], scores[name][sample]) for name in names}
    before, fusion = fusion, replace(fusion, few=few, unseen=_unseen(mixed.get(PLACING)))
    barred = seen[sample]
    barred[np.arange(len(sample)), targets[sample]] = False
    columns, valid = sample_candidates(targets[sample], barred, settings.negatives, rng)

    def at(values: NDArray[Any]) -> NDArray[Any]:
        return np.take_along_axis(values, columns, 1)

    # What the known items' weights say stays as it is; new items' part of z is what is weighed anew.
    among = _NewAmongKnown.of(fusion, mixed, n_user[sample], counts)
    z = np.stack([at(among.spread(own)) for own in among.z])
    base, fixed = cross_entropy(valid), np.nan_to_num(at(among.total)).astype(np.float64)

    def loss(part: slice, own: NDArray[np.float64], intercept: float) -> tuple[float, NDArray[np.float64], float]:
        return base(part, own + fixed[part], intercept)

    problem = Problem(
        drop_scorers(z, settings.drop, rng), fusion.user(n_user[sample])[:, None], np.zeros(columns.shape), loss
    )
    fitted = minimise(problem, counts=True, signed=True, l2=settings.l2, iterations=settings.iterations)[:, :2]
    # What lives on events has no say of a new item, also where it has seen its first few.
    speaks = np.array([[not np.isnan(as_new[name][sample]).all()] for name in names])
    made = {"fitted": fitted * speaks, "plain sum": np.tile([1.0, 0.0], (len(names), 1)) * speaks}

    def figure(theta: NDArray[np.float64]) -> float:
        return float(ndcg(target_ranks(np.where(barred, np.nan, among.fused(theta)), targets[sample]), NDCG_AT).mean())

    figures = {name: figure(theta) for name, theta in made.items()}
    best = max(figures, key=figures.__getitem__)
    real = np.sort(rng.permutation(np.flatnonzero(targets >= 0))[: settings.queries])
    masked = seen[real]
    masked[np.arange(len(real)), targets[real]] = False

    # What comes tomorrow: a few of the known items as new ones beside the target, which is none of them.
    coming = warm & (rng.random((len(real), len(n_item))) < NEW_AT_ONCE)
    coming[np.arange(len(real)), targets[real]] = False
    later = {name: np.where(coming, as_new[name][real], scores[name][real]) for name in names}
    now = {name: scores[name][real] for name in names}

    def known_found(fused: Scores, out: NDArray[np.bool_]) -> tuple[float, float]:
        """NDCG@10 of the targets, and the share of places in lists of ten that what is coming takes."""
        fused = np.where(out, np.nan, fused)
        listed = np.take_along_axis(coming, np.maximum(top_k(fused, NDCG_AT)[0], 0), axis=1)
        return float(ndcg(target_ranks(fused, targets[real]), NDCG_AT).mean()), float(listed.mean())

    later_counts = np.where(coming, 0, n_item)
    least = (
        (1.0 - settings.new_cost) * known_found(fused_rows(before, now, n_user[real], n_item), masked)[0],
        (1.0 - settings.new_cost)
        * known_found(fused_rows(before, later, n_user[real], later_counts), masked | coming)[0],
    )
    most = 1.0 if settings.new_cost == 1.0 else float((coming & ~masked).sum() / max((~masked).sum(), 1))
    tried = {best: made[best], **_lowered(names, best, made[best])}
    for limit in dict.fromkeys((few, 1)):
        limited = replace(fusion, few=limit)
        today = _NewAmongKnown.of(limited, now, n_user[real], n_item)
        tomorrow = _NewAmongKnown.of(limited, later, n_user[real], later_counts)
        for name, theta in tried.items():
            if known_found(today.fused(theta), masked)[0] < least[0]:
                continue
            kept, places = known_found(tomorrow.fused(theta), masked)
            if kept >= least[1] and places <= most:
                return replace(limited, new=theta, chosen_new=name, candidates_new=figures)
    return before


def fused_rows(fusion: Fusion, scores: Mapping[str, Scores], n_user: Counts, n_item: Counts) -> Scores:
    """`Fusion.fuse`'s scores, float32[queries, candidates], a few queries at a time: their shares take much memory."""
    parts = np.array_split(np.arange(len(n_user)), max(1, -(-len(n_user) // QUERY_BATCH)))
    found = []
    for part in parts:
        events = n_item if n_item.ndim == 1 else n_item[part]
        found.append(fusion.fuse({name: own[part] for name, own in scores.items()}, n_user[part], events)[0])
    return np.concatenate(found)


@dataclass(frozen=True, eq=False)
class _NewAmongKnown:
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

    def fused(self, theta: NDArray[np.float64]) -> Scores:
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


def _lowered(names: Sequence[str], chosen: str, theta: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """The same weights with new items placed lower and lower among known ones, by popularity's weight."""
    result: dict[str, NDArray[np.float64]] = {}
    if PLACING not in names:
        return result
    place = names.index(PLACING)
    first = min(float(theta[place, 0]), 0.0)  # negative: its z is low for new items, so that it lifts them
    for weight in (0.75 * first, 0.5 * first, 0.25 * first, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0):
        result[f"{chosen}, popularity {weight:.2f}"] = lowered = theta.copy()
        lowered[place] = weight, 0.0
    return result

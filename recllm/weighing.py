"""Weighing: fit the fusion's weights on validation, for rankings and for labelled pairs."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, partial
from typing import Literal

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
from recllm.fusion import BACKUP, Counts, Fusion, Scaled
from recllm.metrics import auc, ndcg
from recllm.ranking import QUERY_BATCH, Scores, target_ranks, top_k
from recllm.recipes import Settings
from recllm.reordering import FIRST, features, learn

NDCG_AT = 10
FOLDS = 5
"""Parts of the validation rows on which what was fitted on the others is measured in turn."""

ONLY = "only "
"""What the name of a scorer alone begins with, among what is tried."""

Kind = Literal[
    "by counts",
    "without counts",
    "plain sum",
    "best single",
    "stacker",
    "reciprocal rank",
    "borda",
    "levels",
    "network",
]
RANKS: tuple[Kind, ...] = ("reciprocal rank", "borda", "network")
"""Kinds that need several candidates to a query."""
DROP = 0.03
"""`FusionSettings.drop` where items are ranked and none is given."""
PAIRS_DROP, PAIRS_L2 = 0.1, 1e-3
"""`drop` and `l2` where pairs are judged and none are given."""


class FusionSettings(Settings):
    """`[fusion]`: which fusions are tried, and how their weights are fitted."""

    kinds: tuple[Kind, ...] = Field(("by counts", "without counts", "plain sum", "best single"), min_length=1)
    """What is tried, the best on validation is kept: softplus weights by event counts or the same everywhere, the plain
    sum of standardised scores, each scorer alone with the others as backup, signed weights by counts (stacker), sums of
    reciprocal ranks or of Borda points, scorers one after the other (levels), each only where those before it are
    silent, and weights by counts whose first hundred places a small network puts in order again (network). An item on
    which a scorer alone is silent stands at the mean of those that it knows. What has weights is measured on rows that
    it was not fitted on; with "best single" among the kinds no scorer alone is better than the fusion on the rows that
    choose, but for what weights of new items may cost known ones (`new_cost`)."""
    queries: int = Field(5000, ge=1)
    """The most validation queries to fit on (next_item)."""
    choosing: int = Field(5000, ge=1)
    """The most validation queries to choose on (next_item)."""
    negatives: int = Field(200, ge=1)
    """The most candidates beside each target: half of them those that the plain sum ranks highest (for new items'
    weights the known items' fusion, with a weight of 1 for new ones), the others sampled, each standing for its share
    of the rest (next_item)."""
    l2: float | None = Field(None, ge=0)
    """Pull of the weights towards the plain sum beside the mean loss over rows; left out: 2 over the number of rows, so
    that it counts less the more rows there are, and 0.001 where pairs are judged."""
    new_queries: int = Field(2000, ge=1)
    """The most validation queries to fit the weights of items without events on; never more than `queries`, and fewer
    where their scores would not fit into memory (next_item)."""
    new_share: float = Field(0.3, ge=0, lt=1)
    """Share of items that are taken for new while the weights of items without events are fitted; 0 leaves it out
    (next_item)."""
    new_cost: float = Field(0.002, ge=0, le=1)
    """The share of NDCG@10 on validation that new items may cost by standing among known ones, in whose lists they are
    then no more often than any item; 1 places them by the fit alone, as if tomorrow's items were as much in demand as
    today's (next_item). Both are measured on the weights' lists, also where a network puts these in order again."""
    pairwise: float = Field(0.5, ge=0)
    """Weight of the loss over one user's liked and disliked rows beside that over all rows (labelled pairs)."""
    drop: float | None = Field(None, ge=0, lt=1)
    """Probability that a scorer is left out of a row while fitting, so that the others do for it where it is absent;
    left out: 0.03, and 0.1 where pairs are judged."""
    iterations: int = Field(100, ge=1)
    """The most steps of L-BFGS."""

    @property
    def dropped(self) -> float:
        """`drop` where items are ranked."""
        return DROP if self.drop is None else self.drop

    def for_pairs(self, kinds: tuple[Kind, ...]) -> "FusionSettings":
        """The same with what pairs have by default (other priors have brought nothing there), and these kinds."""
        drop = PAIRS_DROP if self.drop is None else self.drop
        return self.model_copy(update={"kinds": kinds, "l2": PAIRS_L2 if self.l2 is None else self.l2, "drop": drop})


def fit_ranking(
    scores: Mapping[str, Scores],
    targets: NDArray[np.int64],
    n_user: Counts,
    n_item: Counts,
    seen: NDArray[np.bool_] | None = None,
    *,
    users: NDArray[np.int64] | None = None,
    settings: FusionSettings | None = None,
    seed: int = 0,
) -> Fusion:
    """Fit on validation queries by softmax cross-entropy of the target; choose by NDCG@10.

    The softmax is over the candidates that the plain sum ranks highest and a sample that stands for all others
    (`sample_candidates`): an even sample says little of who is among the first ten.

    Weights look better on the queries that they were fitted on, the more so the more of them there are. So what is
    tried is measured on others, of other users, in `FOLDS` parts, and the best of `settings.kinds`, on a tie the
    earlier, is fitted on all in the end; if a single scorer then is better on these rows, it is kept instead.

    Args:
        scores: by scorer, float32[queries, candidates].
        targets: column of each query's target, int64[queries]; −1 leaves the query out.
        n_user: length of each query's known history, int[queries]; see `evidence`.
        n_item: train events per candidate, int[candidates].
        seen: candidates that are not ranked, bool[queries, candidates]; a target is ranked always.
        users: number of each query's user, int[queries]; every query its own when not given.
        settings: how to fit.
        seed: of sampling and dropping.

    Raises:
        RecllmError: no scorer, or no query with a target.
    """
    settings, rng = settings or FusionSettings(), np.random.default_rng(seed)
    rows = np.flatnonzero(targets >= 0)
    if not scores or not len(rows):
        raise RecllmError("The fusion needs at least one scorer and one validation query with a target candidate.")
    users = np.arange(len(targets)) if users is None else users
    barred = np.zeros((len(targets), len(n_item)), dtype=bool) if seen is None else seen.copy()
    barred[rows, targets[rows]] = False
    base = replace(Fusion.plain(tuple(scores)), user=Evidence.of(n_user[rows]), item=Evidence.of(n_item))
    order = rng.permutation(rows)
    sample, choosing = np.sort(order[: settings.queries]), np.sort(order[: settings.choosing])
    z, columns, stands_for = _sampled(base, scores, sample, targets, barred, settings.negatives, rng)
    z, user, item = (
        drop_scorers(z, settings.dropped, rng),
        base.user(n_user[sample])[:, None],
        base.item(n_item)[columns],
    )

    def figures(fusions: Mapping[str, Fusion], rows: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
        """NDCG@10 of each of the queries, by each fusion; what they share of the work is done once."""
        found: dict[str, list[NDArray[np.float64]]] = {name: [np.zeros(0)] for name in fusions}
        for part in np.array_split(rows, -(-len(rows) // QUERY_BATCH)) if len(rows) else []:
            given, scaled = {name: own[part] for name, own in scores.items()}, Scaled()
            for name, fusion in fusions.items():
                both = fusion.fuse(given, n_user[part], n_item, scaled=scaled)
                fused, _ = fusion.reordered(*both, n_user[part], n_item, barred[part])
                found[name].append(ndcg(target_ranks(np.where(barred[part], np.nan, fused), targets[part]), NDCG_AT))
        return {name: np.concatenate(parts) for name, parts in found.items()}

    @cache
    def singles() -> dict[str, NDArray[np.float64]]:
        """NDCG@10 of the queries that choose, by each scorer alone."""
        return figures({name: alone(base, name) for name in base.names}, choosing)

    def made(part: NDArray[np.bool_]) -> dict[str, Fusion]:
        """What is tried, fitted on this part of the sample, bool[queries]."""
        problem = Problem(z[:, part], user[part], item[part], cross_entropy(stands_for[part]))
        known = ~np.isin(users[choosing], users[sample[~part]])
        reordered = partial(_reordered, scores, sample[part], targets, n_user, n_item, barred, seed)
        single = partial(_mean_of, singles, known)
        return _made(base, problem, settings, single, reordered)

    def figures_of(fusions: Mapping[str, Fusion], part: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
        """`figures` of a part of the queries that choose; of a scorer alone they are known."""
        at = np.searchsorted(choosing, part)
        found = {name: singles()[name.removeprefix(ONLY)][at] for name in fusions if name.startswith(ONLY)}
        found |= figures({name: fusion for name, fusion in fusions.items() if name not in found}, part)
        return {name: found[name] for name in fusions}  # in their order: of a tie the earlier is taken

    every = made(np.ones(len(sample), dtype=bool))
    others = choosing[~np.isin(users[choosing], users[sample])]  # no weight was fitted on these
    measured = {name: [found] for name, found in figures_of(every, others).items()}
    for inside in user_parts(users[sample]):
        fitted = every if inside.all() else made(~inside)
        for name, found in figures_of(fitted, choosing[np.isin(users[choosing], users[sample[inside]])]).items():
            measured[name].append(found)
    outside = {name: float(np.concatenate(found).mean()) for name, found in measured.items()}
    return _best(every, outside, lambda fusion: float(figures({"": fusion}, choosing)[""].mean()))


def user_parts(users: NDArray[np.int64]) -> list[NDArray[np.bool_]]:
    """Up to `FOLDS` parts of some rows by their users' numbers, bool[rows] each; one part where there is one user."""
    known = np.unique(users, return_inverse=True)[1]
    folds = known % min(FOLDS, known.max() + 1)
    return [folds == fold for fold in np.unique(folds)]


def _sampled(
    base: Fusion,
    scores: Mapping[str, Scores],
    sample: NDArray[np.int64],
    targets: NDArray[np.int64],
    barred: NDArray[np.bool_],
    most: int,
    rng: np.random.Generator,
) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.float64]]:
    """What weights are fitted on: z of each scorer, float32[scorers, queries, columns], and `sample_candidates`."""
    found = []
    for part in np.array_split(sample, -(-len(sample) // QUERY_BATCH)):
        z = np.stack([base.z(name, scores[name][part]) for name in base.names])
        columns, stands_for = sample_candidates(targets[part], z.sum(axis=0), barred[part], most, rng)
        found.append((np.take_along_axis(z, columns[None], 2), columns, stands_for))
    return (
        np.concatenate([z for z, _, _ in found], axis=1),
        np.concatenate([columns for _, columns, _ in found]),
        np.concatenate([stands_for for _, _, stands_for in found]),
    )


def _mean_of(figures: Callable[[], Mapping[str, NDArray[np.float64]]], rows: NDArray[np.bool_], name: str) -> float:
    """The mean of a scorer's figures over those rows; 0 without any."""
    return float(figures()[name][rows].mean()) if rows.any() else 0.0


def _reordered(
    scores: Mapping[str, Scores],
    rows: NDArray[np.int64],
    targets: NDArray[np.int64],
    n_user: Counts,
    n_item: Counts,
    barred: NDArray[np.bool_],
    seed: int,
    fusion: Fusion,
) -> Fusion:
    """The fusion with a network that is learnt on its lists for these rows, of those whose target is on them."""
    missing, found = np.float32(np.nan), []
    for part in np.array_split(rows, -(-len(rows) // QUERY_BATCH)):
        fused, shares = fusion.fuse({name: own[part] for name, own in scores.items()}, n_user[part], n_item)
        columns, best = top_k(np.where(barred[part], missing, fused), FIRST)
        there, at = columns >= 0, np.maximum(columns, 0)
        own = np.stack([np.take_along_axis(shares[name], at, 1) for name in fusion.names], axis=1)
        x = features(np.where(there[:, None], own, missing), n_user[part], n_item[at])
        hit = columns == targets[part, None]
        kept = hit.any(axis=1)
        found.append((x[kept], np.where(there, best, -np.inf)[kept], hit.argmax(axis=1)[kept]))
    x, best, wanted = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return replace(fusion, network=learn(x, best, wanted, seed)) if len(x) else fusion


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
            f"fusion.kinds is {list(settings.kinds)}: ranks need several candidates to a query, as a network does, and "
            "pairs have one. Add 'by counts' or another kind."
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
    settings = settings.for_pairs(kinds)
    z = drop_scorers(np.stack([base.z(name, pairs[name]) for name in base.names]), settings.dropped, rng)
    user, item = base.user(n_user)[:, None], base.item(n_item)[:, None]
    numbers = np.arange(len(label)) if users is None else users

    def fused(fusion: Fusion) -> NDArray[np.float64]:
        return np.nan_to_num(fusion.fuse(pairs, n_user, n_item[:, None])[0][:, 0]).astype(np.float64)

    def figure(fusion: Fusion) -> float:
        return auc(label, fused(fusion))

    @cache
    def single(name: str) -> NDArray[np.float64]:
        return fused(alone(base, name))

    def made(rows: NDArray[np.int64]) -> dict[str, Fusion]:
        rows = rows[np.argsort(numbers[rows], kind="stable")]  # blocks are cut between users, not through all of them
        loss = inside_users(label[rows], numbers[rows], settings.pairwise)
        problem = Problem(z[:, rows], user[rows], item[rows], loss)
        return _made(base, problem, settings, lambda name: auc(label[rows], single(name)[rows]))

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
    # No network is learnt where no target is on a list that it could put in order.
    name = "by counts" if best == "network" and made[best].network is None else best
    return replace(made[best], chosen=name, candidates=figures)


def _made(
    base: Fusion,
    problem: Problem,
    settings: FusionSettings,
    single: Callable[[str], float],
    reordered: Callable[[Fusion], Fusion] | None = None,
) -> dict[str, Fusion]:
    """Everything that is tried, by name, fitted on the problem.

    What each scorer has alone orders the levels; `reordered` gives a fusion its network.
    """
    made: dict[str, Fusion] = {}
    weighed: dict[str, Fusion] = {}
    for kind in settings.kinds:
        if kind in ("by counts", "without counts", "stacker", "network"):
            counts, signed = kind != "without counts", kind == "stacker"
            of = "by counts" if kind == "network" else kind
            if of not in weighed:
                theta = minimise(problem, counts=counts, signed=signed, l2=settings.l2, iterations=settings.iterations)
                weighed[of] = replace(base, theta=theta, signed=signed)
            made[kind] = weighed[of] if kind != "network" or reordered is None else reordered(weighed[of])
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

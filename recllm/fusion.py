"""Fusion: standardise each scorer's scores and add them, weighted by evidence; the one place that interprets NaN."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field

from recllm.data import Query
from recllm.errors import RecllmError, unknown
from recllm.files import write_json
from recllm.fitting import (
    PLAIN,
    Evidence,
    Problem,
    cross_entropy,
    drop_scorers,
    logistic,
    minimise,
    moments,
    sample_candidates,
    softplus,
    standardised,
)
from recllm.metrics import auc, ndcg
from recllm.priors import read_facts
from recllm.ranking import QUERY_BATCH, ItemIndex, Scorer, Scores, target_ranks
from recllm.recipes import Settings

Counts = NDArray[np.int64]
"""Numbers of events."""

BACKUP = 1e-6
"""Gate of the scorers beside a single chosen one: they speak only where it is silent (no history, unknown item), and so
quietly that an item which it does not know stands where it would put an average one."""
SILENT = -30.0
"""A θ whose weight is as good as 0."""
NDCG_AT = 10


class FusionSettings(Settings):
    """How the weights are fitted."""

    queries: int = Field(2000, ge=1)
    """The most validation queries to fit on (all of them are used to choose)."""
    negatives: int = Field(200, ge=1)
    """The most sampled candidates beside each target."""
    l2: float = Field(1e-3, ge=0)
    """Pull of the weights towards the plain sum."""
    new_share: float = Field(0.3, ge=0, lt=1)
    """Share of items that are taken for new while the weights of items without events are fitted; 0 leaves it out."""
    drop: float = Field(0.1, ge=0, lt=1)
    """Probability that a scorer is left out of a row while fitting."""
    iterations: int = Field(100, ge=1)
    """The most steps of L-BFGS."""


@dataclass(frozen=True, eq=False)
class Fusion:
    """An additive fusion: score = Σ_s gate_s · softplus(θ_s · [1, user evidence, item evidence]) · z_s.

    Items without events have weights of their own, softplus(θnew_s · [1, user evidence]), without gates: the scorers
    that live on events are silent there, and what the others say of them has to be weighed against known items.

    z is a scorer's standardised score and 0 where it has none, so each term is exactly that scorer's share. A scorer
    with the gate `BACKUP` has z = 0 wherever the one chosen scorer has a score. A scorer whose scores are constant over
    a query's candidates has z = 0 there. A candidate that no scorer knows is NaN.
    """

    names: tuple[str, ...]
    theta: NDArray[np.float64]
    """float64[scorers, 3]"""
    gates: tuple[float, ...]
    """Per scorer: 1, or `BACKUP` beside a single chosen one."""
    standardise: Literal["query", "global"] = "query"
    """Over the candidates of each query (to rank), or with the constants below (to compare rows)."""
    means: tuple[float, ...] = ()
    """Per scorer, for "global"."""
    deviations: tuple[float, ...] = ()
    """Per scorer, for "global"; 0 for a constant scorer."""
    user: Evidence = field(default_factory=Evidence)
    item: Evidence = field(default_factory=Evidence)
    chosen: str = "plain sum"
    """Which of the candidates this is."""
    candidates: Mapping[str, float] = field(default_factory=dict)
    """Validation figure of every candidate: NDCG@10, or AUC for labels."""
    new: NDArray[np.float64] | None = None
    """float64[scorers, 2], θnew; None: items without events have no weights of their own."""
    chosen_new: str = ""
    """Which of the candidates for new items this is."""
    candidates_new: Mapping[str, float] = field(default_factory=dict)
    """NDCG@10 on validation where a part of the items is taken for new, of every candidate for their weights."""

    @classmethod
    def plain(cls, names: Sequence[str]) -> Self:
        """The plain sum of scores standardised per query, for when there is nothing to fit on."""
        theta = np.tile([PLAIN, 0.0, 0.0], (len(names), 1))
        return cls(tuple(names), theta, (1.0,) * len(names))

    @classmethod
    def fit_ranking(
        cls,
        scores: Mapping[str, Scores],
        targets: NDArray[np.int64],
        n_user: Counts,
        n_item: Counts,
        seen: NDArray[np.bool_] | None = None,
        *,
        settings: FusionSettings | None = None,
        seed: int = 0,
    ) -> Self:
        """Fit on validation queries by softmax cross-entropy of the target; choose by NDCG@10 over all of them.

        Chosen is the best of: weights by counts, weights without counts, the plain sum, each scorer alone (the others
        as backup where it is silent); on a tie the earlier. So on validation no part ranks above the fusion.

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
        base = replace(cls.plain(tuple(scores)), user=Evidence.of(n_user[rows]), item=Evidence.of(n_item))
        sample = np.sort(rng.permutation(rows)[: settings.queries])
        columns, valid = sample_candidates(targets[sample], barred[sample], settings.negatives, rng)
        z = np.stack([np.take_along_axis(base._z(name, scores[name][sample]), columns, 1) for name in base.names])
        problem = Problem(
            drop_scorers(z, settings.drop, rng),
            base.user(n_user[sample])[:, None],
            base.item(n_item)[columns],
            cross_entropy(valid),
        )

        def figure(fusion: Self) -> float:
            found = []
            for part in np.array_split(rows, -(-len(rows) // QUERY_BATCH)):
                fused, _ = fusion.fuse({name: given[part] for name, given in scores.items()}, n_user[part], n_item)
                found.append(ndcg(target_ranks(np.where(barred[part], np.nan, fused), targets[part]), NDCG_AT))
            return float(np.concatenate(found).mean())

        return base._best(problem, settings, figure)

    @classmethod
    def fit_labels(
        cls,
        scores: Mapping[str, NDArray[np.float32]],
        labels: ArrayLike,
        n_user: Counts,
        n_item: Counts,
        *,
        settings: FusionSettings | None = None,
        seed: int = 0,
    ) -> Self:
        """Fit on labelled validation pairs by logistic loss, standardised over all rows; choose by AUC as above.

        Args:
            scores: by scorer, float32[rows].
            labels: 1 and 0, [rows].
            n_user: length of each row's known history, int[rows].
            n_item: train events of each row's item, int[rows].
            settings: how to fit.
            seed: of dropping.

        Raises:
            RecllmError: no scorer, or labels of one kind only.
        """
        settings, rng = settings or FusionSettings(), np.random.default_rng(seed)
        label = np.asarray(labels, dtype=np.float64)
        if not scores or len(np.unique(label)) < 2:
            raise RecllmError("The fusion needs at least one scorer and validation rows with both labels, 0 and 1.")
        both = [moments(given[None, :]) for given in scores.values()]
        base = replace(
            cls.plain(tuple(scores)),
            standardise="global",
            means=tuple(float(mean[0, 0]) for mean, _ in both),
            deviations=tuple(float(deviation[0, 0]) for _, deviation in both),
            user=Evidence.of(n_user),
            item=Evidence.of(n_item),
        )
        pairs = {name: given[:, None] for name, given in scores.items()}
        z = drop_scorers(np.stack([base._z(name, pairs[name]) for name in base.names]), settings.drop, rng)
        problem = Problem(z, base.user(n_user)[:, None], base.item(n_item)[:, None], logistic(label))

        def figure(fusion: Self) -> float:
            return auc(label, np.nan_to_num(fusion.fuse(pairs, n_user, n_item[:, None])[0][:, 0]))

        return base._best(problem, settings, figure)

    def _best(self, problem: Problem, settings: FusionSettings, figure: Callable[[Self], float]) -> Self:
        """Fit, measure all candidates, take the best; on a tie the earlier."""
        made = {
            name: replace(self, theta=minimise(problem, counts=counts, l2=settings.l2, iterations=settings.iterations))
            for name, counts in (("by counts", True), ("without counts", False))
        }
        made["plain sum"] = self
        for name in self.names:
            made[f"only {name}"] = replace(self, gates=tuple(1.0 if own == name else BACKUP for own in self.names))
        figures = {name: figure(fusion) for name, fusion in made.items()}
        best = max(figures, key=figures.__getitem__)
        return replace(made[best], chosen=best, candidates=figures)

    def fit_new_items(
        self,
        scores: Mapping[str, Scores],
        as_new: Mapping[str, Scores],
        targets: NDArray[np.int64],
        n_user: Counts,
        n_item: Counts,
        seen: NDArray[np.bool_],
        *,
        settings: FusionSettings | None = None,
        seed: int = 0,
    ) -> Self:
        """The same fusion with weights for items without events, fitted by taking a part of the items for new.

        In every row `settings.new_share` of the warm items, drawn anew, lose what is known from their events, the
        target as likely as any other. Known items keep their weights; those of new ones are fitted by softmax
        cross-entropy, and chosen by NDCG@10 in the mixed catalogue among: fitted, the plain sum, the weights of an
        item with the fewest events.

        Args:
            scores: by scorer, float32[queries, candidates].
            as_new: the same, as if no candidate had events.
            targets: column of each query's target, int64[queries].
            n_user: length of each query's known history, int[queries].
            n_item: train events per candidate, int[candidates].
            seen: candidates that are not ranked, bool[queries, candidates].
            settings: how to fit.
            seed: of the draws.
        """
        settings, rng = settings or FusionSettings(), np.random.default_rng(seed)
        warm = n_item > 0
        rows = np.flatnonzero((targets >= 0) & warm[targets])
        sample = np.sort(rng.permutation(rows)[: settings.queries])
        if not len(sample) or settings.new_share == 0.0:
            return self
        new = warm & (rng.random((len(sample), len(n_item))) < settings.new_share)
        counts = np.where(new, 0, n_item)
        mixed = {name: np.where(new, as_new[name][sample], scores[name][sample]) for name in self.names}
        barred = seen[sample]
        barred[np.arange(len(sample)), targets[sample]] = False
        columns, valid = sample_candidates(targets[sample], barred, settings.negatives, rng)

        def at(values: NDArray[Any]) -> NDArray[Any]:
            return np.take_along_axis(values, columns, 1)

        # What the known items' weights say stays as it is; new items' part of z is what is weighed anew.
        known, _ = replace(self, new=np.full((len(self.names), 2), SILENT)).fuse(mixed, n_user[sample], counts)
        z = np.stack([at(self._z(name, mixed[name])) for name in self.names]) * at(counts == 0)
        base = cross_entropy(valid)
        fixed = np.nan_to_num(at(known)).astype(np.float64)

        def loss(part: slice, own: NDArray[np.float64], intercept: float) -> tuple[float, NDArray[np.float64], float]:
            return base(part, own + fixed[part], intercept)

        problem = Problem(
            drop_scorers(z, settings.drop, rng),
            self.user(n_user[sample])[:, None],
            np.zeros(columns.shape),
            loss,
        )
        fitted = minimise(problem, counts=True, l2=settings.l2, iterations=settings.iterations)[:, :2]
        fewest = self.theta[:, :2] + self.theta[:, 2:] * self.item(0) * [1.0, 0.0]
        made = {"fitted": fitted, "plain sum": np.tile([PLAIN, 0.0], (len(self.names), 1)), "as few events": fewest}

        def figure(theta: NDArray[np.float64]) -> float:
            fused, _ = replace(self, new=theta).fuse(mixed, n_user[sample], counts)
            return float(ndcg(target_ranks(np.where(barred, np.nan, fused), targets[sample]), NDCG_AT).mean())

        figures = {name: figure(theta) for name, theta in made.items()}
        best = max(figures, key=figures.__getitem__)
        return replace(self, new=made[best], chosen_new=best, candidates_new=figures)

    def weights(self, n_user: ArrayLike, n_item: ArrayLike) -> dict[str, NDArray[np.float32]]:
        """Each scorer's weight at given numbers of events: float32, the common shape of `n_user` and `n_item`."""
        user, item, cold = self.user(n_user), self.item(n_item), np.asarray(n_item) == 0
        shape = np.broadcast_shapes(user.shape, item.shape)
        apart = self.new is not None and bool(cold.any())
        result = {}
        for place, name in enumerate(self.names):
            bias, by_user, by_item = self.theta[place]
            even = by_user == by_item == 0.0  # one weight everywhere: spare the softplus of every cell
            weight = self.gates[place] * softplus(bias if even else bias + by_user * user + by_item * item)
            if apart and self.new is not None:
                bias, by_user = self.new[place]
                weight = np.where(cold, softplus(bias + by_user * user), weight)
            result[name] = np.broadcast_to(weight.astype(np.float32), shape)
        return result

    def fuse(self, scores: Mapping[str, Scores], n_user: Counts, n_item: Counts) -> tuple[Scores, dict[str, Scores]]:
        """Fuse: float32[queries, candidates], and each scorer's share of it, whose sum (in order) it is exactly.

        Args:
            scores: by scorer, float32[queries, candidates]; a scorer that is left out counts as NaN everywhere.
            n_user: length of each query's known history, int[queries].
            n_item: train events, int[candidates] or int[queries, candidates].

        Raises:
            RecllmError: a scorer that was not fitted, or none at all.
        """
        for name in scores:
            if name not in self.names:
                raise unknown("scorer of the fusion", name, self.names, "Fit the fusion again with it.")
        if not scores:
            raise RecllmError(f"The fusion needs the scores of at least one of: {', '.join(self.names)}.")
        weights = self.weights(np.asarray(n_user)[:, None], n_item)
        shape = next(iter(scores.values())).shape
        total, known = np.zeros(shape, dtype=np.float32), np.zeros(shape, dtype=bool)
        shares: dict[str, Scores] = {}
        speaks = self._silent(scores, shape)
        if self.new is not None:
            speaks = speaks | (np.asarray(n_item) == 0)
        for name, gate in zip(self.names, self.gates, strict=True):
            given = scores.get(name)
            shares[name] = np.zeros(shape, np.float32) if given is None else weights[name] * self._z(name, given)
            if gate == BACKUP:
                shares[name] *= speaks
            known |= False if given is None else ~np.isnan(given)
            total += shares[name]
        return np.where(known, total, np.float32(np.nan)), shares

    def _silent(self, scores: Mapping[str, Scores], shape: tuple[int, ...]) -> NDArray[np.bool_]:
        """Where the single chosen scorer has no score; everywhere when it is not there."""
        chosen = scores.get(self.names[self.gates.index(1.0)]) if 1.0 in self.gates else None
        return np.ones(shape, dtype=bool) if chosen is None else np.isnan(chosen)

    def _z(self, name: str, scores: Scores) -> Scores:
        place = self.names.index(name)
        given = self.standardise == "global"
        return standardised(scores, *((self.means[place], self.deviations[place]) if given else moments(scores)))

    def plain_sum(self) -> Self:
        """The same standardising with equal weights everywhere: the floor that a fusion has to beat."""
        theta, gates = np.tile([PLAIN, 0.0, 0.0], (len(self.names), 1)), (1.0,) * len(self.names)
        return replace(self, theta=theta, gates=gates, new=None, chosen="plain sum")

    def without(self, name: str) -> Self:
        """The same weights with one scorer gone.

        Raises:
            RecllmError: an unknown scorer.
        """
        if name not in self.names:
            raise unknown("scorer of the fusion", name, self.names)
        keep = [place for place, own in enumerate(self.names) if own != name]

        def kept(values: tuple[float, ...]) -> tuple[float, ...]:
            return tuple(values[place] for place in keep) if values else ()

        return replace(
            self,
            names=tuple(self.names[place] for place in keep),
            theta=self.theta[keep],
            gates=kept(self.gates),
            new=None if self.new is None else self.new[keep],
            means=kept(self.means),
            deviations=kept(self.deviations),
        )

    def save(self, path: Path) -> None:
        """Write JSON that has every constant of the formula."""
        write_json(
            path, asdict(self) | {"theta": self.theta.tolist(), "new": None if self.new is None else self.new.tolist()}
        )

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote.

        Raises:
            RecllmError: the file is missing or not JSON.
        """
        facts = read_facts(path)
        facts |= {key: tuple(facts[key]) for key in ("names", "gates", "means", "deviations")}
        facts |= {key: Evidence(**facts[key]) for key in ("user", "item")}
        facts["theta"] = np.array(facts["theta"], dtype=np.float64).reshape(-1, 3)
        if facts.get("new") is not None:
            facts["new"] = np.array(facts["new"], dtype=np.float64).reshape(-1, 2)
        return cls(**facts)


def evidence(queries: Sequence[Query], candidates: ItemIndex, item_counts: Mapping[str, int]) -> tuple[Counts, Counts]:
    """How much is known: history items with train events, int64[queries]; train events, int64[candidates]."""
    n_user = [sum(1 for item in query.history if item_counts.get(item)) for query in queries]
    n_item = [item_counts.get(item, 0) for item in candidates.ids]
    return np.array(n_user, dtype=np.int64), np.array(n_item, dtype=np.int64)


@dataclass(frozen=True, eq=False)
class FusedScorer:
    """Several scorers as one; a fitted scorer that is absent here counts as silent."""

    scorers: Mapping[str, Scorer]
    fusion: Fusion
    item_counts: Mapping[str, int]
    """Train events per item."""

    def score(self, queries: Sequence[Query], candidates: ItemIndex) -> Scores:
        """Fused scores: float32[queries, candidates], NaN for a candidate that no scorer knows."""
        return self.explain(queries, candidates)[0]

    def explain(self, queries: Sequence[Query], candidates: ItemIndex) -> tuple[Scores, dict[str, Scores]]:
        """Fused scores and each scorer's share: float32[queries, candidates]."""
        scores = {name: scorer.score(queries, candidates) for name, scorer in self.scorers.items()}
        return self.fusion.fuse(scores, *evidence(queries, candidates, self.item_counts))

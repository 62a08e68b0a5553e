"""Fusion: standardise each scorer's scores and add them, weighted by evidence; the one place that interprets NaN."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field

from recllm.data import Query
from recllm.errors import RecllmError, unknown
from recllm.files import write_json
from recllm.fitting import PLAIN, Problem, cross_entropy, drop_scorers, logistic, minimise, softplus
from recllm.metrics import auc, ndcg
from recllm.priors import read_facts
from recllm.ranking import QUERY_BATCH, ItemIndex, Scorer, Scores, target_ranks
from recllm.recipes import Settings

Counts = NDArray[np.int64]
"""Numbers of events."""
Standardise = Literal["query", "global"]
"""Over the candidates of each query (to rank), or with the fitted mean and deviation (to compare rows)."""

FLAT = 1e-6
"""Scores whose deviation is below this share of their size are constant: they say nothing, so z is 0."""
BACKUP = 1e-6
"""Gate of the scorers beside a single chosen one: below float32's resolution of its scores, so they only speak where it
is silent (no history, unknown item)."""
NDCG_AT = 10


class FusionSettings(Settings):
    """How the weights are fitted; `[fusion]` of a run file."""

    queries: int = Field(2000, ge=1)
    """The most validation queries that are fitted on (all of them are used to choose)."""
    negatives: int = Field(1000, ge=1)
    """The most sampled candidates beside each target."""
    l2: float = Field(1e-3, ge=0)
    """Pull of the weights towards the plain sum."""
    drop: float = Field(0.15, ge=0, lt=1)
    """Probability that a scorer is left out of a row while fitting."""
    iterations: int = Field(100, ge=1)
    """The most steps of L-BFGS."""


@dataclass(frozen=True)
class Evidence:
    """Standardises log1p of an event count, clipped to the range that was seen while fitting."""

    mean: float = 0.0
    deviation: float = 1.0
    low: float = 0.0
    high: float = 0.0

    @classmethod
    def of(cls, counts: ArrayLike) -> Self:
        """Take the constants from `counts`."""
        logs = np.log1p(np.asarray(counts, dtype=np.float64))
        return cls(float(logs.mean()), max(float(logs.std()), 1e-3), float(logs.min()), float(logs.max()))

    def __call__(self, counts: ArrayLike) -> NDArray[np.float64]:
        """(clip(log1p n, low, high) − mean) / deviation, in the shape of `counts`."""
        logs = np.log1p(np.asarray(counts, dtype=np.float64))
        return (np.clip(logs, self.low, self.high) - self.mean) / self.deviation


@dataclass(frozen=True, eq=False)
class Fusion:
    """An additive fusion: score = Σ_s gate_s · softplus(θ_s · [1, user evidence, item evidence]) · z_s.

    z is a scorer's standardised score, 0 where the scorer has none, so each term is exactly that scorer's share. A scorer
    whose scores are constant over a query's candidates has z = 0 there. Where no scorer knows the candidate the result
    is NaN.
    """

    names: tuple[str, ...]
    theta: NDArray[np.float64]
    """float64[scorers, 3]"""
    gates: tuple[float, ...]
    """Per scorer: 1, or `BACKUP` beside a single chosen one."""
    standardise: Standardise = "query"
    means: tuple[float, ...] = ()
    """Per scorer, for "global"."""
    deviations: tuple[float, ...] = ()
    """Per scorer, for "global"; 0 for a constant scorer."""
    user: Evidence = Evidence()
    item: Evidence = Evidence()
    chosen: str = "plain sum"
    """Which candidate this is."""
    candidates: Mapping[str, float] | None = None
    """The validation figure of every candidate: NDCG@10, or AUC for labels."""

    @classmethod
    def plain(cls, names: Sequence[str]) -> Self:
        """The plain sum of scores standardised per query, for when there is nothing to fit on."""
        return cls(tuple(names), _constant(len(names)), (1.0,) * len(names))

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
        """Fit on validation queries by softmax cross-entropy of the target, and choose by NDCG@10 over all of them.

        Chosen is the best of: weights by counts, weights without counts, the plain sum, each scorer alone (with the
        others as backup where it is silent); on a tie the earlier one. So on validation no part ranks above the fusion.

        Args:
            scores: by scorer, float32[queries, candidates].
            targets: column of each query's target, int64[queries]; −1 leaves the query out.
            n_user: length of each query's known history, int[queries].
            n_item: train events per candidate, int[candidates].
            seen: candidates that are not ranked, bool[queries, candidates]; a target is always ranked.
            settings: how to fit.
            seed: of sampling and dropping.

        Raises:
            RecllmError: no scorer, or no query with a target.
        """
        settings = settings or FusionSettings()
        rows = np.flatnonzero(targets >= 0)
        if not scores or not len(rows):
            raise RecllmError("The fusion needs at least one scorer and one validation query with a target candidate.")
        base = replace(cls.plain(tuple(scores)), user=Evidence.of(n_user[rows]), item=Evidence.of(n_item))
        barred = np.zeros((len(targets), len(n_item)), dtype=bool) if seen is None else seen.copy()
        barred[rows, targets[rows]] = False
        rng = np.random.default_rng(seed)
        sample = np.sort(rng.permutation(rows)[: settings.queries])
        columns, valid = _sample_candidates(targets[sample], barred[sample], settings.negatives, rng)
        z = np.stack([np.take_along_axis(base._z(s, scores[n][sample]), columns, 1) for s, n in enumerate(base.names)])
        problem = Problem(
            drop_scorers(z, settings.drop, rng), base.user(n_user[sample])[:, None], base.item(n_item)[columns]
        )
        fits = {
            name: minimise(problem, cross_entropy(valid), counts=counts, l2=settings.l2, iterations=settings.iterations)
            for name, counts in (("by counts", True), ("without counts", False))
        }

        def figure(fusion: Self) -> float:
            found = []
            for at in range(0, len(rows), QUERY_BATCH):
                part = rows[at : at + QUERY_BATCH]
                fused, _ = fusion.fuse({name: given[part] for name, given in scores.items()}, n_user[part], n_item)
                found.append(ndcg(target_ranks(np.where(barred[part], np.nan, fused), targets[part]), NDCG_AT))
            return float(np.concatenate(found).mean())

        return base._choose(fits, figure)

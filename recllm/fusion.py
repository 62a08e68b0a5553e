"""Fusion: standardise each scorer's scores and add them, weighted by evidence; the one place that interprets NaN."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from recllm.data import Query
from recllm.errors import RecllmError, unknown
from recllm.files import write_json
from recllm.fitting import PLAIN, Evidence, borda_points, moments, places_of, reciprocal_ranks, softplus, standardised
from recllm.priors import read_facts
from recllm.ranking import ItemIndex, Scorer, Scores, mask_seen, top_k
from recllm.reordering import FIRST, SHARE, Reordering

Counts = NDArray[np.int64]
"""Numbers of events."""

PLACING = "popularity"
"""The scorer whose weight for new items places them among known ones: it says the same of all of them."""
ALIKE_FOR_ALL = ("expected_popularity",)
"""Scorers that speak of new items alone and say the same of them to everybody."""
BACKUP = 1e-6
"""Gate of the scorers beside a single chosen one: they speak only where it is silent (no history, unknown item), and so
quietly that an item which it does not know stands where it would put an average one."""


def popularity_says(mean: NDArray[np.float64], deviation: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether popularity's scores with these moments tell items apart, bool alike: else new ones stand anywhere."""
    return (deviation > 0.0) & (mean > 0.0)


RANKED = {"reciprocal rank": reciprocal_ranks, "borda": borda_points}
"""What makes scores of places, by `Fusion.standardise`."""


@dataclass(frozen=True, eq=False)
class Fusion:
    """An additive fusion: score = Σ_s gate_s · weight(θ_s · [1, user evidence, item evidence]) · z_s.

    The weight is softplus of its argument, so that no scorer counts against itself, or the argument itself where the
    fusion is `signed`. z is a scorer's score brought to a common scale by `standardise`: the standard score over the
    query's candidates or by given constants, or by its rank r among them 1 / (60 + r) (reciprocal rank fusion, Cormack,
    Clarke & Büttcher 2009) or the share of the first 100 places behind it (Borda count); equal ones have their mean
    rank.

    A scorer of a later level speaks only where all those of the levels before it are silent.

    New items, those with fewer than `few` events, have weights of their own, θnew_s · [1, user evidence], and no gates:
    the scorers that live on events have no say there, and what the others say has to be weighed against known items.
    These weights may be negative: popularity's is what places them among known ones, for it says the same of all of
    them. Its z of an item without events depends on how many of them there are (two among a hundred alike lie far off),
    and first events of yesterday weigh much where popularity fades; so it is what it was while θnew was fitted, as if
    none of them had events, `unseen`.

    z is 0 where a scorer has no score, so each term is exactly that scorer's share. A scorer whose scores are constant
    over a query's candidates has z = 0 there, and by ranks the same for all of them. A candidate that no scorer knows
    is NaN.
    """

    names: tuple[str, ...]
    theta: NDArray[np.float64]
    """float64[scorers, 3]"""
    gates: tuple[float, ...]
    """Per scorer: 1, or `BACKUP` beside a single chosen one."""
    levels: tuple[int, ...] = ()
    """Per scorer, 0 first; empty where all speak everywhere."""
    signed: bool = False
    """Weights may be negative."""
    standardise: Literal["query", "global", "reciprocal rank", "borda"] = "query"
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
    """float64[scorers, 2], θnew; None: new items have no weights of their own."""
    few: int = 1
    """Events from which an item is known."""
    unseen: float | None = None
    """Popularity's z of an item without events while θnew was fitted, below 0; None leaves it as it comes."""
    scales: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Mean and deviation, while θnew was fitted, of the scorers that are `ALIKE_FOR_ALL`: taken over the new items
    that there are, they would make of two that hardly differ the two ends, and nothing of a single one."""
    chosen_new: str = ""
    """Which of the candidates for new items this is."""
    candidates_new: Mapping[str, float] = field(default_factory=dict)
    """NDCG@10 on validation where a part of the items is taken for new, of every candidate for their weights."""
    network: Reordering | None = None
    """Puts the first places of a list in order again, `reordered`; None leaves them as the sum has them."""

    @property
    def share_names(self) -> tuple[str, ...]:
        """Whose shares a score has."""
        return self.names if self.network is None else (*self.names, SHARE)

    @classmethod
    def plain(cls, names: Sequence[str]) -> Self:
        """The plain sum of scores standardised per query, for when there is nothing to fit on."""
        theta = np.tile([PLAIN, 0.0, 0.0], (len(names), 1))
        return cls(tuple(names), theta, (1.0,) * len(names))

    def weights(self, n_user: ArrayLike, n_item: ArrayLike) -> dict[str, NDArray[np.float32]]:
        """Each scorer's weight at given numbers of events: float32, the common shape of `n_user` and `n_item`."""
        user, item, cold = self.user(n_user), self.item(n_item), np.asarray(n_item) < self.few
        shape = np.broadcast_shapes(user.shape, item.shape)
        apart = self.new is not None and bool(cold.any())
        result = {}
        for place, name in enumerate(self.names):
            bias, by_user, by_item = self.theta[place]
            even = by_user == by_item == 0.0  # one weight everywhere: spare the softplus of every cell
            weight = self.gates[place] * self._link(bias if even else bias + by_user * user + by_item * item)
            if apart and self.new is not None:
                bias, by_user = self.new[place]
                weight = np.where(cold, bias + by_user * user, weight)
            result[name] = np.broadcast_to(weight.astype(np.float32), shape)
        return result

    def fuse(
        self, scores: Mapping[str, Scores], n_user: Counts, n_item: Counts, *, scaled: "Scaled | None" = None
    ) -> tuple[Scores, dict[str, Scores]]:
        """Fuse: float32[queries, candidates], and each scorer's share of it, whose sum (in order) it is exactly.

        Args:
            scores: by scorer, float32[queries, candidates]; a scorer that is left out counts as NaN everywhere.
            n_user: length of each query's known history, int[queries].
            n_item: train events, int[candidates] or int[queries, candidates].
            scaled: keeps the scores on their common scale for other fusions of the same ones.

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
        cold = None if self.new is None else np.broadcast_to(np.asarray(n_item) < self.few, shape)
        for place, name in enumerate(self.names):
            given = scores.get(name)
            if given is None:
                shares[name] = np.zeros(shape, dtype=np.float32)
                continue
            z = self.z(name, given) if scaled is None else scaled.of(self, name, given)
            shares[name] = weights[name] * (z if cold is None else self.placed(name, given, z, cold))
            if self.levels and self.levels[place] > 0:
                speaks = ~self._known_before(scores, self.levels[place], shape)
                shares[name] *= speaks if cold is None else speaks | cold
            known |= ~np.isnan(given)
        for share in shares.values():
            total += share
        return np.where(known, total, np.float32(np.nan)), shares

    def reordered(
        self,
        fused: Scores,
        shares: Mapping[str, Scores],
        n_user: Counts,
        n_item: Counts,
        barred: NDArray[np.bool_] | None = None,
    ) -> tuple[Scores, dict[str, Scores]]:
        """What `fuse` gave, with what the network adds to the first places of each list, as one more share.

        Args:
            fused: float32[queries, candidates].
            shares: by scorer, float32[queries, candidates].
            n_user: length of each query's known history, int[queries].
            n_item: train events, int[candidates].
            barred: what no list has, bool[queries, candidates].
        """
        if self.network is None:
            return fused, dict(shares)
        ranked = fused if barred is None else np.where(barred, np.float32(np.nan), fused)
        columns, _ = top_k(ranked, FIRST)
        there, at = columns >= 0, np.maximum(columns, 0)
        listed = np.stack([np.take_along_axis(shares[name], at, 1) for name in self.names], axis=1)
        listed = np.where(there[:, None], listed, np.float32(np.nan))
        added = np.zeros_like(fused)
        lines, places = np.nonzero(there)
        added[lines, at[there]] = self.network.added(listed, np.asarray(n_user), n_item[at], self.few)[lines, places]
        return fused + added, {**shares, SHARE: added}

    def _known_before(self, scores: Mapping[str, Scores], level: int, shape: tuple[int, ...]) -> NDArray[np.bool_]:
        """Where some scorer of an earlier level has a score, bool[queries, candidates]."""
        known = np.zeros(shape, dtype=bool)
        for name, own in zip(self.names, self.levels, strict=True):
            if own < level and name in scores:
                known |= ~np.isnan(scores[name])
        return known

    def _link(self, argument: ArrayLike) -> NDArray[np.float64]:
        return np.asarray(argument, dtype=np.float64) if self.signed else softplus(argument)

    def z(self, name: str, scores: Scores) -> Scores:
        """A scorer's scores, float32[queries, candidates], on the common scale; 0 where it has none."""
        if self.standardise in RANKED:
            return RANKED[self.standardise](scores, places_of(scores))
        if name in self.scales and self.standardise == "query":
            return standardised(scores, *self.scales[name])
        place = self.names.index(name)
        given = self.standardise == "global"
        return standardised(scores, *((self.means[place], self.deviations[place]) if given else moments(scores)))

    def placed(self, name: str, scores: Scores, z: Scores, cold: NDArray[np.bool_]) -> Scores:
        """A scorer's `z`, float32[queries, candidates], with popularity's of the `cold` ones being `unseen`."""
        if name != PLACING or self.standardise != "query" or self.unseen is None:
            return z
        cold = cold & ~np.isnan(scores) & popularity_says(*moments(scores))
        return np.where(cold, np.float32(self.unseen), z)

    def plain_sum(self) -> Self:
        """The same standardising with equal weights everywhere: the floor that a fusion has to beat."""
        theta, gates = np.tile([PLAIN, 0.0, 0.0], (len(self.names), 1)), (1.0,) * len(self.names)
        scale: Literal["query", "global"] = "global" if self.standardise == "global" else "query"
        return replace(
            self,
            theta=theta,
            gates=gates,
            levels=(),
            signed=False,
            standardise=scale,
            new=None,
            unseen=None,
            scales={},
            network=None,
            chosen="plain sum",
        )

    def without(self, name: str) -> Self:
        """The same weights with one scorer gone; a network goes as well, it knows the scorers only together.

        Raises:
            RecllmError: an unknown scorer.
        """
        if name not in self.names:
            raise unknown("scorer of the fusion", name, self.names)
        keep = [place for place, own in enumerate(self.names) if own != name]

        def kept(values: tuple[Any, ...]) -> tuple[Any, ...]:
            return tuple(values[place] for place in keep) if values else ()

        return replace(
            self,
            names=tuple(self.names[place] for place in keep),
            theta=self.theta[keep],
            gates=kept(self.gates),
            levels=kept(self.levels),
            new=None if self.new is None else self.new[keep],
            means=kept(self.means),
            deviations=kept(self.deviations),
            network=None,
            chosen="by counts" if self.chosen == "network" else self.chosen,
        )

    def save(self, path: Path) -> None:
        """Write JSON that has every constant of the formula."""
        facts = asdict(replace(self, network=None))
        facts |= {"theta": self.theta.tolist(), "new": None if self.new is None else self.new.tolist()}
        del facts["network"]  # older versions read what has none
        write_json(path, facts if self.network is None else facts | {"network": self.network.facts()})

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote.

        Raises:
            RecllmError: the file is missing or not JSON.
        """
        facts = read_facts(path)
        facts |= {key: tuple(facts.get(key, ())) for key in ("names", "gates", "levels", "means", "deviations")}
        facts |= {key: Evidence(**facts[key]) for key in ("user", "item")}
        facts["theta"] = np.array(facts["theta"], dtype=np.float64).reshape(-1, 3)
        facts["scales"] = {name: tuple(own) for name, own in facts.get("scales", {}).items()}
        if facts.get("new") is not None:
            facts["new"] = np.array(facts["new"], dtype=np.float64).reshape(-1, 2)
        if facts.get("network") is not None:
            facts["network"] = Reordering.of(facts["network"])
        return cls(**facts)


class Scaled:
    """What `Fusion.z` makes of the scores of some queries, kept for several fusions of the same scorers."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, str], Scores] = {}
        self._places: dict[str, NDArray[np.float64]] = {}

    def of(self, fusion: Fusion, name: str, scores: Scores) -> Scores:
        """`fusion.z(name, scores)`."""
        key = fusion.standardise, name
        if key not in self._kept and fusion.standardise in RANKED:
            if name not in self._places:
                self._places[name] = places_of(scores)
            self._kept[key] = RANKED[fusion.standardise](scores, self._places[name])
        elif key not in self._kept:
            self._kept[key] = fusion.z(name, scores)
        return self._kept[key]


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
    exclude_seen: bool = True
    """Whether a list leaves out what the history has: so a network's first places do."""

    def score(self, queries: Sequence[Query], candidates: ItemIndex) -> Scores:
        """Fused scores: float32[queries, candidates], NaN for a candidate that no scorer knows."""
        return self.explain(queries, candidates)[0]

    def explain(self, queries: Sequence[Query], candidates: ItemIndex) -> tuple[Scores, dict[str, Scores]]:
        """Fused scores and each scorer's share: float32[queries, candidates]."""
        scores = {name: scorer.score(queries, candidates) for name, scorer in self.scorers.items()}
        counts = evidence(queries, candidates, self.item_counts)
        fused, shares = self.fusion.fuse(scores, *counts)
        if self.fusion.network is None:
            return fused, shares
        barred = np.isnan(mask_seen(fused, queries, candidates)) if self.exclude_seen else None
        return self.fusion.reordered(fused, shares, *counts, barred)

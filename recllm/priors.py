"""Priors: scorers without training (popularity, shrunk means, text similarity), the floor every model has to beat."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import polars as pl
from numpy.typing import NDArray
from safetensors.numpy import save_file

from recllm.arrayfiles import read_tensors
from recllm.askedat import DAY, NOW, FadingCounts, log_end, moments_of
from recllm.data import Interactions, Query
from recllm.errors import RecllmError
from recllm.files import read_json, write_json, written
from recllm.ranking import ItemIndex, Scores, dot_scores
from recllm.recency import recency_weights

GONE = "{} cannot be read ({}). Bring it back, or make what it belongs to anew (a run by --overwrite)."
EVENTS = ("rows", "times", "weights")
"""What is kept of the events that popularity counts as of any moment."""


def write_arrays(folder: Path, name: str, arrays: Mapping[str, NDArray[Any]], facts: Mapping[str, object]) -> None:
    """Write `<name>.safetensors` (numbers) and `<name>.json` (ids and settings); each appears whole or not at all."""
    with written(folder / f"{name}.safetensors") as temporary:
        save_file({key: np.ascontiguousarray(array) for key, array in arrays.items()}, temporary)
    write_json(folder / f"{name}.json", facts)


def read_arrays(folder: Path, name: str) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Read what `write_arrays` wrote.

    Raises:
        RecllmError: a file is missing or damaged.
    """
    facts = read_facts(folder / f"{name}.json")
    try:
        return read_tensors(folder / f"{name}.safetensors"), facts
    except OSError as error:
        raise RecllmError(GONE.format(folder / f"{name}.safetensors", error)) from None


def read_facts(path: Path) -> dict[str, Any]:
    """Read a JSON object that belongs to a fitted scorer.

    Raises:
        RecllmError: the file is missing or not JSON.
    """
    try:
        facts: dict[str, Any] = read_json(path)
    except OSError as error:
        raise RecllmError(GONE.format(path, error)) from None
    return facts


def take_rows(values: NDArray[np.float32], items: ItemIndex, candidates: ItemIndex) -> NDArray[np.float32]:
    """The rows of `values` (one per item of `items`) in the order of `candidates`; NaN for an unknown item."""
    rows = items.rows(candidates.ids)
    if not len(items):
        return np.full((len(candidates), *values.shape[1:]), np.nan, dtype=np.float32)
    taken = values[rows]  # −1 takes the last row, which the next line blanks
    taken[rows < 0] = np.nan
    return taken


class ItemPrior:
    """A value of each item, the same for every query; NaN for an unknown item."""

    def __init__(self, items: ItemIndex, values: NDArray[np.float32]) -> None:
        """Keep `values`, float32[items]."""
        self.items, self.values = items, values

    def query_vectors(self, queries: Sequence[Query]) -> NDArray[np.float32]:
        """Ones, float32[queries, 1]: every user is known well enough for it."""
        return np.ones((len(queries), 1), dtype=np.float32)

    def item_vectors(self, candidates: ItemIndex) -> NDArray[np.float32]:
        """The values, float32[candidates, 1]."""
        return take_rows(self.values[:, None], self.items, candidates)

    def score(self, queries: Sequence[Query], candidates: ItemIndex) -> Scores:
        """The same values for every query: float32[queries, candidates]."""
        return dot_scores(self.query_vectors(queries), self.item_vectors(candidates))

    def grown(self, items: ItemIndex, values: NDArray[np.float32]) -> Self:
        """With new items at the end of `items`, and their `values`, float32[new items]."""
        old = self.item_vectors(ItemIndex(items.ids[: len(items) - len(values)]))[:, 0]
        return type(self)(items, np.concatenate([old, values]))


class Popularity(ItemPrior):
    """log1p of an item's train events, which may fade. No event is knowledge: 0.0; an id never seen anywhere is NaN.

    With `counts` it is popularity as of the moment when a recommendation is asked for: only what was before it counts.
    As of now it is what `values` say, so that a bundle needs no events.
    """

    def __init__(self, items: ItemIndex, values: NDArray[np.float32], counts: FadingCounts | None = None) -> None:
        """Keep `values`, float32[items], those of now; `counts` are of the first of the items."""
        super().__init__(items, values)
        self.counts = counts

    @classmethod
    def fit(
        cls,
        interactions: Interactions,
        catalog_ids: Sequence[str] = (),
        *,
        half_life_days: float | None = None,
        as_of: bool = False,
    ) -> Self:
        """Count events per item; with a half-life, an event counts ½ for every `half_life_days` before the end.

        The end is where all but one event of a thousand are over: a clock that is a year ahead would else leave an item
        alone with all that counts. Events that fade are scaled to add up to as much as they do without, so that the
        logarithm bends them as much; with `as_of` they fade from when a recommendation is asked for, and are not.

        Raises:
            RecllmError: a half-life is asked for and events have no timestamp.
        """
        frame = interactions.frame.select("item_id", weight=pl.Series(interactions.weights().astype(np.float64)))
        items = ItemIndex(dict.fromkeys([*catalog_ids, *frame["item_id"].unique(maintain_order=True)]))
        if half_life_days is not None:
            times = interactions.frame["timestamp"]
            if times.null_count():
                raise RecllmError(
                    f"half_life_days={half_life_days} needs a timestamp on every event, and {times.null_count()} of "
                    f"{len(times)} have none. Leave half_life_days out, or give the timestamp column."
                )
            if as_of:
                counts = FadingCounts.fit(interactions, items.rows(frame["item_id"]), len(items), half_life_days)
                return cls(items, np.log1p(counts.now()).astype(np.float32), counts)
            seconds = times.to_numpy().astype(np.float64)
            ages = np.maximum(log_end(times) - seconds, 0.0)
            fresh = frame["weight"].to_numpy() * np.exp2(-ages / (DAY * half_life_days))
            frame = frame.with_columns(weight=pl.Series(fresh * (frame["weight"].sum() / fresh.sum())))
        totals = dict(frame.group_by("item_id", maintain_order=True).agg(pl.col("weight").sum()).iter_rows())
        return cls(items, np.log1p(np.array([totals.get(item, 0.0) for item in items.ids], dtype=np.float32)))

    def score(self, queries: Sequence[Query], candidates: ItemIndex) -> Scores:
        """As of when each query is asked: float32[queries, candidates]."""
        moments = moments_of(queries)
        if self.counts is None or (moments == NOW).all():
            return super().score(queries, candidates)
        values = np.zeros((len(self.items), len(queries)), dtype=np.float32)
        values[: self.counts.items] = np.log1p(self.counts.at(moments)).T
        values[np.isnan(self.values)] = np.nan
        return np.ascontiguousarray(take_rows(values, self.items, candidates).T)

    def fading(self, half_life_days: float) -> "Popularity":
        """The same events with another half-life, of a popularity as of the moment of the request."""
        assert self.counts is not None
        counts = replace(self.counts, half_life_days=half_life_days)
        return Popularity(self.items, np.log1p(counts.now()).astype(np.float32), counts)

    def as_of_now(self) -> "Popularity":
        """The same without its events, as a bundle has it."""
        return Popularity(self.items, self.values)

    def score_as_new(self, queries: Sequence[Query], candidates: ItemIndex) -> Scores:
        """Nobody has chosen them: zeros, float32[queries, candidates]."""
        return np.zeros((len(queries), len(candidates)), dtype=np.float32)

    def save(self, folder: Path) -> None:
        """Write `popularity.safetensors` and `popularity.json`."""
        arrays: dict[str, NDArray[Any]] = {"log_counts": self.values}
        facts: dict[str, object] = {"ids": self.items.ids}
        if self.counts is not None:
            arrays |= {f"events.{key}": getattr(self.counts, key) for key in EVENTS}
            facts["counts"] = {key: getattr(self.counts, key) for key in ("items", "end", "half_life_days")}
        write_arrays(folder, "popularity", arrays, facts)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `save` wrote."""
        arrays, facts = read_arrays(folder, "popularity")
        counts = None
        if "counts" in facts:
            rows, times, weights = (arrays[f"events.{key}"] for key in EVENTS)
            counts = FadingCounts(rows, times, weights, **facts["counts"])
        return cls(ItemIndex(facts["ids"]), arrays["log_counts"], counts)


def _shrunk_means(
    interactions: Interactions, key: str, shrinkage: float
) -> tuple[list[str], NDArray[np.float32], float]:
    """Ids, their means pulled towards the global mean as by `shrinkage` more ratings of that value, and that mean."""
    frame = interactions.frame.filter(pl.col("rating").is_not_null())
    if frame.is_empty():
        raise RecllmError(f"A mean rating per {key.removesuffix('_id')} needs ratings, and the interactions have none.")
    middle = float(frame["rating"].cast(pl.Float64).mean())  # type: ignore[arg-type]
    rating = pl.col("rating").cast(pl.Float64)
    groups = frame.group_by(key, maintain_order=True).agg(total=rating.sum(), n=pl.len())
    means = (groups["total"] + shrinkage * middle) / (groups["n"] + shrinkage)
    return groups[key].to_list(), means.to_numpy().astype(np.float32), middle


class ItemMean:
    """An item's shrunk mean rating, (sum + k·μ) / (n + k); NaN for an item without train ratings."""

    def __init__(self, items: ItemIndex, means: NDArray[np.float32]) -> None:
        """Keep `means`, float32[items]."""
        self.items, self.means = items, means

    @classmethod
    def fit(cls, interactions: Interactions, *, shrinkage: float = 5.0) -> Self:
        """Average the train ratings.

        Raises:
            RecllmError: no event has a rating.
        """
        ids, means, _ = _shrunk_means(interactions, "item_id", shrinkage)
        return cls(ItemIndex(ids), means)

    def score(self, queries: Sequence[Query], candidates: ItemIndex) -> Scores:
        """The same mean for every query: float32[queries, candidates]."""
        return np.tile(take_rows(self.means, self.items, candidates), (len(queries), 1))

    def save(self, folder: Path) -> None:
        """Write `item_mean.safetensors` and `item_mean.json`."""
        write_arrays(folder, "item_mean", {"means": self.means}, {"ids": self.items.ids})

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `save` wrote."""
        arrays, facts = read_arrays(folder, "item_mean")
        return cls(ItemIndex(facts["ids"]), arrays["means"])


class UserMean:
    """A user's shrunk mean rating, constant over the candidates: it orders users, not items (for AUC over all rows).

    From the query's own ratings when it has some, else from the user's train ratings, else NaN. The query's own fade
    with a half-life: over likes and dislikes that is the recency-weighted share of likes.
    """

    def __init__(
        self, users: dict[str, float], middle: float, shrinkage: float, half_life: float | None = None
    ) -> None:
        """Keep the train users' means, the global mean, the shrinkage and the half-life, in ratings."""
        self.users, self.middle, self.shrinkage, self.half_life = users, middle, shrinkage, half_life

    @classmethod
    def fit(cls, interactions: Interactions, *, shrinkage: float = 5.0) -> Self:
        """Average the train ratings.

        Raises:
            RecllmError: no event has a rating.
        """
        ids, means, middle = _shrunk_means(interactions, "user_id", shrinkage)
        return cls(dict(zip(ids, map(float, means), strict=True)), middle, shrinkage)

    def score(self, queries: Sequence[Query], candidates: ItemIndex) -> Scores:
        """The user's mean for every candidate: float32[queries, candidates]."""
        means = np.array([self._mean(query) for query in queries], dtype=np.float32)
        return np.tile(means[:, None], (1, len(candidates)))

    def _mean(self, query: Query) -> float:
        ratings = [rating for rating in query.ratings or () if rating is not None]
        if ratings:
            weights = recency_weights(len(ratings), self.half_life).astype(np.float64)
            total = float(weights @ np.asarray(ratings)) + self.shrinkage * self.middle
            return total / (float(weights.sum()) + self.shrinkage)
        return self.users.get(query.user_id, float("nan")) if query.user_id is not None else float("nan")

    def save(self, folder: Path) -> None:
        """Write `user_mean.safetensors` and `user_mean.json`."""
        means = np.array(list(self.users.values()), dtype=np.float32)
        facts = {
            "ids": list(self.users),
            "middle": self.middle,
            "shrinkage": self.shrinkage,
            "half_life": self.half_life,
        }
        write_arrays(folder, "user_mean", {"means": means}, facts)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `save` wrote."""
        arrays, facts = read_arrays(folder, "user_mean")
        users = dict(zip(facts["ids"], map(float, arrays["means"]), strict=True))
        return cls(users, facts["middle"], facts["shrinkage"], facts.get("half_life"))


class TextSimilarity:
    """Cosine between the mean vector of the history and the candidate's; NaN for no history or no vector."""

    def __init__(self, items: ItemIndex, vectors: NDArray[np.float32], half_life: float | None = None) -> None:
        """Keep item `vectors`, float32[items, width], scaled to length 1; a row of zeros or NaN counts as no vector.

        The mean fades with `half_life`, in events.
        """
        if vectors.shape[0] != len(items):
            raise ValueError(f"{len(items)} items, but vectors for {vectors.shape[0]}")
        length = np.linalg.norm(vectors, axis=1, keepdims=True)
        self.items, self.half_life = items, half_life
        self.vectors = np.where(length > 0, vectors / np.where(length > 0, length, 1.0), np.nan).astype(np.float32)

    def score(self, queries: Sequence[Query], candidates: ItemIndex) -> Scores:
        """Cosines: float32[queries, candidates]."""
        return dot_scores(self.query_vectors(queries), self.item_vectors(candidates))

    def score_as_new(self, queries: Sequence[Query], candidates: ItemIndex) -> Scores:
        """The same: text is there before the first event."""
        return self.score(queries, candidates)

    def query_vectors(self, queries: Sequence[Query]) -> NDArray[np.float32]:
        """Mean vectors of the histories at length 1: float32[queries, width]; NaN without a vector in the history."""
        means = np.array([self._mean(query) for query in queries], dtype=np.float32)
        return means.reshape(len(queries), self.vectors.shape[1])  # also for no query at all

    def item_vectors(self, candidates: ItemIndex) -> NDArray[np.float32]:
        """Vectors at length 1: float32[candidates, width]; NaN for an item without one."""
        return take_rows(self.vectors, self.items, candidates)

    def _mean(self, query: Query) -> NDArray[np.float32]:
        own = self.vectors[self.items.known(query.history)]
        mean = recency_weights(len(own), self.half_life) @ np.nan_to_num(own)  # a sum: a cosine does not see the scale
        length = np.linalg.norm(mean)
        return np.asarray(mean / length if length > 0 else np.full_like(mean, np.nan), dtype=np.float32)

    def save(self, folder: Path) -> None:
        """Write `text_similarity.safetensors` and `text_similarity.json`."""
        facts = {"ids": self.items.ids, "half_life": self.half_life}
        write_arrays(folder, "text_similarity", {"vectors": self.vectors}, facts)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `save` wrote."""
        arrays, facts = read_arrays(folder, "text_similarity")
        return cls(ItemIndex(facts["ids"]), arrays["vectors"], facts.get("half_life"))

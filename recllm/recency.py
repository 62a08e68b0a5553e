"""Recency: how much an event of a history counts by how many events ago it was, and the choice on validation."""

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PositiveFloat

from recllm.data import Query
from recllm.metrics import auc, ndcg
from recllm.ranking import ItemIndex, Scorer, batches, mask_seen, score_pairs, target_ranks
from recllm.recipes import Settings

NDCG_AT = 10


class RecencySettings(Settings):
    """`[recency]`: how fast the past fades, that of a history for the scorers that sum over it, and popularity."""

    half_lives: tuple[PositiveFloat, ...] = (1.0, 3.0, 10.0, 30.0)
    """In events, not in time: the choices beside "nothing fades", one for each scorer by NDCG@10 on validation, by AUC
    where pairs are judged; empty leaves all events of a history equal."""
    popularity_days: tuple[PositiveFloat, ...] = (3.0, 10.0, 30.0, 100.0, 300.0)
    """How fast popularity fades where the next item is ranked, in days before a row is asked: the choices beside
    "nothing fades", by NDCG@10 on validation; empty, or an event without a timestamp, leaves all equal."""
    as_of: bool = True
    """Whether popularity that fades counts only what was before a row is asked: at its own event's time, or where the
    data are cut in time at the cut. A bundle and the rows of a given split are asked at the end of the training events
    (where all but one of a thousand are over), and with false all rows are (next_item)."""
    drift: int = Field(32, ge=0)
    """Into how many stretches, each with as many events, the training time is cut for the sequence models, which learn
    what people turn to in each (next_item); 0, an event without a timestamp, or one time for all leaves time out."""
    queries: int = Field(5000, ge=1)
    """The most validation rows that choose."""


class Fading(Scorer, Protocol):
    """A scorer whose histories can fade."""

    half_life: float | None


def recency_weights(events: int, half_life: float | None) -> NDArray[np.float32]:
    """Weights of a history's events, float32[events], oldest first: 1 for the last, ½ at `half_life` events before."""
    if half_life is None:
        return np.ones(events, dtype=np.float32)
    ages = np.arange(events - 1, -1, -1, dtype=np.float32)
    return np.asarray(np.exp2(-ages / half_life), dtype=np.float32)


def ranking_figure(
    scorer: Scorer,
    queries: Sequence[Query],
    targets: NDArray[np.int64],
    index: ItemIndex,
    *,
    exclude_seen: bool = True,
) -> float:
    """NDCG@10 of the target columns, int64[queries], over the whole catalogue; a target that is left out is not found.

    `exclude_seen` leaves out what each history has.
    """
    found = []
    for place, part in batches(queries):
        scores = scorer.score(part, index)
        scores = mask_seen(scores, part, index) if exclude_seen else scores
        found.append(ndcg(target_ranks(scores, targets[place]), NDCG_AT))
    return float(np.concatenate(found).mean())


def pair_figure(scorer: Scorer, queries: Sequence[Query], items: Sequence[str], labels: NDArray[np.float64]) -> float:
    """AUC of the pairs of which the scorer knows something; −1 where these have one label."""
    scores = score_pairs(scorer, queries, items)
    known = ~np.isnan(scores)
    return float(np.nan_to_num(auc(labels[known], scores[known]), nan=-1.0))


def choose_half_life(
    scorer: Fading, half_lives: Iterable[float], figure: Callable[[Fading], float]
) -> dict[float | None, float]:
    """Set the scorer's `half_life` to the best of None and `half_lives` by `figure`; on a tie the earlier.

    Args:
        scorer: its `half_life` is changed.
        half_lives: in events.
        figure: how good the scorer is on validation, as `ranking_figure` and `pair_figure` say it.

    Returns:
        The figure of every choice.
    """
    figures: dict[float | None, float] = {}
    for half_life in (None, *half_lives):
        scorer.half_life = half_life
        figures[half_life] = figure(scorer)
    scorer.half_life = max(figures, key=figures.__getitem__)
    return figures

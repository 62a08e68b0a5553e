"""Fading: how fast histories fade for a scorer of a run, and popularity with the days, as its validation rows say."""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from recllm.data import Query
from recllm.priors import Popularity
from recllm.ranking import Scorer
from recllm.recency import Fading, choose_half_life, pair_figure, ranking_figure
from recllm.runs import Run
from recllm.splits import Example
from recllm.tasks import Task


def _rows_that_choose(run: Run, rows: Sequence[Example]) -> list[Example]:
    """The validation rows that choose half-lives."""
    if len(rows) <= run.recency.queries:
        return list(rows)
    order = np.random.default_rng(run.seed).permutation(len(rows))
    return [rows[place] for place in np.sort(order[: run.recency.queries])]


def ranks(run: Run, task: Task) -> Callable[[Scorer], float] | None:
    """How well a scorer ranks the validation rows that choose; None where there are none."""
    rows = [row for row in _rows_that_choose(run, task.split.valid) if row.item_id in task.index]
    queries, targets = [row.query for row in rows], task.index.rows(row.item_id for row in rows)
    found = partial(ranking_figure, queries=queries, targets=targets, index=task.index, exclude_seen=not task.repeats)
    return found if rows else None


def judges(run: Run, rows: Sequence[Example], asked: Callable[[Query], Query]) -> Callable[[Scorer], float] | None:
    """How well a scorer tells the labels of validation rows apart, by AUC; None where they have one label.

    Args:
        run: says how many rows choose.
        rows: with labels.
        asked: the query that the scorer is asked about in place of a row's own.
    """
    rows = _rows_that_choose(run, rows)
    labels = np.array([row.label for row in rows], dtype=np.float64)
    if len(np.unique(labels)) < 2:
        return None
    queries, items = [asked(row.query) for row in rows], [row.item_id for row in rows]
    return partial(pair_figure, queries=queries, items=items, labels=labels)


def fade(run: Run, scorer: Fading, figure: Callable[[Scorer], float] | None) -> dict[float | None, float]:
    """Choose how fast histories fade for a scorer: what every choice was worth; nothing where there is no choice."""
    if figure is None or not run.recency.half_lives:
        return {}
    return choose_half_life(scorer, run.recency.half_lives, figure)


def faded_popularity(run: Run, task: Task) -> tuple[Popularity, dict[float | None, float]]:
    """Popularity that fades as ranks best, and what every choice was worth, in days; nothing where there is no choice.

    Where pairs are judged nothing fades: it made no difference to their fusion (LOG.md).
    """
    train, figure = task.split.train, ranks(run, task) if run.model.task == "next_item" else None
    days: tuple[float | None, ...] = (None, *run.recency.popularity_days)
    if figure is None or len(days) == 1 or train.frame["timestamp"].null_count():
        return Popularity.fit(train, task.index.ids), {}
    figures: dict[float | None, float] = {}
    best = None
    timed = Popularity.fit(train, task.index.ids, half_life_days=days[-1], as_of=True) if run.recency.as_of else None
    for own in days:
        if own is None or timed is None:
            popularity = Popularity.fit(train, task.index.ids, half_life_days=own)
        else:
            popularity = timed.fading(own)
        found = figure(popularity)
        if best is None or found > max(figures.values()):  # on a tie the earlier, as for histories
            best = popularity
        figures[own] = found
    assert best is not None
    return best, figures

"""Splits of interactions into train, validation and test: leave-last-out, temporal, cold items."""

from dataclasses import dataclass, replace

import numpy as np
import polars as pl

from recllm.data import Interactions, Query
from recllm.errors import RecllmError

LIKE_AT = 4.0
MIN_EVENTS = 4


@dataclass(frozen=True)
class Example:
    """One event to predict."""

    query: Query
    item_id: str
    label: float | None = None
    """1.0 liked, 0.0 not, by the rating threshold; None without a rating."""


@dataclass(frozen=True, eq=False)
class Split:
    """What is learnt from, and what is predicted."""

    name: str
    train: Interactions
    valid: list[Example]
    test: list[Example]
    cold_items: frozenset[str] = frozenset()
    cuts: tuple[int, int] | None = None
    """First second of validation and of test in a temporal split."""
    train_rows: list[Example] | None = None
    """The train rows of a given split, each with a history of its own; None where they are made from `train`."""
    given_back: int = 0
    """The most events of each cold item in train."""


def leave_last_out(interactions: Interactions, min_events: int = MIN_EVENTS, like_at: float = LIKE_AT) -> Split:
    """Each user's last event is test, the last but one validation; the test history includes the validation event.

    Users with fewer than `min_events` events are learnt from only. With ratings of 0 and 1 alone `like_at` does not
    count: 1 is liked.

    Raises:
        RecllmError: `min_events` below 3 (a history would be empty), or no user has so many events.
    """
    if min_events < 3:
        raise RecllmError(f"min_events is {min_events}; leave-last-out needs at least 3: history, validation, test.")
    frame = _labelled(interactions, like_at).with_columns(
        _place=pl.int_range(pl.len()).over("user_id"), _events=pl.len().over("user_id")
    )
    asked = pl.col("_events") >= min_events
    left = pl.col("_events") - pl.col("_place")  # 1: last, 2: last but one
    test = frame.filter(asked & (left == 1))
    if test.is_empty():
        raise RecllmError(
            f"No user has {min_events} events, so there is nothing to test on. Bring users with more events"
            f"{', or lower data.min_events to 3' if min_events > 3 else ''}."
        )
    return Split(
        "leave-last-out",
        _subset(interactions, frame.select(~(asked & (left <= 2))).to_series()),
        _examples(frame.filter(asked & (left == 2)), interactions),
        _examples(test, interactions),
    )


def temporal(
    interactions: Interactions,
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1),
    like_at: float = LIKE_AT,
) -> Split:
    """Cut all events at two moments, the same for every user.

    Events before the first cut are learnt from, those from it on validation, those from the second on test; events of
    one second stand on one side. A history is what the user did before the example's own cut, so no event of the
    evaluated stretch is seen in any form; it is empty for a user who was not there before.

    Args:
        interactions: needs a time stamp for every event.
        fractions: shares of train, validation and test; they add up to 1.
        like_at: a rating of at least this is liked.

    Raises:
        RecllmError: an event without time stamp, wrong fractions, or a part that would be empty.
    """
    if interactions.frame["timestamp"].null_count():
        raise RecllmError(
            "A temporal split needs a time stamp for every event; use leave-last-out, which needs order only."
        )
    if min(fractions) <= 0 or abs(sum(fractions) - 1.0) > 1e-6:
        raise RecllmError(f"fractions are {fractions}; three positive numbers that add up to 1 are expected.")
    times = interactions.frame["timestamp"].sort()
    # Rounded, for .7 + .1 is less than .8.
    shares = (fractions[0], fractions[0] + fractions[1])
    first, second = (times[min(int(round(len(times) * share, 6)), len(times) - 1)] for share in shares)
    if not times[0] < first < second:
        raise RecllmError(
            f"{len(times):,} events cannot be cut into the shares {fractions}: too many share one second, or they "
            f"are too few. Take data.split = leave-last-out."
        )
    frame = _labelled(interactions, like_at)
    parts = [
        _since(frame.filter((pl.col("timestamp") >= start) & (pl.col("timestamp") < end)), interactions, start)
        for start, end in ((first, second), (second, times[-1] + 1))
    ]
    train = _subset(interactions, interactions.frame["timestamp"] < first)
    return Split("temporal", train, parts[0], parts[1], cuts=(first, second))


def cold_items(
    interactions: Interactions,
    share: float = 0.1,
    seed: int = 0,
    min_events: int = MIN_EVENTS,
    like_at: float = LIKE_AT,
    given_back: int = 0,
) -> Split:
    """Hold a sample of items back: their events are test, and nothing is learnt of them.

    A test history is what the user did with the other (warm) items before. Validation is the last warm event of each
    user with at least `min_events` warm ones.

    With `given_back` the first so many events of every held-out item (by time, else in the order of the table) are
    learnt from, as on an item's first day, and the others are test; an item with no more events has no test row.

    Args:
        interactions: what is split.
        share: how many of the items become cold, between 0 and 1; at least one.
        seed: of the sample, which depends on the set of item ids only.
        min_events: fewest warm events of a user in validation.
        like_at: a rating of at least this is liked.
        given_back: how many events of each held-out item are learnt from.

    Raises:
        RecllmError: `share` is not between 0 and 1, `min_events` below 2, or no item or no event would be left.
    """
    if not 0.0 < share < 1.0:
        raise RecllmError(f"share is {share}; a number between 0 and 1 is expected.")
    if min_events < 2:
        raise RecllmError(f"min_events is {min_events}; a validation event needs a history, so at least 2.")
    items = np.array(sorted(interactions.item_counts()))
    count = max(1, round(share * len(items)))
    if count >= len(items):
        raise RecllmError(f"{count} of {len(items)} items would be cold and none left to learn from; lower share.")
    chosen = np.random.default_rng(seed).choice(len(items), size=count, replace=False)
    cold = frozenset(items[chosen].tolist())
    is_cold = interactions.frame["item_id"].is_in(list(cold))
    warm = _subset(interactions, ~is_cold)
    last = warm.frame.select(
        (pl.len().over("user_id") >= min_events) & (pl.int_range(pl.len(), 0, -1).over("user_id") == 1)
    ).to_series()
    # For an event, how many warm ones of the user stand before it: where its history ends.
    frame = _labelled(interactions, like_at).with_columns(_warm=(~is_cold).cast(pl.Int64))
    frame = frame.with_columns(_place=pl.col("_warm").cum_sum().over("user_id") - pl.col("_warm"))
    valid = frame.filter(~is_cold).filter(last)
    early = is_cold & _among_first(interactions, given_back)
    learnt = early.to_numpy().copy()
    learnt[~is_cold.to_numpy()] = ~last.to_numpy()
    known = frame.filter(early).select("user_id", "item_id")  # a user who returns to an item is no test of it
    return Split(
        "cold-items",
        _subset(interactions, pl.Series(learnt)),
        _examples(valid, warm),
        _examples(frame.filter(is_cold & ~early).join(known, on=["user_id", "item_id"], how="anti"), warm),
        cold_items=cold,
        given_back=given_back,
    )


def _among_first(interactions: Interactions, count: int) -> pl.Series:
    """Which events are among the first `count` of their item, by time where all have one, else in table order."""
    frame = interactions.frame.with_row_index("_row")
    by_time = frame if frame["timestamp"].null_count() else frame.sort("timestamp", maintain_order=True)
    places = by_time.with_columns(_first=pl.int_range(pl.len()).over("item_id") < count)
    return places.sort("_row")["_first"]


def sampled(examples: list[Example], most: int, seed: int) -> list[Example]:
    """At most so many of the rows, drawn by the seed, in their order."""
    if len(examples) <= most:
        return examples
    chosen = np.sort(np.random.default_rng(seed).permutation(len(examples))[:most])
    return [examples[place] for place in chosen]


def check_no_leak(split: Split) -> None:
    """Prove that nothing of validation and test is in train.

    An event counts as leaked when train holds the user's item more often than the example's history does: a history
    is what may be known, also where a user returns to an item.

    Raises:
        RecllmError: names the user and the item of a leaked event, of an event at or after the first cut of a temporal
            split, or the cold item in train or in a history.
    """
    pairs = split.train.frame.group_by("user_id", "item_id").len()
    for part, examples in (("validation", split.valid), ("test", split.test)):
        _check_examples(part, examples, pairs)
    if split.cuts is not None:
        late = split.train.frame.filter(pl.col("timestamp") >= split.cuts[0])
        for user, item, at in late.select("user_id", "item_id", "timestamp").head(1).iter_rows():
            raise RecllmError(
                f"Leak: train holds user '{user}' with item '{item}' at {at}, not before the cut at {split.cuts[0]}."
            )
    _check_cold(split)


def _check_examples(part: str, examples: list[Example], pairs: pl.DataFrame) -> None:
    asked = pl.DataFrame(
        {
            "user_id": [example.query.user_id for example in examples],
            "item_id": [example.item_id for example in examples],
        },
        schema={"user_id": pl.String, "item_id": pl.String},
    ).with_row_index("row")
    for row, user, item, times in asked.join(pairs, on=["user_id", "item_id"]).sort("row").iter_rows():
        if times > examples[row].query.history.count(item):
            raise RecllmError(f"Leak: the {part} event of user '{user}' with item '{item}' is in train.")


def _check_cold(split: Split) -> None:
    cold = split.cold_items
    learnt = split.train.frame.filter(pl.col("item_id").is_in(list(cold)))
    more = learnt.filter(pl.int_range(pl.len()).over("item_id") >= split.given_back)
    for user, item in more.select("user_id", "item_id").head(1).iter_rows():
        raise RecllmError(f"Leak: the cold item '{item}' is in train (user '{user}').")
    for example in (*split.valid, *split.test) if cold else ():
        for item in cold.intersection(example.query.history):
            raise RecllmError(f"Leak: the cold item '{item}' is in a history (user '{example.query.user_id}').")


def _subset(interactions: Interactions, kept: pl.Series) -> Interactions:
    return Interactions(interactions.frame.filter(kept))


def like_threshold(interactions: Interactions, like_at: float = LIKE_AT) -> float:
    """The rating from which an event counts as liked: 1 where all ratings are 0 or 1, else `like_at`."""
    rating = interactions.frame["rating"].drop_nulls()
    return 1.0 if rating.is_in([0.0, 1.0]).all() else like_at


def liked_part(query: Query, threshold: float) -> Query:
    """The query with what its history has no rating of, or one from `threshold` on."""
    if query.ratings is None:
        return query
    places = [place for place, rating in enumerate(query.ratings) if rating is None or rating >= threshold]
    ratings = tuple(query.ratings[place] for place in places)
    return replace(query, history=tuple(query.history[place] for place in places), ratings=ratings)


def liked_events(interactions: Interactions, like_at: float = LIKE_AT) -> Interactions:
    """The events that are liked or have no rating."""
    rating = pl.col("rating")
    return _subset(
        interactions,
        interactions.frame.select(rating.is_null() | (rating >= like_threshold(interactions, like_at))).to_series(),
    )


def _labelled(interactions: Interactions, like_at: float) -> pl.DataFrame:
    """The frame with `_label`: 1.0, 0.0, or null without a rating."""
    liked = pl.col("rating") >= like_threshold(interactions, like_at)
    return interactions.frame.with_columns(_label=liked.cast(pl.Float64))


def _since(frame: pl.DataFrame, interactions: Interactions, start: int) -> list[Example]:
    """Examples of one stretch by time; a user's share one query, what was before `start`, when they are asked."""
    known = _subset(interactions, interactions.frame["timestamp"] < start).histories()
    known = {user: replace(query, at=start) for user, query in known.items()}
    rows = frame.sort("timestamp", maintain_order=True).select("user_id", "item_id", "_label")
    return [Example(known.get(user, Query((), user, at=start)), item, label) for user, item, label in rows.iter_rows()]


def _examples(frame: pl.DataFrame, interactions: Interactions) -> list[Example]:
    """Examples whose history is the user's first `_place` events in `interactions`, asked about when they happen."""
    known = interactions.histories()
    examples = []
    for user, item, label, place, at in frame.select("user_id", "item_id", "_label", "_place", "timestamp").iter_rows():
        whole = known.get(user, Query((), user))
        ratings = None if whole.ratings is None else whole.ratings[:place]
        examples.append(Example(Query(whole.history[:place], user, ratings, at), item, label))
    return examples

"""Splits of interactions into train, validation and test: leave-last-out, temporal, cold items."""

from dataclasses import dataclass

from recllm.data import Interactions, Query


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

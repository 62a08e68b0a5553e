"""Interactions and item catalog: read from files, normalised, checked; the query that is asked of them."""

from recllm.data.checks import CheckReport, Finding
from recllm.data.read import read_dataset, read_interactions, read_items
from recllm.data.sets import Catalog, Dataset, Interactions, Query

__all__ = [
    "Catalog",
    "CheckReport",
    "Dataset",
    "Finding",
    "Interactions",
    "Query",
    "read_dataset",
    "read_interactions",
    "read_items",
]

"""Scorers of a bundle that come to know new items: by their own text, and by what the items like them tell."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recllm.data import Catalog
from recllm.expectation import ExpectedPopularity
from recllm.graphscorer import TableScorer
from recllm.likeness import likeness_to
from recllm.neighbours import Neighbours
from recllm.priors import Popularity, TextSimilarity
from recllm.ranking import ItemIndex, VectorScorer


def knowing(
    scorers: Mapping[str, VectorScorer], catalog: Catalog, text: NDArray[np.float32], graphs: Mapping[str, Any]
) -> dict[str, VectorScorer]:
    """The scorers with new items at the catalogue's end; one that reads neither text nor likeness stays as it is.

    Args:
        scorers: of a bundle.
        catalog: with the new items at its end.
        text: standardised text vectors of the new items, float32[items, width]; NaN rows for those without text.
        graphs: by sequence scorer, the session of the graph that makes item vectors.
    """
    grown = {name: _grown(scorer, catalog, text, graphs.get(name)) for name, scorer in scorers.items()}
    similar = grown.get("text")
    if not isinstance(similar, TextSimilarity):
        return grown
    return _told(grown, catalog, similar.vectors, len(text), graphs)


def _grown(scorer: VectorScorer, catalog: Catalog, text: NDArray[np.float32], graph: Any) -> VectorScorer:  # noqa: ANN401
    """A scorer that knows the new items at the catalogue's end by their text; one that reads none stays as it is."""
    index = ItemIndex(catalog.ids)
    if isinstance(scorer, Popularity):
        # Nobody has chosen them; of what has no text nothing at all is known, and it is never recommended.
        return scorer.grown(index, np.where(np.isnan(text[:, 0]), np.float32(np.nan), np.float32(0.0)))
    if isinstance(scorer, TextSimilarity):
        return TextSimilarity(index, np.concatenate([scorer.vectors, text]), scorer.half_life)
    if not isinstance(scorer, TableScorer):
        return scorer
    factors = np.full((len(text), graph.get_inputs()[1].shape[1]), np.nan, dtype=np.float32)
    tokens, heads = graph.run(None, {"text": text, "factors": factors})
    return scorer.grown(index, tokens, np.where(np.isnan(text[:, :1]), np.float32(np.nan), heads))


def _told(
    scorers: Mapping[str, VectorScorer],
    catalog: Catalog,
    text: NDArray[np.float32],
    count: int,
    graphs: Mapping[str, Any],
) -> dict[str, VectorScorer]:
    """The scorers with what the items that are like the last `count` ones tell of these.

    Args:
        scorers: that know the new items by their own text alone.
        catalog: with the new items at its end.
        text: text vectors of all items, float32[items, width].
        count: of new items.
        graphs: by sequence scorer, that of its items.
    """
    result = dict(scorers)
    if isinstance(alike := result.get("neighbours"), Neighbours):
        result["neighbours"] = alike = alike.grown(catalog, text)
        result |= {name: _borrowing(scorer, alike) for name, scorer in result.items()}
    index, first = ItemIndex(catalog.ids), len(catalog) - count
    near: NDArray[np.float64] | None = None
    for name, scorer in result.items():
        if not isinstance(scorer, TableScorer | ExpectedPopularity) or scorer.told is None:
            continue
        if near is None:  # a run has learnt from the same items in all of them
            near = likeness_to(catalog, text, scorer.told.rows, range(first, len(catalog)))
        if isinstance(scorer, ExpectedPopularity):
            result[name] = scorer.grown(index, near)
        else:
            result[name] = scorer.ranked_by(_told_items(scorer, near, graphs[name]))
    return result


def _told_items(scorer: TableScorer, near: NDArray[np.float64], graph: Any) -> NDArray[np.float32]:  # noqa: ANN401
    """Heads and bias of the last items by their likeness to others, float32[items, head + 1]; NaN for all others."""
    assert scorer.told is not None
    items = np.full_like(scorer.items, np.nan)
    items[len(items) - len(near) :] = scorer.told.of(
        near, lambda text, factors: graph.run(["heads"], {"text": text, "factors": factors})[0]
    )
    return items


def _borrowing(scorer: VectorScorer, alike: Neighbours) -> VectorScorer:
    """A sequence scorer whose new items take the mean head and bias of their neighbours, where nothing else is told."""
    if not isinstance(scorer, TableScorer) or scorer.told is not None:
        return scorer
    return scorer.ranked_by(alike.means(scorer.items, np.where(alike.known, -1, np.arange(len(alike.known)))))

"""A sequence graph as a scorer: grown by new items, and ranked by other heads."""

from dataclasses import replace

import numpy as np
import pytest

import recllm
from recllm.data import Query
from recllm.graphscorer import TableScorer
from recllm.ranking import ItemIndex


@pytest.fixture(scope="module")
def bundle(tiny_bundle):
    return recllm.load(tiny_bundle)


def test_other_heads_are_taken_where_they_are_told(bundle):
    scorer, queries = bundle.scorers["light"], [Query(("2", "4")), Query(("1",))]
    told = np.full_like(scorer.items, np.nan)
    told[3] = scorer.items[7]
    before, after = scorer.score(queries, bundle.index), scorer.ranked_by(told).score(queries, bundle.index)
    assert after[:, 3] == pytest.approx(before[:, 7])
    assert np.delete(after, 3, axis=1) == pytest.approx(np.delete(before, 3, axis=1))
    assert scorer.items[3] != pytest.approx(told[3])  # and the scorer itself stays as it was


def test_a_text_history_passes_over_new_items_and_scores_them(bundle):
    scorer = bundle.scorers["lm"]
    texts = tuple((len(scorer.history.vocabulary) + row,) for row in range(len(bundle.index)))
    history = replace(scorer.history, texts=texts)
    text = TableScorer(
        scorer.graph, scorer.table, history, scorer.index, scorer.items[:, :-1], scorer.items[:, -1], 0.0
    )
    index = ItemIndex([*bundle.index.ids, "new"])
    width = scorer.table.shape[1], scorer.items.shape[1] - 1
    grown = text.grown(index, np.ones((1, width[0]), np.float32), np.ones((1, width[1]), np.float32))
    found = grown.score([Query(("2", "4")), Query(("2", "new", "4")), Query(("new",))], index)
    assert np.isfinite(found[0]).all()
    assert found[1] == pytest.approx(found[0])
    assert np.isnan(found[2]).all()
    assert found[0, :-1] == pytest.approx(scorer.score([Query(("2", "4"))], bundle.index)[0], abs=1e-5)

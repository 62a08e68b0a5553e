"""Scoring: which validation rows the weights of new items are fitted on."""

from types import SimpleNamespace

import numpy as np

from recllm import scoring
from recllm.weighing import FusionSettings


def test_new_items_are_fitted_on_so_many_rows_and_no_more_than_memory_has_room_for(monkeypatch):
    run = SimpleNamespace(fusion=FusionSettings(new_queries=30, queries=7, choosing=5), seed=0)
    rows = scoring._some_rows(100, 50, run)
    assert len(rows) == len(set(rows.tolist())) == 30
    assert np.array_equal(rows, np.sort(rows))
    assert rows.max() < 100
    assert len(scoring._some_rows(20, 50, run)) == 20
    monkeypatch.setattr(scoring, "NEW_ITEM_SCORES", 500)
    assert len(scoring._some_rows(100, 50, run)) == 10

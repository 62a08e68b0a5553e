"""Items that are chosen again: nothing seen is left out, neither in training, nor when measured, nor when served."""

import polars as pl
import pytest

from recllm.collaborative import load_collaborative
from recllm.export import export_run
from recllm.outcome import FUSION, evaluate_run
from recllm.runs import Run
from recllm.runtime import load
from recllm.scoring import known_scores
from recllm.train import train_run

USERS, OWN, GROUPS, EVENTS = 32, 6, 4, 15


@pytest.fixture(scope="module")
def again(tmp_path_factory, tiny_encoder_folder):
    """A trained run over a log in which every user goes round six items of 24, and its bundle."""
    place = tmp_path_factory.mktemp("again")
    rows = [
        {
            "user_id": f"u{user}",
            "item_id": str(user % GROUPS * OWN + (user // GROUPS + event) % OWN),
            "timestamp": event,
        }
        for user in range(USERS)
        for event in range(EVENTS)
    ]
    pl.DataFrame(rows).write_csv(place / "interactions.csv")
    items = [{"item_id": str(item), "title": f"Red film {item} (Drama)"} for item in range(OWN * GROUPS)]
    pl.DataFrame(items).write_csv(place / "items.csv")
    values = {
        "name": "again",
        "output": str(place / "runs"),
        "data": {"name": str(place), "duplicates": "keep"},
        "model": {"name": "none", "item_encoder": str(tiny_encoder_folder), "max_history": 12, "head_width": 16},
        "light": {
            "width": 16,
            "layers": 1,
            "heads": 2,
            "num_train_epochs": 12,
            "learning_rate": 1e-2,
            "max_history": 12,
        },
        "cf": {"factors": 4, "iterations": 3},
        "export": {"recipes": ["fp32"], "gate_queries": 8},
    }
    run = Run.model_validate(values)
    task = train_run(run, say=lambda _: None)
    return run, task, export_run(run, task, say=lambda _: None)[0].folder


def test_what_was_chosen_before_is_ranked_found_and_served(again):
    run, task, folder = again
    scores = known_scores(run, task, load_collaborative(run, task), lambda _: None)["test"]
    assert evaluate_run(run, task, scores).interval(FUSION, "NDCG@10")[0] > 0.9
    bundle = load(folder)
    assert not bundle.exclude_seen
    history = [str((event + 1) % OWN) for event in range(9)]
    assert bundle.recommend([history], k=1).ids == [[str(10 % OWN)]]
    assert not set(bundle.recommend([history], k=10, exclude_seen=True).ids[0]) & set(history)

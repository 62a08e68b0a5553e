"""Tracking: unknown or missing trackers are refused early, and every stage has a W&B run of its own."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest

from recllm.errors import RecllmError
from recllm.tracking import check_trackers, own_wandb_run
from recllm.trainerkeys import check_trainer_keys


def test_trackers_are_refused_before_anything_is_trained():
    check_trackers("none")
    check_trackers(["tensorboard"])
    with pytest.raises(RecllmError, match=r"tracker in train.report_to.*'tensorbord'.*Did you mean 'tensorboard'"):
        check_trainer_keys({"report_to": "tensorbord"})
    with pytest.raises(RecllmError, match=r"'dvclive' needs the package dvclive.*pip install dvclive"):
        check_trainer_keys({"report_to": ["tensorboard", "dvclive"]})


@pytest.fixture
def wandb(monkeypatch):
    """A module that has what is asked of W&B: a run, and an end to it."""
    module = ModuleType("wandb")
    module.__spec__ = ModuleSpec("wandb", None)
    module.run, module.ended = None, []

    def finish():
        module.ended.append(module.run)
        module.run = None

    module.finish = finish
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_a_stage_ends_the_run_that_it_began(wandb):
    for stage in ("light", "lm"):
        with own_wandb_run(["wandb"]):
            assert wandb.run is None
            wandb.run = stage
    assert wandb.ended == ["light", "lm"]

    def killed():
        with own_wandb_run("wandb"):
            wandb.run = "third"
            raise ValueError("killed")

    with pytest.raises(ValueError, match="killed"):
        killed()
    assert wandb.ended == ["light", "lm", "third"]


def test_a_run_of_somebody_else_stays_open(wandb):
    wandb.run = "theirs"
    with own_wandb_run("all"):
        pass
    with own_wandb_run("none"):
        wandb.run = "not asked for"
    assert wandb.ended == []

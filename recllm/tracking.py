"""Tracking: where Trainer reports to besides our metrics file, each stage of a run in a place of its own."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from recllm.devices import process_state
from recllm.errors import RecllmError, require, unknown

PACKAGES = {"azure_ml": "azureml", "flyte": "flytekit", "tensorboard": "torch"}
"""Of the trackers that are not named as their package is."""
ANY = ("none", "all")


def trackers(report_to: Any) -> list[str]:  # noqa: ANN401  a name or several, as Trainer takes them
    """The names in `train.report_to`; of `all` those that are installed."""
    names = [report_to] if isinstance(report_to, str) else list(report_to)
    return get_available_reporting_integrations() if "all" in names else names


def check_trackers(report_to: Any) -> None:  # noqa: ANN401
    """Refuse trackers that are unknown or not installed, before anything is trained.

    Raises:
        RecllmError: with the nearest name, or what to install.
    """
    if not isinstance(report_to, str | list) or not all(isinstance(name, str) for name in report_to):
        raise RecllmError(f"train.report_to = {report_to!r}: a name or a list of names is expected.")
    for name in trackers(report_to):
        if name not in ANY and name not in INTEGRATION_TO_CALLBACK:
            raise unknown("tracker in train.report_to", name, [*INTEGRATION_TO_CALLBACK, *ANY])
        package = PACKAGES.get(name, name)
        if name not in ANY and find_spec(package) is None:
            raise RecllmError(
                f"train.report_to = '{name}' needs the package {package}, which is not installed: pip install {package}"
            )


def own_tensorboard(options: dict[str, Any], folder: Path) -> list[TrainerCallback]:
    """TensorBoard's callback where `report_to` names it, out of the way of the checkpoints, which are deleted."""
    asked = trackers(options["report_to"])
    if "tensorboard" not in asked:
        return []
    options["report_to"] = [name for name in asked if name != "tensorboard"] or "none"
    if not process_state().is_main_process:
        return []
    board = require("torch.utils.tensorboard", "train", "train.report_to = 'tensorboard'")
    return [TensorBoardCallback(board.SummaryWriter(log_dir=str(folder)))]


@contextmanager
def own_wandb_run(report_to: Any) -> Iterator[None]:  # noqa: ANN401
    """End the W&B run that a stage has begun: the next stage would go on in it, with steps from 1 again.

    A run that somebody had begun before is left open.
    """
    if "wandb" not in trackers(report_to) or find_spec("wandb") is None:
        yield
        return
    wandb = importlib.import_module("wandb")
    before = wandb.run
    try:
        yield
    finally:
        if before is None and wandb.run is not None:
            wandb.finish()

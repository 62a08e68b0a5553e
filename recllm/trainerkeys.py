"""Trainer's keys in `[train]`: what is refused and why, tried before anything is read, encoded or trained."""

import math
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames
from transformers.utils.logging import get_log_levels_dict

from recllm.devices import check_precision, on_cpu, precision_keys, sharded
from recllm.errors import RecllmError, unknown
from recllm.runs import Run
from recllm.tracking import check_trackers
from recllm.trainernames import check_names

MEASURES = {"next_item": ("ndcg@10", "hit_rate@10"), "relevance": ("auc",)}
"""By task what validation measures while training, the first of them by default to choose the best step."""
COMPILING = ("torch_compile", "torch_compile_backend", "torch_compile_mode")
"""Trainer's keys that ask for compiled layers."""
RECOMPUTING = ("gradient_checkpointing", "activation_checkpointing")
"""Trainer's keys that ask for activations to be computed twice, with `_kwargs` beside each."""
COUNTS = {
    "gradient_accumulation_steps": "so many batches make a step",
    "per_device_eval_batch_size": "so many rows are validated at once",
    "eval_accumulation_steps": "so many batches of a validation are moved off the device at once",
}
"""Keys of Trainer that are counts, and of what."""
APART = (
    "train.eval_steps = {} and train.save_steps = {}: the best validation would have no checkpoint to go back to. Give "
    "one of them, and the other one follows."
)


def check_trainer_keys(keys: dict[str, Any]) -> None:
    """Refuse keys of `[train]` that are not Trainer's, before any model loads.

    Raises:
        RecllmError: an unknown key, with the nearest right one, or a tracker that is not there.
    """
    check_names(keys, TrainingArguments.__dataclass_fields__)
    _check_values(keys)
    check_trackers(keys.get("report_to", "none"))


def _check_values(keys: dict[str, Any]) -> None:
    schedule = str(keys.get("lr_scheduler_type", "cosine")).lower()
    if "plateau" in schedule or "greedy" in schedule:
        raise RecllmError(
            f"train.lr_scheduler_type = '{keys['lr_scheduler_type']}' is not supported: its rates hang on losses, and "
            "a training that goes back to a checkpoint at half the rate could not go on so. Take 'cosine' or 'linear'."
        )
    for key, known in (("lr_scheduler_type", SchedulerType), ("optim", OptimizerNames)):
        names = [str(name.value) for name in known]
        if key in keys and str(keys[key]) not in names:
            raise unknown(f"train.{key}", str(keys[key]), names)
    for key in (key for key in ("log_level", "log_level_replica") if key in keys):
        if keys[key] not in (levels := [*get_log_levels_dict(), "passive"]):
            raise unknown(f"train.{key}", str(keys[key]), levels)
    _check_numbers(keys)
    if keys.get("eval_do_concat_batches") is False:
        raise RecllmError("train.eval_do_concat_batches = false: the metrics are of all rows together. Leave it out.")
    if keys.get("train_sampling_strategy", "random") not in ("random", "sequential"):
        raise RecllmError(
            "train.train_sampling_strategy is not supported: rows come in the order of the seed, those of like length "
            "together, so that a resumed training reads the same ones. Leave it out."
        )
    asked = keys.get("eval_steps"), keys.get("save_steps")
    if None not in asked and asked[0] != asked[1]:
        raise RecllmError(APART.format(*asked))


def check_options(run: Run) -> None:
    """Check everything that `[train]` says, before anything is read, encoded or trained.

    Raises:
        RecllmError: as `check_trainer_keys`, `try_trainer_keys` and `check_precision`.
    """
    keys = run.train.trainer_keys()
    check_trainer_keys(keys)
    if (
        sharded()
    ):  # `sharded.check_shardable` tells more of the precision, and the plugin is to be made once, by Trainer
        return
    keys = precision_keys(run.train.precision) | keys
    check_precision(keys)
    if run.model.name != "none":
        rate = {"learning_rate": run.train.head_learning_rate}
        try_trainer_keys(rate | keys, MEASURES[run.model.task], run.train.early_stopping_patience)


def _check_numbers(keys: dict[str, Any]) -> None:
    for key, what in COUNTS.items():
        if key in keys and (type(keys[key]) is not int or keys[key] < 1):
            raise RecllmError(f"train.{key} = {keys[key]!r}: a whole number of at least 1 is expected, {what}.")
    for key in ("eval_steps", "save_steps", "logging_steps"):
        if key in keys and (not _is_number(keys[key]) or keys[key] <= 0):
            raise RecllmError(f"train.{key} = {keys[key]!r}: so many steps are expected, or a share of all below 1.")
    for key in ("weight_decay", "max_grad_norm", "eval_delay"):
        if key in keys and (not _is_number(keys[key]) or keys[key] < 0):
            raise RecllmError(f"train.{key} = {keys[key]!r}: a number of at least 0 is expected.")


def _is_number(value: Any) -> bool:  # noqa: ANN401  what a run file holds
    whole = isinstance(value, int) and not isinstance(value, bool)
    return whole or (isinstance(value, float) and math.isfinite(value))


def try_trainer_keys(keys: dict[str, Any], measures: Sequence[str], patience: int | None) -> None:
    """Make what Trainer makes of the keys of `[train]`, an optimizer and a schedule too, on one number.

    A mistake that Trainer finds is told before the catalogue is encoded, and not when the language model's turn comes.

    Args:
        keys: `trainer_keys`, with those of the precision and the highest rate.
        measures: what validation measures.
        patience: `train.early_stopping_patience`.

    Raises:
        RecllmError: Trainer, the optimizer or the schedule refuses a key, or there would be no best step.
    """
    check_best(keys, measures, patience)
    left_out = {*COMPILING, "report_to", *RECOMPUTING, *(f"{key}_kwargs" for key in RECOMPUTING)}
    with tempfile.TemporaryDirectory() as folder:
        every = keys.get("save_steps", 1)
        options = {"output_dir": folder, "use_cpu": on_cpu(), "report_to": "none", "eval_steps": every}
        # As `Stage.options` has them: what a run file spells out of it is no mistake.
        options |= {"eval_strategy": "steps", "save_strategy": "steps", "load_best_model_at_end": True}
        options |= {"lr_scheduler_type": "cosine", "metric_for_best_model": f"eval_{measures[0]}"}
        options |= {key: value for key, value in keys.items() if key not in left_out}
        arguments = training_arguments({"save_steps": options["eval_steps"]} | options)
    try:
        kind, own = Trainer.get_optimizer_cls_and_kwargs(arguments)
        one = torch.nn.Parameter(torch.zeros(1))
        optimizer = kind([{"params": [one], "weight_decay": arguments.weight_decay}], **own)
        get_scheduler(
            arguments.lr_scheduler_type,
            optimizer,
            num_warmup_steps=1,
            num_training_steps=10,
            scheduler_specific_kwargs=arguments.lr_scheduler_kwargs,
        )
    except Exception as error:  # libraries of optimizers raise many kinds
        raise RecllmError(f"Trainer refuses the optimizer or schedule of [train]: {error}") from error


def check_best(keys: dict[str, Any], measures: Sequence[str], patience: int | None) -> None:
    """Refuse keys by which there is no best step to end with.

    Args:
        keys: Trainer's keys.
        measures: what validation measures; the best step is by the first one if not said otherwise.
        patience: stop after so many validations without a better one.

    Raises:
        RecllmError: the best by what is not measured, or validations that are no checkpoints.
    """
    best = str(keys.get("metric_for_best_model", measures[0])).removeprefix("eval_")
    if best not in (known := [*measures, "loss"]):
        raise unknown("train.metric_for_best_model", best, known)
    asked = {key: str(keys.get(key, "steps")) for key in ("eval_strategy", "save_strategy")}
    for key in (key for key, value in asked.items() if value == "epoch"):
        raise RecllmError(
            f"train.{key} = 'epoch' is not supported: the passes are one sequence here, which ends once. Give "
            "train.eval_steps, below 1 as a share of all steps."
        )
    never = [key for key, value in asked.items() if value == "no"]
    if never and (patience or keys.get("load_best_model_at_end", True)):
        raise RecllmError(
            f"train.{never[0]} = 'no' leaves no validation and checkpoint to end with the best of. Leave it out, "
            "or take the last step: train.load_best_model_at_end = false, and no train.early_stopping_patience."
        )


def training_arguments(options: dict[str, Any]) -> TrainingArguments:
    """Trainer's arguments.

    Raises:
        RecllmError: Trainer refuses them.
    """
    try:
        return TrainingArguments(**options)
    except (ValueError, TypeError, ImportError) as error:
        raise RecllmError(f"Trainer refuses the keys in [train]: {error}") from error

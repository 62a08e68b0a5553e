"""Recovery: what training changes by itself to go on, half the learning rate once, or smaller micro-batches."""

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from accelerate.utils.memory import should_reduce_batch_size
from torch import nn
from transformers import TrainerState, TrainingArguments
from transformers.utils import logging as hf_logging

from recllm.checkpoints import last_checkpoint, trained_values
from recllm.devices import free_memory, process_state
from recllm.errors import RecllmError, out_of_memory
from recllm.files import read_json, write_json
from recllm.sharded import put
from recllm.watching import NonFiniteLossError

ADJUSTED = "adjusted.json"
"""In the folder of a stage's checkpoints: what training has changed by itself."""
LIGHT = "light"
"""The light scorer's stage, which has keys of its own."""
LESS = "shorter histories (light.max_history) or a smaller light.width"
"""What the light scorer needs less memory with."""


@dataclass(frozen=True)
class Adjusted:
    """What training has changed by itself to go on.

    Attributes:
        rate: the learning rates are multiplied by it.
        parts: micro-batches into which a batch of one device is divided.
        valid_parts: into how many more a batch of the validation is.
    """

    rate: float = 1.0
    parts: int = 1
    valid_parts: int = 1


UNCHANGED = Adjusted()
"""Before anything went wrong."""


class Attempt(Protocol):
    """What is asked of a trainer."""

    state: TrainerState
    args: TrainingArguments
    is_fsdp_enabled: bool
    validating: bool
    """Whether it is validating, or was when it failed."""

    def ended(self, checkpoint: str) -> bool:
        """Whether a checkpoint is the end of the training; its weights, or the best ones, are loaded then."""

    def train(self, resume_from_checkpoint: str | None = None) -> object:
        """Train to the end, from a checkpoint where one is named."""


def train_on(
    trainer: Callable[[Adjusted], Attempt],
    model: nn.Module,
    checkpoints: Path,
    *,
    kept: Path,
    scorer: str,
    resume: bool,
    say: Callable[[str], None],
) -> int:
    """Train to the end; what can be mended by going back to the last good checkpoint is mended, each in its measure.

    Args:
        trainer: makes the trainer of an attempt.
        model: is trained in place.
        checkpoints: where the checkpoints lie, and what was changed.
        kept: beginning of the paths of batches whose loss was no number.
        scorer: names the stage in messages.
        resume: go on from the last checkpoint, if there is one.
        say: gets lines of what was changed.

    Returns:
        The steps that were done; fewer than planned where it stopped early.

    Raises:
        RecllmError: neither half the learning rate nor smaller micro-batches help.
    """
    start = trained_values(model)
    note = checkpoints / ADJUSTED
    adjusted = Adjusted(**read_json(note)) if resume and note.is_file() else UNCHANGED
    while True:
        made = trainer(adjusted)
        found = last_checkpoint(checkpoints, say) if resume else None
        try:
            _train(made, adjusted, found)
        except NonFiniteLossError as error:
            adjusted = _slower(adjusted, error, kept, scorer, say)
        except Exception as error:  # the device's libraries raise many kinds
            if not (should_reduce_batch_size(error) or out_of_memory(error)):
                raise
            if made.validating:
                adjusted = _smaller_validation(adjusted, made.args.per_device_eval_batch_size, scorer, say)
            else:
                whole = made.args.per_device_train_batch_size * adjusted.parts
                adjusted = _smaller(adjusted, whole, made.args.gradient_accumulation_steps, scorer, say)
        else:
            return int(made.state.global_step)
        fsdp = made.is_fsdp_enabled
        del made
        gc.collect()
        free_memory()
        if process_state().is_main_process:
            write_json(note, asdict(adjusted))
        process_state().wait_for_everyone()
        if fsdp:
            # accelerate cannot wrap it again: it knows parameters by their address, and empty parts have none.
            raise RecllmError(
                "A model that FSDP has sharded cannot go back by itself. Start the same command again with --resume: "
                "it goes on from the last good checkpoint, with half the learning rate."
            )
        put(model, start)  # where there is no checkpoint yet
        resume = True


def _train(made: Attempt, adjusted: Adjusted, checkpoint: str | None) -> None:
    if checkpoint is not None and made.ended(checkpoint):
        return
    with _quiet_about(adjusted):
        made.train(resume_from_checkpoint=checkpoint)


def _slower(
    adjusted: Adjusted, error: NonFiniteLossError, kept: Path, scorer: str, say: Callable[[str], None]
) -> Adjusted:
    """Half the learning rate, once.

    Raises:
        RecllmError: it has been halved before.
    """
    files = sorted(path.name for path in kept.parent.glob(f"{kept.name}-step-{error.step}-*"))
    batch = f" The batch is kept as {kept.parent / files[0]}." if files else ""
    what = f"The {error.key} of '{scorer}' is {error.value} at step {error.step}"
    if adjusted.rate < 1.0:
        raise RecllmError(
            f"{what}, at half the learning rate too.{batch} Lower the learning rate (train.learning_rate, "
            "train.head_learning_rate; light.learning_rate for 'light') and start anew: --overwrite."
        ) from None
    say(f"{what}.{batch} Going back to the last good checkpoint, with half the learning rate")
    return replace(adjusted, rate=0.5)


def _smaller(adjusted: Adjusted, whole: int, accumulation: int, scorer: str, say: Callable[[str], None]) -> Adjusted:
    """More and smaller micro-batches of the `whole` rows of a device, all of one size: a step has the same rows.

    Raises:
        RecllmError: a single row does not fit, or several processes train.
    """
    rows = whole // adjusted.parts
    parts = next((parts for parts in range(2 * adjusted.parts, whole + 1) if whole % parts == 0), whole)
    if rows == 1:
        ways = "shorter histories (model.max_history), fewer model.rows_together, a smaller model, the recipe 'qlora', "
        ways += "or train.gradient_checkpointing = true"
        raise RecllmError(f"Out of memory with a single row. Take {LESS if scorer == LIGHT else ways}.") from None
    if process_state().num_processes > 1:
        keys = f"--set {'light' if scorer == LIGHT else 'train'}.per_device_train_batch_size={rows // 2}"
        keys += ", or light.pairs_in_step where pairs are judged" if scorer == LIGHT else ""
        keys += "" if scorer == LIGHT else f" --set train.gradient_accumulation_steps={2 * accumulation}"
        anew = ", and begin anew by --overwrite" if scorer == LIGHT else ""
        raise RecllmError(
            f"Out of memory with {rows} rows at once on a device. Take fewer ({keys}{anew}): with several processes "
            "this is not done by itself."
        ) from None
    say(f"Out of memory with {rows} rows at once: going on with {whole // parts}, and the same rows in a step")
    return replace(adjusted, parts=parts)


def _smaller_validation(adjusted: Adjusted, rows: int, scorer: str, say: Callable[[str], None]) -> Adjusted:
    """Half of the `rows` that a device validates at once; training stays as it is.

    Raises:
        RecllmError: a single row does not fit, or several processes train.
    """
    if rows == 1:
        ways = "shorter histories (model.max_history), fewer model.rows_together or a smaller model"
        raise RecllmError(
            f"Out of memory while validating a single row. Take {LESS if scorer == LIGHT else ways}."
        ) from None
    if process_state().num_processes > 1:
        fewer = f"fewer (--set train.per_device_eval_batch_size={rows // 2})"
        raise RecllmError(
            f"Out of memory while validating {rows} rows at once on a device. Take {LESS if scorer == LIGHT else fewer}"
            ": with several processes fewer rows are not taken by themselves."
        ) from None
    say(f"Out of memory while validating {rows} rows at once: going on with {rows // 2}")
    return replace(adjusted, valid_parts=2 * adjusted.valid_parts)


def divided(options: dict[str, Any], adjusted: Adjusted) -> dict[str, Any]:
    """Trainer's keys with the rows of a device divided into micro-batches, in validation too."""
    parts = adjusted.parts
    keys: dict[str, Any] = {}
    if parts > 1:
        keys["per_device_train_batch_size"] = options["per_device_train_batch_size"] // parts
        keys["gradient_accumulation_steps"] = options.get("gradient_accumulation_steps", 1) * parts
    if parts * adjusted.valid_parts > 1:
        rows = options["per_device_eval_batch_size"] // (parts * adjusted.valid_parts)
        keys["per_device_eval_batch_size"] = max(1, rows)
    return options | keys


@contextmanager
def _quiet_about(adjusted: Adjusted) -> Iterator[None]:
    """Without Trainer's warnings of what is our own doing: another batch size, two checkpoints within a moment."""
    level, rotation = hf_logging.get_verbosity(), logging.getLogger("transformers.trainer_utils")
    before = rotation.level
    rotation.setLevel(logging.ERROR)
    if adjusted.parts > 1:
        hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        rotation.setLevel(before)

"""Checkpoints: only what trains, sealed by the sha256 of every file, and verified before training goes on from them."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import rotate_checkpoints

from recllm.devices import process_state
from recllm.errors import DamagedError, RecllmError
from recllm.files import read_json, sha256_of, write_json, written
from recllm.sharded import put, reshard, whole

WEIGHTS = "model.safetensors"
SEAL = "sha256.json"
"""In a checkpoint: the sha256 of all other files by name, written when they are all there."""
CHANGED = "Was the run file changed?"


def trained_values(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters that train, on the CPU; where they are sharded all processes have to ask."""
    reshard(model)
    return {name: whole(value).cpu().clone() for name, value in model.named_parameters() if value.requires_grad}


def save_trained(values: Mapping[str, Tensor], path: Path) -> None:
    """Write `trained_values` as safetensors, whole or not at all."""
    kept = {name: value.contiguous() for name, value in values.items()}
    with written(path) as temporary:
        save_file(kept, temporary, metadata={"format": "pt"})


def load_trained(model: nn.Module, path: Path) -> None:
    """Read what `save_trained` wrote into the same parameters.

    Raises:
        RecllmError: the file is damaged, has other parameters than the model trains, or others' shapes.
    """
    try:
        weights = load_file(path)
    except SafetensorError as error:
        raise DamagedError(path, error) from None
    expected = {name: value for name, value in model.named_parameters() if value.requires_grad}
    for name in sorted(set(weights) | set(expected)):
        if name not in weights or name not in expected:
            raise RecllmError(f"{path} does not fit this run: '{name}' is in one of them only. {CHANGED}")
        shape = getattr(expected[name], "ds_shape", expected[name].shape)  # ZeRO-3 leaves an empty one behind
        if weights[name].numel() == shape.numel() == 1:
            weights[name] = weights[name].reshape(shape)  # scalars of runs from before they were vectors of one
        if weights[name].shape != shape:
            shapes = f"{list(weights[name].shape)} and not {list(shape)}"
            raise RecllmError(f"{path} does not fit this run: '{name}' has the shape {shapes}. {CHANGED}")
    put(model, weights)


class Seal(TrainerCallback):
    """Ends every checkpoint by its seal: one that was cut off while it was written has none, and does not count.

    Only behind it older checkpoints go, `most` stay: Trainer itself would delete them before the new one counts.
    """

    def __init__(self, most: int | None = None) -> None:
        self.most = most

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Seal what was saved, when all processes have saved their part."""
        process_state().wait_for_everyone()
        if state.is_world_process_zero:
            seal(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}")
            rotate_checkpoints(str(args.output_dir), self.most, state.best_model_checkpoint)


def seal(folder: Path) -> None:
    """Write the sha256 of every file of a checkpoint."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SEAL)
    write_json(folder / SEAL, {path.relative_to(folder).as_posix(): sha256_of(path) for path in files})


def damage(folder: Path) -> str | None:
    """The first file of a sealed checkpoint that is not what was sealed, or None."""
    try:
        sealed = read_json(folder / SEAL)
    except (OSError, ValueError):
        return SEAL
    for name, digest in sealed.items():
        if not (folder / name).is_file() or sha256_of(folder / name) != digest:
            return str(name)
    return None


def last_checkpoint(folder: Path, say: Callable[[str], None] = lambda _: None) -> str | None:
    """The newest good checkpoint in `folder`, or None.

    One that was cut off while it was written is passed over; one that is damaged is too, and `say` is told. Both are
    removed on the first process: training comes to their steps again.
    """
    listed = [(path.name.rpartition("-")[2], path) for path in folder.glob("checkpoint-*")]
    numbered = [(int(number), path) for number, path in listed if number.isdecimal()]
    found = None
    for _, path in sorted(numbered, reverse=True):
        sealed = (path / SEAL).is_file()
        file = damage(path) if sealed else None
        if sealed and file is None:
            found = str(path)
            break
        if file is not None:
            say(f"The checkpoint {path.name} is damaged ({file} is not what was saved); going on from an earlier one")
        # Not while another process still looks at it; and none lists the folder while it goes: it would wait alone.
        process_state().wait_for_everyone()
        if process_state().is_main_process:
            shutil.rmtree(path)
        process_state().wait_for_everyone()
    return found


def has_checkpoint(folder: Path, scorer: str, say: Callable[[str], None]) -> bool:
    """Whether a stage of a run has a good checkpoint; what a model starts from is of no use then."""
    return last_checkpoint(folder / "checkpoints" / scorer, say) is not None


class SoundBest(TrainerCallback):
    """Forgets the best checkpoint where it is damaged or gone: the next validation is the best one then."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Look at the best checkpoint of the state that training goes on from."""
        if state.best_global_step is None:
            return
        # Where it lies now: the run's folder may have been moved.
        best = Path(str(args.output_dir)) / f"checkpoint-{state.best_global_step}"
        if (best / SEAL).is_file() and damage(best) is None:
            state.best_model_checkpoint = str(best)
            return
        self.say(f"The best checkpoint, {best.name}, is damaged or gone; the best one from here on is kept")
        state.best_model_checkpoint = state.best_metric = state.best_global_step = None

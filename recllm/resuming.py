"""Resuming: what a run's folder was begun with, and what of it may have changed since."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recllm.errors import DamagedError, RecllmError
from recllm.files import read_json, written
from recllm.recipes import find_recipe
from recllm.runs import ENVIRONMENT, FILE, LIGHT_READS, OF_LANGUAGE_MODEL, PROMPTS, RECIPES, Run, load_run
from recllm.weighing import FusionSettings

HARMLESS = (
    "per_device_eval_batch_size",
    "report_to",
    "run_name",
    "dataloader_num_workers",
    "disable_tqdm",
)
"""Keys of `[train]` that decide nothing of the weights: a run may go on with others."""
FUSED_WITH = "fusion-settings.json"
"""In a run's folder: what its fusion was fitted with, written last."""
LANGUAGE_STAGES = ("lm", "relevance")
"""What the language model's training is called, by the task."""


def keep_recipes(run: Run) -> None:
    """Copy the prompts and the adapter's recipe into the run's folder: the weights belong to what they say now."""
    files: dict[str, tuple[str, str]] = {key: ("prompts", getattr(run.prompt, key)) for key in PROMPTS}
    if run.adapter.recipe != "none":
        files["adapter"] = "adapters", run.adapter.recipe
    for name, (kind, named) in files.items():
        target = run.folder / RECIPES / f"{name}.toml"
        if not target.is_file():  # else the file that is named may be gone by now
            source = find_recipe(kind, named)
            with written(target) as temporary:
                shutil.copyfile(source, temporary)


def adapter_is_kept(run: Run) -> bool:
    """Whether the copy of the adapter's recipe in the run's folder is still what `run` trains with.

    It is once the language model has begun; before, what the run file names may have become another one.
    """
    copy = run.folder / RECIPES / "adapter.toml"
    if not copy.is_file() or run.adapter.recipe == "none":
        return False
    if language_begun(run.folder) or not (run.folder / FILE).is_file():
        return True
    if load_run(run.folder).adapter.recipe != run.adapter.recipe:
        return False
    try:
        return find_recipe("adapters", run.adapter.recipe).read_bytes() == copy.read_bytes()
    except RecllmError:  # the file is gone, or was named from another folder
        return True


def fusion_stands(run: Run) -> bool:
    """Whether the fusion in the run's folder was fitted with what `run` says, and can be read."""
    try:
        for path in run.folder.glob("fusion-without-*.json"):
            read_json(path)
        read_json(run.folder / "fusion.json")
        fitted = FusionSettings().model_dump(mode="json") | read_json(run.folder / FUSED_WITH)
        return bool(fitted == run.fusion.model_dump(mode="json"))
    except (OSError, DamagedError):
        return False


def check_folder(run: Run, *, resume: bool, overwrite: bool) -> None:
    """Check that a training may begin in the run's folder, or go on there.

    Raises:
        RecllmError: something else is there, or what was begun there has other settings.
    """
    if resume and overwrite:
        raise RecllmError("--resume keeps what is done and --overwrite deletes it; give one of them.")
    begun = (run.folder / FILE).is_file()
    # What is no run is never deleted.
    if run.folder.is_dir() and any(run.folder.iterdir()) and not resume and not (overwrite and begun):
        raise RecllmError(
            f"{run.folder} is not empty. Go on with it by --resume, start anew by --overwrite, "
            "or give the run another name (--set name=…)."
        )
    if resume and begun:
        check_resumed(run)


def check_resumed(run: Run) -> None:
    """Check that `run` says what the run in its folder was begun with; fusion and export may be changed.

    So may what the language model's training alone reads, until it has a checkpoint: a mistake in it, or too little
    memory, shows when its turn comes, and what has trained before it is not lost by that.

    Raises:
        RecllmError: a key has another value.
    """
    before = load_run(run.folder).model_dump(mode="json", exclude_none=True)
    now = run.model_dump(mode="json", exclude_none=True)
    if not language_begun(run.folder):
        for own in (before, now):
            for key in _language_keys(own):
                table, _, name = key.partition(".")
                own[table].pop(name)
    for key in ("name", "output", "fusion", "export"):
        before.pop(key), now.pop(key)
    for key in HARMLESS:
        before["train"].pop(key, None), now["train"].pop(key, None)
    for key, old, new in _differences(before, now, ""):
        raise RecllmError(
            f"{run.folder} was begun with {key} = {old}, and now it is {new}. Resume with the settings that it was "
            f"begun with (recllm train {run.folder} --resume), start anew (--overwrite), or give the run another name "
            "(--set name=…)."
        )


def _language_keys(values: dict[str, Any]) -> list[str]:
    """Keys of a dumped run, `table.key`, that the language model's own training alone reads."""
    keys = [f"{table}.{name}" for table in ("adapter", "train", "model") for name in values[table]]
    return [
        key for key in keys if key in OF_LANGUAGE_MODEL or (not key.startswith("model.") and key not in LIGHT_READS)
    ]


def language_part(run: Run) -> dict[str, Any]:
    """What the language model's own training reads of a run, but for what decides nothing of the weights."""
    values = run.model_dump(mode="json", exclude_none=True)
    harmless = {f"train.{key}" for key in HARMLESS}
    keys = [key.partition(".") for key in _language_keys(values) if key not in harmless]
    return {f"{table}.{name}": values[table][name] for table, _, name in keys}


def language_begun(folder: Path) -> bool:
    """Whether the language model of the run in `folder` has a checkpoint, or is trained."""
    stages = (folder / "checkpoints" / stage for stage in LANGUAGE_STAGES)
    return (folder / "lm" / "done.json").is_file() or any(any(stage.glob("checkpoint-*")) for stage in stages)


def _differences(before: Any, now: Any, key: str) -> Iterator[tuple[str, Any, Any]]:  # noqa: ANN401  nested tables
    if isinstance(before, dict) and isinstance(now, dict):
        for name in dict.fromkeys([*before, *now]):
            yield from _differences(before.get(name), now.get(name), f"{key}.{name}" if key else name)
    elif before != now:
        yield key, before, now


def check_same_data(run: Run, fingerprints: dict[str, str]) -> None:
    """Check that the data are still those that the run was trained on.

    Raises:
        RecllmError: they are not.
    """
    path = run.folder / ENVIRONMENT
    before = read_json(path)["data"] if path.is_file() else fingerprints
    # A run from before the rows of a given split were kept has no word on them.
    changed = " and ".join(name for name in fingerprints if fingerprints[name] != before.get(name, fingerprints[name]))
    if changed:
        raise RecllmError(
            f"The {changed} of '{run.data.name or run.data.interactions}' are not those that {run.folder} was trained "
            "on: the data have changed since. Train a new run on them (--set name=…), or bring the old data back."
        )

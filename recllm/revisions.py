"""Which weights a run was trained over: a model's name stays when what lies behind it changes."""

from functools import cache
from pathlib import Path

from recllm.errors import RecllmError
from recllm.fetch import on_hub, pinned
from recllm.files import read_json, sha256_of
from recllm.lm import MODEL_FILES, model_folder
from recllm.runs import ENVIRONMENT, FILE, Run


def revision(name: str) -> str:
    """The beginning of the sha256 of a model's weights, file by file.

    Args:
        name: a fetchable name, a hub id or a local folder.

    Raises:
        RecllmError: there is no such model.
    """
    folder = model_folder(name)
    files = sorted(path for kind in MODEL_FILES[1:] for path in folder.glob(kind))
    return ", ".join(_beginning(path, path.stat().st_size, path.stat().st_mtime_ns) for path in files)


@cache
def _beginning(path: Path, _size: int, _modified: int) -> str:
    return sha256_of(path)[:16]


def revisions(run: Run) -> dict[str, str]:
    """The revision of every model that a run reads text with, by name.

    Raises:
        RecllmError: one cannot be had.
    """
    named = (run.model.name, run.model.item_encoder, run.model.likelihood)
    return {name: revision(name) for name in dict.fromkeys(named) if name not in (None, "none")}


def known_revision(run: Run, name: str) -> str:
    """The revision that a run was trained over; today's for a run from before they were kept."""
    kept: dict[str, str] = read_json(run.folder / ENVIRONMENT).get("models", {})
    return kept.get(name) or revision(name)


def check_same_models(run: Run) -> None:
    """Check that the models behind the run's names are still those that it was trained over.

    A run from before they were kept has no word on them.

    Raises:
        RecllmError: one has other weights, or cannot be had.
    """
    path = run.folder / ENVIRONMENT
    before: dict[str, str] = read_json(path).get("models", {}) if path.is_file() else {}
    if not before:
        return
    for name, now in revisions(run).items():
        then = before.get(name) or before.get(pinned(name)[0])
        if then not in (None, now):
            back = (
                f"Name that commit of it in {run.folder / FILE} ({pinned(name)[0]}@COMMIT)"
                if on_hub(name)
                else f"Bring the old files back into '{model_folder(name)}'"
            )
            raise RecllmError(
                f"'{name}' has other weights now (sha256 {now}) than those that {run.folder} was trained over "
                f"({then}). {back}, or train a new run (--set name=…)."
            )

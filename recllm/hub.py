"""Bundles and adapters on the Hugging Face Hub: pushed as a model repository, pulled whole and checked."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from recllm.bundle import MANIFEST, read_manifest
from recllm.errors import RecllmError
from recllm.files import whole_folder

ADAPTER, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""What PEFT's adapter folders have."""
BOOKKEEPING = ".cache"
"""The hub's client leaves notes of what it loaded there."""


def push(folder: Path, repository: str, *, private: bool = False, revision: str | None = None) -> str:
    """Upload a bundle or an adapter as a model repository, in place of what it held.

    Args:
        folder: a bundle, or the `lm/adapter` of a run.
        repository: owner/name.
        private: the repository must be one that is seen by its owner only; a new one is made so.
        revision: the branch; the main one if not given.

    Returns:
        The address of the repository.

    Raises:
        RecllmError: the folder is neither, it is damaged, or the hub refuses or cannot be reached.
    """
    kind = kind_of(folder)
    _check_name(repository)
    api = _client().HfApi()
    with _told(repository):
        address = api.create_repo(repository, private=private or None, repo_type="model", exist_ok=True)
        if private and not api.repo_info(repository, repo_type="model").private:
            raise RecllmError(
                f"'{repository}' is there already and public; nothing was uploaded. Make it private on the hub, or "
                "name a new one."
            )
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            revision=revision,
            commit_message=f"recllm {kind}",
            ignore_patterns=[".*", f"{BOOKKEEPING}/*"],
            delete_patterns="*",  # a file of an earlier bundle would make this one unsound
        )
    return str(address)


def pull(repository: str, folder: Path, *, revision: str | None = None, overwrite: bool = False) -> str:
    """Download a bundle or an adapter; the folder appears when all of it is there and sound.

    A bundle's files are compared with the sha256 of its own manifest, which tells a damaged download, not who made it.
    An adapter has none: its weights are opened.

    Args:
        repository: owner/name.
        folder: where it goes.
        revision: a branch, a tag or a commit.
        overwrite: take the place of a bundle or an adapter that is there.

    Returns:
        What it is, "bundle" or "adapter".

    Raises:
        RecllmError: the folder is there, the hub refuses or cannot be reached, or it is neither or damaged.
    """
    _check_name(repository)
    if any((parent / MANIFEST).is_file() for parent in folder.resolve().parents):
        raise RecllmError(f"'{folder}' would lie in a bundle, which holds its own files only. Name another folder.")
    if folder.exists():
        if not overwrite:
            raise RecllmError(f"'{folder}' is there already. Name another folder, or give --overwrite.")
        kind_of(folder, verify=False)  # nothing else is replaced
    client = _client()
    with whole_folder(folder) as part:
        with _told(repository):
            client.snapshot_download(repository, revision=revision, local_dir=part)
        shutil.rmtree(part / BOOKKEEPING, ignore_errors=True)
        try:
            return kind_of(part)
        except RecllmError as error:
            raise RecllmError(f"{repository} cannot be used: {str(error).replace(str(part), repository)}") from None


def kind_of(folder: Path, *, verify: bool = True) -> str:
    """What a folder is, "bundle" or "adapter".

    Raises:
        RecllmError: neither, or damaged.
    """
    if (folder / MANIFEST).is_file():
        read_manifest(folder, verify=verify)
        return "bundle"
    if (folder / ADAPTER).is_file():
        if verify:
            _check_weights(folder / WEIGHTS)
        return "adapter"
    raise RecllmError(
        f"'{folder}' is neither a bundle ({MANIFEST}) nor an adapter ({ADAPTER}). recllm export RUN makes bundles, and "
        "an adapter lies in RUN/lm/adapter."
    )


def _check_weights(path: Path) -> None:
    try:
        with safe_open(path, framework="numpy") as weights:
            weights.keys()
    except (OSError, SafetensorError) as error:
        raise RecllmError(f"'{path}' is missing or damaged: {error}. Train again, or copy it anew, whole.") from None


def _check_name(repository: str) -> None:
    owner, slash, name = repository.partition("/")
    if not (slash and owner and name) or "/" in name:
        raise RecllmError(f"'{repository}' is no name of a repository. Give owner/name.")


def _client() -> Any:  # noqa: ANN401
    import huggingface_hub  # late, for it takes its time

    return huggingface_hub


@contextmanager
def _told(repository: str) -> Iterator[None]:
    """A failure of the hub's client as one message."""
    try:
        yield
    except RecllmError:
        raise
    except Exception as error:  # its client, and the one below it, raise many kinds
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise RecllmError(
            f"The hub did not do it for {repository}: {reason}. Log in with `hf auth login` or set HF_TOKEN, check the "
            "name and the network (HF_ENDPOINT names another hub), and try again."
        ) from None

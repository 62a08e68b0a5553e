"""The bundle: one folder with graphs, vectors, weights, prompt and catalogue, every file known by its sha256."""

import datetime
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import polars as pl

from recllm import __version__
from recllm.data import Catalog
from recllm.errors import DamagedError, RecllmError, out_of_memory
from recllm.files import read_json, restore, sha256_of, whole_folder, write_json
from recllm.process import FORKS

T = TypeVar("T")

FORMAT, WITH_NETWORK = 3, 4
"""Of bundles; of those whose fusion has a network, which older versions do not know."""
TRIES = 5
"""How often a bundle that is replaced meanwhile is read."""
MANIFEST = "manifest.json"
CATALOG = "catalog.parquet"


@contextmanager
def new_bundle(folder: Path, facts: dict[str, Any]) -> Iterator[Path]:
    """Give an empty folder to fill; seal it with a manifest and rename it to `folder` when the block ends well."""
    with whole_folder(folder) as part:
        yield part
        seal(part, facts)


def seal(folder: Path, facts: dict[str, Any]) -> None:
    """Write the manifest: `facts`, the format, the time and every file's size and sha256."""
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST and not _is_hidden(path.relative_to(folder).as_posix())
    }
    made = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    fusion = folder / "fusion.json"
    version = WITH_NETWORK if fusion.is_file() and read_json(fusion).get("network") else FORMAT
    write_json(folder / MANIFEST, {"recllm": __version__, "made": made} | facts | {"format": version, "files": files})


def read_manifest(folder: Path, *, verify: bool = True) -> dict[str, Any]:
    """Read the manifest and check that every file is there, whole and nothing else.

    Raises:
        RecllmError: not a bundle, a bundle of another format, or a file that is missing, added or damaged.
    """
    path = folder / MANIFEST
    if not folder.exists():
        restore(folder.resolve())
    if not path.is_file():
        what = "is a file, and a bundle is a folder" if folder.is_file() else "is not there"
        what = "is not a bundle (it has no manifest.json)" if folder.is_dir() else what
        raise RecllmError(f"'{folder}' {what}. Make a bundle from a trained run with: recllm export runs/NAME")
    damaged = f"{path} is damaged ({{}}). Export the bundle again."
    try:
        manifest: dict[str, Any] = read_json(path)
        version = manifest.get("format")
    except DamagedError as error:
        raise RecllmError(damaged.format(error.reason)) from None
    except AttributeError as error:
        raise RecllmError(damaged.format(error)) from None
    if version not in (FORMAT, WITH_NETWORK):
        raise RecllmError(
            f"'{folder}' has bundle format {version}, this recllm {__version__} reads {FORMAT} and {WITH_NETWORK}. "
            f"Export the bundle again, or install the recllm that made it ({manifest.get('recllm', 'unknown')})."
        )
    try:
        files = {str(name): (int(facts["bytes"]), str(facts["sha256"])) for name, facts in manifest["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecllmError(damaged.format(f"its list of files: {error!r}")) from None
    if verify:
        for name, (size, sha256) in files.items():
            _check_file(folder, name, size, sha256)
        _check_nothing_else(folder, files)
    return manifest


def _check_file(folder: Path, name: str, size: int, sha256: str) -> None:
    path = folder / name
    if not any(path.resolve().is_relative_to(place) for place in _places(folder)):
        raise RecllmError(f"'{folder}' names the file '{name}' outside of itself; such a bundle is not opened.")
    if not path.is_file():
        raise RecllmError(f"'{folder}' lacks the file '{name}'. Copy the bundle again, whole.")
    if path.stat().st_size != size or sha256_of(path) != sha256:
        raise RecllmError(f"'{path}' is damaged: its sha256 is not the manifest's. Copy or export the bundle again.")


def _places(folder: Path) -> list[Path]:
    """Where a bundle's files may lie: in itself, and in the hub's cache, which links to them, among its blobs."""
    whole = folder.resolve()
    return [whole, *([whole.parents[1] / "blobs"] if whole.parent.name == "snapshots" else [])]


def _check_nothing_else(folder: Path, files: Collection[str]) -> None:
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() and path.is_dir():
            raise RecllmError(f"'{folder}' has '{name}', a link to another folder; such a bundle is not opened.")
        # Hidden files come with copying and version control, and nothing of ours reads them.
        if path.is_file() and name not in files and name != MANIFEST and not _is_hidden(name):
            raise RecllmError(
                f"'{folder}' has the file '{name}', which its manifest does not name. Remove it, or export again."
            )


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def read_steadily(folder: Path, read: Callable[[], T]) -> T:
    """What `read` makes of a bundle that another process may replace meanwhile: of one bundle, never of two.

    Raises:
        RecllmError: as `read` does, or it is replaced again and again.
    """
    for _ in range(TRIES):
        before = state(folder)
        try:
            found = read()
        except Exception:
            if state(folder) == before:
                raise
            continue
        if state(folder) == before:
            return found
    raise RecllmError(f"'{folder}' is replaced again and again while it is read. Wait until that is done.")


def understood(folder: Path, read: Callable[[], T]) -> T:
    """What `read` makes of a bundle whose files are whole, and may still not go together.

    Raises:
        RecllmError: as `read` does, or its files contradict each other, as those of a bundle made by hand may.
    """
    try:
        return read()
    except (RecllmError, MemoryError, ImportError):
        raise
    except Exception as error:
        strange = isinstance(error, ValueError | LookupError | TypeError | AttributeError | ArithmeticError)
        # The tokenizer's library raises nothing more special than Exception itself.
        if out_of_memory(error) or not (strange or isinstance(error, FileNotFoundError) or type(error) is Exception):
            raise
        raise RecllmError(
            f"'{folder}' cannot be loaded: its files do not go together ({type(error).__name__}: {error}). Export the "
            "bundle again."
        ) from error


def state(folder: Path) -> tuple[int, int, int] | None:
    """Alike as long as the same bundle lies there."""
    try:
        place, manifest = folder.stat(), (folder / MANIFEST).stat()
    except OSError:
        return None
    return place.st_ino, manifest.st_ino, manifest.st_mtime_ns


def write_catalog(folder: Path, catalog: Catalog) -> None:
    """Write the catalogue into a bundle."""
    catalog.frame.write_parquet(folder / CATALOG)


def read_catalog(folder: Path) -> Catalog:
    """Read a bundle's catalogue."""
    FORKS.check()
    return Catalog(pl.read_parquet(folder / CATALOG, glob=False))

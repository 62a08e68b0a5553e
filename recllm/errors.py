"""Errors for a user's mistakes: each names the value, the choices and the way out."""

import difflib
import errno
import importlib
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

CHOICES_SHOWN = 12
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system says where nothing more can be written."""
CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)
"""What it says of places that cannot be read or written at all."""


class RecllmError(Exception):
    """A mistake in input, settings or set-up; the command line prints it without a traceback and exits with 2."""


class DamagedError(RecllmError, ValueError):
    """A file that recllm has written and cannot read any more."""

    def __init__(self, path: Path, reason: object) -> None:
        """Name the `path`, the `reason`, and the way out."""
        self.path, self.reason = path, str(reason)
        super().__init__(
            f"'{path}' is damaged ({reason}). Bring it back, or make what it belongs to anew (a run by --overwrite)."
        )

    def __reduce__(self) -> tuple[type["DamagedError"], tuple[Path, str]]:
        """It goes to other processes as what it was made of."""
        return type(self), (self.path, self.reason)


def unknown(kind: str, name: str, choices: Iterable[str], hint: str = "") -> RecllmError:
    """Build the error for a `name` that is none of the `choices`, with the nearest right one."""
    known = sorted(choices)
    close = difflib.get_close_matches(name, known, n=1)
    meant = f" Did you mean '{close[0]}'?" if close else ""
    shown = ", ".join(known[:CHOICES_SHOWN]) + (", …" if len(known) > CHOICES_SHOWN else "")
    return RecllmError(f"Unknown {kind} '{name}'.{meant} Choices: {shown or 'none'}.{' ' + hint if hint else ''}")


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Import an optional `module`, or say which extra brings it.

    Raises:
        RecllmError: the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise RecllmError(
            f"{purpose} needs the package '{module.split('.')[0]}', which is not installed. "
            f'Install it with: pip install "recllm[{extra}]"'
        ) from None


def out_of_memory(error: Exception) -> bool:
    """Whether numpy, torch, ONNX Runtime or a GPU's driver and libraries could not have the memory they asked for."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, RecllmError | LookupError | ValueError | TypeError):  # which may quote a user's own words
        return False
    text = str(error).lower()
    told = ("out of memory", "failed to allocate memory", "alloc_failed", "can't allocate memory", "bad_alloc")
    return isinstance(error, MemoryError) or any(words in text for words in told)


def place_error(error: Exception) -> str:
    """What to tell of an error that a place on the disk has and no bug; empty for any other.

    Libraries in Rust tell the system's number in words.
    """
    told = error.errno if isinstance(error, OSError) else None
    if told in FULL or any(f"(os error {number})" in str(error) for number in FULL):
        return (
            f"the disk is full, or a file larger than allowed ({error}). What is finished is kept: free some room, and "
            "training goes on where it was with --resume, a batch by the same command."
        )
    if told in CLOSED and isinstance(error, OSError) and error.filename is not None:
        return f"'{error.filename}': {error.strerror}. Name another place, or mend its rights."
    if out_of_memory(error):
        reason = str(error).partition("\n")[0]
        return f"memory does not suffice ({reason}). Make what takes it smaller: sizes, widths, batches."
    return ""

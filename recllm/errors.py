"""Errors for a user's mistakes: each names the value, the choices and the way out."""

import difflib
import errno
import importlib
from collections.abc import Iterable
from types import ModuleType

CHOICES_SHOWN = 12
FULL = (errno.ENOSPC, errno.EDQUOT)
"""What the system says where nothing more can be written."""


class RecllmError(Exception):
    """A mistake in input, settings or set-up; the command line prints it without a traceback and exits with 2."""


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


def is_disk_full(error: Exception) -> bool:
    """Whether something could not be written for lack of room; libraries in Rust tell the system's number in words."""
    told = error.errno if isinstance(error, OSError) else None
    return told in FULL or any(f"(os error {number})" in str(error) for number in FULL)

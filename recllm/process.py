"""Processes: the environment and the loggers that a command sets up, and children that end with their parent."""

import logging
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence

from recllm.errors import RecllmError


class Forks:
    """Polars' threads do not come along when a process forks, and the child would wait for them for ever.

    `check` is called before Polars works in what a service may do in its workers.
    """

    def __init__(self) -> None:
        self.began: int | None = None

    def check(self) -> None:
        """Remember the process, or refuse one that was forked from it.

        Raises:
            RecllmError: the process was forked from one in which this was called.
        """
        if self.began is None:
            self.began = os.getpid()
        if self.began != os.getpid():
            raise RecllmError(
                "This process was forked from one that had loaded a bundle, and Polars' threads stayed there: loading, "
                "adding items and answering files would wait for ever. Load the first bundle behind the fork (gunicorn "
                "without --preload), or start workers by spawn or forkserver."
            )


FORKS = Forks()
"""Of this process."""


def set_up() -> None:
    """Keep libraries from telling users what concerns only us; called by the commands, never at import."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else a warning in every process that is forked
    # oneDNN keeps a compiled kernel for each shape, a thousand by default: trainings over histories of all lengths on a
    # CPU grew by hundreds of megabytes (LOG.md). What one step takes is far less. Read when torch first multiplies.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    # bitsandbytes misses an optional kernel of 4-bit products on the CPU, and says so to everybody who imports PEFT.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def run_child(command: Sequence[str], variables: Mapping[str, str] | None = None) -> int:
    """Run a program in this one's place, with further environment `variables`.

    Its exit code, 128 + the signal where one ended it, as a shell says it.

    A scheduler that ends this process tells only this one: without handing the signal on, the child would go on alone,
    and a job that is started again would write into the same folder beside it.
    """
    with subprocess.Popen(list(command), env={**os.environ, **(variables or {})}) as child:
        kinds = (signal.SIGTERM, signal.SIGHUP) if os.name == "posix" else (signal.SIGTERM,)
        before = {kind: signal.signal(kind, lambda number, _: child.send_signal(number)) for kind in kinds}
        try:
            code = child.wait()
        finally:
            for kind, own in before.items():
                signal.signal(kind, own)
    return code if code >= 0 else 128 - code

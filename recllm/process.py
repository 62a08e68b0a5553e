"""What a command sets up for its own process: the environment and the loggers of libraries; nothing at import."""

import logging
import os


def set_up() -> None:
    """Keep libraries from telling users what concerns only us; called by the commands, never at import."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else a warning in every process that is forked
    # bitsandbytes misses an optional kernel of 4-bit products on the CPU, and says so to everybody who imports PEFT.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

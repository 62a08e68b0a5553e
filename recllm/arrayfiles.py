"""Arrays in safetensors files: read, or one message of what is wrong with the file."""

from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from recllm.errors import DamagedError


def read_tensors(path: Path) -> dict[str, NDArray[Any]]:
    """Read the arrays of a safetensors file.

    Raises:
        DamagedError: it is none, or was cut off.
    """
    try:
        return load_file(path)
    except SafetensorError as error:
        raise DamagedError(path, error) from None

"""recllm: a recommender from logs and item text, by a small language model and matrix factorization."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from os import PathLike

    from recllm.runtime import Recommender

__version__ = "0.1.0"


def load(folder: "str | PathLike[str]", provider: str = "cpu", threads: int = 0, index: str = "exact") -> "Recommender":
    """Load a bundle and recommend from it: `recllm.load(folder).recommend([["50", "181"]], k=10)`. Needs no torch.

    Args:
        folder: the bundle, as `recllm export` wrote it.
        provider: cpu, cuda or tensorrt; never another one than asked for.
        threads: inside one operator; 0 leaves it to ONNX Runtime.
        index: `int8` or `faiss` finds a shortlist of a large catalogue, and that is ranked; `exact` ranks all.

    Raises:
        RecllmError: not a bundle, damaged, or the provider or the index is not there.
    """
    from recllm import runtime  # here, so that `import recllm` stays light

    return runtime.load(folder, provider=provider, threads=threads, index=index)

"""The two graphs of pointwise ranking: a prefix to its keys and values, and continuations of it to answers."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from recllm.cascade import Prefix, read_prefix, read_suffixes
from recllm.errors import RecllmError
from recllm.onnxreader import PREFIX, SUFFIX
from recllm.relevance import RelevanceModel, TorchReader, at_ends
from recllm.tracing import Example, write_graph


class PrefixGraph(nn.Module):
    """Reads the history, once per user."""

    def __init__(self, model: RelevanceModel) -> None:
        super().__init__()
        self.body = model.body

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values float32[layers, users, key-value heads, length, width] of `ids`, int64[users, length]."""
        prefix = read_prefix(self.body, ids, torch.zeros(0, dtype=torch.long))
        return torch.stack(prefix.keys), torch.stack(prefix.values)


class SuffixGraph(nn.Module):
    """Reads the candidates behind the histories."""

    def __init__(self, model: RelevanceModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, ends: Tensor, lengths: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Answers float32[users, candidates].

        Args:
            ids: int64[users, candidates, length], padded on the right.
            ends: int64[users, candidates], the last real place of each.
            lengths: int64[users], of the prefixes.
            keys: float32[layers, users, key-value heads, prefix, width].
            values: the same.
        """
        prefix = Prefix(keys.unbind(0), values.unbind(0), lengths)
        return self.model.answer(at_ends(read_suffixes(self.model.body, prefix, ids), ends))


def write_rank_graphs(
    model: RelevanceModel, folder: Path, opset: int, say: Callable[[str], None] = lambda _: None
) -> None:
    """Write the graphs that `OnnxReader` reads with, of a causal model; `say` gets a line before each.

    Raises:
        RecllmError: an encoder, or a family whose candidates cannot share a prefix.
    """
    if not TorchReader(model).shares:
        raise RecllmError(
            "Only causal models whose layers keep keys and values are exported for ranking: the candidates of a "
            "history share what was read of it. Train with a causal model of the Llama, Qwen, Gemma or Mistral kind."
        )
    say(f"Tracing {PREFIX}")
    text = torch.ones(2, 7, dtype=torch.long)
    example = {"ids": (text, ("users", "length"))}
    write_graph(PrefixGraph(model), example, folder / PREFIX, ("keys", "values"), opset)
    with torch.no_grad():
        keys, values = PrefixGraph(model)(text)
    inputs: Example = {
        "ids": (torch.ones(2, 3, 5, dtype=torch.long), ("users", "candidates", "length")),
        "ends": (torch.tensor([[4, 2, 1], [0, 1, 2]]), ("users", "candidates")),
        "lengths": (torch.tensor([7, 4]), ("users",)),
        "keys": (keys, {1: "users", 3: "prefix"}),
        "values": (values, {1: "users", 3: "prefix"}),
    }
    say(f"Tracing {SUFFIX}")
    write_graph(SuffixGraph(model), inputs, folder / SUFFIX, ("answers",), opset)

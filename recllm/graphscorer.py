"""A sequence scorer whose model is an ONNX graph, as a bundle has it."""

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recllm.encoding import Encode, SequenceScorer
from recllm.histories import HistoryFormat
from recllm.likeness import ToldVectors
from recllm.ranking import ItemIndex
from recllm.sessions import compute, placed


class TableScorer(SequenceScorer):
    """A sequence scorer whose model is a graph; the table of input vectors goes in, so that items can be added."""

    def __init__(
        self,
        graph: Any,  # noqa: ANN401  onnxruntime is untyped
        table: NDArray[np.float32],
        history: HistoryFormat,
        index: ItemIndex,
        heads: NDArray[np.float32],
        bias: NDArray[np.float32],
        cold_bias: float,
        told: ToldVectors | None = None,
    ) -> None:
        super().__init__(onnx_encode(graph, table), history, index, heads, bias)
        self.graph, self.table, self.cold_bias, self.told = graph, table, cold_bias, told

    def grown(self, index: ItemIndex, tokens: NDArray[np.float32], heads: NDArray[np.float32]) -> "TableScorer":
        """The same with new items at the end of `index`; their bias is that of every item without events.

        A text history passes over new items: the table has no vectors for words that no old item has.
        """
        bias = np.concatenate([self.items[:, -1], np.full(len(heads), self.cold_bias, dtype=np.float32)])
        table, heads = np.concatenate([self.table, tokens]), np.concatenate([self.items[:, :-1], heads])
        history = self.history
        if history.texts is not None:
            history = replace(history, texts=history.texts + (None,) * len(tokens))
        return TableScorer(self.graph, table, history, index, heads, bias, self.cold_bias, self.told)

    def ranked_by(self, items: NDArray[np.float32]) -> "TableScorer":
        """The same with other heads and biases where `items`, float32[items, head + 1], is not NaN."""
        items = np.where(np.isnan(items), self.items, items)
        heads, bias = items[:, :-1], items[:, -1]
        return TableScorer(self.graph, self.table, self.history, self.index, heads, bias, self.cold_bias, self.told)


def onnx_encode(session: Any, table: NDArray[np.float32]) -> Encode:  # noqa: ANN401  onnxruntime is untyped
    """Read ids into query vectors with a sequence graph and its table of input vectors."""
    there = placed(session, {"table": table})

    def encode(ids: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.float32]:
        (vectors,) = compute(session, {"ids": ids, "ends": ends} | there)
        return np.asarray(vectors, dtype=np.float32)

    return encode

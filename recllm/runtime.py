"""Recommend from a bundle with ONNX Runtime and numpy alone: `recllm.load(folder).recommend(histories, k=10)`."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from recllm.bundle import read_catalog, read_manifest
from recllm.catalogue import prepare
from recllm.data import Catalog, Query
from recllm.encoding import Encode, SequenceScorer
from recllm.errors import RecllmError, require, unknown
from recllm.files import read_json
from recllm.fusion import Fusion, evidence
from recllm.histories import HistoryFormat, padded
from recllm.itemitem import EASE, Transitions
from recllm.mf import ImplicitMF
from recllm.neighbours import Neighbours
from recllm.priors import Popularity, TextSimilarity
from recllm.prompts import CompiledPrompt, compile_prompt, load_prompt
from recllm.ranking import ItemIndex, Scores, VectorScorer
from recllm.vectors import Standard

USERS_IN_BATCH = 64
PLACES_AT_ONCE = 65_536
"""The most places of all users' lists in one call: each takes a copy of its item's vectors."""
VECTORS = "vectors.safetensors"
"""The bundle's file of item vectors."""
WARNING, FATAL = 2, 4
"""ONNX Runtime's own numbers of severity; the first is its default."""
PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}

FITTED: dict[str, Any] = {
    "popularity": Popularity,
    "mf": ImplicitMF,
    "ease": EASE,
    "transitions": Transitions,
    "text": TextSimilarity,
    "neighbours": Neighbours,
}
"""Kinds of scorers without a graph."""


@dataclass(frozen=True)
class Recommendations:
    """The best items of every history.

    Attributes:
        ids: per row the item ids, best first; shorter than k where fewer items are left.
        scores: float32[rows, k], fused; NaN behind the last item.
        shares: by scorer, float32[rows, k]; they sum to `scores`.
    """

    ids: list[list[str]]
    scores: NDArray[np.float32]
    shares: dict[str, NDArray[np.float32]]


def open_session(path: Path, provider: str = "cpu", threads: int = 0) -> Any:  # noqa: ANN401  onnxruntime is untyped
    """Open a graph on exactly the provider asked for.

    Args:
        path: the graph.
        provider: cpu, cuda or tensorrt.
        threads: inside one operator; 0 leaves it to ONNX Runtime.

    Raises:
        RecllmError: ONNX Runtime is missing, or has not got the provider, or would fall back to another one.
    """
    ort = require("onnxruntime", "gpu", "Running a bundle")
    if provider not in PROVIDERS:
        raise unknown("provider", provider, PROVIDERS)
    wanted = PROVIDERS[provider]
    if wanted not in ort.get_available_providers():
        there = ", ".join(ort.get_available_providers())
        raise RecllmError(
            f"The provider '{provider}' is not in this ONNX Runtime (it has {there}). "
            'For cuda install "recllm[gpu]" and remove the package onnxruntime, or ask for the provider cpu.'
        )
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # warnings about unused initialisers say nothing to a user
    ort.set_default_logger_severity(FATAL)  # a provider that fails speaks on its own, and we say it below
    try:
        # Its Python wrapper would else go on with the CPU by itself, now and in later runs.
        session = ort.InferenceSession(str(path), options, providers=[wanted], enable_fallback=0)
    except Exception as error:  # its exceptions share no class but this
        reason = " ".join(str(error).split())[:300]
        if provider != "cpu":
            raise RecllmError(
                f"ONNX Runtime cannot open {path} with '{provider}': {reason}. Install what that provider needs, free "
                "memory on the device, or ask for the provider cpu."
            ) from None
        raise RecllmError(
            f"onnxruntime {ort.__version__} cannot open {path}: {reason}. Install a newer onnxruntime, or export the "
            "bundle again by a recipe with a lower opset."
        ) from None
    finally:
        ort.set_default_logger_severity(WARNING)
    if session.get_providers()[0] != wanted:
        # ONNX Runtime falls back to the CPU without a word when the provider's libraries cannot be loaded.
        raise RecllmError(
            f"ONNX Runtime could not load the libraries of '{provider}' and would have run on the CPU. "
            "Install CUDA and cuDNN (and TensorRT, for tensorrt) for this onnxruntime-gpu, or ask for the provider cpu."
        )
    return session


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
    ) -> None:
        super().__init__(onnx_encode(graph, table), history, index, heads, bias)
        self.graph, self.table, self.cold_bias = graph, table, cold_bias

    def grown(self, index: ItemIndex, tokens: NDArray[np.float32], heads: NDArray[np.float32]) -> "TableScorer":
        """The same with new items at the end of `index`; their bias is that of every item without events.

        A text history passes over new items: the table has no vectors for words that no old item has.
        """
        bias = np.concatenate([self.items[:, -1], np.full(len(heads), self.cold_bias, dtype=np.float32)])
        table, heads = np.concatenate([self.table, tokens]), np.concatenate([self.items[:, :-1], heads])
        history = self.history
        if history.texts is not None:
            history = replace(history, texts=history.texts + (None,) * len(tokens))
        return TableScorer(self.graph, table, history, index, heads, bias, self.cold_bias)


def onnx_encode(session: Any, table: NDArray[np.float32]) -> Encode:  # noqa: ANN401  onnxruntime is untyped
    """Read ids into query vectors with a sequence graph and its table of input vectors."""

    def encode(ids: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.float32]:
        (vectors,) = session.run(None, {"ids": ids, "ends": ends, "table": table})
        return np.asarray(vectors, dtype=np.float32)

    return encode


@dataclass(frozen=True, eq=False)
class ItemEncoder:
    """Text of an item to its vector, by the bundle's encoder graph."""

    session: Any
    prompt: CompiledPrompt
    standard: Standard

    def __call__(self, records: Sequence[Mapping[str, str]]) -> NDArray[np.float32]:
        """Standardised vectors float32[records, width]; a NaN row for a record without text."""
        result = np.full((len(records), len(self.standard.mean)), np.nan, dtype=np.float32)
        for row, record in enumerate(records):
            ids = self.prompt.item_ids(record)
            if ids is not None:
                tokens = padded([ids])
                (vector,) = self.session.run(None, {"ids": tokens, "mask": np.ones_like(tokens)})
                result[row] = self.standard(vector[0])
        return result


class Recommender:
    """A loaded bundle."""

    def __init__(
        self,
        *,
        catalog: Catalog,
        scorers: Mapping[str, VectorScorer],
        fusion: Fusion,
        item_counts: Mapping[str, int],
        catalogue: Any,  # noqa: ANN401  onnxruntime is untyped
        item_encoder: ItemEncoder | None,
        item_graphs: Mapping[str, Any],
        manifest: Mapping[str, Any],
    ) -> None:
        self.catalog, self.scorers, self.fusion = catalog, dict(scorers), fusion
        self.item_counts, self.manifest = dict(item_counts), manifest
        self._catalogue, self._item_encoder, self._item_graphs = catalogue, item_encoder, item_graphs
        self.index = ItemIndex(catalog.ids)
        vectors = {name: scorer.item_vectors(self.index) for name, scorer in self.scorers.items()}
        self._items = prepare(fusion, vectors, evidence([], self.index, self.item_counts)[1])

    @property
    def share_names(self) -> tuple[str, ...]:
        """Whose shares a score has."""
        return tuple(self.scorers)

    def recommend(
        self, histories: Sequence[Sequence[str]], k: int = 10, *, exclude_seen: bool = True
    ) -> Recommendations:
        """The `k` best items after every history, over the whole catalogue.

        Args:
            histories: item ids, oldest first; unknown ids are passed over, an empty history gets what leads without it.
            k: how many.
            exclude_seen: leave the history's own items out.

        Raises:
            RecllmError: k is not between 1 and the number of items.
        """
        self.check_k(k)
        queries = [Query(tuple(history)) for history in histories]
        ids: list[list[str]] = []
        scores = np.full((len(queries), k), np.nan, dtype=np.float32)
        shares = {name: np.full((len(queries), k), np.nan, dtype=np.float32) for name in self.scorers}
        at_once = max(1, min(USERS_IN_BATCH, PLACES_AT_ONCE // k))
        for start in range(0, len(queries), at_once):
            part = queries[start : start + at_once]
            rows, best, parts = self._top(part, k, exclude_seen)
            place = slice(start, start + len(part))
            scores[place] = best
            for at, name in enumerate(self.scorers):
                shares[name][place] = parts[:, at]
            ids.extend([self.index.ids[row] for row in line if row >= 0] for line in rows)
        return Recommendations(ids, scores, shares)

    def check_k(self, k: int) -> None:
        """Check that so many items can be recommended.

        Raises:
            RecllmError: k is not between 1 and the number of items.
        """
        if not 1 <= k <= len(self.index):
            raise RecllmError(
                f"k={k} is not possible: the catalogue has {len(self.index):,} items. Take 1 to that many."
            )

    def _top(self, queries: Sequence[Query], k: int, exclude_seen: bool) -> tuple[Any, Any, Any]:
        places, order = self._items.places, self._items.order
        seen = [places[self.index.known(query.history)].tolist() if exclude_seen else [] for query in queries]
        feeds = {f"{name}_queries": scorer.query_vectors(queries) for name, scorer in self.scorers.items()}
        counts = {
            "n_user": evidence(queries, ItemIndex(()), self.item_counts)[0],
            "seen": padded([[*row, -1] for row in seen], -1),
            "k": np.array([k], dtype=np.int64),
        }
        rows, scores, shares = self._catalogue.run(None, feeds | self._items.feeds | counts)
        return np.where(rows < 0, -1, order[rows]), scores, shares

    def score(self, histories: Sequence[Sequence[str]], items: Sequence[str]) -> tuple[Scores, dict[str, Scores]]:
        """Fused scores of `items`, float32[histories, items], standardised over the whole catalogue, and their shares.

        Raises:
            RecllmError: an item that the catalogue has not.
        """
        rows = self.index.rows(items)
        if (rows < 0).any():
            raise unknown("item", items[int(np.argmin(rows))], self.index.ids)
        queries = [Query(tuple(history)) for history in histories]
        scores = {name: scorer.score(queries, self.index) for name, scorer in self.scorers.items()}
        fused, shares = self.fusion.fuse(scores, *evidence(queries, self.index, self.item_counts))
        return fused[:, rows], {name: share[:, rows] for name, share in shares.items()}

    def with_items(self, records: Sequence[Mapping[str, str]]) -> "Recommender":
        """The same recommender with new items, known by their text alone; nothing is trained.

        Args:
            records: per item `item_id`, `title` and any text column of the catalogue.

        Raises:
            RecllmError: a known id, an unknown column, or a bundle without an encoder.
        """
        if self._item_encoder is None:
            raise RecllmError("This bundle has no item encoder, so it cannot take new items. Export it again.")
        catalog = self.catalog.with_items(records)
        new = [catalog.record(item_id) for item_id in catalog.ids[len(self.index) :]]
        text = self._item_encoder(new)
        scorers = {
            name: _grown(scorer, catalog, text, self._item_graphs.get(name)) for name, scorer in self.scorers.items()
        }
        if "neighbours" in scorers and isinstance(similar := scorers.get("text"), TextSimilarity):
            alike = cast(Neighbours, self.scorers["neighbours"]).grown(catalog, similar.vectors)
            scorers |= {name: _borrowing(scorer, alike) for name, scorer in scorers.items()} | {"neighbours": alike}
        return Recommender(
            catalog=catalog,
            scorers=scorers,
            fusion=self.fusion,
            item_counts=self.item_counts,
            catalogue=self._catalogue,
            item_encoder=self._item_encoder,
            item_graphs=self._item_graphs,
            manifest=self.manifest,
        )


def _grown(scorer: VectorScorer, catalog: Catalog, text: NDArray[np.float32], graph: Any) -> VectorScorer:  # noqa: ANN401
    """A scorer that knows the new items at the catalogue's end by their text; one that reads none stays as it is."""
    index = ItemIndex(catalog.ids)
    if isinstance(scorer, Popularity):
        old = scorer.item_vectors(ItemIndex(index.ids[: len(index) - len(text)]))[:, 0]
        return Popularity(index, np.concatenate([old, np.zeros(len(text), dtype=np.float32)]))
    if isinstance(scorer, TextSimilarity):
        return TextSimilarity(index, np.concatenate([scorer.vectors, text]), scorer.half_life)
    if not isinstance(scorer, TableScorer):
        return scorer
    factors = np.full((len(text), graph.get_inputs()[1].shape[1]), np.nan, dtype=np.float32)
    tokens, heads = graph.run(None, {"text": text, "factors": factors})
    return scorer.grown(index, tokens, np.where(np.isnan(text[:, :1]), np.float32(np.nan), heads))


def _borrowing(scorer: VectorScorer, alike: Neighbours) -> VectorScorer:
    """A sequence scorer whose new items take the mean head and bias of the known items most like them."""
    if not isinstance(scorer, TableScorer):
        return scorer
    rows = np.where(alike.known, -1, np.arange(len(alike.known)))
    borrowed = alike.means(scorer.items, rows)
    items = np.where(np.isnan(borrowed), scorer.items, borrowed)
    heads, bias = items[:, :-1], items[:, -1]
    return TableScorer(scorer.graph, scorer.table, scorer.history, scorer.index, heads, bias, scorer.cold_bias)


def load(folder: str | os.PathLike[str], *, provider: str = "cpu", threads: int = 0) -> Recommender:
    """Load a bundle; neither torch nor transformers is imported.

    Args:
        folder: the bundle.
        provider: cpu, cuda or tensorrt; never another one than asked for.
        threads: inside one operator; 0 leaves it to ONNX Runtime.

    Raises:
        RecllmError: not a bundle, damaged, or the provider is not there.
    """
    place = Path(folder)
    manifest = read_manifest(place)
    if "scorers" not in manifest:
        raise RecllmError(
            f"'{place}' is a bundle that ranks candidates. It recommends behind one of the catalogue (recllm recommend "
            f"BUNDLE --ranker {place}), and scores the candidates that rows name: recllm score --bundle {place}"
        )
    catalog = read_catalog(place)
    arrays = load_file(place / VECTORS)
    index = ItemIndex(catalog.ids)

    def session(name: str) -> Any:  # noqa: ANN401  onnxruntime is untyped
        return open_session(place / name, provider, threads)

    scorers = {
        name: _load_scorer(place, name, kind, index, arrays, session) for name, kind in manifest["scorers"].items()
    }
    encoder = None
    if (place / "encoder.onnx").is_file():
        prompt = compile_prompt(
            load_prompt(str(place / "item.toml")), Tokenizer.from_file(str(place / "tokenizer.json"))
        )
        encoder = ItemEncoder(
            session("encoder.onnx"), prompt, Standard(arrays["text.mean"], arrays["text.scale"].item())
        )
    return Recommender(
        catalog=catalog,
        scorers=scorers,
        fusion=Fusion.load(place / "fusion.json"),
        item_counts=dict(zip(catalog.ids, arrays["item_counts"].tolist(), strict=True)),
        catalogue=session("catalogue.onnx"),
        item_encoder=encoder,
        item_graphs={
            name: session(f"{name}-items.onnx") for name in scorers if (place / f"{name}-items.onnx").is_file()
        },
        manifest=manifest,
    )


def _load_scorer(
    folder: Path,
    name: str,
    kind: str,
    index: ItemIndex,
    arrays: Mapping[str, NDArray[Any]],
    session: Callable[[str], Any],
) -> VectorScorer:
    if kind in FITTED:
        return FITTED[kind].load(folder / "cf")
    if kind != "sequence":
        raise unknown("kind of scorer in the bundle", kind, [*FITTED, "sequence"])
    history = HistoryFormat.from_dict(read_json(folder / f"{name}.json"))
    table, heads, bias, cold_bias = (arrays[f"{name}.{part}"] for part in ("table", "heads", "bias", "cold_bias"))
    return TableScorer(session(f"{name}.onnx"), table, history, index, heads, bias, cold_bias.item())

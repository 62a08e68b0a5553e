"""Recommend from a bundle with ONNX Runtime, without torch: `recllm.load(folder).recommend(histories, k=10)`."""

import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from recllm.arrayfiles import read_tensors
from recllm.arriving import knowing
from recllm.bundle import read_catalog, read_manifest, read_steadily, state, understood
from recllm.catalogue import KNOWN_BARRED, prepare
from recllm.data import Catalog, Query
from recllm.errors import RecllmError, unknown
from recllm.expectation import ExpectedPopularity
from recllm.files import read_json
from recllm.fusion import Fusion, evidence
from recllm.graphscorer import TableScorer
from recllm.histories import HistoryFormat, padded
from recllm.itemitem import EASE, Transitions
from recllm.likelihood import NAME_GRAPH, NAME_PROMPT, NAME_TOKENIZER, Likelihood, NameReader
from recllm.likeness import ToldVectors
from recllm.mf import ImplicitMF
from recllm.neighbours import Neighbours
from recllm.priors import Popularity, TextSimilarity
from recllm.prompts import CompiledPrompt, compile_prompt, load_prompt
from recllm.ranking import ItemIndex, Scores, VectorScorer, mask_seen
from recllm.reordering import FIRST
from recllm.reserved import Lists, reserve
from recllm.sessions import compute, open_session, placed
from recllm.shortlist import EXACT, LISTED, Shortlist, check_kind, recall
from recllm.vectors import Standard

USERS_IN_BATCH = 64
MOST_BARRED = 10_000
"""Items left out of all lists that go with an index, which lists as many more for every user."""
PLACES_AT_ONCE = 65_536
"""The most places of all users' lists in one call: each takes a copy of its item's vectors."""
SAMPLED = 64
"""Histories of a single item on which an index is set and measured."""
VECTORS = "vectors.safetensors"
"""The bundle's file of item vectors."""
FITTED: dict[str, Any] = {
    "popularity": Popularity,
    "likelihood": Likelihood,
    "mf": ImplicitMF,
    "ease": EASE,
    "transitions": Transitions,
    "text": TextSimilarity,
    "neighbours": Neighbours,
    "expected_popularity": ExpectedPopularity,
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


def check_histories(histories: Sequence[Sequence[str]]) -> None:
    """Check that histories are lists of ids: a text is a list of letters, and a number is nobody's id.

    Raises:
        RecllmError: one is not.
    """
    if not isinstance(histories, Sized):
        raise RecllmError(f"Histories are a list of lists of item ids, and these are {histories!r:.60}.")
    for place, history in enumerate(histories):
        if isinstance(histories, str) or isinstance(history, str):
            raise RecllmError(f"Histories are lists of item ids, and the one at {place} is the text {history!r:.60}.")
        if not isinstance(history, Sized):  # nor what can be read once only
            raise RecllmError(f"Histories are lists of item ids, and the one at {place} is {history!r:.60}.")
        for wrong in (item for item in history if not isinstance(item, str)):
            raise RecllmError(f"The history at {place} has {wrong!r:.60}, and item ids are text: str({wrong!r:.60}).")


def check_items(items: Collection[str]) -> None:
    """Check that items are a list of ids.

    Raises:
        RecllmError: they are a text, or one of them is none.
    """
    if isinstance(items, str):
        raise RecllmError(f"Items are a list of ids, and these are the text {items!r:.60}.")
    if not isinstance(items, Sized):
        raise RecllmError(f"Items are a list of ids, and these are {items!r:.60}.")
    for wrong in (item for item in items if not isinstance(item, str)):
        raise RecllmError(f"Items have {wrong!r:.60} among them, and ids are text: str({wrong!r:.60}).")


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
        name_reader: NameReader | None = None,
        item_graphs: Mapping[str, Any],
        manifest: Mapping[str, Any],
        kind: str = EXACT,
        threads: int = 0,
        left_out: Collection[str] = (),
    ) -> None:
        self.catalog, self.scorers, self.fusion = catalog, dict(scorers), fusion
        self.item_counts, self.manifest = dict(item_counts), manifest
        self._catalogue, self._item_encoder, self._item_graphs = catalogue, item_encoder, item_graphs
        self._name_reader = name_reader
        self.index = ItemIndex(catalog.ids)
        vectors = {name: scorer.item_vectors(self.index) for name, scorer in self.scorers.items()}
        self._counts = counts = evidence([], self.index, self.item_counts)[1]
        self._kind, self._threads = kind, threads
        prepared = prepare(fusion, vectors, counts, {own.name for own in catalogue.get_inputs()})
        self._order, self._places = prepared.order, prepared.places
        self._left_out = frozenset(left_out)
        self._barred = self._places[self.index.known(sorted(self._left_out))]
        if kind != EXACT and len(self._barred) > MOST_BARRED:
            raise RecllmError(
                f"{len(self._barred):,} items are left out of all lists, and an index lists them and as many more for "
                f"every user: up to {MOST_BARRED:,} go with the index '{kind}'. Leave it out, or export without them."
            )
        new = np.append(counts < fusion.few, False)  # the last one stands for place −1
        self._new_places = np.flatnonzero(new[self._order])
        self._shortlist: Shortlist | None = None
        if kind != EXACT:
            at = np.append(counts, 0)[self._order]
            samples = self._vectors(self._sample(SAMPLED))
            self._shortlist = Shortlist(fusion, prepared, at, kind=kind, samples=samples, threads=threads)
            self._feeds: dict[str, Any] = {}  # the shortlist has them in rows
        else:
            self._feeds = placed(catalogue, prepared.feeds)

    @property
    def exclude_seen(self) -> bool:
        """Whether lists leave out what the history has: not where items were chosen again in training."""
        return not self.manifest.get("repeats", False)

    def learnt(self, query: Query) -> Query:
        """The query with a history as training had it: each item once, at its first or its last place, or as it is."""
        rule = self.manifest.get("each_once")  # bundles from before do not say it, and take histories as they are
        if rule is None or len(set(query.history)) == len(query.history):
            return query
        places = range(len(query.history))
        at = {query.history[place]: place for place in (places if rule == "last" else reversed(places))}
        kept = sorted(at.values())
        ratings = None if query.ratings is None else tuple(query.ratings[place] for place in kept)
        return replace(query, history=tuple(query.history[place] for place in kept), ratings=ratings)

    @property
    def share_names(self) -> tuple[str, ...]:
        """Whose shares a score has."""
        return self.fusion.share_names

    def recommend(
        self, histories: Sequence[Sequence[str]], k: int = 10, *, exclude_seen: bool | None = None, new_items: int = 0
    ) -> Recommendations:
        """The `k` best items after every history, over the whole catalogue.

        Args:
            histories: item ids, oldest first; unknown ids are passed over, an empty history gets what leads without it.
            k: how many.
            exclude_seen: leave the history's own items out; None does as the bundle was trained and measured.
            new_items: how many of the k at least are new items, those of few events; the best of them, behind the rest
                where they are not among the best anyway.

        Raises:
            RecllmError: k is not between 1 and the number of items, new items cannot be told apart, or a history is no
                list of ids.
        """
        self.check_k(k, new_items)
        exclude_seen = self.exclude_seen if exclude_seen is None else exclude_seen
        check_histories(histories)
        queries = [self.learnt(Query(tuple(history))) for history in histories]
        ids: list[list[str]] = []
        scores = np.full((len(queries), k), np.nan, dtype=np.float32)
        shares = {name: np.full((len(queries), k), np.nan, dtype=np.float32) for name in self.share_names}
        asked = max(k, self._asked)
        at_once = max(1, min(USERS_IN_BATCH, PLACES_AT_ONCE // asked))
        for start in range(0, len(queries), at_once):
            part = queries[start : start + at_once]
            vectors = self._vectors(part)
            every = self._reordered(self._top(part, vectors, asked, exclude_seen), part)
            found = every.first(k)
            if new_items:
                new = self._best_new(part, vectors, new_items, exclude_seen)
                found = reserve(found, new if self.fusion.network is None else new.with_share(every.share_of(new.rows)))
            place = slice(start, start + len(part))
            scores[place] = found.scores
            for at, name in enumerate(self.share_names):
                shares[name][place] = found.shares[:, at]
            ids.extend([self.index.ids[row] for row in line if row >= 0] for line in found.rows)
        return Recommendations(ids, scores, shares)

    def check_k(self, k: int, new_items: int = 0) -> None:
        """Check that so many items can be recommended, and so many of them be new.

        Raises:
            RecllmError: k is not between 1 and the number of items, or new items cannot be told apart.
        """
        for name, count in (("k", k), ("new_items", new_items)):
            if isinstance(count, bool) or not isinstance(count, int | np.integer):
                raise RecllmError(f"{name}={count!r} is not possible: a whole number is expected.")
        there = self.most
        if not 1 <= k <= there:
            left_out = f", of which {len(self._barred):,} are left out" if len(self._barred) else ""
            raise RecllmError(
                f"k={k} is not possible: the catalogue has {len(self.index):,} items{left_out}. Take 1 to {there:,}."
            )
        if not 0 <= new_items <= k:
            raise RecllmError(f"{new_items} new items do not go into a list of {k}. Take 0 to {k}.")
        if new_items and self.fusion.new is None:
            raise RecllmError(
                "New items have no weights of their own in this bundle's fusion, so no places are kept for them. Train "
                "with a fusion.new_share above 0 and more validation rows, or leave --new-items out."
            )
        if new_items and KNOWN_BARRED not in {own.name for own in self._catalogue.get_overridable_initializers()}:
            raise RecllmError("This bundle was exported before places could be kept for new items. Export it again.")

    def is_new(self, item: str) -> bool:
        """Whether an item has so few events that the fusion has weights of their own for such."""
        return self.item_counts.get(item, 0) < self.fusion.few

    def recall(self, histories: Sequence[Sequence[str]] | None = None, k: int = 10) -> float:
        """The share of the exact `k` best that the index gives, seen items left out; 1 without an index.

        Args:
            histories: item ids; drawn ones of a single item each where not given.
            k: how many.

        Raises:
            RecllmError: k is not between 1 and the number of items, or a history is no list of ids.
        """
        self.check_k(k)
        check_histories([] if histories is None else histories)
        queries = self._sample(SAMPLED) if histories is None else [self.learnt(Query(tuple(own))) for own in histories]
        if self._shortlist is None or not queries:
            return 1.0
        parts = [queries[start : start + SAMPLED] for start in range(0, len(queries), SAMPLED)]
        found = [self._best_and_found(part, k) for part in parts]
        return recall(*(np.concatenate(each) for each in zip(*found, strict=True)))

    def _best_and_found(self, queries: Sequence[Query], k: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows of the exact best and of those that the index gives, int64[queries, k] each."""
        assert self._shortlist is not None
        vectors, asked = self._vectors(queries), max(k, self._asked)
        found = self._reordered(self._top(queries, vectors, asked, exclude_seen=True), queries)
        best = Lists.empty(len(queries), len(self.scorers))
        for start in range(0, len(self._order), PLACES_AT_ONCE):
            stop = min(start + PLACES_AT_ONCE, len(self._order))
            listed = np.tile(np.arange(start, stop), (len(queries), 1))
            best = best.merged(self._ranked(queries, vectors, min(asked, stop - start), True, listed), asked)
        return self._reordered(best, queries).first(k).rows, found.first(k).rows

    def _sample(self, count: int) -> list[Query]:
        """Histories of a single item, drawn by a fixed seed from the items with events."""
        known = [item for item in self.index.ids if self.item_counts.get(item)]
        drawn = np.random.default_rng(0).permutation(len(known))[:count]
        return [Query((known[place],)) for place in drawn]

    def _vectors(self, queries: Sequence[Query]) -> dict[str, NDArray[np.float32]]:
        return {name: scorer.query_vectors(queries) for name, scorer in self.scorers.items()}

    def _top(
        self, queries: Sequence[Query], vectors: Mapping[str, NDArray[np.float32]], k: int, exclude_seen: bool
    ) -> Lists:
        places = None
        if self._shortlist is not None:
            own = max(LISTED, 2 * k) + np.array([len(query.history) * exclude_seen for query in queries])
            own += len(self._barred)
            n_user = evidence(queries, ItemIndex(()), self.item_counts)[0]
            places = self._shortlist.find(vectors, n_user, own)
        return self._ranked(queries, vectors, k, exclude_seen, places)

    def _ranked(
        self,
        queries: Sequence[Query],
        vectors: Mapping[str, NDArray[np.float32]],
        k: int,
        exclude_seen: bool,
        listed: NDArray[np.int64] | None,
        *,
        only_new: bool = False,
    ) -> Lists:
        """The best among all items, or among those `listed` per query (places, −1 none), and of them the new ones."""
        seen = [
            np.append(self._places[self.index.known(query.history if exclude_seen else ())], self._barred)
            for query in queries
        ]
        feeds, order = self._feeds, self._order
        if self._shortlist is not None and listed is not None:
            places = self._shortlist.together(listed)
            feeds, order = self._shortlist.feeds(places), order[places]
            # What only another query of this batch has listed is left out too: no answer may hang on its company.
            barred = [~np.isin(places, own) | np.isin(places, gone) for own, gone in zip(listed, seen, strict=True)]
            seen = [np.flatnonzero(own) for own in barred]
        counts = {
            "n_user": evidence(queries, ItemIndex(()), self.item_counts)[0],
            "seen": padded([[*row.tolist(), -1] for row in seen], -1),
            "k": np.array([k], dtype=np.int64),
        }
        given = {f"{name}_queries": own for name, own in vectors.items()}
        if only_new:
            given[KNOWN_BARRED] = np.ones(1, dtype=np.float32)
        rows, scores, shares = compute(self._catalogue, given | feeds | counts)
        nothing = rows < 0
        # The graph computes shares of whatever item stands there; behind the last one there is none.
        shares = np.where(nothing[:, None], np.float32(np.nan), shares)
        return Lists(np.where(nothing, -1, order[rows]), scores, shares)

    def _reordered(self, found: Lists, queries: Sequence[Query]) -> Lists:
        """The lists once the network has put their first places in order again."""
        network = self.fusion.network
        if network is None:
            return found
        n_user, n_item = evidence(queries, ItemIndex(()), self.item_counts)[0], self._counts[found.rows[:, :FIRST]]
        more = np.where(found.rows < 0, np.float32(np.nan), np.float32(0))
        more[:, :FIRST] += network.added(found.shares[:, :, :FIRST], n_user, n_item, self.fusion.few)
        every = found.with_share(more)
        return every.merged(Lists.empty(len(queries), len(self.share_names)), found.rows.shape[1])

    @property
    def _asked(self) -> int:
        """The least length of a list whose first places the network can put in order."""
        return 1 if self.fusion.network is None else min(FIRST, len(self.index))

    def _best_new(
        self, queries: Sequence[Query], vectors: Mapping[str, NDArray[np.float32]], count: int, exclude_seen: bool
    ) -> Lists:
        if self._shortlist is None:
            return self._ranked(queries, vectors, count, exclude_seen, None, only_new=True)
        # All of them, whatever a search would find.
        found = Lists.empty(len(queries), len(self.scorers))
        for start in range(0, len(self._new_places), PLACES_AT_ONCE):
            listed = np.tile(self._new_places[start : start + PLACES_AT_ONCE], (len(queries), 1))
            most = min(count, listed.shape[1])
            found = found.merged(self._ranked(queries, vectors, most, exclude_seen, listed, only_new=True), count)
        return found

    def score(
        self, histories: Sequence[Sequence[str]], items: Sequence[str], *, exclude_seen: bool | None = None
    ) -> tuple[Scores, dict[str, Scores]]:
        """Fused scores of `items`, float32[histories, items], standardised over the whole catalogue, and their shares.

        Args:
            histories: as `recommend` takes them.
            items: ids of the catalogue.
            exclude_seen: whether the first places, which a network puts in order again, leave out the history's items,
                so that these get nothing of its; None does as the bundle was trained and measured.

        Raises:
            RecllmError: an item that the catalogue has not, or what is no list of ids.
        """
        check_histories(histories)
        check_items(items)
        rows = self.index.rows(items)
        if (rows < 0).any():
            raise unknown("item", items[int(np.argmin(rows))], self.index.ids)
        scores = np.zeros((len(histories), len(rows)), dtype=np.float32)
        shares = {name: np.zeros_like(scores) for name in self.share_names}
        exclude_seen = self.exclude_seen if exclude_seen is None else exclude_seen
        # Every scorer's scores of the whole catalogue are in memory at once.
        for start in range(0, len(histories), USERS_IN_BATCH):
            queries = [self.learnt(Query(tuple(own))) for own in histories[start : start + USERS_IN_BATCH]]
            place = slice(start, start + len(queries))
            own = {name: scorer.score(queries, self.index) for name, scorer in self.scorers.items()}
            counts = evidence(queries, self.index, self.item_counts)
            fused, parts = self.fusion.fuse(own, *counts)
            if self.fusion.network is not None:
                barred = np.isnan(mask_seen(fused, queries, self.index)) if exclude_seen else None
                if len(self._barred):
                    barred = np.zeros(fused.shape, dtype=bool) if barred is None else barred
                    barred[:, self._order[self._barred]] = True
                fused, parts = self.fusion.reordered(fused, parts, *counts, barred)
            scores[place] = fused[:, rows]
            for name, share in parts.items():
                shares[name][place] = share[:, rows]
        return scores, shares

    @property
    def most(self) -> int:
        """How many items a list may have."""
        return len(self.index) - len(self._barred)

    @property
    def left_out(self) -> frozenset[str]:
        """Ids of items that are in no list: those that were removed from the bundle, and what `restricted` names."""
        return self._left_out

    def restricted(self, *, only: Collection[str] | None = None, without: Collection[str] = ()) -> "Recommender":
        """The same recommender whose lists have only some items; the others still count in histories.

        Scores stay what they are: a list is the one of the whole catalogue with items left out.

        Args:
            only: ids of the items that lists may have; None for all.
            without: ids of items that they have not. Ids that the catalogue has not are passed over.

        Raises:
            RecllmError: no item is left, or what is given is no list of ids.
        """
        every = frozenset(self.index.ids)
        for given in (only, without):
            check_items(() if given is None else given)
        left_out = self._left_out.union(without, () if only is None else every.difference(only))
        if every <= left_out:
            raise RecllmError("No item of the catalogue would be left to recommend. Name others.")
        return self._with(self.catalog, self.scorers, self.fusion, left_out)

    def with_fusion(self, fusion: Fusion) -> "Recommender":
        """The same recommender with another fusion of the same scorers."""
        return self._with(self.catalog, self.scorers, fusion)

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
        scorers = knowing(self.scorers, catalog, text, self._item_graphs)
        if isinstance(told := scorers.get("likelihood"), Likelihood) and self._name_reader is not None:
            scorers["likelihood"] = told.grown(ItemIndex(catalog.ids), self._name_reader(new))
        return self._with(catalog, scorers, self.fusion)

    def _with(
        self,
        catalog: Catalog,
        scorers: Mapping[str, VectorScorer],
        fusion: Fusion,
        left_out: Collection[str] | None = None,
    ) -> "Recommender":
        return Recommender(
            catalog=catalog,
            scorers=scorers,
            fusion=fusion,
            item_counts=self.item_counts,
            catalogue=self._catalogue,
            item_encoder=self._item_encoder,
            name_reader=self._name_reader,
            item_graphs=self._item_graphs,
            manifest=self.manifest,
            kind=self._kind,
            threads=self._threads,
            left_out=self._left_out if left_out is None else left_out,
        )


def load(folder: str | os.PathLike[str], *, provider: str = "cpu", threads: int = 0, index: str = EXACT) -> Recommender:
    """Load a bundle; neither torch nor transformers is imported.

    Args:
        folder: the bundle.
        provider: cpu, cuda or tensorrt; never another one than asked for.
        threads: inside one operator; 0 leaves it to ONNX Runtime.
        index: how a large catalogue is searched for what is then ranked: `exact` ranks all of it, `int8` and `faiss`
            find a shortlist first (the extra `index`); see `Recommender.recall`.

    Raises:
        RecllmError: not a bundle, damaged, or the provider or the index is not there.
    """
    check_kind(index)
    if index != EXACT and provider != "cpu":
        raise RecllmError(f"The index '{index}' searches on the CPU. Leave it out, or ask for the provider cpu.")
    place = Path(folder)
    return read_steadily(place, partial(understood, place, partial(_load, place, provider, threads, index)))


def _load(place: Path, provider: str, threads: int, index: str) -> Recommender:
    manifest = read_manifest(place)
    if "scorers" not in manifest:
        raise RecllmError(
            f"'{place}' is a bundle that ranks candidates. It recommends behind one of the catalogue (recllm recommend "
            f"BUNDLE --ranker {place}), and scores the candidates that rows name: recllm score --bundle {place}"
        )
    catalog = read_catalog(place)
    arrays = read_tensors(place / VECTORS)
    rows = ItemIndex(catalog.ids)

    def session(name: str) -> Any:  # noqa: ANN401  onnxruntime is untyped
        return open_session(place / name, provider, threads)

    scorers = {
        name: _load_scorer(place, name, kind, rows, arrays, session) for name, kind in manifest["scorers"].items()
    }
    encoder = None
    if (place / "encoder.onnx").is_file():
        prompt = _read_prompt(place / "item.toml", place / "tokenizer.json", manifest.get("item_positions"))
        encoder = ItemEncoder(
            session("encoder.onnx"), prompt, Standard(arrays["text.mean"], arrays["text.scale"].item())
        )
    names = None
    if (place / NAME_GRAPH).is_file():
        prompt = _read_prompt(place / NAME_PROMPT, place / NAME_TOKENIZER, manifest.get("name_positions"), ended=False)
        names = NameReader(_while_there(place, partial(session, NAME_GRAPH)), prompt)
    return Recommender(
        catalog=catalog,
        scorers=scorers,
        fusion=Fusion.load(place / "fusion.json"),
        item_counts=dict(zip(catalog.ids, arrays["item_counts"].tolist(), strict=True)),
        catalogue=session("catalogue.onnx"),
        item_encoder=encoder,
        name_reader=names,
        item_graphs={
            name: session(f"{name}-items.onnx") for name in scorers if (place / f"{name}-items.onnx").is_file()
        },
        manifest=manifest,
        kind=index,
        threads=threads,
        left_out=manifest.get("removed", ()),
    )


def _while_there(place: Path, opened: Callable[[], Any]) -> Callable[[], Any]:
    """What opens a graph of a bundle late; refused where another bundle lies there by then."""
    loaded = state(place)

    def late() -> Any:  # noqa: ANN401  onnxruntime is untyped
        session = opened() if state(place) == loaded else None
        if session is None or state(place) != loaded:
            raise RecllmError(
                f"'{place}' was replaced after it was loaded, and names are read by a graph in it. Load it again."
            )
        return session

    return late


def _read_prompt(prompt: Path, tokenizer: Path, positions: int | None, *, ended: bool = True) -> CompiledPrompt:
    read = Tokenizer.from_file(str(tokenizer))
    return compile_prompt(load_prompt(str(prompt)), read, positions=positions, ended=ended)


def _load_scorer(
    folder: Path,
    name: str,
    kind: str,
    index: ItemIndex,
    arrays: Mapping[str, NDArray[Any]],
    session: Callable[[str], Any],
) -> VectorScorer:
    if re.fullmatch(r"[\w-]+", name) is None:
        raise RecllmError(f"'{folder}' has a scorer '{name}', which is no name of a file in it; it is not opened.")
    if kind in FITTED:
        return FITTED[kind].load(folder / "cf")
    if kind != "sequence":
        raise unknown("kind of scorer in the bundle", kind, [*FITTED, "sequence"])
    history = HistoryFormat.from_dict(read_json(folder / f"{name}.json"))
    table, heads, bias, cold_bias = (arrays[f"{name}.{part}"] for part in ("table", "heads", "bias", "cold_bias"))
    if history.texts is not None:  # bundles that have grown before their texts did are still about
        history = replace(history, texts=history.texts + (None,) * (len(heads) - len(history.texts)))
    told = ToldVectors.read(arrays, name)
    return TableScorer(session(f"{name}.onnx"), table, history, index, heads, bias, cold_bias.item(), told)

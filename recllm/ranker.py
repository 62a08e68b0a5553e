"""The ranker: a relevance model from its bundle, and a catalogue's best reordered by it; neither needs torch."""

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from recllm.bundle import read_catalog, read_manifest, read_steadily, understood
from recllm.data import Catalog, Query
from recllm.errors import RecllmError, unknown
from recllm.files import read_json
from recllm.fitting import moments, standardised
from recllm.onnxreader import OnnxReader
from recllm.pointwise import PointwiseScorer
from recllm.prompts import CompiledPrompt, compile_prompt, load_prompt
from recllm.ranking import ItemIndex, Scores
from recllm.reserved import with_new
from recllm.runtime import Recommendations, Recommender, check_histories, check_items
from recllm.sessions import check_integer_products

Say = Callable[[str], None]
SETTINGS, PROMPT = "ranker.json", "relevance.toml"
KIND = "ranker"
"""The manifest's `kind` of a bundle that ranks; one that recommends has none."""
ROUNDED = 1e-4
"""Answers that differ by less than this part of the largest do not: standardised, their last digits, which hang on what
is computed beside them, would decide."""
RANKER_SHARE = "ranker"
"""The ranker's name among the shares."""
CANDIDATES_AT_ONCE = 25
"""Candidates that are judged between two looks at the clock, where there is a limit of time."""


class RanksLists(Protocol):
    """A scorer that takes each query's own candidates."""

    def score_lists(self, queries: Sequence[Query], items: Sequence[Sequence[str]]) -> list[NDArray[np.float32]]:
        """Per query float32[its candidates], NaN where nothing is known."""
        ...


@dataclass(frozen=True)
class RankerSettings:
    """What a ranker bundle says of its model.

    Attributes:
        max_tokens: the longest prompt.
        max_history: how many of the last items are written.
        like_at: the rating from which an item counts as liked.
        calibrated: whether the score after an empty history is taken off.
        soft_from: the token of the catalogue's first item; None where items have none.
        history_stride: a longer history begins at a multiple of so many items.
    """

    max_tokens: int
    max_history: int
    like_at: float
    calibrated: bool
    soft_from: int | None = None
    history_stride: int = 1


class Ranker(PointwiseScorer):
    """A loaded ranker bundle, a scorer of whatever candidates it is given."""

    def __init__(
        self, reader: OnnxReader, catalog: Catalog, prompt: CompiledPrompt, *, calibrated: bool, keep: int
    ) -> None:
        super().__init__(reader, prompt, catalog, calibrated, keep)
        # Nothing is read from the bundle's folder any more: another one may lie there.
        self._with_catalog = partial(type(self), reader, prompt=prompt, calibrated=calibrated, keep=keep)

    def with_items(self, records: Sequence[Mapping[str, str]]) -> "Ranker":
        """The same ranker with new items, known by their text alone; nothing is trained, and no history kept.

        Args:
            records: per item `item_id`, `title` and any text column of the catalogue.

        Raises:
            RecllmError: a known id, an unknown column, or a ranker whose items have tokens of their own, which new
                ones have not.
        """
        if self.reader.soft_from is not None:
            raise RecllmError(
                "This ranker knows its items by tokens of their own (model.soft_tokens): it takes no new ones."
            )
        return self._with_catalog(catalog=self.catalog.with_items(records))

    def rank(
        self,
        histories: Sequence[Sequence[str]],
        items: Sequence[str],
        ratings: Sequence[Sequence[float | None] | None] | None = None,
    ) -> Scores:
        """Scores of `items` after every history, float32[histories, items]; NaN where nothing is known.

        Args:
            histories: item ids, oldest first; an item without text is passed over.
            items: the candidates.
            ratings: as long as the histories, where liked and disliked items are to be told apart; None: not rated.

        Raises:
            RecllmError: an item that the catalogue has not, what is no list of ids, or ratings of another length than
                their history.
        """
        check_histories(histories)
        check_items(items)
        for item in items:
            if item not in self.catalog:
                raise unknown("item", item, self.catalog.ids)
        queries = _queries(histories, ratings)
        return np.array(self.score_lists(queries, [items] * len(queries))).reshape(len(queries), len(items))


def load_ranker(
    folder: str | os.PathLike[str], *, provider: str = "cpu", threads: int = 0, keep_bytes: int = 256 << 20
) -> Ranker:
    """Load a ranker bundle; neither torch nor transformers is imported.

    Args:
        folder: the bundle, as `recllm export` wrote it of a run that judges pairs.
        provider: cpu, cuda or tensorrt; never another one than asked for.
        threads: inside one operator; 0 leaves it to ONNX Runtime.
        keep_bytes: memory for the histories of returning users, which are not read again; 0 keeps none.

    Raises:
        RecllmError: not a ranker bundle, damaged, or the provider is not there.
    """
    place = Path(folder)
    return read_steadily(place, partial(understood, place, partial(_load, place, provider, threads, keep_bytes)))


def _load(place: Path, provider: str, threads: int, keep_bytes: int) -> Ranker:
    read_manifest(place)
    if not is_ranker(place):
        raise RecllmError(f"'{place}' is a bundle that recommends, not one that ranks. Load it with recllm.load.")
    settings = RankerSettings(**read_json(place / SETTINGS))
    check_integer_products(place, provider)
    reader = OnnxReader.open(place, settings.max_tokens, provider, threads, settings.soft_from)
    own = {"max_history": settings.max_history, "history_stride": settings.history_stride}
    prompt = load_prompt(str(place / PROMPT), task="relevance").model_copy(update=own)
    tokenizer = Tokenizer.from_file(str(place / "tokenizer.json"))
    compiled = compile_prompt(prompt, tokenizer, settings.like_at)
    return Ranker(reader, read_catalog(place), compiled, calibrated=settings.calibrated, keep=keep_bytes)


def is_ranker(folder: Path) -> bool:
    """Whether a bundle ranks candidates.

    Raises:
        RecllmError: not a bundle.
    """
    return read_manifest(folder, verify=False).get("kind") == KIND


def behind(recommender: Recommender, ranker: Ranker, folder: str | os.PathLike[str], say: Say) -> Ranker:
    """The ranker with the text of the recommender's items that it has not, as of those that were added to a bundle.

    Args:
        recommender: has the items.
        ranker: is to stand behind it.
        folder: of the ranker, for messages.
        say: gets a line where the ranker lacks some.

    Raises:
        RecllmError: the ranker has no item of the recommender.
    """
    items = recommender.index.ids
    lacking = [item for item in items if item not in ranker.catalog]
    if len(lacking) == len(items):
        raise RecllmError(f"'{folder}' knows no item of the bundle before it: they are of two catalogues.")
    if not lacking:
        return ranker
    known = f"The ranker knows {len(items) - len(lacking):,} of {len(items):,} items"
    if ranker.reader.soft_from is not None:
        say(f"{known}; the others keep their first score")
        return ranker
    say(f"{known}; it reads the others' text in the bundle before it")
    columns = ranker.catalog.frame.columns
    records = [recommender.catalog.record(item) for item in lacking]
    return ranker.with_items([{key: text for key, text in own.items() if key in columns} for own in records])


@dataclass(frozen=True, eq=False)
class TwoStage:
    """Retrieve with the whole-catalogue graph, judge its best by a ranker, and add both scores, standardised.

    Attributes:
        recommender: retrieves.
        ranker: judges; an item that it does not know keeps its first score.
        top: how many items of each user are judged.
        weight: of the ranker's score beside the first one.
        seconds: the most time per user that judging may take, looked at after every 25 candidates of all users; what
            is not judged by then stands behind what is. None: no limit, and the same answer every time.
    """

    recommender: Recommender
    ranker: RanksLists
    top: int = 100
    weight: float = 1.0
    seconds: float | None = None

    def __post_init__(self) -> None:
        # Asked so that NaN fails too.
        if not (self.top >= 1 and 0 <= self.weight < math.inf and (self.seconds is None or self.seconds > 0)):
            raise RecllmError(
                f"top={self.top}, weight={self.weight} and seconds={self.seconds}: the first must be at least 1, the "
                "second finite and not negative, the third positive."
            )

    @property
    def index(self) -> ItemIndex:
        """The catalogue's items."""
        return self.recommender.index

    @property
    def catalog(self) -> Catalog:
        """The catalogue."""
        return self.recommender.catalog

    @property
    def exclude_seen(self) -> bool:
        """As `Recommender.exclude_seen`."""
        return self.recommender.exclude_seen

    @property
    def share_names(self) -> tuple[str, ...]:
        """Whose shares a score has."""
        return (*self.recommender.share_names, RANKER_SHARE)

    def check_k(self, k: int, new_items: int = 0) -> None:
        """As `Recommender.check_k`.

        Raises:
            RecllmError: as there.
        """
        self.recommender.check_k(k, new_items)

    def recommend(
        self,
        histories: Sequence[Sequence[str]],
        k: int = 10,
        *,
        exclude_seen: bool | None = None,
        new_items: int = 0,
        ratings: Sequence[Sequence[float | None] | None] | None = None,
    ) -> Recommendations:
        """The `k` best items after every history, with the ranker's share beside the others.

        Where places are kept for new items, both stages keep them: so many are judged, and the best of them by both
        scores take the places of the last known ones.

        Args:
            histories: as `Recommender.recommend` takes them.
            k: how many.
            exclude_seen: as `Recommender.recommend` takes it.
            new_items: likewise.
            ratings: as long as the histories, or None, for the ranker to tell liked and disliked items apart.

        Raises:
            RecllmError: k is not between 1 and the number of items, new items cannot be told apart, or ratings of
                another length than their history.
        """
        self.recommender.check_k(k, new_items)
        queries = [self.recommender.learnt(query) for query in _queries(histories, ratings)]
        depth = min(max(self.top, k), self.recommender.most)
        first = self.recommender.recommend(histories, depth, exclude_seen=exclude_seen, new_items=new_items)
        if self.top < depth:
            first = self._led(first, min(new_items, self.top))
        judged = self._judged(queries, [ids[: self.top] for ids in first.ids])
        ids: list[list[str]] = []
        scores = np.full((len(judged), k), np.nan, dtype=np.float32)
        shares = {name: np.full((len(judged), k), np.nan, dtype=np.float32) for name in (*first.shares, RANKER_SHARE)}
        for row, own in enumerate(judged):
            count = len(first.ids[row])
            parts = {name: share[row, :count] for name, share in first.shares.items()}
            total, parts = self._fused(first.scores[row, :count], parts, own)
            order = np.lexsort((-total, np.arange(count) >= len(own)))
            order = with_new(order, self._new(first.ids[row]), k, new_items)
            ids.append([first.ids[row][place] for place in order])
            scores[row, : len(order)] = total[order]
            for name, part in parts.items():
                shares[name][row, : len(order)] = part[order]
        return Recommendations(ids, scores, shares)

    def _new(self, items: Sequence[str]) -> NDArray[np.bool_]:
        return np.array([self.recommender.is_new(item) for item in items], dtype=bool)

    def _led(self, first: Recommendations, count: int) -> Recommendations:
        """The lists with so many new items among those that are judged: the places kept for them are at the end."""
        ids, scores = [], first.scores.copy()
        shares = {name: share.copy() for name, share in first.shares.items()}
        for row, own in enumerate(first.ids):
            lead = with_new(np.arange(len(own)), self._new(own), self.top, count)
            order = np.concatenate([lead, np.setdiff1d(np.arange(len(own)), lead)])
            ids.append([own[place] for place in order])
            for mine in (scores, *shares.values()):
                mine[row, : len(order)] = mine[row, order]
        return Recommendations(ids, scores, shares)

    def _judged(self, queries: Sequence[Query], items: Sequence[Sequence[str]]) -> list[NDArray[np.float32]]:
        """The ranker's scores of each query's first items; fewer than there are where the time is up."""
        if self.seconds is None:
            return self.ranker.score_lists(queries, items)
        end = time.monotonic() + self.seconds * len(queries)
        found: list[list[NDArray[np.float32]]] = [[] for _ in queries]
        for start in range(0, max(map(len, items), default=0), CANDIDATES_AT_ONCE):
            part = [own[start : start + CANDIDATES_AT_ONCE] for own in items]
            for own, scores in zip(found, self.ranker.score_lists(queries, part), strict=True):
                own.append(scores)
            if time.monotonic() >= end:
                break
        return [np.concatenate([np.zeros(0, dtype=np.float32), *own]) for own in found]

    def _fused(
        self, scores: NDArray[np.float32], shares: dict[str, NDArray[np.float32]], judged: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], dict[str, NDArray[np.float32]]]:
        """Scores of one user's items, float32[items], and what each scorer has in them; they sum to the scores.

        Both stages are standardised over the items that were judged. Of the others the ranker takes off so much that
        the first of them stands behind the last judged one.
        """
        count = len(judged)
        mean, deviation = moments(scores[None, :count])
        scale = float(deviation[0, 0]) or 1.0
        # Each share gives up its own mean, so that they still sum to the standardised score.
        parts = {
            name: _scaled(share, float(share[:count].mean()) if count else 0.0, scale) for name, share in shares.items()
        }
        total = _scaled(scores, float(mean[0, 0]), scale)
        ranker = np.zeros(len(scores), dtype=np.float32)
        middle, spread = moments(judged[None])
        if spread[0, 0] > ROUNDED * np.fmax.reduce(np.abs(judged), initial=0.0):
            ranker[:count] = self.weight * standardised(judged[None], middle, spread)[0]
        if 0 < count < len(scores):
            least = (total + ranker)[:count].min()
            ranker[count:] = min(0.0, float(least - total[count:].max()))
            # Rounding may lift the first of them a digit above the last judged one.
            return np.minimum(total + ranker, np.where(np.arange(len(scores)) < count, np.inf, least)), parts | {
                RANKER_SHARE: ranker
            }
        return total + ranker, parts | {RANKER_SHARE: ranker}


def _queries(
    histories: Sequence[Sequence[str]], ratings: Sequence[Sequence[float | None] | None] | None
) -> list[Query]:
    check_histories(histories)
    if ratings is not None and len(ratings) != len(histories):
        raise RecllmError(f"{len(ratings)} lists of ratings for {len(histories)} histories; each needs one, or None.")
    given = [None] * len(histories) if ratings is None else [None if own is None else _rated(own) for own in ratings]
    for row, (history, own) in enumerate(zip(histories, given, strict=True)):
        if own is not None and len(own) != len(history):
            raise RecllmError(f"Row {row}: {len(own)} ratings for {len(history)} items of the history.")
    return [Query(tuple(history), None, own) for history, own in zip(histories, given, strict=True)]


def _rated(ratings: Sequence[float | None]) -> tuple[float | None, ...]:
    """Ratings with None where there is none, which numpy and pandas write as NaN."""
    return tuple(None if rating is None or rating != rating else float(rating) for rating in ratings)


def _scaled(values: NDArray[np.float32], mean: float, scale: float) -> NDArray[np.float32]:
    return ((values - mean) / scale).astype(np.float32)

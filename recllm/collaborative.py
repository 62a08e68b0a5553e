"""What a run fits in closed form or by alternation, and the item vectors: once, kept in its folder, loaded again."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import cast

import numpy as np
from numpy.typing import NDArray

from recllm.control import controlled
from recllm.data import Interactions
from recllm.devices import fast_bf16
from recllm.errors import RecllmError
from recllm.expectation import ExpectedPopularity
from recllm.fading import fade, faded_popularity, judges, ranks
from recllm.files import write_json
from recllm.itemitem import EASE, MOST_ITEMS, ItemItem, Transitions, has_room
from recllm.likelihood import Likelihood, first_token
from recllm.likeness import LIKENESS, LikenessRidge
from recllm.lm import BaseModel, load_base, model_folder, positions_of, scoring_device
from recllm.mf import ImplicitMF
from recllm.names import NameModel, read_names
from recllm.neighbours import Neighbours, few_events
from recllm.pairs import labelled_rows
from recllm.priors import Popularity, TextSimilarity
from recllm.progress import Progress
from recllm.prompts import CompiledPrompt, compile_prompt, load_prompt
from recllm.protocols import evaluation_protocol
from recllm.ranking import Scorer
from recllm.ratedneighbours import MOST_ITEMS as MOST_RATED
from recllm.runs import Run
from recllm.splits import liked_part
from recllm.tasks import Task
from recllm.textvectors import item_vectors
from recllm.vectors import VECTORS, ItemFeatures, RawVectors, Standard, item_features
from recllm.warmstart import turned

Say = Callable[[str], None]
HALF_LIVES = "half_lives.json"
"""In `cf/`: NDCG@10, or AUC, on validation of every half-life tried, by scorer; in events, popularity's in days."""


@dataclass(frozen=True, eq=False)
class Collaborative:
    """The scorers that are fitted in closed form or by alternation, and the vectors that the sequence models read."""

    popularity: Popularity
    likelihood: Likelihood | None
    mf: ImplicitMF
    ease: EASE | None
    transitions: Transitions | None
    text: TextSimilarity
    neighbours: Neighbours | None
    expected: ExpectedPopularity | None
    ridge: LikenessRidge | None
    vectors: RawVectors
    features: ItemFeatures
    text_standard: Standard
    factor_standard: Standard

    def scorers(self) -> dict[str, Scorer]:
        """By name, in the order of the tables."""
        result: dict[str, Scorer] = {"popularity": self.popularity}
        if self.likelihood is not None:
            result["likelihood"] = self.likelihood
        result["mf"] = self.mf
        if self.ease is not None:
            result["ease"] = self.ease
        if self.transitions is not None:
            result["transitions"] = self.transitions
        result["text"] = self.text
        if self.neighbours is not None:
            result["neighbours"] = self.neighbours
        return result if self.expected is None else result | {"expected_popularity": self.expected}


def collaborative(run: Run, task: Task, say: Say) -> Collaborative:
    """Fit priors, factorization and item vectors, or load them where the run's folder has them."""
    if not (run.folder / VECTORS).is_file():
        if run.model.likelihood is not None:
            Likelihood(task.index, name_likelihoods(run, task, say)).save(run.folder / "cf")
        vectors = encode_catalog(run, task, say)
        _fit_collaborative(run, task, vectors, say)
        vectors.save(run.folder / VECTORS)  # last: its presence says that the stage is done
    return load_collaborative(run, task)


def _fit_collaborative(run: Run, task: Task, vectors: RawVectors, say: Say) -> None:
    """Fit everything that takes seconds; where a history may fade, how fast is chosen on validation."""
    folder, protocol = run.folder / "cf", evaluation_protocol(run, task)
    positives = protocol.positives()
    say(f"Fitting matrix factorization to {len(positives):,} events")
    fading: dict[str, ImplicitMF | ItemItem | TextSimilarity] = {
        "mf": turned(ImplicitMF.fit(positives, run.cf, seed=run.seed), run)
    }
    _say_what_is_left_out(run, task, say)
    if has_room(len(task.index), run.ease.max_items):
        say(f"Fitting ease over {len(task.index):,} items")
        fading["ease"] = EASE.fit(positives, regularization=run.ease.regularization)
    fading["text"] = _text_similarity(task, vectors, None)
    if run.model.task == "next_item":
        figure = ranks(run, task)
    else:
        asked = partial(liked_part, threshold=task.liked_from(run.data.like_at))
        figure = judges(run, labelled_rows(task, "valid", run.seed), asked)
    if run.recency.half_lives:
        say(f"Choosing on validation how fast the past fades for {', '.join(fading)}")
    figures = {name: fade(run, scorer, figure) for name, scorer in fading.items()}
    if run.model.task == "next_item" and has_room(len(task.index), run.transitions.max_items):
        fading["transitions"], figures["transitions"] = _transitions(run, task, positives, say)
    popularity, figures["popularity"] = faded_popularity(run, task)
    for scorer in (popularity, *fading.values()):
        scorer.save(folder)
    if run.model.task == "next_item":
        base = cast(EASE | ImplicitMF, fading.get("ease", fading["mf"]))
        _fit_likeness(run, task, cast(TextSimilarity, fading["text"]).vectors, base, say)
    write_json(
        folder / HALF_LIVES, {name: {str(key): value for key, value in own.items()} for name, own in figures.items()}
    )


def _fit_likeness(run: Run, task: Task, text: NDArray[np.float32], base: EASE | ImplicitMF, say: Say) -> None:
    """Fit what new items are told by: those most like them, and how often the like of them were chosen."""
    folder, settings, catalog = run.folder / "cf", run.neighbours, task.dataset.catalog
    if len(task.index) > settings.max_items:
        return
    known = task.item_counts >= few_events(task.item_counts, settings)
    if settings.neighbours or settings.regression:
        say(f"Comparing {len(task.index):,} items by columns, words and text")
    if settings.neighbours:
        Neighbours.fit(catalog, text, known, base, count=settings.neighbours).save(folder)
    if settings.regression and (task.item_counts > 0).any():
        ridge = LikenessRidge.fit(catalog, text, task.item_counts, known, seed=run.seed)
        ridge.save(folder)
        ExpectedPopularity.fit(task.index, ridge, task.item_counts).save(folder)


def _say_what_is_left_out(run: Run, task: Task, say: Say) -> None:
    """Say which scorers the catalogue is too large for: they hold a matrix of all pairs of items."""
    limits = {"ease": run.ease.max_items}
    if run.model.task == "next_item":
        limits |= {"transitions": run.transitions.max_items}
        told = run.neighbours.neighbours or run.neighbours.regression
        limits |= {"neighbours": run.neighbours.max_items} if told else {}
    for name, most in limits.items():
        if 0 < most < len(task.index):
            others = ", and all else that tells new items by those like them," if name == "neighbours" else ","
            say(f"Left out: '{name}'{others} for {len(task.index):,} items are more than {name}.max_items = {most:,}")
        elif name != "neighbours" and MOST_ITEMS < len(task.index) <= most:
            say(f"Left out: '{name}', for {len(task.index):,} items are more than the {MOST_ITEMS:,} of its matrix")
    if run.model.task == "relevance" and task.split.train.frame["rating"].count() and len(task.index) > MOST_RATED:
        say(f"Left out: 'rated_neighbours', for {len(task.index):,} items are more than {MOST_RATED:,}")


def _transitions(
    run: Run, task: Task, positives: Interactions, say: Say
) -> tuple[Transitions, dict[float | None, float]]:
    """The transition model whose half-life ranks best; it is fitted with it, so each is a model of its own."""
    settings, figure = run.transitions, ranks(run, task)
    assert figure is not None
    best: Transitions | None = None
    figures: dict[float | None, float] = {}
    for half_life in settings.half_lives:
        say(f"Fitting transitions with a half-life of {half_life:g} events")
        model = Transitions.fit(
            positives,
            half_life=half_life,
            regularization=settings.regularization,
            max_history=settings.max_history,
        )
        found = figure(model)
        if best is None or found > max(figures.values()):  # on a tie the earlier
            best = model  # the only one in memory beside the next: each is a matrix of all pairs of items
        figures[half_life] = found
    assert best is not None
    return best, figures


def _text_similarity(task: Task, vectors: RawVectors, half_life: float | None) -> TextSimilarity:
    # Centred vectors: raw ones of a language model all point one way, and their cosines say little.
    rows = vectors.align(task.index)
    return TextSimilarity(task.index, Standard.fit(rows)(rows), half_life)


def load_collaborative(run: Run, task: Task) -> Collaborative:
    """Load what `collaborative` fitted."""
    folder = run.folder / "cf"
    vectors, mf = RawVectors.load(run.folder / VECTORS), ImplicitMF.load(folder)
    features, text_standard, factor_standard = item_features(
        task.index, vectors, RawVectors(mf.items.ids, mf.item_factors)
    )
    features = controlled(features, run.control, run.seed)
    return Collaborative(
        Popularity.load(folder),
        Likelihood.load(folder) if (folder / "likelihood.json").is_file() else None,
        mf,
        EASE.load(folder) if (folder / "ease.json").is_file() else None,
        Transitions.load(folder) if (folder / "transitions.json").is_file() else None,
        TextSimilarity.load(folder),
        Neighbours.load(folder) if (folder / "neighbours.json").is_file() else None,
        ExpectedPopularity.load(folder) if (folder / "expected_popularity.json").is_file() else None,
        LikenessRidge.load(folder) if (folder / f"{LIKENESS}.json").is_file() else None,
        vectors,
        features,
        text_standard,
        factor_standard,
    )


def encoder_name(run: Run) -> str:
    """The model that turns item text into vectors."""
    return run.model.item_encoder or run.model.name


def item_prompt(run: Run, base: BaseModel) -> CompiledPrompt:
    """The prompt by which the item encoder reads an item."""
    prompt = load_prompt(run.prompt_file("item"), task="item")
    return compile_prompt(prompt, base.tokenizer, positions=positions_of(base))


def encode_catalog(run: Run, task: Task, say: Say) -> RawVectors:
    """Vectors of all items by their text."""
    base = load_base(model_folder(encoder_name(run), say))
    base.model.to(scoring_device())
    compiled = item_prompt(run, base)
    compiled.prompt.check_against(task.dataset.catalog)
    token_ids = compiled.encode_items(task.dataset.catalog)
    say(f"Encoding the text of {len(task.index):,} items with {encoder_name(run)}")
    progress = Progress(sum(ids is not None for ids in token_ids), "items", say)
    return item_vectors(base, task.index.ids, token_ids, progress.add)


def name_model(run: Run, say: Say) -> tuple[NameModel, CompiledPrompt]:
    """The language model that says how probable names are, and its prompt; random weights where the run is a control.

    Raises:
        RecllmError: the prompt has no words before the name.
    """
    assert run.model.likelihood is not None
    drawn_by = run.seed if run.control.language_model == "random" else None
    base = load_base(model_folder(run.model.likelihood, say), drawn_by=drawn_by)
    written = load_prompt(run.prompt_file("likelihood"), task="item")
    prompt = compile_prompt(written, base.tokenizer, positions=positions_of(base), ended=False)
    return NameModel(base, first_token(prompt)).eval(), prompt


def name_likelihoods(run: Run, task: Task, say: Say) -> NDArray[np.float32]:
    """How probable a language model finds the name of every item, float32[items]; NaN without one."""
    model, prompt = name_model(run, say)
    prompt.prompt.check_against(task.dataset.catalog)
    token_ids = prompt.encode_items(task.dataset.catalog)
    if not any(token_ids):
        raise RecllmError("No item has a name that the likelihood prompt could write. Leave model.likelihood out.")
    say(f"Reading the names of {len(task.index):,} items with {run.model.likelihood}")
    progress = Progress(sum(ids is not None for ids in token_ids), "items", say)
    return read_names(model.to(scoring_device()), token_ids, bf16=fast_bf16(), progress=progress.add)

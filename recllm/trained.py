"""The scorers of a run: fitted or trained once, kept in the run's folder, loaded again for the next stage."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray

from recllm.adapters import AdapterRecipe, check_places, load_adapter, merge
from recllm.checkpoints import load_trained
from recllm.control import controlled
from recllm.data import Interactions
from recllm.devices import fast_bf16
from recllm.encoding import Encode, SequenceScorer
from recllm.errors import RecllmError
from recllm.expectation import ExpectedPopularity
from recllm.fading import fade, faded_popularity, judges, ranks
from recllm.files import read_json, write_json
from recllm.heads import borrowed_heads
from recllm.histories import HistoryFormat, item_token_history, text_history
from recllm.itemitem import EASE, ItemItem, Transitions
from recllm.lean import round_frozen
from recllm.likelihood import Likelihood, first_token
from recllm.likeness import LIKENESS, LikenessRidge
from recllm.lm import (
    BaseModel,
    LanguageBody,
    check_layers,
    is_causal,
    item_vectors,
    load_base,
    load_config,
    load_tokenizer,
    model_folder,
    next_item_model,
    not_causal,
    positions_of,
    scoring_device,
    skeleton,
)
from recllm.mf import ImplicitMF
from recllm.names import NameModel, read_names
from recllm.neighbours import Neighbours, few_events
from recllm.pairs import labelled_rows
from recllm.priors import Popularity, TextSimilarity
from recllm.progress import Progress
from recllm.prompts import CompiledPrompt, Prompt, compile_prompt, load_prompt
from recllm.protocols import evaluation_protocol
from recllm.ranking import Scorer
from recllm.recipes import find_recipe
from recllm.runs import PROMPTS, ModelSettings, Run
from recllm.sequence import LightBody, NextItemModel
from recllm.splits import like_threshold, liked_part
from recllm.tasks import Task
from recllm.vectors import VECTORS, ItemFeatures, RawVectors, Standard, item_features
from recllm.warmstart import turned

Say = Callable[[str], None]
ITEM_STRIDE = 10
"""The longest stride of a next-item model's histories where none is given; of short ones it is half of what is read."""
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
        say("Fitting popularity and matrix factorization")
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
    fading: dict[str, ImplicitMF | ItemItem | TextSimilarity] = {
        "mf": turned(ImplicitMF.fit(positives, run.cf, seed=run.seed), run)
    }
    _say_what_is_left_out(run, task, say)
    if len(task.index) <= run.ease.max_items:
        fading["ease"] = EASE.fit(positives, regularization=run.ease.regularization)
    fading["text"] = _text_similarity(task, vectors, None)
    if run.model.task == "next_item":
        figure = ranks(run, task)
    else:
        asked = partial(liked_part, threshold=like_threshold(task.split.train, run.data.like_at))
        figure = judges(run, labelled_rows(task, "valid", run.seed), asked)
    figures = {name: fade(run, scorer, figure) for name, scorer in fading.items()}
    if run.model.task == "next_item" and len(task.index) <= run.transitions.max_items:
        fading["transitions"], figures["transitions"] = _transitions(run, task, positives)
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
            say(f"Left out: '{name}', for {len(task.index):,} items are more than {name}.max_items = {most:,}")


def _transitions(run: Run, task: Task, positives: Interactions) -> tuple[Transitions, dict[float | None, float]]:
    """The transition model whose half-life ranks best; it is fitted with it, so each is a model of its own."""
    settings, figure = run.transitions, ranks(run, task)
    assert figure is not None
    models = {
        half_life: Transitions.fit(
            positives,
            half_life=half_life,
            regularization=settings.regularization,
            max_history=settings.max_history,
        )
        for half_life in settings.half_lives
    }
    figures: dict[float | None, float] = {half_life: figure(model) for half_life, model in models.items()}
    return models[max(models, key=figures.__getitem__)], figures


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
    return item_vectors(base, compiled, task.index.ids, token_ids, progress.add)


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


def stretches(run: Run, task: Task) -> int:
    """Into how many stretches the sequence models of a run cut the training time; 0 where it has none."""
    return 0 if task.time is None else run.recency.drift


def learnt_width(run: Run) -> int:
    """Width of the vector that a run's sequence models learn of each item; 0 where a control is to know no events."""
    return run.model.learnt_width if run.control.factors == "own" else 0


def light_model(run: Run, task: Task, features: ItemFeatures) -> tuple[NextItemModel, HistoryFormat]:
    """The light sequence model, untrained."""
    settings = run.light
    torch.manual_seed(run.seed)
    body = LightBody(
        settings.width,
        settings.layers,
        settings.heads,
        settings.max_history,
        settings.dropout,
        relative=settings.relative_positions,
        gated=settings.gated,
    )
    model = NextItemModel(
        body,
        features,
        width=settings.width,
        head_width=settings.width,
        warm=task.warm,
        token_scale=1.0,
        factor_dropout=settings.factor_dropout,
        counts=task.item_counts,
        negatives=settings.negatives,
        repeats=task.repeats,
        drift=stretches(run, task),
        learnt=learnt_width(run),
    )
    return model, HistoryFormat((), (), settings.max_history, 1)


def language_history(run: Run, task: Task, base: BaseModel) -> HistoryFormat:
    """How the language model reads a history."""
    prompt = load_prompt(run.prompt_file("next_item"), task="next_item")
    prompt.check_against(task.dataset.catalog)
    compiled = compile_prompt(prompt, base.tokenizer)
    limit = run.model.max_history
    stride = run.model.history_stride or max(1, min(ITEM_STRIDE, limit // 2))
    positions = getattr(base.model.config, "max_position_embeddings", None)
    if run.model.history == "items":
        if positions is not None and len(compiled.start) + limit > positions:
            raise RecllmError(
                f"model.max_history is {limit}, and '{run.model.name}' reads {positions} tokens, {len(compiled.start)} "
                f"of them before the history. Take at most --set model.max_history={positions - len(compiled.start)}."
            )
        return item_token_history(compiled.start, limit, stride)
    texts = compiled.encode_items(task.dataset.catalog)
    longest = max((len(text) for text in texts if text is not None), default=0)
    if positions is not None and len(compiled.start) + longest > positions:
        over = len(compiled.start) + longest - positions
        raise RecllmError(
            f"'{run.model.name}' reads {positions} tokens, and the longest item alone, with the {len(compiled.start)} "
            f"before the history, takes {over} more. In {run.prompt_file('next_item')} lower max_item_tokens "
            f"({prompt.max_item_tokens}) by {over}."
        )
    return text_history(compiled.start, texts, limit, stride, positions)


def check_names(run: Run, say: Say, *, kept: bool = False, adapter_kept: bool | None = None) -> None:
    """Read the prompts and recipes that a run names and fetch its models, so that a mistake is told before any work.

    Args:
        run: the run.
        say: gets lines of what is fetched.
        kept: read the copies in the run's folder, where it has them.
        adapter_kept: likewise of the adapter's recipe; as `kept` when not given.

    Raises:
        RecllmError: an unknown name or key, an encoder where a causal model is needed, or a control that cannot be.
    """
    adapter = None
    if run.adapter.recipe != "none":
        own = kept if adapter_kept is None else adapter_kept
        adapter = load_adapter(run.adapter, run.adapter_file if own else None)
        if run.control.language_model == "random" and adapter.quantization is not None:
            raise RecllmError(
                "control.language_model = random draws weights in full precision, and the recipe "
                f"'{run.adapter.recipe}' quantises them. Take one that does not, such as --set adapter.recipe=lora."
            )
    for key, task in PROMPTS.items():
        prompt = load_prompt(run.prompt_file(key) if kept else getattr(run.prompt, key), task=task)
        _say_what_is_read(run, key, prompt, say)
    for recipe in run.export.recipes:
        find_recipe("export", recipe)
    model_folder(encoder_name(run), say)
    if run.model.likelihood is not None:
        folder = model_folder(run.model.likelihood, say)
        if not is_causal(load_config(folder)):
            raise RecllmError(
                f"'{run.model.likelihood}' is an encoder, which says no word's likelihood. Name a causal model as "
                "model.likelihood, or leave it out."
            )
        prompt = load_prompt(run.prompt_file("likelihood") if kept else run.prompt.likelihood, task="item")
        first_token(compile_prompt(prompt, load_tokenizer(folder), ended=False))
    if run.model.name != "none":
        _check_language_model(run, adapter, model_folder(run.model.name, say))


def _check_language_model(run: Run, adapter: AdapterRecipe | None, folder: Path) -> None:
    causal = is_causal(load_config(folder))
    if run.model.task == "next_item" and not causal:
        raise not_causal(run.model.name)
    if run.model.rows_together > 1 and not causal:
        raise RecllmError(
            f"'{run.model.name}' is an encoder, which looks both ways: its rows cannot share a history. Leave "
            "model.rows_together at 1."
        )
    check_layers(folder, run.model.layers)
    if adapter is not None:
        check_places(skeleton(folder, run.model.layers), adapter)


def _say_what_is_read(run: Run, key: str, prompt: Prompt, say: Say) -> None:
    """Say what rules how far back a run reads, where its prompt and `model.max_history` differ."""
    read, own = run.model.max_history, run.prompt.next_item.endswith(".toml")
    asked = read != ModelSettings.model_fields["max_history"].default
    if key == run.model.task == "relevance" and run.model.name != "none" and asked and read > prompt.max_history:
        say(
            f"model.max_history = {read} is cut to {prompt.max_history}, the max_history of the prompt "
            f"'{run.prompt.relevance}'. To read more, name a copy of the prompt with another one as prompt.relevance."
        )
    if key != "next_item" or run.model.task != "next_item" or run.model.name == "none" or not own:
        return
    if "max_history" in prompt.model_fields_set and prompt.max_history != read:
        say(
            f"{run.prompt.next_item}: max_history = {prompt.max_history} is for previews; the run reads the last "
            f"{read} items (--set model.max_history={prompt.max_history})"
        )


def in_full_precision(recipe: AdapterRecipe | None) -> AdapterRecipe | None:
    """The recipe over a base model that is not quantised: what merging and scoring take."""
    return None if recipe is None else recipe.in_full_precision()


def adapter_recipe(run: Run) -> AdapterRecipe | None:
    """The run's adapter, or None for a frozen model without one."""
    return None if run.adapter.recipe == "none" else load_adapter(run.adapter, run.adapter_file)


def own_base(run: Run, recipe: AdapterRecipe | None, say: Say) -> BaseModel:
    """The run's language model before any training: pretrained, unless the run is a control."""
    drawn_by = run.seed if run.control.language_model == "random" else None
    return load_base(model_folder(run.model.name, say), recipe, run.model.layers, drawn_by=drawn_by)


def language_model(
    run: Run, task: Task, features: ItemFeatures, recipe: AdapterRecipe | None, say: Say
) -> tuple[NextItemModel, HistoryFormat, BaseModel]:
    """The next-item language model with the adapter of `recipe`, untrained."""
    base = own_base(run, recipe, say)
    history = language_history(run, task, base)
    torch.manual_seed(run.seed)
    model = next_item_model(
        base,
        recipe,
        features,
        task.item_counts,
        history,
        run.model,
        repeats=task.repeats,
        drift=stretches(run, task),
        learnt=learnt_width(run),
    )
    return model, history, base


def load_light(run: Run, task: Task, features: ItemFeatures) -> tuple[NextItemModel, HistoryFormat] | None:
    """The trained light model, or None where the run has none."""
    path = run.folder / "light" / "model.safetensors"
    if not path.is_file():
        return None
    model, history = light_model(run, task, features)
    load_trained(model, path)
    return model.eval(), history


def load_language(run: Run, task: Task, features: ItemFeatures) -> tuple[NextItemModel, HistoryFormat] | None:
    """The trained language model with its adapter merged, or None where the run has none.

    A model that was trained over a quantised base is merged over the same base in full precision.
    """
    path = run.folder / "lm" / "model.safetensors"
    if not path.is_file():
        return None
    model, history, _ = language_model(run, task, features, in_full_precision(adapter_recipe(run)), lambda _: None)
    load_trained(model, path)
    return merged(model).eval(), history


def merged(model: NextItemModel) -> NextItemModel:
    """The same model with its adapter folded into the base weights."""
    assert isinstance(model.body, LanguageBody)
    model.body.model = merge(model.body.model)
    return model


def torch_encode(model: NextItemModel, *, bf16: bool = False) -> Encode:
    """Read ids with a torch model, in bf16 or float32; its table of input vectors is made once.

    With `bf16` the linear layers of the body are rounded for good, once in place of at every pass.
    """
    with torch.inference_mode():
        table = model.eval().table()
    if bf16:
        round_frozen(model.body.requires_grad_(False), torch.bfloat16)
    device = table.device

    @torch.inference_mode()
    def encode(*given: NDArray[np.int64]) -> NDArray[np.float32]:
        ids, ends, *asked = (torch.from_numpy(value).to(device) for value in given)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
            vectors = model.encode(ids, ends, table, *asked)
        return vectors.float().cpu().numpy()

    return encode


def lenders(run: Run, parts: Collaborative) -> Neighbours | LikenessRidge | None:
    """What tells new items' heads; nothing where a control takes items' text from the model, for text finds the like.

    The means of neighbours are for runs from before there was regression, and where it knows a part of the items.
    """
    if run.control.text != "own":
        return None
    told = parts.ridge if parts.ridge is not None and parts.ridge.whole else None
    return told or parts.neighbours or parts.ridge


def sequence_scorer(
    model: NextItemModel,
    history: HistoryFormat,
    task: Task,
    lender: Neighbours | LikenessRidge | None,
    *,
    bf16: bool = False,
) -> SequenceScorer:
    """A trained next-item model as a scorer; in float32, unless `bf16` trades digits for speed."""
    encode, time = torch_encode(model, bf16=bf16), task.time if model.drift is not None else None
    heads = borrowed_heads(model, lender)
    return SequenceScorer(encode, history, task.index, heads.items, heads.bias, heads.new, time=time)


def save_stage(folder: Path, facts: dict[str, object]) -> None:
    """Mark a stage as done."""
    write_json(folder / "done.json", facts)


def stage_done(folder: Path) -> bool:
    """Whether a stage was finished."""
    return (folder / "done.json").is_file() and isinstance(read_json(folder / "done.json"), dict)

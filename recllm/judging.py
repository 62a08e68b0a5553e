"""Judging: train a language model to say whether a user will like an item; beside it the scorers of ratings."""

import shutil
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import EvalPrediction

from recllm.adapters import AdapterRecipe, merge
from recllm.cards import save_adapter
from recllm.checkpoints import has_checkpoint, load_trained, save_trained, trained_values
from recllm.collaborative import Collaborative, load_collaborative
from recllm.data import Query
from recllm.devices import fast_bf16, precision_keys, process_state
from recllm.errors import RecllmError
from recllm.eva import start_from_data
from recllm.examples import Examples
from recllm.fading import fade, judges
from recllm.files import read_json
from recllm.judgedloss import InsideUsers
from recllm.lightjudge import LightJudge, LightJudgeScorer, LikeShares, Pair, PairCollator, PairFormat
from recllm.lm import adapted, embedding_scale, scoring_device
from recllm.loop import Stage, adapter_names, fit, rows_at_least, rows_read
from recllm.metrics import auc
from recllm.mf import ExplicitMF
from recllm.pairs import Blocks, Made, each_of, earlier_events, in_blocks, labelled_rows, training_blocks, user_of
from recllm.pointwise import PairPrompts, Traits
from recllm.priors import ItemMean, UserMean
from recllm.prompts import CompiledPrompt, compile_prompt, load_prompt
from recllm.ranking import ItemIndex, Scorer, Scores
from recllm.ratedneighbours import MOST_ITEMS, RatedNeighbours
from recllm.relevance import RelevanceCollator, RelevanceModel, RelevanceScorer, answer_output
from recllm.runs import Run
from recllm.sequence import IGNORED
from recllm.softtokens import add_soft_tokens, bake_soft_tokens
from recllm.splits import Example, liked_part
from recllm.tasks import Task
from recllm.trained import Say, adapter_recipe, in_full_precision, own_base, save_stage, stage_done
from recllm.trainerkeys import MEASURES
from recllm.trees import TreeCollator, Written, reads_trees
from recllm.vectors import ItemFeatures
from recllm.warmstart import start
from recllm.watching import Watch

WHOLE = 2**31
"""A history as long as it is."""
ROWS_OF_A_USER = 8
"""Training rows of one user that stand in a step together, for the loss inside users."""
EVALUATED = 32
"""Validation rows that are read at once, as far as they go into whole blocks."""
VALIDATION_ROWS = 1024
"""Validation rows that choose the checkpoint; the fusion sees all of them."""


@dataclass(frozen=True)
class AskedAbout:
    """A scorer that is asked about another query than the one given, as one that has only what the user liked."""

    scorer: Scorer
    instead: Callable[[Query], Query]

    def score(self, queries: Sequence[Query], candidates: ItemIndex) -> Scores:
        """Scores of the other queries: float32[queries, candidates]."""
        return self.scorer.score([self.instead(query) for query in queries], candidates)


def rating_scorers(run: Run, task: Task, parts: Collaborative) -> dict[str, Scorer]:
    """The fitted scorers of a run that judges pairs, with those of ratings where there are any.

    What was fitted on liked events is asked about the liked part of a history; explicit factors and rated neighbours
    read the query's own ratings, and for a query without any the user's training ratings.
    """
    liked = partial(liked_part, threshold=task.liked_from(run.data.like_at))
    scorers: dict[str, Scorer] = {
        name: scorer if name in ("popularity", "likelihood") else AskedAbout(scorer, liked)
        for name, scorer in parts.scorers().items()
    }
    if not task.split.train.frame["rating"].count():
        return scorers
    folder, train = run.folder / "cf", task.split.train
    known = train.histories()

    def early(query: Query) -> Query:
        """With nothing rated yet, nobody where training has what the user did later: there a mean would tell it."""
        unrated = query.ratings is not None and not query.has_ratings
        return replace(query, user_id=None) if task.split.cold_items and unrated else query

    def rated(query: Query) -> Query:
        query = early(query)
        return query if query.has_ratings else known.get(query.user_id or "", query)

    if not (folder / "explicit_mf.json").is_file():
        rows = [row for row in labelled_rows(task, "valid", run.seed) if row.query.has_ratings]
        ItemMean.fit(train).save(folder)
        users, explicit = UserMean.fit(train), ExplicitMF.fit(train, seed=run.seed)  # its file is the sign: last
        for fading in (users, explicit):
            fade(run, fading, judges(run, rows, rated))
            fading.save(folder)
    means = ItemMean.load(folder)
    scorers |= {"item_mean": means, "user_mean": AskedAbout(UserMean.load(folder), early)}
    scorers["explicit"] = AskedAbout(ExplicitMF.load(folder), rated)
    if len(task.index) <= MOST_ITEMS:
        neighbours = RatedNeighbours(task.dataset.catalog, parts.text.vectors, means)
        scorers["rated_neighbours"] = AskedAbout(neighbours, rated)
    return scorers


def light_judge(run: Run, task: Task, features: ItemFeatures) -> tuple[LightJudge, PairFormat]:
    """The light judge, untrained, and how its pairs are written."""
    settings = run.light
    torch.manual_seed(run.seed)
    model = LightJudge(
        features,
        width=settings.width,
        layers=settings.layers,
        heads=settings.heads,
        dropout=settings.dropout,
        limit=settings.max_history,
        relative=settings.relative_positions,
        gated=settings.gated,
        factor_dropout=settings.factor_dropout,
        inside=InsideUsers(settings.pairwise, settings.listwise),
    )
    given = task.split.train_rows
    threshold = task.liked_from(run.data.like_at)
    events = earlier_events(task, like_at=run.data.like_at, max_history=1) if given is None else given
    rows = (events[place] for place in range(len(events)))
    return model, PairFormat(task.index, LikeShares.fit(rows), threshold, settings.max_history)


def train_light_judge(
    run: Run, task: Task, parts: Collaborative, *, resume: bool, say: Say, watch: Watch | None = None
) -> None:
    """Train the light judge on labelled pairs, unless it is done or the run has none.

    Raises:
        RecllmError: no row to train on, or no validation row of each label with a known history.
    """
    settings, folder = run.light, run.folder / "light"
    if settings.num_train_epochs == 0 or stage_done(folder):
        return
    stage = light_judge_stage(run, task, parts.features, say)
    say(f"Training the light judge, {settings.num_train_epochs} epochs")
    if not (resume and has_checkpoint(run.folder, stage.scorer, say)):
        start(stage.model, run, "light", task.index, say)
    steps = fit(stage, folder=run.folder, say=say, resume=resume, watch=watch)
    values = trained_values(stage.model)
    if process_state().is_main_process:
        save_trained(values, folder / "model.safetensors")
        save_stage(folder, {"rows": rows_read(stage, steps)})
        shutil.rmtree(run.folder / "checkpoints" / "light", ignore_errors=True)
    process_state().wait_for_everyone()


def light_judge_stage(run: Run, task: Task, features: ItemFeatures, say: Say = lambda _: None) -> Stage:
    """The training of the light judge.

    Raises:
        RecllmError: as `train_light_judge`.
    """
    settings = run.light
    model, form = light_judge(run, task, features)
    arguments = {
        "learning_rate": settings.learning_rate,
        "weight_decay": settings.weight_decay,
        "per_device_train_batch_size": settings.pairs_in_step,
        "warmup_steps": 0.05,
        "seed": run.seed,
        "report_to": run.train.trainer_keys().get("report_to", "none"),
    }
    rows = training_blocks(
        task,
        items=frozenset(task.index.ids),
        like_at=run.data.like_at,
        max_history=WHOLE,  # the model cuts it, and is told how long it is, as when it is asked
        limit=run.model.relevance_rows,
        epochs=settings.num_train_epochs,
        at_least=rows_at_least(arguments),
        seed=run.seed,
        block=ROWS_OF_A_USER,
        say=say,
    ).each
    valid = validation_sample(run, task, form.knows, "a known history")
    return Stage(
        "light",
        model,
        Examples(Made(len(rows), partial(_pair, form, rows))),
        Examples([form.pair(row.query, row.item_id)._replace(label=row.label or 0.0) for (row,) in valid]),
        collator=PairCollator(),
        valid_collator=PairCollator(),
        arguments=arguments,
        compute_metrics=auc_metric,
        measures=MEASURES["relevance"],
    )


def _pair(form: PairFormat, rows: Sequence[Example], place: int) -> Pair:
    row = rows[place]
    return form.pair(row.query, row.item_id, row.label)


def load_light_judge(run: Run, task: Task, parts: Collaborative) -> LightJudgeScorer:
    """The trained light judge of a run as a scorer."""
    model, form = light_judge(run, task, parts.features)
    load_trained(model, run.folder / "light" / "model.safetensors")
    return LightJudgeScorer(model.eval().to(scoring_device()), form)


def relevance_model(
    run: Run,
    task: Task,
    features: ItemFeatures | None,
    recipe: AdapterRecipe | None,
    say: Say,
    *,
    stride: int | None = None,
) -> tuple[RelevanceModel, CompiledPrompt]:
    """The relevance model with the adapter of `recipe`, untrained, and its prompt; `features` are for soft tokens.

    A longer history begins at a multiple of `stride` items, where it is given, else as the prompt says.

    Raises:
        RecllmError: the model or the prompt cannot be had, or the prompt names a column that is not there.
    """
    base = own_base(run, recipe, say)
    prompt = load_prompt(run.prompt_file("relevance"), task="relevance")
    prompt.check_against(task.dataset.catalog)
    read = min(prompt.max_history, run.model.max_history)
    stride = prompt.history_stride if stride is None else stride
    prompt = prompt.model_copy(update={"max_history": read, "history_stride": stride})
    compiled = compile_prompt(prompt, base.tokenizer, task.liked_from(run.data.like_at))
    torch.manual_seed(run.seed)
    scale = embedding_scale(base)
    body = adapted(base, recipe)
    model = RelevanceModel(base, body, answer_output(base), compiled.answer_ids)
    model.history_stride = stride
    if run.model.soft_tokens:
        assert features is not None
        model.soft_from = add_soft_tokens(body, features, scale, run.model.factor_dropout)
    return model, compiled


def train_relevance(
    run: Run, task: Task, parts: Collaborative, *, resume: bool, say: Say, watch: Watch | None = None
) -> None:
    """Fine-tune the language model to judge pairs, unless it is done.

    A causal model without an adapter has nothing to train and is kept as it is, for zero-shot scores.

    Raises:
        RecllmError: no row to train on, or no validation row with a history and text.
    """
    folder = run.folder / "lm"
    if stage_done(folder):
        return
    stage = relevance_stage(run, task, parts.features, say)
    say(f"Fine-tuning {run.model.name} with '{run.adapter.recipe}' to judge pairs: {stage.trained:,} parameters train")
    steps = 0
    if stage.trained:
        begun = resume and has_checkpoint(run.folder, stage.scorer, say)
        if not begun and not start(stage.model, run, "lm", task.index, say):
            start_from_data(stage)
        steps = fit(stage, folder=run.folder, say=say, resume=resume, watch=watch)
    values = trained_values(stage.model)
    process_state().wait_for_everyone()  # where nothing trains, no process may find it done before it has begun
    if process_state().is_main_process:
        save_trained(values, folder / "model.safetensors")
        save_adapter(run, stage.model, values, folder)
        facts: dict[str, Any] = {"trained": stage.trained, "history_stride": stage.model.history_stride}
        save_stage(folder, {"rows": rows_read(stage, steps)} | facts)
        shutil.rmtree(run.folder / "checkpoints" / "relevance", ignore_errors=True)
    process_state().wait_for_everyone()


def relevance_stage(run: Run, task: Task, features: ItemFeatures, say: Say) -> Stage:
    """The fine-tuning of the language model to judge pairs; without examples where nothing of it trains.

    Raises:
        RecllmError: as `train_relevance`.
    """
    model, prompt = relevance_model(run, task, features, adapter_recipe(run), say, stride=run.model.history_stride)
    prompts = PairPrompts(prompt, task.dataset.catalog, Traits.of(model))
    settings, inside = run.train, InsideUsers(run.model.pairwise, run.model.listwise)
    arguments = {
        "learning_rate": settings.head_learning_rate,
        "per_device_train_batch_size": settings.per_device_train_batch_size,
        "max_steps": settings.max_steps,
        "warmup_steps": 0.05,
        "seed": run.seed,
        **precision_keys(settings.precision),
        **settings.trainer_keys(),
    }
    train, valid = Examples([]), Examples([])
    together = run.model.rows_together
    if together > 1:
        arguments.setdefault("per_device_eval_batch_size", max(1, EVALUATED // together))
    if any(value.requires_grad for value in model.parameters()):
        _check_together(run, model)
        blocks = training_blocks(
            task,
            items=prompts.candidates,
            like_at=run.data.like_at,
            max_history=run.model.max_history,
            limit=run.model.relevance_rows,
            epochs=settings.num_train_epochs,
            at_least=0 if together > 1 else rows_at_least(arguments),
            blocks_at_least=rows_at_least(arguments) if together > 1 else 0,
            seed=run.seed,
            block=together if together > 1 else ROWS_OF_A_USER if inside else 1,
            stride=prompt.prompt.history_stride,
            alike=prompts.beginning if together > 1 else user_of,
            scattered=together > 1,
            say=say,
        )
        judged = validation_blocks(run, task, prompts)
        write = partial(written_blocks if together > 1 else written_rows, prompts=prompts)
        train, valid = write(blocks), write(judged)
    model.inside = inside
    collator = TreeCollator() if together > 1 else RelevanceCollator()
    trained = {name for name, own in model.named_parameters() if own.requires_grad}
    if settings.learning_rate == 0 and trained and trained == adapter_names(model):
        raise RecllmError(
            "train.learning_rate = 0 leaves the adapter as it is, and this run has nothing beside it to train. Add "
            "model.soft_tokens = true, or give it a rate."
        )
    return Stage(
        "relevance",
        model,
        train,
        valid,
        collator=collator,
        valid_collator=collator,
        arguments=arguments,
        compute_metrics=auc_metric,
        measures=MEASURES["relevance"],
        adapter_learning_rate=settings.learning_rate,
        patience=settings.early_stopping_patience,
    )


def _check_together(run: Run, model: RelevanceModel) -> None:
    """Check that a model reads several rows behind one history, where it is asked to.

    Raises:
        RecllmError: it does not.
    """
    if run.model.rows_together > 1 and not (model.causal and reads_trees(model.body)):
        raise RecllmError(
            f"'{run.model.name}' cannot read several rows behind one history: that takes a causal model whose "
            "attention takes a mask of its own. Leave model.rows_together at 1."
        )


def written_rows(blocks: Sequence[Sequence[Example]], prompts: PairPrompts) -> Examples:
    """Prompt ids, label and user of every row of the blocks, written when they are asked for."""
    sizes = blocks.sizes if isinstance(blocks, Blocks) else list(map(len, blocks))
    return Examples(each_of(blocks, sizes, partial(_whole, RowWriter(prompts))))


def _whole(write: "RowWriter", row: Example) -> tuple[list[int], float, int]:
    stem, branch, label, user = write(row)
    return stem + branch, label, user


def written_blocks(blocks: Sequence[Sequence[Example]], prompts: PairPrompts) -> Examples:
    """The rows of every block, written when they are asked for."""
    rows = sum(blocks.sizes if isinstance(blocks, Blocks) else map(len, blocks))
    return Examples(Made(len(blocks), partial(_written_block, RowWriter(prompts), blocks)), rows)


def _written_block(write: "RowWriter", blocks: Sequence[Sequence[Example]], place: int) -> list[Written]:
    return [write(row) for row in blocks[place]]


class RowWriter:
    """Writes rows, and numbers their users as they come; a row without a user has −1."""

    def __init__(self, prompts: PairPrompts) -> None:
        self.prompts = prompts
        self.users: dict[str, int] = {}

    def __call__(self, row: Example) -> Written:
        """A labelled row as token ids."""
        assert row.label is not None
        user = -1 if row.query.user_id is None else self.users.setdefault(row.query.user_id, len(self.users))
        return Written(self.prompts.stem(row.query), self.prompts.branch(row.item_id), row.label, user)


def validation_blocks(run: Run, task: Task, prompts: PairPrompts) -> list[list[Example]]:
    """Blocks of labelled validation rows that the model can judge, in all about `VALIDATION_ROWS`.

    Raises:
        RecllmError: they do not have both labels.
    """
    together = run.model.rows_together
    return validation_sample(
        run,
        task,
        lambda query, item: prompts.knows(query) and item in prompts.candidates,
        "a history and text",
        block=together,
        alike=prompts.beginning,
    )


def validation_sample(
    run: Run,
    task: Task,
    judges: Callable[[Query, str], bool],
    what: str,
    block: int = 1,
    alike: Callable[[Query], Hashable] = user_of,
) -> list[list[Example]]:
    """Blocks of labelled validation rows that a model can judge, the same for one seed, to about `VALIDATION_ROWS`.

    Raises:
        RecllmError: they do not have both labels; `what` says in the message what a row needs.
    """
    rows = [row for row in labelled_rows(task, "valid", run.seed) if judges(row.query, row.item_id)]
    if {row.label for row in rows} != {0.0, 1.0}:
        raise RecllmError(
            f"The checkpoint is chosen by AUC on validation, and its {len(rows)} rows that have {what} do "
            "not have both labels. Set data.like_at, or choose another data.split."
        )
    blocks = in_blocks(rows, np.random.default_rng(run.seed).permutation(len(rows)), block, alike)
    before = np.cumsum([0, *map(len, blocks)])[:-1]  # rows of the blocks before each
    kept = [own for own, count in zip(blocks, before, strict=True) if count < VALIDATION_ROWS]
    return [[rows[place] for place in own] for own in sorted(kept)]


def auc_metric(prediction: EvalPrediction) -> dict[str, float]:
    """AUC of the logits of what is a row."""
    labels, logits = np.asarray(prediction.label_ids).reshape(-1), np.asarray(prediction.predictions).reshape(-1)
    return {"auc": auc(labels[labels != IGNORED], logits[labels != IGNORED])}


def load_relevance(run: Run, task: Task, *, bf16: bool | None = None, device: str | None = None) -> RelevanceScorer:
    """The trained relevance scorer of a run, its adapter merged; in bf16 where that is fast, unless `bf16` says.

    It is rounded before it goes to the `device` (`scoring_device` by default), which may have no room for all of it.

    Content-free calibration is for a model that was not trained: a trained one has learnt its answers' offset, and
    the item's own merit besides, which calibration would take off again.
    """
    folder = run.folder / "lm"
    features = load_collaborative(run, task).features if run.model.soft_tokens else None
    done = read_json(folder / "done.json")
    # Runs of before there was a stride have none, whatever their run file says of it: it was for next items only.
    stride, recipe = done.get("history_stride", 1), in_full_precision(adapter_recipe(run))
    model, prompt = relevance_model(run, task, features, recipe, lambda _: None, stride=stride)
    load_trained(model, folder / "model.safetensors")
    model.body = merge(model.body)
    bake_soft_tokens(model.body)
    calibrated, bf16 = done["trained"] == 0, fast_bf16() if bf16 is None else bf16
    scorer = RelevanceScorer(model.eval(), prompt, task.dataset.catalog, calibrated, bf16)
    model.to(device or scoring_device())
    return scorer

"""Next item: the light scorer and the language model trained on windows of histories, and their validation."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recllm.askedat import moments_of
from recllm.cards import save_adapter
from recllm.checkpoints import has_checkpoint, save_trained, trained_values
from recllm.collaborative import Collaborative
from recllm.devices import precision_keys, process_state
from recllm.distil import taught_windows
from recllm.errors import RecllmError
from recllm.eva import start_from_data
from recllm.examples import Examples, NextItemCollator
from recllm.histories import HistoryFormat
from recllm.loop import Stage, fit, ranking_metrics, rows_at_least, rows_read
from recllm.runs import Run
from recllm.sequence import NextItemModel
from recllm.stored import training_windows
from recllm.tasks import Task
from recllm.trained import Say, adapter_recipe, language_model, light_model, load_light, save_stage, stage_done
from recllm.vectors import ItemFeatures
from recllm.warmstart import start
from recllm.watching import Watch
from recllm.windows import Rows, Taught, Windows, items_of, with_taught

VALIDATION_WINDOWS = 256
"""Validation histories that choose the language model's checkpoint; the fusion sees all of them."""


def train_light(
    run: Run, task: Task, parts: Collaborative, *, resume: bool, say: Say, watch: Watch | None = None
) -> None:
    """Train the light sequence scorer, unless it is done or the run has none."""
    settings, folder = run.light, run.folder / "light"
    if settings.num_train_epochs == 0 or stage_done(folder):
        return
    taught = taught_windows(run, task, say)
    say(f"Training the light sequence scorer, {settings.num_train_epochs} epochs")
    stage = light_stage(run, task, parts.features, taught)
    if not (resume and has_checkpoint(run.folder, stage.scorer, say)):
        start(stage.model, run, "light", task.index, say)
    _train(run, stage, resume=resume, say=say, watch=watch)


def light_stage(
    run: Run, task: Task, features: ItemFeatures, taught: Sequence[Taught] = (), *, store: bool = True
) -> Stage:
    """The training of the light sequence scorer, beside the events on what a teacher has completed.

    Without `store` no file of windows is written.
    """
    settings = run.light
    model, history = light_model(run, task, features)
    windows = Windows(
        task.sequences() if model.drift is None else task.timed_sequences(),
        settings.max_history,
        settings.num_train_epochs,
        run.seed,
        batch=_batch(settings.per_device_train_batch_size),
    )
    passes: int = settings.num_train_epochs
    rows: Sequence[Rows | Taught] = (
        with_taught(windows.all(), taught, passes=passes, batch=windows.batch, seed=run.seed)
        if taught
        else training_windows(windows, store=store)
    )
    arguments = {
        "learning_rate": settings.learning_rate,
        "weight_decay": settings.weight_decay,
        "per_device_train_batch_size": settings.per_device_train_batch_size,
        "warmup_steps": 0.05,
        "seed": run.seed,
        "report_to": run.train.trainer_keys().get("report_to", "none"),
        **precision_keys(run.train.precision),
    }
    valid = _validation_windows(task, history, run.seed, None, timed=model.drift is not None)
    return _stage("light", model, history, rows, arguments, valid)


def train_language(
    run: Run, task: Task, parts: Collaborative, *, resume: bool, say: Say, watch: Watch | None = None
) -> None:
    """Fine-tune the language model for the next item, unless it is done."""
    if stage_done(run.folder / "lm"):
        return
    stage = language_stage(run, task, parts.features, say)
    say(f"Fine-tuning {run.model.name} with '{run.adapter.recipe}': {stage.trained:,} parameters train")
    begun = resume and has_checkpoint(run.folder, stage.scorer, say)
    if not begun and not start(stage.model, run, "lm", task.index, say):
        start_from_data(stage)
    _train(run, stage, resume=resume, say=say, watch=watch)


def language_stage(run: Run, task: Task, features: ItemFeatures, say: Say, *, store: bool = True) -> Stage:
    """The fine-tuning of the language model for the next item; without `store` no file of windows is written."""
    settings = run.train
    model, history, _ = language_model(run, task, features, adapter_recipe(run), say)
    if run.model.heads_from_light and (light := load_light(run, task, features)) is not None:
        _start_from(model, light[0], say)
    windows = Windows(
        _readable(task.sequences() if model.drift is None else task.timed_sequences(), history),
        history.limit,
        settings.num_train_epochs,
        run.seed,
        settings.recent_windows,
        _batch(settings.per_device_train_batch_size),
    )
    arguments = {
        "learning_rate": settings.head_learning_rate,
        "per_device_train_batch_size": settings.per_device_train_batch_size,
        "max_steps": settings.max_steps,
        "warmup_steps": 0.05,
        "seed": run.seed,
        **precision_keys(settings.precision),
        **settings.trainer_keys(),
    }
    valid = _validation_windows(task, history, run.seed, VALIDATION_WINDOWS, timed=model.drift is not None)
    rows = training_windows(windows, rows_at_least(arguments), store=store)
    stage = _stage("lm", model, history, rows, arguments, valid)
    return replace(stage, adapter_learning_rate=settings.learning_rate, patience=settings.early_stopping_patience)


def _batch(on_one_device: int) -> int:
    """Windows in a step on all devices."""
    devices: int = process_state().num_processes
    return on_one_device * devices


def _start_from(model: NextItemModel, light: NextItemModel, say: Say) -> None:
    """Copy the light model's item side, so that the language model has only histories left to learn."""
    if model.query.out_features != light.query.out_features:
        wide, narrow = model.query.out_features, light.query.out_features
        say(f"The items' heads do not start from the light scorer's: model.head_width is {wide}, light.width {narrow}")
        return
    model.heads.load_state_dict(light.heads.state_dict())
    model.bias.data.copy_(light.bias.data)
    model.log_scale.data.copy_(light.log_scale.data)
    model.cold_bias.data.copy_(light.cold_bias.data)
    if model.learnt is not None and light.learnt is not None:
        model.learnt.data.copy_(light.learnt.data)
    if model.drift is not None and light.drift is not None:
        model.drift.load_state_dict(light.drift.state_dict())


def _readable(sequences: list[NDArray[np.int64]], history: HistoryFormat) -> list[NDArray[np.int64]]:
    if history.texts is None:
        return sequences
    return [row[[history.texts[item] is not None for item in items_of(row)]] for row in sequences]


def _stage(
    scorer: str,
    model: NextItemModel,
    history: HistoryFormat,
    windows: Sequence[Rows | Taught],
    arguments: dict[str, Any],
    valid: list[NDArray[np.int64]],
) -> Stage:
    if not len(windows):
        raise RecllmError(
            f"'{scorer}' has nothing to learn from: no training user has two events that it can read. "
            "Lower data.min_events, mind the prompt's item format where histories are text, or take another data.split."
        )
    if not valid:
        raise RecllmError(
            f"'{scorer}' cannot be validated: no validation row has a history and a target with training events. Bring "
            "more events, take another data.split, or leave the model out "
            f"({'light.num_train_epochs = 0' if scorer == 'light' else 'model.name = none'})."
        )
    return Stage(
        scorer,
        model,
        Examples(windows),
        Examples(valid),
        collator=NextItemCollator(history),
        valid_collator=NextItemCollator(history, last_only=True),
        arguments=arguments,
        compute_metrics=ranking_metrics,
    )


def _train(run: Run, stage: Stage, *, resume: bool, say: Say, watch: Watch | None) -> None:
    steps = fit(stage, folder=run.folder, say=say, resume=resume, watch=watch)
    values = trained_values(stage.model)
    if process_state().is_main_process:
        folder = run.folder / stage.scorer
        save_trained(values, folder / "model.safetensors")
        save_adapter(run, stage.model, values, folder)
        save_stage(folder, {"steps": steps, "windows": rows_read(stage, steps)})
        shutil.rmtree(run.folder / "checkpoints" / stage.scorer, ignore_errors=True)
    process_state().wait_for_everyone()


def _validation_windows(
    task: Task, history: HistoryFormat, seed: int, limit: int | None, *, timed: bool = False
) -> list[NDArray[np.int64]]:
    rows = [
        np.append(history.window(task.index.known(example.query.history)), task.index.rows([example.item_id]))
        for example in task.split.valid
    ]
    if timed:
        assert task.time is not None
        asked = task.time.places(moments_of([example.query for example in task.split.valid]))
        rows = [np.stack([row, np.full_like(row, at)], axis=1) for row, at in zip(rows, asked, strict=True)]
    rows = [row for row in rows if len(row) > 1 and task.warm[items_of(row)[-1]]]
    if limit is None or len(rows) <= limit:
        return rows
    return [rows[place] for place in np.sort(np.random.default_rng(seed).permutation(len(rows))[:limit])]

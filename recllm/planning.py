"""What a training run will cost, before it is paid: `recllm train RUN.toml --dry-run`."""

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils.memory import should_reduce_batch_size
from numpy.typing import NDArray
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from recllm.checkpoints import trained_values
from recllm.collaborative import encoder_name
from recllm.devices import free_memory, on_cpu, on_gpu
from recllm.distil import planned_windows
from recllm.errors import RecllmError, out_of_memory
from recllm.examples import Examples, NextItemCollator, lengths_of
from recllm.histories import HistoryFormat
from recllm.idle import idle_lines
from recllm.judging import light_judge_stage, relevance_stage
from recllm.lm import load_config, load_tokenizer, model_folder, stream_width
from recllm.loop import Stage, stage_trainer
from recllm.nextitem import language_stage, light_stage
from recllm.preflight import check_names
from recllm.prompts import UNREAD_COLUMNS, load_prompt
from recllm.protocols import evaluation_protocol
from recllm.recovery import LESS, LIGHT
from recllm.runs import Run
from recllm.tasks import Task, prepare
from recllm.trained import Say
from recllm.trainerkeys import COMPILING, MEASURES, check_options
from recllm.trees import TreeCollator
from recllm.vectors import ItemFeatures
from recllm.warmstart import check_start
from recllm.watching import NonFiniteLossError
from recllm.windows import items_of

SHOWN = 3
"""Examples that are shown."""
LOOKED_AT = 1_000
"""Pairs among which one of the other label is looked for."""
ITEMS_SHOWN = 8
"""Item tokens of a history that are shown, the last ones."""
TRIED = (0.1, 0.25, 0.5, 0.5, 0.75, 0.9, 1.0, 1.0)
"""Which batches are tried, by their place among all by length; the first one is not timed.

The longest stand last: what shorter ones have left free is too small for them, as it is in a training, which meets them
in any order. Tried first, they would make room for all others.
"""
ROUNDS, STEADY = 3, 0.02
"""The most rounds of all batches, and the growth of the peak between a round's two longest that asks for no other one:
in bf16 a CPU keeps kernels for every shape, and takes more memory for some twenty steps."""
VALIDATED = 8
"""Batches of a validation that are read, from the longest to the shortest; the others are reckoned by their ids."""
ALIKE = 1.2
"""Batches whose lengths differ by less are taken for equally long."""


@dataclass(frozen=True)
class Cost:
    """What a stage of training takes.

    Attributes:
        scorer: the stage.
        rows: training examples of all epochs.
        tokens: ids that the model reads in training, padding left out.
        padding: ids that are padding.
        steps: optimiser steps.
        trained: parameters that train.
        frozen: parameters that do not.
        memory: peak bytes of this process after a few steps; of the accelerator where there is one.
        seconds: training and its validations, from measured steps.
    """

    scorer: str
    rows: int
    tokens: int
    padding: int
    steps: int
    trained: int
    frozen: int
    memory: int
    seconds: float


@dataclass(frozen=True)
class Plan:
    """A run before it is trained: its data, the cost of its stages, what comes beside them, and examples."""

    users: int
    events: int
    valid: int
    items: int
    costs: tuple[Cost, ...]
    examples: tuple[str, ...] = field(default=())
    beside: tuple[str, ...] = field(default=())

    def lines(self) -> list[str]:
        """For the terminal."""
        where = "the CPU" if on_cpu() else "the accelerator"
        lines = [
            f"{self.events:,} training events of {self.users:,} users, {self.items:,} items, "
            f"{self.valid:,} validation rows"
        ]
        for cost in self.costs:
            share = cost.padding / max(cost.tokens + cost.padding, 1)
            lines += [
                f"{cost.scorer}: {cost.rows:,} examples, {cost.steps:,} steps, {cost.tokens:,} tokens "
                f"({share:.1%} padding on top)",
                f"{cost.scorer}: {cost.trained:,} parameters train, {cost.frozen:,} are frozen",
                f"{cost.scorer}: about {cost.memory / 2**30:.2f} GiB and {_duration(cost.seconds)} on {where}, "
                "from a few steps",
            ]
        if self.beside:
            lines.append(f"Beside that, in none of these times: {', '.join(self.beside)}")
        for place, example in enumerate(self.examples, start=1):
            lines += ["", f"Example {place}", example]
        return lines


def plan_run(run: Run, say: Say) -> Plan:
    """Measure what training a run will take, without writing anything into its folder.

    Examples, tokens and steps are exact. Memory and time are measured on a few steps, of batches from short ones to
    the longest. Item vectors and factors are drawn at random in their right shapes: they would take minutes, and
    change no cost.

    Raises:
        RecllmError: a mistake in the run file or in the data, or a batch that does not fit into memory.
    """
    check_options(run)
    # Away from the run's folder: it may hold the recipes of an earlier training.
    run = run.model_copy(update={"output": str(Path(run.output) / ".planned")})
    check_names(run, say)
    for line in idle_lines(run):
        say(line)
    check_start(run)
    task = prepare(run, say)
    features = random_features(run, task)
    costs, examples = [], []
    judges = run.model.task == "relevance"
    if judges and run.model.name != "none":
        prompt = run.prompt_file("relevance")
        if left := load_prompt(prompt).unread(task.dataset.catalog):
            say(UNREAD_COLUMNS.format(prompt, ", ".join(left)))
    if run.light.num_train_epochs:
        light = (
            light_judge_stage(run, task, features)
            if judges
            else light_stage(run, task, features, planned_windows(run, task), store=False)
        )
        costs.append(measure(light, say))
    if run.model.name != "none":
        stage = (
            relevance_stage(run, task, features, say)
            if judges
            else language_stage(run, task, features, say, store=False)
        )
        if len(stage.train):
            costs.append(measure(stage, say))
        examples = shown(run, task, stage)
    split = task.split
    users = split.train.frame["user_id"].n_unique()
    counts = users, len(split.train), len(split.valid), len(task.index)
    return Plan(*counts, tuple(costs), tuple(examples), _beside(run, task))


def _beside(run: Run, task: Task) -> tuple[str, ...]:
    """What a training does that is not measured."""
    protocol, items = evaluation_protocol(run, task), f"{len(task.index):,} items"
    rows = len(protocol.examples("valid")) + len(protocol.examples("test"))
    return (
        f"vectors of {items} by {encoder_name(run)}",
        *([f"likelihoods of {items} by {run.model.likelihood}"] if run.model.likelihood is not None else []),
        f"scores of {rows:,} validation and test rows by every scorer",
        "the fusion",
        *([f"{run.light.taught:,} histories asked of the teacher"] if run.light.teacher is not None else []),
    )


def random_features(run: Run, task: Task) -> ItemFeatures:
    """Item vectors and factors of a run in their right shapes, drawn by its seed."""
    width = stream_width(load_config(model_folder(encoder_name(run))))
    random = np.random.default_rng(run.seed)
    text = random.normal(size=(len(task.index), width)).astype(np.float32)
    factors = random.normal(size=(len(task.index), run.cf.factors)).astype(np.float32)
    factors[~task.warm] = np.nan
    return ItemFeatures(task.index, text, factors)


def measure(stage: Stage, say: Say) -> Cost:
    """Count what a stage reads, and measure what a step of it takes.

    Raises:
        RecllmError: a batch does not fit into memory.
    """
    options = stage.options(Path("unused"))
    rows = options["per_device_train_batch_size"]
    accumulation = options.get("gradient_accumulation_steps", 1)
    say(f"Counting the tokens of '{stage.scorer}'")
    counted = _count(stage.train, stage.collator, rows, stage.steps * accumulation)
    widths = np.array([tokens + padding for _, tokens, padding in counted])
    order = np.argsort(widths, kind="stable")
    places = [int(order[round(share * (len(order) - 1))]) for share in TRIED]
    say(f"Trying steps of '{stage.scorer}'")
    trained, frozen = stage.trained, sum(v.numel() for v in stage.model.parameters() if not v.requires_grad)
    batches = [_full([stage.train[row] for row in counted[place][0]], rows) for place in places]
    tried = np.array([stage.collator(batch)["ids"].numel() for batch in batches])
    times, validation, memory = _try(stage, batches, rows, accumulation)
    tried = np.tile(tried, len(times) // len(batches))
    per_batch = _seconds(tried[1:], np.array(times[1:]) / accumulation, widths)
    every = options["eval_steps"]
    validations = math.ceil(1 / every if every < 1 else stage.steps / every)
    seconds = per_batch + validations * validation
    tokens, padding = sum(own for _, own, _ in counted), sum(own for _, _, own in counted)
    return Cost(stage.scorer, len(stage.train), tokens, padding, stage.steps, trained, frozen, memory, seconds)


def _seconds(tried: NDArray[np.int64], times: NDArray[np.float64], widths: NDArray[np.int64]) -> float:
    """Seconds of all batches: a line through what was measured, by ids in a batch; its mean where all are alike."""
    if tried.max() < ALIKE * tried.min():
        return float(times.mean() * len(widths))
    slope, base = np.polyfit(tried, times, 1)
    if slope <= 0 or base + slope * widths.min() <= 0:
        return float(times.sum() / tried.sum() * widths.sum())
    return float((base + slope * widths).sum())


def _full(batch: list[Any], rows: int) -> list[Any]:
    """The rows of a batch; a short one is filled up by its first ones."""
    return [batch[place % len(batch)] for place in range(rows)]


def _count(
    examples: Examples, collator: Callable[[Any], dict[str, torch.Tensor]], rows: int, batches: int
) -> list[tuple[range, int, int]]:
    """Per batch its rows, its tokens and its padding."""
    counted = []
    for start in range(0, min(len(examples), rows * batches), rows):
        places = range(start, min(start + rows, len(examples)))
        batch = collator([examples[row] for row in places])
        tokens = int(lengths_of(batch).sum())
        counted.append((places, tokens, batch["ids"].numel() - tokens))
    return counted


class _Watch(TrainerCallback):
    """Seconds of every optimiser step; ends the trial behind a round at whose end memory has stopped to grow."""

    def __init__(self, batches: int) -> None:
        self.batches = batches
        self.seconds: list[float] = []
        self.peaks: list[int] = []
        self.began = 0.0

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Start the watch."""
        _finish()
        self.began = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Stop it."""
        _finish()
        self.seconds.append(time.monotonic() - self.began)
        self.peaks.append(peak_memory())
        if len(self.peaks) % self.batches == 0 and self.peaks[-1] <= (1 + STEADY) * self.peaks[-2]:
            control.should_training_stop = True


def _finish() -> None:
    if on_gpu():
        torch.cuda.synchronize()


def _try(stage: Stage, batches: Sequence[list[Any]], most: int, accumulation: int) -> tuple[list[float], float, int]:
    """Seconds of a step on each of the batches, round for round, and of a validation, and the peak memory.

    Args:
        stage: what is tried; its weights are changed.
        batches: rows of every step.
        most: rows of each batch.
        accumulation: batches of a step.
    """
    rows = [row for batch in batches for row in batch * accumulation]
    rounds = min(ROUNDS, max(1, stage.steps // len(batches)))  # of a short training no more than it has steps for
    watch = _Watch(len(batches))
    free_memory()
    if on_gpu():
        torch.cuda.reset_peak_memory_stats()  # that of the stage before
    kept = trained_values(stage.model)  # as training does, to be able to go back
    with tempfile.TemporaryDirectory() as place:
        off = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False, "report_to": "none"}
        options = stage.options(Path(place)) | off | {"max_steps": rounds * len(batches), "logging_steps": 1_000_000}
        options.pop("eval_steps"), options.pop("save_steps")
        valid, share = _some_batches(stage, options["per_device_eval_batch_size"])
        tried = replace(stage, train=Examples(rows * rounds), valid=valid)
        trainer = None
        try:
            trainer = stage_trainer(tried, options, [watch], Path(place) / "no-number", steps=stage.steps)
            trainer.train()
            if any(options.get(key) for key in COMPILING):
                trainer.evaluate()  # compiles what validation reads: once, and not in every one of them
            began = time.monotonic()
            trainer.evaluate()
            _finish()
            validation = (time.monotonic() - began) / share
            trainer.save_model(place)
        except NonFiniteLossError as error:
            rates = "light.learning_rate" if stage.scorer == LIGHT else "train.learning_rate, train.head_learning_rate"
            raise RecllmError(
                f"The {error.key} of '{stage.scorer}' is {error.value} within a few steps. Lower the learning rate "
                f"({rates})."
            ) from None
        except Exception as error:  # the device's libraries raise many kinds
            if not (should_reduce_batch_size(error) or out_of_memory(error)):
                raise
            validating = trainer is not None and trainer.validating
            read = int(options["per_device_eval_batch_size"]) if validating else None
            raise _too_large(stage, most, accumulation, read) from None
    memory = peak_memory()
    del kept
    return watch.seconds, validation, memory


def _too_large(stage: Stage, rows: int, accumulation: int, validating: int | None) -> RecllmError:
    """What does not fit into memory, and what would: so many rows of a step, or of a validation."""
    what = f"A step of '{stage.scorer}' with {rows} rows"
    if validating is not None:
        what = f"Validating {validating} rows of '{stage.scorer}' at once"
        ways = f"fewer (--set train.per_device_eval_batch_size={max(1, validating // 2)})"
        ways = LESS if stage.scorer == LIGHT else ways
    elif stage.scorer == LIGHT:
        key = "pairs_in_step" if stage.measures == MEASURES["relevance"] else "per_device_train_batch_size"
        ways = f"fewer (--set light.{key}={max(1, rows // 2)}), {LESS}"
    else:
        ways = f"fewer (--set train.per_device_train_batch_size={max(1, rows // 2)} --set "
        ways += f"train.gradient_accumulation_steps={2 * accumulation}), or train.gradient_checkpointing = true"
    return RecllmError(f"{what} does not fit into memory. Take {ways}.")


def _some_batches(stage: Stage, most: int) -> tuple[Examples, float]:
    """Some batches of validation examples, of `most` each, and their share of the ids that a validation reads."""
    starts = range(0, len(stage.valid), most)
    batches = [[stage.valid[row] for row in range(start, min(start + most, len(stage.valid)))] for start in starts]
    ids = np.array([stage.valid_collator(batch)["ids"].numel() for batch in batches])
    if len(batches) <= VALIDATED:
        return stage.valid, 1.0
    by_size = np.argsort(ids, kind="stable")
    read = sorted(by_size[np.linspace(0, len(batches) - 1, VALIDATED).round().astype(int)].tolist())
    return Examples([row for place in read for row in batches[place]]), float(ids[read].sum() / ids.sum())


def peak_memory() -> int:
    """Peak bytes on the accelerator, or of this process where there is none; 0 where the system does not say."""
    if on_gpu():
        return int(torch.cuda.max_memory_reserved())
    status = Path("/proc/self/status")
    if not status.is_file():
        return 0
    line = next(line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def shown(run: Run, task: Task, stage: Stage) -> list[str]:
    """The first training examples as the model reads them, each with its label; of pairs with both labels."""
    tokenizer = load_tokenizer(model_folder(run.model.name))
    catalog = task.dataset.catalog
    titles = [title or f"{item}, no title" for item, title in zip(catalog.ids, catalog.frame["title"], strict=True)]
    rows = range(len(stage.train))
    if not isinstance(stage.collator, NextItemCollator):
        words = {1.0: "liked", 0.0: "not liked"}
        soft: int | None = stage.model.soft_from  # type: ignore[assignment]
        pairs: Iterator[tuple[Sequence[int], float]] = (
            ((row.stem + row.branch, row.label) for place in rows for row in stage.train[place])
            if isinstance(stage.collator, TreeCollator)
            else (stage.train[place][:2] for place in rows)
        )
        examples = _of_both_labels(list(islice(pairs, LOOKED_AT)))
        return [f"{_spelt(ids, tokenizer, titles, soft)}\n→ {words[label]}" for ids, label in examples]
    history = stage.collator.history
    return [
        f"{_written(history, window[:-1], tokenizer, titles)}\n→ {titles[window[-1]]} (and every item above after the "
        "ones before it)"
        for window in (items_of(stage.train[row]) for row in rows[:SHOWN])
    ]


def _of_both_labels(pairs: Sequence[tuple[Sequence[int], float]]) -> list[tuple[Sequence[int], float]]:
    """The first pairs, the last of them another one where they are all liked or all not."""
    others = [pair for pair in pairs[SHOWN:] if pair[1] != pairs[0][1]]
    alike = len({label for _, label in pairs[:SHOWN]}) == 1
    return [*pairs[: SHOWN - 1], others[0]] if alike and others else list(pairs[:SHOWN])


def _spelt(ids: Sequence[int], tokenizer: Any, titles: Sequence[str], soft_from: int | None) -> str:  # noqa: ANN401
    """A prompt as the model reads it; tokens of items as their titles in brackets."""
    first = math.inf if soft_from is None else soft_from
    parts = []
    for soft, own in groupby(ids, key=lambda token: token >= first):
        tokens = list(own)
        titled = "".join(f"[{titles[token - int(first)]}]" for token in tokens) if soft else ""
        parts.append(titled or tokenizer.decode(tokens, skip_special_tokens=False))
    return "".join(parts)


def _written(history: HistoryFormat, window: Any, tokenizer: Any, titles: Sequence[str]) -> str:  # noqa: ANN401
    """A history as the model reads it; item tokens as their titles in brackets."""
    ids, _ = history.ids(history.fitting(window))
    words = len(history.vocabulary)
    text = tokenizer.decode([history.vocabulary[row] for row in ids if row < words], skip_special_tokens=False)
    items = [f"[{titles[row - words]}]" for row in ids if row >= words]
    left_out = ["…"] if len(items) > ITEMS_SHOWN else []
    return " ".join([text, *left_out, *items[-ITEMS_SHOWN:]])


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

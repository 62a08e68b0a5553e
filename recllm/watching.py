"""What is told of training while it runs: the metrics file, lines of progress, and a loss that is no number."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import (
    EarlyStoppingCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from recllm.files import written
from recllm.progress import Progress


class NonFiniteLossError(Exception):
    """A loss is NaN or infinite.

    Attributes:
        key: `loss` or `eval_loss`.
        value: what it is.
        step: the step that it was computed for.
    """

    def __init__(self, key: str, value: float, step: int) -> None:
        super().__init__(f"{key} is {value} at step {step}")
        self.key, self.value, self.step = key, value, step


class MetricsFile(TrainerCallback):
    """Append what Trainer logs to a JSON-lines file, and stop on a logged loss that is no number."""

    def __init__(self, path: Path, scorer: str) -> None:
        self.path, self.scorer = path, scorer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Take out what lies behind the checkpoint from which training goes on: those steps come again."""
        if not state.is_world_process_zero or not self.path.is_file():
            return
        lines = [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines() if _whole(line)]
        kept = [line for line in lines if line["scorer"] != self.scorer or line["step"] <= state.global_step]
        with written(self.path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: object,
    ) -> None:
        """Write one line per log on the first process; end training on a loss that is no number on all of them."""
        if logs is None:
            return
        if state.is_world_process_zero:
            # Trainer counts the passes as one epoch: its share of that would mislead.
            own = {key: value for key, value in logs.items() if key != "epoch"}
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({"scorer": self.scorer, "step": state.global_step} | own) + "\n")
        # On every process, which all know the same figures: one that stopped alone would leave the others waiting.
        for key in ("loss", "eval_loss"):
            if key in logs and not math.isfinite(float(logs[key])):
                raise NonFiniteLossError(key, float(logs[key]), state.global_step)


def _whole(line: str) -> bool:
    """Whether a line of the metrics file was written to its end; a killed process may leave a part of the last one."""
    return line.startswith("{") and line.endswith("}")


Watch = Callable[[str, int, dict[str, float]], None]
"""(stage, step, validation metrics), called after every validation; an exception ends the training."""


class Watched(TrainerCallback):
    """Tells somebody outside of every validation."""

    def __init__(self, scorer: str, watch: Watch) -> None:
        self.scorer, self.watch = scorer, watch

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **_: object,
    ) -> None:
        """Pass the metrics on."""
        self.watch(self.scorer, state.global_step, dict(metrics or {}))


class Patience(EarlyStoppingCallback):
    """Early stopping that stays: a run resumed from the checkpoint at which it stopped has nothing left to do.

    One that is not sharded does not come here again (`OrderedTrainer.ended`).
    """

    spent = False
    ended = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: object
    ) -> None:
        """See whether the checkpoint is the one that patience ended with."""
        super().on_train_begin(args, state, control, **given)
        self.spent = self.early_stopping_patience_counter >= self.early_stopping_patience
        self.ended = state.global_step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """End a training that had ended: Trainer takes one step before it asks, and nothing of that one is kept."""
        if self.spent:
            state.global_step = self.ended
            control.should_training_stop = True
            control.should_log = control.should_evaluate = control.should_save = False


class StepLines(TrainerCallback):
    """Says how far training is: at every validation, and every few seconds in between."""

    def __init__(self, scorer: str, metric: str, say: Callable[[str], None]) -> None:
        self.scorer, self.metric, self.say = scorer, metric, say
        self.progress, self.loss = Progress(0, "steps", say), math.nan

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Begin to count; a resumed run counts what is left."""
        self.progress = Progress(state.max_steps - state.global_step, f"{self.scorer} steps", self.say)
        if state.global_step:
            self.say(f"Going on behind step {state.global_step:,} of {state.max_steps:,} of '{self.scorer}'")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Count a step."""
        self.progress.add(1, self._loss())

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: object,
    ) -> None:
        """Keep the loss; tell a validation."""
        given = logs or {}
        self.loss = float(given.get("loss", self.loss))
        if self.metric in given:
            name = self.metric.removeprefix("eval_").upper()
            self.progress.tell(f"{self._loss()}, validation {name} {given[self.metric]:.4f}")

    def _loss(self) -> str:
        return "" if math.isnan(self.loss) else f", loss {self.loss:.3f}"

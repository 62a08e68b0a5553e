"""The one training loop: Hugging Face's Trainer over windows in a fixed order; LoRA or light is only what trains."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler, SequentialSampler
from transformers import (
    EarlyStoppingCallback,
    EvalPrediction,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations import TensorBoardCallback

from recllm.errors import RecllmError, require, unknown
from recllm.files import written
from recllm.histories import HistoryFormat, padded
from recllm.metrics import hit_rate, ndcg
from recllm.progress import Progress
from recllm.sequence import IGNORED

WEIGHTS = "model.safetensors"
METRIC = "eval_ndcg@10"
CHANGED = "Was the run file changed?"
EVALUATIONS = 10
"""Validations, and with them checkpoints, in a stage of training."""
PATIENCE = timedelta(days=7)
"""How long the other processes wait while the first one encodes items or scores; ten minutes are the default."""
WHOLE = (WEIGHTS, "trainer_state.json", "optimizer.pt", "scheduler.pt")
"""Files of a checkpoint that was written to its end."""


class Examples(Dataset[Any]):
    """Training examples in the order in which they are seen, all epochs one after the other."""

    def __init__(self, rows: Sequence[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> Any:  # noqa: ANN401  whatever the collator reads
        return self.rows[place]


class WholeBatches(Dataset[Any]):
    """Examples with a note whether they count: the first ones come again until all processes have whole batches.

    accelerate would repeat rows by itself, and they would be learnt twice: two processes would not reach the losses of
    one.
    """

    def __init__(self, examples: Examples, rows: int) -> None:
        """Fill up to a multiple of `rows`, the rows of one round over all processes."""
        self.examples, self.length = examples, math.ceil(len(examples) / rows) * rows

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, place: int) -> tuple[Any, bool]:
        return self.examples[place % len(self.examples)], place < len(self.examples)


def collate_counted(
    collator: Callable[[Any], dict[str, Tensor]], rows: Sequence[tuple[Any, bool]]
) -> dict[str, Tensor]:
    """A batch by `collator`, in which rows that do not count have no labels."""
    batch = collator([row for row, _ in rows])
    batch["labels"][[not counts for _, counts in rows]] = IGNORED
    return batch


@dataclass(frozen=True)
class NextItemCollator:
    """Windows of item rows to padded ids, ends and labels; without any randomness, so that resuming is exact."""

    history: HistoryFormat
    last_only: bool = False
    """Only the last item is a label (validation)."""

    def __call__(self, windows: Sequence[NDArray[np.int64]]) -> dict[str, Tensor]:
        """Item rows, oldest first, the last only a label, to int64 tensors as `NextItemModel.forward` takes them."""
        inputs = [self.history.fitting(window[:-1]) for window in windows]
        paths = [self.history.ids(rows) for rows in inputs]
        labels = [window[len(window) - len(rows) :].tolist() for window, rows in zip(windows, inputs, strict=True)]
        if self.last_only:
            labels = [[IGNORED] * (len(row) - 1) + row[-1:] for row in labels]
        columns = {
            "ids": padded([ids for ids, _ in paths]),
            "ends": padded([ends for _, ends in paths]),
            "labels": padded(labels, IGNORED),
            "seen": padded([rows.tolist() for rows in inputs], IGNORED),
        }
        return {name: torch.from_numpy(column) for name, column in columns.items()}


class OrderedTrainer(Trainer):
    """Trainer that keeps the examples' order, saves only what trains, and knows two learning rates."""

    adapter_learning_rate: float | None = None
    """For parameters of the body; None takes the one rate for all."""
    valid_collator: Callable[[Any], dict[str, Tensor]]
    data_collator: Callable[[Any], dict[str, Tensor]]

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[int]:
        examples: Any = self.train_dataset if train_dataset is None else train_dataset
        return SequentialSampler(examples)

    def get_eval_dataloader(self, eval_dataset: Dataset[Any] | None = None) -> DataLoader[Any]:
        """Validation examples have a collator of their own."""
        training, self.data_collator = self.data_collator, self.valid_collator
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = training

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Four groups: the body's adapter and the rest, with and without weight decay."""
        decayed = set(self.get_decay_parameter_names(self.model))
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                groups.setdefault((name.startswith("body."), name in decayed), []).append(parameter)
        kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        rate = self.args.learning_rate if self.adapter_learning_rate is None else self.adapter_learning_rate
        self.optimizer = kind(
            [
                {
                    "params": parameters,
                    "lr": rate if in_body else self.args.learning_rate,
                    "weight_decay": self.args.weight_decay if decays else 0.0,
                }
                for (in_body, decays), parameters in sorted(groups.items())
            ],
            **options,
        )
        return self.optimizer

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            save_trained(self.accelerator.unwrap_model(self.model), folder / WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_trained(self.accelerator.unwrap_model(model or self.model), Path(resume_from_checkpoint) / WEIGHTS)

    def _load_best_model(self) -> None:
        load_trained(self.accelerator.unwrap_model(self.model), Path(str(self.state.best_model_checkpoint)) / WEIGHTS)


class MetricsFile(TrainerCallback):
    """Append what Trainer logs to a JSON-lines file, and stop on a loss that is no number."""

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
        """Write one line per log, on the first process only."""
        if not state.is_world_process_zero or logs is None:
            return
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"scorer": self.scorer, "step": state.global_step} | logs) + "\n")
        for key in ("loss", "eval_loss"):
            if key in logs and not math.isfinite(float(logs[key])):
                raise RecllmError(
                    f"The {key} of '{self.scorer}' is {logs[key]} at step {state.global_step}. "
                    "Lower the learning rate (train.learning_rate, train.head_learning_rate; light.learning_rate for "
                    "'light') and start anew: --overwrite."
                )


def _whole(line: str) -> bool:
    """Whether a line of the metrics file was written to its end; a killed process may leave a part of the last one."""
    return line.startswith("{") and line.endswith("}")


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


def check_trainer_keys(keys: dict[str, Any]) -> None:
    """Refuse keys of `[train]` that are not Trainer's, before any model loads.

    Raises:
        RecllmError: an unknown key, with the nearest right one.
    """
    known = {name for name in TrainingArguments.__dataclass_fields__ if name != "output_dir"}
    for key in keys:
        if key not in known:
            raise unknown("key in [train]", key, known)


def on_cpu() -> bool:
    """Whether training runs on the CPU: accelerate is told so, or there is no accelerator."""
    return parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()


def process_state() -> PartialState:
    """The processes that train together, set up at the first call.

    Without an accelerator `PartialState` has to be told that it is on the CPU, else every process of a launcher takes
    itself for the only one.
    """
    return PartialState(cpu=on_cpu(), timeout=PATIENCE)


def fast_bf16() -> bool:
    """Whether this machine multiplies bf16 in hardware (AMX or AVX-512 BF16); without it a CPU is slower in bf16."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def precision_keys(precision: str) -> dict[str, bool]:
    """Trainer's keys for a precision; `auto` is bf16 where it is fast."""
    if precision == "auto":
        precision = "bf16" if fast_bf16() else "fp32"
    return {"bf16": precision == "bf16", "fp16": precision == "fp16"}


def rows_of_a_step(arguments: dict[str, Any]) -> int:
    """Rows in a step with Trainer's keys, on all processes together."""
    batch: int = arguments["per_device_train_batch_size"] * arguments.get("gradient_accumulation_steps", 1)
    return batch * process_state().num_processes


def rows_at_least(arguments: dict[str, Any]) -> int:
    """Rows that `max_steps` reads; 0 where the epochs decide."""
    return max(0, arguments.get("max_steps", -1)) * rows_of_a_step(arguments)


def steps_of(examples: int, arguments: dict[str, Any]) -> int:
    """Steps over `examples` with Trainer's keys, on all processes together."""
    most: int = arguments.get("max_steps", -1)
    return most if most > 0 else math.ceil(examples / rows_of_a_step(arguments))


def last_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint in `folder`, or None; one that was cut off while it was written is passed over."""
    numbered = [(int(path.name.rpartition("-")[2]), path) for path in folder.glob("checkpoint-*")]
    whole = [path for _, path in sorted(numbered) if all((path / name).is_file() for name in WHOLE)]
    return str(whole[-1]) if whole else None


def fit(
    model: nn.Module,
    train: Examples,
    valid: Examples,
    *,
    collator: Callable[[Any], dict[str, Tensor]],
    valid_collator: Callable[[Any], dict[str, Tensor]],
    arguments: dict[str, Any],
    folder: Path,
    scorer: str,
    compute_metrics: Callable[[EvalPrediction], dict[str, float]],
    say: Callable[[str], None],
    metric: str = METRIC,
    adapter_learning_rate: float | None = None,
    patience: int | None = None,
    resume: bool = False,
) -> None:
    """Train what requires gradients, validate, and leave `model` with the best weights by `metric`.

    Args:
        model: returns a dict with `loss`, as Trainer expects; its trainable parameters are updated in place.
        train: examples in the order in which they are seen.
        valid: examples of the validation.
        collator: makes a batch of training examples.
        valid_collator: makes a batch of validation examples.
        arguments: Trainer's own keys.
        folder: takes `checkpoints/`, `metrics.jsonl`, and `tensorboard/` where `report_to` names it.
        scorer: names the lines in the metrics file.
        compute_metrics: turns Trainer's predictions into validation metrics.
        say: gets lines of progress.
        metric: the checkpoint with the highest value is kept.
        adapter_learning_rate: peak rate of the body's parameters.
        patience: stop after so many validations without a better one.
        resume: go on from the last checkpoint, if there is one.
    """
    checkpoints = folder / "checkpoints" / scorer
    options: dict[str, Any] = {
        "output_dir": str(checkpoints),
        "num_train_epochs": 1,  # the examples of all epochs are one sequence
        "lr_scheduler_type": "cosine",
        "logging_steps": 10,
        "logging_nan_inf_filter": False,  # it would hide a loss that is no number
        "report_to": "none",
        "remove_unused_columns": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "save_total_limit": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": metric,
        "greater_is_better": True,
        "eval_strategy": "steps",
        "save_strategy": "steps",
        "per_device_eval_batch_size": 32,
        "disable_tqdm": True,  # we say ourselves how far it is
        "use_cpu": on_cpu(),
        "restore_callback_states_from_checkpoint": True,  # the count of validations without a better one
        "eval_steps": max(1, math.ceil(steps_of(len(train), arguments) / EVALUATIONS)),
    } | arguments
    options.setdefault("save_steps", options["eval_steps"])
    boards = _own_tensorboard(options, folder / "tensorboard" / scorer)
    settings = _training_arguments(options)
    if settings.n_gpu > 1:
        settings._n_gpu = 1  # Trainer would split every batch over the GPUs of one process; processes do it better
    # One process has nobody to wait for: its last batch may be short.
    round_rows = settings.train_batch_size * settings.world_size if settings.world_size > 1 else 1
    trainer = OrderedTrainer(
        model=model,
        args=settings,
        data_collator=partial(collate_counted, collator),
        train_dataset=WholeBatches(train, round_rows),
        eval_dataset=valid,
        compute_metrics=compute_metrics,
        callbacks=[MetricsFile(folder / "metrics.jsonl", scorer), StepLines(scorer, metric, say), *boards]
        + ([EarlyStoppingCallback(patience)] if patience else []),
    )
    trainer.remove_callback(PrinterCallback)  # prints a dictionary per log line
    trainer.adapter_learning_rate, trainer.valid_collator = adapter_learning_rate, valid_collator
    trainer.train(resume_from_checkpoint=last_checkpoint(checkpoints) if resume else None)
    process_state().wait_for_everyone()  # each has read the best checkpoint: now the first one may delete it


def _own_tensorboard(options: dict[str, Any], folder: Path) -> list[TrainerCallback]:
    """TensorBoard's callback where `report_to` names it, out of the way of the checkpoints, which are deleted."""
    named = options["report_to"]
    asked = [named] if isinstance(named, str) else list(named)
    if "tensorboard" not in asked:
        return []
    options["report_to"] = [name for name in asked if name != "tensorboard"] or "none"
    if not process_state().is_main_process:
        return []
    board = require("torch.utils.tensorboard", "train", "train.report_to = 'tensorboard'")
    return [TensorBoardCallback(board.SummaryWriter(log_dir=str(folder)))]


def _training_arguments(options: dict[str, Any]) -> TrainingArguments:
    try:
        return TrainingArguments(**options)
    except (ValueError, TypeError, ImportError) as error:
        raise RecllmError(f"Trainer refuses the keys in [train]: {error}") from error


def ranking_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """NDCG@10 and HitRate@10 from the ranks that a next-item model returns while validating."""
    ranks = np.asarray(prediction.predictions, dtype=np.float64).reshape(-1)
    return {"ndcg@10": float(ndcg(ranks, 10).mean()), "hit_rate@10": float(hit_rate(ranks, 10).mean())}


def save_trained(model: nn.Module, path: Path) -> None:
    """Write the parameters that train as safetensors, whole or not at all."""
    kept = {name: value.detach().cpu().contiguous() for name, value in model.named_parameters() if value.requires_grad}
    with written(path) as temporary:
        save_file(kept, temporary, metadata={"format": "pt"})


def load_trained(model: nn.Module, path: Path) -> None:
    """Read what `save_trained` wrote into the same parameters.

    Raises:
        RecllmError: the file has other parameters than the model trains, or others' shapes.
    """
    weights = load_file(path)
    expected = {name: value for name, value in model.named_parameters() if value.requires_grad}
    for name in sorted(set(weights) | set(expected)):
        if name not in weights or name not in expected:
            raise RecllmError(f"{path} does not fit this run: '{name}' is in one of them only. {CHANGED}")
        if weights[name].shape != expected[name].shape:
            shapes = f"{list(weights[name].shape)} and not {list(expected[name].shape)}"
            raise RecllmError(f"{path} does not fit this run: '{name}' has the shape {shapes}. {CHANGED}")
    model.load_state_dict(weights, strict=False)

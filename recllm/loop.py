"""The one training loop: Hugging Face's Trainer over windows in a fixed order; LoRA or light is only what trains."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import torch
from accelerate.utils import save_fsdp_optimizer
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler, SequentialSampler
from transformers import (
    EvalPrediction,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
)
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME

from recllm.adalora import RankBudget, orthogonality
from recllm.checkpoints import SEAL, WEIGHTS, Seal, SoundBest, damage, load_trained, save_trained, trained_values
from recllm.devices import on_cpu, on_gpu, process_state, sharded, sharding
from recllm.errors import RecllmError
from recllm.examples import Examples, WholeBatches, collate_counted
from recllm.files import written
from recllm.lean import compile_layers, lean
from recllm.metrics import Ranks, hit_rate, ndcg
from recllm.recovery import UNCHANGED, Adjusted, divided, train_on
from recllm.sharded import name_layers, reshard
from recllm.softtokens import SoftTokens
from recllm.tracking import own_tensorboard, own_wandb_run
from recllm.trainerkeys import APART, COMPILING, MEASURES, check_best, training_arguments
from recllm.watching import MetricsFile, NonFiniteLossError, Patience, StepLines, Watch, Watched

EVALUATIONS = 10
"""Validations, and with them checkpoints, in a stage of training."""


class OrderedTrainer(Trainer):
    """Trainer that keeps the examples' order, saves only what trains, and knows two learning rates."""

    adapter_learning_rate: float | None = None
    """For parameters of the body; None takes the one rate for all."""
    rate: float = 1.0
    """All learning rates are multiplied by it."""
    half: torch.dtype | None = None
    """The dtype of autocast where what is trained is sharded; else accelerate knows it."""
    validating = False
    """Whether it is validating, or was when it failed."""
    kept_batches: Path
    """Where the batch of a loss that is no number is kept."""
    valid_collator: Callable[[Any], dict[str, Tensor]]
    data_collator: Callable[[Any], dict[str, Tensor]]

    def evaluation_loop(self, *given: Any, **named: Any) -> Any:  # noqa: ANN401  Trainer's own
        """Validate; `validating` stays where that fails, so that it is not the training that is made smaller."""
        self.validating = True
        result = super().evaluation_loop(*given, **named)
        self.validating = False
        return result

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
        decayed, adapted = set(self.get_decay_parameter_names(self.model)), adapter_names(self.model)
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                groups.setdefault((name in adapted, name in decayed), []).append(parameter)
        kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        rate = self.args.learning_rate if self.adapter_learning_rate is None else self.adapter_learning_rate
        self.optimizer = kind(
            [
                {
                    "params": parameters,
                    "lr": self.rate * (rate if in_body else self.args.learning_rate),
                    "weight_decay": self.args.weight_decay if decays else 0.0,
                }
                for (in_body, decays), parameters in sorted(groups.items())
            ],
            **options,
        )
        self._peaks = [group["lr"] for group in self.optimizer.param_groups]
        return self.optimizer

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *given: Any, **named: Any) -> Any:  # noqa: ANN401
        """The model's loss, with what AdaLoRA adds to it in training."""
        result = super().compute_loss(model, inputs, *given, **named)
        if model.training and isinstance(result, Tensor):
            result = result + orthogonality(model) / self.current_gradient_accumulation_steps
        return result

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> AbstractContextManager[Any]:
        """Half precision around sharded models, as accelerate puts it around all others."""
        if self.half is None:
            return super().autocast_smart_context_manager(cache_enabled)
        return torch.autocast(self.args.device.type, dtype=self.half, cache_enabled=cache_enabled)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """A step forward and back; a loss that is no number on any process ends training on all, its batch kept."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        bad = (~torch.isfinite(loss.detach())).float()
        if self.args.world_size > 1:
            bad = self.accelerator.reduce(bad, "sum")
        if bad.item():
            step, here = self.state.global_step + 1, not torch.isfinite(loss).item()
            if here:
                self._keep_batch(inputs, step)
            process_state().wait_for_everyone()  # the first one names the batches that all have kept
            raise NonFiniteLossError("loss", float(loss) if here else math.nan, step)
        return loss

    def _keep_batch(self, inputs: dict[str, Any], step: int) -> None:
        name = f"{self.kept_batches.name}-step-{step}-process-{self.args.process_index}.safetensors"
        tensors = {key: value.cpu().contiguous() for key, value in inputs.items() if isinstance(value, Tensor)}
        with written(self.kept_batches.with_name(name)) as temporary:
            save_file(tensors, temporary)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """What the checkpoint has, at this trainer's rates: they may have been halved since."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        scheduler: Any = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)
        factors = [peak / base for peak, base in zip(self._peaks, scheduler.base_lrs, strict=True) if base]
        factor = factors[0] if factors else 1.0  # a rate of 0 stays one
        if factor != 1.0:
            scheduler.base_lrs = list(self._peaks)
            scheduler._last_lr = [last * factor for last in scheduler._last_lr]
            for group, peak in zip(self.optimizer.param_groups, self._peaks, strict=True):
                group["initial_lr"], group["lr"] = peak, group["lr"] * factor

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write what trains into a folder, by the first process; where it is sharded all have to take part."""
        values = trained_values(self.accelerator.unwrap_model(self.model))
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            save_trained(values, folder / WEIGHTS)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        reshard(self.model)  # the optimizer knows the parts only
        # Trainer would write the whole model beside it, frozen weights and all.
        save_fsdp_optimizer(
            self.accelerator.state.fsdp_plugin, self.accelerator, self.optimizer, self.model, output_dir
        )
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_trained(self.accelerator.unwrap_model(model or self.model), Path(resume_from_checkpoint) / WEIGHTS)

    def ended(self, checkpoint: str) -> bool:
        """Whether a checkpoint is behind the last of `max_steps` or the end of patience; its weights are loaded then.

        Trainer would take one step more before it asks. With `load_best_model_at_end` it is the best ones' weights.
        """
        state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
        patience = [own for own in self.callback_handler.callbacks if isinstance(own, Patience)]
        kept = state.stateful_callbacks.get("Patience", {})
        spent = kept.get("attributes", {}).get("early_stopping_patience_counter", 0) if isinstance(kept, dict) else 0
        stopped = any(spent >= own.early_stopping_patience for own in patience)
        if not (stopped or 0 < self.args.max_steps <= state.global_step):
            return False
        best = self.args.load_best_model_at_end and state.best_global_step is not None
        name = f"checkpoint-{state.best_global_step if best else state.global_step}"
        folder = Path(str(self.args.output_dir)) / name
        if not (folder / SEAL).is_file() or damage(folder) is not None:
            return False  # what follows tells of it
        self.state = state
        self._load_from_checkpoint(str(folder))
        return True

    def _load_best_model(self) -> None:
        load_trained(self.accelerator.unwrap_model(self.model), Path(str(self.state.best_model_checkpoint)) / WEIGHTS)


def adapter_names(model: nn.Module) -> set[str]:
    """Names of the body's trained parameters that are its adapter's: all but soft tokens', which are a projection."""
    soft = {id(own) for module in model.modules() if isinstance(module, SoftTokens) for own in module.parameters()}
    return {
        name
        for name, own in model.named_parameters()
        if own.requires_grad and name.startswith("body.") and id(own) not in soft
    }


def may_train_in_vain(model: nn.Module) -> bool:
    """Whether a step may leave a parameter without a gradient, for which several processes have to look every time.

    An encoder's pooling layer may have an adapter, and a model may leave out layers by chance.
    """
    if not getattr(model, "causal", True):
        return True
    bodies = [own for own in model.modules() if isinstance(own, PreTrainedModel)]
    return any(getattr(body.config, "layerdrop", None) for body in bodies)


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


@dataclass(frozen=True, eq=False)
class Stage:
    """What is trained, on what, and how.

    Attributes:
        scorer: names the stage in the metrics file, and its folder of checkpoints.
        model: returns a dict with `loss`, as Trainer expects; what requires gradients is trained in place.
        train: examples in the order in which they are seen.
        valid: examples of the validation.
        collator: makes a batch of training examples.
        valid_collator: makes a batch of validation examples.
        arguments: Trainer's own keys.
        compute_metrics: turns Trainer's predictions into validation metrics.
        measures: what `compute_metrics` gives; the checkpoint with the highest first one is kept.
        adapter_learning_rate: peak rate of the body's parameters.
        patience: stop after so many validations without a better one.
    """

    scorer: str
    model: nn.Module
    train: Examples
    valid: Examples
    collator: Callable[[Any], dict[str, Tensor]]
    valid_collator: Callable[[Any], dict[str, Tensor]]
    arguments: dict[str, Any]
    compute_metrics: Callable[[EvalPrediction], dict[str, float]]
    measures: tuple[str, ...] = MEASURES["next_item"]
    adapter_learning_rate: float | None = None
    patience: int | None = None

    @property
    def metric(self) -> str:
        """The first of the measures, as Trainer calls it."""
        return f"eval_{self.measures[0]}"

    @property
    def trained(self) -> int:
        """Parameters that train."""
        return sum(getattr(own, "ds_numel", own.numel()) for own in self.model.parameters() if own.requires_grad)

    @property
    def steps(self) -> int:
        """Steps over all examples, on all processes together."""
        return steps_of(len(self.train), self.arguments)

    def options(self, folder: Path) -> dict[str, Any]:
        """Trainer's keys, ours and the run file's; checkpoints go into `folder`.

        Raises:
            RecllmError: validations that are no checkpoints: the best one could not be gone back to; or the best by
                what is not measured.
        """
        check_best(self.arguments, self.measures, self.patience)
        every = self.arguments.get("save_steps") or max(1, math.ceil(self.steps / EVALUATIONS))
        options: dict[str, Any] = {
            "output_dir": str(folder),
            "num_train_epochs": 1,  # the examples of all epochs are one sequence
            "lr_scheduler_type": "cosine",
            "logging_steps": 10,
            "logging_nan_inf_filter": False,  # it would hide a loss that is no number
            "report_to": "none",
            "run_name": f"{folder.parent.parent.name}-{self.scorer}",
            "remove_unused_columns": False,
            "dataloader_pin_memory": on_gpu(),
            "save_total_limit": 2,
            "load_best_model_at_end": True,
            "metric_for_best_model": self.metric,
            "greater_is_better": not str(self.arguments.get("metric_for_best_model", self.metric)).endswith("loss"),
            "eval_strategy": "steps",
            "save_strategy": "steps",
            "per_device_eval_batch_size": 32,
            "disable_tqdm": True,  # we say ourselves how far it is
            "use_cpu": on_cpu(),
            "ddp_find_unused_parameters": may_train_in_vain(self.model),
            "restore_callback_states_from_checkpoint": True,  # the count of validations without a better one
            "eval_steps": every,
        } | self.arguments
        options.setdefault("save_steps", options["eval_steps"])
        if options["load_best_model_at_end"] and options.get("eval_delay", 0) > self.steps:
            raise RecllmError(
                f"train.eval_delay = {options['eval_delay']} leaves no validation in the {self.steps:,} steps of "
                f"'{self.scorer}', and so no best one to end with. Lower it."
            )
        if options["save_steps"] != options["eval_steps"]:
            raise RecllmError(APART.format(options["eval_steps"], options["save_steps"]))
        return options


def rows_read(stage: Stage, steps: int) -> int:
    """Rows of the data that so many steps read, of a stage whose examples are read once."""
    share = min(1.0, steps * rows_of_a_step(stage.arguments) / max(1, len(stage.train)))
    return round(share * stage.train.rows_of_data)


def fit(
    stage: Stage, *, folder: Path, say: Callable[[str], None], resume: bool = False, watch: Watch | None = None
) -> int:
    """Train a stage, validate, and leave its model with the best weights by its metric.

    Args:
        stage: what is trained.
        folder: takes `checkpoints/`, `metrics.jsonl`, and `tensorboard/` where `report_to` names it.
        say: gets lines of progress.
        resume: go on from the last checkpoint, if there is one.
        watch: is told of every validation.

    Returns:
        The steps that were done; fewer than planned where it stopped early.
    """
    checkpoints = folder / "checkpoints" / stage.scorer
    options = stage.options(checkpoints)
    reports = options["report_to"]
    boards = own_tensorboard(options, folder / "tensorboard" / stage.scorer)
    kept = folder / f"no-number-{stage.scorer}"

    def trainer(adjusted: Adjusted) -> OrderedTrainer:
        # Made anew for every attempt: some of them count.
        callbacks = [SoundBest(say), MetricsFile(folder / "metrics.jsonl", stage.scorer)]
        callbacks += [StepLines(stage.scorer, stage.metric, say), *boards]
        callbacks += [Patience(stage.patience)] if stage.patience else []
        callbacks += [Watched(stage.scorer, watch)] if watch else []
        return stage_trainer(stage, options, callbacks, kept, adjusted)

    with own_wandb_run(reports):
        steps = train_on(trainer, stage.model, checkpoints, kept=kept, scorer=stage.scorer, resume=resume, say=say)
    unset_hf_deepspeed_config()  # else transformers would load the next model in parts, too
    process_state().wait_for_everyone()  # each has read the best checkpoint: now the first one may delete it
    return steps


def stage_trainer(
    stage: Stage,
    options: dict[str, Any],
    callbacks: list[TrainerCallback],
    kept: Path,
    adjusted: Adjusted = UNCHANGED,
    steps: int | None = None,
) -> OrderedTrainer:
    """Trainer for a stage; what belongs to a checkpoint is sealed behind all `callbacks`.

    `steps` is the length of the whole training where `options` cut it short.

    Raises:
        RecllmError: Trainer refuses the keys, or they ask for something that this model has not.
    """
    options = dict(options)
    _recompute(stage.model, options)
    _compile(stage.model, options)
    half = torch.bfloat16 if options.get("bf16") else torch.float16 if options.get("fp16") else None
    if sharded():
        name_layers(stage.model)
        # Autocast rounds, as everywhere; FSDP and DeepSpeed would keep norms and projections in half precision too.
        options["bf16"] = False
    settings = training_arguments(divided(options, adjusted))
    most, settings.save_total_limit = settings.save_total_limit, None  # for the seal to keep to
    if settings.n_gpu > 1:
        settings._n_gpu = 1  # Trainer would split every batch over the GPUs of one process; processes do it better
    lean(stage.model, half, cpu=on_cpu())
    # One process has nobody to wait for: its last batch may be short.
    round_rows = settings.train_batch_size * settings.world_size if settings.world_size > 1 else 1
    trainer = OrderedTrainer(
        model=stage.model,
        args=settings,
        data_collator=partial(collate_counted, stage.collator),
        train_dataset=WholeBatches(stage.train, round_rows),
        eval_dataset=stage.valid,
        compute_metrics=stage.compute_metrics,
        callbacks=[RankBudget(stage.steps if steps is None else steps), *callbacks, Seal(most)],
    )
    trainer.remove_callback(PrinterCallback)  # prints a dictionary per log line
    trainer.adapter_learning_rate, trainer.valid_collator = stage.adapter_learning_rate, stage.valid_collator
    trainer.half = half if sharding() == "fsdp" else None
    if half is not None and sharding().startswith("zero"):
        round_inside(stage.model, settings.device.type, half)
    trainer.rate, trainer.kept_batches = adjusted.rate, kept
    return trainer


def round_inside(model: nn.Module, device: str, half: torch.dtype) -> None:
    """Put autocast inside of a model's forward pass: on a GPU DeepSpeed's engine switches off what is around it."""
    forward = MethodType(type(model).forward, model)
    model.forward = torch.autocast(device, dtype=half)(forward)


def _recompute(model: nn.Module, options: dict[str, Any]) -> None:
    """Compute activations twice and keep them once, where the keys ask for it; ours is no model that Trainer knows.

    Raises:
        RecllmError: the model has no layers of transformers.
    """
    for old in ("activation_checkpointing", "gradient_checkpointing"):  # two names of one thing in transformers 5
        asked, keys = options.pop(old, False), options.pop(f"{old}_kwargs", None)
        if not asked:
            continue
        body = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
        if body is None:
            raise RecllmError(f"train.{old} is for language models, and this scorer has none. Leave it out.")
        new = hasattr(body, "activation_checkpointing_enable")
        name = "activation_checkpointing" if new else "gradient_checkpointing"
        getattr(body, f"{name}_enable")(**{f"{name}_kwargs": keys or {"use_reentrant": False}})


def _compile(model: nn.Module, options: dict[str, Any]) -> None:
    """Compile the layers where the keys ask for it; Trainer would compile, and rename, the whole of our model.

    Raises:
        RecllmError: it cannot be compiled here.
    """
    asked, backend, mode = (options.pop(key, None) for key in COMPILING)
    if asked or backend or mode:  # as Trainer reads its keys
        compile_layers(model, cpu=on_cpu(), backend=backend or "inductor", mode=mode)


def ranking_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """NDCG@10 and HitRate@10 from the ranks that a next-item model returns while validating."""
    middle = np.asarray(prediction.predictions, dtype=np.float64).reshape(-1)
    # A row without a label has none; trained scores do not tie but where numbers end, and then the middle place counts,
    # rounded up.
    places = np.ceil(np.where(np.isnan(middle), np.inf, middle))
    ranks = Ranks(places, places)
    return {"ndcg@10": float(ndcg(ranks, 10).mean()), "hit_rate@10": float(hit_rate(ranks, 10).mean())}

"""AdaLoRA in the training loop (Zhang et al. 2023): the budget of ranks, and its part of the loss."""

from pathlib import Path

import torch
from peft import AdaLoraModel
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from recllm.errors import RecllmError

ADAPTER = "default"
"""PEFT's name of the one adapter."""
RANKS = "ranks.pt"
"""In a checkpoint: how important every rank has been so far, and which are left."""
WARM_UP, FINAL, LOOKS = 0.1, 0.3, 100
"""Shares of the steps before and after the budget falls, and looks at it, where the recipe says nothing."""
KEPT = ("ipt", "exp_avg_ipt", "exp_avg_unc")
"""Attributes of PEFT's rank allocator that a checkpoint keeps."""


def adalora_of(model: nn.Module) -> AdaLoraModel | None:
    """The AdaLoRA adapter of a model, or None."""
    return next((module for module in model.modules() if isinstance(module, AdaLoraModel)), None)


def orthogonality(model: nn.Module) -> Tensor | float:
    """AdaLoRA's part of the loss: P and Q of its singular value decompositions shall be orthogonal; 0 without AdaLoRA.

    PEFT adds it inside models that return a loss themselves; ours have their loss outside of the adapted body.
    """
    tuner = adalora_of(model)
    if tuner is None:
        return 0.0
    total: Tensor | float = 0.0
    count = 0
    for name, value in tuner.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            product = value @ value.T if "lora_A" in name else value.T @ value
            total = total + torch.linalg.norm(product - torch.eye(len(product), device=value.device))
            count += 1
    return total * (tuner.peft_config[ADAPTER].orth_reg_weight / max(count, 1))


class RankBudget(TrainerCallback):
    """Lets the budget of ranks fall while AdaLoRA trains; of other models it does nothing."""

    def __init__(self, steps: int) -> None:
        """Plan for a training of so many steps."""
        self.steps = steps

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_: object,
    ) -> None:
        """Plan the budget over all steps; a resumed run goes on with the ranks that were left."""
        tuner = None if model is None else adalora_of(model)
        if tuner is None:
            return
        plan(tuner, self.steps)
        path = _file(args, state)
        tuner.rankallocator.reset_ipt()  # of an attempt before this one
        tuner.peft_config[ADAPTER].rank_pattern = None
        if state.global_step and path.is_file():
            kept = torch.load(path, weights_only=True, map_location=next(tuner.parameters()).device)
            for name in KEPT:
                setattr(tuner.rankallocator, name, kept[name])
            tuner.peft_config[ADAPTER].rank_pattern = kept["rank_pattern"]

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_: object,
    ) -> None:
        """Take ranks away, while the step's gradients are there."""
        tuner = None if model is None else adalora_of(model)
        # In fp16 a step whose gradients overflow is skipped; PEFT's averages would keep the infinity for good.
        if tuner is not None and _finite_gradients(tuner):
            for name, value in tuner.named_parameters():
                # An encoder's pooling layer has no part in the loss, and PEFT asks every adapter for its gradient.
                if "lora_" in name and value.requires_grad and value.grad is None:
                    value.grad = torch.zeros_like(value)
            tuner.update_and_allocate(state.global_step + 1)

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_: object,
    ) -> None:
        """Keep what resuming needs in the checkpoint."""
        tuner = None if model is None else adalora_of(model)
        if tuner is not None and state.is_world_process_zero:
            kept = {name: getattr(tuner.rankallocator, name) for name in KEPT}
            torch.save(kept | {"rank_pattern": tuner.peft_config[ADAPTER].rank_pattern}, _file(args, state))


def _finite_gradients(tuner: nn.Module) -> bool:
    gradients = [value.grad for value in tuner.parameters() if value.grad is not None]
    return bool(gradients) and all(bool(torch.isfinite(gradient).all()) for gradient in gradients)


def plan(tuner: AdaLoraModel, steps: int) -> None:
    """Set the number of steps, and the phases where the recipe has given none.

    Raises:
        RecllmError: the recipe's phases leave no step in which the budget falls, or it has no ranks to take away.
    """
    config = tuner.peft_config[ADAPTER]
    if config.init_r <= config.target_r:
        raise RecllmError(
            f"AdaLoRA starts with init_r = {config.init_r} ranks and shall keep target_r = {config.target_r}: there is "
            "none to take away. Set adapter.init_r higher, or take the recipe 'lora'."
        )
    config.total_step = steps
    if config.tinit == 0 and config.tfinal == 0:
        config.tinit, config.tfinal = int(WARM_UP * steps), int(FINAL * steps)
        config.deltaT = max(1, steps // LOOKS) if config.deltaT == 1 else config.deltaT
    if config.tinit + config.tfinal + 1 >= steps:
        raise RecllmError(
            f"AdaLoRA's tinit = {config.tinit} and tfinal = {config.tfinal} leave none of the {steps} steps in which "
            "ranks are taken away. Train for more steps, or set adapter.tinit and adapter.tfinal lower."
        )


def _file(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / RANKS

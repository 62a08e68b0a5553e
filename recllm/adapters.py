"""Adapters: an adapters/ recipe becomes trainable modules on a frozen base model, PEFT's keys untouched."""

import dataclasses
import warnings
from typing import Any

import peft
from pydantic import Field
from torch import nn
from transformers import PreTrainedModel

from recllm.errors import RecllmError, unknown
from recllm.recipes import Settings, find_recipe, parse, read_toml
from recllm.runs import AdapterSettings


class AdapterRecipe(Settings):
    """One file of adapters/."""

    tuner: str
    """PEFT's name of the method, in lower case."""
    config: dict[str, Any] = Field(default_factory=dict)
    """PEFT's own keys."""
    quantization: dict[str, Any] | None = None
    """transformers' BitsAndBytesConfig keys for the base model."""


def load_adapter(settings: AdapterSettings, file: str | None = None) -> AdapterRecipe:
    """Read the recipe (of `file`, where a run keeps it) and put the run file's keys over it; before any model loads.

    Raises:
        RecllmError: an unknown recipe, tuner or key, with the nearest right one.
    """
    path = find_recipe("adapters", file or settings.recipe)
    recipe = parse(AdapterRecipe, read_toml(path), str(path))
    recipe = recipe.model_copy(update={"config": recipe.config | settings.overrides()})
    known = {field.name for field in dataclasses.fields(_config_class(recipe.tuner))}
    for key in recipe.config:
        if key not in known:
            raise unknown(f"key of the adapter '{recipe.tuner}'", key, known)
    return recipe


def attach(model: PreTrainedModel, recipe: AdapterRecipe) -> peft.PeftModel:
    """Freeze `model` and add the recipe's trainable modules to it.

    Raises:
        RecllmError: PEFT refuses the configuration for this model.
    """
    try:
        config = _config_class(recipe.tuner)(**recipe.config)
        with warnings.catch_warnings():
            # PEFT 0.21 asks for the attribute that transformers 5 has renamed.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            return peft.get_peft_model(model, config)
    except (ValueError, TypeError) as error:
        raise RecllmError(f"PEFT refuses the adapter '{recipe.tuner}' for this model: {error}") from error


def merge(model: nn.Module) -> nn.Module:
    """Fold the adapter's weights into the base model's; a model without an adapter comes back as it is."""
    return model.merge_and_unload() if isinstance(model, peft.PeftModel) else model


def _config_class(tuner: str) -> type[peft.PeftConfig]:
    classes = {str(kind.value).lower(): config for kind, config in peft.PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if tuner not in classes:
        raise unknown("tuner", tuner, classes)
    return classes[tuner]

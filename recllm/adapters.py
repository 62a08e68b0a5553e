"""Adapters: an adapters/ recipe becomes trainable modules on a frozen base model, PEFT's keys untouched."""

import dataclasses
import inspect
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.tuners_utils import check_target_module_exists
from pydantic import Field, PrivateAttr
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from recllm.bottleneck import BottleneckSettings, insert_bottlenecks
from recllm.errors import RecllmError, unknown
from recllm.loftq import BITS, KEPT
from recllm.recipes import Settings, find_recipe, parse, read_toml
from recllm.runs import AdapterSettings

BOTTLENECK = "bottleneck"
"""The tuner that is recllm's own."""
LOFTQ = "loftq"
"""The start that is recllm's own."""
QUANT_TYPES = ("nf4", "fp4")
"""Kinds of 4-bit numbers."""
MERGE_TOLERANCE = 1e-3
"""Largest difference of a hidden state that merging may make, relative to the largest hidden state."""
UNSUPPORTED = {
    "corda": "it changes the base model by training data, which are not there when the adapter is merged; take 'eva'",
    "lora_ga": "it changes the base model by gradients, which are not there when the adapter is merged; take 'pissa'",
}
"""Initialisations of LoRA that are refused, with the reason."""
UNSERVED = {
    "adaption_prompt": "it puts learnt tokens before the prompt, and neither item tokens nor the shared prefix of a "
    "ranker have a place for them",
    "beft": "it trains biases, and language models' layers have none to merge it into",
    "lily": "PEFT cannot merge it, and what is served has no adapter beside it",
    "poly": "it wants a task's number with every row",
    "shadow": "it runs a second model beside the first, which cannot be merged",
    "trainable_tokens": "it trains the table of token embeddings, which stays frozen here",
    "xlora": "it mixes adapters that are trained already",
}
"""Tuners of PEFT that are refused, with the reason."""
UNSERVED_KEYS = {
    "alora_invocation_tokens": "it answers only behind certain tokens, and cannot be merged",
    "arrow_config": "it mixes adapters that are trained already",
    "layer_replication": "it makes another model than the one that is served",
    "trainable_token_indices": "it trains the table of token embeddings, which stays frozen here",
    "lora_bias": "it trains biases, and language models' layers have none to merge them into",
}
"""Keys of PEFT that are refused, with the reason."""
PLACEHOLDER_STEPS = 1_000_000
"""AdaLoRA wants its number of steps before anybody knows it; training sets the right one."""


LORA_RANK = 8
"""PEFT's own, where nothing is said."""


class AdapterRecipe(Settings):
    """One file of adapters/."""

    tuner: str
    """PEFT's name of the method, in lower case, or `bottleneck`."""
    config: dict[str, Any] = Field(default_factory=dict)
    """PEFT's own keys, or those of `BottleneckSettings`."""
    quantization: dict[str, Any] | None = None
    """transformers' BitsAndBytesConfig keys for the base model."""
    _trained_over: dict[str, Any] | None = PrivateAttr(default=None)

    @property
    def start(self) -> str:
        """How LoRA's matrices start, in lower case, as PEFT names it."""
        return str(self.config.get("init_lora_weights", "")).lower()

    @property
    def rounding(self) -> dict[str, Any]:
        """The keys of `quantization`, also after `in_full_precision`."""
        return self.quantization or self._trained_over or {}

    def in_full_precision(self) -> "AdapterRecipe":
        """The same adapter over a base model that is not quantised: what merging and scoring take."""
        recipe = self.model_copy(update={"quantization": None})
        recipe._trained_over = self.rounding
        return recipe


def load_adapter(settings: AdapterSettings, file: str | None = None) -> AdapterRecipe:
    """Read the recipe (of `file`, where a run keeps it) and put the run file's keys over it; before any model loads.

    Raises:
        RecllmError: an unknown recipe, tuner or key, with the nearest right one; or a method that cannot be served.
    """
    path = find_recipe("adapters", file or settings.recipe)
    recipe = parse(AdapterRecipe, read_toml(path), str(path))
    recipe = recipe.model_copy(update={"config": recipe.config | settings.overrides()})
    known = _keys(recipe.tuner)
    for key in recipe.config:
        if key not in known:
            raise unknown(f"key of the adapter '{recipe.tuner}'", key, known)
    for key, reason in UNSERVED_KEYS.items():
        if recipe.config.get(key) not in (None, False):
            raise RecllmError(f"adapter.{key} is not supported: {reason}. Leave it out.")
    if recipe.tuner == BOTTLENECK:
        parse(BottleneckSettings, recipe.config, str(path))
    if recipe.config.get("task_type"):
        raise RecllmError("adapter.task_type is PEFT's for models with a head; recllm has its own. Leave it out.")
    _check_quantization(recipe, path)
    _check_start(recipe)
    return recipe


def _check_quantization(recipe: AdapterRecipe, path: Path) -> None:
    """Check the keys of `[quantization]`, for transformers passes over those that it does not know.

    Raises:
        RecllmError: an unknown key or value, nothing that asks for quantised weights, or a start that needs plain ones.
    """
    if recipe.quantization is None:
        return
    known = [
        name for name in inspect.signature(BitsAndBytesConfig.__init__).parameters if name not in ("self", "kwargs")
    ]
    for key in recipe.quantization:
        if key not in known:
            raise unknown(f"key in [quantization] of {path}", key, known)
    try:
        made = BitsAndBytesConfig(**recipe.quantization)
    except (ValueError, TypeError, AttributeError) as error:
        raise RecllmError(f"{path}: transformers refuses [quantization]: {error}") from None
    if not (made.load_in_4bit or made.load_in_8bit):
        raise RecllmError(
            f"{path}: [quantization] asks for nothing. Set load_in_4bit or load_in_8bit, or leave it out."
        )
    if made.bnb_4bit_quant_type not in QUANT_TYPES:
        raise unknown(f"bnb_4bit_quant_type in {path}", made.bnb_4bit_quant_type, QUANT_TYPES)
    if recipe.start == "orthogonal":
        raise RecllmError(
            "adapter.init_lora_weights = 'orthogonal' is made in the number type of the base weights, and those of a "
            "quantised base are integers. Take another start."
        )


def _check_start(recipe: AdapterRecipe) -> None:
    """Check that LoRA can start as asked, and be served."""
    if recipe.start == "eva" and (recipe.tuner != "lora" or "eva_config" in recipe.config):
        raise RecllmError(
            "adapter.init_lora_weights = 'eva' is for the tuner 'lora' without an eva_config: recllm keeps the same "
            "rank in every layer, for a trained adapter is loaded into matrices of the recipe's own shapes."
        )
    if recipe.start == LOFTQ:
        _check_loftq(recipe)
    if recipe.start == "orthogonal" and int(recipe.config.get("r", LORA_RANK)) % 2:
        raise RecllmError("adapter.init_lora_weights = 'orthogonal' splits the rank in two: take an even adapter.r.")
    if recipe.start in UNSUPPORTED:
        raise RecllmError(
            f"adapter.init_lora_weights = '{recipe.start}' is not supported: {UNSUPPORTED[recipe.start]}."
        )


def _check_loftq(recipe: AdapterRecipe) -> None:
    """Check that there are 4 bits to start from, and nothing that would not start with them."""
    if recipe.tuner != "lora" or not recipe.rounding.get(BITS):
        raise RecllmError(
            "adapter.init_lora_weights = 'loftq' starts from the rounding error of a base model in 4 bits. Take the "
            "recipe 'qlora', or another start."
        )
    for key in ("loftq_config", "use_dora"):
        if recipe.config.get(key):
            raise RecllmError(
                f"adapter.{key} does not go with init_lora_weights = 'loftq': recllm leaves the quantised weights as "
                "they are, in the recipe's own bits, and adds the best correction of the adapter's rank. Leave it out."
            )
    if recipe.rounding.get(KEPT):
        raise RecllmError(
            f"quantization.{KEPT} does not go with init_lora_weights = 'loftq': where the adapter is merged, all "
            "adapted layers are rounded. Leave it out."
        )


def attach(model: PreTrainedModel, recipe: AdapterRecipe) -> nn.Module:
    """Freeze `model` and add the recipe's trainable modules to it; LoftQ's start is `lm.adapted`'s to make.

    Raises:
        RecllmError: PEFT refuses the configuration for this model, it trains token embeddings, or a bottleneck finds no
            place in it.
    """
    if recipe.tuner == BOTTLENECK:
        return insert_bottlenecks(model, BottleneckSettings.model_validate(recipe.config))
    table = model.get_input_embeddings()
    try:
        with warnings.catch_warnings():
            # PEFT 0.21 asks for the attribute that transformers 5 has renamed.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            # It knows no norms by their class, and trains them all the same.
            warnings.filterwarnings("ignore", "Unsupported layer type", UserWarning)
            # It finds out by itself which way round GPT-2's layers hold their weights.
            warnings.filterwarnings("ignore", "fan_in_fan_out is set to", UserWarning)
            # EVA's advice, on memory that a small model has.
            warnings.filterwarnings("ignore", "lora with eva initialization used", UserWarning)
            adapted = peft.get_peft_model(model, _peft_config(recipe))
    except (ValueError, TypeError) as error:
        raise RecllmError(f"PEFT refuses the adapter '{recipe.tuner}' for this model: {error}") from error
    if model.get_input_embeddings() is not table:
        raise RecllmError(
            "The adapter's target_modules or modules_to_save name the table of token embeddings. It stays frozen here: "
            "histories are written with it, and answers read from it, outside of the adapter. Take it out."
        )
    if recipe.start == LOFTQ:
        adapted.active_peft_config.init_lora_weights = LOFTQ
    return adapted


def check_places(model: nn.Module, recipe: AdapterRecipe) -> None:
    """Check that a recipe finds a place in a model and that PEFT takes its keys, without any weights.

    Args:
        model: the model, on the meta device; bottlenecks are put into it.
        recipe: the recipe.

    Raises:
        RecllmError: no module has a name that the recipe looks for, or PEFT refuses the configuration.
    """
    if recipe.tuner == BOTTLENECK:
        insert_bottlenecks(model, BottleneckSettings.model_validate(recipe.config))
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what PEFT advises it says when the adapter is attached
            config = _peft_config(recipe)
    except (ValueError, TypeError) as error:
        raise RecllmError(f"PEFT refuses the adapter '{recipe.tuner}': {error}") from error
    wanted = getattr(config, "target_modules", None)
    named = [name for name, _ in model.named_modules()]
    if not wanted or wanted == "all-linear" or any(check_target_module_exists(config, name) for name in named):
        return
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    there = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in linear}))
    wanted = wanted if isinstance(wanted, str) else ", ".join(sorted(wanted))
    # Which of them are layers PEFT knows by what stands before the number, and here nothing does.
    numbered = getattr(config, "layers_to_transform", None) is not None
    layers = "layers_to_transform needs layers_pattern here, as 'layers'. " if numbered else ""
    raise RecllmError(
        f"No module of this model goes by adapter.target_modules = {wanted}. {layers}Its linear layers: {there}."
    )


def _peft_config(recipe: AdapterRecipe) -> peft.PeftConfig:
    given: dict[str, Any] = {"total_step": PLACEHOLDER_STEPS} if recipe.tuner == "adalora" else {}
    if recipe.start == "eva":
        # The same rank everywhere: a trained adapter is loaded into matrices of the recipe's own shapes.
        given["eva_config"] = peft.EvaConfig(rho=1.0)
    config = recipe.config
    if recipe.start == LOFTQ:
        # PEFT's own start quantises once more, on a GPU only.
        config = config | {"init_lora_weights": True}
    with warnings.catch_warnings():
        # VeRA's random matrices are drawn from their seed wherever they are loaded: that is the recipe's intention.
        warnings.filterwarnings("ignore", "Specified to not save vera_A and vera_B", UserWarning)
        return _config_class(recipe.tuner)(**given | config)


def merge(model: nn.Module) -> nn.Module:
    """Fold the adapter's weights into the base model's, and prove that nothing has changed.

    A model without an adapter comes back as it is, and so does one with bottleneck adapters: what is not linear cannot
    be folded, and stays as two small products in every place.

    Raises:
        RecllmError: the merged model's hidden states are not those of the model with its adapter.
    """
    if not isinstance(model, peft.PeftModel):
        return model
    before = _probe(model)
    merged: nn.Module = model.merge_and_unload()
    after = _probe(merged)
    difference = float((after - before).abs().max() / before.abs().max())
    if not difference <= MERGE_TOLERANCE:  # a NaN is no proof either
        raise RecllmError(
            f"Merging the adapter changes the model's hidden states by {difference:.1e} of their size, and at most "
            f"{MERGE_TOLERANCE:.0e} is allowed. Train with another recipe, such as 'lora'."
        )
    return merged


@torch.inference_mode()
def _probe(model: nn.Module) -> Tensor:
    """Hidden states float32[1, 8, width] of the vocabulary's first tokens."""
    model.eval()
    device = next(model.parameters()).device
    hidden: Tensor = model(input_ids=torch.arange(8, device=device)[None]).last_hidden_state
    return hidden.float()


def _keys(tuner: str) -> Mapping[str, Any]:
    if tuner == BOTTLENECK:
        return BottleneckSettings.model_fields
    return {field.name: field for field in dataclasses.fields(_config_class(tuner))}


def _config_class(tuner: str) -> type[peft.PeftConfig]:
    classes = {str(kind.value).lower(): config for kind, config in peft.PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if tuner not in classes:
        raise unknown("tuner", tuner, [BOTTLENECK, *classes])
    prompts = issubclass(classes[tuner], peft.PromptLearningConfig)
    reason = UNSERVED["adaption_prompt"] if prompts else UNSERVED.get(tuner)
    if reason is not None:
        raise RecllmError(
            f"The tuner '{tuner}' is not supported: {reason}. Take a recipe of adapters/, such as 'lora'."
        )
    return classes[tuner]

"""Bottleneck adapters (Houlsby et al. 2019, Pfeiffer et al. 2021, He et al. 2022): two small products in a layer."""

import math
from typing import Self

from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from recllm.errors import RecllmError, unknown
from recllm.recipes import Settings

ATTENTION_OUT = (
    "o_proj",
    "out_proj",
    "attention.output.dense",
    "attn.c_proj",
    "self_attention.dense",
    "self_attn.dense",
    "attention.dense",
    "attention.out_lin",
    "attn.o",
)
"""Ends of the names of the last product of an attention, in the families of transformers."""
FEED_FORWARD_OUT = (
    "down_proj",
    "fc2",
    "output.dense",
    "mlp.c_proj",
    "dense_4h_to_h",
    "lin2",
    "fc_out",
    "ffn_output",
)
"""Ends of the names of the last product of a feed-forward block."""
FEED_FORWARD = ("mlp", "feed_forward", "ffn")
"""Ends of the names of whole feed-forward blocks, for adapters that run beside them."""


class BottleneckSettings(Settings):
    """`[config]` of a bottleneck recipe; the names are AdapterHub's."""

    mh_adapter: bool = False
    """Adapters behind every attention."""
    output_adapter: bool = True
    """Adapters behind every feed-forward block, or beside it."""
    is_parallel: bool = False
    """The adapters read what the feed-forward block reads, and are added to what it gives (He et al. 2022)."""
    reduction_factor: float = Field(default=16, gt=0)
    """Hidden width of the model over width of the bottleneck."""
    non_linearity: str = "relu"
    """Between the two products, by transformers' names of activations."""
    scaling: float = 1.0
    """The adapters' part is multiplied by it."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Of what goes into the bottleneck, in training."""
    target_modules: list[str] | None = None
    """Ends of the names of the modules that get an adapter, in place of those of the known families."""

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.target_modules is None and self.is_parallel and (self.mh_adapter or not self.output_adapter):
            raise ValueError("is_parallel puts adapters beside feed-forward blocks: leave out the keys of other places")
        if self.target_modules is None and not (self.mh_adapter or self.output_adapter):
            raise ValueError("mh_adapter and output_adapter are both false: there would be no adapter at all")
        return self

    @field_validator("non_linearity")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in ACT2FN:
            raise ValueError(str(unknown("activation", name, ACT2FN)))
        return name


class Bottleneck(nn.Module):
    """A module of the frozen model with an adapter behind it or beside it: y + s · up(f(down(y or x))).

    The upper product starts at zero, so that training starts from the frozen model.
    """

    def __init__(self, wrapped: nn.Module, width: int, settings: BottleneckSettings) -> None:
        super().__init__()
        size = max(1, round(width / settings.reduction_factor))
        self.wrapped, self.parallel, self.scaling = wrapped, settings.is_parallel, settings.scaling
        self.down, self.up = nn.Linear(width, size), nn.Linear(size, width)
        self.activation, self.dropout = ACT2FN[settings.non_linearity], nn.Dropout(settings.dropout)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, hidden: Tensor) -> Tensor:
        """What the wrapped module gives for float[..., width], and the adapter's part."""
        result: Tensor = self.wrapped(hidden)
        read = hidden if self.parallel else result
        inner = self.activation(self.down(self.dropout(read.to(self.down.weight.dtype))))
        return result + (self.scaling * self.up(inner)).to(result.dtype)


def insert_bottlenecks(model: PreTrainedModel, settings: BottleneckSettings) -> PreTrainedModel:
    """Freeze `model` and put trainable adapters into all of its layers, in place.

    Raises:
        RecllmError: no module of the model has a name that the settings look for, or none in one of the places.
    """
    model.requires_grad_(False)
    found = [(name, module) for name, module in model.named_modules() if _adapted(name, settings)]
    for kind in _places(settings):
        if not any(_ends(name, kind) for name, _ in found):
            raise RecllmError(
                f"A model of the kind '{model.config.model_type}' has no module whose name ends in one of "
                f"{', '.join(kind)}. Name its modules: --set 'adapter.target_modules=[\"…\"]'."
            )
    for ending in settings.target_modules or ():
        if not any(_ends(name, (ending,)) for name, _ in found):
            raise RecllmError(f"No module of this model has a name that ends in '{ending}' (adapter.target_modules).")
    for name, module in found:
        _check_width(name, module, model.config.hidden_size, settings)
    device = next(model.parameters()).device
    for name, module in reversed(found):  # what is inside first: its parent is another one once that is wrapped
        parent, _, own = name.rpartition(".")
        wrapped = Bottleneck(module, model.config.hidden_size, settings).to(device)
        setattr(model.get_submodule(parent), own, wrapped)
    return model


def _check_width(name: str, module: nn.Module, width: int, settings: BottleneckSettings) -> None:
    """Check that an adapter behind or beside a module reads and writes as wide as the model is.

    Raises:
        RecllmError: the module is a product of another width, or an attention, which gives more than hidden states.
    """
    wide = [getattr(module, "out_features", getattr(module, "nf", width))]
    wide += [getattr(module, "in_features", getattr(module, "nx", width))] * settings.is_parallel
    if set(wide) != {width} or "Attention" in type(module).__name__:
        what = "an attention, not its last product" if set(wide) == {width} else f"not {width:,} wide, as the model"
        raise RecllmError(
            f"An adapter cannot be put at '{name}', which is {what}. Name others in adapter.target_modules, such "
            "as down_proj or o_proj."
        )


def _places(settings: BottleneckSettings) -> list[tuple[str, ...]]:
    """Ends of the names of the modules in each place that gets adapters."""
    if settings.target_modules is not None:
        return [tuple(settings.target_modules)]
    if settings.is_parallel:
        return [FEED_FORWARD]
    return [ATTENTION_OUT] * settings.mh_adapter + [FEED_FORWARD_OUT] * settings.output_adapter


def _ends(name: str, endings: tuple[str, ...]) -> bool:
    if endings == FEED_FORWARD_OUT and _ends(name, ATTENTION_OUT):
        return False  # BERT's `attention.output.dense` ends like its feed-forward's `output.dense`
    return any(f".{name}".endswith(f".{ending}") for ending in endings)


def _adapted(name: str, settings: BottleneckSettings) -> bool:
    return any(_ends(name, endings) for endings in _places(settings))

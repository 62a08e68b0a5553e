"""Language models: load a base model by name, and read histories for the next item."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from functools import partial
from io import StringIO
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils import logging as hf_logging

from recllm.adapters import LOFTQ, AdapterRecipe, attach
from recllm.devices import on_cpu, on_gpu
from recllm.errors import RecllmError
from recllm.fetch import pinned, resolve_model
from recllm.files import whole_folder
from recllm.histories import HistoryFormat
from recllm.loftq import round_layers, start_from_rounding
from recllm.runs import ModelSettings
from recllm.sequence import NextItemModel
from recllm.tokens import open_tokenizer
from recllm.vectors import ItemFeatures

SCALE_SAMPLE = 4096
"""Embeddings on which the scale of item tokens is measured."""
MODEL_FILES = ("config.json", "*.safetensors", "*.bin")
"""What makes a model the one that it is."""


@dataclass(frozen=True)
class BaseModel:
    """A pretrained model without its output matrix, and its tokenizer.

    Attributes:
        model: hidden states come out of it.
        tokenizer: the fast tokenizer, for compiling prompts.
        causal: attention looks back only.
        folder: the local folder it came from.
        output: the output matrix of a causal model, whose rows are the answer words; None for an encoder.
    """

    model: PreTrainedModel
    tokenizer: Tokenizer
    causal: bool
    folder: Path
    output: nn.Linear | None = None


def model_folder(name: str, say: Callable[[str], None] = lambda _: None) -> Path:
    """The local folder of a model given by name, hub id or path; a GGUF file is converted once.

    Raises:
        RecllmError: unknown name, or a hub id that cannot be reached.
    """
    found = resolve_model(name, say)
    if isinstance(found, str):
        return _from_hub(found)
    gguf = sorted(found.glob("*.gguf"))
    if not gguf or (found / "config.json").is_file():
        return found
    converted = found / "converted"
    if not (converted / "config.json").is_file():
        say(f"Converting {gguf[0].name} to safetensors, once")
        _convert_gguf(gguf[0], converted)
    return converted


HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"]
"""What is fetched of a model's repository."""
HUB_COPIES = ["*/*.safetensors"]
"""What is not: the same weights again in another layout (`original/consolidated.safetensors`)."""
OLD_WEIGHTS = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]
"""What is fetched where a repository has its weights in no newer form."""


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download  # heavy, and only for hub ids

    repository, revision = pinned(name)
    download = partial(snapshot_download, repository, revision=revision)
    try:
        folder = Path(download(allow_patterns=HUB_FILES, ignore_patterns=HUB_COPIES))
        if not any(folder.glob("*.safetensors")):
            folder = Path(download(allow_patterns=OLD_WEIGHTS))
        return folder
    except Exception as error:  # the hub raises many kinds, for a user they are one
        reason = str(error).splitlines()[0]
        raise RecllmError(
            f"The model '{name}' cannot be had from the hub: {reason}. A local folder works too."
        ) from error


@contextmanager
def _quietly() -> Iterator[None]:
    """Without transformers' bars and advice while it loads: what a user needs to know, recllm says."""
    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


def _convert_gguf(path: Path, target: Path) -> None:
    with _quietly(), redirect_stderr(StringIO()):  # its bar heeds no setting
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        # The weights are plain floats now; transformers refuses to save while the model still calls itself quantised.
        del model.config.quantization_config
        model.hf_quantizer, model.is_quantized = None, False
        with whole_folder(target) as folder:
            model.save_pretrained(folder)
            AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)


BOTH_WAYS = (True, "all")


def is_causal(config: PretrainedConfig) -> bool:
    """Whether a model of this configuration looks back only."""
    # A body of a causal kind may be told to look both ways, as those of text encoders made of one are.
    if getattr(config, "is_causal", None) is False or getattr(config, "use_bidirectional_attention", None) in BOTH_WAYS:
        return False
    if any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in config.architectures or ()):
        return True
    # A checkpoint without its head: every kind that could fill in blanks has a causal variant too, and is none itself.
    kind = config.model_type
    return kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def not_causal(name: str) -> RecllmError:
    """Build the error for an encoder where the next item has to be predicted."""
    return RecllmError(f"'{name}' is an encoder; next_item needs a causal model. Use it as model.item_encoder instead.")


def load_tokenizer(folder: Path) -> Tokenizer:
    """The fast tokenizer of a model folder.

    Raises:
        RecllmError: the folder has none.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise RecllmError(f"{folder} has no tokenizer.json: recllm needs a fast tokenizer to compile prompts exactly.")
    return open_tokenizer(path)


def load_config(folder: Path) -> PretrainedConfig:
    """The configuration of a model folder.

    Raises:
        RecllmError: the folder holds no model that transformers knows.
    """
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise RecllmError(f"'{folder}' holds no model that transformers can load: {reason}") from None


def check_layers(folder: Path, layers: int | None) -> None:
    """Check that a model has so many layers.

    Raises:
        RecllmError: it has fewer.
    """
    there: int = load_config(folder).get_text_config().num_hidden_layers
    if layers is not None and layers > there:
        raise RecllmError(f"model.layers = {layers}, and {folder} has {there} layers. Take at most that many.")


def load_base(
    folder: Path, recipe: AdapterRecipe | None = None, layers: int | None = None, *, drawn_by: int | None = None
) -> BaseModel:
    """Load hidden-state model and tokenizer; frozen, in evaluation mode, float32 unless the recipe quantises it.

    Args:
        folder: the model.
        recipe: says whether it is quantised.
        layers: keep the first so many only, and the norm behind the last one; None keeps all.
        drawn_by: a seed that draws the weights anew in place of the pretrained ones, as a control; with no recipe that
            quantises, for transformers quantises what it loads.
    """
    config = load_config(folder)
    quantization = None if recipe is None or recipe.quantization is None else BitsAndBytesConfig(**recipe.quantization)
    causal = is_causal(config)
    # Quantised weights go where they are quantised, by themselves to a GPU.
    place = {"device_map": {"": "cpu"}} if quantization is not None and torch.cuda.is_available() and on_cpu() else {}
    # A causal model is loaded whole and its body taken: a checkpoint of one names its weights that way.
    kind = AutoModelForCausalLM if causal else AutoModel
    with _quietly():
        if drawn_by is not None:
            torch.manual_seed(drawn_by)
            model = kind.from_config(config, dtype=torch.float32)
        else:
            try:
                model = kind.from_pretrained(folder, dtype=torch.float32, quantization_config=quantization, **place)
            # The last three of weights of another shape than the configuration says, and of damaged .bin files.
            except (OSError, SafetensorError, RuntimeError, UnpicklingError, EOFError) as error:
                reason = str(error).splitlines()[0]
                raise RecllmError(f"The weights of '{folder}' cannot be loaded: {reason}") from None
    body = _body(model) if causal else model
    if quantization is not None and body is not model:
        # PEFT asks the module that it is given whether its layers are quantised.
        for mark in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
            setattr(body, mark, getattr(model, mark, False))
    for module in body.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes 0.50 packs 4-bit weights anew in a validation on such a CPU and leaves them so: no gradient
            # would flow through them when training goes on.
            module.support_avx512bf16_for_cpu = False
    if layers is not None:
        _shorten(body, layers)
    body.requires_grad_(False).eval()
    output = model.get_output_embeddings() if causal else None
    return BaseModel(body, load_tokenizer(folder), causal, folder, output)


def skeleton(folder: Path, layers: int | None = None) -> PreTrainedModel:
    """The hidden-state model of a folder without any weights, on the meta device; its first `layers`, None for all."""
    config = load_config(folder)
    causal = is_causal(config)
    with torch.device("meta"), _quietly():
        model = (AutoModelForCausalLM if causal else AutoModel).from_config(config, dtype=torch.float32)
    body = _body(model) if causal else model
    if layers is not None:
        _shorten(body, layers)
    return body


def _body(model: PreTrainedModel) -> PreTrainedModel:
    """A causal model without its head; of some kinds what goes by the name of decoder is the head."""
    decoder = model.get_decoder()
    return decoder if isinstance(decoder, PreTrainedModel) else model.base_model


def _shorten(body: PreTrainedModel, layers: int) -> None:
    """Keep the first layers, in place."""
    there = body.config.num_hidden_layers
    for module in body.modules():
        for name, own in module.named_children():
            if isinstance(own, nn.ModuleList) and len(own) == there:
                setattr(module, name, own[:layers])
    body.config.num_hidden_layers = layers
    if kinds := getattr(body.config, "layer_types", None):
        body.config.layer_types = kinds[:layers]


def scoring_device() -> str:
    """Where a model reads outside of training: the first GPU, else the CPU, as training (`on_gpu`)."""
    return "cuda" if on_gpu() else "cpu"


def stream_width(config: PretrainedConfig) -> int:
    """How wide what a model takes and gives is: some OPT models are wider inside."""
    return int(getattr(config, "word_embed_proj_dim", None) or config.hidden_size)


def mean_pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean of float[batch, length, width] over the positions where int[batch, length] is 1."""
    weights = mask[..., None].to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1)


def positions_of(base: BaseModel) -> int | None:
    """The most tokens that a model reads; None where it takes any number."""
    positions: int | None = getattr(base.model.config, "max_position_embeddings", None)
    # RoBERTa's relatives count positions from 2.
    return None if positions is None else positions - (0 if base.causal else 2)


def given_positions(batch: int, length: int, device: torch.device) -> dict[str, Tensor]:
    """Positions and mask of histories that are padded on the right, where the model is being exported; else nothing.

    A row for every history: ONNX's RotaryEmbedding (opset 23) does not broadcast the one row that is the default. The
    mask keeps transformers from looking for packed sequences in these positions.
    """
    if not torch.compiler.is_exporting():
        return {}
    positions = torch.arange(length, device=device).expand(batch, -1)
    return {"attention_mask": torch.ones(batch, length, dtype=torch.long, device=device), "position_ids": positions}


class LanguageBody(nn.Module):
    """A causal language model as the body of a next-item model: input vectors in, hidden states out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        """Hidden states float32[batch, length, width]; right padding needs no mask, for attention only looks back."""
        given = given_positions(tokens.shape[0], tokens.shape[1], tokens.device)
        hidden = self.model(inputs_embeds=tokens, use_cache=False, **given).last_hidden_state
        return hidden.float()


def next_item_model(
    base: BaseModel,
    recipe: AdapterRecipe | None,
    features: ItemFeatures,
    counts: NDArray[np.int64],
    history: HistoryFormat,
    settings: ModelSettings,
    *,
    repeats: bool = False,
    drift: int = 0,
    learnt: int = 0,
) -> NextItemModel:
    """Put projections and heads around a causal base model; `recipe` None leaves it frozen without an adapter.

    `counts` are the items' training events, int64[items]; `repeats` says whether an item may come again, `drift` into
    how many stretches the training time is cut, `learnt` how wide a vector the model learns of each item.

    Raises:
        RecllmError: the base model is an encoder, whose hidden states see the items that they should predict.
    """
    if not base.causal:
        raise not_causal(settings.name)
    embedding, scale = base.model.get_input_embeddings(), embedding_scale(base)
    lead_ids = torch.tensor(history.vocabulary, dtype=torch.long)
    body = adapted(base, recipe)
    return NextItemModel(
        LanguageBody(body),
        features,
        width=stream_width(base.model.config),
        head_width=settings.head_width,
        warm=counts > 0,
        token_scale=scale,
        lead=partial(_embed, embedding, lead_ids),
        factor_dropout=settings.factor_dropout,
        counts=counts,
        negatives=settings.negatives,
        repeats=repeats,
        drift=drift,
        learnt=learnt,
    )


def adapted(base: BaseModel, recipe: AdapterRecipe | None) -> nn.Module:
    """A base model with the recipe's modules as they are before any training; as it is where there is no recipe.

    Raises:
        RecllmError: as `attach` does.
    """
    if recipe is None:
        return base.model
    body = attach(base.model, recipe)
    if recipe.start == LOFTQ and recipe.quantization is not None:
        start_from_rounding(body, lambda: load_base(base.folder).model)
    elif recipe.start == LOFTQ:
        round_layers(body, recipe.rounding)
    return body


def embedding_scale(base: BaseModel) -> float:
    """Root mean square of a model's input embeddings, on a sample."""
    embedding = base.model.get_input_embeddings()
    # What comes out of the module, not its weights: some families scale their embeddings on the way.
    sample = torch.arange(min(SCALE_SAMPLE, embedding.num_embeddings))
    return float(_embed(embedding, sample).float().pow(2).mean().sqrt())


def _embed(embedding: nn.Module, ids: Tensor) -> Tensor:
    # Through the module, not its weight: some families scale their embeddings on the way out.
    weight: Tensor = embedding.weight  # type: ignore[assignment]
    return embedding(ids.to(weight.device)).detach()

"""The run file: data, prompt, adapter, model, training and fusion in one TOML file, and the folder it fills."""

import json
import os
import platform
import re
import tomllib
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, JsonValue, field_validator, model_validator

from recllm.control import ControlSettings
from recllm.errors import RecllmError
from recllm.files import write_json, written
from recllm.itemitem import EaseSettings, TransitionSettings
from recllm.mf import FactorSettings
from recllm.neighbours import NeighbourSettings
from recllm.recency import RecencySettings
from recllm.recipes import Settings, parse, read_toml
from recllm.weighing import FusionSettings

FILE, ENVIRONMENT, RECIPES = "run.toml", "environment.json", "recipes"
"""What a run's folder holds: the resolved run file, what it ran on, its prompts and adapter recipe as they were."""
BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
PACKAGES = (
    "recllm",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "onnxruntime-gpu",
    "onnxruntime",
    "implicit",
    "numpy",
)


MOST_NAMED = 12
"""Runs that a message names."""


class DataSettings(Settings):
    """`[data]`: where interactions and items come from, and how they are split."""

    name: str = ""
    """A fetchable name, a folder, or the name of a folder under RECLLM_DATA; may be left out where `interactions` is
    given."""
    interactions: str | None = None
    """A file of its own for the interactions."""
    items: str | None = None
    """A file of its own for the items."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Our name = the file's column, for the interactions."""
    item_columns: dict[str, str] = Field(default_factory=dict)
    """Our name = the file's column, for the items."""
    duplicates: Literal["first", "last", "keep"] = "first"
    """Which of several events of one user with one item stays."""
    split: Literal["leave-last-out", "temporal", "cold-items", "given"] = "leave-last-out"
    """How validation and test events are chosen; `given`: the data set has train, valid and test rows of its own."""
    min_events: int = Field(default=4, ge=3)
    """Users with fewer events are only trained on (leave-last-out, and with cold-items those with fewer warm ones)."""
    like_at: float = 4.0
    """A rating of at least this is a like."""
    cold_share: float = Field(default=0.1, gt=0, lt=1)
    """Share of items held out of all training (cold-items)."""
    given_back: int = Field(default=0, ge=0)
    """The first events of every held-out item that are given back to training (cold-items)."""
    test_rows: int | None = Field(default=None, ge=1)
    """The most test rows, drawn by the seed; all of them when not given."""
    shots: int | None = Field(default=None, ge=2)
    """Train on so many of the train rows, drawn by the run's seed (given)."""
    rated_histories: bool = True
    """Where histories come without labels, take those of the user's earlier train rows (given)."""
    seed: int | None = Field(default=None, ge=0, lt=2**32)
    """Draws the split; the run's own seed when not given."""

    @model_validator(mode="after")
    def _names_its_data(self) -> "DataSettings":
        if not self.name and self.interactions is None:
            raise ValueError("name a data set (name), or give a file (interactions)")
        return self


PromptKey = Literal["relevance", "next_item", "item", "likelihood"]
PROMPTS: dict[PromptKey, Literal["relevance", "next_item", "item"]] = {
    "relevance": "relevance",
    "next_item": "next_item",
    "item": "item",
    "likelihood": "item",
}
"""The keys of `[prompt]`, and the task that each one's file is for."""


ONLY_FOR: dict[Literal["next_item", "relevance"], tuple[str, ...]] = {
    "next_item": (
        "model.history",
        "model.negatives",
        "model.heads_from_light",
        "model.learnt_width",
        "light.negatives",
        "light.teacher",
        "train.recent_windows",
        "fusion.queries",
        "fusion.choosing",
        "fusion.negatives",
        "fusion.new_queries",
        "fusion.new_share",
        "fusion.new_cost",
        "recency.popularity_days",
        "recency.as_of",
        "recency.drift",
    ),
    "relevance": (
        "model.pairwise",
        "model.listwise",
        "model.relevance_rows",
        "model.rows_together",
        "model.soft_tokens",
        "light.listwise",
        "light.pairwise",
        "light.pairs_in_step",
        "fusion.pairwise",
    ),
}
"""Keys that say nothing to a run of the other task."""
OF_LANGUAGE_MODEL = (
    "model.layers",
    "model.history",
    "model.max_history",
    "model.history_stride",
    "model.head_width",
    "model.factor_dropout",
    "model.negatives",
    "model.heads_from_light",
    "model.rows_together",
    "model.pairwise",
    "model.listwise",
    "model.soft_tokens",
)
"""Keys of `[model]` that only the language model's own training reads."""
OF_SEQUENCE_MODELS = ("recency.drift", "model.learnt_width")
"""Keys outside their own tables that the light scorer and the language model read, and nothing else."""
LIGHT_READS = ("train.precision", "train.report_to")
"""Keys of `[train]` that the light sequence scorer reads as well; the light judge reads the second one only."""
FORMER_DEFAULTS: dict[str, tuple[Any, ...]] = {
    "fusion.queries": (2000,),
    "recency.as_of": (False,),
    "recency.drift": (0,),
}
"""What keys of `ONLY_FOR` were by default before; the files of runs that were trained then spell it out."""
BEGUN_WITHOUT: dict[str, dict[str, Any]] = {
    "recency": {"as_of": False, "drift": 0},
    "neighbours": {"regression": False},
}
"""What the run file of a folder that was begun before these keys were there means by saying nothing of them."""


class PromptSettings(Settings):
    """`[prompt]`: a shipped name or a path to a TOML file, one per task."""

    relevance: str = "relevance"
    """Read when the model answers whether a user will like a candidate."""
    next_item: str = "next_item"
    """Read when the model predicts the next item."""
    item: str = "item"
    """Read when an item becomes a vector."""
    likelihood: str = "likelihood"
    """Read when a language model says how probable an item's name is."""


class AdapterSettings(Settings):
    """`[adapter]`: the recipe, and PEFT's own keys over it."""

    model_config = ConfigDict(extra="allow", frozen=True)

    recipe: str = "lora"
    """A name in adapters/ or a path; `none` trains only the projections beside the frozen model."""

    @model_validator(mode="after")
    def _no_recipe_has_no_keys(self) -> "AdapterSettings":
        if self.recipe == "none" and self.model_extra:
            raise ValueError(f"recipe is 'none', and {', '.join(self.model_extra)} would be of an adapter")
        return self

    def overrides(self) -> dict[str, Any]:
        """The keys given beside `recipe`, PEFT's own."""
        return dict(self.model_extra or {})


class ModelSettings(Settings):
    """`[model]`: the language model and what it does."""

    name: str = "smollm2-135m-instruct"
    """A fetchable name, a hub id (owner/model, owner/model@revision), a local folder, or `none`: no language model."""
    item_encoder: str | None = None
    """What turns item text into vectors; the model itself when not given."""
    task: Literal["next_item", "relevance"] = "next_item"
    """What is trained."""
    layers: int | None = Field(default=None, ge=1)
    """Keep the first so many layers of the language model; all when not given."""
    history: Literal["items", "text"] = "items"
    """One token per item, or the item's words (next_item)."""
    max_history: int = Field(default=50, ge=1)
    """How many of the last items are read; where pairs are judged at most as many as the prompt says (30)."""
    history_stride: int | None = Field(default=None, ge=1)
    """A longer history starts at a multiple of this, so that its beginning can be shared, and up to so many fewer items
    are read; by default of 10 items, at most half of `max_history`, and where pairs are judged as the prompt says."""
    head_width: int = Field(default=256, ge=1)
    """Width of the space in which histories and items are compared."""
    factor_dropout: float = Field(default=0.1, ge=0, lt=1)
    """Share of items that lose their factors in a step, so that cold items work."""
    negatives: int = Field(default=0, ge=0)
    """Items that are drawn in a step and stand for all others in the softmax; 0 takes all (next_item)."""
    heads_from_light: bool = True
    """Start from the light scorer's item vectors, where there is one and `head_width` is its width (next_item)."""
    learnt_width: int = Field(default=0, ge=0)
    """Width of a vector of its own that the light scorer and the language model learn of each item with events, beside
    its text vector and factors; 0 for none (next_item)."""
    relevance_rows: int = Field(default=20_000, ge=1)
    """The most rows of an epoch (relevance); a larger training set is sampled anew for every epoch."""
    rows_together: int = Field(default=1, ge=1)
    """The most events of a user that are read behind one history, in one sequence (relevance, causal models)."""
    pairwise: float = Field(default=0.0, ge=0)
    """Weight of the loss over pairs of one user's liked and disliked rows beside cross-entropy (relevance)."""
    listwise: float = Field(default=0.0, ge=0)
    """Weight of the softmax over one user's rows beside cross-entropy (relevance)."""
    likelihood: str | None = None
    """A causal language model whose likelihood of an item's name is one more scorer: it knows what is famous. None
    when not given."""
    soft_tokens: bool = False
    """Name each item also by one token of its text vector and factors (relevance)."""


class LightSettings(Settings):
    """`[light]`: the light sequence scorer over the same item vectors."""

    width: int = Field(default=256, ge=8)
    """Hidden width."""
    layers: int = Field(default=2, ge=1)
    """Transformer layers."""
    heads: int = Field(default=4, ge=1)
    """Attention heads."""
    dropout: float = Field(default=0.2, ge=0, lt=1)
    """Dropout in every layer."""
    relative_positions: bool = False
    """Whether every attention head also learns how much each distance between two items of a history counts."""
    gated: bool = False
    """Whether every layer gates what its attention has mixed, as HSTU does."""
    max_history: int = Field(default=50, ge=1)
    """How many of the last items are read."""
    factor_dropout: float = Field(default=0.1, ge=0, lt=1)
    """Share of items that lose their factors in a step, so that cold items work."""
    negatives: int = Field(default=0, ge=0)
    """Items that are drawn in a step and stand for all others in the softmax; 0 takes all (next_item)."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak learning rate of AdamW."""
    weight_decay: float = Field(default=0.01, ge=0)
    """AdamW's."""
    per_device_train_batch_size: int = Field(default=32, ge=1)
    """Windows in a step."""
    pairs_in_step: int = Field(default=128, ge=1)
    """Labelled pairs in a step, where the run judges pairs."""
    pairwise: float = Field(default=0.5, ge=0)
    """Weight of the loss over pairs of one user's liked and disliked rows, where the run judges pairs."""
    listwise: float = Field(default=0.0, ge=0)
    """Weight of the softmax over one user's rows, where the run judges pairs."""
    num_train_epochs: int = Field(default=10, ge=0)
    """Passes over all events; 0 trains no light scorer."""
    teacher: str | None = None
    """Folder of a finished run on the same data; its fused scores are learnt from beside the events (next_item)."""
    taught: int = Field(default=10_000, ge=1)
    """Histories that the teacher is asked about; they are learnt from in every pass."""
    taught_weight: float = Field(default=1.0, gt=0)
    """Weight of a step over such histories beside that of a step over events."""

    @model_validator(mode="after")
    def _heads_divide_the_width(self) -> "LightSettings":
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self


class TrainSettings(Settings):
    """`[train]`: the language model's training; every other key is one of Trainer's own (TrainingArguments).

    Where ours differ by default: a cosine schedule behind `warmup_steps` of 5 % of the steps; ten validations in a
    training (`eval_steps`), each of them a checkpoint, of which the best by `metric_for_best_model` is kept in the end
    and the last two until then (`save_total_limit`); 32 rows validated at once; the loss is noted every 10 steps.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    learning_rate: float = Field(default=5e-4, ge=0)
    """Peak learning rate of the adapter; 0 leaves it as it starts, and only what is beside it trains."""
    head_learning_rate: float = Field(default=1e-3, gt=0)
    """Peak learning rate of the projections and of what is learnt of each item."""
    num_train_epochs: int = Field(default=1, ge=1)
    """Passes over the training windows; each pass cuts them anew."""
    max_steps: int = Field(default=-1, ge=-1)
    """Stop after this many steps, whatever the epochs say."""
    per_device_train_batch_size: int = Field(default=16, ge=1)
    """Histories in a step on one device."""
    recent_windows: bool = False
    """Train on the last window of every user only (next_item)."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Also of the light sequence scorer; `auto` takes bf16 where the machine multiplies it fast, else fp32."""
    early_stopping_patience: int | None = Field(default=None, ge=1)
    """Stop after so many validations without a better one."""

    @field_validator("max_steps")
    @classmethod
    def _is_a_number_of_steps(cls, steps: int) -> int:
        if steps == 0:
            raise ValueError("no steps train nothing: -1 leaves it to the epochs, and model.name = none does without")
        return steps

    def trainer_keys(self) -> dict[str, Any]:
        """The keys that are Trainer's own; what does not ask for half precision leaves that to `precision`."""
        given = self.model_extra or {}
        return {key: own for key, own in given.items() if own or key not in ("bf16", "fp16")}


class ExportSettings(Settings):
    """`[export]`: what is shipped."""

    recipes: tuple[str, ...] = ("fp32", "int8")
    """Names in export/ or paths."""
    gate_queries: int = Field(default=64, ge=1)
    """How many validation histories the graphs are compared on."""


class Run(Settings):
    """One run file."""

    name: str
    """Names the folder under `output`."""
    output: str = "runs"
    """Where run folders lie."""

    @field_validator("name")
    @classmethod
    def _one_folder(cls, name: str) -> str:
        if name in ("", ".", "..") or "/" in name or os.sep in name:
            raise ValueError("a run's name is the name of its folder: not empty, not . or .., without slashes")
        return name

    seed: int = Field(default=0, ge=0, lt=2**32)
    """The one seed; everything random is drawn from it."""
    start_from: str | None = None
    """Folder of a finished run of the same models; light scorer and language model start from what it learnt."""
    data: DataSettings
    prompt: PromptSettings = PromptSettings()
    adapter: AdapterSettings = AdapterSettings()
    model: ModelSettings = ModelSettings()
    light: LightSettings = LightSettings()
    train: TrainSettings = TrainSettings()
    cf: FactorSettings = FactorSettings()
    recency: RecencySettings = RecencySettings()
    ease: EaseSettings = EaseSettings()
    transitions: TransitionSettings = TransitionSettings()
    neighbours: NeighbourSettings = NeighbourSettings()
    fusion: FusionSettings = FusionSettings()
    export: ExportSettings = ExportSettings()
    control: ControlSettings = ControlSettings()

    @model_validator(mode="after")
    def _keys_fit_the_task(self) -> "Run":
        for task, keys in ONLY_FOR.items():
            for key in keys:
                part, name = key.split(".")
                own = getattr(self, part)
                silent = type(own).model_fields[name].default, *FORMER_DEFAULTS.get(key, ())
                if self.model.task != task and getattr(own, name) not in silent:
                    raise ValueError(f"{key} is for model.task = '{task}'; with '{self.model.task}' it does nothing")
        if self.model.name == "none" and self.model.item_encoder is None:
            raise ValueError("model.name is none: name what reads the items' text, as model.item_encoder = minilm-l6")
        reads_words = self.model.name != "none" and (self.model.task == "relevance" or self.model.history == "text")
        if self.control.text != "own" and (reads_words or self.model.likelihood is not None):
            raise ValueError("control.text takes away items' vectors, and this run's language model reads their words")
        if self.control.language_model == "random" and self.model.name == "none" and self.model.likelihood is None:
            raise ValueError("control.language_model is random, and model.name = none: there is nothing to draw")
        return self

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.output) / self.name

    def prompt_file(self, key: PromptKey) -> str:
        """The prompt that a key of `[prompt]` names: the copy in the run's folder, else what the run file says."""
        kept = self.folder / RECIPES / f"{key}.toml"
        return str(kept) if kept.is_file() else str(getattr(self.prompt, key))

    @property
    def adapter_file(self) -> str:
        """The adapter's recipe: the copy in the run's folder, else what the run file names."""
        kept = self.folder / RECIPES / "adapter.toml"
        return str(kept) if kept.is_file() else self.adapter.recipe


def load_run(path: Path, overrides: Sequence[str] = ()) -> Run:
    """Read a run file, with `key.path=value` overrides over it; a run's folder works in its file's place.

    A folder is read where it lies now, wherever it was when it was trained.

    Raises:
        RecllmError: no file, not TOML, an unknown key or a value of the wrong kind.
    """
    folder = path.resolve() if path.is_dir() else None
    file = path / FILE if folder else path
    if not file.is_file():
        raise RecllmError(f"There is no run file '{file}'. {_beside(path)}")
    values = read_toml(file)
    if folder:
        values |= {"name": path.name or folder.name, "output": str(path.parent if path.name else folder.parent)}
    own = folder or (file.resolve().parent if file.name == FILE else None)
    if own and (own / ENVIRONMENT).is_file():  # begun, it may be before these keys were there
        values = as_begun(values)
    path = file
    values.setdefault("name", path.stem)
    for override in overrides:
        set_key(values, override)
    return parse(Run, values, str(path))


def _beside(path: Path) -> str:
    """What may have been meant where there is no run."""
    if (path / "manifest.json").is_file():
        return f"'{path}' is a bundle; its run is the folder that it was exported into."
    runs = sorted(own.parent.name for own in path.parent.glob(f"*/{FILE}"))
    if runs:
        return f"Runs in '{path.parent}': {', '.join(runs[:MOST_NAMED])}{', …' * (len(runs) > MOST_NAMED)}."
    return "Write one (README, or all keys in docs/run-file.md), or let `recllm quickstart` write one and train it."


def as_begun(values: dict[str, Any]) -> dict[str, Any]:
    """The tables of a run that was begun, it may be before some keys were there, with what their absence means."""
    return values | {table: keys | values.get(table, {}) for table, keys in BEGUN_WITHOUT.items()}


def set_key(values: dict[str, Any], override: str) -> None:
    """Set `a.b=value` in nested tables; the value is read as TOML, else as a string.

    Raises:
        RecllmError: no equals sign, or a path through something that is no table.
    """
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise RecllmError(f"--set {override}: expected key.path=value, as in --set train.learning_rate=2e-4.")
    *tables, key = path.strip().split(".")
    for table in tables:
        values = values.setdefault(table, {})
        if not isinstance(values, dict):
            raise RecllmError(f"--set {override}: '{table}' is a value, not a table.")
    try:
        values[key] = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        values[key] = text


def write_run(run: Run, path: Path) -> None:
    """Write the resolved run as TOML, every default spelt out."""
    lines: list[str] = []
    _write_table(run.model_dump(mode="json", exclude_none=True), "", lines)
    with written(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write_table(values: dict[str, Any], prefix: str, lines: list[str]) -> None:
    for key, value in values.items():
        if not isinstance(value, dict) or not value:  # an empty table says something else than none
            lines.append(f"{_key(key)} = {as_toml(value)}")
    for key, value in values.items():
        if isinstance(value, dict) and value:
            lines.extend(["", f"[{prefix}{_key(key)}]"])
            _write_table(value, f"{prefix}{_key(key)}.", lines)


def _key(name: str) -> str:
    return name if BARE_KEY.fullmatch(name) else as_toml(name)


def as_toml(value: JsonValue) -> str:
    """A value as a run file has it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON's escapes are TOML's, but for the delete character, which TOML does not take as it is.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list):
        return "[" + ", ".join(as_toml(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_key(key)} = {as_toml(item)}" for key, item in value.items()) + "}"
    return repr(value)


def write_environment(
    run: Run,
    fingerprints: dict[str, str],
    models: dict[str, str],
    *,
    device: str,
    processes: int = 1,
    sharding: str = "none",
) -> None:
    """Write versions, seed, device, processes and sharding, and what data and base models were, beside the weights."""
    versions = {package: found for package in PACKAGES if (found := _version(package))}
    facts = {"seed": run.seed, "data": fingerprints, "versions": versions, "device": device, "processes": processes}
    facts |= {"sharding": sharding, "models": models}
    write_json(run.folder / ENVIRONMENT, facts | {"python": platform.python_version(), "machine": platform.platform()})


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None

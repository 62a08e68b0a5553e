"""Keys of a run file that are set and say nothing to that run: told before it trains, not refused.

A run file is tried with and without a language model by one `--set`, so that what only the other way reads may stay.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from recllm.runs import LIGHT_READS, OF_LANGUAGE_MODEL, OF_SEQUENCE_MODELS, Run

WITHOUT_TEACHER = ("light.taught", "light.taught_weight")
"""Keys of `[light]` that say how a teacher is learnt from."""
WHERE_PAIRS_ARE_JUDGED = ("model.head_width", "light.per_device_train_batch_size")
"""Keys that say nothing where pairs are judged, beside two whole tables."""
OF_SPLITS = {
    "data.min_events": ("leave-last-out", "cold-items"),
    "data.cold_share": ("cold-items",),
    "data.given_back": ("cold-items",),
    "data.shots": ("given",),
    "data.rated_histories": ("given",),
}
"""Keys that only some ways to split read."""


def idle_keys(run: Run) -> dict[str, list[str]]:
    """Keys that are not as they are by default and that this run does not read.

    Returns:
        By what they are idle for, such as `model.name = none`, their names, `table.key`.
    """
    found: dict[str, list[str]] = {}
    told: set[str] = set()
    for why, keys in _idle(run):
        if new := [key for key in keys if key not in told]:
            found[why] = new
            told.update(new)
    return found


def idle_lines(run: Run) -> list[str]:
    """A line for every reason that keys of `run` are idle for."""
    return [f"Not read, for {why}: {', '.join(keys)}" for why, keys in idle_keys(run).items()]


def _idle(run: Run) -> Iterator[tuple[str, list[str]]]:
    tables = [name for name, value in run if isinstance(value, BaseModel)]
    changed = {name: list(_changed(getattr(run, name), name)) for name in tables}
    light = [key for key in changed["light"] if key != "light.num_train_epochs"]
    judges = run.model.task == "relevance"
    if run.model.name == "none":
        read = LIGHT_READS[1:] if judges else LIGHT_READS
        behind = [*changed["adapter"], *(key for key in changed["train"] if key not in read)]
        yield "model.name = none", [*behind, *_among(changed["model"], OF_LANGUAGE_MODEL)]
    if run.light.num_train_epochs == 0:
        # A teacher's own start still says which rows it has learnt.
        yield "light.num_train_epochs = 0", [key for key in light if key != "light.teacher"]
        if run.model.name == "none":
            yield "there is no sequence model", _among([*changed["recency"], *changed["model"]], OF_SEQUENCE_MODELS)
    if run.control.factors != "own":
        yield f"control.factors = {run.control.factors}", _among(changed["model"], OF_SEQUENCE_MODELS)
    if not run.recency.popularity_days:
        yield "recency.popularity_days is empty", _among(changed["recency"], ("recency.as_of",))
    if run.light.teacher is None:
        yield "there is no light.teacher", _among(light, WITHOUT_TEACHER)
    if judges:
        judged = _among([*changed["model"], *light], WHERE_PAIRS_ARE_JUDGED)
        yield "model.task = relevance", [*judged, *changed["transitions"], *changed["neighbours"]]
        if not run.model.soft_tokens:
            yield "model.soft_tokens = false", _among(changed["model"], ("model.factor_dropout",))
    other = [key for key in changed["data"] if run.data.split not in OF_SPLITS.get(key, (run.data.split,))]
    yield f"data.split = {run.data.split}", other


def _among(keys: list[str], some: tuple[str, ...]) -> list[str]:
    return [key for key in keys if key in some]


def _changed(table: BaseModel, name: str) -> Iterator[str]:
    defaults: Mapping[str, Any] = {key: field.default for key, field in type(table).model_fields.items()}
    for key, value in table:
        if key not in defaults or value != defaults[key]:
            yield f"{name}.{key}"

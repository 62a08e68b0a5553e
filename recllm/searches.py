"""Tune files: what `recllm tune` searches over, and whether a run takes it and is changed by it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from recllm.errors import RecllmError, unknown
from recllm.idle import idle_keys
from recllm.outcome import FUSION
from recllm.recipes import Settings, parse, read_toml
from recllm.runs import OF_LANGUAGE_MODEL, OF_SEQUENCE_MODELS, Run, as_toml, load_run, set_key

FITTED_SCORERS = ("popularity", "likelihood", "mf", "ease", "text")
OF_RATINGS = ("item_mean", "user_mean", "explicit", "rated_neighbours")
MEASURED: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "next_item": (
        (*FITTED_SCORERS, "transitions", "neighbours", "expected_popularity", "light", "lm"),
        ("NDCG@10", "HitRate@10", "Recall@10", "MRR", "Coverage@10"),
    ),
    "relevance": ((*FITTED_SCORERS, *OF_RATINGS, "light", "relevance"), ("AUC", "UAUC", "scored")),
}
"""By task, the scorers that a run of it may have, the language model's last, and what they are measured by."""


class Range(Settings):
    """The values of one key: from `low` to `high`, or `choices`."""

    low: int | float | None = None
    """The least value; whole numbers are drawn where both ends are written as such (1, not 1.0)."""
    high: int | float | None = None
    """The greatest value."""
    log: bool = False
    """Drawn evenly by its logarithm."""
    choices: tuple[str | bool | int | float, ...] | None = None
    """One of these."""

    @model_validator(mode="after")
    def _one_of_both(self) -> "Range":
        ends = (self.low is not None) + (self.high is not None)
        if (ends == 2) == (self.choices is not None) or ends == 1:
            raise ValueError("either low and high, or choices")
        if self.low is not None and self.high is not None and (self.low > self.high or (self.log and self.low <= 0)):
            raise ValueError("low is above high, or not above 0 with log")
        return self

    def tried(self) -> tuple[Any, ...]:
        """Values that show whether the key takes this range."""
        if self.choices is not None:
            return self.choices
        assert self.low is not None
        assert self.high is not None
        whole = isinstance(self.low, int) and isinstance(self.high, int)
        return (self.low, self.high) if whole else (self.low, self.high, (self.low + self.high) / 2)

    def draw(self, trial: Any, key: str) -> Any:  # noqa: ANN401  optuna comes without types here
        """A value of the key for a trial."""
        if self.choices is not None:
            return trial.suggest_categorical(key, list(self.choices))
        assert self.low is not None
        assert self.high is not None
        if isinstance(self.low, int) and isinstance(self.high, int):
            return trial.suggest_int(key, self.low, self.high, log=self.log)
        return trial.suggest_float(key, self.low, self.high, log=self.log)


class Limits(Settings):
    """What the best run may cost at most."""

    milliseconds_per_user: float | None = Field(default=None, gt=0)
    """To score one user on this machine with all scorers, 64 users at once."""
    megabytes: float | None = Field(default=None, gt=0)
    """Of everything that is needed to score: factors, weights, and the base model where one is used per user."""


DECIDING, HARMLESS = ("data", "seed", "start_from", "control", "model.task"), ("data.rated_histories",)
"""Tables and keys that decide what a run is measured on, and those among them that do not."""


OWN = ("name", "output")
"""Keys that the search sets for every trial."""
SWITCHES = frozenset({"model.name", "model.soft_tokens", "light.num_train_epochs", "light.teacher"})
"""Keys that decide whether other ones are read."""
BEHIND_LIGHT = ("train.", "adapter.", "model.name", "prompt.next_item", "prompt.relevance", *OF_LANGUAGE_MODEL)
"""Keys, or their beginnings, of the language model that is trained, behind all else that is fitted."""
BESIDE_LIGHT = ("train.precision",)
"""The one among them that is the light scorer's too."""


class Search(Settings):
    """One tune file."""

    run: str
    """The run file that is searched from, relative to the tune file; its values hold where nothing is searched."""
    metric: str | None = None
    """A metric of the validation table; the protocol's first by default (NDCG@10, or AUC where pairs are judged)."""
    scorer: str = FUSION
    """Whose metric."""
    trials: int = Field(default=20, ge=1)
    """Trials in all, over all workers and all calls."""
    prune: bool = True
    """Cut a trial short whose validation is below the median of the others, where `scorer` is one that trains."""
    search: dict[str, Range] = Field(min_length=1)
    """By `table.key`, what is tried."""
    limits: Limits = Limits()
    """What the best run may cost at most."""


def load_search(path: Path) -> tuple[Search, Run]:
    """Read a tune file and its run file, and try both ends of every range on it.

    Raises:
        RecllmError: a mistake in either, or a key that the run file has not.
    """
    search = parse(Search, read_toml(path), str(path))
    file = path.parent / search.run
    run = load_run(file)
    _check_measured(search, run, path)
    for key, values in search.search.items():
        if key in OWN:
            raise RecllmError(f'{path}: [search."{key}"] is where a trial lies, which the search sets itself.')
        if changes_nothing(key, search.scorer, run):
            raise RecllmError(
                f"{path}: [search.\"{key}\"] changes nothing of scorer = '{search.scorer}', which is fitted or trained "
                "before it. Search over it with scorer = 'fusion' or that of what it changes."
            )
        if not {key, key.partition(".")[0]}.isdisjoint(DECIDING) and key not in HARMLESS:
            raise RecllmError(
                f'{path}: [search."{key}"] would decide which rows a trial is measured on, so that trials could not '
                "be compared. Set it in the run file."
            )
        for value in values.tried():
            _check_read(search, with_values(run, {key: value}, run.name, Path(run.output)), key, path)
    return search, run


def changes_nothing(key: str, scorer: str, run: Run) -> bool:
    """Whether a key is of what comes behind a scorer of `run`."""
    language = MEASURED[run.model.task][0][-1]
    fused = scorer.startswith(FUSION)
    if key.startswith("export."):
        return True
    if key.startswith("fusion."):
        return not fused
    if scorer in (FUSION, language):
        return False
    if key in OF_SEQUENCE_MODELS and scorer != "light" and not fused:
        return True
    if key == "model.name" and run.model.item_encoder is None:
        return scorer == "light"  # it reads the items' text too; a search of the light scorer keeps to one that does
    if key in BESIDE_LIGHT and (fused or scorer == "light"):
        return not fused and run.model.task == "relevance"
    return key.startswith(BEHIND_LIGHT if fused or scorer == "light" else ("light.", *BEHIND_LIGHT))


def _check_read(search: Search, tried: Run, key: str, path: Path) -> None:
    if not SWITCHES.isdisjoint(search.search):
        return  # what a trial reads is up to what it draws
    for why, keys in idle_keys(tried).items():
        if key in keys:
            raise RecllmError(
                f'{path}: [search."{key}"] changes nothing, for it is not read: {why}. Leave it out, or change that in '
                "the run file."
            )


def _check_measured(search: Search, run: Run, path: Path) -> None:
    """Check that a run of this task can have the search's scorer and metric; which it has, its first trial shows."""
    scorers, metrics = MEASURED[run.model.task]
    if run.model.name == "none" and "model.name" not in search.search:
        scorers = scorers[:-1]
    scorers = (*scorers, FUSION, f"{FUSION} without {MEASURED[run.model.task][0][-1]}")
    for key, value, known in (("scorer", search.scorer, scorers), ("metric", metric_of(search, run), metrics)):
        if value not in known:
            raise unknown(f"{key} in {path}:", value, known)


def metric_of(search: Search, run: Run) -> str:
    """The metric that the search goes by."""
    return search.metric or ("AUC" if run.model.task == "relevance" else "NDCG@10")


def with_values(run: Run, values: Mapping[str, Any], name: str, output: Path) -> Run:
    """The run with other values of some keys, `table.key`, under another name.

    Raises:
        RecllmError: a value that a key does not take, or a key that there is not.
    """
    changed = run.model_dump(mode="json", exclude_none=True) | {"name": name, "output": str(output)}
    for key, value in values.items():
        set_key(changed, f"{key}={as_toml(value)}")
    return parse(Run, changed, f"{run.name} with {', '.join(f'{key} = {value}' for key, value in values.items())}")

"""Search over the keys of a run file with Optuna: `recllm tune TUNE.toml`."""

import hashlib
import json
import math
import shutil
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from recllm.charts import Line, line_chart, picture
from recllm.collaborative import encoder_name, load_collaborative
from recllm.errors import DamagedError, RecllmError, require, unknown
from recllm.files import sha256_of, write_json, written
from recllm.likeness import LIKENESS
from recllm.lm import model_folder
from recllm.outcome import FUSION, evaluate_run
from recllm.priors import EVENTS
from recllm.recipes import find_recipe, parse
from recllm.results import Table
from recllm.revisions import revision
from recllm.runs import PROMPTS, Run, as_begun, write_run
from recllm.scoring import known_scores, scorer_makers
from recllm.searches import Limits, Search, load_search, metric_of, with_values
from recllm.tasks import Task, prepare
from recllm.train import train_run
from recllm.trained import stage_done
from recllm.trainerkeys import MEASURES
from recllm.vectors import VECTORS, RawVectors

Say = Callable[[str], None]
JOURNAL, RESULT, BEST, PICTURE = "journal.log", "trials.json", "best.toml", "trials.svg"
"""What the folder of a search holds beside its trials."""
FITTED = {"data", "cf", "recency", "ease", "transitions", "neighbours", "prompt", "seed", "model", "start_from"}
"""Tables that change what is fitted before training; where none is searched it is fitted once for all trials."""
TIMED_QUERIES, TIMED_ROUNDS = 64, 3
"""Validation queries that are scored together to time a user, and how often."""
STARTUP = 5
"""Trials that are drawn at random and never cut short, before the search learns from them."""


class WrongSearchError(RecllmError):
    """The search asks for what no trial of it can have."""


def tune(path: Path, say: Say = print) -> Run:
    """Try runs until there are as many as the tune file asks for; the best run file is written beside the trials.

    Several processes may search at once: they share the journal, and each ends the trial that it is at, so there may be
    a few more. A search that was killed goes on where it was; the trial that was running does not count.

    Raises:
        RecllmError: a mistake in the tune file or the run file, or no trial keeps the limits.
    """
    search, run = load_search(path)
    optuna = require("optuna", "tune", "Tuning")
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # a failed trial is told by us
    folder = run.folder.with_name(f"{run.name}-tune")
    folder.mkdir(parents=True, exist_ok=True)
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(folder / JOURNAL)))
    study = optuna.create_study(storage=storage, study_name=run.name, direction="maximize", load_if_exists=True)
    _check_same(study, search, run)
    _check_same_inputs(study, search, run)
    median = optuna.pruners.MedianPruner(n_startup_trials=STARTUP, n_warmup_steps=0)
    study.pruner = median if search.prune else optuna.pruners.NopPruner()
    say(f"Tuning {run.name}: {len(_finished(study))} of {search.trials} trials are done")
    told = [f"eval_{name}" for name in MEASURES[run.model.task]]
    if search.prune and not search.scorer.startswith(FUSION) and _as_told(metric_of(search, run)) not in told:
        say(f"No trial is cut short: {metric_of(search, run)} is not measured while it trains")
    while len(_finished(study)) < search.trials:
        trial = study.ask()
        # By the trial's number: workers that begin together draw different values, and a search can be made again.
        seed = (run.seed * 100_003 + trial.number) % 2**32
        study.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=STARTUP)
        try:
            study.tell(trial, _try(search, run, folder, trial, say))
        except optuna.TrialPruned:
            say(f"Trial {trial.number} is cut short: it is below the median of the others")
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        except (WrongSearchError, DamagedError):  # what all trials share, as likely as not
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            raise
        except RecllmError as error:
            say(f"Trial {trial.number} failed: {error}")
            trial.set_user_attr("error", str(error))
            trial.set_user_attr("by", _digest(study))
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        finally:
            for name in ("checkpoints", "scores"):
                shutil.rmtree(folder / f"trial-{trial.number}" / name, ignore_errors=True)
        _write(study, search, run, folder)
    best = _best(study)
    errors = [trial.user_attrs["error"] for trial in _finished(study) if "error" in trial.user_attrs]
    if best is None and errors:
        limited = "has kept the limits" if search.limits.model_dump(exclude_none=True) else "of those has a result"
        raise RecllmError(f"No trial {limited} of {path}, and {len(errors)} failed, the first one by: {errors[0]}")
    if best is None:
        raise RecllmError(f"None of {search.trials} trials keeps the limits of {path}. See {folder / RESULT}.")
    say(
        f"Best: trial {best.number}, {metric_of(search, run)} {best.value:.4f} of '{search.scorer}' on validation; "
        f"run file: {folder / BEST}"
    )
    return _write(study, search, run, folder) or run


def _alone(search: Search, run: Run) -> dict[str, Any]:
    """What is left out of a search of the light scorer: what trains after it changes nothing of it."""
    if search.scorer != "light":
        return {}
    alone = {"model.name": "none", "model.item_encoder": encoder_name(run)}
    if run.model.likelihood is None:  # whose weights a control may draw too
        alone["control.language_model"] = "pretrained"
    return alone


def _try(search: Search, run: Run, folder: Path, trial: Any, say: Say) -> float:  # noqa: ANN401
    values = {key: own.draw(trial, key) for key, own in search.search.items()}
    tried = with_values(run, _alone(search, run) | values, f"trial-{trial.number}", folder)
    say(f"Trial {trial.number}: " + ", ".join(f"{key} = {value}" for key, value in values.items()))
    _share_fitted(search, folder, tried)
    seen: dict[int, int] = {}
    metric = metric_of(search, run)

    def watch(stage: str, step: int, metrics: Mapping[str, float]) -> None:
        # By what is searched for, and nothing else: another scorer's metric would cut the wrong ones.
        figure = metrics.get(_as_told(metric))
        if stage != search.scorer or figure is None or step in seen:
            return
        seen[step] = len(seen)
        trial.report(figure, seen[step])
        if trial.should_prune():
            raise require("optuna", "tune", "Tuning").TrialPruned

    task = train_run(tried, resume=True, say=_silent, watch=watch)
    parts = load_collaborative(tried, task)
    scores = known_scores(tried, task, parts, _silent)["valid"]
    table = evaluate_run(tried, task, scores, part="valid")
    _check(table, search.scorer, metric)
    value = table.interval(search.scorer, metric)[0]
    if math.isnan(value):
        raise WrongSearchError(
            f"{metric} of '{search.scorer}' is not known on these validation rows ({len(task.split.valid):,}), so that "
            "no trial could be compared. Search by another metric."
        )
    for name, cost in _costs(search, tried, task).items():
        trial.set_user_attr(name, cost)
    for name, limit in search.limits.model_dump(exclude_none=True).items():
        trial.set_constraint(name, trial.user_attrs[name] - limit)
    say(f"Trial {trial.number}: {metric} {value:.4f}")
    return float(value)


def _as_told(metric: str) -> str:
    """A metric as training tells it."""
    return f"eval_{metric.lower().replace('hitrate', 'hit_rate')}"


def _check(table: Table, scorer: str, metric: str) -> None:
    if scorer not in table.scorers:
        raise WrongSearchError(str(unknown("scorer", scorer, table.scorers)))
    if metric not in table.metrics:
        raise WrongSearchError(str(unknown("metric", metric, table.metrics)))


def _share_fitted(search: Search, folder: Path, tried: Run) -> None:
    """Take what an earlier trial has fitted before its training, where no searched key changes it."""
    if any(key.split(".")[0] in FITTED for key in search.search) or (tried.folder / VECTORS).is_file():
        return
    for other in sorted(folder.glob("trial-*")):
        if (other / VECTORS).is_file() and other != tried.folder:
            shutil.copytree(other / "cf", tried.folder / "cf", dirs_exist_ok=True)
            RawVectors.load(other / VECTORS).save(tried.folder / VECTORS)
            return


def _costs(search: Search, run: Run, task: Task) -> dict[str, float]:
    """What the limits of a search are about, as measured."""
    costs = {}
    if search.limits.milliseconds_per_user is not None:
        parts = load_collaborative(run, task)
        scorers = [make() for make in scorer_makers(run, task, parts).values()]
        # Asked now, as a bundle is.
        queries = [replace(example.query, at=None) for example in task.split.valid[:TIMED_QUERIES]]
        times = []
        for _ in range(TIMED_ROUNDS):
            began = time.monotonic()
            for scorer in scorers:
                scorer.score(queries, task.index)
            times.append(time.monotonic() - began)
        costs["milliseconds_per_user"] = 1000 * statistics.median(times) / max(len(queries), 1)
    if search.limits.megabytes is not None:
        folders = [run.folder / name for name in ("cf", "light", "lm")]
        folders += [model_folder(run.model.name)] if stage_done(run.folder / "lm") else []
        files = [path for folder in folders if folder.is_dir() for path in folder.iterdir() if path.is_file()]
        files = [path for path in files if path.stem != LIKENESS]  # no bundle has it
        counts = load_collaborative(run, task).popularity.counts  # no bundle has events
        events = 0 if counts is None else sum(getattr(counts, key).nbytes for key in EVENTS)
        costs["megabytes"] = (sum(path.stat().st_size for path in files) - events) / 2**20
    return costs


def _check_same(study: Any, search: Search, run: Run) -> None:  # noqa: ANN401
    """Check that a search goes on with what it was begun with; only the number of trials may change."""
    now = search.model_dump(mode="json", exclude={"trials"})
    now["run"] = _settled(run)

    def as_now(before: dict[str, Any]) -> dict[str, Any]:
        own = as_begun(before["run"]) | {"name": run.name, "output": run.output}
        return before | {"run": _settled(parse(Run, own, "The run of this search"))}

    if changed := _changed_since(study, "search", now, as_now):
        raise RecllmError(
            f"This search was begun with another {changed}. Undo the change, or give the run of the tune file another "
            "name to search anew."
        )


def _settled(run: Run) -> dict[str, Any]:
    """What a run is, wherever it lies."""
    values: dict[str, Any] = run.model_dump(mode="json", exclude={"name", "output"}, exclude_none=True)
    return values


def _check_same_inputs(study: Any, search: Search, run: Run) -> None:  # noqa: ANN401
    """Check that trials of before were fitted and measured on the data, models and recipes that there are now."""
    run = with_values(run, _alone(search, run), run.name, Path(run.output))
    now = {f"data ({name})": digest for name, digest in prepare(run).fingerprints().items()}
    models = {run.model.item_encoder, run.model.likelihood}
    models |= set() if "model.name" in search.search else {run.model.name}  # else a trial names it
    now |= {f"weights of '{name}'": revision(name) for name in models if name not in (None, "none")}
    trained = run.model.name != "none"
    prompts = [key for key in PROMPTS if trained or key not in ("next_item", "relevance")]
    files = {f"prompt.{key}": find_recipe("prompts", getattr(run.prompt, key)) for key in prompts}
    if trained and run.adapter.recipe != "none":
        files["adapter.recipe"] = find_recipe("adapters", run.adapter.recipe)
    now |= {f"{key} ({path.name})": sha256_of(path) for key, path in files.items()}
    if changed := _changed_since(study, "inputs", now):
        raise RecllmError(
            f"Since this search was begun something behind its run file has changed: {changed}. Its trials could not "
            "be compared. Bring it back, or give the run of the tune file another name to search anew."
        )


def _changed_since(
    study: Any,  # noqa: ANN401
    kept: str,
    now: dict[str, Any],
    as_now: Callable[[dict[str, Any]], dict[str, Any]] = lambda before: before,
) -> str:
    """Names of what differs from what the study was begun with; what no trial has gone by may change, and is kept.

    What was kept before some keys were there is read by `as_now`.
    """
    before = study.user_attrs.get(kept)
    if before is None or not _begun(study):
        study.set_user_attr(kept, now)
        return ""
    before = as_now(before)
    return ", ".join(name for name in before | now if now.get(name) != before.get(name))


def _begun(study: Any) -> bool:  # noqa: ANN401
    """Whether a trial has gone by what the study was begun with."""
    return any(trial.state.name in ("COMPLETE", "PRUNED") for trial in study.get_trials(deepcopy=False))


def _digest(study: Any) -> str:  # noqa: ANN401
    """What trials go by, in few letters."""
    told = {kept: study.user_attrs.get(kept) for kept in ("search", "inputs")}
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _finished(study: Any) -> list[Any]:  # noqa: ANN401
    """The trials that count.

    Not one that failed by a mistake in the tune file, which no error is kept of, nor by what has been mended since.
    """
    trials, now = study.get_trials(deepcopy=False), _digest(study)
    done = [trial for trial in trials if trial.state.name in ("COMPLETE", "PRUNED")]
    failed = [trial for trial in trials if trial.state.name == "FAIL" and "error" in trial.user_attrs]
    failed = [trial for trial in failed if trial.user_attrs.get("by", now) == now]
    return sorted([*done, *failed], key=lambda trial: trial.number)


def _keeps(trial: Any) -> bool:  # noqa: ANN401
    """Whether a trial is within the limits; of one that was cut short nobody knows."""
    return all(value <= 0 for value in trial.constraints.values())


def _best(study: Any) -> Any:  # noqa: ANN401
    complete = [trial for trial in _finished(study) if trial.state.name == "COMPLETE"]
    kept = [trial for trial in complete if _keeps(trial)]
    return max(kept, key=lambda trial: (trial.value, -trial.number), default=None)


def _write(study: Any, search: Search, run: Run, folder: Path) -> Run | None:  # noqa: ANN401
    """Write the trials, the picture, and the best run file."""
    finished = _finished(study)
    rows = [
        {
            "trial": trial.number,
            "state": trial.state.name.lower(),
            "error": trial.user_attrs.get("error"),
            "value": trial.value,
            "values": trial.params,
            "costs": {name: trial.user_attrs[name] for name in Limits.model_fields if name in trial.user_attrs},
            "keeps_the_limits": _keeps(trial),
        }
        for trial in finished
    ]
    write_json(folder / RESULT, {"metric": metric_of(search, run), "scorer": search.scorer, "trials": rows})
    complete = [row for row in rows if row["state"] == "complete" and row["keeps_the_limits"]]
    if complete:
        numbers, values = [row["trial"] for row in complete], [row["value"] for row in complete]
        leading = [max(values[: place + 1]) for place in range(len(values))]
        lines = [Line("trial", numbers, values, 0), Line("best so far", numbers, leading, 1)]
        chart = line_chart(f"Trials of {run.name}", lines, "trial", metric_of(search, run))
        with written(folder / PICTURE) as temporary:
            temporary.write_text(picture(chart), encoding="utf-8")
    best = _best(study)
    if best is None:
        return None
    # A name of its own: beside the run that was searched from it can be trained as it is.
    found = with_values(run, best.params, f"{run.name}-best", Path(run.output))
    write_run(found, folder / BEST)
    return found


def _silent(_: str) -> None:
    return None

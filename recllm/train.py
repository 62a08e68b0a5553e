"""Train everything that a run file names: `recllm train RUN.toml`, or `accelerate launch -m recllm.train RUN.toml`."""

import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from recllm.checkpoints import save_trained
from recllm.devices import fast_bf16, precision_keys, process_state
from recllm.encoding import SequenceScorer
from recllm.errors import RecllmError
from recllm.examples import Examples, NextItemCollator
from recllm.files import read_json, write_json, written
from recllm.fusion import Fusion
from recllm.histories import HistoryFormat
from recllm.judging import load_light_judge, load_relevance, rating_scorers, train_light_judge, train_relevance
from recllm.lm import LanguageBody, scoring_device
from recllm.loop import check_trainer_keys, fit, ranking_metrics, rows_at_least, steps_of
from recllm.process import set_up
from recllm.progress import Progress
from recllm.protocols import EvaluationProtocol, evaluation_protocol
from recllm.ranking import QUERY_BATCH, Scorer, Scores, batches, score_as_new
from recllm.relevance import RelevanceScorer
from recllm.runs import (
    ENVIRONMENT,
    FILE,
    Run,
    check_resumed,
    check_same_data,
    keep_recipes,
    load_run,
    write_environment,
    write_run,
)
from recllm.sequence import NextItemModel, Windows
from recllm.splits import Example
from recllm.tasks import Task, prepare
from recllm.trained import (
    Collaborative,
    adapter_recipe,
    check_names,
    collaborative,
    language_model,
    light_model,
    load_language,
    load_light,
    save_stage,
    sequence_scorer,
    stage_done,
)
from recllm.vectors import ItemFeatures

Say = Callable[[str], None]
BLOCK_SCORES = 20_000_000
"""Scores that are held in memory at once."""
NEW_ITEM_SCORES = 200_000_000
"""Scores on which the weights of new items are fitted, in memory at once."""
VALIDATION_WINDOWS = 256
"""Validation histories that choose the language model's checkpoint; the fusion sees all of them."""


class Clock:
    """Seconds of each stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time of the block to `name`."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0.0) + time.monotonic() - start, 1)


def train_run(
    run: Run, *, resume: bool = False, overwrite: bool = False, say: Say = print, clock: Clock | None = None
) -> Task:
    """Fit and train every scorer of a run and the fusion; everything lies in the run's folder afterwards.

    Args:
        run: the run.
        resume: keep the stages that are done and go on from the last checkpoint.
        overwrite: delete the run that the folder holds.
        say: gets one line per stage, on the first process only.
        clock: takes the seconds of each stage.

    Raises:
        RecllmError: a mistake in the run file or in the data, or a folder that is not empty without `resume`.
    """
    clock = clock or Clock()
    check_trainer_keys(run.train.trainer_keys())
    state = process_state()
    say = say if state.is_main_process else _silent
    _check_folder(run, resume=resume, overwrite=overwrite)
    with state.main_process_first():
        check_names(run, say, kept=resume)
    with clock.stage("data"):
        task = prepare(run, say)
        if resume:
            check_same_data(run, task.fingerprints())
        if state.is_main_process:
            _begin(run, task, overwrite=overwrite, processes=state.num_processes)
        _describe(task, say)
    with clock.stage("factors and vectors"), state.main_process_first():
        parts = collaborative(run, task, say)
    with clock.stage("light"):
        light = train_light_judge if run.model.task == "relevance" else train_light
        light(run, task, parts, resume=resume, say=say)
    with clock.stage("language model"):
        if run.model.name != "none":
            train = train_relevance if run.model.task == "relevance" else train_language
            train(run, task, parts, resume=resume, say=say)
    if state.is_main_process:
        with clock.stage("scores and fusion"):
            fit_fusion(run, task, parts, say)
    state.wait_for_everyone()
    return task


def _check_folder(run: Run, *, resume: bool, overwrite: bool) -> None:
    if resume and overwrite:
        raise RecllmError("--resume keeps what is done and --overwrite deletes it; give one of them.")
    begun = (run.folder / FILE).is_file()
    # What is no run is never deleted.
    if run.folder.is_dir() and any(run.folder.iterdir()) and not resume and not (overwrite and begun):
        raise RecllmError(
            f"{run.folder} is not empty. Go on with it by --resume, start anew by --overwrite, "
            "or give the run another name (--set name=…)."
        )
    if resume and begun:
        check_resumed(run)


def _begin(run: Run, task: Task, *, overwrite: bool, processes: int) -> None:
    """Write what a run's folder begins with, once everything that can be a user's mistake has been read."""
    if overwrite and run.folder.is_dir():
        shutil.rmtree(run.folder)
    if not (run.folder / FILE).is_file():
        write_run(run, run.folder / FILE)
    keep_recipes(run)
    if not (run.folder / ENVIRONMENT).is_file():
        write_environment(run, task.fingerprints(), device=_device(), processes=processes)


def _describe(task: Task, say: Say) -> None:
    say(
        f"{task.dataset.name}: {len(task.split.train):,} training events, {len(task.split.valid):,} validation and "
        f"{len(task.split.test):,} test rows, {len(task.index):,} items ({int((~task.warm).sum()):,} without events)"
    )


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads"


def _silent(_: str) -> None:
    return None


def train_light(run: Run, task: Task, parts: Collaborative, *, resume: bool, say: Say) -> None:
    """Train the light sequence scorer, unless it is done or the run has none."""
    settings, folder = run.light, run.folder / "light"
    if settings.num_train_epochs == 0 or stage_done(folder):
        return
    model, history = light_model(run, task, parts.features)
    windows = Windows(
        task.sequences(),
        settings.max_history,
        settings.num_train_epochs,
        run.seed,
        batch=_batch(settings.per_device_train_batch_size),
    )
    say(f"Training the light sequence scorer, {settings.num_train_epochs} epochs")
    arguments = {
        "learning_rate": settings.learning_rate,
        "weight_decay": settings.weight_decay,
        "per_device_train_batch_size": settings.per_device_train_batch_size,
        "warmup_steps": 0.05,
        "seed": run.seed,
        "report_to": run.train.trainer_keys().get("report_to", "none"),
    }
    _train_next_item(run, task, model, history, windows, arguments, scorer="light", resume=resume, say=say)


def train_language(run: Run, task: Task, parts: Collaborative, *, resume: bool, say: Say) -> None:
    """Fine-tune the language model for the next item, unless it is done."""
    settings, folder = run.train, run.folder / "lm"
    if stage_done(folder):
        return
    model, history, _ = language_model(run, task, parts.features, adapter_recipe(run), say)
    if run.model.heads_from_light and (light := load_light(run, task, parts.features)) is not None:
        _start_from(model, light[0], say)
    windows = Windows(
        _readable(task.sequences(), history),
        history.limit,
        settings.num_train_epochs,
        run.seed,
        settings.recent_windows,
        _batch(settings.per_device_train_batch_size),
    )
    trained = sum(value.numel() for value in model.parameters() if value.requires_grad)
    say(f"Fine-tuning {run.model.name} with '{run.adapter.recipe}': {trained:,} parameters train")
    arguments = {
        "learning_rate": settings.head_learning_rate,
        "per_device_train_batch_size": settings.per_device_train_batch_size,
        "max_steps": settings.max_steps,
        "warmup_steps": 0.05,
        "seed": run.seed,
        **precision_keys(settings.precision),
        **settings.trainer_keys(),
    }
    _train_next_item(run, task, model, history, windows, arguments, scorer="lm", resume=resume, say=say)


def _batch(on_one_device: int) -> int:
    """Windows in a step on all devices."""
    devices: int = process_state().num_processes
    return on_one_device * devices


def _start_from(model: NextItemModel, light: NextItemModel, say: Say) -> None:
    """Copy the light model's item side, so that the language model has only histories left to learn."""
    if model.query.out_features != light.query.out_features:
        say("The heads start anew: model.head_width is not light.width")
        return
    model.heads.load_state_dict(light.heads.state_dict())
    model.bias.data.copy_(light.bias.data)
    model.log_scale.data.copy_(light.log_scale.data)
    model.cold_bias.data.copy_(light.cold_bias.data)


def _readable(sequences: list[NDArray[np.int64]], history: HistoryFormat) -> list[NDArray[np.int64]]:
    if history.texts is None:
        return sequences
    return [row[[history.texts[item] is not None for item in row]] for row in sequences]


def _train_next_item(
    run: Run,
    task: Task,
    model: NextItemModel,
    history: HistoryFormat,
    windows: Windows,
    arguments: dict[str, Any],
    *,
    scorer: str,
    resume: bool,
    say: Say,
) -> None:
    examples = Examples(windows.all(rows_at_least(arguments)))
    folder = run.folder / scorer
    fit(
        model,
        examples,
        Examples(_validation_windows(task, history, run.seed, None if scorer == "light" else VALIDATION_WINDOWS)),
        collator=NextItemCollator(history),
        valid_collator=NextItemCollator(history, last_only=True),
        arguments=arguments,
        folder=run.folder,
        scorer=scorer,
        compute_metrics=ranking_metrics,
        say=say,
        adapter_learning_rate=None if scorer == "light" else run.train.learning_rate,
        patience=None if scorer == "light" else run.train.early_stopping_patience,
        resume=resume,
    )
    if process_state().is_main_process:
        save_trained(model, folder / "model.safetensors")
        save_stage(folder, {"steps": steps_of(len(examples), arguments), "windows": len(examples)})
        shutil.rmtree(run.folder / "checkpoints" / scorer, ignore_errors=True)
    process_state().wait_for_everyone()


def _validation_windows(task: Task, history: HistoryFormat, seed: int, limit: int | None) -> list[NDArray[np.int64]]:
    rows = [
        np.append(history.window(task.index.known(example.query.history)), task.index.rows([example.item_id]))
        for example in task.split.valid
    ]
    rows = [row for row in rows if len(row) > 1 and task.warm[row[-1]]]
    if limit is None or len(rows) <= limit:
        return rows
    return [rows[place] for place in np.sort(np.random.default_rng(seed).permutation(len(rows))[:limit])]


def scorer_makers(run: Run, task: Task, parts: Collaborative) -> dict[str, Callable[[], Scorer]]:
    """What makes every scorer of a trained run, by name; a model is loaded only when its scores are needed."""
    judged = run.model.task == "relevance"
    fitted = rating_scorers(run, task, parts) if judged else parts.scorers()
    makers: dict[str, Callable[[], Scorer]] = {name: partial(_same, scorer) for name, scorer in fitted.items()}
    if stage_done(run.folder / "light"):
        sequence = partial(_sequence, load_light, run, task, parts)
        makers["light"] = partial(load_light_judge, run, task, parts) if judged else sequence
    if stage_done(run.folder / "lm"):
        language = partial(load_relevance, run, task) if judged else partial(_sequence, load_language, run, task, parts)
        makers[evaluation_protocol(run, task).language] = language
    return makers


def _same(scorer: Scorer) -> Scorer:
    return scorer


def _sequence(
    load: Callable[[Run, Task, ItemFeatures], tuple[NextItemModel, HistoryFormat] | None],
    run: Run,
    task: Task,
    parts: Collaborative,
) -> Scorer:
    found = load(run, task, parts.features)
    assert found is not None
    model, history = found
    heavy = isinstance(model.body, LanguageBody)
    return sequence_scorer(model.to(scoring_device()), history, task, parts.neighbours, bf16=heavy and fast_bf16())


def known_scores(run: Run, task: Task, parts: Collaborative, say: Say) -> dict[str, dict[str, Scores]]:
    """Scores of validation and test by every scorer, computed once and kept in the run's folder.

    Validation and test go in together: a user's validation history is the beginning of the test history, and a causal
    model reads both in one pass.
    """
    protocol = evaluation_protocol(run, task)
    valid, test = protocol.examples("valid"), protocol.examples("test")
    result: dict[str, dict[str, Scores]] = {"valid": {}, "test": {}}
    for name, make in scorer_makers(run, task, parts).items():
        path = run.folder / "scores" / f"{name}.npy"
        if not path.is_file():
            say(f"Scoring validation and test with '{name}'")
            path.parent.mkdir(parents=True, exist_ok=True)
            scorer = make()
            if isinstance(scorer, SequenceScorer | RelevanceScorer):
                scorer.progress = Progress(len(valid) + len(test), "rows", say).add
            with written(path) as part:
                _write_scores(protocol, scorer, valid, test, part)
        scores = np.load(path, mmap_mode="r")
        result["valid"][name], result["test"][name] = scores[: len(valid)], scores[len(valid) :]
    return result


def _write_scores(
    protocol: EvaluationProtocol, scorer: Scorer, valid: list[Example], test: list[Example], path: Path
) -> None:
    """Score block by block into a .npy file: all scores of a large set do not fit into memory."""
    examples = [*valid, *test]
    # The same stretch of both parts in one block: it is mostly the same users.
    places = np.concatenate([np.arange(len(part)) / max(len(part), 1) for part in (valid, test)])
    order = np.argsort(places, kind="stable")
    shape = protocol.shape(len(examples))
    scores = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    for _, rows in batches(order.tolist(), max(QUERY_BATCH, BLOCK_SCORES // max(math.prod(shape[1:]), 1))):
        scores[rows] = protocol.score(scorer, [examples[row] for row in rows])
    scores.flush()


def fit_fusion(run: Run, task: Task, parts: Collaborative, say: Say) -> None:
    """Fit the fusion on validation: with every scorer, and again without the language model for the table."""
    settings = run.folder / "fusion-settings.json"
    wanted = run.fusion.model_dump(mode="json")
    if (run.folder / "fusion.json").is_file() and settings.is_file() and read_json(settings) == wanted:
        return
    scores = known_scores(run, task, parts, say)["valid"]
    say("Fitting the fusion on validation")
    protocol = evaluation_protocol(run, task)
    examples, language = protocol.examples("valid"), protocol.language
    rows = _some_rows(len(examples), len(task.index) * len(scores), run)
    as_new = _scores_as_new(run, task, parts, [examples[row] for row in rows], say)

    def fitted(given: dict[str, Scores]) -> Fusion:
        fusion = protocol.fit(given, examples)
        if not as_new:
            return fusion
        some = {name: np.asarray(value[rows]) for name, value in given.items()}
        return protocol.fit_new_items(fusion, some, as_new, [examples[row] for row in rows])

    if language in scores:
        others = {name: value for name, value in scores.items() if name != language}
        fitted(others).save(run.folder / f"fusion-without-{language}.json")
    fitted(scores).save(run.folder / "fusion.json")
    write_json(settings, wanted)


def _some_rows(count: int, cells: int, run: Run) -> NDArray[np.int64]:
    """The validation rows on which weights of new items are fitted, in order; `cells` scores belong to each."""
    most = min(run.fusion.queries, max(1, NEW_ITEM_SCORES // cells))
    return np.sort(np.random.default_rng(run.seed).permutation(count)[:most])


def _scores_as_new(run: Run, task: Task, parts: Collaborative, examples: list[Example], say: Say) -> dict[str, Scores]:
    """Scores of some validation rows as if no item had events, by scorer; empty where they are not asked for."""
    if run.model.task != "next_item" or run.fusion.new_share == 0.0:
        return {}
    result: dict[str, Scores] = {}
    queries = [example.query for example in examples]
    for name, make in scorer_makers(run, task, parts).items():
        path = run.folder / "scores" / f"{name}-as-new-{len(examples)}.npy"
        if not path.is_file():
            say(f"Scoring validation with '{name}' as if all items were new")
            scores = score_as_new(make(), queries, task.index)
            with written(path) as part, part.open("wb") as file:
                np.save(file, scores)
        result[name] = np.load(path)
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """`python -m recllm.train RUN.toml [--set key=value …] [--resume | --overwrite]`."""
    import argparse

    parser = argparse.ArgumentParser(prog="accelerate launch -m recllm.train", description=__doc__)
    parser.add_argument("run", type=Path, help="run file, or the folder of a run to go on with")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the run file"
    )
    parser.add_argument("--resume", action="store_true", help="keep what is done and go on")
    parser.add_argument("--overwrite", action="store_true", help="delete what the run's folder holds")
    given = parser.parse_args(arguments)
    set_up()
    try:
        train_run(load_run(given.run, given.set), resume=given.resume, overwrite=given.overwrite, say=_print)
    except RecllmError as error:
        sys.stderr.write(f"Error: {error}\n")
        raise SystemExit(2) from None


def _print(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()

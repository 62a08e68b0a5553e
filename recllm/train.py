"""Train everything that a run file names: `recllm train RUN.toml`, or `accelerate launch -m recllm.train RUN.toml`."""

import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from recllm.adapters import load_adapter
from recllm.cards import write_adapter_card
from recllm.collaborative import collaborative
from recllm.devices import check_precision, free_memory, on_gpu, precision_keys, process_state, sharded, sharding
from recllm.distil import check_teacher, has_been_taught
from recllm.errors import RecllmError, place_error
from recllm.files import only_one, read_json, write_json
from recllm.idle import idle_lines
from recllm.judging import train_light_judge, train_relevance
from recllm.nextitem import train_language, train_light
from recllm.preflight import check_names
from recllm.process import set_up
from recllm.resuming import (
    LANGUAGE_STAGES,
    adapter_is_kept,
    check_folder,
    check_same_data,
    keep_recipes,
    language_begun,
    language_part,
)
from recllm.revisions import check_same_models, revisions
from recllm.runs import ENVIRONMENT, FILE, RECIPES, Run, load_run, write_environment, write_run
from recllm.scoring import fit_fusion
from recllm.sharded import check_shardable
from recllm.tasks import LEARNT, Task, keep_learnt, prepare
from recllm.trained import stage_done
from recllm.trainerkeys import COMPILING, check_options
from recllm.warmstart import check_start, check_start_data
from recllm.watching import Watch

Say = Callable[[str], None]
GONE = ".gone."
"""How the names of folders begin that are being removed."""


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
    run: Run,
    *,
    resume: bool = False,
    overwrite: bool = False,
    say: Say = print,
    clock: Clock | None = None,
    watch: Watch | None = None,
) -> Task:
    """Fit and train every scorer of a run and the fusion; everything lies in the run's folder afterwards.

    Args:
        run: the run.
        resume: keep the stages that are done and go on from the last checkpoint.
        overwrite: delete the run that the folder holds.
        say: gets one line per stage, on the first process only.
        clock: takes the seconds of each stage.
        watch: is told of every validation; an exception of its ends the training.

    Raises:
        RecllmError: a mistake in the run file or in the data, a folder that is not empty without `resume`, or one in
            which another process trains.
    """
    clock = clock or Clock()
    say = say if process_state().is_main_process else _silent
    check_options(run)
    check_folder(run, resume=resume, overwrite=overwrite)
    with _held(run):
        task = _begun(run, clock, say, resume=resume, overwrite=overwrite)
        _train_stages(run, task, clock, say, resume=resume, watch=watch)
    return task


def _begun(run: Run, clock: Clock, say: Say, *, resume: bool, overwrite: bool) -> Task:
    """Check everything that can be a user's mistake, read the data and begin the folder."""
    state = process_state()
    check_folder(run, resume=resume, overwrite=overwrite)  # again: until it was held another process may have been here
    begun = resume and (run.folder / ENVIRONMENT).is_file()
    kept = resume and adapter_is_kept(run)
    with state.main_process_first():
        check_names(run, say, kept=resume, adapter_kept=kept)
        for line in idle_lines(run):
            say(line)
        if sharded():
            _check_shardable(run, kept=kept)
            check_precision(_precision(run))
        if not (resume and has_been_taught(run)):
            check_teacher(run)
        if not begun:
            check_start(run)
    with clock.stage("data"):
        task = prepare(run, say, begun=not overwrite)
        if resume:
            check_same_data(run, task.fingerprints())
            check_same_models(run)
            _check_processes(run, state.num_processes)
        if not begun:
            check_start_data(run, task.fingerprints())
        if state.is_main_process:
            if resume:
                _leave_behind(run, adapter_kept=kept)
            _begin(run, task, overwrite=overwrite, processes=state.num_processes, say=say)
        _describe(task, say, judges=run.model.task == "relevance")
    return task


def _train_stages(run: Run, task: Task, clock: Clock, say: Say, *, resume: bool, watch: Watch | None) -> None:
    state = process_state()
    with clock.stage("factors and vectors"), state.main_process_first():
        parts = collaborative(run, task, say)
    with clock.stage("light"):
        light = train_light_judge if run.model.task == "relevance" else train_light
        light(run, task, parts, resume=resume, say=say, watch=watch)
    free_memory()  # what has trained lies in circles
    with clock.stage("language model"):
        if run.model.name != "none":
            train = train_relevance if run.model.task == "relevance" else train_language
            train(run, task, parts, resume=resume, say=say, watch=watch)
    free_memory()
    if state.is_main_process:
        with clock.stage("scores and fusion"):
            fit_fusion(run, task, parts, say)
            write_adapter_card(run)
        shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)  # a kill may have left some of a finished stage
    state.wait_for_everyone()


@contextmanager
def _held(run: Run) -> Iterator[None]:
    """Keep other trainings out of the run's folder, from before it is begun; one that stays empty goes again.

    Raises:
        RecllmError: there is another one already.
    """
    if not process_state().is_main_process:
        yield
        return
    run.folder.mkdir(parents=True, exist_ok=True)
    try:
        with only_one(run.folder) as free:
            if not free:
                raise RecllmError(
                    f"Another process is training in {run.folder}, or exports from it. Wait for it, or stop it and go "
                    "on with --resume."
                )
            yield
    finally:
        with suppress(OSError):
            run.folder.rmdir()


def _precision(run: Run) -> dict[str, Any]:
    """What Trainer is told of precision, and its keys that the run file has beside."""
    return precision_keys(run.train.precision) | run.train.trainer_keys()


def _check_shardable(run: Run, *, kept: bool) -> None:
    keys = _precision(run)
    named = run.model.name != "none" and run.adapter.recipe != "none"
    recipe = load_adapter(run.adapter, run.adapter_file if kept else None) if named else None
    half = torch.bfloat16 if keys.get("bf16") else torch.float16 if keys.get("fp16") else None
    compiled = any(keys.get(key) for key in COMPILING)
    check_shardable(recipe, half=half, compiled=compiled, together=run.model.rows_together)


def _check_processes(run: Run, processes: int) -> None:
    """Check that a training that was begun goes on with as many processes, and sharded alike.

    They decide which rows a step has, and how the optimizer's state is written.

    Raises:
        RecllmError: it was begun with more or fewer, or sharded in another way.
    """
    path = run.folder / ENVIRONMENT
    if not path.is_file() or not any((run.folder / "checkpoints").glob("*/checkpoint-*")):
        return
    facts = read_json(path)
    before, way = facts.get("processes", 1), facts.get("sharding", "none")
    if way != sharding():
        raise RecllmError(
            f"{run.folder} has checkpoints of a training with the sharding '{way}', and now it is '{sharding()}'. "
            "Go on with the profile that it was begun with, or start anew (--overwrite)."
        )
    if before != processes:
        shipped = {"fsdp": "fsdp2", "zero2": "zero2", "zero3": "zero3"}
        profile = f"--profile {shipped[way]} " if way in shipped else ""
        raise RecllmError(
            f"{run.folder} has checkpoints of a training with {before} process{'es' * (before > 1)}, and now there "
            f"{'are' if processes > 1 else 'is'} {processes}. Go on with as many (recllm train {run.folder} --resume "
            f"{profile}-- --num_processes {before}), or start anew (--overwrite)."
        )


def _leave_behind(run: Run, *, adapter_kept: bool) -> None:
    """Forget the adapter's recipe and what training was mended by, where the language model begins with other ones."""
    recipe = run.folder / RECIPES / "adapter.toml"
    if language_begun(run.folder) or not (run.folder / FILE).is_file():
        return
    if (recipe.is_file() and not adapter_kept) or language_part(load_run(run.folder)) != language_part(run):
        for stage in LANGUAGE_STAGES:  # no checkpoint is there
            shutil.rmtree(run.folder / "checkpoints" / stage, ignore_errors=True)
    if not adapter_kept:
        recipe.unlink(missing_ok=True)


def _begin(run: Run, task: Task, *, overwrite: bool, processes: int, say: Say) -> None:
    """Write what a run's folder begins with, once everything that can be a user's mistake has been read."""
    if overwrite and run.folder.is_dir():
        bundles = sorted(path.name for path in run.folder.glob("bundle-*") if path.is_dir())
        if bundles:
            say(f"Removing what {run.folder} holds, with {', '.join(bundles)}; export again when it is trained")
        _empty(run.folder)
    for left in run.folder.glob(f"{GONE}*"):
        shutil.rmtree(left, ignore_errors=True)
    if not (run.folder / FILE).is_file() or load_run(run.folder) != run:  # fusion and export may change on the way
        write_run(run, run.folder / FILE)
    keep_recipes(run)
    if not (run.folder / LEARNT).is_file():
        keep_learnt(run, task)
    if not (run.folder / ENVIRONMENT).is_file():
        facts = task.fingerprints(), revisions(run)
        write_environment(run, *facts, device=_device(), processes=processes, sharding=sharding())
    elif _unfinished(run) and not any((run.folder / "checkpoints").glob("*/checkpoint-*")):
        kept = read_json(run.folder / ENVIRONMENT)
        write_json(run.folder / ENVIRONMENT, kept | {"processes": processes, "sharding": sharding()})


def _empty(folder: Path) -> None:
    """Remove what a run's folder holds, every folder in one step from under its name, and what says whose it is last.

    So a kill leaves stages that are whole or gone, of the run that the folder still names. The folder itself stays, for
    it is held.
    """
    # Files before folders: vectors that are there say that what is fitted beside them is, too.
    for path in sorted(folder.iterdir(), key=lambda path: (path.name == FILE, path.is_dir())):
        if not path.is_dir() or path.is_symlink():
            path.unlink()
        elif path.name.startswith(GONE):
            shutil.rmtree(path)
        else:
            gone = Path(tempfile.mkdtemp(prefix=GONE, dir=folder))
            path.replace(gone / path.name)
            shutil.rmtree(gone)


def _unfinished(run: Run) -> bool:
    """Whether a model of the run is still to be trained."""
    trains = {"light": run.light.num_train_epochs > 0, "lm": run.model.name != "none"}
    return any(asked and not stage_done(run.folder / name) for name, asked in trains.items())


def _describe(task: Task, say: Say, *, judges: bool) -> None:
    say(
        f"{task.dataset.name}: {len(task.split.train):,} training events, {len(task.split.valid):,} validation and "
        f"{len(task.split.test):,} test rows, {len(task.index):,} items ({int((~task.warm).sum()):,} without events)"
    )
    if not judges:
        return
    for part, rows in (("validation", task.split.valid), ("test", task.split.test)):
        bare = sum(row.label is None for row in rows)
        if bare and any(row.label == 0 for row in rows):
            say(f"{bare:,} of {len(rows):,} {part} rows have no rating, and are left out: pairs are judged here")
    if any(row.label == 0 for row in task.split.valid) and not any(row.label == 0 for row in task.split.test):
        say("No test row is a dislike: there is nothing to tell likes from, and no AUC on test")


def _device() -> str:
    return torch.cuda.get_device_name() if on_gpu() else f"cpu, {torch.get_num_threads()} threads"


def _silent(_: str) -> None:
    return None


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
    except Exception as error:
        message = str(error) if isinstance(error, RecllmError) else place_error(error)
        if not message:
            raise
        sys.stderr.write(f"Error: {message}\n")
        raise SystemExit(2) from None


def _print(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()

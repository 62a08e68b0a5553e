"""What the commands do. Torch is imported inside those that train, export or read text with a language model."""

import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any

import typer
from tokenizers import Tokenizer

from recllm.assets import ASSETS
from recllm.data import Dataset, read_dataset
from recllm.data.join import join_sources
from recllm.errors import RecllmError, require, unknown
from recllm.fetch import cache_folder, fetch, resolve_data, resolve_model
from recllm.hub import pull, push
from recllm.process import run_child
from recllm.prompts import compile_prompt, load_prompt
from recllm.ranker import is_ranker
from recllm.results import cold_lines, difference_lines
from recllm.resuming import check_folder, check_same_data, fusion_stands
from recllm.runs import Run, load_run
from recllm.splits import LIKE_AT, like_threshold
from recllm.tokens import open_tokenizer
from recllm.trainernames import check_names

TRAINING = ("torch", "transformers", "peft", "accelerate", "implicit")
EXPORTING = ("torch", "transformers", "peft", "accelerate", "onnx", "onnxscript")
PARTS = ("test", "valid")
PAGES = {"test": "evaluation.html", "valid": "evaluation-valid.html"}
"""By part, the report that an evaluation writes into the run's folder."""
PROFILES = Path(__file__).parent / "launch"
"""Configurations of accelerate that come with recllm."""
say = typer.echo
tell = partial(typer.echo, err=True)
"""For what is not the answer: progress and counts go to standard error."""


def needs(purpose: str, modules: Sequence[str]) -> None:
    """Check that the training extra is installed, without importing it.

    Raises:
        RecllmError: a module is missing; says what brings it.
    """
    for module in modules:
        if importlib.util.find_spec(module) is None:
            require(module, "train", purpose)


def fetch_names(names: Sequence[str]) -> None:
    """Fetch, or list what is known."""
    for name in names:
        if name not in ASSETS:
            raise unknown("model or data set", name, ASSETS)
    for name in names:
        say(str(fetch(name, tell)))
    if not names:
        for asset in ASSETS.values():
            place = cache_folder() / asset.kind / asset.name
            there = "in the cache" if place.is_dir() and any(place.iterdir()) else "not fetched"
            say(f"{asset.name:24}{asset.kind:8}{there:14}{asset.licence}")


def mapping(pairs: Sequence[str], option: str) -> dict[str, str]:
    """`ours=theirs` options as a dictionary.

    Raises:
        RecllmError: a pair without an equals sign.
    """
    parts = [pair.partition("=") for pair in pairs]
    for (ours, equals, theirs), pair in zip(parts, pairs, strict=True):
        if not (ours and equals and theirs):
            raise RecllmError(f"{option} {pair}: expected OURS=THEIRS, as in {option} item_id=sku.")
    return {ours: theirs for ours, _, theirs in parts}


def read_data(
    name: str, interactions: str | None, items: str | None, columns: Sequence[str], item_columns: Sequence[str]
) -> Dataset:
    """Read a data set as the options say; it is fetched where it is known by name only."""
    given, item_given = mapping(columns, "--column"), mapping(item_columns, "--item-column")
    resolve_data(name, tell)
    return read_dataset(name, interactions=interactions, items=items, columns=given, item_columns=item_given)


def check_data(
    name: str, interactions: str | None, items: str | None, columns: Sequence[str], item_columns: Sequence[str]
) -> None:
    """Print what was read, dropped and why."""
    dataset = read_data(name, interactions, items, columns, item_columns)
    for line in [f"source: {dataset.source}", f"licence: {dataset.licence}", *dataset.report.lines()]:
        say(line)


def join_data(file: Path, target: Path) -> None:
    """Write the data set of a join file and say how to go on."""
    join_sources(file, target, tell)
    say(f"Look at it with: recllm data check {target}")


def model_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of a model; torch is needed only where the model has to be converted or downloaded first."""
    folder = resolve_model(name, tell)
    if isinstance(folder, Path):
        for place in (folder, folder / "converted"):
            if (place / "tokenizer.json").is_file():
                return open_tokenizer(place / "tokenizer.json")
    needs(f"Converting the model '{name}'", TRAINING)
    from recllm.lm import load_tokenizer, model_folder

    return load_tokenizer(model_folder(name, tell))


def preview_prompt(
    dataset: Dataset, prompt_name: str, model: str, user: str | None, item: str | None, like_at: float | None
) -> None:
    """Print a rendered prompt and the tokens of its pieces."""
    dataset.catalog.demand_text(f"'{dataset.name}'")
    prompt = load_prompt(prompt_name)
    if prompt.task == "next_item" and item is not None:
        raise RecllmError(f"--item is for prompts about a candidate; '{prompt_name}' has a history and no candidate.")
    prompt.check_against(dataset.catalog)
    histories = dataset.interactions.histories()
    if user is not None and user not in histories:
        raise unknown("user", user, histories)
    query = histories[user] if user is not None else next(iter(histories.values()))
    if dataset.interactions.frame["rating"].count():
        like_at = like_threshold(dataset.interactions, LIKE_AT if like_at is None else like_at)
    shown = compile_prompt(prompt, model_tokenizer(model), like_at).preview(query, dataset.catalog, item)
    say(shown.text)
    say("")
    for piece in shown.pieces:
        say(f"{piece.n_tokens:6}  {piece.name:12}{piece.text!r:.90}")
    say(f"{len(shown.tokens):6}  tokens in all, as {model} counts")


def train_here(path: Path, overrides: Sequence[str], *, resume: bool, overwrite: bool) -> None:
    """Train in this process."""
    run = load_run(path, overrides)
    # Both again when it begins: what training needs takes seconds to load.
    check_names(run.train.trainer_keys())
    check_folder(run, resume=resume, overwrite=overwrite)
    needs("Training", TRAINING)
    from recllm.train import train_run

    train_run(run, resume=resume, overwrite=overwrite, say=say)
    say(f"Trained. Next: recllm evaluate {quote(str(run.folder))}, or recllm export {quote(str(run.folder))}")


def plan_training(path: Path, overrides: Sequence[str]) -> None:
    """Print what training will take and what the model will read."""
    run = load_run(path, overrides)
    check_names(run.train.trainer_keys())
    needs("Planning a run", TRAINING)
    from recllm.planning import plan_run

    for line in plan_run(run, tell).lines():
        say(line)


def tune_file(path: Path) -> None:
    """Search over the keys of a run file."""
    needs("Tuning", TRAINING)
    from recllm.tuning import tune

    tune(path, say)


def launch_training(
    path: Path, overrides: Sequence[str], flags: Sequence[str], *, resume: bool, overwrite: bool
) -> int:
    """Train through `accelerate launch`; its exit code."""
    if not flags[0].startswith("-"):
        raise RecllmError(
            f"Unexpected argument '{flags[0]}'. Flags of accelerate launch stand behind --, one run at a time."
        )
    # A mistake in the run file is told once, not by every process.
    run = load_run(path, overrides)
    check_names(run.train.trainer_keys())
    check_folder(run, resume=resume, overwrite=overwrite)
    needs("Training", TRAINING)
    command = [sys.executable, "-m", "accelerate.commands.launch", *flags, "-m", "recllm.train", str(path)]
    command += [part for override in overrides for part in ("--set", override)]
    command += ["--resume"] * resume + ["--overwrite"] * overwrite
    # Of a profile with several processes accelerate reads no `use_cpu`.
    return run_child(command, {"ACCELERATE_USE_CPU": "true"} if str(PROFILES / "cpu.yaml") in flags else {})


def profile_flags(name: str) -> list[str]:
    """Flags of `accelerate launch` for a shipped profile, or for a configuration file of accelerate.

    Raises:
        RecllmError: neither, or a profile of DeepSpeed where that is not installed.
    """
    if name.endswith((".yaml", ".yml", ".json")):
        if not Path(name).is_file():
            raise RecllmError(f"There is no file '{name}'. Make one by: accelerate config --config_file {name}")
        return ["--config_file", name]
    shipped = sorted(path.stem for path in PROFILES.glob("*.yaml"))
    if name not in shipped:
        raise unknown("profile", name, shipped, "A configuration file of accelerate works too.")
    if name.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        raise RecllmError(f"The profile '{name}' needs DeepSpeed: pip install deepspeed. Without it, take fsdp2.")
    return ["--config_file", str(PROFILES / f"{name}.yaml")]


def evaluate_folder(folder: Path, part: str) -> None:
    """Measure a trained run and print the table."""
    if part not in PARTS:
        raise unknown("part", part, PARTS)
    run = load_run(folder)
    needs("Evaluating a run", TRAINING)
    from recllm.cards import without_figures, write_adapter_card
    from recllm.collaborative import load_collaborative
    from recllm.outcome import evaluate_run, save_evaluation
    from recllm.report import write_report
    from recllm.runreport import MEASURED, run_report
    from recllm.scoring import known_scores
    from recllm.tasks import prepare

    trained(run)
    task = prepare(run, tell)
    check_same_data(run, task.fingerprints())
    scores = known_scores(run, task, load_collaborative(run, task), tell)
    table = evaluate_run(run, task, scores[part], part=part)
    # Kept before anything is printed: a pipe that is closed early ends the process.
    kept, page = save_evaluation(run, {part: table}), run.folder / PAGES[part]
    write_report(page, run_report(run, task, table, part))
    write_adapter_card(run)
    say(f"On {MEASURED[part]}:")
    for line in [*table.lines(), *difference_lines(table), *cold_lines(run.data.split, table)]:
        say(line)
    say(f"Kept in {kept}")
    say(f"Open {page}")
    for bundle in without_figures(run):
        say(f"The card of {bundle} has no figures, for it was exported before: recllm export {run.folder}")


def trained(run: Run) -> None:
    """Check that a run is trained to its end, with the fusion that it names, and that its folder takes more.

    Raises:
        RecllmError: it is not, or nothing can be written into it.
    """
    folder = run.folder
    if not (folder / "fusion.json").is_file():
        raise RecllmError(f"{folder} has no fitted fusion. Train the run to its end: recllm train {folder} --resume")
    if not fusion_stands(run):
        raise RecllmError(
            f"The fusion in {folder} is not the one that its run.toml asks for: fitting it anew was stopped. Go on "
            f"with it: recllm train {folder} --resume"
        )
    if not os.access(folder, os.W_OK):
        raise RecllmError(
            f"{folder} cannot be written, and what is made of a run goes there. Copy it, or mend its rights."
        )


def export_folder(folder: Path, recipes: Sequence[str], *, overwrite: bool) -> int:
    """Export a trained run and print each graph's fidelity; 1 where no recipe kept its tolerance."""
    run = load_run(folder)
    needs("Exporting", EXPORTING)
    from recllm.export import export_run
    from recllm.gate import load_recipe
    from recllm.revisions import check_same_models
    from recllm.tasks import prepare

    for name in recipes:
        load_recipe(name)
    trained(run)
    task = prepare(run, tell)
    check_same_data(run, task.fingerprints())
    check_same_models(run)
    results = export_run(run, task, list(recipes) or None, tell, overwrite=overwrite)
    for result in results:
        width = max(map(len, result.parity), default=0)
        for graph, measured in result.parity.items():
            say(
                f"{result.recipe:8} {graph:{width}}  "
                + "  ".join(f"{key} {value:.4g}" for key, value in measured.items())
            )
        for failure in result.failures:
            say(f"{result.recipe}: left out. {failure}")
        if result.folder is not None:
            say(f"{result.recipe}: {result.folder}")
    return 0 if any(result.folder is not None for result in results) else 1


def push_folder(folder: Path, repository: str, *, private: bool, revision: str | None) -> None:
    """Upload a bundle or an adapter and say where it is."""
    say(f"{folder} is at {push(folder, repository, private=private, revision=revision)}")


def pull_folder(repository: str, folder: Path, *, revision: str | None, overwrite: bool) -> None:
    """Download a bundle or an adapter and say what to do with it."""
    kind = pull(repository, folder, revision=revision, overwrite=overwrite)
    use = "its card says how to load it"
    if kind == "bundle" and is_ranker(folder):
        use = f"recllm score --bundle {folder} --users ROWS --out OUT, or behind another one: --ranker {folder}"
    elif kind == "bundle":
        use = f"recllm recommend {folder} --history 'ID ID'"
    say(f"{folder}: the {kind} of {repository}. Next: {use}")


def see_doctor(bundle: Path | None) -> int:
    """Print what is there and what is wrong, with the mend; 1 where something is."""
    from recllm.doctor import examine

    wrong = 0
    for finding in examine(bundle):
        say(finding.line())
        wrong += finding.mark == "wrong"
    return 1 if wrong else 0


def run_quickstart(out: Path, steps: int | None, seed: int, *, resume: bool, as_json: bool) -> None:
    """Run the demo; with `as_json` standard output has nothing but the result."""
    needs("The quickstart", (*TRAINING, *EXPORTING))
    from recllm.quickstart import quickstart

    given: dict[str, Any] = {} if steps is None else {"steps": steps}
    result = quickstart(out, seed=seed, resume=resume, say=tell if as_json else say, **given)
    if as_json:
        say(json.dumps(result, ensure_ascii=False))


def run_benchmark(name: str, arguments: Sequence[str]) -> int:
    """Run a file of the checkout's benchmarks; its exit code."""
    folder = Path(__file__).parents[1] / "benchmarks"
    if not folder.is_dir() or not (folder.parent / "pyproject.toml").is_file():
        raise RecllmError(
            "The benchmarks are not in the installed package, only in a checkout of recllm. Get the sources, "
            "`make install`, and run it there."
        )
    files = {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py"))}
    # The other files are parts of these.
    names = [stem for stem, text in files.items() if f'prog="recllm bench {stem}"' in text]
    if name not in names:
        raise unknown("benchmark", name, names)
    return run_child([sys.executable, str(folder / f"{name}.py"), *arguments])

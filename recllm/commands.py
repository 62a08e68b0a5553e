"""What the commands do. Torch is imported inside those that train, export or read text with a language model."""

import importlib.util
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any

import polars as pl
import typer
from tokenizers import Tokenizer

from recllm import __version__
from recllm.assets import ASSETS
from recllm.batch import Job, Summary, rank_file, recommend_file, score_file, score_items_file
from recllm.bundle import MANIFEST, read_manifest, read_steadily
from recllm.data import Catalog, Dataset, Query, read_dataset, read_interactions, read_items
from recllm.data.events import Duplicates
from recllm.data.join import join_sources
from recllm.data.tables import open_table
from recllm.errors import RecllmError, require, unknown
from recllm.fetch import cache_folder, fetch, resolve_data, resolve_model
from recllm.files import sha256_of
from recllm.growing import add_items, told_columns
from recllm.hub import pull, push
from recllm.process import run_child
from recllm.prompts import compile_prompt, load_prompt
from recllm.query_rows import history_items
from recllm.ranker import Ranker, TwoStage, behind, is_ranker, load_ranker
from recllm.ranking import ItemIndex
from recllm.recipes import find_recipe
from recllm.results import cold_lines, difference_lines
from recllm.resuming import check_folder, check_same_data
from recllm.runs import load_run
from recllm.runtime import Recommender, load
from recllm.shortlist import EXACT
from recllm.splits import LIKE_AT, like_threshold
from recllm.tokens import open_tokenizer
from recllm.trainernames import check_names

TRAINING = ("torch", "transformers", "peft", "accelerate", "implicit")
EXPORTING = ("torch", "transformers", "peft", "accelerate", "onnx", "onnxscript")
PARTS = ("test", "valid")
PAGES = {"test": "evaluation.html", "valid": "evaluation-valid.html"}
"""By part, the report that an evaluation writes into the run's folder."""
UNREAD = (
    "the history has ratings, and the prompt marks what was liked or disliked: say from which rating on an item was "
    "liked, --like-at 4 of five stars, or --like-at 1 where ratings are 0 and 1."
)
"""Why rows with ratings are not scored zero-shot as they are."""
PROFILES = Path(__file__).parent / "launch"
"""Configurations of accelerate that come with recllm."""
RANKED_TOGETHER = 64
"""Rows that a language model judges between two progress lines."""

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

    trained(run.folder)
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


def trained(folder: Path) -> None:
    """Check that a run is trained to its end, and that its folder takes more.

    Raises:
        RecllmError: it is not, or nothing can be written into it.
    """
    if not (folder / "fusion.json").is_file():
        raise RecllmError(f"{folder} has no fitted fusion. Train the run to its end: recllm train {folder} --resume")
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
    trained(run.folder)
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


def batch_job(
    source: Path,
    target: Path,
    interactions: Path | None,
    columns: Sequence[str],
    shard: str,
    *,
    bundle: Path | None,
    overwrite: bool,
    others: Sequence[Path | None] = (),
) -> Job:
    """The files of a batch job; histories are read where a log is given, as the bundle's run read its own.

    `others` are read besides, and not written over.

    Raises:
        RecllmError: a log that cannot be read, or a shard that is not I/N.
    """
    given = mapping(columns, "--column")
    part, slash, parts = shard.partition("/")
    if not (slash and part.isdecimal() and parts.isdecimal()):
        raise RecllmError(f"--shard {shard}: give I/N with I between 1 and N, as --shard 1/4.")
    histories = None
    read = tuple(file for file in (interactions, *others) if file is not None)
    if interactions is not None:
        manifest = {} if bundle is None else read_manifest(bundle, verify=False)
        columns_of_run = told_columns(interactions, manifest, "columns")
        histories = log_histories(interactions, columns_of_run | given, _duplicates(manifest))
    return Job(source, target, histories, overwrite, tell, shard=(int(part), int(parts)), others=read)


def _duplicates(manifest: Mapping[str, Any]) -> Duplicates:
    """Which of several events of one user with one item the bundle's run read."""
    # Bundles of before say only whether all of them count.
    found: Duplicates = manifest.get("duplicates", "keep" if manifest.get("repeats") else "first")
    return found


def log_histories(path: Path, columns: dict[str, str], duplicates: Duplicates = "first") -> dict[str, Query]:
    """Histories of all users of a log."""
    return read_interactions(path, columns=columns, duplicates=duplicates, say=tell).histories()


@dataclass(frozen=True)
class Stages:
    """What recommends: a bundle, and behind it a ranker where one is named."""

    bundle: Path
    provider: str
    threads: int
    index: str
    ranker: Path | None
    top: int
    weight: float
    seconds: float | None

    def open(self) -> TwoStage | Recommender:
        """Load what is named. A batch has no returning users, and kept histories could change last digits.

        Raises:
            RecllmError: no bundle of its kind, or the provider is not there.
        """
        recommender = load(self.bundle, provider=self.provider, threads=self.threads, index=self.index)
        if self.index != EXACT:
            found = recommender.recall(k=min(10, len(recommender.index)))
            sys.stderr.write(
                f"The index '{self.index}' gives {100 * found:.1f} % of the exact ten best after "
                "histories of one item\n"
            )
        if self.ranker is None:
            return recommender
        ranker = load_ranker(self.ranker, provider=self.provider, threads=self.threads, keep_bytes=0)
        ranker = behind(recommender, ranker, self.ranker, tell)
        return TwoStage(recommender, ranker, self.top, self.weight, self.seconds)

    def known(self) -> tuple[list[str], Recommender | TwoStage]:
        """The digests of the bundles that are open then, whatever takes their place meanwhile, and what answers."""
        bundles = [self.bundle] if self.ranker is None else [self.bundle, self.ranker]

        def read(left: Sequence[Path]) -> tuple[list[str], Recommender | TwoStage]:
            if left:
                return read_steadily(left[0], lambda: read(left[1:]))
            return [_bundle_digest(bundle) for bundle in bundles], self.open()

        return read(bundles)


def recommend_rows(stages: Stages, job: Job, k: int, *, exclude_seen: bool | None, new_items: int) -> None:
    """Recommend for every row of a file."""
    job.check()
    # The job must know the very bundle that answers, whatever takes its place meanwhile.
    digests, recommender = stages.known()
    job = job.knowing(bundle=digests[0], provider=stages.provider, threads=stages.threads, recllm=__version__)
    if stages.index != EXACT:
        job = job.knowing(index=stages.index)
    if stages.ranker is not None:
        job = job.knowing(ranker=digests[1], top=stages.top, weight=stages.weight, seconds=stages.seconds)
        job = job.by(RANKED_TOGETHER)
    _report(recommend_file(recommender, job, k=k, exclude_seen=exclude_seen, new_items=new_items), job)


def _bundle_digest(bundle: Path) -> str:
    """What answers depend on: the manifest knows every file of the bundle."""
    path = bundle / MANIFEST
    return sha256_of(path) if path.is_file() else ""


def recommend_history(stages: Stages, history: str, k: int, *, exclude_seen: bool | None, new_items: int) -> None:
    """Print the best items after one history, with the share of each scorer."""
    recommender = stages.open()
    try:
        items = list(history_items(history))
    except ValueError as error:
        raise RecllmError(f"--history {history}: {error}. Write ids parted by blanks.") from None
    strange = [item for item in items if item not in recommender.index]
    if strange:
        tell(f"Not in the catalogue, passed over: {', '.join(strange)}")
    recommender.check_k(k, new_items)
    found = recommender.recommend([items], k, exclude_seen=exclude_seen, new_items=new_items)
    wide = max([4, *(len(item) for item in found.ids[0])])
    heads = [f"{'rank':>4}", f"{'item':{wide}}", f"{'title':40}", f"{'score':>7}", *(f"{n:>10}" for n in found.shares)]
    say("  ".join(heads))
    for rank, item in enumerate(found.ids[0]):
        title = recommender.catalog.record(item).get("title", "")
        shares = [f"{_short(share[0, rank]):>10}" for share in found.shares.values()]
        say(
            "  ".join(
                [f"{rank + 1:4}", f"{item:{wide}}", f"{title:40.40}", f"{_short(found.scores[0, rank]):>7}", *shares]
            )
        )


def _short(score: float) -> str:
    """Three places, or where these are zeros the first two digits: a backup's weight is a millionth."""
    return f"{score:.3f}" if score == 0 or abs(score) >= 0.0005 else f"{score:.1e}"


def add_to_bundle(
    bundle: Path, items: Path, target: Path, columns: Sequence[str], provider: str, *, overwrite: bool
) -> None:
    """Add the items of a file to a bundle."""
    given = mapping(columns, "--item-column")
    added = add_items(bundle, items, target, columns=given, provider=provider, overwrite=overwrite, say=tell)
    say(f"{added:,} items added; the bundle is {target}")


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


def score_candidates(bundle: Path, job: Job, provider: str) -> None:
    """Score the candidates that rows name, by a bundle."""
    job.check()

    def opened() -> tuple[str, Ranker | Recommender]:
        if is_ranker(bundle):
            return _bundle_digest(bundle), load_ranker(bundle, provider=provider, keep_bytes=0)
        return _bundle_digest(bundle), load(bundle, provider=provider)

    digest, scorer = read_steadily(bundle, opened)
    job = job.knowing(bundle=digest, provider=provider, recllm=__version__)
    if isinstance(scorer, Ranker):
        _report(rank_file(scorer, ItemIndex(scorer.prompts.written), job.by(RANKED_TOGETHER)), job)
    else:
        _report(score_file(scorer, job), job)


def _item_files(items: Path, history_items: Path | None, given: dict[str, str]) -> tuple[Catalog, Catalog]:
    """Both files of items; a pair of `--item-column` is for the one, or both, that has such a column.

    Raises:
        RecllmError: neither file has one, or a file cannot be read.
    """
    if history_items is None:
        found = read_items(items, columns=given, say=tell)
        return found, found
    there = [open_table(path).columns for path in (items, history_items)]
    for ours, theirs in given.items():
        if not any(theirs in columns for columns in there):
            raise unknown(
                f"column of {items} and {history_items}", theirs, {*there[0], *there[1]}, f"It was given for {ours}."
            )
    parts = [{ours: theirs for ours, theirs in given.items() if theirs in columns} for columns in there]
    return read_items(items, columns=parts[0], say=tell), read_items(history_items, columns=parts[1], say=tell)


def score_zero_shot(
    items: Path,
    history_items: Path | None,
    columns: Sequence[str],
    job: Job,
    model: str,
    prompt: str,
    like_at: float | None,
) -> None:
    """Score every item of a file for every row by an untrained language model."""
    job.check()
    new, known = _item_files(items, history_items, mapping(columns, "--item-column"))
    needs("Scoring with a language model", TRAINING)
    from recllm.devices import fast_bf16
    from recllm.relevance import zero_shot_scorer
    from recllm.revisions import revision

    # An item that is in both files keeps the text of the file that it is scored from.
    both = pl.concat([new.frame, known.frame], how="diagonal").unique("item_id", keep="first", maintain_order=True)
    catalog = Catalog(both)
    scorer = zero_shot_scorer(model, prompt, catalog, tell, like_at=like_at)
    marks = load_prompt(prompt).liked or load_prompt(prompt).disliked
    if like_at is not None and not marks:
        raise RecllmError(
            f"--like-at says from which rating on an item was liked, and the prompt '{prompt}' marks nothing as liked "
            "or disliked. Leave it out, or take a prompt with 'liked' and 'disliked'."
        )
    # Every row costs a pass per item: few rows at once keep the progress lines coming.
    job = job.by(4).knowing(
        model=model,
        weights=revision(model),
        bf16=fast_bf16(),
        prompt=sha256_of(find_recipe("prompts", prompt)),
        like_at=like_at,
        text=catalog.fingerprint(),
        recllm=__version__,
    )
    unread = UNREAD if marks and like_at is None else ""
    if untold := sum(item not in scorer.prompts.candidates for item in new.ids):
        tell(f"{untold:,} of {len(new):,} items of {items} have no text that '{prompt}' writes; their scores are empty")
    _report(score_items_file(scorer, ItemIndex(new.ids), ItemIndex(scorer.prompts.written), job, unread=unread), job)


def _report(summary: Summary, job: Job) -> None:
    for line in summary.lines(job.target):
        say(line)


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

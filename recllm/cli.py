"""The command line: `recllm --help`. What a command does is in recllm.commands and recllm.answering, loaded by it."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from recllm import __version__
from recllm.errors import RecllmError, place_error
from recllm.process import set_up

MISTAKE, INTERRUPTED = 2, 130
"""Exit codes: a user's mistake, Ctrl-C."""


class Commands(TyperGroup):
    """The group of all commands; a user's mistake becomes one message without a traceback."""

    def invoke(self, ctx: Any) -> Any:  # noqa: ANN401  typer carries a copy of click or depends on it, by its version
        """Run the command."""
        try:
            return super().invoke(ctx)
        except RecllmError as error:
            typer.echo(f"Error: {error}", err=True)
            raise typer.Exit(MISTAKE) from None
        except KeyboardInterrupt:
            typer.echo(
                "Interrupted. Training goes on where it was with --resume, a batch by the same command.", err=True
            )
            raise typer.Exit(INTERRUPTED) from None
        except Exception as error:
            message = place_error(error)
            if not message:
                raise
            typer.echo(f"Error: {message}", err=True)
            raise typer.Exit(MISTAKE) from None


def example(*lines: str) -> str:
    r"""The end of a command's help; `\b` keeps the lines as they are."""
    return "\n".join(["\b", "Example:" if len(lines) == 1 else "Examples:", *(f"  {line}" for line in lines)])


def refuse(context: typer.Context, options: Sequence[str], why: str) -> None:
    """Refuse options that would be passed over.

    Raises:
        RecllmError: one of them was given.
    """
    for option in options:
        source = context.get_parameter_source(option)
        if source is not None and source.name == "COMMANDLINE":
            raise RecllmError(f"--{option.replace('_', '-')} {why}")


# Without markup typer does not import rich, which alone takes longer than the rest of --help.
app = typer.Typer(
    name="recllm",
    cls=Commands,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=example("recllm quickstart", "recllm recommend runs/quickstart/bundle-int8 --history '50 181 172'"),
)
data = typer.Typer(rich_markup_mode=None, no_args_is_help=True, epilog=example("recllm data check ml-100k"))
app.add_typer(data, name="data", help="Look at a data set before anything is trained on it.")
items = typer.Typer(
    rich_markup_mode=None, no_args_is_help=True, epilog=example("recllm items add runs/films/bundle-int8 new.csv")
)
app.add_typer(items, name="items", help="Change the items of a bundle without training.")


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"recllm {__version__}")
        raise typer.Exit


@app.callback()
def top(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """A recommender from logs and item text, by a small language model and matrix factorization."""


DataName = Annotated[str, typer.Argument(metavar="DATA", help="A name, a folder, or a file of interactions.")]
Interactions = Annotated[str | None, typer.Option(help="The file of interactions, where its name does not tell.")]
Items = Annotated[str | None, typer.Option(help="The file of items, where its name does not tell.")]
Column = Annotated[
    list[str] | None, typer.Option(metavar="OURS=THEIRS", help="Which column of the interactions is ours. Repeatable.")
]
ItemColumn = Annotated[
    list[str] | None, typer.Option(metavar="OURS=THEIRS", help="Likewise for the items. Repeatable.")
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN_FOLDER", help="The folder of a trained run.")]
Override = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the run file, as train.max_steps=100."),
]
Out = Annotated[Path | None, typer.Option(metavar="FILE", help="Write to this .parquet, .jsonl or .csv.")]
Log = Annotated[
    Path | None, typer.Option("--interactions", metavar="FILE", help="The log with the histories of rows without one.")
]
Shard = Annotated[
    str, typer.Option(metavar="I/N", help="Only the I-th of N parts of the rows; each goes to a file of its own.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
Provider = Annotated[str, typer.Option(help="cpu, cuda or tensorrt; never another one than asked for.")]
TextModel = Annotated[str, typer.Option(metavar="NAME", help="A fetchable name, a hub id or a local folder.")]
PromptName = Annotated[str, typer.Option(metavar="NAME", help="A shipped prompt, or a path to a TOML file.")]


@app.command(epilog=example("recllm fetch ml-100k smollm2-135m-instruct", "recllm fetch"))
def fetch(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME", help="Models and data sets.")] = None,
) -> None:
    """Put models and data sets into the cache, by name; without a name, list what is known."""
    from recllm import commands

    commands.fetch_names(names or [])


@data.command(epilog=example("recllm data check ml-100k", "recllm data check log.csv --column item_id=sku"))
def check(
    name: DataName,
    interactions: Interactions = None,
    items: Items = None,
    column: Column = None,
    item_column: ItemColumn = None,
) -> None:
    """Say what is read from a data set, what is dropped and why, with line numbers."""
    from recllm import commands

    commands.check_data(name, interactions, items, column or [], item_column or [])


@data.command(epilog=example("recllm data join shops.toml shops"))
def join(
    file: Annotated[Path, typer.Argument(metavar="JOIN.toml", help="Names the sources.")],
    target: Annotated[Path, typer.Argument(metavar="FOLDER", help="The new data set.")],
) -> None:
    """Join several logs into one data set, each with its own ids, weights, clock and kinds of events."""
    from recllm import commands

    commands.join_data(file, target)


@data.command(epilog=example("recllm data preview ml-100k --prompt relevance --user 1 --item 50"))
def preview(
    name: DataName,
    prompt: PromptName = "relevance",
    model: TextModel = "smollm2-135m-instruct",
    user: Annotated[
        str | None, typer.Option(metavar="ID", help="Whose history; the first user's if not given.")
    ] = None,
    item: Annotated[str | None, typer.Option(metavar="ID", help="The candidate; the last event if none.")] = None,
    like_at: Annotated[
        float | None, typer.Option(help="From which rating on an item was liked; by default as in training.")
    ] = None,
    interactions: Interactions = None,
    items: Items = None,
    column: Column = None,
    item_column: ItemColumn = None,
) -> None:
    """Show a prompt as the model will read it, with token counts; no model is loaded."""
    from recllm import commands

    dataset = commands.read_data(name, interactions, items, column or [], item_column or [])
    commands.preview_prompt(dataset, prompt, model, user, item, like_at)


@app.command(
    epilog=example(
        "recllm train films.toml --set train.learning_rate=2e-4",
        "recllm train films.toml --dry-run",
        "recllm train films.toml --resume",
        "recllm train films.toml --profile gpus -- --num_processes 4",
    )
)
def train(
    run: Annotated[Path, typer.Argument(metavar="RUN.toml", help="The run file, or the folder of a run.")],
    launcher: Annotated[
        list[str] | None, typer.Argument(metavar="-- FLAGS", help="Flags of `accelerate launch`.")
    ] = None,
    override: Override = None,
    resume: Annotated[bool, typer.Option("--resume", help="Keep what is done and go on.")] = False,
    overwrite: Overwrite = False,
    profile: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="cpu, gpu, gpus, fsdp2, zero2, zero3, or a configuration file of accelerate."
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it will take and show what is read; train nothing.")
    ] = False,
) -> None:
    """Fit and train everything that a run file names."""
    from recllm import commands

    if dry_run:
        if launcher or profile or resume or overwrite:
            raise RecllmError("--dry-run measures a run in this process and keeps nothing; give it alone.")
        commands.plan_training(run, override or [])
        return
    flags = [*(commands.profile_flags(profile) if profile else []), *(launcher or [])]
    if flags:
        raise typer.Exit(commands.launch_training(run, override or [], flags, resume=resume, overwrite=overwrite))
    commands.train_here(run, override or [], resume=resume, overwrite=overwrite)


@app.command(epilog=example("recllm tune tune.toml"))
def tune(
    file: Annotated[Path, typer.Argument(metavar="TUNE.toml", help="What is searched, and from which run file.")],
) -> None:
    """Search over keys of a run file; the same command goes on, also in several processes at once."""
    from recllm import commands

    commands.tune_file(file)


@app.command(epilog=example("recllm evaluate runs/films"))
def evaluate(
    folder: RunFolder,
    part: Annotated[str, typer.Option(help="test or valid.")] = "test",
) -> None:
    """Measure every scorer of a trained run and their fusion, and keep the table as evaluation.json."""
    from recllm import commands

    commands.evaluate_folder(folder, part)


@app.command(epilog=example("recllm export runs/films", "recllm export runs/films --recipe fp32 --recipe int8"))
def export(
    folder: RunFolder,
    recipe: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A recipe of export/, or a path. Repeatable.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace bundles that items were added to; they lose these.")
    ] = False,
) -> None:
    """Write one ONNX bundle per recipe, each compared with torch before it is kept; exits with 1 where none is."""
    from recllm import commands

    raise typer.Exit(commands.export_folder(folder, recipe or [], overwrite=overwrite))


@app.command(
    epilog=example(
        "recllm recommend runs/films/bundle-int8 --history '50 181' -k 5",
        "recllm recommend runs/films/bundle-int8 users.jsonl --out recommendations.parquet",
        "recllm recommend runs/films/bundle-int8 ids.csv --interactions log.csv --out recommendations.csv",
        "recllm recommend runs/films/bundle-int8 users.jsonl --out recommendations.parquet --new-items 1",
        "recllm recommend runs/films/bundle-int8 users.jsonl --out recommendations.parquet --without expired.csv",
        "recllm recommend runs/films/bundle-int8 --history '50 181' --ranker runs/judge/bundle-fp32 --rank-top 50",
    )
)
def recommend(
    context: typer.Context,
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The folder of a bundle.")],
    source: Annotated[
        Path | None, typer.Argument(metavar="INPUT", help="Rows with 'history' or 'user_id': Parquet, JSONL or CSV.")
    ] = None,
    out: Out = None,
    history: Annotated[str | None, typer.Option(metavar="'ID ID'", help="One history, oldest first.")] = None,
    k: Annotated[int, typer.Option("-k", help="How many items.")] = 10,
    provider: Provider = "cpu",
    threads: Annotated[int, typer.Option(min=0, help="Inside one operator; 0 leaves it to ONNX Runtime.")] = 0,
    index: Annotated[
        str, typer.Option(metavar="KIND", help="exact, or for large catalogues int8 or faiss (extra 'index').")
    ] = "exact",
    include_seen: Annotated[
        bool | None,
        typer.Option("--include-seen/--exclude-seen", help="Items of the history itself; default: as it was trained."),
    ] = None,
    new_items: Annotated[int, typer.Option(min=0, help="How many of the k at least are items of few events.")] = 0,
    ranker: Annotated[
        Path | None, typer.Option(metavar="BUNDLE", help="Reorder the best by the language model of this bundle.")
    ] = None,
    rank_top: Annotated[int, typer.Option(min=1, help="How many of the best are reordered.")] = 100,
    rank_weight: Annotated[float, typer.Option(min=0.0, help="Of the ranker's score beside the first one.")] = 1.0,
    rank_seconds: Annotated[
        float | None, typer.Option(help="The most seconds per user; the answer then depends on the machine.")
    ] = None,
    only: Annotated[
        Path | None, typer.Option(metavar="ITEMS", help="A file of the items that lists may have, as what is in stock.")
    ] = None,
    without: Annotated[
        Path | None, typer.Option(metavar="ITEMS", help="A file of items that lists must not have.")
    ] = None,
    interactions: Log = None,
    column: Column = None,
    shard: Shard = "1/1",
    overwrite: Overwrite = False,
) -> None:
    """Recommend from a bundle: file in, file out, or one history to the screen. Needs no torch."""
    from recllm import answering

    if (source is None) == (history is None):
        raise RecllmError("Give either a file of rows and --out FILE, or one history: --history 'ID ID'.")
    if history is not None and out is not None:
        raise RecllmError("--history answers on the screen; for --out FILE give a file of rows instead.")
    if ranker is None:
        refuse(context, ("rank_top", "rank_weight", "rank_seconds"), "is for a ranker: name one by --ranker BUNDLE.")
    if history is not None:
        refuse(
            context, ("interactions", "column", "shard", "overwrite"), "is for a file of rows; --history is one row."
        )
    elif interactions is None:
        refuse(context, ("column",), "is for the log with the histories: name it by --interactions FILE.")
    stages = answering.Stages(
        bundle=bundle,
        provider=provider,
        threads=threads,
        index=index,
        ranker=ranker,
        top=rank_top,
        weight=rank_weight,
        seconds=rank_seconds,
        only=answering.listed_ids(bundle, only),
        without=answering.listed_ids(bundle, without) or frozenset(),
    )
    exclude_seen = None if include_seen is None else not include_seen
    if history is not None:
        answering.recommend_history(stages, history, k, exclude_seen=exclude_seen, new_items=new_items)
        return
    if source is None or out is None:
        raise RecllmError("A file of rows needs a place for the answers: --out FILE (.parquet, .jsonl or .csv).")
    job = answering.batch_job(source, out, interactions, column or [], shard, bundle=bundle, overwrite=overwrite)
    answering.recommend_rows(stages, job, k, exclude_seen=exclude_seen, new_items=new_items)


@app.command(
    epilog=example(
        "recllm score --items new.csv --history-items items.csv --users users.jsonl --out scores.parquet",
        "recllm score --bundle runs/films/bundle-int8 --users candidates.jsonl --out scores.parquet",
    )
)
def score(
    context: typer.Context,
    users: Annotated[Path, typer.Option(metavar="FILE", help="Rows with 'history' (with --bundle also 'candidates').")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="Write to this .parquet, .jsonl or .csv.")],
    items: Annotated[Path | None, typer.Option(metavar="FILE", help="The items to score, known by their text.")] = None,
    history_items: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The items of the histories; those of --items if not given.")
    ] = None,
    model: TextModel = "smollm2-135m-instruct",
    prompt: PromptName = "cold_item",
    like_at: Annotated[
        float | None, typer.Option(help="An item of a history that is rated so much was liked, one rated less not.")
    ] = None,
    bundle: Annotated[Path | None, typer.Option(metavar="BUNDLE", help="Score by this bundle instead.")] = None,
    provider: Provider = "cpu",
    interactions: Log = None,
    column: Column = None,
    item_column: Annotated[
        list[str] | None,
        typer.Option(metavar="OURS=THEIRS", help="Which column of the files of items is ours. Repeatable."),
    ] = None,
    shard: Shard = "1/1",
    overwrite: Overwrite = False,
) -> None:
    """Score items for users, zero-shot: by their text and an untrained language model, or by a bundle."""
    from recllm import answering

    if (items is None) == (bundle is None):
        raise RecllmError("Give either --items FILE (zero-shot, by text alone) or --bundle BUNDLE.")
    if bundle is None and provider != "cpu":
        raise RecllmError(
            f"--provider {provider} is for --bundle; a language model takes the GPU by itself where there is one."
        )
    if bundle is not None:
        refuse(context, ("like_at",), "is for --items; a bundle knows from its training what was a like.")
        refuse(context, ("model", "prompt"), "is for --items; a bundle has its own.")
        refuse(context, ("history_items", "item_column"), "is for --items; a bundle knows the text of its items.")
    if interactions is None:
        refuse(context, ("column",), "is for the log with the histories: name it by --interactions FILE.")
    others = (items, history_items)
    job = answering.batch_job(
        users, out, interactions, column or [], shard, bundle=bundle, overwrite=overwrite, others=others
    )
    if bundle is not None:
        answering.score_candidates(bundle, job, provider)
    elif items is not None:
        answering.score_zero_shot(items, history_items, item_column or [], job, model, prompt, like_at)


@items.command(
    epilog=example(
        "recllm items add runs/films/bundle-int8 new.csv",
        "recllm items add runs/films/bundle-int8 new.csv --out runs/films/bundle-today",
    )
)
def add(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The folder of a bundle.")],
    source: Annotated[Path, typer.Argument(metavar="ITEMS", help="A file of items: an id, a title, any text.")],
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="The new bundle; BUNDLE itself if not given.")
    ] = None,
    item_column: Annotated[
        list[str] | None,
        typer.Option(
            metavar="OURS=THEIRS", help="Which column of ITEMS is ours; by default as in training. Repeatable."
        ),
    ] = None,
    provider: Provider = "cpu",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another bundle in FOLDER.")] = False,
) -> None:
    """Add items that nobody has chosen yet, by their text; they can be recommended from the next call."""
    from recllm import answering

    answering.add_to_bundle(bundle, source, out or bundle, item_column or [], provider, overwrite=overwrite)


@items.command(
    epilog=example(
        "recllm items remove runs/films/bundle-int8 expired.csv", "recllm items remove runs/films/bundle-int8 sold.txt"
    )
)
def remove(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The folder of a bundle.")],
    source: Annotated[
        Path, typer.Argument(metavar="ITEMS", help="Their ids: a file of items, or .txt with one to a line.")
    ],
    item_column: Annotated[
        list[str] | None,
        typer.Option(metavar="item_id=THEIRS", help="Which column of ITEMS has the ids; by default as in training."),
    ] = None,
) -> None:
    """Leave items out of all lists from the next call on. Histories still have them; `items add` brings one back."""
    from recllm import answering

    answering.remove_from_bundle(bundle, source, item_column or [])


@app.command(
    epilog=example("recllm push runs/films/bundle-int8 acme/films", "recllm push runs/films/lm/adapter acme/films-lora")
)
def push(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A bundle, or a run's lm/adapter.")],
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="The repository on the Hugging Face Hub.")],
    private: Annotated[bool, typer.Option("--private", help="A new repository is seen by its owner only.")] = False,
    revision: Annotated[str | None, typer.Option(metavar="BRANCH", help="The main branch if not given.")] = None,
) -> None:
    """Upload a bundle or an adapter to the hub, with its card, in place of what the repository held."""
    from recllm import commands

    commands.push_folder(folder, repository, private=private, revision=revision)


@app.command(epilog=example("recllm pull acme/films bundles/films"))
def pull(
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="The repository on the Hugging Face Hub.")],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where it goes.")],
    revision: Annotated[str | None, typer.Option(metavar="REVISION", help="A branch, a tag or a commit.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Download a bundle or an adapter from the hub; it appears when all of it is there and checked."""
    from recllm import commands

    commands.pull_folder(repository, folder, revision=revision, overwrite=overwrite)


@app.command(epilog=example("recllm doctor", "recllm doctor runs/films/bundle-int8"))
def doctor(
    bundle: Annotated[Path | None, typer.Argument(metavar="BUNDLE", help="A bundle to look at too.")] = None,
) -> None:
    """Say what is installed, what is wrong with it, and the mend. Exits with 1 where something is wrong."""
    from recllm import commands

    raise typer.Exit(commands.see_doctor(bundle))


@app.command(epilog=example("recllm quickstart", "recllm quickstart --json --out runs/demo --seed 1"))
def quickstart(
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="The run's folder.")] = Path("runs/quickstart"),
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps of the language model.")] = None,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Keep what an earlier call finished.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="End standard output with one JSON line; all else goes to standard error.")
    ] = False,
) -> None:
    """The whole road on ml-100k: train, fuse, evaluate, export, recommend, report."""
    from recllm import commands

    commands.run_quickstart(out, steps, seed, resume=resume, as_json=as_json)


@app.command(
    epilog=example("recllm bench quality -- --quick", "recllm bench speed -- --help"),
    context_settings={"ignore_unknown_options": True},
)
def bench(
    name: Annotated[str, typer.Argument(metavar="NAME", help="quality, speed, batch or train.")],
    arguments: Annotated[list[str] | None, typer.Argument(metavar="ARGS", help="Passed on.")] = None,
) -> None:
    """Run a benchmark of the checkout; it ends with one line of JSON."""
    from recllm import commands

    raise typer.Exit(commands.run_benchmark(name, arguments or []))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit."""
    set_up()
    app(args=list(sys.argv[1:] if arguments is None else arguments), prog_name="recllm")


if __name__ == "__main__":
    main()

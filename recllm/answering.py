"""What recommending, scoring and adding items do on the command line: files or one history in, a file or lines out."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from recllm import __version__
from recllm.batch import Job, Summary, digest_of, rank_file, recommend_file, score_file, score_items_file
from recllm.bundle import MANIFEST, read_manifest, read_steadily
from recllm.commands import TRAINING, mapping, needs, say, tell
from recllm.data import Catalog, Query, read_interactions, read_items
from recllm.data.events import Duplicates
from recllm.data.tables import open_table
from recllm.errors import RecllmError, unknown
from recllm.files import sha256_of
from recllm.growing import add_items, told_columns
from recllm.prompts import UNREAD_COLUMNS, load_prompt
from recllm.query_rows import history_items
from recllm.ranker import Ranker, TwoStage, behind, is_ranker, load_ranker
from recllm.ranking import ItemIndex
from recllm.recipes import find_recipe
from recllm.removing import item_ids, remove_items
from recllm.runtime import Recommender, load
from recllm.shortlist import EXACT

UNREAD = (
    "the history has ratings, and the prompt marks what was liked or disliked: say from which rating on an item was "
    "liked, --like-at 4 of five stars, or --like-at 1 where ratings are 0 and 1."
)
"""Why rows with ratings are not scored zero-shot as they are."""
RANKED_TOGETHER = 64
"""Rows that a language model judges between two progress lines."""


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
    only: frozenset[str] | None = None
    without: frozenset[str] = frozenset()

    def open(self) -> TwoStage | Recommender:
        """Load what is named. A batch has no returning users, and kept histories could change last digits.

        Raises:
            RecllmError: no bundle of its kind, or the provider is not there.
        """
        recommender = load(self.bundle, provider=self.provider, threads=self.threads, index=self.index)
        if self.only is not None or self.without:
            recommender = recommender.restricted(only=self.only, without=self.without)
        if self.index != EXACT:
            found = recommender.recall(k=min(10, recommender.most))
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
    for name in ("only", "without"):
        if ids := getattr(stages, name):
            job = job.knowing(**{name: digest_of(sorted(ids))})
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
        blanks = any(" " in item for item in recommender.index.ids)
        way_out = ". Some ids have blanks: part them by |, or write a JSON list" if blanks else ""
        tell(f"Not in the catalogue, passed over: {', '.join(strange)}{way_out}")
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


def remove_from_bundle(bundle: Path, items: Path, columns: Sequence[str]) -> None:
    """Leave the items of a file out of all lists of a bundle."""
    removed = remove_items(bundle, items, columns=mapping(columns, "--item-column"), say=tell)
    say(f"{removed:,} items are in no list of {bundle} any more; recllm items add brings one back")


def listed_ids(bundle: Path, file: Path | None) -> frozenset[str] | None:
    """The ids in a file of items, under the names that the bundle's run was told of; None without a file."""
    return None if file is None else frozenset(item_ids(file, read_manifest(bundle, verify=False)))


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
    if unread_columns := load_prompt(prompt).unread(catalog):
        tell(UNREAD_COLUMNS.format(prompt, ", ".join(unread_columns)))
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

"""Distillation: what the fusion of a finished run says of histories, for a light scorer to learn beside the events.

A run with a language model is dear to serve for the pass that it takes over every history. A light scorer that has
learnt from its fused scores serves without (Hinton, Vinyals & Dean 2015).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

from recllm.arrayfiles import read_tensors
from recllm.collaborative import load_collaborative
from recllm.data import Query
from recllm.devices import process_state
from recllm.errors import RecllmError
from recllm.files import written
from recllm.fusion import FusedScorer, Fusion
from recllm.progress import Progress
from recllm.protocols import evaluation_protocol
from recllm.ranking import Scores, batches, mask_seen, top_k
from recllm.resuming import check_same_data
from recllm.revisions import check_same_models
from recllm.runs import Run, load_run
from recllm.scoring import known_scores, scorer_makers
from recllm.tasks import Task, prepare
from recllm.windows import Rows, Taught

Say = Callable[[str], None]

TARGETS = 100
"""Items of each history that the teacher's shares are kept of."""
LEFT_OUT = 0.5
"""The most of a history that is left out, where it is read more than once."""
SCALED_BY, CELLS = 2000, 20_000_000
"""The most validation rows that the teacher's scores are scaled by, and the most scores of a scorer that are held."""
FILE = "taught.safetensors"
"""In a run's folder: what the teacher said."""


@dataclass(frozen=True)
class TransferHistories:
    """The histories that a teacher is asked about: those of all training users, in a drawn order, until it is enough.

    First they are whole. What comes next after them, no scorer has seen, so that the teacher says what it would say of
    a user, and not what it knows by heart. Then they come again with events left out at random, which are not to be
    chosen either, for the same reason.

    Attributes:
        sequences: item rows of every user, oldest first.
        count: how many.
        seed: of the draws.
    """

    sequences: Sequence[Rows]
    count: int
    seed: int

    def __iter__(self) -> Iterator[tuple[Rows, Rows]]:
        """Item rows that are read, and those that are left out."""
        random = np.random.default_rng([self.seed, 1])
        users = [place for place, rows in enumerate(self.sequences) if len(rows)]
        given, again = 0, False
        while users and given < self.count:
            for place in random.permutation(users)[: self.count - given]:
                rows = self.sequences[place]
                kept = np.ones(len(rows), dtype=bool)
                if again:
                    kept = random.random(len(rows)) >= random.uniform(0.0, LEFT_OUT)
                    kept[-1] |= not kept.any()
                yield rows[kept], rows[~kept]
                given += 1
            again = True


def check_teacher(run: Run) -> Run | None:
    """The run that the light scorer learns from; None where there is none.

    Raises:
        RecllmError: no finished run of next items, or one that was trained on another split, whose test rows it knows.
    """
    if run.light.teacher is None:
        return None
    teacher = load_run(Path(run.light.teacher))
    if teacher.folder.resolve() == run.folder.resolve():
        raise RecllmError("light.teacher is this run itself. Give the student a name of its own (--set name=…).")
    if teacher.model.task != "next_item":
        raise RecllmError(f"light.teacher = '{run.light.teacher}' judges pairs. Name a run of next items.")
    if not (teacher.folder / "fusion.json").is_file():
        raise RecllmError(
            f"light.teacher = '{run.light.teacher}' is not trained to its end. Go on with it first: "
            f"recllm train {run.light.teacher} --resume"
        )
    drawn = run.data.split == "cold-items" or run.data.shots is not None
    seeds = [own.seed if own.data.seed is None else own.data.seed for own in (run, teacher)]
    told = {"data.seed": (seeds[0], seeds[1])} if drawn else {}
    told |= {
        f"data.{key}": (getattr(run.data, key), getattr(teacher.data, key))
        for key in run.data.model_dump()
        if key not in ("seed", "test_rows")
    }
    for key, (own, other) in told.items():
        if own != other:
            raise RecllmError(
                f"{key} is {own!r} here and {other!r} in light.teacher = '{run.light.teacher}': it may have learnt "
                "from the rows that this run is measured on. Give both the same [data]."
            )
    return teacher


def has_been_taught(run: Run) -> bool:
    """Whether the run's folder has what its teacher said, so that it goes on without."""
    return (run.folder / FILE).is_file()


def taught_windows(run: Run, task: Task, say: Say) -> list[Taught]:
    """What the run's teacher says of `light.taught` histories; asked once, and kept in the run's folder for good.

    Raises:
        RecllmError: as `check_teacher`, or the teacher was trained on other data.
    """
    if run.light.teacher is None:
        return []
    histories = list(TransferHistories(task.sequences(), run.light.taught, run.seed))
    path = run.folder / FILE
    with process_state().main_process_first():
        if not has_been_taught(run):
            teacher = check_teacher(run)
            assert teacher is not None
            check_same_data(teacher, task.fingerprints())
            check_same_models(teacher)
            items, shares = _ask(teacher, task, histories, say)
            with written(path) as temporary:
                save_file({"items": items, "shares": shares}, temporary)
    kept = read_tensors(path)
    return taught_rows(run, histories, kept["items"], kept["shares"])


def planned_windows(run: Run, task: Task) -> list[Taught]:
    """Windows as long as those that will be taught, with targets drawn at random: for a plan, which asks nobody."""
    check_teacher(run)
    if run.light.teacher is None:
        return []
    random, warm = np.random.default_rng(run.seed), np.flatnonzero(task.warm)
    histories = list(TransferHistories(task.sequences(), run.light.taught, run.seed))
    items = random.choice(warm, (len(histories), min(TARGETS, len(warm))))
    return taught_rows(run, histories, items, np.full(items.shape, 1.0 / items.shape[1], dtype=np.float32))


def taught_rows(run: Run, histories: Sequence[tuple[Rows, Rows]], items: Rows, shares: Scores) -> list[Taught]:
    """Windows of histories, int64[histories, targets] items and float32[histories, targets] shares beside each.

    A history after which the teacher would choose nothing is left out.
    """
    limit, weight = run.light.max_history, np.float32(run.light.taught_weight)
    rows = []
    for (read, left), own, share in zip(histories, items, shares, strict=True):
        if share[0] > 0.0:
            window = np.append(read[-limit:], own[0])
            rows.append(Taught(window, np.concatenate([read[:-limit], left]), own, share * weight))
    return rows


def _ask(teacher: Run, task: Task, histories: Sequence[tuple[Rows, Rows]], say: Say) -> tuple[Rows, Scores]:
    """The best items with events after every history, int64[histories, targets], and their shares, float32."""
    parts = load_collaborative(teacher, task)
    # What a network adds to a hundred places would bend the softmax over all items.
    fusion = replace(Fusion.load(teacher.folder / "fusion.json"), network=None)
    scale = _scale(teacher, fusion, say)
    made = scorer_makers(teacher, task, parts)
    fused = FusedScorer({name: made[name]() for name in fusion.names}, fusion, task.split.train.item_counts())
    count = min(TARGETS, int(task.warm.sum()))
    items, shares = np.zeros((len(histories), count), dtype=np.int64), np.zeros((len(histories), count), np.float32)
    say(f"Asking {teacher.folder} about {len(histories):,} histories, softmax of {scale:.2f} times its scores")
    progress = Progress(len(histories), "histories", say)
    ids = np.array(task.index.ids, dtype=object)
    for place, part in batches(histories):
        queries = [Query(tuple(ids[read])) for read, _ in part]
        chosen = [Query(tuple(ids[np.concatenate(own)])) for own in part]
        scores = fused.score(queries, task.index)
        scores = scores if task.repeats else mask_seen(scores, chosen, task.index)
        best, found = top_k(np.where(task.warm, scores, np.float32(np.nan)), count)
        there = best >= 0
        # A place without an item names the first one again, with no share.
        items[place] = np.where(there, best, np.maximum(best[:, :1], 0))
        found = np.where(there, scale * found, -np.inf)
        shares[place] = np.where(there, softmax(np.where(there[:, :1], found, 0.0), axis=1), 0.0)
        progress.add(len(part))
    return items, shares


def _scale(teacher: Run, fusion: Fusion, say: Say) -> float:
    """What the fused scores are multiplied by so that their softmax says validation's next items best.

    The validation is the teacher's own, whose scores lie in its folder: the student's may have fewer rows.
    """
    task = prepare(teacher)
    protocol = evaluation_protocol(teacher, task)
    examples = protocol.examples("valid")
    scores = known_scores(teacher, task, load_collaborative(teacher, task), say)["valid"]
    most = min(SCALED_BY, max(1, CELLS // len(task.index)))
    some = np.sort(np.random.default_rng(teacher.seed).permutation(len(examples))[:most])
    examples = [examples[place] for place in some]
    queries, targets = [own.query for own in examples], task.index.rows(own.item_id for own in examples)
    fused = protocol.fuse(fusion, {name: np.asarray(own[some]) for name, own in scores.items()}, examples)
    fused = fused if task.repeats else mask_seen(fused, queries, task.index)
    fused = np.where(task.warm, fused, np.float32(np.nan))
    rows = np.flatnonzero(~np.isnan(fused[np.arange(len(fused)), targets]))
    if not len(rows):
        return 1.0
    known = np.where(np.isnan(fused), -np.inf, fused)

    def loss(log_scale: float) -> float:
        total = 0.0
        for _, part in batches(rows.tolist()):
            odds = log_softmax(np.exp(log_scale) * known[part].astype(np.float64), axis=1)
            total -= float(odds[np.arange(len(part)), targets[part]].sum())
        return total

    # Bounded, for where validation is told without fail the best scale is infinite, and one target all that is taught.
    return float(np.exp(minimize_scalar(loss, bounds=(-3.0, 3.0), method="bounded", options={"xatol": 0.01}).x))

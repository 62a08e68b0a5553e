"""Scores of validation and test by every trained scorer of a run, kept in its folder, and the fusion fitted on them."""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from recllm.collaborative import Collaborative
from recllm.devices import fast_bf16, free_memory
from recllm.encoding import SequenceScorer
from recllm.errors import DamagedError, out_of_memory
from recllm.files import read_json, write_json, written
from recllm.fusion import Fusion
from recllm.histories import HistoryFormat
from recllm.judging import load_light_judge, load_relevance, rating_scorers
from recllm.lean import round_frozen
from recllm.lm import LanguageBody, scoring_device
from recllm.pairs import samples_negatives
from recllm.progress import Progress
from recllm.protocols import EvaluationProtocol, evaluation_protocol
from recllm.ranking import QUERY_BATCH, Scorer, Scores, score_as_new
from recllm.relevance import RelevanceScorer
from recllm.resuming import FUSED_WITH, fusion_stands
from recllm.revisions import check_same_models
from recllm.runs import Run
from recllm.sequence import NextItemModel
from recllm.splits import Example
from recllm.tasks import Task
from recllm.trained import Say, lenders, load_language, load_light, sequence_scorer, stage_done
from recllm.vectors import ItemFeatures
from recllm.weighing import FusionSettings

BLOCK_SCORES = 20_000_000
"""Scores that are held in memory at once."""
NEW_ITEM_SCORES = 200_000_000
"""Scores on which the weights of new items are fitted, in memory at once."""


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
    bf16 = isinstance(model.body, LanguageBody) and fast_bf16()
    if bf16:  # before it goes to a GPU, which may have no room for all of it
        round_frozen(model.body.requires_grad_(False), torch.bfloat16)
    return sequence_scorer(model.to(scoring_device()), history, task, lenders(run, parts), bf16=bf16)


def known_scores(run: Run, task: Task, parts: Collaborative, say: Say) -> dict[str, dict[str, Scores]]:
    """Scores of validation and test by every scorer, computed once and kept in the run's folder.

    Validation and test go in together: a user's validation history is the beginning of the test history, and a causal
    model reads both in one pass.

    Raises:
        RecllmError: scores are missing, and a base model is not the one that the run was trained over.
    """
    protocol = evaluation_protocol(run, task)
    valid, test = protocol.examples("valid"), protocol.examples("test")
    result: dict[str, dict[str, Scores]] = {"valid": {}, "test": {}}
    sampled = run.model.task == "relevance" and samples_negatives(task)
    _without_other_rows(run.folder / "scores", [*valid, *test], sampled=sampled)
    for name, make in scorer_makers(run, task, parts).items():
        path = run.folder / "scores" / f"{name}.npy"
        shape = protocol.shape(len(valid) + len(test))
        if _shape_of(path) != shape:  # of other rows: not to be paired with these
            check_same_models(run)
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
    """Score block by block into a .npy file: all scores of a large set do not fit into memory.

    Where memory is out, of a device that others use as well, blocks from there on have half as many rows.
    """
    examples = [*valid, *test]
    # The same stretch of both parts in one block: it is mostly the same users.
    places = np.concatenate([np.arange(len(part)) / max(len(part), 1) for part in (valid, test)])
    order = np.argsort(places, kind="stable")
    shape = protocol.shape(len(examples))
    scores = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    most, start = max(QUERY_BATCH, BLOCK_SCORES // max(math.prod(shape[1:]), 1)), 0
    while start < len(order):
        rows = order[start : start + most].tolist()
        try:
            scores[rows] = protocol.score(scorer, [examples[row] for row in rows])
        except Exception as error:  # the device's libraries raise many kinds
            if len(rows) == 1 or not out_of_memory(error):
                raise
            most = len(rows) // 2
        else:
            start += len(rows)
            continue
        free_memory()  # outside of the error's block, whose traceback holds what the pass had
    scores.flush()


def _without_other_rows(folder: Path, rows: Sequence[Example], *, sampled: bool) -> None:
    """Take kept scores away that are of other rows, so that they are made again, and note of which rows they are.

    Scores from before there was a note are kept, but where some rows are `sampled` negatives: those of validation were
    others then.
    """
    digest = hashlib.sha256()
    for row in rows:
        told = (row.query.user_id, len(row.query.history), row.item_id, row.label)
        digest.update(repr(told).encode("utf-8", "surrogatepass"))
    now, path = {"rows": digest.hexdigest()}, folder / "rows.json"
    try:
        same = read_json(path) == now if path.is_file() else not sampled
    except DamagedError:
        same = False
    if not same:
        for old in folder.glob("*.npy"):
            old.unlink()
    if not same or not path.is_file():
        write_json(path, now)


def _shape_of(path: Path) -> tuple[int, ...] | None:
    """The shape of kept scores; None where there are none, or damaged ones."""
    try:
        return tuple(np.load(path, mmap_mode="r").shape)
    except (OSError, ValueError, EOFError):
        return None


def fit_fusion(run: Run, task: Task, parts: Collaborative, say: Say) -> None:
    """Fit the fusion on validation: with every scorer, and again without the language model for the table."""
    if fusion_stands(run):
        return
    settings, wanted = run.folder / FUSED_WITH, run.fusion.model_dump(mode="json")
    scores = known_scores(run, task, parts, say)["valid"]
    _leave_former(run.folder, settings, wanted, say)
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

    # A kill in between shall not leave what says of the fusion of before, or of half of this one, that it is as wanted.
    settings.unlink(missing_ok=True)
    if language in scores:
        others = {name: value for name, value in scores.items() if name != language}
        without = fitted(others)
        without.save(run.folder / f"fusion-without-{language}.json")
    fusion = fitted(scores)
    fusion.save(run.folder / "fusion.json")
    write_json(settings, wanted)
    metric = "NDCG@10" if run.model.task == "next_item" else "AUC"
    say(f"The fusion is {_chosen(fusion, metric)}")
    if language in scores:
        say(f"Without '{language}' it is {_chosen(without, metric)}")
        mine, others_own = (own.candidates.get(own.chosen) for own in (fusion, without))
        if mine is not None and others_own is not None and mine <= others_own:
            say(
                f"So '{language}' adds nothing there. Train it for more steps, or do without it "
                '(model.name = "none"), which makes a smaller and faster bundle'
            )


def _leave_former(folder: Path, settings: Path, wanted: Mapping[str, Any], say: Say) -> None:
    """Take away what tells of another fusion than the one that comes, and say so."""
    if settings.is_file() and (folder / "fusion.json").is_file():
        with suppress(DamagedError):
            former = FusionSettings().model_dump(mode="json") | read_json(settings)
            changed = [f"fusion.{name} ({former[name]} before)" for name in wanted if former.get(name) != wanted[name]]
            if changed:
                say(f"The fusion is fitted anew, with another {', '.join(changed)}")
    gone = sorted([*folder.glob("evaluation*"), *folder.glob("report.html")])
    for old in gone:
        old.unlink()
    if gone:
        say(f"Removed, for it tells of the fusion before: {', '.join(path.name for path in gone)}")
    bundles = sorted(path.name for path in folder.glob("bundle-*") if path.is_dir())
    if bundles:
        say(f"The fusion before is still that of {', '.join(bundles)}: export again")


def _chosen(fusion: Fusion, metric: str) -> str:
    """The kind of fusion, and what it has on validation."""
    found = fusion.candidates.get(fusion.chosen)
    return f"'{fusion.chosen}'" + ("" if found is None else f", the best by {metric} on validation: {found:.4f}")


def _some_rows(count: int, cells: int, run: Run) -> NDArray[np.int64]:
    """The validation rows on which weights of new items are fitted, in order; `cells` scores belong to each."""
    most = min(run.fusion.queries, run.fusion.new_queries, max(1, NEW_ITEM_SCORES // cells))
    return np.sort(np.random.default_rng(run.seed).permutation(count)[:most])


def _scores_as_new(run: Run, task: Task, parts: Collaborative, examples: list[Example], say: Say) -> dict[str, Scores]:
    """Scores of some validation rows as if no item had events, by scorer; empty where they are not asked for."""
    if run.model.task != "next_item" or run.fusion.new_share == 0.0:
        return {}
    result: dict[str, Scores] = {}
    queries = [example.query for example in examples]
    for name, make in scorer_makers(run, task, parts).items():
        path = run.folder / "scores" / f"{name}-as-new-{len(examples)}.npy"
        if _shape_of(path) is None:
            say(f"Scoring validation with '{name}' as if all items were new")
            scores = score_as_new(make(), queries, task.index)
            with written(path) as part, part.open("wb") as file:
                np.save(file, scores)
        result[name] = np.load(path)
    return result

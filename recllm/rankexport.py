"""Export of a run that judges pairs: its language model as a ranker bundle, gated like every other."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recllm.bundle import write_catalog
from recllm.cards import write_bundle_card
from recllm.data import Query
from recllm.errors import RecllmError
from recllm.files import own_folder, write_json
from recllm.gate import Exported, ExportRecipe, Parity, data_facts, gated
from recllm.graphfiles import share_weights
from recllm.integer import quantise_products, write_probe
from recllm.judging import load_relevance
from recllm.lm import model_folder
from recllm.onnxreader import PREFIX, SUFFIX, WEIGHTS, OnnxReader, ReadPrefix
from recllm.pairs import labelled_rows
from recllm.parity import auc_loss, fidelity
from recllm.pointwise import Ids, PointwiseScorer
from recllm.quantise import quantise, write_quantisation
from recllm.ranker import KIND, PROMPT, SETTINGS, RankerSettings, load_ranker
from recllm.rankgraphs import write_rank_graphs
from recllm.ranking import ItemIndex, Scores
from recllm.recipes import find_recipe
from recllm.relevance import RelevanceModel, RelevanceScorer
from recllm.runs import Run
from recllm.sessions import INTEGERS, check_integer_products
from recllm.tasks import Task
from recllm.turning import turned
from recllm.weightonly import Feeds

Say = Callable[[str], None]
SAMPLES, SAMPLED_CANDIDATES = 2, 16
"""Training histories and candidates on which the quantisation is judged."""
ROUNDED_SAMPLES = 6
"""Training histories by which weights are rounded for integer products."""
TURNED = "turned"
"""The folder of graphs whose model is turned."""
GATE_CANDIDATES = 50
"""Candidates on which each history of the gate is compared."""


def export_ranker(run: Run, task: Task, recipes: Mapping[str, ExportRecipe], say: Say) -> list[Exported]:
    """Write the run's language model as one ranker bundle per recipe that keeps its tolerance.

    Only the language model: the other scorers of a run that judges pairs hold its users' ratings, and stay with it.

    Raises:
        RecllmError: the run has no language model, or one whose candidates cannot share a prefix.
    """
    if run.model.name == "none":
        raise RecllmError(
            f"{run.folder} judges pairs without a language model, and a ranker bundle is one. Name it in model.name."
        )
    scorer = load_relevance(run, task, bf16=False, device="cpu")  # what is exported is compared in float32
    results = []
    with own_folder(run.folder) as graphs:
        if rounding := [name for name, recipe in recipes.items() if recipe.causal.activations == "int8"]:
            _check_processor(rounding, graphs)
        for folder in dict.fromkeys(_graphs(recipe) for recipe in recipes.values()):
            say(f"Writing the ONNX graphs in fp32, opset {folder.name}{', turned' if len(folder.parts) > 1 else ''}")
            (graphs / folder).mkdir(parents=True, exist_ok=True)
            write_rank_graphs(_as_written(scorer.model, folder, say), graphs / folder, int(folder.name), say)
        for name, recipe in recipes.items():
            folder = graphs / _graphs(recipe)
            samples = _samples(run, task, scorer, folder, recipe) if recipe.causal.max_damage is not None else None
            results.append(_export(run, task, scorer, name, recipe, samples, folder, say))
    return results


def _graphs(recipe: ExportRecipe) -> Path:
    """Where the float32 graphs of a recipe are written, by their opset and whether the model is turned."""
    return Path(TURNED if recipe.causal.activations == "int8" else "", str(recipe.opset))


def _check_processor(recipes: Sequence[str], folder: Path) -> None:
    """Fail before anything is written where integer products overflow."""
    write_probe(folder / INTEGERS)
    try:
        check_integer_products(folder, "cpu")
    except RecllmError:
        raise RecllmError(
            f"Recipe {', '.join(recipes)} makes integer products, and this processor's overflow (it has no VNNI "
            "instructions), so that they cannot be measured. Export with int8, fp16 or fp32, or on another machine."
        ) from None


def _as_written(model: RelevanceModel, folder: Path, say: Say) -> RelevanceModel:
    """The model of the graphs in such a folder."""
    if folder.parts[0] != TURNED:
        return model
    made = turned(model)
    if made is None:
        say(
            "This model is not built as those that are known to turn (Llama and the like, without item tokens or "
            "adapters around their layers): its activations are rounded as they are"
        )
    return made or model


@dataclass(frozen=True, eq=False)
class _Samples:
    """Training histories and candidates, what the graphs are given for them, by graph, and what they answer."""

    scorer: RelevanceScorer
    queries: list[Query]
    asked: ItemIndex
    feeds: dict[str, list[Feeds]]
    answers: Scores

    def lost(self, graphs: Path) -> float:
        """The share of the spread of a history's answers, squared, that other graphs lose."""
        reader = OnnxReader.open(graphs, self.scorer.model.max_tokens, soft_from=self.scorer.model.soft_from)
        found = PointwiseScorer(reader, self.scorer.prompt, self.scorer.catalog, False).score(self.queries, self.asked)
        centred = [own - own.mean(1, keepdims=True) for own in (self.answers, found)]
        spread = float((centred[0] ** 2).sum())
        return float(((centred[1] - centred[0]) ** 2).sum()) / spread if spread else 0.0


@dataclass(frozen=True, eq=False)
class _Recorder(OnnxReader):
    """A reader that keeps what it gives to its graphs, by graph."""

    feeds: dict[str, list[Feeds]] = field(default_factory=lambda: {"prefix": [], "suffix": []})

    def read(self, ids: Ids, lengths: Ids) -> ReadPrefix:
        """As `OnnxReader.read`."""
        self.feeds["prefix"].append({"ids": ids})
        return super().read(ids, lengths)

    def answers(self, prefixes: ReadPrefix, ids: Ids, lengths: Ids) -> NDArray[np.float32]:
        """As `OnnxReader.answers`."""
        keys, values = prefixes.arrays
        given: Feeds = {"ids": ids, "ends": lengths - 1, "lengths": prefixes.lengths, "keys": keys, "values": values}
        self.feeds["suffix"].append(given)
        return super().answers(prefixes, ids, lengths)


def _samples(run: Run, task: Task, scorer: RelevanceScorer, graphs: Path, recipe: ExportRecipe) -> _Samples:
    """A few training histories and candidates, drawn by the run's seed, read by the float32 graphs."""
    count = ROUNDED_SAMPLES if recipe.causal.activations == "int8" else SAMPLES
    random = np.random.default_rng(run.seed)
    known = [query for query in task.split.train.histories().values() if scorer.prompts.knows(query)]
    if not known:
        raise RecllmError(
            f"causal.max_damage is measured on training histories, and {run.name} has none. Take an export recipe "
            "without it, such as int8, fp16 or fp32."
        )
    queries = [known[place] for place in random.permutation(len(known))[:count]]
    items = list(scorer.prompts.candidates)
    asked = ItemIndex([items[place] for place in random.permutation(len(items))[:SAMPLED_CANDIDATES]])
    opened = OnnxReader.open(graphs, scorer.model.max_tokens, soft_from=scorer.model.soft_from)
    reader = _Recorder(opened.prefix, opened.suffix, opened.max_tokens, soft_from=opened.soft_from)
    reading = PointwiseScorer(reader, scorer.prompt, scorer.catalog, False)
    answers = [reading.score([query], asked) for query in queries]
    return _Samples(scorer, queries, asked, reader.feeds, np.concatenate(answers))


def _export(
    run: Run,
    task: Task,
    scorer: RelevanceScorer,
    name: str,
    recipe: ExportRecipe,
    samples: _Samples | None,
    graphs: Path,
    say: Say,
) -> Exported:
    settings = RankerSettings(
        scorer.model.max_tokens,
        scorer.prompt.prompt.max_history,
        task.liked_from(run.data.like_at),
        scorer.calibrated,
        scorer.model.soft_from,
        scorer.prompt.prompt.history_stride,
    )
    facts = {
        "kind": KIND,
        "name": run.name,
        "recipe": Path(name).stem,
        "model": run.model.name,
        "adapter": run.adapter.recipe,
        "data": data_facts(task),
        "duplicates": run.data.duplicates,
        "columns": run.data.columns,
    }

    def fill(part: Path) -> None:
        said: dict[str, dict[str, Any] | None] = {}
        paths = sorted(graphs.glob("*.onnx"))
        if recipe.causal.activations == "int8" and samples is not None:
            say(f"Bundle '{name}': {', '.join(path.name for path in paths)}")
            said["ranker"] = told = quantise_products(paths, part, recipe.causal, samples.feeds, samples.lost)
            say(f"{len(told['higher'])} of {len(told['layers'])} layers of both graphs keep float activations")
        else:
            for path in paths:
                say(f"Bundle '{name}': {path.name}")
                known = samples.feeds.get(path.stem, []) if samples is not None else []
                said[path.stem] = quantise(path, part / path.name, recipe.precision, recipe.causal, known)
        # The model is in both graphs; the first one lacks what stands behind the last keys and values only.
        share_weights([part / SUFFIX, part / PREFIX], part / WEIGHTS)
        write_quantisation(part, said)
        shutil.copy(find_recipe("prompts", run.prompt_file("relevance")), part / PROMPT)
        shutil.copy(_tokenizer(run), part / "tokenizer.json")
        write_catalog(part, task.dataset.catalog)
        write_json(part / SETTINGS, asdict(settings))
        write_bundle_card(run, part, Path(name).stem, "ranks candidates")

    def measured(part: Path) -> Parity:
        say(f"Bundle '{name}': comparing with torch")
        return {"ranker": _parity(part, run, task, scorer)}

    return gated(run.folder / f"bundle-{Path(name).stem}", facts, name, recipe, fill, measured)


def _tokenizer(run: Run) -> Path:
    return model_folder(run.model.name) / "tokenizer.json"


def _parity(folder: Path, run: Run, task: Task, scorer: RelevanceScorer) -> dict[str, float]:
    """Fidelity of the answers to some validation histories about some items, and AUC of both on as many labels."""
    random = np.random.default_rng(run.seed)
    queries = list(dict.fromkeys(row.query for row in task.split.valid if scorer.prompts.knows(row.query)))
    chosen = [queries[place] for place in np.sort(random.permutation(len(queries))[: run.export.gate_queries])]
    items = [item for item in task.index.ids if item in scorer.prompts.candidates]
    asked = ItemIndex([items[place] for place in random.permutation(len(items))[:GATE_CANDIDATES]])
    ranker = load_ranker(folder, keep_bytes=0)
    return fidelity(scorer.score(chosen, asked), ranker.score(chosen, asked)) | _aucs(run, task, scorer, ranker)


def _aucs(run: Run, task: Task, scorer: RelevanceScorer, ranker: PointwiseScorer) -> dict[str, float]:
    """AUC on labelled validation rows that both judge; nothing where these have one label only."""
    rows = labelled_rows(task, "valid", run.seed)
    drawn = np.random.default_rng(run.seed).permutation(len(rows))[: run.export.gate_queries]
    pairs = [rows[place].query for place in drawn], [rows[place].item_id for place in drawn]
    labels = np.array([rows[place].label for place in drawn])
    expected, found = scorer.score_pairs(*pairs), ranker.score_pairs(*pairs)
    known = ~(np.isnan(expected) | np.isnan(found))
    return auc_loss(labels[known], expected[known], found[known])

"""Export a trained run: merge the adapter, write ONNX graphs, quantise, compare with torch, seal the bundle."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file
from torch import Tensor, nn

from recllm.bundle import MANIFEST, write_catalog
from recllm.cards import write_bundle_card
from recllm.collaborative import Collaborative, encoder_name, item_prompt, load_collaborative, name_model
from recllm.data import Query
from recllm.encoding import SequenceScorer
from recllm.errors import RecllmError
from recllm.files import alone, own_folder, read_json, write_json
from recllm.fusion import Fusion
from recllm.gate import Exported, ExportRecipe, Parity, data_facts, gated, load_recipe
from recllm.graphs import catalogue_graph
from recllm.heads import borrowed_heads, told_later
from recllm.histories import HistoryFormat
from recllm.likelihood import NAME_GRAPH, NAME_PROMPT, NAME_TOKENIZER
from recllm.likeness import LIKENESS, LikenessRidge
from recllm.lm import BaseModel, load_base, mean_pool, model_folder, positions_of
from recllm.names import NameModel
from recllm.parity import measure
from recllm.prompts import CompiledPrompt
from recllm.quantise import quantise, write_quantisation
from recllm.rankexport import export_ranker
from recllm.recipes import find_recipe
from recllm.removing import REMOVED
from recllm.runs import Run
from recllm.runtime import VECTORS
from recllm.sequence import NextItemModel
from recllm.tasks import Task
from recllm.tracing import Example, write_graph
from recllm.trained import lenders, load_language, load_light, sequence_scorer
from recllm.weightonly import Feeds

Say = Callable[[str], None]
SAMPLES = 4
"""Training histories, or item texts, on which a graph's quantisation is judged."""


class SequenceGraph(nn.Module):
    """The part of a next-item model that runs per history."""

    def __init__(self, model: NextItemModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, ends: Tensor, table: Tensor) -> Tensor:
        """Query vectors float32[batch, ends, head]."""
        return self.model.encode(ids, ends, table)


class ItemGraph(nn.Module):
    """The part of a next-item model that runs once per new item."""

    def __init__(self, model: NextItemModel) -> None:
        super().__init__()
        self.tokens, self.heads = model.tokens, model.heads

    def forward(self, text: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
        """Item tokens float32[items, width] and item vectors float32[items, head]."""
        return self.tokens(text, factors), self.heads(text, factors)


class EncoderGraph(nn.Module):
    """Text of items to vectors."""

    def __init__(self, base: BaseModel) -> None:
        super().__init__()
        self.model, self.causal = base.model, base.causal

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Mean-pooled hidden states float32[texts, width]."""
        given = {}
        if self.causal:  # a row of positions for every text, for the reason that `given_positions` states
            given = {"position_ids": torch.arange(ids.shape[1], device=ids.device).expand(ids.shape[0], -1)}
        hidden = self.model(input_ids=ids, attention_mask=mask, **given).last_hidden_state
        return mean_pool(hidden.float(), mask)


def export_run(
    run: Run, task: Task, recipes: Sequence[str] | None = None, say: Say = print, *, overwrite: bool = False
) -> list[Exported]:
    """Write one bundle per recipe that keeps its tolerance, as `bundle-NAME` in the run's folder.

    A recipe that fails its gate is reported and writes nothing (an older bundle of its name stays); the others go on. A
    run that judges pairs gives its language model as a bundle that ranks candidates.

    Args:
        run: a trained run.
        task: its data.
        recipes: names of recipes; those of the run if None.
        say: gets lines of progress.
        overwrite: also replace bundles that items were added to, which a new export has not.

    Raises:
        RecllmError: the run is not trained or is a control, an unknown recipe, or a bundle that items were added to.
    """
    loaded = {name: load_recipe(name) for name in recipes or run.export.recipes}
    stems = [Path(name).stem for name in loaded]
    if twice := sorted({stem for stem in stems if stems.count(stem) > 1}):
        raise RecllmError(f"Two recipes would be written as bundle-{twice[0]}. Give one of the files another name.")
    if not (run.folder / "fusion.json").is_file():
        raise RecllmError(f"{run.folder} has no fitted fusion. Train the run first: recllm train {run.folder}/run.toml")
    if run.control.lacking:
        raise RecllmError(
            f"{run.folder} is a control ({run.control.lacking}): it shows what that is worth and is not for shipping. "
            "Train a run without it."
        )
    # Items are added to none of the bundles from the check to the end: they would be lost.
    with alone(run.folder / MANIFEST, say):
        if not overwrite:
            for stem in stems:
                _check_not_grown(run.folder / f"bundle-{stem}")
        return _all(run, task, loaded, say)


def _all(run: Run, task: Task, loaded: dict[str, ExportRecipe], say: Say) -> list[Exported]:
    """A bundle per recipe."""
    if run.model.task == "relevance":
        return export_ranker(run, task, loaded, say)
    if rounding := [name for name, recipe in loaded.items() if recipe.causal.activations != "float"]:
        raise RecllmError(
            f"Recipe {', '.join(rounding)} is for runs that judge pairs: what reads a history for the next item keeps "
            "float activations. Take int8 or int4, or leave causal.activations out of the recipe."
        )
    parts = load_collaborative(run, task)
    models = {"light": load_light(run, task, parts.features), "lm": load_language(run, task, parts.features)}
    sequences = {name: found for name, found in models.items() if found is not None}
    base = load_base(model_folder(encoder_name(run)))
    names = name_model(run, say) if "likelihood" in Fusion.load(run.folder / "fusion.json").names else None
    results = []
    with own_folder(run.folder) as graphs:
        for opset in sorted({recipe.opset for recipe in loaded.values()}):
            say(f"Writing the ONNX graphs in fp32, opset {opset}")
            _write_graphs(graphs / str(opset), sequences, base, names, opset, say)
        reference = {name: sequence_scorer(*found, task, lenders(run, parts)) for name, found in sequences.items()}
        measured = any(recipe.causal.max_damage is not None for recipe in loaded.values())
        samples = _samples(run, task, sequences, base, reference) if measured else {}
        if measured and names is not None:
            samples["likelihood"] = _name_samples(run, task, names[1])
        for name, recipe in loaded.items():
            graph = graphs / str(recipe.opset)
            results.append(
                _export(run, task, parts, sequences, base, names, reference, samples, name, recipe, graph, say)
            )
    return results


def _check_not_grown(folder: Path) -> None:
    """Check that no added item would be lost, and none that was removed come back.

    Raises:
        RecllmError: items were added to the bundle that is there, or removed from it, or nobody can tell.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return
    try:  # whatever the format: also a bundle of another recllm may have grown
        manifest = read_json(path)
        added, removed = manifest.get("items_added", 0), len(manifest.get(REMOVED, ()))
    except (ValueError, AttributeError):
        raise RecllmError(
            f"{path} is damaged, so that nobody can tell whether items were added to the bundle after it was made. "
            "Rename it, or export with --overwrite."
        ) from None
    if added:
        raise RecllmError(
            f"{added:,} items were added to '{folder}' after it was made, and a new export would not have them. Rename "
            "it, or export with --overwrite and add them again: recllm items add"
        )
    if removed:
        raise RecllmError(
            f"{removed:,} items were removed from the lists of '{folder}', and a new export would recommend them "
            "again. Rename it, or export with --overwrite and remove them again: recllm items remove"
        )


def _export(
    run: Run,
    task: Task,
    parts: Collaborative,
    sequences: dict[str, tuple[NextItemModel, HistoryFormat]],
    base: BaseModel,
    names: tuple[NameModel, CompiledPrompt] | None,
    reference: dict[str, SequenceScorer],
    samples: dict[str, list[Feeds]],
    name: str,
    recipe: ExportRecipe,
    graphs: Path,
    say: Say,
) -> Exported:
    def fill(part: Path) -> None:
        said = {}
        for path in sorted(graphs.glob("*.onnx")):
            say(f"Bundle '{name}': {path.name}")
            is_causal = path.stem in (*sequences, "likelihood") or (path.stem == "encoder" and base.causal)
            causal = recipe.causal if is_causal else None
            known = samples.get(path.stem, [])
            if path.name == NAME_GRAPH and recipe.causal.bits == 4:
                # It is read once per new item: room is all that 4 bits would save, and what they cost is not known.
                causal = recipe.causal.model_copy(update={"bits": 8, "algorithm": "rtn", "max_damage": None})
            said[path.stem] = quantise(path, part / path.name, recipe.precision, causal, known)
        write_quantisation(part, said)
        _write_content(part, run, task, parts, sequences, base)
        if names is not None:
            shutil.copy(find_recipe("prompts", run.prompt_file("likelihood")), part / NAME_PROMPT)
            shutil.copy(model_folder(str(run.model.likelihood)) / "tokenizer.json", part / NAME_TOKENIZER)
        write_bundle_card(run, part, Path(name).stem, "recommends")

    def measured(part: Path) -> Parity:
        say(f"Bundle '{name}': comparing with torch")
        return measure(part, run, task, parts, sequences, base, names, reference)

    folder, facts = run.folder / f"bundle-{Path(name).stem}", _facts(run, task, name, sequences)
    facts |= {"item_positions": positions_of(base), "name_positions": None if names is None else names[1].positions}
    return gated(folder, facts, name, recipe, fill, measured)


def _samples(
    run: Run,
    task: Task,
    sequences: dict[str, tuple[NextItemModel, HistoryFormat]],
    base: BaseModel,
    reference: dict[str, SequenceScorer],
) -> dict[str, list[Feeds]]:
    """Inputs of the causal graphs, of a few training histories and item texts drawn by the run's seed, by graph."""
    random = np.random.default_rng(run.seed)
    known = list(task.split.train.histories().values())
    queries = [known[place] for place in random.permutation(len(known))[:SAMPLES]]
    result: dict[str, list[Feeds]] = {}
    for name, (model, history) in sequences.items():
        scorer, table = reference[name], model.table().detach().float().cpu().numpy()
        result[name] = []

        def record(
            ids: NDArray[np.int64], ends: NDArray[np.int64], name: str = name, table: NDArray[np.float32] = table
        ) -> NDArray[np.float32]:
            result[name].append({"ids": ids, "ends": ends, "table": table})
            return np.zeros((*ends.shape, reference[name].items.shape[1] - 1), dtype=np.float32)

        SequenceScorer(record, history, scorer.index, scorer.items[:, :-1], scorer.items[:, -1]).query_vectors(queries)
    if base.causal:
        prompt = item_prompt(run, base)
        texts = [ids for ids in prompt.encode_items(task.dataset.catalog) if ids is not None]
        drawn = [np.array([texts[place]]) for place in random.permutation(len(texts))[:SAMPLES]]
        result["encoder"] = [{"ids": ids, "mask": np.ones_like(ids)} for ids in drawn]
    return result


def _name_samples(run: Run, task: Task, prompt: CompiledPrompt) -> list[Feeds]:
    """Names of a few items drawn by the run's seed, as the likelihood graph takes them."""
    texts = [ids for ids in prompt.encode_items(task.dataset.catalog) if ids is not None]
    drawn = [texts[place] for place in np.random.default_rng(run.seed).permutation(len(texts))[:SAMPLES]]
    return [{"ids": np.array([ids]), "lengths": np.array([len(ids)])} for ids in drawn]


def _facts(run: Run, task: Task, name: str, sequences: dict[str, Any]) -> dict[str, Any]:
    names = Fusion.load(run.folder / "fusion.json").names
    return {
        "name": run.name,
        "recipe": Path(name).stem,
        "scorers": {scorer: "sequence" if scorer in sequences else scorer for scorer in names},
        "model": run.model.name,
        "item_encoder": encoder_name(run),
        "likelihood": run.model.likelihood,
        "data": data_facts(task),
        "repeats": task.repeats,
        "duplicates": run.data.duplicates,
        "each_once": None if task.repeats or run.data.split == "given" else run.data.duplicates,
        "columns": run.data.columns,
        "item_columns": run.data.item_columns,
    }


def _write_content(
    folder: Path,
    run: Run,
    task: Task,
    parts: Collaborative,
    sequences: dict[str, tuple[NextItemModel, HistoryFormat]],
    base: BaseModel,
) -> None:
    shutil.copytree(run.folder / "cf", folder / "cf", ignore=shutil.ignore_patterns(f"{LIKENESS}.*"))
    parts.popularity.as_of_now().save(folder / "cf")
    shutil.copy(run.folder / "fusion.json", folder)
    shutil.copy(find_recipe("prompts", run.prompt_file("item")), folder / "item.toml")
    base.tokenizer.save(str(folder / "tokenizer.json"))
    write_catalog(folder, task.dataset.catalog)
    arrays: dict[str, NDArray[Any]] = {
        "item_counts": task.item_counts,
        "text.mean": parts.text_standard.mean,
        "text.scale": np.array(parts.text_standard.scale, dtype=np.float32),
    }
    lender = lenders(run, parts)
    for name, (model, history) in sequences.items():
        write_json(folder / f"{name}.json", history.to_dict())
        heads = borrowed_heads(model, lender)
        arrays[f"{name}.heads"], arrays[f"{name}.bias"] = heads.items, heads.bias
        if isinstance(lender, LikenessRidge):
            arrays |= told_later(model, lender, heads.shrinkage).arrays(name)
        with torch.inference_mode():
            arrays[f"{name}.table"] = model.table().float().cpu().numpy()
            arrays[f"{name}.cold_bias"] = model.cold_bias.float().cpu().numpy()
    save_file({key: np.ascontiguousarray(value) for key, value in arrays.items()}, folder / VECTORS)
    fusion = Fusion.load(run.folder / "fusion.json")
    scorers: dict[str, Any] = parts.scorers()
    widths = {
        scorer: arrays[f"{scorer}.heads"].shape[1] + 1
        if scorer in sequences
        else scorers[scorer].query_vectors([Query(())]).shape[1]
        for scorer in fusion.names
    }
    catalogue_graph(fusion, widths, len(task.index), folder / "catalogue.onnx")


def _write_graphs(
    folder: Path,
    sequences: dict[str, tuple[NextItemModel, HistoryFormat]],
    base: BaseModel,
    names: tuple[NameModel, CompiledPrompt] | None,
    opset: int,
    say: Say,
) -> None:
    def write(graph: nn.Module, example: Example, file: str, outputs: tuple[str, ...]) -> None:
        say(f"Tracing {file}")
        write_graph(graph, example, folder / file, outputs, opset)

    folder.mkdir(parents=True, exist_ok=True)
    for name, (model, _) in sequences.items():
        width, text = model.tokens.text.out_features, model.tokens.text.in_features
        example = {
            "ids": (torch.zeros(2, 7, dtype=torch.long), ("batch", "length")),
            "ends": (torch.tensor([[3, 5, 6], [2, 1, 0]]), ("batch", "ends")),
            "table": (torch.randn(11, width), ("rows",)),
        }
        write(SequenceGraph(model), example, f"{name}.onnx", ("vectors",))
        items = {
            "text": (torch.randn(3, text), ("items",)),
            "factors": (torch.randn(3, model.tokens.factors.in_features), ("items",)),
        }
        write(ItemGraph(model), items, f"{name}-items.onnx", ("tokens", "heads"))
    texts = {name: (torch.ones(2, 7, dtype=torch.long), ("batch", "length")) for name in ("ids", "mask")}
    write(EncoderGraph(base), texts, "encoder.onnx", ("vectors",))
    if names is not None:
        ids = torch.ones(2, names[0].first + 6, dtype=torch.long)
        lengths = torch.tensor([ids.shape[1], names[0].first + 2])
        told = {"ids": (ids, ("batch", "length")), "lengths": (lengths, ("batch",))}
        write(names[0], told, NAME_GRAPH, ("likelihoods",))

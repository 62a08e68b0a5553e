"""Model cards and adapters in PEFT's own format: what was trained on what, how good it is, and how to load it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from shlex import quote
from typing import Any

import peft
from torch import Tensor, nn

from recllm.adapters import LOFTQ
from recllm.assets import ASSETS
from recllm.fetch import on_hub, pinned
from recllm.files import read_json, whole_folder, written
from recllm.revisions import known_revision
from recllm.runs import ENVIRONMENT, Run
from recllm.sessions import INTEGERS

ADAPTER, CARD = "adapter", "README.md"
"""In the folder of the language model's stage: the adapter as PEFT saves it; in that and in a bundle: the card."""
NOT_YET = "Not evaluated yet"
OWN_START = ("pissa", "olora", LOFTQ)
"""Starts of LoRA that change the base model's weights or make up for its 4 bits: not for PEFT to put on the base."""


def save_adapter(run: Run, model: nn.Module, values: Mapping[str, Tensor], folder: Path) -> None:
    """Write the adapter of a trained model as PEFT does, for `PeftModel.from_pretrained` on the base's `AutoModel`.

    Bottlenecks are not PEFT's, and a start that changes the base model cannot be loaded that way: nothing is written.

    Args:
        run: names the base model.
        model: what was trained.
        values: what of it trains, whole, by its names: the model itself may have parts only.
        folder: takes the adapter's folder.
    """
    named = ((name, module) for name, module in model.named_modules() if isinstance(module, peft.PeftModel))
    place, found = next(named, ("", None))
    start = str(getattr(found and found.active_peft_config, "init_lora_weights", "")).lower()
    if found is None or start.startswith(OWN_START):
        return
    repository, found.active_peft_config.revision = pinned(run.model.name)
    found.active_peft_config.base_model_name_or_path = _shown(repository)
    with whole_folder(folder / ADAPTER) as part:
        # False: it would ask the hub whether the vocabulary was enlarged.
        own = {name.removeprefix(f"{place}."): value for name, value in values.items()}
        # Some tuners keep what does not train, VeRA its projections, which every layer shares.
        own = dict(found.named_buffers(remove_duplicate=False)) | own
        with _all_ranks(found.active_peft_config):
            found.save_pretrained(str(part), save_embedding_layers=False, state_dict=own)


@contextmanager
def _all_ranks(config: Any) -> Iterator[None]:  # noqa: ANN401  of PEFT's configurations one has it
    """Without AdaLoRA's pattern: it says what the last step left, and PEFT would cut the best step's weights by it."""
    if config.peft_type != peft.PeftType.ADALORA:
        yield
        return
    pattern, config.rank_pattern = config.rank_pattern, None
    try:
        yield
    finally:
        config.rank_pattern = pattern


def write_adapter_card(run: Run) -> None:
    """Write the card of the run's adapter, where it has one, with the figures that are known by now."""
    folder = run.folder / "lm" / ADAPTER
    if not folder.is_dir():
        return
    repository, commit = pinned(run.model.name)
    head = _front(run, "peft")
    # A name of recllm's own means nothing to transformers.
    base = repository if on_hub(run.model.name) else "FOLDER"
    where = (
        f"  # FOLDER: where {_shown(run.model.name)} lies, as a model that transformers loads"
        if base == "FOLDER"
        else ""
    )
    kept = f', revision="{commit}"' if commit else ""
    kept += f", num_hidden_layers={run.model.layers}" if run.model.layers else ""
    loading = [
        "## How to load",
        "",
        "```python",
        "from peft import PeftModel",
        "from transformers import AutoModel",
        "",
        f'base = AutoModel.from_pretrained("{base}"{kept}){where}',
        f'model = PeftModel.from_pretrained(base, "{ADAPTER}")',
        "```",
        "",
        "This is the adapter alone. What it is read with, and the projections beside it, are in the run's folder "
        f"(`lm/model.safetensors`, `recipes/`); `recllm export {_called(run)}` makes one bundle of all of it.",
    ]
    _write(folder / CARD, [*head, "", *card(run, f"{run.name}: the adapter"), "", *loading])


def write_bundle_card(run: Run, folder: Path, recipe: str, kind: str) -> None:
    """Write the card of a bundle; `kind` says what it does, in words. One that ranks has its model's figures alone."""
    recommends = kind == "recommends"
    load = "recllm.load" if recommends else "recllm.ranker.load_ranker"
    loading = ["## How to load", "", "```python", "import recllm", "", f'model = {load}("bundle-{recipe}")', "```", ""]
    if not recommends:
        loading[3:5] = ["import recllm.ranker", ""]
    loading.append('The graphs are plain ONNX: `onnxruntime.InferenceSession("….onnx")` opens them without recllm.')
    if (folder / INTEGERS).exists():
        loading[-1] += (
            " They have integer products, which overflow without a word on processors without VNNI instructions: "
            f"recllm tries one, `{INTEGERS}`, before it answers."
        )
    told = card(run, f"{run.name}: a bundle that {kind} ({recipe})", None if recommends else "relevance")
    _write(folder / CARD, [*_front(run, "onnx"), "", *told, "", *loading])


def without_figures(run: Run) -> list[Path]:
    """The run's bundles that were exported before it was evaluated: their cards have no figures."""
    cards = sorted(run.folder.glob(f"bundle-*/{CARD}"))
    return [path.parent for path in cards if NOT_YET in path.read_text(encoding="utf-8")]


def _front(run: Run, library: str) -> list[str]:
    """What the hub reads of a card. It knows its own names alone: of a folder's model, which is nobody else's, none."""
    name, known = run.model.name, ASSETS.get(run.model.name)
    hub = known.hub if known is not None else None
    base = hub.model if hub is not None else pinned(name)[0] if on_hub(name) else None
    named = [] if base is None else [f"base_model: {base}"]
    return ["---", *named, f"library_name: {library}", "tags: [recommendation, recllm]", "---"]


def card(run: Run, title: str, only: str | None = None) -> list[str]:
    """What was trained, on what, and how good it is; of all scorers, or of one alone."""
    facts = read_json(run.folder / ENVIRONMENT)
    lines = [f"# {title}", "", "| | |", "|---|---|"]
    rows = {
        "base model": f"{_shown(run.model.name)}, weights sha256 {known_revision(run, run.model.name)}"
        if run.model.name != "none"
        else "none",
        "item text by": _shown(run.model.item_encoder or run.model.name),
        **(
            {"likelihood by": f"{run.model.likelihood}, weights sha256 {known_revision(run, run.model.likelihood)}"}
            if run.model.likelihood is not None
            else {}
        ),
        **(_language(run) if run.model.name != "none" else {}),
        "task": run.model.task,
        "data": run.data.name or run.data.interactions,
        "fingerprints": ", ".join(f"{key} {value[:16]}" for key, value in facts["data"].items()),
        "split": run.data.split,
        **({"control": f"{run.control.lacking}: not for use"} if run.control.lacking else {}),
        "seed": str(run.seed),
        "device": facts["device"],
        "versions": ", ".join(f"{key} {value}" for key, value in facts["versions"].items()),
    }
    lines += [f"| {name} | {str(value).replace('|', chr(92) + '|')} |" for name, value in rows.items()]
    return [*lines, "", *_figures(run, only)]


def _language(run: Run) -> dict[str, str]:
    """What was done with the language model."""
    done = run.folder / "lm" / "done.json"
    told = ", ".join(f"{key} {value:,}" for key, value in read_json(done).items()) if done.is_file() else "none"
    layers = f"the first {run.model.layers}" if run.model.layers else "all"
    return {"layers": layers, "adapter": run.adapter.recipe, "training": told}


def _shown(model: str) -> str:
    """A model's name; of a folder the last part, for where it lies is nobody's business."""
    return Path(model).resolve().name if Path(model).is_dir() and model not in ASSETS else model


def _called(run: Run) -> str:
    """The run's folder as it is typed where it was trained; of a whole path, which is nobody's business, the name."""
    return quote(run.folder.name if run.folder.is_absolute() else str(run.folder))


def _figures(run: Run, only: str | None = None) -> list[str]:
    path = run.folder / "evaluation.json"
    tables: dict[str, Any] = read_json(path) if path.is_file() else {}
    if "test" not in tables:
        return [f"{NOT_YET}: `recllm evaluate {_called(run)}` measures it on the test rows."]
    metrics = tables["test"]["metrics"]
    lines = ["## Test rows", "", "95 % intervals by paired bootstrap over users.", ""]
    lines += ["| slice | rows | scorer | " + " | ".join(metrics) + " |", "|---" * (3 + len(metrics)) + "|"]
    for row in tables["test"]["rows"]:
        if only is not None and row["scorer"] != only:
            continue
        cells = [row["slice"], f"{row['rows']:,}", row["scorer"], *(_interval(row[name]) for name in metrics)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _interval(values: list[float | None]) -> str:
    figure, low, high = values
    if figure is None:
        return "–"
    return f"{figure:.4f}" + ("" if low is None or high is None else f" ({low:.3f} … {high:.3f})")


def _write(path: Path, lines: list[str]) -> None:
    with written(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")

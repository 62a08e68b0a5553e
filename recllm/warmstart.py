"""Warm starts: a run whose light scorer and language model begin with what an earlier run has learnt."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from recllm.adapters import LOFTQ, load_adapter
from recllm.errors import RecllmError, require
from recllm.files import read_json
from recllm.mf import ImplicitMF
from recllm.ranking import ItemIndex
from recllm.revisions import check_same_models
from recllm.runs import ENVIRONMENT, Run, load_run
from recllm.vectors import VECTORS

Say = Callable[[str], None]

OF_ITEMS, OF_NEW_ITEMS, OF_TIME, LEARNT = "bias", "cold_bias", "drift.ends", "learnt"
"""The parameter with a value per item, the one that an item without events has in its place, the one with a vector per
stretch of time, and the one with a vector per item."""
LIGHT_SHAPE = ("width", "layers", "heads", "max_history", "relative_positions", "gated")
SPLIT_KEYS = ("split", "min_events", "cold_share", "given_back", "shots")


def check_start(run: Run) -> Run | None:
    """The run that `run` starts from; None where it starts from nothing.

    Raises:
        RecllmError: no finished run, one of other models, or one whose split would let it know this run's test rows.
    """
    if run.start_from is None:
        return None
    if not Path(run.start_from).is_dir():
        raise RecllmError(f"start_from = '{run.start_from}' is no folder. Name the folder of a finished run.")
    earlier = load_run(Path(run.start_from))
    if earlier.folder.resolve() == run.folder.resolve():
        raise RecllmError("start_from is this run itself. Give the new run a name of its own (--set name=…).")
    if not (earlier.folder / "fusion.json").is_file():
        raise RecllmError(
            f"start_from = '{run.start_from}' is not trained to its end. Go on with it first: "
            f"recllm train {run.start_from} --resume"
        )
    here, there = _facts(run), _facts(earlier)
    if "none" not in (run.model.name, earlier.model.name):
        here, there = here | _language_facts(run, None), there | _language_facts(earlier, earlier.adapter_file)
    for key, own in here.items():
        if own != (other := there.get(key, own)):
            raise RecllmError(
                f"{key} is {own!r} here and {other!r} in start_from = '{run.start_from}'. A run starts from one of the "
                "same models and the same kind of split: give both the same, or leave start_from out."
            )
    if "none" not in (run.model.name, earlier.model.name) and earlier.model.soft_tokens and not run.model.soft_tokens:
        raise RecllmError(
            f"start_from = '{run.start_from}' has soft tokens, and this run has none to go on with. Set "
            "model.soft_tokens = true, or leave start_from out."
        )
    return earlier


def _facts(run: Run) -> dict[str, object]:
    """What two runs have to have alike, by the name that a user knows."""
    facts: dict[str, object] = {f"data.{key}": getattr(run.data, key) for key in SPLIT_KEYS}
    if run.data.split == "cold-items":
        facts["data.seed"] = run.seed if run.data.seed is None else run.data.seed
    if run.data.shots is not None or run.control.lacking:  # drawn by it, as weights and orders of a control are
        facts["seed"] = run.seed
    facts |= {f"control.{key}": value for key, value in run.control.model_dump().items()}
    if run.light.num_train_epochs:
        facts |= {f"light.{key}": getattr(run.light, key) for key in LIGHT_SHAPE}
    return facts | {
        "model.task": run.model.task,
        "model.item_encoder": run.model.item_encoder or run.model.name,
        "model.learnt_width": run.model.learnt_width,
        "cf.factors": run.cf.factors,
    }


def _language_facts(run: Run, kept_recipe: str | None) -> dict[str, object]:
    """What two language models have to have alike; dropout and the base's precision belong to a training."""
    facts: dict[str, object] = {
        f"model.{key}": getattr(run.model, key) for key in ("name", "layers", "history", "head_width")
    }
    facts["adapter.recipe"] = run.adapter.recipe
    if run.adapter.recipe != "none":
        recipe = load_adapter(run.adapter, kept_recipe)
        own = {key: value for key, value in recipe.config.items() if "dropout" not in key}
        facts |= {"the adapter's method": recipe.tuner, "the adapter's keys": own}
        if recipe.start.startswith("pissa_niter"):  # what it takes off the base is found from drawn directions
            facts["seed"] = run.seed
        if recipe.start == LOFTQ:  # its matrices make up for this very rounding
            facts["the adapter's quantization"] = recipe.rounding
    return facts


def check_start_data(run: Run, fingerprints: dict[str, str]) -> None:
    """Check that the run that a run starts from goes with its base models, and knows none of its test's items.

    Raises:
        RecllmError: a base model has changed since, or cold items were drawn from other data.
    """
    earlier = check_start(run)
    if earlier is None:
        return
    check_same_models(earlier)
    if run.data.split != "cold-items":
        return
    if read_json(earlier.folder / ENVIRONMENT)["data"] != fingerprints:
        raise RecllmError(
            f"start_from = '{run.start_from}' was trained on other data, from which other cold items are drawn: it "
            "knows items that this run is measured on. Train without start_from, or with another split."
        )


def turned(mf: ImplicitMF, run: Run) -> ImplicitMF:
    """The factors turned onto those of the earlier run, which say the same and lie as its models have learnt them.

    Alternating least squares gives factors up to a rotation only. This one brings the items that both have closest
    together (Schönemann 1966, "A generalized solution of the orthogonal Procrustes problem"); dot products, and so
    everything that `mf` says itself, stay as they are.
    """
    earlier = check_start(run)
    if earlier is None:
        return mf
    before = ImplicitMF.load(earlier.folder / "cf")
    rows = before.items.rows(mf.items.ids)
    now = mf.item_factors[rows >= 0].astype(np.float64)
    procrustes = require("scipy.linalg", "train", "Turning factors").orthogonal_procrustes
    rotation, _ = procrustes(now, before.item_factors[rows[rows >= 0]].astype(np.float64))
    factors = (mf.item_factors @ rotation).astype(np.float32)
    return ImplicitMF(mf.items, factors, mf.settings, mf.half_life)


def start(model: nn.Module, run: Run, scorer: str, index: ItemIndex, say: Say) -> bool:
    """Give a model, before it trains, the weights of the earlier run's model of the same name; whether there are any.

    An item that the earlier run did not know starts with the bias of one without events, and with the learnt vector
    that the model has: the drawn one, or the light scorer's in the language model. What only the new model has, such as
    soft tokens, starts as it is drawn.

    Args:
        model: the model, of which only what trains is kept.
        run: the run.
        scorer: `light` or `lm`.
        index: the items of the new run.
        say: gets a line of what was taken over.

    Raises:
        RecllmError: the earlier model has parameters that this one lacks, or of another shape.
    """
    earlier = check_start(run)
    path = None if earlier is None else earlier.folder / scorer / "model.safetensors"
    if earlier is None or path is None:
        return False
    if not path.is_file():
        say(f"'{scorer}' starts from nothing: {earlier.folder} has none")
        return False
    weights = load_file(path)
    own = {name: value for name, value in model.named_parameters() if value.requires_grad}
    if OF_ITEMS in weights:
        _bring_to_items(weights, own, earlier, index)
    if OF_TIME in weights:
        _bring_to_time(weights, own.get(OF_TIME))
    for name, value in weights.items():
        if name not in own:
            raise _unfit(path, f"it has '{name}', and this run has not")
        if value.numel() == own[name].numel() == 1:
            weights[name] = value.reshape(own[name].shape)  # scalars of runs from before they were vectors of one
        elif value.shape != own[name].shape:
            raise _unfit(path, f"'{name}' has the shape {list(value.shape)} there and {list(own[name].shape)} here")
    with torch.no_grad():
        for name, value in weights.items():
            own[name].copy_(value)
    new = sum(value.numel() for name, value in own.items() if name not in weights)
    rest = f"; {new:,} of its parameters are new" if new else ""
    say(f"'{scorer}' starts from {earlier.folder}{rest}")
    return True


def _bring_to_items(weights: dict[str, Tensor], own: dict[str, nn.Parameter], earlier: Run, index: ItemIndex) -> None:
    """What the earlier model has learnt of each item, in the order of the new catalogue."""
    ids = read_json((earlier.folder / VECTORS).with_suffix(".ids.json"))
    rows, known = ItemIndex(ids).rows(index.ids), ImplicitMF.load(earlier.folder / "cf").items
    # On its list without an event: what the parameters hold for such an item was never learnt.
    rows = np.where(known.rows(index.ids) >= 0, rows, -1)
    weights[OF_ITEMS] = _biases(weights, rows)
    if LEARNT in weights and LEARNT in own:
        weights[LEARNT] = _learnt(weights[LEARNT], own[LEARNT], rows)


def _bring_to_time(weights: dict[str, Tensor], own: nn.Parameter | None) -> None:
    """What the earlier model has learnt of time, for as many stretches as the new one has; gone where it has none.

    Places are shares of each run's own events, so that a log that has grown has what was learnt a little later than it
    was. The end stays the end, and what is drawn out of place is learnt again.
    """
    earlier = weights.pop(OF_TIME)
    if own is not None:
        drawn = functional.interpolate(earlier.T[None], len(own), mode="linear", align_corners=True)
        weights[OF_TIME] = drawn[0].T.contiguous()


def _biases(weights: dict[str, Tensor], rows: NDArray[np.int64]) -> Tensor:
    """Biases of new items float32[items] by their rows in the earlier run, −1 where it had none."""
    known = weights[OF_ITEMS][torch.from_numpy(np.maximum(rows, 0))]
    return torch.where(torch.from_numpy(rows >= 0), known, weights[OF_NEW_ITEMS].reshape(()))


def _learnt(earlier: Tensor, own: nn.Parameter, rows: NDArray[np.int64]) -> Tensor:
    """Learnt vectors float32[items, width] by rows in the earlier run; where it had none the model's own stay."""
    there = torch.from_numpy(rows >= 0)[:, None]
    return torch.where(there, earlier[torch.from_numpy(np.maximum(rows, 0))], own.detach().cpu())


def _unfit(path: Path, why: str) -> RecllmError:
    return RecllmError(
        f"{path} does not fit: {why}. A run starts from one with the same [light], [adapter] and [model]; take over "
        "its settings, or leave start_from out."
    )

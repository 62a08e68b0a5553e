"""Which names `[train]` may hold beside ours, told within milliseconds: Trainer itself takes seconds to import."""

import ast
from collections.abc import Collection, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from recllm.errors import RecllmError, unknown

REFUSED = {
    "save_only_model": "a resumed training would begin with a new optimizer and schedule, and end elsewhere",
    "label_smoothing_factor": "Trainer smooths labels of its own models, and the losses here are over items or pairs",
    "neftune_noise_alpha": "Trainer puts the noise on a model of its own kind, and these read vectors",
    "prediction_loss_only": "checkpoints are chosen by a metric of validation",
    "batch_eval_metrics": "the metrics are of all rows together",
    "ignore_data_skip": "a resumed training would read other rows, and end elsewhere",
    "auto_find_batch_size": "a batch that does not fit is halved here, with the same rows in a step",
    "dataloader_drop_last": "it would leave out rows of validation as well, and steps that are counted here",
    "label_names": "Trainer looks for labels of its own models by it",
    "use_liger_kernel": "it changes transformers' own losses, and the losses here are over items or pairs",
    "push_to_hub": "a run is pushed when it is trained: recllm push",
    "deepspeed": "it is named to the launcher: recllm train RUN.toml --profile zero2",
    "fsdp": "it is named to the launcher: recllm train RUN.toml --profile fsdp2",
    "bf16": 'train.precision says it, of all that trains: train.precision = "bf16"',
    "fp16": 'train.precision says it, of all that trains: train.precision = "fp16"',
    "bf16_full_eval": "validation is in the precision of training",
    "fp16_full_eval": "validation is in the precision of training",
    "seed": "everything random is drawn from the run's one seed: --set seed=…",
    "resume_from_checkpoint": "recllm train RUN.toml --resume goes on from the run's own",
}
"""Keys of Trainer that do not go with what is trained here, and why."""


@cache
def written_names() -> frozenset[str]:
    """Names of Trainer's arguments, read from transformers' source; empty where there is none to read."""
    spec = find_spec("transformers")
    if spec is None or spec.origin is None:
        return frozenset()
    try:
        tree = ast.parse(Path(spec.origin).with_name("training_args.py").read_text(encoding="utf-8"))
    except (OSError, SyntaxError):
        return frozenset()
    own = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments")
    fields = (line.target for node in own for line in node.body if isinstance(line, ast.AnnAssign))
    return frozenset(field.id for field in fields if isinstance(field, ast.Name))


def check_names(keys: Mapping[str, Any], known: Collection[str] | None = None) -> None:
    """Refuse names that are not Trainer's, and those of its arguments that do not go with what is trained here.

    Args:
        keys: what `[train]` holds beside our own keys.
        known: Trainer's names; by default as its source has them, and any name where that cannot be read.

    Raises:
        RecllmError: such a name, with the nearest right one or the reason.
    """
    names = set(written_names() if known is None else known) - {"output_dir"}
    for key in keys:
        if names and key not in names:
            raise unknown("key in [train]", key, names)
        if key in REFUSED and (keys[key] or key == "seed"):  # what is empty asks for nothing
            raise RecllmError(f"train.{key} is not supported: {REFUSED[key]}. Leave it out.")

"""The gate of an export: a recipe's graphs are measured against torch, and kept only within its tolerance."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import model_validator

from recllm.bundle import new_bundle, seal
from recllm.files import write_json
from recllm.parity import Tolerance, failures_of
from recllm.quantise import Precision
from recllm.recipes import Settings, find_recipe, parse, read_toml
from recllm.tasks import Task
from recllm.weightonly import WeightSettings

Parity = dict[str, dict[str, float]]
ROUNDED_ROWS = 21
"""The first opset whose operators round rows as blocks."""


class ExportRecipe(Settings):
    """One file of export/."""

    precision: Precision
    opset: int
    tolerance: Tolerance
    causal: WeightSettings = WeightSettings()

    @model_validator(mode="after")
    def _bits_are_the_precisions(self) -> "ExportRecipe":
        if self.precision in ("int8", "int4") and self.precision != f"int{self.causal.bits}":
            raise ValueError(f"precision '{self.precision}' and [causal] bits = {self.causal.bits} do not fit together")
        if (unread := self.causal.model_fields_set) and self.precision in ("fp32", "fp16"):
            raise ValueError(
                f"[causal] {', '.join(sorted(unread))} is for 8 and 4 bits, and the precision is {self.precision}"
            )
        if self.causal.activations == "int8" and self.opset < ROUNDED_ROWS:
            raise ValueError(f"[causal] activations = 'int8' needs opset {ROUNDED_ROWS} or more, and not {self.opset}")
        return self


def load_recipe(name: str) -> ExportRecipe:
    """Read an export recipe.

    Raises:
        RecllmError: an unknown recipe or key.
    """
    path = find_recipe("export", name)
    return parse(ExportRecipe, read_toml(path), str(path))


@dataclass(frozen=True)
class Exported:
    """What became of one recipe.

    Attributes:
        recipe: its name.
        folder: the bundle, or None where the recipe failed its gate.
        parity: per graph the measured fidelity.
        failures: what broke the tolerance, in words.
    """

    recipe: str
    folder: Path | None
    parity: dict[str, dict[str, float]]
    failures: list[str]


def data_facts(task: Task) -> dict[str, Any]:
    """What a manifest says of the data that were trained on."""
    return {
        "name": task.dataset.name,
        "source": task.dataset.source,
        "licence": task.dataset.licence,
        "fingerprints": task.fingerprints(),
    }


def gated(
    folder: Path,
    facts: dict[str, Any],
    name: str,
    recipe: ExportRecipe,
    fill: Callable[[Path], None],
    measured: Callable[[Path], Parity],
) -> Exported:
    """Write a bundle, unless what is measured of it breaks the tolerance: then nothing is written.

    Args:
        folder: of the bundle; an older one stays where the new one fails.
        facts: what the manifest says.
        name: of the recipe.
        recipe: has the tolerance.
        fill: writes the bundle's files.
        measured: opens the sealed bundle and compares it with torch, per graph.
    """
    parity: Parity = {}
    failures: list[str] = []
    try:
        with new_bundle(folder, facts) as part:
            fill(part)
            seal(part, facts)  # so that what is compared is what a user will load
            parity = measured(part)
            failures = failures_of(parity, recipe.tolerance)
            write_json(part / "parity.json", {"tolerance": recipe.tolerance.model_dump(), "measured": parity})
            if failures:
                raise _GateError
    except _GateError:
        if folder.exists():
            failures.append(f"{folder} is an older bundle, of before this export")
        return Exported(name, None, parity, failures)
    return Exported(name, folder, parity, [])


class _GateError(Exception):
    """The recipe's tolerance is broken: nothing is written."""

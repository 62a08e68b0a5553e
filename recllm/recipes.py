"""Recipes: the TOML files under prompts/, adapters/ and export/, and the run file that names them."""

import math
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from recllm.errors import RecllmError, unknown

FOLDERS = ("prompts", "adapters", "export")


class Settings(BaseModel):
    """Base of all settings: frozen; a key that is not a field is an error, and so are TOML's nan and inf."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


SettingsT = TypeVar("SettingsT", bound=Settings)


def share(folder: str) -> Path:
    """Where the recipes of `folder` lie: beside the package in a checkout, inside it in an installed wheel."""
    package = Path(__file__).parent
    checkout = package.parent / folder
    in_checkout = (package.parent / "pyproject.toml").is_file() and checkout.is_dir()
    return checkout if in_checkout else package / "share" / folder


def recipe_names(folder: str) -> list[str]:
    """Names of the shipped recipes of `folder`."""
    return sorted(path.stem for path in share(folder).glob("*.toml"))


def find_recipe(folder: str, name: str) -> Path:
    """The file of a recipe: a path that ends in .toml, or the name of a shipped one.

    Raises:
        RecllmError: neither a file nor a shipped name.
    """
    if name.endswith(".toml"):
        path = Path(name)
        if not path.is_file():
            raise RecllmError(
                f"There is no file '{name}'. Give a shipped name instead: {', '.join(recipe_names(folder))}."
            )
        return path
    if name not in recipe_names(folder):
        hint = "A path that ends in .toml works too."
        if Path(f"{name}.toml").is_file():
            hint = f"For the file of that name give its ending too: {name}.toml."
        raise unknown(f"recipe in {folder}/", name, recipe_names(folder), hint)
    return share(folder) / f"{name}.toml"


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file.

    Raises:
        RecllmError: the file is missing or not TOML; the message has the line.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecllmError(f"There is no file '{path}'.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecllmError(f"{path} is not valid TOML: {error}.") from None


def parse(model: type[SettingsT], values: dict[str, Any], place: str) -> SettingsT:
    """Check `values` against `model`; `place` (a file, a table) begins the message of what is wrong.

    Raises:
        RecllmError: an unknown key, with the nearest right one, or a value of the wrong kind.
    """
    for key, value in _numbers(values):  # free tables too, as [train], whose values no model knows
        if not math.isfinite(value):
            raise RecllmError(f"{place}: key '{key}': a finite number is expected (given: {value}).")
    try:
        return model.model_validate(values)
    except ValidationError as error:
        found = error.errors()
        # What was left out for its own mistake makes a list too short, which is no second one.
        inside = {item["loc"][:size] for item in found for size in range(len(item["loc"]))}
        told = [item for item in found if item["type"] != "too_short" or item["loc"] not in inside]
        raise RecllmError(f"{place}: " + " ".join(_explain(model, item) for item in told)) from None


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, float]]:  # noqa: ANN401  what TOML holds
    """Floats anywhere in nested tables and lists, with their keys."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for name, own in inside:
        yield from _numbers(own, f"{key}.{name}" if key else str(name))
    if isinstance(value, float):
        yield key, value


def _explain(model: type[BaseModel], item: Any) -> str:  # noqa: ANN401  pydantic's error dictionaries
    where = ".".join(str(part) for part in item["loc"])
    if item["type"] != "extra_forbidden":
        if not where:  # several keys that do not go together: the message names them
            return f"{item['msg'].removeprefix('Value error, ')}."
        given = f" (given: {item['input']!r})" if item["type"] != "missing" else ""
        return f"key '{where}': {item['msg']}{given}."
    *tables, key = item["loc"]
    for part in tables:
        field = model.model_fields.get(str(part))
        model = _settings_in(field.annotation if field else None) or model
    place = f"[{'.'.join(str(part) for part in tables)}] " if tables else ""
    return place + str(unknown("key", str(key), model.model_fields))


def _settings_in(annotation: Any) -> type[BaseModel] | None:  # noqa: ANN401  a type, or a union of types
    """The settings model that `annotation` is, or the first one in its union."""
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None

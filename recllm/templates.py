"""The grammar of prompts: {slots} in a template, and [optional segments] in an item format."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from recllm.errors import RecllmError

REST = "text"
"""The slot of an item format that takes every column not named otherwise."""

_TEXT = re.compile(r"(?P<escaped>\{\{|\}\})|\{(?P<slot>[^{}]*)\}|(?P<stray>[{}])|(?P<text>[^{}]+)")
_ITEM = re.compile(
    r"(?P<escaped>\{\{|\}\}|\[\[|\]\])|\{(?P<slot>[^{}]*)\}|(?P<bracket>[\[\]])|(?P<stray>[{}])|(?P<text>[^{}\[\]]+)"
)


JOINTS = " .,;:|–-"
"""What parts an optional segment from what stands before it."""


class Slot(NamedTuple):
    """A place in a template that takes a value."""

    name: str


class Segment(NamedTuple):
    """A run of an item format; an optional one is dropped when a slot in it has no value."""

    optional: bool
    parts: tuple[str | Slot, ...]


def split_text(template: str) -> list[str | Slot]:
    """Split a template into literal text and slots; brackets are plain text here (`[INST]` is a control token)."""
    parts: list[str | Slot] = []
    for kind, value in _scan(_TEXT, template):
        _append(parts, Slot(value) if kind == "slot" else value)
    return parts


def split_item(template: str) -> list[Segment]:
    """Split an item format into segments, optional ones from `[brackets]`."""
    segments: list[Segment] = []
    parts: list[str | Slot] = []
    inside = False
    for kind, value in _scan(_ITEM, template):
        if kind != "bracket":
            _append(parts, Slot(value) if kind == "slot" else value)
            continue
        if inside == (value == "["):
            raise RecllmError(f"a '{value}' out of place in '{template}'. Brackets do not nest; double a literal one.")
        segments.append(Segment(inside, tuple(parts)))
        parts, inside = [], not inside
    if inside:
        raise RecllmError(f"a '[' is not closed in '{template}'. Double a literal one.")
    return [segment for segment in [*segments, Segment(False, tuple(parts))] if segment.parts]


def literals(parts: Sequence[str | Slot]) -> list[str]:
    """The text before, between and after the slots: one more than there are slots."""
    found = [""]
    for part in parts:
        if isinstance(part, Slot):
            found.append("")
        else:
            found[-1] += part
    return found


def render_item(segments: Sequence[Segment], record: Mapping[str, str]) -> str | None:
    """Write the item of `record`; None when it has a value for none of the slots."""
    named = {part.name for segment in segments for part in segment.parts if isinstance(part, Slot)}
    # White space within a value is folded: a line break in a title would look like one of the template's.
    values = {name: " ".join(value.split()) for name, value in record.items() if value.strip()}
    rest = [f"{name}: {values[name]}" for name in values if name not in (named | {"item_id"}) - {REST}]
    # A column that is itself called "text" is one of the rest.
    values.pop(REST, None)
    if rest:
        values[REST] = "; ".join(rest)
    written = [_render_segment(segment, values) for segment in segments]
    first = next((place for place, (_, filled) in enumerate(written) if filled), None)
    if first is None:
        return None
    runs = [run for run, _ in written]
    if segments[first].optional and not "".join(runs[:first]).strip():
        runs[first] = runs[first].lstrip(JOINTS)  # there is nothing before it that they would part it from
    return "".join(runs).strip()


def _scan(pattern: re.Pattern[str], template: str) -> Iterator[tuple[str, str]]:
    for match in pattern.finditer(template):
        kind = str(match.lastgroup)
        value = match.group(kind)
        if kind == "stray":
            raise RecllmError(
                f"a single '{value}' in '{template}'. Slots are written {{name}}; double a literal brace."
            )
        yield ("text", value[0]) if kind == "escaped" else (kind, value.strip() if kind == "slot" else value)


def _append(parts: list[str | Slot], part: str | Slot) -> None:
    if parts and isinstance(part, str) and isinstance(parts[-1], str):
        parts[-1] += part
    else:
        parts.append(part)


def _render_segment(segment: Segment, values: Mapping[str, str]) -> tuple[str, bool]:
    """The segment's text, and whether a slot in it was filled."""
    names = [part.name for part in segment.parts if isinstance(part, Slot)]
    if segment.optional and any(name not in values for name in names):
        return "", False
    text = "".join(values.get(part.name, "") if isinstance(part, Slot) else part for part in segment.parts)
    return text, any(name in values for name in names)

"""The page of the run file's keys says what the settings say.

`python -m pytest tests/test_run_file.py --write-docs` writes the tables anew.
"""

import ast
import inspect
import re
import textwrap
from itertools import pairwise
from pathlib import Path

from pydantic_core import PydanticUndefined

from recllm.recipes import Settings
from recllm.runs import Run, as_toml

PAGE = Path(__file__).parents[1] / "docs" / "run-file.md"
BEGIN, END = "<!-- keys -->\n", "<!-- end -->\n"


def described(settings):
    """By field, what the text below it says, on one line."""
    body = ast.parse(textwrap.dedent(inspect.getsource(settings))).body[0].body
    found = {}
    for field, text in pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            found[field.target.id] = " ".join(str(text.value.value).split())
    return found


def default(field):
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "the file's name"  # of the one key without a default, the run's name
    return "–" if value is None else f"`{as_toml(list(value) if isinstance(value, tuple) else value)}`"


def rows(settings):
    texts = described(settings)
    for name, field in settings.model_fields.items():
        if not (inspect.isclass(field.annotation) and issubclass(field.annotation, Settings)):
            yield f"| `{name}` | {default(field)} | {texts[name].replace('|', '&#124;')} |"


def tables():
    head = ["| key | default | what it is |", "|---|---|---|"]
    lines = ["## At the top", "", *head, *rows(Run)]
    for name, field in Run.model_fields.items():
        kind = field.annotation
        if inspect.isclass(kind) and issubclass(kind, Settings):
            lead = re.sub(r"^`\[\w+\]`: ", "", " ".join(inspect.getdoc(kind).split()))
            lines += ["", f"## [{name}]", "", f"{lead[0].upper()}{lead[1:]}", "", *head, *rows(kind)]
    return "\n".join(lines) + "\n"


def test_the_page_says_what_the_settings_say(request):
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    shown, _, after = rest.partition(END)
    if request.config.getoption("--write-docs"):
        PAGE.write_text(before + BEGIN + tables() + END + after, encoding="utf-8")
        return
    assert shown == tables(), "write it anew: python -m pytest tests/test_run_file.py --write-docs"

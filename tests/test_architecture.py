"""The story runs forward: every module has its place, and imports only what is told before it."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# The order of the story; a new module gets its place here. A package (`data`) stands after its parts (`data.checks`).
# fmt: off
TORCH_FREE = [
    "errors", "files", "arrayfiles", "process", "progress", "recipes", "assets", "download", "fetch", "data.checks",
    "data.tables", "data.columns", "data.texts", "data.written", "data.times", "data.events", "data.items", "data.sets",
    "data.read", "data.join", "data", "splits", "given", "templates", "tokens", "histories", "prompts", "metrics",
    "ranking", "results", "evaluate", "askedat", "recency", "priors", "likelihood", "mf", "itemitem", "neighbours",
    "likeness", "expectation", "ratedneighbours", "windows", "vectors", "control", "encoding", "pointwise", "fitting",
    "reordering", "fusion", "weighing", "newitems", "trainernames", "runs", "resuming", "idle", "tasks", "fading",
    "pairs", "protocols", "bundle", "hub", "catalogue", "sessions", "graphfiles", "graphscorer", "arriving",
    "shortlist", "reserved", "runtime", "onnxreader", "ranker", "removing", "growing", "rowfiles", "query_rows",
    "sheets", "parts", "batch", "distributed", "doctor", "charts", "report",
]
TORCH = [
    "devices", "softmax", "sequence", "heads", "softtokens", "judgedloss", "lightjudge", "bottleneck", "loftq",
    "adapters", "lm", "textvectors", "revisions", "names", "examples", "lean", "sharded", "checkpoints", "watching",
    "tracking", "trainerkeys", "recovery", "adalora", "cards", "loop", "eva", "cascade", "trees", "relevance",
    "warmstart", "collaborative", "preflight", "trained", "judging", "scoring", "distil", "stored", "nextitem",
    "planning", "train", "outcome", "runreport", "repeated", "unfolding", "tracing", "graphs", "rankgraphs",
    "weightonly", "quantise", "turning", "integer", "parity", "gate", "rankexport", "export", "quickstart", "searches",
    "tuning", "commands", "answering",
]
# fmt: on
ORDER = [*TORCH_FREE, *TORCH, "cli", "__main__"]

HEAVY = {"torch", "transformers", "peft", "accelerate"}
VAGUE = {"utils", "util", "common", "helpers", "helper", "base", "manager", "misc", "core"}


def files():
    """The file of every module, by its name inside recllm; a package's is its `__init__.py`."""
    package = ROOT / "recllm"
    found = {path.relative_to(package).with_suffix("").parts: path for path in package.rglob("*.py")}
    named = {".".join(parts).removesuffix("__init__").removesuffix("."): path for parts, path in found.items()}
    return {name: path for name, path in named.items() if name}


FILES = files()
MODULES = sorted(FILES)


def parsed(module):
    return ast.parse(FILES[module].read_text(encoding="utf-8"))


def imported(tree):
    """Full dotted names of what `tree` imports anywhere in it, also inside functions."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def own(names):
    """Modules of recllm among imported `names`, each cut back to the module that it is in."""
    found = set()
    for name in names:
        parts = name.split(".")
        if parts[0] == "recllm":
            inside = [".".join(parts[1:end]) for end in range(len(parts), 1, -1)]
            found.update(next(([module] for module in inside if module in FILES), inside[-1:]))
    return found - {"__version__"}


def foreign(names):
    return {name.split(".")[0] for name in names}


def test_imports_are_seen_wherever_they_stand():
    code = "import torch.nn\nfrom recllm import charts\ndef f():\n    from recllm.splits import Split\n    import peft"
    names = imported(ast.parse(code))
    assert own(names) == {"charts", "splits"}
    assert foreign(names) >= {"torch", "peft"}


def test_every_module_has_its_place():
    assert sorted(ORDER) == MODULES


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_is_told_before_it(module):
    before = set(ORDER[: ORDER.index(module)])
    late = own(imported(parsed(module))) - before
    assert not late, f"recllm.{module} imports {sorted(late)}, told after it (the order: tests/test_architecture.py)"


@pytest.mark.parametrize("module", [module for module in MODULES if module in TORCH_FREE])
def test_what_is_left_of_the_torch_line_never_imports_torch(module):
    tree = parsed(module)
    required = {
        str(call.args[0].value).split(".")[0]
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and call.args and isinstance(call.args[0], ast.Constant)
        if getattr(call.func, "attr", getattr(call.func, "id", "")) in {"require", "import_module", "__import__"}
    }
    assert not (foreign(imported(tree)) | required) & HEAVY


def test_the_command_line_imports_no_module_of_the_torch_line_at_its_top():
    if "cli" not in MODULES:
        pytest.fail("recllm/cli.py is missing")
    top = ast.Module([node for node in parsed("cli").body if isinstance(node, ast.Import | ast.ImportFrom)], [])
    assert not own(imported(top)) & set(TORCH)
    assert not foreign(imported(top)) & HEAVY


@pytest.mark.parametrize("path", [ROOT / "recllm" / "__init__.py", *FILES.values()], ids=["recllm", *FILES])
def test_the_first_line_says_what_the_file_does(path):
    text = path.read_text(encoding="utf-8")
    assert text.startswith('"""'), f"{path.name} does not begin with its docstring"
    first = text[3:].split("\n")[0].removesuffix('"""')
    assert len(first) > 20
    assert first.endswith((".", ":"))


def test_no_module_has_a_name_that_says_nothing():
    names = {path.stem for folder in ("recllm", "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")}
    assert not {name.removeprefix("test_") for name in names} & VAGUE


def readme_tree():
    """First words of the unindented lines of the README's tree: the fenced block that has a line for recllm/."""
    blocks = re.findall(
        r"^```\w*\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    tree = next((block for block in blocks if re.search(r"^recllm/\s", block, re.MULTILINE)), "")
    return {line.split()[0].rstrip("/") for line in tree.splitlines() if line.strip() and not line[0].isspace()}


def test_the_tree_in_the_readme_is_the_tree():
    named = readme_tree()
    if not (ROOT / ".git").exists():
        assert all((ROOT / name).exists() for name in named)
        return
    # Also what is not committed yet, but not what git ignores (runs/, builds).
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    found = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    there = {name.split("/")[0] for name in found if (ROOT / name).exists()}
    assert named == {name for name in there if not name.startswith(".")}

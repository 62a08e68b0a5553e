"""The README's commands run in their order, as a user would paste them, on small models in place of fetched ones."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MADE_BY_MAKE = ("make", "python3", ".venv/bin/pip", ".venv/bin/recllm")
"""What sets the project up; other tests and CI itself run it."""
SMALL = """
max_history = 12
head_width = 16
[light]
width = 16
num_train_epochs = 2
[adapter]
r = 4
[cf]
factors = 4
[export]
gate_queries = 8
"""


def blocks(kind):
    return re.findall(rf"^```{kind}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def commands():
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    found = [shlex.split(line, comments=True) for line in lines]
    return [words for words in found if words and words[0] not in MADE_BY_MAKE]


@pytest.fixture(scope="module")
def place(tmp_path_factory, checkerboard):
    """A folder with all files that the README names."""
    folder = tmp_path_factory.mktemp("readme")
    (toml,) = blocks("toml")
    head, tail = toml.split("[train]")
    (folder / "films.toml").write_text(f"{head}{SMALL}[train]{tail}", encoding="utf-8")
    checkerboard.catalog.frame.write_csv(folder / "items.csv")
    (folder / "new.csv").write_text("item_id,title,genres\nn1,Red film 91,Drama\nn2,Blue film 92,Comedy\n", "utf-8")
    (folder / "expired.csv").write_text("item_id\n5\n", encoding="utf-8")
    rows = ['{"user_id": "a", "history": ["0", "2", "4"]}', '{"user_id": "b", "history": ["1", "3"]}']
    (folder / "users.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


def run(words, place, cache):
    environment = os.environ | {"RECLLM_CACHE": str(cache), "OMP_NUM_THREADS": "2"}
    environment.pop("RECLLM_DATA", None)
    if words[0] == "accelerate":  # the line before it has filled the run's folder
        words = [*words, "--overwrite"]
    program = {"recllm": ["-m", "recllm.cli"], "accelerate": ["-m", "accelerate.commands.accelerate_cli"]}[words[0]]
    command = [sys.executable, *program, *words[1:]]
    return subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_every_command_of_the_readme_runs_in_its_order(place, small_cache):
    found = commands()
    assert {words[0] for words in found} == {"recllm", "accelerate"}
    assert len(found) >= 9
    for words in found:
        done = run(words, place, small_cache)
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        assert "Traceback" not in done.stderr
    assert pl.read_parquet(place / "recommendations.parquet").columns[:4] == ["user_id", "rank", "item_id", "score"]
    assert pl.read_parquet(place / "scores.parquet").columns == ["user_id", "item_id", "score"]
    (snippet,) = blocks("python")
    done = subprocess.run(
        [sys.executable, "-c", f"{snippet}\nprint(len(out.ids[0]), out.scores.shape, sorted(out.shares))"],
        cwd=place,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(
        "10 (1, 10) ['ease', 'expected_popularity', 'light', 'lm', 'mf', 'neighbours', 'popularity', 'text', "
        "'transitions']"
    )

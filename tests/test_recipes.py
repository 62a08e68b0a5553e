"""Recipes are found by name or path, and a mistake in one is named with the way out."""

import re
import tomllib
from pathlib import Path

import pytest
from pydantic import Field

from recllm import recipes
from recllm.errors import RecllmError, require, unknown
from recllm.recipes import FOLDERS, Settings, find_recipe, parse, read_toml, recipe_names, share
from recllm.weighing import FusionSettings

ROOT = Path(__file__).parents[1]
SHIPPED = [(folder, name) for folder in FOLDERS for name in recipe_names(folder)]


class Inner(Settings):
    learning_rate: float = 0.1


class Outer(Settings):
    train: Inner = Inner()
    extra: Inner | None = None
    seeds: list[int] = Field(default_factory=list)


def test_a_checkout_finds_its_own_folders():
    assert {"lora", "rslora", "dora", "qlora"} <= set(recipe_names("adapters"))
    assert {"fp32", "fp16", "int8", "int4", "w8a8"} <= set(recipe_names("export"))
    assert share("prompts") == ROOT / "prompts"


def test_an_installed_package_finds_them_inside_itself(tmp_path, monkeypatch):
    package = tmp_path / "site-packages" / "recllm"
    (package / "share" / "adapters").mkdir(parents=True)
    (package / "share" / "adapters" / "lora.toml").write_text('tuner = "lora"')
    # Another package's folder beside it must not be taken for the checkout's.
    (tmp_path / "site-packages" / "adapters").mkdir()
    monkeypatch.setattr(recipes, "__file__", str(package / "recipes.py"))
    assert find_recipe("adapters", "lora") == package / "share" / "adapters" / "lora.toml"


def test_a_path_is_taken_as_it_is(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("")
    assert find_recipe("adapters", str(path)) == path


def test_an_unknown_recipe_is_answered_with_the_nearest():
    with pytest.raises(RecllmError, match=r"Unknown recipe in adapters/ 'lroa'\. Did you mean 'lora'\?.*qlora.*\.toml"):
        find_recipe("adapters", "lroa")


def test_a_file_without_its_ending_is_answered_with_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.toml").write_text("")
    with pytest.raises(RecllmError, match=r"Unknown recipe in prompts/ 'mine'.* give its ending too: mine\.toml\."):
        find_recipe("prompts", "mine")


def test_a_missing_file_is_answered_with_the_shipped_names():
    with pytest.raises(RecllmError, match=r"There is no file 'nowhere/mine\.toml'\. Give a shipped name.*fp16, fp32"):
        find_recipe("export", "nowhere/mine.toml")


def test_broken_toml_is_named_with_its_line(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('tuner = "lora"\nr = = 3\n')
    with pytest.raises(RecllmError, match=r"mine\.toml is not valid TOML: .*line 2"):
        read_toml(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(RecllmError, match="is not valid TOML"):
        read_toml(path)
    with pytest.raises(RecllmError, match=r"There is no file .*gone\.toml"):
        read_toml(tmp_path / "gone.toml")


def test_a_folder_that_is_named_like_a_recipe_is_no_recipe(tmp_path):
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(RecllmError, match=r"There is no file"):
        find_recipe("adapters", str(tmp_path / "folder.toml"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"trian": {}}, r"run\.toml: Unknown key 'trian'\. Did you mean 'train'\?"),
        (
            {"train": {"learning_rat": 1}},
            r"run\.toml: \[train\] Unknown key 'learning_rat'\. Did you mean 'learning_rate'\?",
        ),
        ({"extra": {"learning_rat": 1}}, r"\[extra\] Unknown key 'learning_rat'\. Did you mean 'learning_rate'\?"),
        ({"train": {"learning_rate": "fast"}}, r"key 'train\.learning_rate': .*valid number.*\(given: 'fast'\)"),
        ({"seeds": [0, "x"]}, r"key 'seeds\.1': .*valid integer"),
        ({"train": 3}, r"key 'train': .*\(given: 3\)"),
    ],
)
def test_a_wrong_key_or_value_is_named_with_its_place(values, message):
    with pytest.raises(RecllmError, match=message):
        parse(Outer, values, "run.toml")


def test_right_values_pass_and_stay_frozen():
    settings = parse(Outer, {"train": {"learning_rate": 1e-4}}, "run.toml")
    assert settings.train.learning_rate == 1e-4
    with pytest.raises(ValueError, match="frozen"):
        settings.train = Inner()


@pytest.mark.parametrize(("folder", "name"), SHIPPED)
def test_a_shipped_recipe_loads_says_why_and_stands_in_its_readme(folder, name):
    text = find_recipe(folder, name).read_text(encoding="utf-8")
    assert tomllib.loads(text)
    assert text.startswith("# ")
    readme = (ROOT / folder / "README.md").read_text(encoding="utf-8")
    assert re.search(rf"`{name}(\.toml)?`", readme), f"{folder}/README.md does not name {name}"
    assert len(readme.splitlines()) <= 25


@pytest.mark.parametrize("name", recipe_names("export"))
def test_an_export_recipe_carries_its_tolerance(name):
    recipe = read_toml(find_recipe("export", name))
    assert recipe["precision"] == {"w8a8": "int8"}.get(name, name)
    assert 0.5 < recipe["tolerance"]["top10_overlap"] <= 1
    assert 0.9 < recipe["tolerance"]["rank_correlation"] <= 1


def test_long_lists_of_choices_are_cut_and_empty_ones_are_said():
    assert str(unknown("item", "z", [f"a{index:02}" for index in range(20)])).endswith("a11, ….")
    assert "Choices: none." in str(unknown("item", "z", []))


def test_a_missing_extra_is_named():
    with pytest.raises(RecllmError, match=r'Reading needs the package \'no_such_package\'.*"recllm\[train\]"'):
        require("no_such_package.part", "train", "Reading")


def test_what_a_mistake_leaves_of_a_list_is_no_second_mistake():
    with pytest.raises(RecllmError) as error:
        parse(FusionSettings, {"kinds": ["staker"]}, "run.toml")
    assert "key 'kinds.0'" in str(error.value)
    assert "at least 1 item" not in str(error.value)
    with pytest.raises(RecllmError, match="at least 1 item"):
        parse(FusionSettings, {"kinds": []}, "run.toml")

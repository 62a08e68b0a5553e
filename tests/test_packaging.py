"""The wheel, an editable install and a bare checkout find the recipes, and install nothing beside recllm."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("prompts", "adapters", "export")
LEAKS = (*FOLDERS, "tests", "benchmarks")

LOOK = f"""
import importlib.util, recllm.recipes
leaked = [name for name in {LEAKS!r} if importlib.util.find_spec(name)]
assert not leaked, leaked
print(recllm.__file__)
for folder in {FOLDERS!r}:
    print(folder, *recllm.recipes.recipe_names(folder))
"""


def shipped():
    return [f"{folder} " + " ".join(sorted(path.stem for path in (ROOT / folder).glob("*.toml"))) for folder in FOLDERS]


def without_path():
    """The environment without PYTHONPATH, so that only what is installed can be imported."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def look(cwd, *flags, path=()):
    """Import recllm in a process of its own: where it lies, and the recipes it finds."""
    env = without_path()
    if path:
        env["PYTHONPATH"] = os.pathsep.join(map(str, path))
    command = [sys.executable, *flags, "-c", LOOK]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    where, *found = done.stdout.splitlines()
    return Path(where), found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_its_recipes_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {name.split("/")[0].split("-")[0] for name in names} == {"recllm"}
    for folder in FOLDERS:
        recipes = {f"recllm/share/{folder}/{path.name}" for path in (ROOT / folder).glob("*.toml")}
        assert recipes
        assert recipes <= names
    assert {path.relative_to(ROOT).as_posix() for path in (ROOT / "recllm").rglob("*.py")} <= names
    assert "recllm/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.slow
def test_the_installed_wheel_finds_its_recipes(wheel, tmp_path):
    site = tmp_path / "site"
    # A wheel without compiled code is installed by unpacking it.
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    # -S with the environment's packages as a plain path: .pth files, and with them an editable recllm, are not read.
    where, found = look(tmp_path, "-S", path=[site, sysconfig.get_path("purelib")])
    assert where.is_relative_to(site)
    assert found == shipped()


@pytest.mark.slow
def test_an_editable_install_finds_the_checkouts_recipes(tmp_path):
    probe = subprocess.run([sys.executable, "-c", "import recllm"], cwd=tmp_path, env=without_path(), check=False)
    if probe.returncode:
        pytest.skip("recllm is not installed in this environment; `make install` does it")
    where, found = look(tmp_path)
    assert where == ROOT / "recllm" / "__init__.py"
    assert found == shipped()


@pytest.mark.slow
def test_a_bare_checkout_finds_its_recipes():
    # From the checkout itself `import tests` does work, so only the recipes are asked for.
    code = "from recllm.recipes import recipe_names; print('adapters', *recipe_names('adapters'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() in shipped()

"""The run file: overrides, mistakes named with the nearest right key, the resolved file read back equal."""

import json
import re
import tomllib
from pathlib import Path

import pytest

from recllm.errors import RecllmError
from recllm.files import write_json
from recllm.resuming import check_resumed
from recllm.runs import load_run, set_key, write_environment, write_run

TEXT = """
output = "elsewhere"
[data]
name = "ml-100k"
columns = {item_id = 'movie "id"', user_id = 'back\\slash'}
[adapter]
recipe = "lora"
r = 4
target_modules = ["q_proj", "v_proj"]
[train]
max_steps = 7
learning_rate = 1e-4
logging_steps = 1
lr_scheduler_kwargs = {num_cycles = 2}
[export]
recipes = ["fp32"]
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "films.toml"
    path.write_text(TEXT, encoding="utf-8")
    return path


def test_the_run_is_named_after_its_file_unless_it_says_so(file):
    assert load_run(file).name == "films"
    assert load_run(file, ["name=other"]).folder.as_posix() == "elsewhere/other"


def test_keys_of_peft_and_trainer_pass_through(file):
    run = load_run(file)
    assert run.adapter.overrides() == {"r": 4, "target_modules": ["q_proj", "v_proj"]}
    assert run.train.trainer_keys() == {"logging_steps": 1, "lr_scheduler_kwargs": {"num_cycles": 2}}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.learning_rate=2e-4", 2e-4),
        ("train.max_steps = 3", 3),
        ("train.recent_windows=true", True),
        ("model.name=owner/model", "owner/model"),
        ('model.name="owner/model"', "owner/model"),
        ("data.columns.item_id=movie", "movie"),
        ("light.num_train_epochs=0", 0),
        ("seed=5", 5),
    ],
)
def test_overrides_are_read_as_toml_else_as_text(file, override, expected):
    found = load_run(file, [override])
    for part in override.split("=")[0].strip().split("."):
        found = found[part] if isinstance(found, dict) else getattr(found, part)
    assert found == expected
    assert type(found) is type(expected)


def test_the_last_override_of_a_key_wins(file):
    assert load_run(file, ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.max_steps", r"--set train\.max_steps: expected key\.path=value"),
        ("=3", "expected key.path=value"),
        ("seed.deep=3", "'seed' is a value, not a table|key 'seed'"),
        ("output.deep=3", "'output' is a value, not a table"),
        ("modle.name=x", "Unknown key 'modle'. Did you mean 'model'"),
        ("model.histori=text", r"\[model\] Unknown key 'histori'. Did you mean 'history'"),
        ("model.history=words", "key 'model.history': Input should be 'items' or 'text'"),
        ("light.dropout=1.5", r"key 'light.dropout': Input should be less than 1 \(given: 1.5\)"),
        ("seed=-1", r"key 'seed': Input should be greater than or equal to 0"),
        ("model.name=none", r"model\.name is none: name what reads the items' text"),
        ("train.max_steps=many", "key 'train.max_steps': .*integer"),
        ("train.max_steps=0", r"'train.max_steps': .*no steps train nothing: -1 leaves it to the epochs"),
        ("model.pairwise=0.5", r"model\.pairwise is for model\.task = 'relevance'; with 'next_item' it does nothing"),
        (
            "fusion={pairwise=0.25}",
            r"fusion\.pairwise is for model\.task = 'relevance'; with 'next_item' it does nothing",
        ),
        ("model={task='relevance', history='text'}", r"model\.history is for model\.task = 'next_item'"),
        ("adapter={recipe='none', r=4}", "recipe is 'none', and r would be of an adapter"),
        ("data={split='temporal'}", r"name a data set \(name\), or give a file \(interactions\)"),
    ],
)
def test_mistakes_are_named(file, override, message):
    with pytest.raises(RecllmError, match=message):
        load_run(file, [override])


def test_a_folder_that_spells_out_a_former_default_of_the_other_task_is_read(file, tmp_path):
    run = load_run(file, ["model.task=relevance", f"output={tmp_path}"])
    run.folder.mkdir(parents=True)
    write_run(run, run.folder / "run.toml")
    text = (run.folder / "run.toml").read_text(encoding="utf-8")
    head, fusion = text.split("[fusion]")
    assert "\nqueries = 5000\n" in fusion
    for queries, read in ((2000, True), (500, False)):
        own = fusion.replace("\nqueries = 5000\n", f"\nqueries = {queries}\n").replace("\nnew_queries = 2000\n", "\n")
        (run.folder / "run.toml").write_text(f"{head}[fusion]{own}", encoding="utf-8")
        if read:
            assert load_run(run.folder).fusion.queries == queries
            continue
        with pytest.raises(RecllmError, match=r"fusion\.queries is for model\.task = 'next_item'"):
            load_run(run.folder)


def test_a_file_of_interactions_needs_no_name_beside_it(file):
    run = load_run(file, ["data={interactions='log.csv', items='films.csv'}"])
    assert (run.data.name, run.data.interactions) == ("", "log.csv")


def test_a_missing_data_table_is_named(tmp_path):
    (tmp_path / "run.toml").write_text("seed = 1\n", encoding="utf-8")
    with pytest.raises(RecllmError, match=r"run\.toml: key 'data': Field required"):
        load_run(tmp_path)


def test_no_file_and_no_toml(tmp_path):
    with pytest.raises(
        RecllmError, match=r"There is no run file '.*x\.toml'\. Write one .*`recllm quickstart` write one"
    ):
        load_run(tmp_path / "x.toml")
    (tmp_path / "x.toml").write_text("[data\n", encoding="utf-8")
    with pytest.raises(RecllmError, match=r"x\.toml is not valid TOML: .*line 1"):
        load_run(tmp_path / "x.toml")


def test_the_resolved_file_is_read_back_equal(file, tmp_path):
    run = load_run(file, ['name=with "quotes"', "data.item_columns.title=a\\tb"])
    write_run(run, tmp_path / "deep" / "run.toml")
    again = load_run(tmp_path / "deep" / "run.toml")
    assert again == run
    assert again.train.trainer_keys() == run.train.trainer_keys()
    assert again.adapter.overrides() == run.adapter.overrides()
    moved = load_run(tmp_path / "deep")
    assert moved.folder == tmp_path / "deep"
    assert moved == run.model_copy(update={"name": "deep", "output": str(tmp_path)})


def test_a_folder_is_read_where_it_lies_now(file, tmp_path, monkeypatch):
    write_run(load_run(file), tmp_path / "here" / "run.toml")
    (tmp_path / "here").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "moved")
    assert load_run(Path("../moved")).folder.resolve() == tmp_path / "moved"
    assert load_run(Path()).folder == tmp_path / "moved"


def test_a_run_that_was_begun_before_runs_knew_of_time_goes_on_without(file, tmp_path):
    run = load_run(file, [f"output={tmp_path}"])
    write_run(run, run.folder / "run.toml")
    own = run.folder / "run.toml"
    text = own.read_text(encoding="utf-8")
    own.write_text(re.sub(r"(as_of|drift|regression) = .*\n", "", text), encoding="utf-8")
    assert load_run(run.folder).neighbours.regression
    assert (load_run(run.folder).recency.drift, load_run(run.folder).recency.as_of) == (32, True)  # not begun
    write_json(run.folder / "environment.json", {})
    begun = load_run(run.folder)
    assert (begun.recency.drift, begun.recency.as_of, begun.neighbours.regression) == (0, False, False)
    assert load_run(own).recency.drift == 0  # by its file as well
    check_resumed(begun)
    own.write_text(text.replace('task = "next_item"', 'task = "relevance"'), encoding="utf-8")
    assert load_run(run.folder).recency.drift == 32  # it says so itself
    own.write_text(re.sub(r"(as_of|drift) = .*\n", "", own.read_text(encoding="utf-8")), encoding="utf-8")
    assert load_run(run.folder).recency.drift == 0  # and is not refused where pairs are judged


@pytest.mark.parametrize("key", ["light.dropout", "train.weight_decay", "adapter.lora_alpha", "train.optim_args.eps"])
@pytest.mark.parametrize("number", ["nan", "-inf"])
def test_numbers_are_finite_in_every_table(key, number, file):
    with pytest.raises(RecllmError, match=rf"key '{key}': a finite number is expected \(given: {number}\)"):
        load_run(file, [f"{key}={number}"])


def test_an_empty_table_is_read_back_as_one(file, tmp_path):
    run = load_run(file, ["train.lr_scheduler_kwargs={}"])
    write_run(run, tmp_path / "back.toml")
    assert load_run(tmp_path / "back.toml") == run


@pytest.mark.parametrize("text", ["a\nb", "a\tb", 'a"b', "a\\b", "é 好", "a\rb", "a\x07b", "\x7f"])
def test_any_text_is_read_back_equal(file, tmp_path, text):
    run = load_run(file)
    run = run.model_copy(update={"name": text, "data": run.data.model_copy(update={"columns": {"user_id": text}})})
    write_run(run, tmp_path / "run.toml")
    assert load_run(tmp_path / "run.toml") == run


def test_keys_that_need_quotes_are_quoted(file, tmp_path):
    run = load_run(file)
    keys = {"a b": 1, "dotted.key": 2.5, 'quoted"': "x", "inner": {"deep er": [{"one": 1}]}}
    run = run.model_copy(update={"adapter": type(run.adapter).model_validate({"recipe": "lora"} | keys)})
    write_run(run, tmp_path / "run.toml")
    assert load_run(tmp_path).adapter.overrides() == keys


def test_every_default_is_spelt_out(file, tmp_path):
    write_run(load_run(file), tmp_path / "run.toml")
    values = tomllib.loads((tmp_path / "run.toml").read_text(encoding="utf-8"))
    assert values["light"]["width"] == load_run(file).light.width
    assert values["seed"] == 0


def test_set_key_makes_tables_that_are_not_there():
    values = {}
    set_key(values, "a.b.c=[1, 2]")
    assert values == {"a": {"b": {"c": [1, 2]}}}


def test_the_environment_is_kept(file, tmp_path):
    run = load_run(file, [f"output={tmp_path}", "seed=3"])
    write_environment(run, {"interactions": "abc"}, {"tiny": "0a"}, device="cpu", processes=2)
    facts = json.loads((run.folder / "environment.json").read_text(encoding="utf-8"))
    assert (facts["seed"], facts["data"], facts["device"]) == (3, {"interactions": "abc"}, "cpu")
    assert facts["processes"] == 2
    assert facts["models"] == {"tiny": "0a"}
    assert facts["versions"]["numpy"]


@pytest.mark.parametrize("name", ["", "..", "a/../../b", "/tmp/b"])
def test_a_name_that_leaves_the_output_folder_is_refused(file, name):
    with pytest.raises(RecllmError, match=r"a run's name is the name of its folder"):
        load_run(file, [f"name={name}"])


def test_what_may_have_been_meant_is_named_where_there_is_no_run(tmp_path):
    for name in ("films", "shop"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.toml").touch()
    with pytest.raises(RecllmError, match=r"There is no run file '.*flms'\. Runs in '.*': films, shop\."):
        load_run(tmp_path / "flms")
    bundle = tmp_path / "films" / "bundle-int8"
    bundle.mkdir()
    (bundle / "manifest.json").touch()
    with pytest.raises(RecllmError, match=r"bundle-int8' is a bundle; its run is the folder that it was exported into"):
        load_run(bundle)

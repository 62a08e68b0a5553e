"""Resuming: with the settings, the recipes and the data that a run was begun with, and no others."""

from pathlib import Path

import pytest

from recllm.errors import RecllmError
from recllm.prompts import load_prompt
from recllm.resuming import adapter_is_kept, check_resumed, check_same_data, keep_recipes
from recllm.runs import load_run, write_environment, write_run

TEXT = """
[data]
name = "ml-100k"
[adapter]
recipe = "lora"
r = 4
[train]
max_steps = 7
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "films.toml"
    path.write_text(TEXT, encoding="utf-8")
    return path


def test_a_run_is_resumed_with_the_settings_that_it_was_begun_with(file, tmp_path):
    run = load_run(file, [f"output={tmp_path}"])
    write_run(run, run.folder / "run.toml")
    check_resumed(load_run(file, [f"output={tmp_path}", "fusion.l2=0.5", "export.gate_queries=3"]))
    # What a message about memory advises, and what decides nothing of the weights.
    check_resumed(load_run(file, [f"output={tmp_path}", "train.per_device_eval_batch_size=2", "train.report_to=none"]))
    with pytest.raises(RecllmError, match=r"begun with data.split = leave-last-out, and now it is temporal"):
        check_resumed(load_run(file, [f"output={tmp_path}", "data.split=temporal"]))


@pytest.mark.parametrize("key", ["train.max_steps=9", "adapter.r=2", "model.max_history=9", "model.layers=2"])
@pytest.mark.parametrize("begun", ["checkpoints/lm/checkpoint-4", "checkpoints/relevance/checkpoint-4", "lm/done.json"])
def test_what_the_language_model_reads_may_change_until_it_trains(key, begun, file, tmp_path):
    keys = [f"output={tmp_path}", "model.item_encoder=minilm-l6"]
    run = load_run(file, keys)
    write_run(run, run.folder / "run.toml")
    (run.folder / "checkpoints" / "light" / "checkpoint-4").mkdir(parents=True)
    check_resumed(load_run(file, [*keys, key]))
    for other in ("train.precision=fp32", "model.item_encoder=other", "light.width=64"):
        with pytest.raises(RecllmError, match="was begun with"):
            check_resumed(load_run(file, [*keys, key, other]))
    path = run.folder / begun
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    with pytest.raises(RecllmError, match=rf"was begun with {key.partition('=')[0]}.* Resume with the settings"):
        check_resumed(load_run(file, [*keys, key]))


def test_a_recipe_that_was_mended_before_the_language_model_began_is_read_anew(file, tmp_path):
    mine = tmp_path / "mine.toml"
    mine.write_text('tuner = "lora"\n[config]\nr = 4\n', encoding="utf-8")
    run = load_run(file, [f"output={tmp_path}", f"adapter.recipe={mine}"])
    assert not adapter_is_kept(run)
    keep_recipes(run)
    write_run(run, run.folder / "run.toml")
    assert adapter_is_kept(run)
    assert not adapter_is_kept(load_run(file, [f"output={tmp_path}", "adapter.recipe=dora"]))
    mine.write_text('tuner = "lora"\n[config]\nr = 2\n', encoding="utf-8")
    assert not adapter_is_kept(run)
    (run.folder / "checkpoints" / "lm" / "checkpoint-4").mkdir(parents=True)
    assert adapter_is_kept(run)
    (run.folder / "checkpoints" / "lm" / "checkpoint-4").rmdir()
    mine.unlink()
    assert adapter_is_kept(run)


def test_other_data_than_those_of_the_run_are_refused(file, tmp_path):
    run = load_run(file, [f"output={tmp_path}"])
    check_same_data(run, {"interactions": "a", "catalog": "b"})
    write_environment(run, {"interactions": "a", "catalog": "b"}, {}, device="cpu")
    check_same_data(run, {"interactions": "a", "catalog": "b"})
    with pytest.raises(RecllmError, match=r"The interactions of 'ml-100k' are not those that .*films was trained on"):
        check_same_data(run, {"interactions": "c", "catalog": "b"})


def test_a_run_keeps_its_prompts_and_its_adapter(file, tmp_path):
    mine = tmp_path / "mine.toml"
    mine.write_text('tuner = "lora"\n[config]\nr = 4\n', encoding="utf-8")
    run = load_run(file, [f"output={tmp_path}", f"adapter.recipe={mine}"])
    assert run.adapter_file == str(mine)
    assert run.prompt_file("item") == "item"
    keep_recipes(run)
    mine.write_text('tuner = "lora"\n[config]\nr = 8\n', encoding="utf-8")
    keep_recipes(run)
    assert "r = 4" in Path(run.adapter_file).read_text(encoding="utf-8")
    mine.unlink()
    keep_recipes(run)  # what is kept needs no other file any more
    assert load_prompt(run.prompt_file("item")) == load_prompt("item")
    assert Path(run.prompt_file("next_item")).is_relative_to(run.folder)

"""Training a whole run: what is in its folder, resuming, refusing, and two processes that learn the same."""

import errno
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from recllm import loop, nextitem, train
from recllm.collaborative import load_collaborative
from recllm.commands import profile_flags
from recllm.errors import RecllmError
from recllm.files import only_one, read_json, write_json
from recllm.fusion import Fusion
from recllm.judging import relevance_stage
from recllm.lm import load_base, model_folder
from recllm.preflight import check_names
from recllm.recipes import find_recipe
from recllm.runs import load_run
from recllm.tasks import prepare
from recllm.train import train_run
from recllm.trained import language_history, load_language, load_light, sequence_scorer, stage_done

ROOT = Path(__file__).parents[1]
TREES = [
    "model.task=relevance",
    "model.rows_together=4",
    "model.pairwise=0.3",
    "light.pairwise=0",
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RECLLM_CACHE", str(tmp_path / "cache"))


def silent(_):
    return None


def again(tiny_run, place, *overrides):
    """The tiny run's file with another output folder."""
    return load_run(tiny_run, [f"output={place}", *overrides])


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_what_a_run_leaves_behind(tiny_run):
    run = load_run(tiny_run)
    assert run.folder == tiny_run
    facts = read_json(tiny_run / "environment.json")
    assert facts["seed"] == 0
    assert facts["processes"] == 1
    assert facts["data"] == prepare(run).fingerprints()
    assert {"torch", "transformers", "peft", "numpy"} <= set(facts["versions"])
    assert stage_done(tiny_run / "light")
    assert stage_done(tiny_run / "lm")
    assert not list(tiny_run.rglob("checkpoint-*"))
    assert not list(tiny_run.rglob("*.part*"))
    weights = load_file(tiny_run / "lm" / "model.safetensors")
    assert all("lora_" in name for name in weights if name.startswith("body."))
    assert Fusion.load(tiny_run / "fusion.json").names == (
        "popularity",
        "mf",
        "ease",
        "transitions",
        "text",
        "neighbours",
        "expected_popularity",
        "light",
        "lm",
    )
    assert "lm" not in Fusion.load(tiny_run / "fusion-without-lm.json").names


def test_a_killed_run_goes_on_and_ends_the_same(tiny_run, tmp_path, monkeypatch):
    class Killed(Exception):
        pass

    class Kill(loop.MetricsFile):
        def on_log(self, args, state, control, logs=None, **given):
            super().on_log(args, state, control, logs, **given)
            if self.scorer == "lm" and state.global_step >= 20:
                raise Killed

    run, said = again(tiny_run, tmp_path), []
    with monkeypatch.context() as patch:
        patch.setattr(loop, "MetricsFile", Kill)
        with pytest.raises(Killed):
            train_run(run, say=silent)
    assert stage_done(run.folder / "light")
    assert not stage_done(run.folder / "lm")
    assert list(run.folder.rglob("checkpoint-*"))
    with pytest.raises(RecllmError, match=r"is not empty\. Go on with it by --resume, start anew by --overwrite"):
        train_run(run, say=silent)
    train_run(run, resume=True, say=said.append)
    assert not any("light" in line and line.startswith("Training") for line in said)
    for name in ("light", "lm"):
        ours, theirs = (load_file(place / name / "model.safetensors") for place in (run.folder, tiny_run))
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[key], theirs[key]) for key in ours)
    assert read_json(run.folder / "fusion.json") == read_json(tiny_run / "fusion.json")


def test_a_finished_run_is_not_trained_again(tiny_run, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in tiny_run.rglob("*.safetensors")}
    monkeypatch.setattr(nextitem, "fit", lambda *_, **__: pytest.fail("trained again"))
    train_run(load_run(tiny_run), resume=True, say=silent)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_the_moment_of_a_request_is_learnt_and_a_run_from_before_is_read_without(tiny_run, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "tiny")
    run = again(tiny_run, tmp_path)
    task = prepare(run)
    features = load_collaborative(run, task).features
    asked = [row.query for row in task.split.test]
    now = [replace(query, at=None) for query in asked]
    loaders = {"light": load_light, "lm": load_language}
    for folder, load in loaders.items():
        scorer = sequence_scorer(*load(run, task, features), task, None)
        assert np.abs(scorer.score(asked, task.index) - scorer.score(now, task.index)).max() > 1e-4
        weights = load_file(run.folder / folder / "model.safetensors")
        assert weights.pop("drift.ends").any()
        save_file(weights, run.folder / folder / "model.safetensors")
    file = run.folder / "run.toml"
    kept = [line for line in file.read_text(encoding="utf-8").splitlines() if not line.startswith("drift =")]
    file.write_text("\n".join(kept), encoding="utf-8")
    before = load_run(run.folder)
    assert before.recency.drift == 0
    for load in loaders.values():
        scorer = sequence_scorer(*load(before, task, features), task, None)
        assert np.array_equal(scorer.score(asked, task.index), scorer.score(now, task.index))


def test_merging_keeps_the_scores_of_the_trained_adapter(tiny_run):
    """The merged model and the one with its adapter beside the base weights read a history alike."""
    import torch

    from recllm.trained import adapter_recipe, language_model, load_trained, torch_encode

    run = load_run(tiny_run)
    task = prepare(run)
    features = load_collaborative(run, task).features
    merged, history = load_language(run, task, features)
    apart = language_model(run, task, features, adapter_recipe(run), silent)[0]
    load_trained(apart, tiny_run / "lm" / "model.safetensors")
    ids, ends = history.ids([2, 4, 6, 9])
    given = np.array([ids]), np.array([ends])
    with torch.inference_mode():
        expected = torch_encode(apart)(*given)
    assert torch_encode(merged)(*given) == pytest.approx(expected, abs=1e-5)
    assert not any("lora" in name for name, _ in merged.named_parameters())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.loging_steps=5", r"Unknown key in \[train\] 'loging_steps'. Did you mean 'logging_steps'"),
        ("adapter.lora_alhpa=8", "'lora_alhpa'. Did you mean 'lora_alpha'"),
        ("adapter.recipe=loar", "'loar'. Did you mean 'lora'"),
        ("prompt.next_item=nextitem", "'nextitem'. Did you mean 'next_item'"),
        ("prompt.next_item=item", "is a prompt for the task 'item'; one for 'next_item' is needed"),
        ('export.recipes=["fp31"]', "'fp31'. Did you mean 'fp32'"),
        ("model.name=smollm2-135m-instrukt", "smollm2-135m-instruct"),
    ],
)
def test_a_mistake_is_told_before_any_work(tiny_run, tmp_path, override, message):
    run = again(tiny_run, tmp_path, override)
    with pytest.raises(RecllmError, match=message):
        train_run(run, say=silent)
    assert not run.folder.exists()


def test_an_encoder_is_refused_before_any_work(tiny_run, tiny_encoder_folder, tmp_path):
    run = again(tiny_run, tmp_path, f"model.name={tiny_encoder_folder}")
    with pytest.raises(RecllmError, match=r"is an encoder; next_item needs a causal model"):
        train_run(run, say=silent)
    assert not run.folder.exists()


def test_a_prompt_of_ones_own_that_reads_less_than_the_run_is_told(tiny_run, tmp_path):
    text = find_recipe("prompts", "next_item").read_text(encoding="utf-8")
    own = tmp_path / "own.toml"
    for limit, told in (("max_history = 7", True), ("max_history = 12", False), ("", False)):
        own.write_text(text.replace("max_history = 50", limit), encoding="utf-8")
        lines = []
        run = load_run(tiny_run, [f"prompt.next_item={own}", "model.max_history=12"])
        check_names(run, lines.append)
        said = [line for line in lines if "max_history" in line]
        assert (
            said
            == [f"{own}: max_history = 7 is for previews; the run reads the last 12 items (--set model.max_history=7)"]
            * told
        )


def test_a_mistake_in_the_data_leaves_no_folder_and_an_old_run_as_it_is(tiny_run, tmp_path):
    run = again(tiny_run, tmp_path, "data.min_events=99")
    with pytest.raises(RecllmError, match=r"No user has 99 events"):
        train_run(run, say=silent)
    assert not run.folder.exists()
    shutil.copytree(tiny_run, run.folder, ignore=shutil.ignore_patterns("bundle-*"))
    with pytest.raises(RecllmError, match=r"No user has 99 events"):
        train_run(run, overwrite=True, say=silent)
    with pytest.raises(RecllmError, match=r"'loar'. Did you mean 'lora'"):
        train_run(again(tiny_run, tmp_path, "adapter.recipe=loar"), overwrite=True, say=silent)
    assert (run.folder / "fusion.json").is_file()


def test_keeping_and_deleting_at_once_is_refused(tiny_run, tmp_path):
    with pytest.raises(RecllmError, match=r"--resume keeps what is done and --overwrite deletes it; give one of them"):
        train_run(again(tiny_run, tmp_path), resume=True, overwrite=True, say=silent)


def test_only_a_run_is_overwritten(tiny_run, tmp_path):
    run = again(tiny_run, tmp_path)
    run.folder.mkdir()
    (run.folder / "thesis.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(RecllmError, match=r"is not empty"):
        train_run(run, overwrite=True, say=silent)
    assert (run.folder / "thesis.txt").is_file()


@pytest.mark.parametrize(
    ("keys", "in_vain"),
    [
        ([], False),
        (["model.task=relevance", "model.soft_tokens=true"], False),
        (["model.task=relevance", "model.name=minilm-l6", "adapter.target_modules=['dense']"], True),
    ],
)
def test_what_gets_no_gradient_is_looked_for_by_several_processes(keys, in_vain, tiny_run):
    run = load_run(tiny_run, ["adapter.target_modules=['q_proj']", *keys])
    task = prepare(run)
    features = load_collaborative(load_run(tiny_run), task).features
    stage = (relevance_stage if run.model.task == "relevance" else nextitem.language_stage)(run, task, features, silent)
    assert stage.options(run.folder)["ddp_find_unused_parameters"] is in_vain
    batch = stage.collator([stage.train[row] for row in range(4)])
    stage.model.train()(**batch)["loss"].backward()
    lacking = [name for name, value in stage.model.named_parameters() if value.requires_grad and value.grad is None]
    assert bool(lacking) is in_vain


@pytest.mark.slow
@pytest.mark.parametrize("start", [True, "loftq"])
def test_a_quantised_base_trains_and_is_merged_in_full_precision(start, tiny_run, wide_lm_folder, tmp_path):
    import torch

    from recllm.lm import adapted
    from recllm.trained import adapter_recipe, in_full_precision

    overrides = [f"adapter.init_lora_weights={str(start).lower()}"]
    overrides += [f"model.name={wide_lm_folder}", "adapter.recipe=qlora", "light.num_train_epochs=0"]
    overrides += ["train.learning_rate=1e-3", "train.logging_steps=1", "adapter.lora_dropout=0"]
    run = again(tiny_run, tmp_path, *overrides, "train.max_steps=40", "train.head_learning_rate=2e-3")
    train_run(run, say=silent)
    losses = [line["loss"] for line in metrics(run.folder) if "loss" in line]
    assert losses[-1] < losses[0] - 0.1
    task = prepare(run)
    merged, _ = load_language(run, task, load_collaborative(run, task).features)
    weights = load_file(run.folder / "lm" / "model.safetensors")
    name = "body.model.base_model.model.layers.0.self_attn.q_proj"
    low, high = (torch.from_numpy(weights[f"{name}.lora_{side}.default.weight"]) for side in "AB")
    assert high.abs().max() > 0
    over = adapted(load_base(wide_lm_folder), in_full_precision(adapter_recipe(run)))
    plain = over.base_model.model.layers[0].self_attn.q_proj.base_layer.weight
    rounded = not torch.equal(plain, load_base(wide_lm_folder).model.layers[0].self_attn.q_proj.weight)
    # 4 bits of LoftQ's are not for PEFT to put on the base: the adapter is no use without them.
    assert rounded is (start == "loftq") is not (run.folder / "lm" / "adapter").is_dir()
    layer = merged.body.model.layers[0].self_attn.q_proj
    assert type(layer) is torch.nn.Linear
    update = high @ low * run.adapter.overrides().get("lora_alpha", 32) / run.adapter.overrides()["r"]
    assert torch.allclose(layer.weight, plain + update, atol=1e-6)


def test_steps_beyond_one_pass_read_new_windows(tiny_run, tmp_path):
    run = again(tiny_run, tmp_path, "train.max_steps=9", "light.num_train_epochs=0", "train.num_train_epochs=1")
    train_run(run, say=silent)
    done = read_json(run.folder / "lm" / "done.json")
    assert done["steps"] == 9
    assert done["windows"] >= 9 * run.train.per_device_train_batch_size


def test_a_run_that_stops_early_says_how_far_it_came(tiny_run, tmp_path):
    # Steps of next to nothing change no ranking, so that the second validation is no better than the first one.
    keys = ["train.early_stopping_patience=1", "train.eval_steps=2", "train.save_steps=2", "train.max_steps=12"]
    keys += ["train.learning_rate=0", "train.head_learning_rate=1e-12", "light.num_train_epochs=0"]
    run = again(tiny_run, tmp_path, *keys)
    train_run(run, say=silent)
    done = read_json(run.folder / "lm" / "done.json")
    assert done == {"steps": 4, "windows": 4 * run.train.per_device_train_batch_size}


def test_a_mistake_that_shows_late_costs_nothing_of_what_has_trained(tiny_run, tmp_path):
    run = again(tiny_run, tmp_path, "train.eval_delay=100", "train.max_steps=4", "light.num_train_epochs=1")
    with pytest.raises(
        RecllmError, match=r"train.eval_delay = 100 leaves no validation in the 4 steps of 'lm'.*Lower it"
    ):
        train_run(run, say=silent)
    light = run.folder / "light" / "model.safetensors"
    before = light.stat().st_mtime_ns
    # What an attempt with other settings was mended by is none of these ones'.
    note = run.folder / "checkpoints" / "lm" / "adjusted.json"
    note.parent.mkdir(parents=True, exist_ok=True)
    note.write_text('{"rate": 0.5, "parts": 16, "valid_parts": 1}', encoding="utf-8")
    with pytest.raises(RecllmError, match="lroa"):
        train_run(again(tiny_run, tmp_path, "adapter={recipe='lroa'}", "light.num_train_epochs=1"), resume=True)
    assert (run.folder / "recipes" / "adapter.toml").is_file()
    keys = ["train.max_steps=4", "train.logging_steps=1", "adapter={recipe='ln_tuning'}"]
    mended = again(tiny_run, tmp_path, *keys, "light.num_train_epochs=1")
    train_run(mended, resume=True, say=silent)
    assert light.stat().st_mtime_ns == before
    assert load_run(run.folder) == mended
    assert 'tuner = "ln_tuning"' in Path(mended.adapter_file).read_text(encoding="utf-8")
    assert not any("lora" in name for name in load_file(run.folder / "lm" / "model.safetensors"))
    rates = [
        line["learning_rate"] for line in metrics(run.folder) if line["scorer"] == "lm" and "learning_rate" in line
    ]
    assert max(rates) > 0.6 * mended.train.head_learning_rate
    with pytest.raises(RecllmError, match=r"was begun with train.max_steps = 4"):
        train_run(again(tiny_run, tmp_path, *keys, "light.num_train_epochs=1", "train.max_steps=5"), resume=True)


def test_what_a_training_was_mended_by_goes_with_its_own_settings_only(tiny_run, tmp_path):
    mine = tmp_path / "mine.toml"
    mine.write_text('tuner = "ln_tuning"\n', encoding="utf-8")
    keys = ["train.max_steps=2", "light.num_train_epochs=0", f"adapter={{recipe='{mine}'}}"]
    note = tmp_path / "tiny" / "checkpoints" / "lm" / "adjusted.json"
    late = [*keys, "train.eval_delay=100"]
    with pytest.raises(RecllmError, match=r"train.eval_delay = 100"):
        train_run(again(tiny_run, tmp_path, *late), say=silent)

    def mended(*overrides, **changed):
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text('{"rate": 0.5, "parts": 1, "valid_parts": 1}', encoding="utf-8")
        run = again(tiny_run, tmp_path, *late, *overrides).model_copy(update=changed)
        with pytest.raises(RecllmError, match=r"train.eval_delay = "):
            train_run(run, resume=True, say=silent)
        return note.is_file()

    assert mended()
    assert mended(output=f"{tmp_path}/./")
    assert mended("export.gate_queries=3", "fusion.kinds=['plain sum']", "train.per_device_eval_batch_size=4")
    assert not mended("train.eval_delay=101")
    assert mended("train.eval_delay=101")
    mine.write_text('tuner = "ln_tuning"\n[config]\n', encoding="utf-8")
    assert not mended("train.eval_delay=101")


def test_a_run_whose_file_cannot_be_read_any_more_is_overwritten(tiny_run, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "tiny")
    (tmp_path / "tiny" / "lm" / "done.json").unlink()
    file = tmp_path / "tiny" / "run.toml"
    file.write_text("key_of_an_older_version = 1\n" + file.read_text(encoding="utf-8"), encoding="utf-8")
    run = again(tiny_run, tmp_path, "train.max_steps=1", "light.num_train_epochs=0")
    train_run(run, overwrite=True, say=silent)
    assert load_run(run.folder) == run


def test_figures_of_another_fusion_do_not_stay(tiny_run, tmp_path):
    folder = tmp_path / "tiny"
    shutil.copytree(tiny_run, folder)
    names = ["evaluation.json", "evaluation.html", "evaluation-valid.html"]
    for name in names:
        (folder / name).write_text("{}", encoding="utf-8")
    train_run(load_run(folder), resume=True, say=silent)  # nothing changes
    assert all((folder / name).is_file() for name in names)
    train_run(load_run(folder, ["fusion.kinds=['plain sum']"]), resume=True, say=silent)
    assert not [name for name in names if (folder / name).is_file()]


def test_a_training_that_was_launched_tells_a_full_disk_without_a_traceback(tiny_run, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left")

    monkeypatch.setattr(train, "train_run", full)
    with pytest.raises(SystemExit) as stopped:
        train.main([str(tiny_run), "--resume"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("Error: the disk is full")
    monkeypatch.setattr(train, "train_run", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # a bug is not hidden
        train.main([str(tiny_run), "--resume"])


def test_two_trainings_in_one_folder_are_refused(tiny_run, tmp_path):
    folder = tmp_path / "tiny"
    shutil.copytree(tiny_run, folder)
    with only_one(folder) as free:
        assert free
        for keys in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(RecllmError, match=r"Another process is training in .*tiny"):
                train_run(load_run(folder), say=silent, **keys)
    train_run(load_run(folder), resume=True, say=silent)


def test_a_folder_is_held_from_before_it_is_begun(tiny_run, tmp_path, monkeypatch):
    def looked_at(*_, **__):
        with only_one(tmp_path / "new") as free:
            assert not free
        raise RecllmError("the data are wrong")

    monkeypatch.setattr(train, "prepare", looked_at)
    with pytest.raises(RecllmError, match="the data are wrong"):
        train_run(load_run(tiny_run, [f"output={tmp_path}", "name=new"]), say=silent)
    assert list(tmp_path.iterdir()) == []  # nothing has begun


@pytest.mark.parametrize("kills", range(5))
def test_killed_while_a_run_is_deleted_the_folder_is_still_that_runs(kills, tiny_run, tmp_path, monkeypatch):
    folder, left = tmp_path / "tiny", iter(range(kills))
    shutil.copytree(tiny_run, folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def killed(path, **_):
        if next(left, None) is None:
            raise KeyboardInterrupt
        remove(path)

    remove = shutil.rmtree
    with monkeypatch.context() as patch:
        patch.setattr("recllm.train.shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            train_run(load_run(folder, ["seed=5"]), overwrite=True, say=silent)
    assert (folder / "run.toml").read_bytes() == before[folder / "run.toml"]
    for stage in (path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(train.GONE)):
        assert all(path.read_bytes() == before[path] for path in before if path.is_relative_to(stage))
    with pytest.raises(RecllmError, match=r"was begun with seed = 0, and now it is 5"):
        train_run(load_run(folder, ["seed=5"]), resume=True, say=silent)
    if kills == 4:
        train_run(load_run(folder), resume=True, say=silent)
        now = {path.name for path in folder.iterdir()}
        assert now >= {"cf", "scores", "light", "lm", "run.toml", "environment.json", "fusion.json"}
        assert not any(name.startswith(train.GONE) for name in now)
        for name in ("light", "lm"):
            path = folder / name / "done.json"
            assert path.is_file()


def test_a_history_that_the_model_cannot_read_is_refused(tiny_run, tmp_path):
    run = again(tiny_run, tmp_path, "model.max_history=5000", "light.num_train_epochs=0")
    with pytest.raises(
        RecllmError, match=r"max_history is 5000, and '.*' reads 512 tokens, .* --set model.max_history="
    ):
        train_run(run, say=silent)


@pytest.mark.parametrize(("keys", "stride"), [([], 6), (["max_history=1"], 1), (["max_history=50"], 10)])
def test_by_default_at_least_half_of_what_may_be_read_is(keys, stride, tiny_run):
    run = load_run(tiny_run, [f"model.{key}" for key in keys])
    history = language_history(run, prepare(run), load_base(model_folder(run.model.name)))
    assert (history.limit, history.stride) == (run.model.max_history, stride)


def test_a_judge_that_reads_no_more_than_its_prompt_says_tells_so(tiny_run):
    for limit, told in ((29, False), (31, True), (50, False)):  # 50 is the default, which asks for nothing
        run = load_run(tiny_run, [f"model.max_history={limit}", "model.task=relevance"])
        lines = []
        check_names(run, lines.append)
        assert [line.startswith("model.max_history = 31 is cut to 30") for line in lines] == [True] * told


def test_an_item_that_the_model_cannot_read_is_refused(tiny_run, tmp_path):
    own = tmp_path / "own.toml"
    own.write_text(
        'task = "next_item"\ntext = "Items: {history}"\nmax_item_tokens = 5000\n'
        f'item = "{" ".join(["{title}"] * 600)}"\n',
        encoding="utf-8",
    )
    overrides = ["model.history=text", f"prompt.next_item={own}", "light.num_train_epochs=0", "model.max_history=4"]
    with pytest.raises(
        RecllmError, match=r"reads 512 tokens, and the longest item alone, .*\d+ more.*lower max_item_tokens \(5000"
    ):
        train_run(again(tiny_run, tmp_path, *overrides), say=silent)


def test_a_run_without_sequence_models(tiny_run, tiny_encoder_folder, tmp_path):
    overrides = ["model.name=none", f"model.item_encoder={tiny_encoder_folder}", "light.num_train_epochs=0"]
    run = again(tiny_run, tmp_path, *overrides, "ease.max_items=0", "transitions.max_items=0")
    said = []
    train_run(run, say=said.append)
    assert Fusion.load(run.folder / "fusion.json").names == (
        "popularity",
        "mf",
        "text",
        "neighbours",
        "expected_popularity",
    )
    assert not any(line.startswith("Left out") for line in said)  # 0 asks for none
    assert not (run.folder / "fusion-without-lm.json").exists()
    train_run(run, overwrite=True, say=silent)
    small = again(tiny_run, tmp_path, *overrides, "name=small", "ease.max_items=23", "transitions.max_items=23")
    train_run(small, say=said.append)
    items = len(prepare(small).index)
    assert [line for line in said if line.startswith("Left out")] == [
        f"Left out: '{name}', for {items} items are more than {name}.max_items = 23" for name in ("ease", "transitions")
    ]
    # Another fusion on the way is what the folder says from then on.
    train_run(
        again(tiny_run, tmp_path, *overrides, "fusion.kinds=['borda']", "ease.max_items=0", "transitions.max_items=0"),
        resume=True,
        say=silent,
    )
    assert load_run(run.folder).fusion.kinds == ("borda",)
    train_run(load_run(run.folder), resume=True, say=silent)
    assert Fusion.load(run.folder / "fusion.json").chosen == "borda"


def test_histories_as_text_train_too(tiny_run, tmp_path):
    run = again(tiny_run, tmp_path, "model.history=text", "train.max_steps=4", "light.num_train_epochs=0")
    train_run(run, say=silent)
    figures = [line["loss"] for line in metrics(run.folder) if "train_loss" not in line and "loss" in line]
    assert all(np.isfinite(figures))
    assert "lm" in Fusion.load(run.folder / "fusion.json").names


def test_the_module_says_what_is_wrong_and_exits_with_2(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        train.main([str(tmp_path / "no.toml")])
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith(f"Error: There is no run file '{tmp_path / 'no.toml'}'")


def test_another_number_of_processes_is_refused_where_checkpoints_are(tiny_run, tmp_path, monkeypatch):
    run = again(tiny_run, tmp_path)
    shutil.copytree(tiny_run, run.folder)
    facts = read_json(run.folder / "environment.json")
    write_json(run.folder / "environment.json", facts | {"processes": 2})
    train_run(run, resume=True, say=silent)  # it is finished: nothing depends on them any more
    (run.folder / "checkpoints" / "lm" / "checkpoint-3").mkdir(parents=True)
    with pytest.raises(RecllmError, match=r"checkpoints of a training with 2 processes, and now there is 1\. Go on"):
        train_run(run, resume=True, say=silent)
    write_json(run.folder / "environment.json", facts | {"processes": 2, "sharding": "zero3"})
    with pytest.raises(RecllmError, match="a training with the sharding 'zero3', and now it is 'none'"):
        train_run(run, resume=True, say=silent)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    monkeypatch.setattr("recllm.train.check_shardable", lambda *_, **__: None)  # as where there are accelerators
    with pytest.raises(RecllmError, match=r"--resume --profile zero3 -- --num_processes 2\)"):
        train_run(run, resume=True, say=silent)


def test_a_run_without_checkpoints_goes_on_with_any_number_of_processes_and_keeps_it(tiny_run, tmp_path):
    run = again(tiny_run, tmp_path)
    shutil.copytree(tiny_run, run.folder)
    facts = read_json(run.folder / "environment.json")

    def begun(processes):
        train._begin(run, prepare(run), overwrite=False, processes=processes, say=silent)
        return read_json(run.folder / "environment.json")

    assert begun(2) == facts  # it is finished, by one
    (run.folder / "lm" / "done.json").unlink()
    assert begun(2) == facts | {"processes": 2}
    (run.folder / "checkpoints" / "lm" / "checkpoint-3").mkdir(parents=True)
    assert begun(1) == facts | {"processes": 2}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("own", "accumulated", "scorers"),
    [
        ([], 1, {"light": (4, 0.1), "lm": (8, 0.1)}),  # windows of like length stand together by devices' rows at once
        (TREES, 2, {"light": (4, 0.1), "relevance": (15, 0.03)}),
    ],
    ids=["next item", "pairs behind one history"],
)
def test_two_processes_reach_the_losses_of_one_at_equal_global_batch(own, accumulated, scorers, tiny_run, tmp_path):
    without_dropout = [
        *own,
        "light.dropout=0",
        "light.factor_dropout=0",
        "model.factor_dropout=0",
        "adapter.lora_dropout=0",
        "train.logging_steps=1",
        "light.num_train_epochs=9",  # 45 steps, logged at every tenth
        "train.num_train_epochs=3",
    ]
    one = again(tiny_run, tmp_path / "one", *without_dropout, "light.per_device_train_batch_size=8")
    train_run(one, say=silent)
    halves = [
        f"output={tmp_path / 'two'}",
        *without_dropout,
        "light.per_device_train_batch_size=4",
        *(["light.pairs_in_step=64"] if own else []),
        f"train.per_device_train_batch_size={8 // accumulated}",
        f"train.gradient_accumulation_steps={accumulated}",
    ]
    launch = [sys.executable, "-m", "accelerate.commands.launch", *profile_flags("cpu")]
    settings = [part for override in halves for part in ("--set", override)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [*launch, "-m", "recllm.train", str(tiny_run), *settings],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    two = tmp_path / "two" / "tiny"
    assert read_json(two / "environment.json")["processes"] == 2
    assert "find_unused_parameters" not in done.stderr
    for scorer, (logged, learnt) in scorers.items():
        ours, theirs = (
            {line["step"]: line["loss"] for line in metrics(folder) if line["scorer"] == scorer and "loss" in line}
            for folder in (one.folder, two)
        )
        assert len(ours) == logged
        assert theirs == pytest.approx(ours, abs=1e-3)
        assert ours[max(ours)] < ours[min(ours)] - learnt
    assert len([line for line in done.stdout.splitlines() if line.startswith("Fitting the fusion")]) == 1

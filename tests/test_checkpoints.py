"""Checkpoints: one counts when it is sealed, and no older one goes before."""

from types import SimpleNamespace

import pytest

from recllm import checkpoints, loop
from recllm.checkpoints import SEAL, Seal, last_checkpoint, seal
from recllm.collaborative import load_collaborative
from recllm.runs import load_run
from recllm.tasks import prepare


@pytest.fixture
def saved(tmp_path):
    """Three checkpoints, the last one as Trainer leaves it, without a seal."""
    for step in (4, 8, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "model.safetensors").write_bytes(b"weights")
        if step < 12:
            seal(tmp_path / f"checkpoint-{step}")
    best = str(tmp_path / "checkpoint-4")
    return tmp_path, SimpleNamespace(global_step=12, is_world_process_zero=True, best_model_checkpoint=best)


def names(folder):
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def test_older_checkpoints_go_behind_the_seal_and_the_best_one_stays(saved):
    folder, state = saved
    Seal(2).on_save(SimpleNamespace(output_dir=folder), state, None)
    assert names(folder) == ["checkpoint-12", "checkpoint-4"]
    assert (folder / "checkpoint-12" / SEAL).is_file()


def test_killed_while_a_checkpoint_is_sealed_the_one_before_it_is_there(saved, monkeypatch):
    folder, state = saved

    def killed(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "seal", killed)
    with pytest.raises(KeyboardInterrupt):
        Seal(1).on_save(SimpleNamespace(output_dir=folder), state, None)
    assert last_checkpoint(folder) == str(folder / "checkpoint-8")


def test_trainer_deletes_none_itself(tiny_run, tmp_path):
    from recllm.nextitem import light_stage

    run = load_run(tiny_run)
    task = prepare(run)
    stage = light_stage(run, task, load_collaborative(run, task).features)
    trainer = loop.stage_trainer(stage, stage.options(tmp_path / "checkpoints"), [], tmp_path / "kept")
    assert trainer.args.save_total_limit is None
    assert [own.most for own in trainer.callback_handler.callbacks if isinstance(own, Seal)] == [2]


def test_the_last_checkpoint_is_that_of_the_highest_step(tmp_path):
    for step in (10, 9):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "weights").write_text("x", encoding="utf-8")
        seal(tmp_path / f"checkpoint-{step}")
    assert str(last_checkpoint(tmp_path)).endswith("checkpoint-10")


def test_a_copy_that_somebody_made_is_no_checkpoint(saved):
    folder, _ = saved
    (folder / "checkpoint-8.bak").mkdir()
    assert last_checkpoint(folder) == str(folder / "checkpoint-8")
    assert names(folder) == ["checkpoint-4", "checkpoint-8", "checkpoint-8.bak"]


def test_no_process_lists_the_checkpoints_while_one_of_them_goes(saved, monkeypatch):
    """One that saw half of it would wait for the others behind it, alone."""
    folder, _ = saved
    seen = []
    wait = SimpleNamespace(wait_for_everyone=lambda: seen.append(names(folder)), is_main_process=True)
    monkeypatch.setattr(checkpoints, "process_state", lambda: wait)
    last_checkpoint(folder)
    assert seen == [["checkpoint-12", "checkpoint-4", "checkpoint-8"], ["checkpoint-4", "checkpoint-8"]]

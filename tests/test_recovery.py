"""Recovery: what training changes to go on, from where it goes on, and what it says where it cannot."""

import logging
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch
from transformers.utils import logging as hf_logging

from recllm import recovery
from recllm.errors import RecllmError
from recllm.files import read_json, write_json
from recllm.recovery import ADJUSTED, UNCHANGED, Adjusted, divided, train_on
from recllm.watching import NonFiniteLossError


@pytest.fixture
def attempts(tmp_path, monkeypatch):
    """Trains a model of one weight, each attempt adding 1 to it before it ends as told."""
    monkeypatch.setattr(recovery.gc, "collect", lambda: 0)  # it goes through all that other tests hold
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    seen = []

    def run(*ends, resume=False, fsdp=False, validating=False):
        left = iter(ends)

        def trainer(adjusted):
            def train(resume_from_checkpoint=None):
                seen.append((adjusted, float(model.weight.detach())))
                with torch.no_grad():
                    model.weight += 1.0
                if (error := next(left, None)) is not None:
                    raise error

            args = SimpleNamespace(per_device_train_batch_size=8 // adjusted.parts, per_device_eval_batch_size=8)
            args.gradient_accumulation_steps = 1
            made = SimpleNamespace(train=train, ended=lambda _: False, args=args, state=SimpleNamespace(global_step=7))
            made.is_fsdp_enabled, made.validating = fsdp, validating
            return made

        folder = tmp_path / "checkpoints"
        folder.mkdir(exist_ok=True)
        kept = tmp_path / "no-number"
        train_on(trainer, model, folder, kept=kept, scorer="lm", resume=resume, say=lambda _: None)
        return seen

    return run


NO_NUMBER = NonFiniteLossError("loss", float("nan"), 3)
NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory.")


@pytest.mark.parametrize(
    ("error", "adjusted"), [(NO_NUMBER, Adjusted(rate=0.5)), (NO_MEMORY, Adjusted(parts=2))], ids=["loss", "memory"]
)
def test_without_a_checkpoint_training_goes_back_to_where_it_began(error, adjusted, attempts, tmp_path):
    assert attempts(error) == [(UNCHANGED, 0.0), (adjusted, 0.0)]
    assert Adjusted(**read_json(tmp_path / "checkpoints" / ADJUSTED)) == adjusted


def test_only_a_resumed_training_takes_over_what_was_changed(attempts, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    write_json(tmp_path / "checkpoints" / ADJUSTED, {"rate": 0.5, "parts": 4, "valid_parts": 2})
    assert [adjusted for adjusted, _ in attempts()] == [UNCHANGED]
    assert [adjusted for adjusted, _ in attempts(resume=True)][1:] == [Adjusted(0.5, 4, 2)]


def test_what_is_neither_of_both_is_not_tried_again(attempts):
    with pytest.raises(ValueError, match="no batch"):
        attempts(ValueError("no batch"))
    with pytest.raises(RuntimeError, match="no device"):
        attempts(RuntimeError("no device"), validating=True)


def test_what_is_sharded_keeps_what_was_changed_for_the_next_start(attempts, tmp_path):
    with pytest.raises(RecllmError, match=r"FSDP has sharded cannot go back by itself\. .*again with --resume"):
        attempts(NO_NUMBER, fsdp=True)
    assert read_json(tmp_path / "checkpoints" / ADJUSTED)["rate"] == 0.5


def test_the_batch_that_is_named_is_that_of_the_step(attempts, tmp_path):
    for step in (1, 3, 31):
        (tmp_path / f"no-number-step-{step}-process-0.safetensors").touch()
    with pytest.raises(RecllmError, match=r"at step 3, at half .* kept as \S*no-number-step-3-process-0\.safetensors"):
        attempts(NO_NUMBER, NO_NUMBER)


def test_a_batch_is_divided_beside_the_batches_that_make_a_step():
    given = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 3, "per_device_eval_batch_size": 16}
    assert divided(given, UNCHANGED) == given
    assert list(divided(given, Adjusted(parts=2)).values()) == [4, 6, 8]
    assert list(divided(given, Adjusted(valid_parts=2)).values()) == [8, 3, 8]
    assert list(divided(given, Adjusted(parts=2, valid_parts=4)).values()) == [4, 6, 2]
    assert list(divided(given, Adjusted(parts=8, valid_parts=4)).values()) == [1, 24, 1]  # one row is the least


@pytest.mark.parametrize(
    ("scorer", "ways"),
    [
        (
            "lm",
            r"\(--set train\.per_device_train_batch_size=4 --set train\.gradient_accumulation_steps=8\)",
        ),
        (
            "light",
            r"\(--set light\.per_device_train_batch_size=4, or light\.pairs_in_step where pairs are judged, "
            r"and begin anew by --overwrite\)",
        ),
    ],
)
def test_several_processes_are_told_to_take_fewer_rows(scorer, ways, monkeypatch):
    monkeypatch.setattr(recovery, "process_state", lambda: SimpleNamespace(num_processes=2))
    with pytest.raises(RecllmError, match=rf"with 8 rows at once on a device\. Take fewer {ways}: with several"):
        recovery._smaller(UNCHANGED, 8, 4, scorer, pytest.fail)
    with pytest.raises(RecllmError, match="with a single row"):
        recovery._smaller(UNCHANGED, 1, 4, scorer, pytest.fail)
    with pytest.raises(RecllmError, match="validating a single row"):
        recovery._smaller_validation(UNCHANGED, 1, scorer, pytest.fail)


@pytest.mark.parametrize(
    ("scorer", "ways"),
    [
        ("lm", r"fewer \(--set train\.per_device_eval_batch_size=4\)"),
        ("light", r"shorter histories \(light\.max_history\) or a smaller light\.width"),
    ],
)
def test_several_processes_are_told_to_validate_fewer_rows(scorer, ways, monkeypatch):
    monkeypatch.setattr(recovery, "process_state", lambda: SimpleNamespace(num_processes=2))
    with pytest.raises(RecllmError, match=rf"validating 8 rows at once on a device\. Take {ways}: with several"):
        recovery._smaller_validation(UNCHANGED, 8, scorer, pytest.fail)


@pytest.mark.parametrize(("adjusted", "within"), [(UNCHANGED, logging.INFO), (Adjusted(parts=2), logging.ERROR)])
def test_warnings_are_heard_again_after_an_attempt_that_failed(adjusted, within, monkeypatch):
    rotation, told = logging.getLogger("transformers.trainer_utils"), []
    for logger in (rotation, logging.getLogger("transformers")):
        monkeypatch.setattr(logger, "level", logging.INFO)
    with suppress(NonFiniteLossError), recovery._quiet_about(adjusted):
        told = [hf_logging.get_verbosity(), rotation.level]
        raise NO_NUMBER
    assert told == [within, logging.ERROR]
    assert [hf_logging.get_verbosity(), rotation.level] == [logging.INFO] * 2

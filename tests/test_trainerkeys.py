"""Trainer's keys in a run file: mistakes are told before anything is read, with the way out."""

import subprocess
import sys

import pytest
from transformers import TrainingArguments

from recllm.errors import RecllmError
from recllm.runs import TrainSettings, load_run
from recllm.train import train_run
from recllm.trainerkeys import MEASURES, check_best, check_options, check_trainer_keys, try_trainer_keys
from recllm.trainernames import written_names


def test_a_misspelt_trainer_key_is_refused_with_the_nearest_right_one():
    check_trainer_keys({"gradient_accumulation_steps": 2, "logging_steps": 5})
    with pytest.raises(RecllmError, match=r"Unknown key in \[train\] 'loging_steps'. Did you mean 'logging_steps'"):
        check_trainer_keys({"loging_steps": 5})
    with pytest.raises(RecllmError, match=r"Unknown key in"):
        check_trainer_keys({"output_dir": "elsewhere"})


@pytest.mark.parametrize("key", ["save_only_model", "label_smoothing_factor", "prediction_loss_only"])
def test_keys_that_do_not_go_with_these_models_are_refused_with_the_reason(key):
    check_trainer_keys({key: 0})
    with pytest.raises(RecllmError, match=rf"train\.{key} is not supported: .*Leave it out"):
        check_trainer_keys({key: 0.1})


def test_a_schedule_that_hangs_on_validations_is_refused():
    with pytest.raises(RecllmError, match=r"'reduce_lr_on_plateau' is not supported.*Take 'cosine' or 'linear'"):
        check_trainer_keys({"lr_scheduler_type": "reduce_lr_on_plateau"})


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"lr_scheduler_type": "greedy"}, "'greedy' is not supported: its rates hang on losses"),
        ({"lr_scheduler_type": "cosin"}, r"train\.lr_scheduler_type 'cosin'\. Did you mean 'cosine'"),
        ({"optim": "adamw_troch"}, r"train\.optim 'adamw_troch'\. Did you mean 'adamw_torch"),
        ({"gradient_accumulation_steps": 0}, "at least 1 is expected, so many batches make a step"),
        ({"ignore_data_skip": True}, "would read other rows, and end elsewhere"),
        ({"auto_find_batch_size": True}, "halved here, with the same rows in a step"),
        ({"eval_do_concat_batches": False}, "the metrics are of all rows together"),
        ({"train_sampling_strategy": "group_by_length"}, "rows come in the order of the seed"),
        ({"eval_steps": 5, "save_steps": 10}, "would have no checkpoint to go back to"),
        ({"gradient_accumulation_steps": "two"}, "= 'two': a whole number of at least 1 is expected, so many batches"),
        ({"gradient_accumulation_steps": 2.5}, "= 2.5: a whole number of at least 1"),
        ({"gradient_accumulation_steps": 2.0}, "= 2.0: a whole number of at least 1"),
        ({"per_device_eval_batch_size": True}, "= True: a whole number of at least 1"),
        ({"eval_accumulation_steps": 0}, "= 0: a whole number of at least 1"),
        ({"log_level": "wrning"}, r"train\.log_level 'wrning'\. Did you mean 'warning'"),
        ({"bf16_full_eval": True}, "validation is in the precision of training"),
        ({"per_device_eval_batch_size": 0}, "so many rows are validated at once"),
        ({"eval_steps": 0}, r"train\.eval_steps = 0: so many steps are expected"),
        ({"logging_steps": True}, r"train\.logging_steps = True: so many steps are expected"),
        ({"weight_decay": "abc"}, r"train\.weight_decay = 'abc': a number of at least 0"),
        ({"max_grad_norm": -1}, r"train\.max_grad_norm = -1: a number of at least 0"),
        ({"eval_delay": -1}, r"train\.eval_delay = -1: a number of at least 0"),
        ({"save_steps": -1}, r"train\.save_steps = -1: so many steps are expected"),
        ({"lr_scheduler_type": "Reduce_LR_on_Plateau"}, "is not supported: its rates hang on losses"),
        ({"dataloader_drop_last": True}, "it would leave out rows of validation"),
        ({"bf16": True}, "train.precision says it"),
        ({"seed": 0}, "the run's one seed"),
        ({"push_to_hub": True}, "a run is pushed when it is trained"),
        ({"resume_from_checkpoint": "x"}, "--resume goes on"),
        ({"report_to": 5}, r"train\.report_to = 5: a name or a list of names"),
    ],
)
def test_values_that_do_not_go_are_refused_before_anything_loads(keys, message):
    with pytest.raises(RecllmError, match=message):
        check_trainer_keys(keys)


def test_values_that_go_are_taken():
    check_trainer_keys({"lr_scheduler_type": "constant_with_warmup", "optim": "adamw_torch", "eval_steps": 0.2})
    check_trainer_keys({"weight_decay": 0, "max_grad_norm": 0.5, "logging_steps": 1, "dataloader_drop_last": False})
    check_trainer_keys({"train_sampling_strategy": "sequential", "save_steps": 5, "eval_delay": 0})
    check_trainer_keys({"ignore_data_skip": False, "eval_do_concat_batches": True, "gradient_accumulation_steps": 2})


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "refuses the optimizer or schedule"),
        ({"lr_scheduler_kwargs": {"a": 1}}, "refuses the optimizer or schedule .*'a'"),
        ({"optim": "galore_adamw"}, "refuses the optimizer or schedule .*[Gg]a[Ll]ore"),
        ({"eval_strategy": "epoch"}, r"train\.eval_strategy = 'epoch' is not supported"),
        ({"save_strategy": "no"}, r"train\.save_strategy = 'no' leaves no validation"),
        ({"metric_for_best_model": "auc"}, r"Unknown train\.metric_for_best_model 'auc'"),
        ({"lr_scheduler_type": "nothing"}, "Trainer refuses the keys"),
    ],
)
def test_what_trainer_would_find_later_is_found_at_once(keys, message):
    with pytest.raises(RecllmError, match=message):
        try_trainer_keys(keys, MEASURES["next_item"], None)


def test_what_trainer_takes_is_taken():
    keys = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-5}, "optim": "adafactor"}
    keys |= {"gradient_checkpointing": True, "torch_compile": True, "eval_strategy": "no", "report_to": "tensorboard"}
    try_trainer_keys(keys | {"load_best_model_at_end": False}, MEASURES["next_item"], None)
    try_trainer_keys({"load_best_model_at_end": True, "save_steps": 7}, MEASURES["next_item"], None)
    schedule = {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 1e-4}}
    try_trainer_keys(schedule | {"learning_rate": 1e-3}, MEASURES["next_item"], None)
    check_trainer_keys({"fsdp": "", "deepspeed": None})
    for name in ("auc", "eval_auc", "loss", "eval_loss"):
        try_trainer_keys({"metric_for_best_model": name}, MEASURES["relevance"], 3)


@pytest.mark.parametrize("key", ["eval_strategy", "save_strategy"])
def test_without_validations_there_is_no_best_step_and_no_patience(key):
    keys = {key: "no", "load_best_model_at_end": False}
    check_best(keys, MEASURES["relevance"], None)
    for given, patience in ((keys, 2), ({key: "no"}, None)):
        with pytest.raises(RecllmError, match=rf"train\.{key} = 'no' leaves no validation and checkpoint"):
            check_best(given, MEASURES["relevance"], patience)


def test_a_mistake_for_the_language_model_leaves_no_folder(tiny_run, tmp_path):
    run = load_run(tiny_run, ["name=wrong", f"output={tmp_path}", "train.eval_strategy=epoch"])
    with pytest.raises(RecllmError, match=r"train\.eval_strategy = 'epoch'"):
        train_run(run, say=lambda _: None)
    assert not run.folder.exists()
    # Nobody reads it where no language model trains.
    check_options(load_run(tiny_run, ["model.name=none", "model.item_encoder=minilm-l6", "train.eval_strategy=epoch"]))


def test_what_does_not_ask_for_half_precision_leaves_it_to_precision():
    settings = TrainSettings(precision="bf16", bf16=False, fp16=False, weight_decay=0)
    assert settings.trainer_keys() == {"weight_decay": 0}


def test_the_names_read_from_the_source_of_transformers_are_those_of_trainers_arguments():
    assert written_names() == set(TrainingArguments.__dataclass_fields__)


def test_a_misspelt_key_is_told_before_anything_heavy_is_loaded(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('name = "films"\n[data]\nname = "ml-100k"\n[train]\nlerning_rate = 1e-4\n')
    code = (
        "import sys\nfrom recllm.cli import main\n"
        f"try:\n    main(['train', {str(path)!r}, *sys.argv[1:]])\n"
        "finally:\n    print(sorted({'torch', 'transformers'} & set(sys.modules)))\n"
    )
    for options in ([], ["--dry-run"], ["--", "--cpu"]):
        done = subprocess.run([sys.executable, "-c", code, *options], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout.strip()) == (2, "[]")
        assert "Unknown key in [train] 'lerning_rate'. Did you mean 'learning_rate'?" in done.stderr

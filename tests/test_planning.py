"""The plan of a run: tokens and steps are those of the training that follows, and nothing is written."""

import pytest
import torch

from recllm import planning
from recllm.collaborative import load_collaborative
from recllm.errors import RecllmError
from recllm.examples import lengths_of
from recllm.judging import relevance_stage
from recllm.loop import fit
from recllm.nextitem import language_stage
from recllm.planning import Cost, Plan, measure, peak_memory, plan_run
from recllm.runs import load_run
from recllm.tasks import prepare


def silent(_):
    return None


def again(tiny_run, tmp_path, *overrides):
    return load_run(tiny_run, [f"output={tmp_path}", *overrides])


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model.history='text'", "train.num_train_epochs=2"],
        ["train.max_steps=7", "train.gradient_accumulation_steps=3", "train.per_device_train_batch_size=2"],
    ],
    ids=["items", "text", "accumulated"],
)
def test_tokens_and_steps_are_those_of_the_training(overrides, tiny_run, tmp_path):
    run = again(tiny_run, tmp_path, "light.num_train_epochs=0", *overrides)
    task = prepare(run, silent)
    features = load_collaborative(load_run(tiny_run), task).features
    cost = measure(language_stage(run, task, features, silent), silent)
    stage = language_stage(run, task, features, silent)
    read = []

    def watch(model, _, batch):
        if model.training:
            read.append((int(lengths_of(batch).sum()), batch["ids"].numel()))

    stage.model.register_forward_pre_hook(watch, with_kwargs=True)
    fit(stage, folder=tmp_path / "out", say=silent)
    tokens = sum(tokens for tokens, _ in read)
    assert (cost.tokens, cost.padding) == (tokens, sum(ids for _, ids in read) - tokens)
    micro = stage.arguments.get("gradient_accumulation_steps", 1)
    assert cost.steps == -(-len(read) // micro)
    assert cost.trained == sum(value.numel() for value in stage.model.parameters() if value.requires_grad)
    assert cost.frozen == sum(value.numel() for value in stage.model.parameters() if not value.requires_grad)
    assert cost.seconds > 0


def test_a_plan_shows_what_is_read_and_writes_nothing(tiny_run, tmp_path):
    run = again(tiny_run, tmp_path / "runs", "train.num_train_epochs=1", "light.num_train_epochs=1")
    plan = plan_run(run, silent)
    assert [cost.scorer for cost in plan.costs] == ["light", "lm"]
    assert (plan.users, plan.events, plan.items) == (40, 320, 24)
    assert len(plan.examples) == 3
    for example in plan.examples:
        read, label = example.split("\n→ ")
        assert read.startswith("Items one person chose in order:")
        assert "film" in label
        shown = int(label.split(" film ")[1].split(" ")[0])
        before = int(read.rstrip("]").rsplit(" film ", 1)[1])
        assert shown == (before + 2) % 24  # the checkerboard's order
    assert not (tmp_path / "runs").exists()
    text = "\n".join(plan.lines())
    assert "lm: " in text
    assert " steps, " in text
    rest = f"vectors of 24 items by {run.model.name}, scores of 80 validation and test rows by every scorer, the fusion"
    assert f"Beside that, in none of these times: {rest}" in text
    assert "tokens" in text


def test_a_plan_reads_the_recipe_asked_for_and_not_the_one_of_an_earlier_training(tiny_run):
    overrides = ["adapter={recipe='ln_tuning'}", "train.num_train_epochs=1", "light.num_train_epochs=0"]
    run = load_run(tiny_run, overrides)
    before = sorted(tiny_run.rglob("*"))
    (cost,) = plan_run(run, silent).costs
    assert cost.trained < plan_run(load_run(tiny_run, overrides[1:]), silent).costs[0].trained
    assert sorted(tiny_run.rglob("*")) == before


def test_a_plan_of_adalora_knows_how_long_the_training_is(tiny_run, tmp_path):
    recipe = "adapter={recipe='adalora', init_r=4, target_r=2, tinit=8, tfinal=8}"
    run = again(tiny_run, tmp_path, recipe, "light.num_train_epochs=0", "train.max_steps=40")
    assert plan_run(run, silent).costs[0].steps == 40


@pytest.mark.parametrize("together", [1, 4])
def test_a_plan_of_judging_shows_prompts_with_their_labels(together, tiny_run, tmp_path):
    keys = ["model.task='relevance'", "train.num_train_epochs=1", "data.split='leave-last-out'"]
    run = again(tiny_run, tmp_path, *keys, f"model.rows_together={together}")
    plan = plan_run(run, silent)
    assert [cost.scorer for cost in plan.costs] == ["light", "relevance"]
    assert all(cost.tokens > cost.rows > 0 for cost in plan.costs)
    assert len(plan.examples) == 3
    assert {example.rsplit("\n→ ", 1)[1] for example in plan.examples} == {"liked", "not liked"}
    assert len(plan.examples) == 3
    assert all("Will this person like" in example or "film" in example for example in plan.examples)


@pytest.mark.parametrize(
    ("growing", "steps", "rounds"),
    [(7, 100, 1), (8, 100, 2), (15, 100, 2), (16, 100, 3), (100, 100, 3), (100, 23, 2), (100, 5, 1)],
)
def test_steps_are_tried_until_memory_stops_to_grow(growing, steps, rounds, tiny_run, tmp_path, monkeypatch):
    short = ["model.max_history=5", "train.per_device_train_batch_size=4"]  # windows of one length and shorter ones
    run = again(tiny_run, tmp_path, "light.num_train_epochs=0", f"train.max_steps={steps}", *short)
    task = prepare(run, silent)
    stage = language_stage(run, task, load_collaborative(load_run(tiny_run), task).features, silent)
    asked = []

    def peak():
        asked.append(len(asked) + 1)
        return 1000 + 100 * min(len(asked), growing)

    monkeypatch.setattr(planning, "peak_memory", peak)
    read = []

    def watch(model, _, batch):
        if model.training:
            read.append(batch["ids"].shape[1])

    stage.model.register_forward_pre_hook(watch, with_kwargs=True)
    cost = measure(stage, silent)
    assert len(asked) == rounds * len(planning.TRIED) + 1  # behind every step, and at the end
    assert cost.memory == 1000 + 100 * min(len(asked), growing)
    # From short to long, and the longest twice: what follows it finds room that it has left.
    first = read[: len(planning.TRIED)]
    assert read == first * rounds
    assert first == sorted(first)
    longest = max(stage.collator([stage.train[row]])["ids"].shape[1] for row in range(len(stage.train)))
    assert first[0] < first[-2] == first[-1] == longest


def test_a_plan_reads_some_batches_of_a_long_validation_and_reckons_the_others(tiny_run, tmp_path, monkeypatch):
    keys = ["model.task='relevance'", "data.split='leave-last-out'"]
    run = again(tiny_run, tmp_path, *keys)
    task = prepare(run, silent)
    stage = relevance_stage(run, task, load_collaborative(load_run(tiny_run), task).features, silent)
    stage.arguments["per_device_eval_batch_size"] = 3
    rows = [stage.valid[row] for row in range(len(stage.valid))]
    batches = [stage.valid_collator(rows[start : start + 3])["ids"].numel() for start in range(0, len(rows), 3)]
    read = []

    def watch(model, _, batch):
        if not model.training:
            read.append(batch["ids"].numel())

    stage.model.register_forward_pre_hook(watch, with_kwargs=True)
    costs = {}
    for most in (4, 1000):
        monkeypatch.setattr(planning, "VALIDATED", most)
        read.clear()
        # A clock by what has been read: a second for each id of a validation, nothing else takes time.
        monkeypatch.setattr(planning.time, "monotonic", lambda: float(sum(read)))
        costs[most] = measure(stage, silent)
        assert len(read) == min(most, len(batches))
        assert {max(batches), min(batches)} <= set(read)
    assert len(batches) > 4
    validations = 10
    assert costs[1000].seconds == pytest.approx(validations * sum(batches))
    assert costs[4].seconds == pytest.approx(validations * sum(batches), rel=1e-5)
    assert (costs[4].tokens, costs[4].steps) == (costs[1000].tokens, costs[1000].steps)


def test_a_step_that_does_not_fit_is_told_with_the_way_out(tiny_run, tmp_path):
    run = again(tiny_run, tmp_path)
    task = prepare(run, silent)
    stage = language_stage(run, task, load_collaborative(load_run(tiny_run), task).features, silent)

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    stage.model.body.register_forward_pre_hook(full)
    with pytest.raises(RecllmError, match=r"A step of 'lm' with 16 rows does not fit .*batch_size=8 .*steps=2"):
        measure(stage, silent)


def test_durations_and_sizes_are_written_for_people():
    costs = tuple(Cost("lm", 10, 990, 10, 5, 1000, 2000, 3 * 2**30, seconds) for seconds in (12.3, 600.0, 36_000.0))
    lines = Plan(1, 2, 3, 4, costs).lines()
    assert "lm: 10 examples, 5 steps, 990 tokens (1.0% padding on top)" in lines
    for figure in ("3.00 GiB and 12 s on", "and 10 min on", "and 10.0 h on"):
        assert any(figure in line for line in lines)
    assert peak_memory() > 2**20
    assert not any(line.startswith("Beside that") for line in lines)

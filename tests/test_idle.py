"""Keys that a run does not read are told with the reason, and no others; what is read changes what is trained."""

import pytest

from recllm.idle import idle_keys, idle_lines
from recllm.planning import plan_run
from recllm.runs import Run, load_run
from recllm.train import train_run

NEXT = {"name": "films", "data": {"name": "ml-100k"}}
BARE = {"model": {"name": "none", "item_encoder": "minilm-l6"}}


def idle(**tables):
    return idle_keys(Run.model_validate(NEXT | tables))


def test_a_run_as_it_is_by_default_has_none():
    assert idle() == {}
    assert idle(**BARE) == {}
    assert idle(model={"task": "relevance"}) == {}


def test_without_a_language_model_its_training_is_not_read():
    model = BARE["model"] | {"layers": 4, "max_history": 20, "likelihood": "smollm2-135m"}
    train = {"learning_rate": 1e-4, "logging_steps": 5, "precision": "fp32", "report_to": "none"}
    found = idle(model=model, train=train, adapter={"recipe": "dora", "r": 4})
    assert set(found) == {"model.name = none"}
    assert set(found["model.name = none"]) == {
        "adapter.recipe",
        "adapter.r",
        "train.learning_rate",
        "train.logging_steps",
        "model.layers",
        "model.max_history",
    }
    assert idle(model={"layers": 4, "max_history": 20}, train=train, adapter={"recipe": "dora", "r": 4}) == {}


def test_the_light_judge_reads_no_precision():
    judged = {
        "model": BARE["model"] | {"task": "relevance", "relevance_rows": 10},
        "train": {"precision": "fp32", "report_to": "none"},
    }
    assert idle(**judged) == {"model.name = none": ["train.precision"]}
    assert idle(model={"task": "relevance"}, train=judged["train"]) == {}


def test_without_a_light_scorer_or_a_teacher_their_keys_are_not_read():
    light = {"width": 64, "taught": 5}
    assert idle(light=light) == {"there is no light.teacher": ["light.taught"]}
    assert idle(light=light | {"teacher": "runs/before"}) == {}
    assert idle(light={"taught_weight": 2.0}) == {"there is no light.teacher": ["light.taught_weight"]}
    assert idle(light={"taught_weight": 2.0, "teacher": "runs/before"}) == {}
    # Each key is told once, with the first reason.
    assert idle(light={"teacher": "runs/before", "num_train_epochs": 0}) == {}  # whose test rows are left out
    assert idle(light=light | {"num_train_epochs": 0}) == {
        "light.num_train_epochs = 0": ["light.width", "light.taught"]
    }


def test_time_says_nothing_where_nothing_reads_it():
    bare = {"model": {"name": "none", "item_encoder": "minilm-l6"}}
    recency = {"drift": 3}
    assert idle(**bare, recency=recency) == {}
    without = bare | {"light": {"num_train_epochs": 0}}
    without["model"] = without["model"] | {"learnt_width": 4}
    assert idle(**without, recency=recency) == {"there is no sequence model": ["recency.drift", "model.learnt_width"]}
    assert idle(recency={"as_of": False}) == {}
    found = idle(recency={"as_of": False, "popularity_days": []})
    assert found == {"recency.popularity_days is empty": ["recency.as_of"]}


def test_a_control_without_factors_learns_no_vectors_of_items():
    model = {"learnt_width": 4}
    assert idle(model=model) == idle(model=model, control={"text": "shuffled"}) == {}
    assert idle(model=model, control={"factors": "same"}) == {"control.factors = same": ["model.learnt_width"]}


def test_where_pairs_are_judged_items_are_not_compared():
    tables = {"transitions": {"max_items": 5}, "neighbours": {"neighbours": 3}, "ease": {"max_items": 5}}
    judged = {"model": {"task": "relevance", "head_width": 64}, "light": {"per_device_train_batch_size": 8}}
    assert idle(**tables, model={"head_width": 64}, light=judged["light"]) == {}
    assert idle(**tables, **judged) == {
        "model.task = relevance": [
            "model.head_width",
            "light.per_device_train_batch_size",
            "transitions.max_items",
            "neighbours.neighbours",
        ]
    }


def test_pairs_that_are_judged_from_words_have_no_projections():
    judged = {"task": "relevance", "factor_dropout": 0.3}
    assert idle(model=judged) == {"model.soft_tokens = false": ["model.factor_dropout"]}
    assert idle(model=judged | {"soft_tokens": True}) == {}
    assert idle(model={"factor_dropout": 0.3}) == {}
    assert idle(model={"task": "relevance"}, train={"head_learning_rate": 0.1}) == {}  # an encoder has a head


@pytest.mark.parametrize(
    ("key", "value", "splits"),
    [
        ("shots", 8, {"given"}),
        ("rated_histories", False, {"given"}),
        ("given_back", 1, {"cold-items"}),
        ("cold_share", 0.2, {"cold-items"}),
        ("min_events", 5, {"cold-items", "leave-last-out"}),
        ("like_at", 3.0, {"given", "cold-items", "leave-last-out", "temporal"}),
    ],
)
def test_what_only_some_splits_read_is_told_of_the_others(key, value, splits):
    for split in ("given", "cold-items", "leave-last-out", "temporal"):
        told = idle(data={"name": "ml-100k", "split": split, key: value})
        assert told == ({} if split in splits else {f"data.split = {split}": [f"data.{key}"]})


@pytest.mark.parametrize("begin", [plan_run, train_run])
def test_it_is_said_before_anything_is_trained(begin, tiny_run, tmp_path):
    keys = ["model.name='none'", f"model.item_encoder='{load_run(tiny_run).model.name}'", "train.weight_decay=0.4"]
    run = load_run(tiny_run, [*keys, "name=bare", f"output={tmp_path}", "light.num_train_epochs=1"])
    said = []
    begin(run, say=said.append)
    (line,) = idle_lines(run)
    assert line.startswith("Not read, for model.name = none: ")
    assert "train.weight_decay" in line
    assert said[0] == line

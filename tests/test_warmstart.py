"""Warm starts: what an earlier run learnt is where the next one begins, item by item, or it is said why not."""

import shutil
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import load_file, save_file

from recllm import warmstart
from recllm.collaborative import load_collaborative
from recllm.errors import RecllmError
from recllm.files import read_json, write_json
from recllm.judging import relevance_model
from recllm.mf import FactorSettings, ImplicitMF
from recllm.nextitem import language_stage
from recllm.outcome import evaluate_run
from recllm.ranking import ItemIndex
from recllm.recipes import find_recipe
from recllm.runs import ENVIRONMENT, Run, load_run
from recllm.scoring import known_scores
from recllm.tasks import LEARNT, keep_learnt, prepare
from recllm.train import train_run
from recllm.trained import adapter_recipe, light_model
from recllm.vectors import ItemFeatures
from recllm.warmstart import check_start, check_start_data, start, turned

WEIGHTS = "model.safetensors"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RECLLM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def after(tiny_run, tmp_path):
    """Makes a run that starts from the tiny one, with keys changed."""

    def made(*overrides, start_from=tiny_run):
        own = ["name=next", f"output={tmp_path}", f"start_from={start_from}"]
        return load_run(tiny_run / "run.toml", [*own, *overrides])

    return made


def test_factors_are_turned_onto_those_of_the_earlier_run(tiny_run, after):
    before = ImplicitMF.load(tiny_run / "cf")
    rng = np.random.default_rng(0)
    rotation, _ = np.linalg.qr(rng.normal(size=(4, 4)))
    order = rng.permutation(len(before.items))[:-3]  # three items are gone, and one is new
    moved = np.concatenate([before.item_factors[order], np.ones((1, 4))]) @ rotation
    ids = [before.items.ids[row] for row in order]
    mf = ImplicitMF(ItemIndex([*ids, "new"]), moved.astype(np.float32), FactorSettings(factors=4), 3.0)
    found = turned(mf, after())
    assert found.item_factors[:-1] == pytest.approx(before.item_factors[order], abs=1e-5)
    assert found.item_factors @ found.item_factors.T == pytest.approx(moved @ moved.T, abs=1e-5)
    assert (found.items.ids, found.half_life, found.settings) == (mf.items.ids, 3.0, mf.settings)
    assert turned(mf, load_run(tiny_run)) is mf  # a run that starts from nothing


def test_it_goes_on_from_what_was_learnt(tiny_run, after):
    few = ["light.num_train_epochs=1", "light.learning_rate=1e-6", "train.max_steps=3", "train.eval_steps=3"]
    lines, figures, later = [], {}, {}
    for name in ("next", "alone"):
        run = after(*few, "train.learning_rate=0", "train.head_learning_rate=1e-6", "seed=3", f"name={name}")
        run = run if name == "next" else run.model_copy(update={"start_from": None})
        task = train_run(run, say=lines.append)
        scores = known_scores(run, task, load_collaborative(run, task), lambda _: None)
        table = evaluate_run(run, task, scores["test"])
        figures[name] = {scorer: table.interval(scorer, "NDCG@10")[0] for scorer in ("light", "lm")}
        later[name] = load_file(run.folder / "lm" / WEIGHTS)
    assert figures["next"]["light"] > 0.9 > figures["alone"]["light"]
    assert figures["next"]["lm"] > 0.75 > figures["alone"]["lm"]
    assert [line for line in lines if "starts from" in line] == [
        f"'{scorer}' starts from {tiny_run}" for scorer in ("light", "lm")
    ]
    earlier = load_file(tiny_run / "lm" / WEIGHTS)
    adapter = [name for name in earlier if "lora_" in name]
    assert adapter
    assert all(torch.equal(later["next"][name], earlier[name]) for name in adapter)  # a rate of 0 leaves it alone
    assert any(not torch.equal(later["next"][name], earlier[name]) for name in earlier if name not in adapter)


def test_biases_go_with_their_items(tiny_run, checkerboard_folder, after, tmp_path):
    folder = tmp_path / "grown"
    shutil.copytree(checkerboard_folder, folder)
    items = pl.read_csv(folder / "items.csv", infer_schema=False).reverse()
    new = items[:1].with_columns(item_id=pl.lit("new"), title=pl.lit("Blue film new"))
    pl.concat([new, items]).write_csv(folder / "items.csv")
    run = after(f"data.name={folder}")
    task = prepare(run)
    parts = load_collaborative(load_run(tiny_run), prepare(load_run(tiny_run)))
    features = parts.features
    rows = features.index.rows(task.index.ids)
    grown = type(features)(task.index, features.text[rows], features.factors[rows])
    model, _ = light_model(run, task, grown)
    assert start(model, run, "light", task.index, lambda _: None)
    before = load_file(tiny_run / "light" / WEIGHTS)
    by_id = dict(zip(features.index.ids, before["bias"].tolist(), strict=True))
    found = dict(zip(task.index.ids, model.bias.tolist(), strict=True))
    assert found.pop("new") == before["cold_bias"].item()
    assert found == by_id
    factors = tmp_path / "earlier"
    shutil.copytree(tiny_run, factors)
    mf = ImplicitMF.load(factors / "cf")
    kept = [row for row, item in enumerate(mf.items.ids) if item != "7"]
    ids = [mf.items.ids[row] for row in kept]
    ImplicitMF(ItemIndex(ids), mf.item_factors[kept], mf.settings).save(factors / "cf")
    start(model, after(f"data.name={folder}", start_from=factors), "light", task.index, lambda _: None)
    listed = dict(zip(task.index.ids, model.bias.tolist(), strict=True))
    assert listed["7"] == before["cold_bias"].item()  # on the list, and without an event that it could learn of
    assert listed["9"] == by_id["9"]
    assert task.index.ids[:2] == ("new", "23")


def test_learnt_vectors_go_with_their_items(tiny_run, tmp_path):
    keys = ["light.num_train_epochs=1", "train.max_steps=3", "train.eval_steps=3", "model.learnt_width=3"]
    earlier = load_run(tiny_run / "run.toml", ["name=earlier", f"output={tmp_path}", *keys])
    task = train_run(earlier, say=lambda _: None)
    run = load_run(tiny_run / "run.toml", ["name=next", f"output={tmp_path}", f"start_from={earlier.folder}", *keys])
    features = load_collaborative(earlier, task).features
    ids = (*reversed(task.index.ids), "new")
    rows = task.index.rows(ids)
    grown = ItemFeatures(ItemIndex(ids), features.text[rows], features.factors[rows])
    warm, counts = task.warm[rows], task.item_counts[rows]
    model, _ = light_model(run, SimpleNamespace(warm=warm, item_counts=counts, repeats=False, time=task.time), grown)
    drawn = model.learnt.detach().clone()
    assert start(model, run, "light", grown.index, lambda _: None)
    learnt = load_file(earlier.folder / "light" / WEIGHTS)["learnt"]
    assert torch.equal(model.learnt[:-1], learnt.flip(0))
    assert torch.equal(model.learnt[-1], drawn[-1])
    language = language_stage(run, task, features, lambda _: None, store=False).model
    assert start(language, run, "lm", task.index, lambda _: None)
    found = load_file(earlier.folder / "lm" / WEIGHTS)["learnt"]
    assert torch.equal(language.learnt, found)
    assert not torch.equal(found, learnt)  # which it had been given, and has trained since
    with pytest.raises(RecllmError, match=r"model\.learnt_width is 4 here and 3 in start_from"):
        check_start(run.model_copy(update={"model": run.model.model_copy(update={"learnt_width": 4})}))
    for key in ("relative_positions", "gated"):
        with pytest.raises(RecllmError, match=rf"light\.{key} is True here and False in start_from"):
            check_start(run.model_copy(update={"light": run.light.model_copy(update={key: True})}))


def test_a_text_adapter_first_and_soft_tokens_after_it(rated_checkerboard, tiny_lm_folder, tmp_path):
    data = tmp_path / "rated"
    data.mkdir()
    rated_checkerboard.interactions.frame.write_csv(data / "interactions.csv")
    rated_checkerboard.catalog.frame.write_csv(data / "items.csv")
    first = Run.model_validate(
        {
            "name": "text",
            "output": str(tmp_path),
            "data": {"name": str(data)},
            "model": {"name": str(tiny_lm_folder), "task": "relevance", "max_history": 2, "relevance_rows": 64},
            "light": {"width": 8, "layers": 1, "heads": 2, "num_train_epochs": 1},
            "cf": {"factors": 4},
            "train": {
                "learning_rate": 1e-2,
                "max_steps": 3,
                "eval_steps": 3,
                "per_device_train_batch_size": 8,
                "precision": "fp32",
            },
        }
    )
    train_run(first, say=lambda _: None)
    second = first.model_dump(exclude_none=True) | {"name": "both", "start_from": str(first.folder)}
    second["model"]["soft_tokens"], second["train"]["learning_rate"] = True, 0.0
    lines = []
    run = Run.model_validate(second)
    train_run(run, say=lines.append)
    earlier, later = (load_file(own.folder / "lm" / WEIGHTS) for own in (first, run))
    assert set(earlier) < set(later)
    assert any(name.endswith("lora_B.default.weight") and value.any() for name, value in earlier.items())
    assert all(torch.equal(later[name], value) for name, value in earlier.items() if "lora_" in name)
    new = sum(value.numel() for name, value in later.items() if name not in earlier)
    assert f"'lm' starts from {first.folder}; {new:,} of its parameters are new" in lines
    assert f"'light' starts from {first.folder}" in lines
    task = prepare(run)
    drawn, _ = relevance_model(run, task, load_collaborative(run, task).features, adapter_recipe(run), lines.append)
    soft = [name for name in later if "embed_tokens" in name]
    assert len(soft) == len(later) - len(earlier)
    moved = [not torch.equal(later[name], value) for name, value in drawn.named_parameters() if name in soft]
    assert any(moved)
    back = first.model_dump(exclude_none=True) | {"name": "back", "start_from": str(run.folder)}
    with pytest.raises(RecllmError, match=r"has soft tokens, and this run has none to go on with"):
        check_start(Run.model_validate(back))
    with pytest.raises(RecllmError, match=r"learning_rate = 0 leaves the adapter as it is.*soft_tokens = true"):
        train_run(Run.model_validate(second | {"name": "no", "model": first.model.model_dump(exclude_none=True)}))


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("cf.factors=5", r"cf\.factors is 5 here and 4 in start_from"),
        ("model.task=relevance", r"model\.task is 'relevance' here and 'next_item' in"),
        ("data.split=temporal", r"data\.split is 'temporal' here and 'leave-last-out' in.*same kind of split"),
        ("data.min_events=5", r"data\.min_events is 5 here and 4 in"),
        ("name=tiny", None),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(key, words, after, tiny_run):
    if words is None:
        run, words = after(key, f"output={tiny_run.parent}"), "start_from is this run itself"
        with pytest.raises(RecllmError, match=words):
            check_start(run)
        return
    run = after(key)
    with pytest.raises(RecllmError, match=words):
        train_run(run, say=lambda _: None)
    assert not run.folder.exists()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.name=other"], r"model\.name is 'other' here"),
        (["model.layers=1"], r"model\.layers is 1 here and None in"),
        (["model.head_width=8"], r"model\.head_width is 8 here and 16 in"),
        (["light.width=8"], r"light\.width is 8 here and 16 in"),
        (["light.layers=2"], r"light\.layers is 2 here and 1 in"),
        (["adapter.recipe=dora"], r"adapter\.recipe is 'dora' here and 'lora' in"),
        (["adapter.lora_alpha=99"], r"the adapter's keys is .*99.* here and"),
        (["adapter.init_lora_weights=pissa"], r"the adapter's keys is .*pissa.* here and"),
        (["control.language_model=random"], r"control\.language_model is 'random' here and 'pretrained' in"),
        (["control.text=shuffled"], r"control\.text is 'shuffled' here and 'own' in"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_other_models_are_refused(overrides, words, after, tiny_lm_folder):
    encoder = [f"model.item_encoder={tiny_lm_folder}"] if overrides == ["model.name=other"] else []
    with pytest.raises(RecllmError, match=words):
        check_start(after(*overrides, *encoder))


@pytest.mark.parametrize(("start", "alike"), [("pissa", True), ("pissa_niter_4", False)])
def test_a_start_from_drawn_directions_needs_the_same_seed(start, alike, after):
    one, other = (
        warmstart._language_facts(after(f"adapter.init_lora_weights={start}", f"seed={seed}"), None) for seed in (0, 7)
    )
    assert (one == other) is alike


@pytest.mark.parametrize(("start", "alike"), [("loftq", False), ("gaussian", True)])
def test_a_start_that_makes_up_for_a_rounding_needs_the_same_one(start, alike, after, tmp_path):
    text = find_recipe("adapters", "qlora").read_text(encoding="utf-8")
    (tmp_path / "kept.toml").write_text(text.replace('"nf4"', '"fp4"'), encoding="utf-8")
    run = after("adapter.recipe=qlora", f"adapter.init_lora_weights={start}")
    now, kept = (warmstart._language_facts(run, file) for file in (None, str(tmp_path / "kept.toml")))
    assert (now == kept) is alike


def test_dropout_and_another_encoder(after, tiny_encoder_folder):
    assert check_start(after("adapter.lora_dropout=0.3")) is not None
    with pytest.raises(RecllmError, match=r"model\.item_encoder is '.*' here"):
        check_start(after(f"model.item_encoder={tiny_encoder_folder}"))


def test_a_run_without_a_language_model_starts_its_light_scorer(after, tiny_run, tiny_lm_folder):
    run = after("model.name=none", f"model.item_encoder={tiny_lm_folder}")
    assert check_start(run).folder == tiny_run


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("more", torch.ones(2), r"it has 'more', and this run has not"),
        ("query.bias", torch.ones(3), r"'query\.bias' has the shape \[3\] there and \[16\] here"),
        ("cold_bias", torch.tensor(0.25), None),
    ],
)
def test_what_a_file_has_is_what_the_model_takes(name, value, words, after, tiny_run, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "other")
    path = tmp_path / "other" / "light" / WEIGHTS
    save_file(load_file(path) | {name: value}, path)
    run, task = after(start_from=tmp_path / "other"), prepare(load_run(tiny_run))
    model, _ = light_model(run, task, load_collaborative(load_run(tiny_run), task).features)
    if words is None:  # a scalar, as it once was
        assert start(model, run, "light", task.index, lambda _: None)
        assert model.cold_bias.tolist() == [0.25]
        return
    with pytest.raises(RecllmError, match=rf"model\.safetensors does not fit: {words}.*leave start_from out"):
        start(model, run, "light", task.index, lambda _: None)


@pytest.mark.parametrize("stretches", [0, 1, 32, 64])
def test_what_was_learnt_of_time_fits_other_stretches(stretches, after, tiny_run, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "other")
    path = tmp_path / "other" / "light" / WEIGHTS
    weights = load_file(path)
    line = torch.linspace(0, 1, 33)[:, None] * torch.arange(1.0, 1 + weights["drift.ends"].shape[1])
    save_file(weights | {"drift.ends": line.contiguous()}, path)
    run = after(f"recency.drift={stretches}", start_from=tmp_path / "other")
    task = prepare(load_run(tiny_run))
    model, _ = light_model(run, task, load_collaborative(load_run(tiny_run), task).features)
    assert start(model, run, "light", task.index, lambda _: None)
    assert torch.equal(model.query.weight, weights["query.weight"])
    if stretches:
        wanted = torch.linspace(0, 1, stretches + 1)[:, None] * line[-1]
        assert torch.allclose(model.drift.ends, wanted, atol=1e-5)
    else:
        assert model.drift is None


def test_rows_that_were_learnt_are_not_measured(tiny_run, checkerboard_folder, after, tmp_path):
    """The earlier log was the longer one: everybody's last event that it learnt is asked about now, in validation."""
    folder, half, lines = tmp_path / "data", tmp_path / "half", []
    shutil.copytree(checkerboard_folder, folder)
    events = pl.read_csv(folder / "interactions.csv", infer_schema=False).with_columns(pl.col("seq").cast(int))
    events.filter(pl.col("seq") < pl.col("seq").max().over("user_id")).write_csv(folder / "interactions.csv")
    run = after(f"data.name={folder}")
    with pytest.raises(RecllmError, match=r"leaves 0 validation and 40 test events"):
        prepare(run, lines.append)
    assert lines[-1:] == [f"40 validation and 0 test rows are left out: '{tiny_run}' has learnt them"]
    shutil.copytree(tiny_run, half)
    pl.read_parquet(half / LEARNT).filter(pl.col("user_id") != "u3").write_parquet(half / LEARNT)
    task = prepare(after(f"data.name={folder}", start_from=half))
    assert [row.query.user_id for row in task.split.valid] == ["u3"]
    assert len(task.split.test) == 40


def test_rows_that_the_run_learns_itself_are_measured(tiny_run, checkerboard_folder, after, tmp_path):
    """Everybody's last event repeats the first: both runs have learnt that pair, and it is asked about all the same."""
    folder = tmp_path / "data"
    shutil.copytree(checkerboard_folder, folder)
    events = pl.read_csv(folder / "interactions.csv", infer_schema=False).with_columns(pl.col("seq").cast(int))
    again = events.filter(pl.col("seq") == pl.col("seq").min().over("user_id")).with_columns(pl.col("seq") + 100)
    pl.concat([events, again]).write_csv(folder / "interactions.csv")
    lines = []
    task = prepare(after(f"data.name={folder}", "data.duplicates=keep"), lines.append)
    learnt = set(pl.read_parquet(tiny_run / LEARNT).iter_rows())
    assert all((row.query.user_id, row.item_id) in learnt for row in task.split.test)
    assert (len(task.split.valid), len(task.split.test)) == (40, 40)
    assert not [line for line in lines if "left out" in line]


def test_what_was_learnt_is_handed_on(tiny_run, after, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "monday")
    more = pl.DataFrame({"user_id": ["elsewhere"], "item_id": ["1"]})
    pl.concat([pl.read_parquet(tiny_run / LEARNT), more]).write_parquet(tmp_path / "monday" / LEARNT)
    run = after("name=tuesday", start_from=tmp_path / "monday")
    task = prepare(run)
    keep_learnt(run, task)
    handed = pl.read_parquet(run.folder / LEARNT)
    assert ("elsewhere", "1") in set(handed.iter_rows())
    assert len(handed) == handed.n_unique() == len(pl.read_parquet(tiny_run / LEARNT)) + 1
    shutil.rmtree(tmp_path / "monday")  # what this run was measured on stays what it was
    assert len(prepare(run).split.test) == len(task.split.test)
    with pytest.raises(RecllmError, match=r"does not say what it has learnt \(it has no learnt\.parquet\)"):
        prepare(run, begun=False)


def test_what_is_no_finished_run_is_named(after, tiny_run, tmp_path):
    with pytest.raises(RecllmError, match=r"start_from = '.*nowhere' is no folder"):
        check_start(after(start_from=tmp_path / "nowhere"))
    shutil.copytree(tiny_run, tmp_path / "half")
    (tmp_path / "half" / "fusion.json").unlink()
    with pytest.raises(RecllmError, match=r"is not trained to its end.*recllm train .*half --resume"):
        check_start(after(start_from=tmp_path / "half"))


def test_a_run_starts_from_one_over_the_very_same_weights(tiny_run, after, tmp_path):
    folder = shutil.copytree(tiny_run, tmp_path / "moved")
    facts = read_json(folder / ENVIRONMENT)
    check_start_data(after(start_from=folder), facts["data"])
    write_json(folder / ENVIRONMENT, facts | {"models": dict.fromkeys(facts["models"], "0" * 16)})
    with pytest.raises(RecllmError, match=r"has other weights now .* than those that .*moved was trained over"):
        check_start_data(after(start_from=folder), facts["data"])


def test_cold_items_have_to_be_drawn_from_the_same_data(tiny_run, after, tmp_path):
    folder = tmp_path / "cold"
    shutil.copytree(tiny_run, folder)
    text = (folder / "run.toml").read_text(encoding="utf-8")
    (folder / "run.toml").write_text(text.replace("leave-last-out", "cold-items"), encoding="utf-8")
    run = after("data.split=cold-items", start_from=folder)
    same = read_json(folder / ENVIRONMENT)["data"]
    check_start_data(run, same)
    with pytest.raises(RecllmError, match=r"other cold items are drawn"):
        check_start_data(run, same | {next(iter(same)): "else"})
    with pytest.raises(RecllmError, match=r"data\.seed is 1 here and 0 in"):
        check_start(after("data.split=cold-items", "seed=1", start_from=folder))


@pytest.mark.parametrize(
    ("key", "words"), [("seed=1", r"seed is 1 here and 0 in"), ("data.shots=9", r"data\.shots is 9 here and 8 in")]
)
def test_shots_have_to_be_the_same_ones(key, words, tiny_run, after, tmp_path):
    folder = shutil.copytree(tiny_run, tmp_path / "few")
    text = (folder / "run.toml").read_text(encoding="utf-8")
    text = text.replace('split = "leave-last-out"', 'split = "given"\nshots = 8')
    (folder / "run.toml").write_text(text, encoding="utf-8")
    given = ["data.split=given", "data.shots=8"]
    assert check_start(after(*given, start_from=folder)).folder == folder
    with pytest.raises(RecllmError, match=words):
        check_start(after(*given, key, start_from=folder))

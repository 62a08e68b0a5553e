"""The search finds the better setting, goes on where it was, keeps limits, and refuses what is no key."""

import json
import math
import shutil
from types import SimpleNamespace

import pytest
from safetensors.numpy import load_file

from recllm import tuning
from recllm.data import read_interactions
from recllm.errors import RecllmError
from recllm.fetch import resolve_data
from recllm.lm import model_folder
from recllm.priors import Popularity
from recllm.results import Table
from recllm.runs import Run, load_run, write_run
from recllm.searches import Range, Search, changes_nothing, load_search, with_values
from recllm.tasks import prepare
from recllm.tuning import tune
from recllm.vectors import VECTORS

TUNE = """
run = "base.toml"
scorer = "light"
trials = {trials}
{more}
[search."light.learning_rate"]
choices = [1e-6, 5e-3]
[search."light.layers"]
low = 1
high = 2
"""


@pytest.fixture
def place(tiny_run, tmp_path):
    """A folder with a run file of the light scorer alone."""
    overrides = ["name=base", f"output={tmp_path / 'runs'}", "model.name='none'", "light.num_train_epochs=6"]
    encoder = load_run(tiny_run).model.name
    write_run(load_run(tiny_run, [*overrides, f"model.item_encoder='{encoder}'"]), tmp_path / "base.toml")
    return tmp_path


def written(place, trials=5, more="", name="tune.toml"):
    (place / name).write_text(TUNE.format(trials=trials, more=more), encoding="utf-8")
    return place / name


def found(place):
    return json.loads((place / "runs" / "base-tune" / tuning.RESULT).read_text(encoding="utf-8"))


@pytest.mark.slow
def test_the_better_setting_is_found_and_the_search_goes_on(place):
    said = []
    best = tune(written(place), said.append)
    assert best.light.learning_rate == 5e-3
    folder = place / "runs" / "base-tune"
    assert load_run(folder / tuning.BEST).light.learning_rate == 5e-3
    assert load_run(folder / tuning.BEST).name == "base-best"
    assert (folder / tuning.PICTURE).read_text(encoding="utf-8").startswith('<svg xmlns="http://www.w3.org/2000/svg"')
    first = found(place)["trials"]
    assert len(first) == 5
    assert {trial["values"]["light.layers"] for trial in first} <= {1, 2}
    assert all((folder / f"trial-{trial['trial']}" / "cf").is_dir() for trial in first)
    tune(written(place, trials=6), said.append)
    assert found(place)["trials"][:5] == first
    assert len(found(place)["trials"]) == 6
    assert any("5 of 6 trials are done" in line for line in said)
    with pytest.raises(RecllmError, match=r"was begun with another scorer"):
        tune(_other_scorer(place), said.append)


def _other_scorer(place):
    text = (place / "tune.toml").read_text(encoding="utf-8").replace('scorer = "light"', 'scorer = "fusion"')
    (place / "other.toml").write_text(text, encoding="utf-8")
    return place / "other.toml"


@pytest.mark.slow
def test_a_limit_is_of_what_a_bundle_holds_and_answers(tiny_run, tmp_path, monkeypatch):
    """No bundle has popularity's events, and it is asked now."""
    shutil.copytree(tiny_run, tmp_path / "tiny")
    run = load_run(tmp_path / "tiny", [f"output={tmp_path}"])
    task = prepare(run)
    fading = Popularity.fit(task.split.train, task.index.ids, half_life_days=30, as_of=True)
    fading.save(run.folder / "cf")
    asked = []

    def watched(*_):
        return {"light": lambda: SimpleNamespace(score=lambda queries, _: asked.extend(queries))}

    monkeypatch.setattr(tuning, "scorer_makers", watched)
    tried = {"light.width": Range(choices=(8, 16))}
    search = Search(run="x", search=tried, limits={"megabytes": 1.0, "milliseconds_per_user": 1.0})
    costs = tuning._costs(search, run, task)
    assert len(asked) == tuning.TIMED_ROUNDS * len(task.split.valid)
    assert [query.history for query in asked[:40]] == [row.query.history for row in task.split.valid]
    assert any(row.query.at is not None for row in task.split.valid)
    assert all(query.at is None for query in asked)
    folders = [run.folder / "cf", run.folder / "light", run.folder / "lm", model_folder(run.model.name)]
    files = [path for folder in folders for path in folder.iterdir() if path.is_file()]
    files = [path for path in files if not path.name.startswith("likeness.")]
    events = load_file(run.folder / "cf" / "popularity.safetensors")
    kept = sum(value.nbytes for name, value in events.items() if name.startswith("events."))
    assert kept > len(task.split.train)
    assert costs["megabytes"] == pytest.approx((sum(path.stat().st_size for path in files) - kept) / 2**20)


def test_the_best_run_keeps_the_limits(place):
    with pytest.raises(RecllmError, match=r"None of 2 trials keeps the limits of .*tune\.toml\. See .*trials\.json"):
        tune(written(place, 2, "limits = { megabytes = 1e-3, milliseconds_per_user = 1e-6 }\n"), lambda _: None)
    trials = found(place)["trials"]
    assert all(trial["costs"]["megabytes"] > 1e-3 for trial in trials)
    assert all(trial["costs"]["milliseconds_per_user"] > 1e-6 for trial in trials)
    assert not any(trial["keeps_the_limits"] for trial in trials)


@pytest.mark.slow
def test_a_trial_below_the_others_is_cut_short(place, monkeypatch):
    monkeypatch.setattr(tuning, "STARTUP", 1)
    tune(written(place, 6), lambda _: None)
    trials = found(place)["trials"]
    cut = [trial for trial in trials if trial["state"] == "pruned"]
    # Near ties are cut too; the better rate is not among all that is cut.
    assert any(trial["values"]["light.learning_rate"] == 1e-6 for trial in cut)
    assert load_run(place / "runs" / "base-tune" / tuning.BEST).light.learning_rate == 5e-3


def test_a_trial_is_cut_by_the_validations_of_what_is_searched_for_and_no_other(place, monkeypatch):
    reported = []

    class Trial:
        number = 0

        def suggest_categorical(self, key, choices):
            return choices[0]

        def suggest_int(self, key, low, high, log):
            return low

        def report(self, figure, place):
            reported.append((figure, place))

        def should_prune(self):
            return False

    class Told(Exception):
        """Ends the trial."""

    def train(run, *, resume, say, watch):
        watch("lm", 1, {"eval_ndcg@10": 0.1})
        watch("light", 1, {"loss": 3.0})
        for step in (2, 2, 4):  # a validation that is made again, after a way back, counts once
            watch("light", step, {"eval_ndcg@10": step / 10})
        raise Told

    monkeypatch.setattr(tuning, "train_run", train)
    search, run = load_search(written(place))
    with pytest.raises(Told):
        tuning._try(search, run, place / "search", Trial(), lambda _: None)
    assert reported == [(0.2, 0), (0.4, 1)]


def tries(monkeypatch, figures):
    """Trials without a training, which leave what one leaves and have these figures; one of None fails."""

    def tried(search, run, folder, trial, say):
        for key, values in search.search.items():
            values.draw(trial, key)
        for name in ("checkpoints", "scores", "light"):
            (folder / f"trial-{trial.number}" / name).mkdir(parents=True)
        if figures[trial.number] is None:
            raise RecllmError(f"it does not go with {run.light.dropout}")
        return figures[trial.number]

    monkeypatch.setattr(tuning, "_try", tried)


def test_a_trial_leaves_no_checkpoints_and_no_scores_behind(place, monkeypatch):
    tries(monkeypatch, [0.5, None])
    tune(written(place, 2), lambda _: None)
    left = [path.relative_to(place / "runs" / "base-tune") for path in (place / "runs").glob("*/trial-*/*")]
    assert sorted(map(str, left)) == ["trial-0/light", "trial-1/light"]


def test_of_trials_that_are_as_good_the_first_is_the_best(place, monkeypatch):
    tries(monkeypatch, [0.4, 0.5, 0.5])
    said = []
    best = tune(written(place, 3), said.append)
    assert said[-1].startswith("Best: trial 1, NDCG@10 0.5000 of 'light'")
    values = found(place)["trials"][1]["values"]
    assert (best.light.learning_rate, best.light.layers) == (values["light.learning_rate"], values["light.layers"])


def test_what_failed_by_a_mistake_that_is_mended_does_not_count(place, monkeypatch):
    tries(monkeypatch, [None, None, 0.5, 0.4])
    path, said = written(place, 2), []
    with pytest.raises(RecllmError, match=r"No trial of those has a result of .*, and 2 failed, the first one by: it"):
        tune(path, said.append)
    file = place / "base.toml"
    file.write_text(file.read_text(encoding="utf-8").replace("dropout = 0.2", "dropout = 0.1"), encoding="utf-8")
    tune(path, said.append)
    assert "Tuning base: 0 of 2 trials are done" in said
    assert said[-1].startswith("Best: trial 2, NDCG@10 0.5000")


@pytest.mark.parametrize("text", [r".*\.(q|v)_proj", 'a"b', "C:\\models\\new", "true"])
def test_a_text_is_tried_as_it_stands(text, place):
    run = load_run(place / "base.toml")
    assert with_values(run, {"model.item_encoder": text}, "x", place).model.item_encoder == text


def test_a_search_of_any_seed_has_one_that_numpy_takes(place, monkeypatch):
    file = place / "base.toml"
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace("\nseed = 0", f"\nseed = {2**32 - 1}", 1), encoding="utf-8")
    tries(monkeypatch, [0.5])
    assert tune(written(place, 1), lambda _: None).seed == 2**32 - 1
    file.write_text(text.replace("\nseed = 0", f"\nseed = {2**32}", 1), encoding="utf-8")
    with pytest.raises(RecllmError, match="seed"):
        tune(place / "tune.toml", lambda _: None)


def test_a_metric_that_nobody_knows_ends_the_search(place, monkeypatch):
    table = Table(("light",), ("NDCG@10",), {"all": (1, 1)}, {("light", "NDCG@10", "all"): math.nan}, {})
    nothing = dict.fromkeys(("train_run", "load_collaborative", "known_scores", "evaluate_run"))
    for name in nothing:
        monkeypatch.setattr(tuning, name, lambda *_, **__: None)
    monkeypatch.setattr(tuning, "train_run", lambda *_, **__: SimpleNamespace(split=SimpleNamespace(valid=[1, 2])))
    monkeypatch.setattr(tuning, "known_scores", lambda *_: {"valid": {}})
    monkeypatch.setattr(tuning, "evaluate_run", lambda *_, **__: table)
    with pytest.raises(RecllmError, match=r"NDCG@10 of 'light' is not known on these validation rows \(2\)"):
        tune(written(place, 2), lambda _: None)


@pytest.mark.parametrize(
    ("key", "shared"),
    [
        ("light.layers", True),
        ("fusion.l2", True),
        ("train.learning_rate", True),
        ("cf.factors", False),
        ("recency.queries", False),
        ("ease.max_items", False),
        ("transitions.max_items", False),
        ("neighbours.neighbours", False),
        ("prompt.item", False),
        ("model.item_encoder", False),
        ("data.rated_histories", False),
    ],
)
def test_what_is_fitted_is_shared_where_no_searched_key_changes_it(key, shared, place, tiny_run):
    folder = place / "search"
    shutil.copytree(tiny_run / "cf", folder / "trial-0" / "cf")
    for path in tiny_run.glob("vectors.*"):
        shutil.copy(path, folder / "trial-0")
    search = Search(run="base.toml", search={key: Range(low=1, high=2)})
    tried = load_run(place / "base.toml", ["name=trial-1", f"output={folder}"])
    tuning._share_fitted(search, folder, tried)
    assert (tried.folder / VECTORS).is_file() is (tried.folder / "cf").is_dir() is shared


def test_whole_numbers_and_fractions_are_told_apart(place):
    class Trial:
        def suggest_int(self, key, low, high, log):
            return "int", low, high, log

        def suggest_float(self, key, low, high, log):
            return "float", low, high, log

    assert Range(low=1, high=512, log=True).draw(Trial(), "light.width") == ("int", 1, 512, True)
    assert Range(low=0.0, high=1.0).draw(Trial(), "light.dropout") == ("float", 0.0, 1.0, False)
    path = written(place)
    path.write_text(path.read_text(encoding="utf-8").replace("high = 2", "high = 2.0"), encoding="utf-8")
    with pytest.raises(RecllmError, match=r"light\.layers.*integer"):
        load_search(path)


def test_a_changed_run_file_begins_another_search(place):
    tune(written(place, 1), lambda _: None)
    text = (place / "base.toml").read_text(encoding="utf-8")
    (place / "base.toml").write_text(text.replace("num_train_epochs = 6", "num_train_epochs = 7"), encoding="utf-8")
    with pytest.raises(RecllmError, match=r"was begun with another run"):
        tune(written(place, 2), lambda _: None)


def test_a_search_that_was_begun_before_a_key_was_there_goes_on(place):
    search, run = load_search(written(place, 2))
    done = SimpleNamespace(state=SimpleNamespace(name="COMPLETE"))
    study = SimpleNamespace(user_attrs={}, get_trials=lambda deepcopy: [done])
    study.set_user_attr = study.user_attrs.__setitem__
    tuning._check_same(study, search, run)
    kept = study.user_attrs["search"]
    del kept["run"]["model"]["learnt_width"]  # 0 by default
    tuning._check_same(study, search, run)
    with pytest.raises(RecllmError, match=r"was begun with another run"):
        tuning._check_same(study, search, run.model_copy(update={"model": run.model.model_copy(update={"layers": 3})}))
    del kept["run"]["neighbours"]["regression"]  # there was none
    with pytest.raises(RecllmError, match=r"was begun with another run"):
        tuning._check_same(study, search, run)


def test_a_scorer_that_no_trial_has_ends_the_search_at_once(place):
    path, said = written(place, 5), []
    path.write_text(path.read_text(encoding="utf-8").replace('scorer = "light"', 'scorer = "ligth"'), encoding="utf-8")
    with pytest.raises(RecllmError, match=r"Unknown scorer in .*: 'ligth'. Did you mean 'light'"):
        tune(path, said.append)
    assert said == []  # known before anything trains
    with pytest.raises(RecllmError, match=r"Unknown scorer in .*: 'relevance'"):
        tune(_renamed(path, "ligth", "relevance"), said.append)
    with pytest.raises(RecllmError, match=r"Unknown metric in .*: 'AUC'.*NDCG@10"):
        tune(_renamed(path, 'scorer = "relevance"', 'scorer = "light"\nmetric = "AUC"'), said.append)
    assert said == []
    # One that a run may have, and this one has not: its first trial shows it.
    _renamed(path, 'metric = "AUC"', "")
    _renamed(_renamed(path, "light.learning_rate", "cf.regularization"), "light.layers", "cf.factors")
    with pytest.raises(RecllmError, match=r"Unknown scorer 'likelihood'"):
        tune(_renamed(path, 'scorer = "light"', 'scorer = "likelihood"'), said.append)
    assert sum(line.startswith("Trial ") for line in said) == 1
    with pytest.raises(RecllmError, match=r"Unknown scorer 'likelihood'"):  # no trial has gone by it: it may be mended
        tune(path, said.append)
    assert said.count("Tuning base: 0 of 5 trials are done") == 2


def test_a_search_of_the_light_scorer_leaves_a_controls_language_model_out(place):
    path = written(place, 1)
    text = (place / "base.toml").read_text(encoding="utf-8")
    encoder = load_run(place / "base.toml").model.item_encoder
    text = text.replace('language_model = "pretrained"', 'language_model = "random"')
    (place / "base.toml").write_text(text.replace('name = "none"', f'name = "{encoder}"'), encoding="utf-8")
    assert load_run(place / "base.toml").control.lacking
    said = []
    tune(path, said.append)
    assert said[-1].startswith("Best: trial 0")


def _renamed(path, before, after):
    path.write_text(path.read_text(encoding="utf-8").replace(before, after), encoding="utf-8")
    return path


@pytest.mark.parametrize("key", ["data.min_events", "seed", "model.task", "start_from"])
def test_what_decides_the_rows_is_not_searched(place, key):
    path = written(place)
    path.write_text(path.read_text(encoding="utf-8").replace('"light.layers"', f'"{key}"'), encoding="utf-8")
    with pytest.raises(RecllmError, match=rf'\[search."{key}"\] would decide which rows a trial is measured on'):
        load_search(path)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("name", "which the search sets itself"),
        ("fusion.l2", "changes nothing of scorer = 'light'"),
        ("train.learning_rate", "changes nothing of scorer = 'light'"),
        ("model.max_history", "changes nothing of scorer = 'light'"),
        ("model.name", "changes nothing of scorer = 'light'"),
        ("export.gate_queries", "changes nothing of scorer = 'light'"),
    ],
)
def test_keys_that_change_nothing_of_what_is_measured_are_refused(place, key, message):
    path = _renamed(written(place), '"light.layers"', f'"{key}"')
    with pytest.raises(RecllmError, match=message):
        load_search(path)
    if key == "fusion.l2":
        load_search(_renamed(path, 'scorer = "light"', 'scorer = "fusion"'))


@pytest.mark.parametrize(
    ("scorer", "changed", "unchanged"),
    [
        ("fusion", "light.layers train.learning_rate fusion.l2 cf.factors prompt.next_item", "export.recipes"),
        ("lm", "light.layers train.learning_rate adapter.r model.max_history", "fusion.l2 export.recipes"),
        ("fusion without lm", "light.layers fusion.l2 cf.factors", "train.learning_rate adapter.r model.max_history"),
        (
            "light",
            "light.layers train.precision prompt.item",
            "train.learning_rate prompt.next_item fusion.l2 model.name",
        ),
        ("mf", "cf.factors recency.queries", "light.layers train.precision adapter.r model.max_history fusion.l2"),
        ("ease", "ease.regularization", "recency.drift model.learnt_width"),
        ("light", "recency.drift model.learnt_width", "model.head_width"),
        ("fusion without lm", "recency.drift model.learnt_width", "model.head_width"),
    ],
)
def test_what_comes_behind_a_scorer_changes_nothing_of_it(scorer, changed, unchanged):
    run = Run.model_validate({"name": "films", "data": {"name": "ml-100k"}, "model": {"item_encoder": "minilm-l6"}})
    assert [key for key in changed.split() if changes_nothing(key, scorer, run)] == []
    assert [key for key in unchanged.split() if not changes_nothing(key, scorer, run)] == []


def test_a_language_model_that_reads_the_items_too_changes_every_scorer_of_text():
    run = Run.model_validate({"name": "films", "data": {"name": "ml-100k"}})
    apart = run.model_copy(update={"model": run.model.model_copy(update={"item_encoder": "minilm-l6"})})
    for scorer in ("text", "neighbours", "fusion without lm"):
        assert not changes_nothing("model.name", scorer, run)
        assert changes_nothing("model.name", scorer, apart)
    judged = run.model_copy(update={"model": run.model.model_copy(update={"task": "relevance"})})
    assert changes_nothing("train.precision", "light", judged)  # the light judge has one precision


@pytest.mark.slow
def test_a_search_is_not_continued_on_other_data(place):
    own = place / "data"
    shutil.copytree(resolve_data(load_run(place / "base.toml").data.name), own)
    write_run(load_run(place / "base.toml", [f"data.name={own}", "light.num_train_epochs=1"]), place / "base.toml")
    said = []
    tune(written(place, 1, 'metric = "MRR"'), said.append)
    assert "No trial is cut short: MRR is not measured while it trains" in said
    (log,) = own.glob("interactions.*")
    frame = read_interactions(log).frame
    frame.head(len(frame) - 1).write_parquet(own / "interactions.parquet")
    if log.suffix != ".parquet":
        log.unlink()
    with pytest.raises(RecllmError, match=r"has changed: data \(interactions\)\. Its trials could not be compared"):
        tune(written(place, 2, 'metric = "MRR"'), said.append)
    assert len(found(place)["trials"]) == 1


def test_what_a_search_stands_on_is_what_its_trials_read(place, tiny_lm_folder, tmp_path):
    study = SimpleNamespace(
        user_attrs={}, get_trials=lambda **_: [SimpleNamespace(state=SimpleNamespace(name="COMPLETE"))]
    )
    study.set_user_attr = study.user_attrs.__setitem__
    own = tmp_path / "own-encoder"
    shutil.copytree(tiny_lm_folder, own)
    write_run(load_run(place / "base.toml", [f"model.item_encoder={own}"]), place / "base.toml")
    path = _renamed(_renamed(written(place), 'scorer = "light"', 'scorer = "fusion"'), '"light.layers"', '"cf.factors"')
    search, run = load_search(path)
    tuning._check_same_inputs(study, search, run)
    named = "\n".join(study.user_attrs["inputs"])
    assert "own-encoder" in named
    assert "prompt.item" in named
    assert "adapter" not in named  # no language model trains
    assert "prompt.next_item" not in named
    tuning._check_same_inputs(study, search, run)
    weights = next(iter(own.glob("*.safetensors")))
    weights.write_bytes(weights.read_bytes() + b" ")
    with pytest.raises(RecllmError, match=r"has changed: weights of '.*own-encoder'\. Its trials"):
        tuning._check_same_inputs(study, search, run)


def test_a_key_that_no_trial_reads_is_refused(place):
    path = _renamed(written(place), 'scorer = "light"', 'scorer = "fusion"')
    _renamed(path, '"light.layers"', '"train.num_train_epochs"')
    with pytest.raises(RecllmError, match=r"train.num_train_epochs.* is not read: model.name = none. Leave it out"):
        load_search(path)
    _renamed(path, '[search."light.learning_rate"]', '[search."light.taught"]')
    _renamed(path, "[1e-6, 5e-3]", "[5, 10_000]")
    _renamed(path, '"train.num_train_epochs"', '"light.layers"')
    with pytest.raises(RecllmError, match=r"light.taught.* is not read: there is no light.teacher"):
        load_search(path)
    _renamed(path, '"light.layers"', '"light.num_train_epochs"')  # decides itself what is read
    load_search(path)


def test_a_key_that_the_run_has_not_is_refused(place):
    path = written(place)
    path.write_text(path.read_text(encoding="utf-8").replace("light.layers", "light.leyers"), encoding="utf-8")
    with pytest.raises(RecllmError, match=r"Unknown key 'leyers'. Did you mean 'layers'"):
        load_search(path)


@pytest.mark.parametrize("values", [{"low": 1}, {"low": 1, "high": 2, "choices": [1]}, {}, {"low": 2, "high": 1}])
def test_a_range_is_ends_or_choices(values):
    with pytest.raises(ValueError, match=r"either low and high, or choices|low is above high"):
        Range.model_validate(values)


@pytest.mark.slow
def test_a_trial_that_cannot_run_is_told_and_the_search_goes_on(place):
    path, said = written(place, 4), []
    text = path.read_text(encoding="utf-8").replace("light.layers", "light.heads").replace("high = 2", "high = 3")
    path.write_text(text.replace("choices = [1e-6, 5e-3]", "choices = [5e-3, 4e-3]"), encoding="utf-8")
    # The ends, 1 and 3: a width of 16 is no multiple of 3, and that is told before anything is trained.
    with pytest.raises(RecllmError, match=r"width 16 is not a multiple of heads 3"):
        tune(path, said.append)
    path.write_text(path.read_text(encoding="utf-8").replace("high = 3", "high = 4"), encoding="utf-8")
    tune(path, said.append)
    failed = [trial for trial in found(place)["trials"] if trial["state"] == "fail"]
    assert all(trial["values"]["light.heads"] == 3 for trial in failed)
    assert sum("failed: " in line for line in said) == len(failed)

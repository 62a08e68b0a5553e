"""Ordinary mistakes through the command line: one message with cause and way out, exit code 2, no traceback."""

import json
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from recllm import commands
from recllm.cli import main
from recllm.errors import RecllmError

RUN = """
name = "tried"
output = "{place}/runs"
[data]
name = "{data}"
[model]
name = "{model}"
[light]
num_train_epochs = 0
[train]
max_steps = 1
"""


@dataclass
class Site:
    """A folder to make mistakes in, and whole things to make them with."""

    place: Path
    data: Path
    model: Path
    encoder: Path
    trained: Path
    bundle: Path

    def write(self, name, text):
        (self.place / name).write_text(text, encoding="utf-8")
        return str(self.place / name)

    def run(self, more="", **values):
        given = {"place": self.place, "data": self.data, "model": self.model} | values
        return self.write(
            "run.toml", RUN.format(**{key: Path(value).as_posix() for key, value in given.items()}) + more
        )

    def rows(self):
        return self.write("users.jsonl", '{"history": ["0", "2"]}\n')

    def out(self, name="out.csv"):
        return str(self.place / name)

    def damaged(self):
        copy = self.place / "damaged"
        shutil.copytree(self.bundle, copy)
        (copy / "fusion.json").write_text("{}", encoding="utf-8")
        return str(copy)

    def prompt(self, text):
        words = f'task = "relevance"\ntext = "{text}"\nitem = "{{title}}"\nanswers = [" Yes", " No"]\n'
        return self.write("own.toml", words)

    def preview(self, *more):
        return ["data", "preview", str(self.data), "--model", str(self.model), *more]

    def untexted(self):
        folder = self.place / "untexted"
        folder.mkdir()
        shutil.copy(self.data / "interactions.csv", folder)
        return folder


@pytest.fixture
def site(tmp_path, checkerboard_folder, tiny_lm_folder, tiny_encoder_folder, tiny_run, tiny_bundle, monkeypatch):
    monkeypatch.setenv("RECLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("RECLLM_DATA", raising=False)
    return Site(tmp_path, checkerboard_folder, tiny_lm_folder, tiny_encoder_folder, tiny_run, tiny_bundle)


# What is typed, and what the answer says: the cause, then the way out.
MISTAKES = {
    # data
    "a column is missing": (
        lambda s: ["data", "check", s.write("log.csv", "who,item_id\n1,2\n")],
        r"log\.csv has no column for 'user_id'\. Its columns: who, item_id\..*--column user_id=NAME",
    ),
    "the file is empty": (
        lambda s: ["data", "check", s.write("log.csv", "")],
        r"log\.csv is empty; a header and rows are expected",
    ),
    "the file has a header only": (
        lambda s: ["data", "check", s.write("log.csv", "user_id,item_id\n")],
        r"log\.csv has a header \(user_id, item_id\) and no rows",
    ),
    "the data set is unknown": (
        lambda s: ["data", "check", "ml-100"],
        r"Unknown data set 'ml-100'\. Did you mean 'ml-100k'\?.*RECLLM_DATA",
    ),
    "a column is mapped without an equals sign": (
        lambda s: ["data", "check", str(s.data), "--column", "item_id"],
        r"--column item_id: expected OURS=THEIRS",
    ),
    "a column is mapped to one that is not there": (
        lambda s: ["data", "check", str(s.data), "--column", "item_id=itemid"],
        r"no column 'itemid'\. Did you mean 'item_id'\?",
    ),
    "the name to fetch is unknown": (
        lambda s: ["fetch", "smollm2-135m"],
        r"Unknown model or data set 'smollm2-135m'\. Did you mean 'smollm2-135m-instruct'\?",
    ),
    "the data has no item text": (
        lambda s: ["train", s.run(data=s.untexted())],
        r"'untexted' has no items with text.*--items FILE",
    ),
    # prompts
    "the prompt has an unknown slot": (
        lambda s: s.preview("--prompt", s.prompt("{history}. Next: {candidat} Answer:")),
        r"own\.toml: Unknown slot .* 'candidat'\. Did you mean 'candidate'\?",
    ),
    "the prompt is unknown": (
        lambda s: s.preview("--prompt", "relevanz"),
        r"Unknown recipe in prompts/ 'relevanz'\. Did you mean 'relevance'\?.*\.toml works too",
    ),
    "the model is unknown": (
        lambda s: ["data", "preview", str(s.data), "--model", "smolm2-135m-instruct"],
        r"Unknown model 'smolm2-135m-instruct'\. Did you mean 'smollm2-135m-instruct'\?.*Hub id",
    ),
    "the user is unknown": (
        lambda s: s.preview("--user", "u400"),
        r"Unknown user 'u400'\. Did you mean 'u4?0?'\?",
    ),
    "the item is unknown": (lambda s: s.preview("--item", "240"), r"Unknown item '240'\. Did you mean"),
    # the run file
    "there is no run file": (
        lambda s: ["train", s.out("films.toml")],
        r"There is no run file '.*films\.toml'\. Write one .*`recllm quickstart` write one",
    ),
    "the run file is not TOML": (
        lambda s: ["train", s.write("run.toml", "[data\nname = 1\n")],
        r"run\.toml is not valid TOML: .*line 1",
    ),
    "a key of the run file is misspelt": (
        lambda s: ["train", s.run("[cf]\nfactor = 8\n")],
        r"run\.toml: \[cf\] Unknown key 'factor'\. Did you mean 'factors'\?",
    ),
    "a table of the run file is misspelt": (
        lambda s: ["train", s.run("[adaptor]\n")],
        r"Unknown key 'adaptor'\. Did you mean 'adapter'\?",
    ),
    "a key of PEFT is misspelt": (
        lambda s: ["train", s.run("[adapter]\nlora_alfa = 8\n")],
        r"Unknown key of the adapter 'lora' 'lora_alfa'\. Did you mean 'lora_alpha'\?",
    ),
    "a key of Trainer is misspelt": (
        lambda s: ["train", s.run(), "--set", "train.wieght_decay=0.1"],
        r"'wieght_decay'\. Did you mean 'weight_decay'\?",
    ),
    "a value has the wrong type": (
        lambda s: ["train", s.run(), "--set", "cf.factors=many"],
        r"key 'cf\.factors': Input should be a valid integer.*'many'",
    ),
    "--set has no equals sign": (
        lambda s: ["train", s.run(), "--set", "train.max_steps"],
        r"--set train\.max_steps: expected key\.path=value",
    ),
    "the adapter recipe is unknown": (
        lambda s: ["train", s.run(), "--set", "adapter.recipe=lorra"],
        r"Unknown recipe in adapters/ 'lorra'\. Did you mean 'lora'\?",
    ),
    "the model of the run file is unknown": (
        lambda s: ["train", s.run(model="tinylm")],
        r"Unknown model 'tinylm'.*A local folder and a Hub id",
    ),
    "an encoder is to predict the next item": (
        lambda s: ["train", s.run(model=s.encoder)],
        r"is an encoder; next_item needs a causal model\. Use it as model\.item_encoder",
    ),
    "the run's folder is not empty": (
        lambda s: ["train", str(s.trained)],
        r"tiny is not empty\. Go on with it by --resume, start anew by --overwrite",
    ),
    "a dry run is to keep something": (
        lambda s: ["train", s.run(), "--dry-run", "--resume"],
        r"--dry-run measures a run in this process and keeps nothing; give it alone",
    ),
    "the profile is unknown": (
        lambda s: ["train", s.run(), "--profile", "gpu2"],
        r"Unknown profile 'gpu2'\. Did you mean 'gpus?'\?",
    ),
    "the profile's file is not there": (
        lambda s: ["train", s.run(), "--profile", "mine.yaml"],
        r"There is no file 'mine\.yaml'\. Make one by: accelerate config --config_file mine\.yaml",
    ),
    "two run files at once": (
        lambda s: ["train", s.run(), "second.toml"],
        r"Unexpected argument 'second\.toml'\. Flags of accelerate launch stand behind --",
    ),
    # a trained run
    "a run that is not trained is evaluated": (
        lambda s: ["evaluate", s.run()],
        r"has no fitted fusion\. Train the run to its end: recllm train .* --resume",
    ),
    "the part is unknown": (
        lambda s: ["evaluate", str(s.trained), "--part", "tset"],
        r"Unknown part 'tset'\. Did you mean 'test'\?",
    ),
    "the export recipe is unknown": (
        lambda s: ["export", str(s.trained), "--recipe", "int7"],
        r"Unknown recipe in export/ 'int7'\. Did you mean 'int8'\?",
    ),
    # a bundle
    "the folder is not a bundle": (
        lambda s: ["recommend", str(s.trained), "--history", "0 2"],
        r"is not a bundle \(it has no manifest\.json\)\. Make a bundle from a trained run with: recllm export",
    ),
    "a file of the bundle is damaged": (
        lambda s: ["recommend", s.damaged(), "--history", "0 2"],
        r"fusion\.json' is damaged.*Copy or export the bundle again",
    ),
    "k is larger than the catalogue": (
        lambda s: ["recommend", str(s.bundle), "--history", "0 2", "-k", "25"],
        r"k=25 is not possible: the catalogue has 24 items\. Take 1 to 24",
    ),
    "more places for new items than there are": (
        lambda s: ["recommend", str(s.bundle), "--history", "0 2", "-k", "3", "--new-items", "4"],
        r"4 new items do not go into a list of 3\. Take 0 to 3",
    ),
    "the provider is not there": (
        lambda s: ["recommend", str(s.bundle), "--history", "0", "--provider", "tensorrt"],
        r"The provider 'tensorrt' is not in this ONNX Runtime|cannot open .* with 'tensorrt': .*ask for the provider",
    ),
    "the provider is unknown": (
        lambda s: ["recommend", str(s.bundle), "--history", "0", "--provider", "gpu"],
        r"Unknown provider 'gpu'\..*Choices: cpu, cuda, tensorrt",
    ),
    # rows in, rows out
    "neither rows nor a history": (
        lambda s: ["recommend", str(s.bundle)],
        r"Give either a file of rows and --out FILE, or one history: --history",
    ),
    "rows without a place for the answers": (
        lambda s: ["recommend", str(s.bundle), s.rows()],
        r"needs a place for the answers: --out FILE",
    ),
    "the file of rows is not there": (
        lambda s: ["recommend", str(s.bundle), s.out("users.csv"), "--out", s.out()],
        r"There is no file '.*users\.csv'",
    ),
    "the rows have no history": (
        lambda s: ["recommend", str(s.bundle), s.write("u.csv", "name\nann\n"), "--out", s.out()],
        r"u\.csv has no column 'history' or 'user_id'\. Its columns: name\.",
    ),
    "the rows have users and there is no log": (
        lambda s: ["recommend", str(s.bundle), s.write("u.csv", "user_id\nu1\n"), "--out", s.out()],
        r"a bundle does not hold users' histories.*--interactions FILE",
    ),
    "no user is known": (
        lambda s: [
            *("recommend", str(s.bundle), s.write("u.csv", "user_id\nnobody\n"), "--out", s.out()),
            *("--interactions", str(s.data / "interactions.csv")),
        ],
        r"No row of .*u\.csv could be answered: line 2: unknown user 'nobody'",
    ),
    "the output exists": (
        lambda s: ["recommend", str(s.bundle), s.rows(), "--out", s.write("out.csv", "mine")],
        r"out\.csv' exists already\. Replace it by --overwrite, or name another file",
    ),
    "the output's kind is unknown": (
        lambda s: ["recommend", str(s.bundle), s.rows(), "--out", s.out("out.xlsx")],
        r"Unknown kind of output file 'out\.xlsx'\..*\*\.csv, \*\.jsonl",
    ),
    "the input's kind is unknown": (
        lambda s: ["recommend", str(s.bundle), s.write("users.txt", "0 2\n"), "--out", s.out()],
        r"Unknown kind of file 'users\.txt'\..*\*\.parquet",
    ),
    # zero-shot
    "neither items nor a bundle to score with": (
        lambda s: ["score", "--users", s.rows(), "--out", s.out()],
        r"Give either --items FILE \(zero-shot, by text alone\) or --bundle BUNDLE",
    ),
    "the output is the items": (
        lambda s: [
            *("score", "--users", s.rows(), "--items", s.write("i.csv", "item_id,title\nn1,New\n")),
            *("--out", s.out("i.csv"), "--overwrite", "--model", str(s.model)),
        ],
        r"i\.csv' is itself read here; name another file for the answers",
    ),
    "the output is the log": (
        lambda s: [
            *("recommend", str(s.bundle), s.write("u.csv", "user_id\n0\n"), "--overwrite"),
            *("--interactions", str(s.data / "interactions.csv"), "--out", str(s.data / "interactions.csv")),
        ],
        r"interactions\.csv' is itself read here; name another file for the answers",
    ),
    "the items to score have no text": (
        lambda s: ["score", "--users", s.rows(), "--out", s.out(), "--items", s.write("i.csv", "item_id\nn1\n")],
        r"i\.csv has no items with text",
    ),
    "an encoder is to judge without training": (
        lambda s: [
            *("score", "--users", s.rows(), "--out", s.out(), "--model", str(s.encoder)),
            *("--items", str(s.data / "items.csv")),
        ],
        r"is an encoder: it has no answer words.*causal model.*text similarity",
    ),
    "the benchmark is unknown": (
        lambda s: ["bench", "sped"],
        r"Unknown benchmark 'sped'\. Did you mean 'speed'\?",
    ),
}


def mistake(arguments, capsys):
    """The one message that `recllm ARGUMENTS` ends with."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    shown = capsys.readouterr()
    assert stop.value.code == 2, shown.err
    assert "Traceback" not in shown.out + shown.err
    assert shown.err.count("Error: ") == 1
    return shown.err[shown.err.index("Error: ") :].removesuffix("\n")


@pytest.mark.parametrize(("typed", "answer"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_has_one_message_with_cause_and_way_out(typed, answer, site, capsys):
    message = mistake(typed(site), capsys)
    assert "\n" not in message
    assert re.search(answer, message), message


@pytest.mark.parametrize("name", ["train", "evaluate", "export", "score", "quickstart"])
def test_without_the_training_extra_its_name_is_said_first(name, site, capsys, monkeypatch):
    typed = {
        "train": ["train", site.run()],
        "evaluate": ["evaluate", str(site.trained)],
        "export": ["export", str(site.trained)],
        "score": ["score", "--users", site.rows(), "--out", site.out(), "--items", str(site.data / "items.csv")],
        "quickstart": ["quickstart", "--out", site.out("runs")],
    }
    monkeypatch.setitem(sys.modules, "torch", None)
    message = mistake(typed[name], capsys)
    assert "'torch', which is not installed" in message
    assert 'pip install "recllm[train]"' in message
    assert not (site.place / "runs").exists()


def test_outside_a_checkout_there_are_no_benchmarks(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("recllm.commands.__file__", str(tmp_path / "recllm" / "commands.py"))
    assert "only in a checkout" in mistake(["bench", "speed"], capsys)


def test_after_a_mistake_in_the_run_file_the_same_folder_can_be_used(site, capsys):
    mistake(["train", site.run(model="tinylm")], capsys)
    folder = site.place / "runs" / "tried"
    assert not folder.exists() or not any(folder.iterdir())


@pytest.mark.parametrize("typed", [["trian"], ["train"], ["fetch", "--frobnicate"], ["recommend", "b", "-k", "ten"]])
def test_what_typer_refuses_has_the_same_exit_code(typed, capsys):
    with pytest.raises(SystemExit) as stop:
        main(typed)
    assert stop.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_mistake_in_a_row_is_no_mistake_of_the_job(site, capsys):
    rows = site.write("users.jsonl", '{"history": ["0", "2"]}\n{"history": 7}\n')
    with pytest.raises(SystemExit) as stop:
        main(["recommend", str(site.bundle), rows, "--out", site.out()])
    assert stop.value.code == 0
    assert "1 rows could not be answered" in capsys.readouterr().out
    (rejected,) = (site.place / "out.csv.rejects.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(rejected)["line"] == 2


@pytest.mark.parametrize(("train", "flags"), [(commands.train_here, []), (commands.launch_training, [["--cpu"]])])
def test_a_folder_that_is_taken_is_told_before_what_training_needs_is_loaded(train, flags, tiny_run, monkeypatch):
    monkeypatch.setattr(commands, "needs", lambda *_: pytest.fail("told too late"))
    with pytest.raises(RecllmError, match=r"is not empty\. Go on with it by --resume"):
        train(tiny_run / "run.toml", [], *flags, resume=False, overwrite=False)

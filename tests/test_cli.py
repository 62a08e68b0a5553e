"""The command line: light to start, every command with an example, and each road walked on a tiny model."""

import errno
import importlib.util
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import typer
from safetensors.numpy import load_file, save_file

import recllm
from recllm import answering, commands
from recllm.bundle import read_manifest, seal
from recllm.cli import app, main
from recllm.errors import RecllmError
from recllm.growing import SEALED
from recllm.ranking import ItemIndex

HEAVY = ("torch", "transformers", "polars", "numpy", "pydantic", "tokenizers", "rich", "onnxruntime")


def recllm_says(capsys, *arguments, code=0):
    """Standard output and error of `recllm ARGUMENTS`."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    shown = capsys.readouterr()
    assert stop.value.code == code, shown.err
    return shown.out, shown.err


def imported_by(code):
    script = f"import sys\ntry:\n    {code}\nexcept SystemExit:\n    pass\nprint('loaded', *sys.modules)"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    modules = {name.split(".")[0] for name in found.stdout.rsplit("loaded", 1)[1].split()}
    return modules & set(HEAVY), found.stdout


def test_help_imports_nothing_heavy():
    heavy, shown = imported_by("from recllm.cli import main; main(['--help'])")
    assert "quickstart" in shown
    assert not heavy


def test_importing_recllm_imports_nothing_heavy():
    assert not imported_by("import recllm; recllm.load")[0]
    # The probe sees what is imported.
    assert "numpy" in imported_by("import recllm.ranking")[0]


def paths(group=None, path=()):
    group = group or typer.main.get_command(app)
    for name, command in group.commands.items():
        yield (*path, name)
        if hasattr(command, "commands"):
            yield from paths(command, (*path, name))


@pytest.mark.parametrize("path", list(paths()), ids=" ".join)
def test_every_command_explains_itself_with_an_example(path, capsys):
    out, _ = recllm_says(capsys, *path, "--help")
    assert "Example" in out
    examples = [line.strip() for line in out[out.index("Example") :].splitlines()[1:] if line.strip()]
    assert examples
    assert all(line.startswith(f"recllm {' '.join(path)}") for line in examples)


def test_the_version(capsys):
    assert recllm_says(capsys, "--version")[0] == f"recllm {recllm.__version__}\n"


def test_interrupting_ends_with_130(capsys, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "fetch_names", interrupted)
    assert recllm_says(capsys, "fetch", "ml-100k", code=130)[1].startswith("Interrupted. Training goes on where it was")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left"),
        OSError("No space (os error 28)"),
        ValueError("x (os error 28)"),
        OSError(errno.EFBIG, "File too large"),
    ],
)
def test_a_full_disk_is_told_without_a_traceback(capsys, monkeypatch, error):
    def full(_):
        raise error

    monkeypatch.setattr(commands, "fetch_names", full)
    said = recllm_says(capsys, "fetch", "ml-100k", code=2)[1]
    assert said.startswith(
        f"Error: the disk is full, or a file larger than allowed ({error}). What is finished is kept"
    )


def test_memory_that_does_not_suffice_is_told_without_a_traceback(capsys, monkeypatch):
    def asked(_):
        raise MemoryError("Unable to allocate 596. GiB for an array\nwith shape (1, 2)")

    monkeypatch.setattr(commands, "fetch_names", asked)
    said = recllm_says(capsys, "fetch", "ml-100k", code=2)[1]
    assert said.startswith("Error: memory does not suffice (Unable to allocate 596. GiB for an array). Make what takes")


@pytest.mark.parametrize("code", [errno.EACCES, errno.ENOTDIR, errno.EROFS])
def test_a_place_that_cannot_be_used_is_told_without_a_traceback(capsys, monkeypatch, code):
    def closed(_):
        raise OSError(code, "Nothing goes there", "/some/place")

    monkeypatch.setattr(commands, "fetch_names", closed)
    said = recllm_says(capsys, "fetch", "ml-100k", code=2)[1]
    assert said.startswith("Error: '/some/place': Nothing goes there. Name another place")


def test_a_bug_is_not_hidden(monkeypatch):
    def broken(_):
        raise ZeroDivisionError

    monkeypatch.setattr(commands, "fetch_names", broken)
    with pytest.raises(ZeroDivisionError):
        main(["fetch", "ml-100k"])


def test_fetch_without_a_name_lists_what_is_known(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("RECLLM_CACHE", str(tmp_path))
    out, _ = recllm_says(capsys, "fetch")
    assert "ml-100k" in out
    assert "not fetched" in out
    assert "GroupLens research licence" in out


def test_check_says_what_was_read(capsys, checkerboard_folder):
    out, _ = recllm_says(capsys, "data", "check", checkerboard_folder)
    assert "rows read: 400" in out
    assert "licence: not stated" in out


def test_columns_are_mapped(capsys, tmp_path):
    (tmp_path / "log.csv").write_text("who,what\na,1\nb,2\n", encoding="utf-8")
    (tmp_path / "shop.csv").write_text("sku,words\n1,Red\n2,Blue\n", encoding="utf-8")
    given = ("--column", "user_id=who", "--column", "item_id=what", "--items", tmp_path / "shop.csv")
    out, _ = recllm_says(capsys, "data", "check", tmp_path / "log.csv", *given, "--item-column", "title=words")
    assert "rows kept: 2" in out
    assert "title = words" in out


def test_a_preview_shows_likes_by_the_rating_that_is_named_and_no_candidate_where_there_is_none(
    capsys, tiny_lm_folder, rated_checkerboard, tmp_path
):
    rated_checkerboard.interactions.frame.write_csv(tmp_path / "interactions.csv")
    rated_checkerboard.catalog.frame.write_csv(tmp_path / "items.csv")
    given = ("data", "preview", tmp_path, "--model", tiny_lm_folder)
    assert "disliked" in recllm_says(capsys, *given)[0]
    assert "disliked" not in recllm_says(capsys, *given, "--like-at", "0.5")[0]
    said = recllm_says(capsys, *given, "--prompt", "next_item", "--item", "3", code=2)[1]
    assert "--item is for prompts about a candidate" in said


def test_preview_shows_the_prompt_and_counts_its_tokens(capsys, checkerboard_folder, tiny_lm_folder):
    out, _ = recllm_says(
        capsys, *("data", "preview", checkerboard_folder, "--model", tiny_lm_folder), "--user", "u1", "--item", "3"
    )
    assert "Next item: Blue film 3" in out
    counted = [int(line.split()[0]) for line in out.splitlines() if line[:6].strip().isdigit()]
    *pieces, whole = counted
    assert sum(pieces) == whole > 0


def test_train_hands_flags_to_the_launcher(capsys, tmp_path, monkeypatch):
    run = tmp_path / "run.toml"
    run.write_text('[data]\nname = "x"\n', encoding="utf-8")
    ran = []

    def launched(command, variables):
        assert variables == {}
        ran.append(command)
        return 7

    monkeypatch.setattr(commands, "run_child", launched)
    recllm_says(capsys, "train", run, "--set", "seed=3", "--resume", "--", "--num_processes", "2", "--use_cpu", code=7)
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--use_cpu"]
    assert ran == [[*launcher, "-m", "recllm.train", str(run), "--set", "seed=3", "--resume"]]


def test_train_launches_with_a_profile(capsys, tmp_path, monkeypatch):
    run, ran = tmp_path / "run.toml", []
    run.write_text('[data]\nname = "x"\n', encoding="utf-8")

    def launched(command, variables):
        ran.append((command, variables))
        return 0

    monkeypatch.setattr(commands, "run_child", launched)
    recllm_says(capsys, "train", run, "--profile", "gpus", "--", "--num_processes", "4")
    file = str(commands.PROFILES / "gpus.yaml")
    assert ran[0][0][3:] == ["--config_file", file, "--num_processes", "4", "-m", "recllm.train", str(run)]
    assert ran[0][1] == {}
    recllm_says(capsys, "train", run, "--profile", "cpu")
    assert ran[1][1] == {"ACCELERATE_USE_CPU": "true"}


CHILD = """
import os, time
print(os.environ["SAID"], flush=True)
time.sleep(60)
"""
PARENT = """
import sys
from recllm.process import run_child
raise SystemExit(run_child([sys.executable, "-c", sys.argv[1]], {"SAID": "child"}))
"""


def test_what_ends_the_command_ends_its_child_too():
    with subprocess.Popen([sys.executable, "-c", PARENT, CHILD], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout.readline() == "child\n"
        parent.terminate()
        assert parent.stdout.read() == ""  # at once: nobody holds the pipe any more
        assert parent.wait() == 128 + signal.SIGTERM


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("cpu", "MULTI_GPU"),
        ("gpu", "NO"),
        ("gpus", "MULTI_GPU"),
        ("fsdp2", "FSDP"),
        ("zero2", "DEEPSPEED"),
        ("zero3", "DEEPSPEED"),
    ],
)
def test_accelerate_reads_every_profile(name, kind, monkeypatch):
    from accelerate.commands.config.config_args import load_config_from_file

    monkeypatch.setattr(importlib.util, "find_spec", lambda _: "there")
    shipped = sorted(path.stem for path in commands.PROFILES.glob("*.yaml"))
    assert shipped == ["cpu", "fsdp2", "gpu", "gpus", "zero2", "zero3"]
    config = load_config_from_file(commands.profile_flags(name)[1])
    assert config.distributed_type == kind
    assert config.gpu_ids == (None if name == "cpu" else "all")  # a scheduler says which it may see
    assert config.use_cpu is (name == "cpu")


def test_a_profile_of_deepspeed_says_what_it_needs(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(RecllmError, match=r"The profile 'zero3' needs DeepSpeed: pip install deepspeed"):
        commands.profile_flags("zero3")


def test_evaluate_prints_the_table_and_the_paired_differences(capsys, tiny_run, tmp_path):
    before = (tiny_run / "evaluation.json").exists()
    out, _ = recllm_says(capsys, "evaluate", tiny_run)
    lines = out.splitlines()
    assert any(line.startswith("fusion less … in NDCG@10") for line in lines)
    differences = [line.split()[0] for line in lines[lines.index(next(x for x in lines if "fusion less" in x)) + 1 :]]
    assert {"popularity", "mf", "lm", "light"} <= set(differences)
    kept = json.loads((tiny_run / "evaluation.json").read_text(encoding="utf-8"))
    assert "test" in kept
    page = (tiny_run / "evaluation.html").read_text(encoding="utf-8")
    line = next(line.split() for line in lines if line.startswith("  mf "))
    assert f"<dt>mf, NDCG@10</dt><dd>{line[1]} ({line[2]} … {line[4]})</dd>" in page.replace("\N{NO-BREAK SPACE}", " ")
    if not before:
        (tiny_run / "evaluation.json").unlink()


def test_a_table_that_nobody_reads_to_its_end_is_kept(tiny_run, monkeypatch, tmp_path):
    folder = shutil.copytree(tiny_run, tmp_path / "tiny")
    (folder / "evaluation.json").unlink(missing_ok=True)

    def closed(_):
        raise BrokenPipeError

    monkeypatch.setattr(commands, "say", closed)
    with pytest.raises(BrokenPipeError):
        commands.evaluate_folder(folder, "test")
    assert (folder / "evaluation.json").is_file()
    assert (folder / "evaluation.html").is_file()


@pytest.mark.parametrize("command", ["evaluate", "export"])
def test_a_fusion_of_other_settings_than_the_runs_is_not_taken_for_its_own(command, capsys, tiny_run, tmp_path):
    """As a kill leaves it while the fusion is fitted anew."""
    folder = shutil.copytree(tiny_run, tmp_path / "tiny")
    (folder / "fusion-settings.json").unlink()
    _, err = recllm_says(capsys, command, folder, code=2)
    assert "is not the one that its run.toml asks for" in err
    assert f"recllm train {folder} --resume" in err


def test_export_prints_parity_and_fails_only_when_every_recipe_does(capsys, tiny_run, monkeypatch):
    from recllm.gate import Exported

    measured = {"max_difference": 0.5, "rank_correlation": 0.25, "top10_overlap": 0.1}
    parity = {"lm": measured, "light items": measured}
    failed = Exported("int8", None, parity, ["lm: rank_correlation is 0.2500, at least 0.98 is asked"])
    kept = Exported("fp32", Path("bundle-fp32"), {}, [])
    monkeypatch.setattr("recllm.export.export_run", lambda *_, **__: [failed])
    out, _ = recllm_says(capsys, "export", tiny_run, "--recipe", "int8", code=1)
    assert "int8     lm           max_difference 0.5  rank_correlation 0.25" in out
    assert "int8     light items  max_difference 0.5" in out
    assert "int8: left out. lm: rank_correlation is 0.2500" in out
    monkeypatch.setattr("recllm.export.export_run", lambda *_, **__: [failed, kept])
    assert "fp32: bundle-fp32" in recllm_says(capsys, "export", tiny_run)[0]


def test_one_history_prints_titles_and_shares(capsys, tiny_bundle):
    out, err = recllm_says(capsys, "recommend", tiny_bundle, "--history", "0 2 99", "-k", "3")
    head, *rows = out.splitlines()
    expected = recllm.load(tiny_bundle).recommend([["0", "2"]], k=3)
    assert head.split()[:4] == ["rank", "item", "title", "score"]
    assert head.split()[4:] == list(expected.shares)
    assert [row.split()[1] for row in rows] == expected.ids[0]
    assert all(" film " in row for row in rows)
    assert "passed over: 99" in err


def test_ids_with_blanks_that_were_parted_are_told_how_to_be_written(monkeypatch, capsys):
    known = SimpleNamespace(
        index=ItemIndex(["id one", "two"]),
        check_k=lambda *_: None,
        recommend=lambda *_, **__: SimpleNamespace(ids=[[]], scores=np.zeros((1, 0)), shares={}),
    )
    stages = SimpleNamespace(open=lambda: known)
    answering.recommend_history(stages, "id one two", 1, exclude_seen=None, new_items=0)
    assert "passed over: id, one. Some ids have blanks: part them by |, or write a JSON" in capsys.readouterr().err
    answering.recommend_history(stages, "id one|two", 1, exclude_seen=None, new_items=0)
    assert not capsys.readouterr().err


def test_recommend_reads_and_writes_files(capsys, tiny_bundle, tmp_path, checkerboard_folder):
    (tmp_path / "ids.csv").write_text("user_id\nu0\nu1\n", encoding="utf-8")
    log = ("--interactions", checkerboard_folder / "interactions.csv")
    out, _ = recllm_says(
        capsys, "recommend", tiny_bundle, tmp_path / "ids.csv", "--out", tmp_path / "out.parquet", "-k", "2", *log
    )
    assert "4 lines for 2 users" in out
    found = pl.read_parquet(tmp_path / "out.parquet")
    assert found["user_id"].to_list() == ["u0", "u0", "u1", "u1"]


def test_a_log_is_read_by_the_columns_of_the_training(capsys, tiny_bundle, tmp_path):
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    facts = {key: value for key, value in read_manifest(bundle).items() if key not in SEALED}
    assert facts["columns"] == {}
    seal(bundle, facts | {"columns": {"timestamp": "bought", "rating": "gone"}})
    rows = ["user_id,item_id,date,bought", *(f"u,{item},{place},{9 - place}" for place, item in enumerate("048"))]
    (tmp_path / "log.csv").write_text("\n".join(rows), encoding="utf-8")
    (tmp_path / "ids.csv").write_text("user_id\nu\n", encoding="utf-8")
    found = {}
    for name, more in (("told", []), ("given", ["--column", "timestamp=date"])):
        where = ("--interactions", tmp_path / "log.csv", "--out", tmp_path / f"{name}.jsonl", "-k", "3", *more)
        recllm_says(capsys, "recommend", bundle, tmp_path / "ids.csv", *where)
        found[name] = pl.read_ndjson(tmp_path / f"{name}.jsonl")["score"].to_list()
    expected = {"told": ["8", "4", "0"], "given": ["0", "4", "8"]}
    for name, history in expected.items():
        assert found[name] == pytest.approx(recllm.load(bundle).recommend([history], k=3).scores[0].tolist(), abs=1e-6)
    assert found["told"] != found["given"]


@pytest.mark.parametrize(
    ("known", "message"),
    [([], "knows no item of"), (["0", "1"], "knows 2 of 24 items; the others keep their first score")],
)
def test_a_ranker_of_another_catalogue_is_told(capsys, monkeypatch, tiny_bundle, known, message):
    reader = SimpleNamespace(soft_from=9)
    monkeypatch.setattr(answering, "load_ranker", lambda *_, **__: SimpleNamespace(catalog=known, reader=reader))
    stages = answering.Stages(tiny_bundle, "cpu", 1, "exact", Path("judge"), 10, 1.0, None)
    if known:
        stages.open()
        assert message in capsys.readouterr().err
    else:
        with pytest.raises(RecllmError, match=message):
            stages.open()


def test_a_zero_shot_job_knows_the_weights_that_answer(monkeypatch, tmp_path, tiny_lm_folder, checkerboard_folder):
    model = shutil.copytree(tiny_lm_folder, tmp_path / "model")
    (tmp_path / "users.jsonl").write_text('{"history": ["0", "2"]}\n', encoding="utf-8")
    found = []

    def record(_scorer, _items, _known, job, *, unread):
        found.append(job.identity())
        return SimpleNamespace(lines=lambda _: [])

    monkeypatch.setattr(answering, "score_items_file", record)
    job = answering.Job(tmp_path / "users.jsonl", tmp_path / "out.csv")
    for added in (0.0, 1.0):  # other weights behind the same name
        weights = load_file(model / "model.safetensors")
        save_file({name: value + added for name, value in weights.items()}, model / "model.safetensors")
        answering.score_zero_shot(checkerboard_folder / "items.csv", None, [], job, str(model), "relevance", None)
    before, after = found
    assert {key for key in before if before[key] != after[key]} == {"weights"}


def test_score_by_a_bundle(capsys, tiny_bundle, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"history": ["0"], "candidates": ["2", "3"]}\n', encoding="utf-8")
    recllm_says(
        capsys, *("score", "--bundle", tiny_bundle, "--users", tmp_path / "in.jsonl"), "--out", tmp_path / "o.jsonl"
    )
    found = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["item_id"] for row in found] == ["2", "3"]


def test_new_items_are_scored_zero_shot(capsys, tmp_path, tiny_lm_folder, checkerboard_folder):
    (tmp_path / "new.csv").write_text(
        "item_id,title,plot\nn1,Red film 30,A Drama\nn2,Blue film 31,\n", encoding="utf-8"
    )
    (tmp_path / "users.jsonl").write_text('{"history": ["0", "2"]}\n{"history": ["zz"]}\n', encoding="utf-8")
    given = ("--items", tmp_path / "new.csv", "--history-items", checkerboard_folder / "items.csv")
    where = ("--users", tmp_path / "users.jsonl", "--out", tmp_path / "out.csv", "--model", tiny_lm_folder)
    out, _ = recllm_says(capsys, "score", *given, *where)
    found = pl.read_csv(tmp_path / "out.csv")
    assert found["item_id"].to_list() == ["n1", "n2"]
    assert found["score"][0] != found["score"][1]
    # A history of unknown items is not judged: what the model says of it is the calibration itself.
    assert "1 rows could not be answered" in out
    (rejected,) = (tmp_path / "out.csv.rejects.jsonl").read_text(encoding="utf-8").splitlines()
    assert "no item of the history is known by its text; name the file that has it: --history-items" in rejected


def test_zero_shot_says_what_has_no_text_and_reads_both_files_by_their_own_columns(capsys, tmp_path, tiny_lm_folder):
    (tmp_path / "new.csv").write_text("sku,label\nn1,Red film 30\nn2,\n", encoding="utf-8")
    (tmp_path / "old.csv").write_text("item_id,title\nh1,Blue film 3\nh2,\n", encoding="utf-8")
    rows = [{"history": own} for own in (["h1"], ["h2"], ["h1", "h2"], [])]
    (tmp_path / "users.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    given = ("--items", tmp_path / "new.csv", "--history-items", tmp_path / "old.csv", "--model", tiny_lm_folder)
    where = ("--users", tmp_path / "users.jsonl", "--out", tmp_path / "out.csv")
    columns = ("--item-column", "item_id=sku", "--item-column", "title=label")
    _, err = recllm_says(capsys, "score", *given, *where, *columns)
    assert "1 of 2 items of" in err
    found = pl.read_csv(tmp_path / "out.csv")
    assert found["user_id"].to_list() == ["line 1", "line 1", "line 3", "line 3"]
    assert found["score"].is_null().to_list() == [False, True] * 2
    rejected = [json.loads(line) for line in (tmp_path / "out.csv.rejects.jsonl").read_text("utf-8").splitlines()]
    assert [row["line"] for row in rejected] == [2, 4]
    assert rejected[0]["reason"].startswith("no item of the history is known by its text")
    assert rejected[1]["reason"].startswith("the history is empty")
    _, err = recllm_says(capsys, "score", *given, *where, "--item-column", "title=lable", "--overwrite", code=2)
    assert "Did you mean 'label'" in err


def test_ratings_of_a_history_are_read_zero_shot(capsys, tmp_path, tiny_lm_folder, checkerboard_folder):
    (tmp_path / "new.csv").write_text("item_id,title\nn1,Red film 30\n", encoding="utf-8")
    rows = [{"history": ["0", "2"], "ratings": ratings} for ratings in ([1, 1], [5, 5])]
    late = [*[{"history": ["0"]}] * 5, *rows]  # behind the rows that are answered first
    (tmp_path / "late.jsonl").write_text("".join(json.dumps(row) + "\n" for row in late), encoding="utf-8")
    (tmp_path / "users.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    given = ("--items", tmp_path / "new.csv", "--history-items", checkerboard_folder / "items.csv")
    where = ("--users", tmp_path / "users.jsonl", "--out", tmp_path / "out.csv", "--model", tiny_lm_folder)
    _, err = recllm_says(capsys, "score", *given, *where, "--users", tmp_path / "late.jsonl", code=2)
    assert "Line 6 of" in err
    assert not list(tmp_path.glob("*out.csv*"))
    _, err = recllm_says(capsys, "score", *given, *where, code=2)
    assert "say from which rating on an item was liked, --like-at 4 of five stars" in err
    recllm_says(capsys, "score", *given, *where, "--like-at", "4", "--overwrite")
    apart = pl.read_csv(tmp_path / "out.csv")["score"].to_list()
    assert apart[0] != pytest.approx(apart[1], abs=1e-6)
    recllm_says(capsys, "score", *given, *where, "--like-at", "1", "--overwrite")
    alike = pl.read_csv(tmp_path / "out.csv")["score"].to_list()
    assert alike == pytest.approx([apart[1]] * 2, abs=1e-6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["recommend", "b", "--history", "50", "--out", "o.csv"], "--history answers on the screen"),
        (["score", "--items", "i.csv", "--users", "u.csv", "--out", "o.csv", "--provider", "cuda"], "is for --bundle"),
        (
            ["score", "--bundle", "b", "--users", "u.csv", "--out", "o.csv", "--like-at", "4"],
            "--like-at is for --items",
        ),
        (["recommend", "b", "--history", "50", "--shard", "1/2"], "--shard is for a file of rows"),
        (["recommend", "b", "--history", "50", "--rank-seconds", "2"], "--rank-seconds is for a ranker"),
        (["recommend", "b", "u.csv", "--out", "o.csv", "--column", "item_id=sku"], "--column is for the log"),
        (["score", "--bundle", "b", "--users", "u.csv", "--out", "o.csv", "--model", "m"], "--model is for --items"),
        (
            ["score", "--items", "i.csv", "--users", "u.csv", "--out", "o.csv", "--column", "item_id=sku"],
            "--column is for the log",
        ),
    ],
)
def test_options_that_would_be_passed_over_are_refused(capsys, words, message):
    assert message in recllm_says(capsys, *words, code=2)[1]


def test_quickstart_ends_with_one_line_of_json(capsys, tmp_path, monkeypatch):
    asked = {}

    def walked(out, *, seed, resume, say, **more):
        asked.update(out=out, seed=seed, resume=resume, **more)
        say("1/5 Training")
        return {"bars": {}, "seconds": {"total": 1.0}}

    monkeypatch.setattr("recllm.quickstart.quickstart", walked)
    out, err = recllm_says(capsys, "quickstart", "--json", "--out", tmp_path, "--seed", "4", "--steps", "2")
    assert json.loads(out) == {"bars": {}, "seconds": {"total": 1.0}}
    assert err == "1/5 Training\n"
    assert asked == {"out": tmp_path, "seed": 4, "steps": 2, "resume": False}
    assert recllm_says(capsys, "quickstart", "--out", tmp_path) == ("1/5 Training\n", "")


def test_bench_runs_the_file_and_passes_its_exit_code_on(capsys, monkeypatch):
    ran = []

    def run(command):
        ran.append(command)
        return 3

    monkeypatch.setattr(commands, "run_child", run)
    recllm_says(capsys, "bench", "speed", "--users", "5", code=3)
    ((program, file, *rest),) = ran
    assert program == sys.executable
    assert Path(file).name == "speed.py"
    assert rest == ["--users", "5"]

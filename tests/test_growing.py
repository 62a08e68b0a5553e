"""Items added to a bundle on disk: the same answers as `with_items` gives in memory, and nothing else changes."""

import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import polars as pl
import pytest
import torch

import recllm
from recllm.bundle import read_manifest, seal
from recllm.collaborative import load_collaborative
from recllm.errors import RecllmError
from recllm.export import _check_not_grown, export_run
from recllm.files import alone, read_json, write_json
from recllm.growing import SEALED, add_items
from recllm.heads import borrowed_heads
from recllm.likeness import likeness_to
from recllm.runs import load_run
from recllm.tasks import prepare
from recllm.train import train_run
from recllm.trained import lenders, load_language, load_light, sequence_scorer

NEW = [
    {"item_id": "new-red", "title": "Red film 99", "genres": "Drama", "colour": "red"},
    {"item_id": "new-blue", "title": "Blue film 98", "genres": "Comedy", "colour": "blue"},
]
HISTORIES = [["0", "2", "4"], ["1", "3", "5", "7"], [], ["2", "new-blue"]]


@pytest.fixture
def new_items(tmp_path):
    path = tmp_path / "new.csv"
    pl.DataFrame([*NEW, {"item_id": "3", "title": "known already", "genres": "", "colour": ""}]).write_csv(path)
    return path


def test_the_grown_bundle_answers_as_the_recommender_that_grew_in_memory(tiny_bundle, new_items, tmp_path):
    assert add_items(tiny_bundle, new_items, tmp_path / "grown") == 2
    before = recllm.load(tiny_bundle)
    expected = before.with_items([{k: v for k, v in item.items() if k != "colour"} for item in NEW])
    grown = recllm.load(tmp_path / "grown")
    assert grown.index.ids == (*before.index.ids, "new-red", "new-blue")
    assert grown.catalog.record("3") == before.catalog.record("3")
    ours, theirs = (each.recommend(HISTORIES, k=20) for each in (grown, expected))
    assert ours.ids == theirs.ids
    np.testing.assert_allclose(ours.scores, theirs.scores, rtol=1e-5, atol=1e-5)
    assert any("new-red" in ids for ids in ours.ids)
    told = [each.scorers["expected_popularity"].item_vectors(grown.index)[:, 0] for each in (grown, expected)]
    assert np.isfinite(told[0][-2:]).all()
    assert np.array_equal(*told, equal_nan=True)
    for name in ("light", "lm"):  # heads that the like of them tell, and not their own text
        ours, theirs = (each.scorers[name].items[-2:] for each in (grown, expected))
        assert np.allclose(ours, theirs, atol=1e-6)
        own = before.scorers[name].told
        added = range(len(before.index), len(grown.index))
        near = likeness_to(grown.catalog, grown.scorers["text"].vectors, own.rows, added)
        given = {part: own.parts[part].of(near) for part in ("text", "factors")}
        (heads,) = before._item_graphs[name].run(["heads"], given)
        assert 0 < own.shrinkage < 1
        assert np.allclose(ours, np.concatenate([own.shrinkage * heads, own.parts["own"].of(near)], axis=1), atol=1e-5)
    assert not list((tmp_path / "grown" / "cf").glob("likeness*"))  # as large as all pairs of items
    facts, old = read_manifest(tmp_path / "grown"), read_manifest(tiny_bundle)
    assert facts["items_added"] == 2
    assert {facts[key] == old[key] for key in ("name", "recipe", "scorers", "data")} == {True}


def test_what_a_model_has_learnt_of_items_is_exported_and_told_of_new_ones(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setenv("RECLLM_CACHE", str(tmp_path / "cache"))
    keys = ["light.num_train_epochs=2", "train.max_steps=3", "train.eval_steps=3", "model.learnt_width=3"]
    keys += ["light.relative_positions=true", "light.gated=true"]  # in the graph as well
    run = load_run(tiny_run / "run.toml", ["name=learnt", f"output={tmp_path}", *keys])
    task = train_run(run, say=lambda _: None)
    (exported,) = export_run(run, task, ["fp32"], say=lambda _: None)
    bundle, parts = recllm.load(exported.folder), load_collaborative(run, task)
    grown = bundle.with_items([{k: v for k, v in item.items() if k != "colour"} for item in NEW])
    near = likeness_to(grown.catalog, grown.scorers["text"].vectors, bundle.scorers["light"].told.rows, [-2, -1])
    for name, load in (("light", load_light), ("lm", load_language)):
        model, history = load(run, task, parts.features)
        assert model.learnt.shape == (len(task.index), 3)
        for part in (".relative.", ".gate."):
            assert any(part in key for key in model.state_dict()) == (name == "light")
        lender = lenders(run, parts)
        torch_scorer = sequence_scorer(model, history, task, lender)
        assert np.allclose(bundle.scorers[name].items, torch_scorer.items, atol=1e-4)
        assert np.allclose(bundle.scorers[name].table, model.table().detach().numpy(), atol=1e-5)
        shrinkage, told = bundle.scorers[name].told.shrinkage, bundle.scorers[name].told.parts
        assert shrinkage == pytest.approx(borrowed_heads(model, lender).shrinkage)
        assert told["own"].weights.shape[1] == 3 + 1  # and the bias
        factors = torch.from_numpy(np.concatenate([told["factors"].of(near), told["own"].of(near)[:, :3]], axis=1))
        with torch.inference_mode():
            heads = model.heads(torch.from_numpy(told["text"].of(near)), factors).numpy()
        expected = np.concatenate([shrinkage * heads, told["own"].of(near)[:, 3:]], axis=1)
        assert np.allclose(grown.scorers[name].items[-2:], expected, atol=1e-4)
        assert not np.allclose(told["own"].of(near)[:, :3], 0.0, atol=1e-4)


def test_a_bundle_may_grow_in_its_own_place_and_again(tiny_bundle, new_items, tmp_path):
    add_items(tiny_bundle, new_items, tmp_path / "grown")
    more = tmp_path / "more.jsonl"
    more.write_text('{"item_id": "newest", "title": "Red film 100"}\n', encoding="utf-8")
    assert add_items(tmp_path / "grown", more, tmp_path / "grown") == 1
    assert recllm.load(tmp_path / "grown").index.ids[-3:] == ("new-red", "new-blue", "newest")
    assert read_manifest(tmp_path / "grown")["items_added"] == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grown", "more.jsonl", "new.csv"]


def test_an_export_takes_no_added_items_away(tiny_run, tiny_bundle, new_items, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(tiny_run, folder)
    run = load_run(folder)
    run = run.model_copy(update={"name": "run", "output": str(tmp_path)})
    add_items(tiny_bundle, new_items, folder / "bundle-fp32", overwrite=True)
    with pytest.raises(RecllmError, match=r"2 items were added to '.*bundle-fp32' after it was made"):
        export_run(run, prepare(run), ["fp32"], say=lambda _: None)
    assert "new-red" in recllm.load(folder / "bundle-fp32").index
    (exported,) = export_run(run, prepare(run), ["fp32"], say=lambda _: None, overwrite=True)
    assert "new-red" not in recllm.load(exported.folder).index


def test_a_bundle_that_is_replaced_meanwhile_is_not_mixed_with_the_new_one(
    tiny_bundle, new_items, tmp_path, monkeypatch
):
    place, other = tmp_path / "bundle", tmp_path / "other"
    shutil.copytree(tiny_bundle, place)
    shutil.copytree(tiny_bundle, other)
    seal(other, {key: value for key, value in read_manifest(other).items() if key not in SEALED} | {"name": "other"})
    real = recllm.runtime.Recommender.with_items

    def meanwhile(self, records):
        place.rename(tmp_path / "gone")
        other.rename(place)
        return real(self, records)

    monkeypatch.setattr(recllm.runtime.Recommender, "with_items", meanwhile)
    with pytest.raises(RecllmError, match=r"bundle' was replaced while items were added to it\. Nothing was written"):
        add_items(place, new_items, place)
    assert read_manifest(place)["name"] == "other"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "gone", "new.csv"]


def test_an_export_brings_no_removed_items_back(tmp_path):
    folder = tmp_path / "bundle-fp32"
    folder.mkdir()
    write_json(folder / "manifest.json", {"removed": ["0", "7"]})
    with pytest.raises(RecllmError, match=r"2 items were removed from the lists of .*recllm items remove"):
        _check_not_grown(folder)
    write_json(folder / "manifest.json", {"removed": []})
    _check_not_grown(folder)


def test_an_export_waits_for_who_adds_items(tiny_run, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "tiny")
    run, said = load_run(tmp_path / "tiny"), []
    task = prepare(run, lambda _: None)
    shutil.rmtree(run.folder / "bundle-fp32", ignore_errors=True)
    with ThreadPoolExecutor(1) as pool:
        with alone(run.folder / "bundle-fp32"):
            exported = pool.submit(export_run, run, task, ["fp32"], said.append)
            while not said and not exported.done():
                time.sleep(0.01)
            assert said[0].endswith("waiting for it")
            assert not (run.folder / "bundle-fp32").exists()
        assert exported.result()[0].folder == run.folder / "bundle-fp32"


@pytest.mark.slow
def test_text_histories_pass_over_new_items_after_loading_too(tiny_run, new_items, tmp_path):
    overrides = ["model.history='text'", "light.num_train_epochs=0", "train.max_steps=2", f"output={tmp_path}"]
    run = load_run(tiny_run, overrides)
    train_run(run, say=lambda _: None)
    (result,) = export_run(run, prepare(run), ["fp32"], say=lambda _: None)
    records = [{k: v for k, v in item.items() if k != "colour"} for item in NEW]
    expected = recllm.load(result.folder).with_items(records).recommend([["2", "new-red"]], k=5)
    folder = tmp_path / "grown"
    add_items(result.folder, new_items, folder)
    assert recllm.load(folder).recommend([["2", "new-red"]], k=5).ids == expected.ids
    # Bundles that have grown before have the texts of their first items only.
    history = read_json(folder / "lm.json")
    assert len(history["texts"]) == 26
    write_json(folder / "lm.json", history | {"texts": history["texts"][:24]})
    seal(folder, {key: value for key, value in read_manifest(folder, verify=False).items() if key not in SEALED})
    assert recllm.load(folder).recommend([["2", "new-red"]], k=5).ids == expected.ids


def test_items_of_which_nothing_is_said_are_refused(tiny_bundle, tmp_path):
    path = tmp_path / "new.csv"
    path.write_text("item_id,Film Name\nnew,Red film 99\n", encoding="utf-8")
    with pytest.raises(
        RecllmError, match=r"Of 1 items of .*none has text .*: the file has .*Film Name.* bundle .*title"
    ):
        add_items(tiny_bundle, path, tmp_path / "grown")
    assert not (tmp_path / "grown").exists()


def test_an_item_without_text_is_never_recommended(tiny_bundle):
    grown = recllm.load(tiny_bundle).with_items([{"item_id": "bare"}, {"item_id": "told", "title": "Red film 99"}])
    every = [str(item) for item in range(24)]
    for history in (["0", "2"], every, []):
        found = grown.recommend([history], k=3, new_items=1).ids[0]
        assert "bare" not in found
        assert "told" in found
    assert np.isnan(grown.score([["0", "2"]], ["bare"])[0]).all()


def test_lists_in_a_new_items_record_are_joined_as_in_a_file(tiny_bundle):
    grown = recllm.load(tiny_bundle).with_items(
        [{"item_id": "new", "title": "Red film 99", "genres": ["Drama", "War"]}]
    )
    assert grown.catalog.record("new")["genres"] == "Drama, War"


def test_what_is_passed_over_of_a_file_of_items_is_said(tiny_bundle, tmp_path):
    path, said = tmp_path / "new.csv", []
    rows = ["item_id,title,colour", "n1,Red film 99,red", "n1,Blue film 98,blue", "n2,,", "3,known,", ",Nobody,"]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    assert add_items(tiny_bundle, path, tmp_path / "grown", say=said.append) == 1
    path.write_text("item_id,title\nn2,Red film 97\n", encoding="utf-8")
    assert add_items(tmp_path / "grown", path, tmp_path / "grown") == 1  # its text may come another day
    told = "\n".join(said)
    for part in ("1 items are in the bundle already", "left out: colour", "1 items have no text", "new.csv: warning"):
        assert part in told, told
    assert sum(line.startswith("new.csv: warning") for line in said) >= 2


def test_columns_are_those_of_the_option_else_those_of_the_training(tiny_bundle, tmp_path):
    path = tmp_path / "new.csv"
    path.write_text("item_id,Film Name,words\nnew,Red film 99,Blue film 99\n", encoding="utf-8")
    add_items(tiny_bundle, path, tmp_path / "grown", columns={"title": "words"})
    assert recllm.load(tmp_path / "grown").catalog.record("new")["title"] == "Blue film 99"

    told = tmp_path / "told"
    shutil.copytree(tiny_bundle, told)
    manifest = read_manifest(told)
    assert manifest["item_columns"] == {}
    seal(
        told,
        {"item_columns": {"title": "Film Name", "genres": "gone"}, **{k: manifest[k] for k in ("scorers", "name")}},
    )
    add_items(told, path, told)
    assert recllm.load(told).catalog.record("new")["title"] == "Red film 99"
    # One column that is named leaves the others as they were told.
    path.write_text("sku,Film Name\nnewer,Red film 97\n", encoding="utf-8")
    add_items(told, path, told, columns={"item_id": "sku"})
    assert recllm.load(told).catalog.record("newer")["title"] == "Red film 97"
    assert read_manifest(told)["item_columns"] == {"title": "Film Name", "genres": "gone"}


def test_a_text_longer_than_the_encoder_reads_is_cut(tiny_run, tmp_path):
    folder = tmp_path / "long"
    shutil.copytree(tiny_run, folder)
    prompt = folder / "recipes" / "item.toml"
    prompt.write_text(prompt.read_text(encoding="utf-8").replace("= 128", "= 100_000"), encoding="utf-8")
    long = load_run(folder)
    (exported,) = export_run(long, prepare(long), ["fp32"], say=lambda _: None)
    assert read_manifest(exported.folder)["item_positions"] == 512
    path = tmp_path / "new.csv"
    path.write_text(f"item_id,title\nnew,{'Red film ' * 900}\n", encoding="utf-8")
    add_items(exported.folder, path, exported.folder)
    assert "new" in recllm.load(exported.folder).index.ids


def test_white_space_inside_an_id_stays(tiny_bundle, tmp_path):
    path = tmp_path / "new.csv"
    path.write_text("item_id,title\n n  1 ,Red  film 99\n", encoding="utf-8")
    add_items(tiny_bundle, path, tmp_path / "grown")
    grown = recllm.load(tmp_path / "grown")
    assert grown.index.ids[-1] == "n  1"
    assert grown.catalog.record("n  1")["title"] == "Red film 99"


def test_a_link_to_a_bundle_stays_one(tiny_bundle, new_items, tmp_path):
    add_items(tiny_bundle, new_items, tmp_path / "versions" / "1")
    (tmp_path / "current").symlink_to(tmp_path / "versions" / "1", target_is_directory=True)
    (tmp_path / "more.csv").write_text("item_id,title\nnewest,Red film 100\n", encoding="utf-8")
    add_items(tmp_path / "current", tmp_path / "more.csv", tmp_path / "current")
    assert (tmp_path / "current").is_symlink()
    assert recllm.load(tmp_path / "current").index.ids[-1] == "newest"
    assert [path.name for path in (tmp_path / "versions").iterdir()] == ["1"]


def test_nothing_new_is_said_and_nothing_written(tiny_bundle, tmp_path):
    path = tmp_path / "old.csv"
    path.write_text("item_id,title\n3,Blue film 3\n", encoding="utf-8")
    with pytest.raises(RecllmError, match=r"old.csv has no item that '.*' does not have already; nothing was written"):
        add_items(tiny_bundle, path, tmp_path / "grown")
    assert not (tmp_path / "grown").exists()


def test_the_same_items_again_leave_only_those_without_text(tiny_bundle, tmp_path):
    path = tmp_path / "new.csv"
    path.write_text("item_id,title\nn1,Red film 99\nn2,\n", encoding="utf-8")
    assert add_items(tiny_bundle, path, tmp_path / "grown") == 1
    with pytest.raises(RecllmError, match=r"Of 1 items of .*new.csv that '.*' does not have, none has text"):
        add_items(tmp_path / "grown", path, tmp_path / "again")


def test_another_bundle_is_replaced_when_asked_for_only(tiny_bundle, new_items, tmp_path):
    shutil.copytree(tiny_bundle, tmp_path / "other")
    before = (tmp_path / "other" / "manifest.json").read_bytes()
    with pytest.raises(
        RecllmError, match=r"other' is another bundle\. Replace it by --overwrite, or name another folder"
    ):
        add_items(tiny_bundle, new_items, tmp_path / "other")
    assert (tmp_path / "other" / "manifest.json").read_bytes() == before
    assert add_items(tiny_bundle, new_items, tmp_path / "other", overwrite=True) > 0
    assert recllm.load(tmp_path / "other").manifest["items_added"] > 0


def test_a_bundle_that_is_not_there_is_named_before_what_would_be_replaced(tiny_bundle, new_items, tmp_path):
    shutil.copytree(tiny_bundle, tmp_path / "other")
    with pytest.raises(RecllmError, match=r"nowhere' is not there. Make a bundle"):
        add_items(tmp_path / "nowhere", new_items, tmp_path / "other")


def test_what_is_no_bundle_is_not_replaced(tiny_bundle, new_items, tmp_path):
    (tmp_path / "thesis").mkdir()
    with pytest.raises(RecllmError, match=r"thesis' is there already, and is no bundle"):
        add_items(tiny_bundle, new_items, tmp_path / "thesis")


def test_of_several_that_add_at_once_none_loses_its_items(tiny_bundle, tmp_path):
    folder = tmp_path / "grown"
    shutil.copytree(tiny_bundle, folder)
    files = []
    for place in range(3):
        files.append(tmp_path / f"{place}.csv")
        files[-1].write_text(f"item_id,title\nnew{place},Red film 9{place}\n", encoding="utf-8")
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(lambda path: add_items(folder, path, folder), files)) == [1, 1, 1]
    assert {"new0", "new1", "new2"} <= set(recllm.load(folder).index.ids)


def test_a_bundle_does_not_grow_inside_another_one(tiny_bundle, new_items):
    with pytest.raises(RecllmError, match=r"would lie in a bundle, which holds its own files only"):
        add_items(tiny_bundle, new_items, tiny_bundle / "inner")
    with pytest.raises(RecllmError, match=r"would lie in a bundle, which holds its own files only"):
        add_items(tiny_bundle, new_items, tiny_bundle / "deep" / "inner")


def test_a_column_that_the_bundle_has_not_is_named(tiny_bundle, new_items, tmp_path):
    with pytest.raises(RecllmError, match=r"'titel'. Did you mean 'title'.*--item-column OURS=THEIRS"):
        add_items(tiny_bundle, new_items, tmp_path / "grown", columns={"titel": "title"})
    assert not (tmp_path / "grown").exists()


def test_of_two_that_make_one_new_bundle_the_second_is_refused(tiny_bundle, tmp_path, monkeypatch):
    import recllm.growing as module

    target, alone = tmp_path / "grown", module.alone

    @contextmanager
    def waiting(folder, say):
        with alone(folder, say):
            shutil.copytree(tiny_bundle, target)  # the first one's, which was there when the second had waited
            yield

    path = tmp_path / "new.csv"
    path.write_text("item_id,title\nn2,Red film 97\n", encoding="utf-8")
    monkeypatch.setattr(module, "alone", waiting)
    with pytest.raises(RecllmError, match=r"is another bundle\. Replace it by --overwrite"):
        add_items(tiny_bundle, path, target)

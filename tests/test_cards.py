"""Cards say what was trained and how good it is; adapters load in plain PEFT."""

import shutil
from pathlib import Path

import pytest
import torch

from recllm.adapters import AdapterRecipe, attach
from recllm.cards import ADAPTER, CARD, card, save_adapter, without_figures, write_adapter_card, write_bundle_card
from recllm.checkpoints import trained_values
from recllm.collaborative import load_collaborative
from recllm.files import read_json, write_json
from recllm.lm import load_base
from recllm.runs import ENVIRONMENT, load_run
from recllm.tasks import prepare
from recllm.trained import load_language


@pytest.fixture
def run(tiny_run, tmp_path):
    """A copy of the run whose card may be changed."""
    folder = tmp_path / "tiny"
    shutil.copytree(tiny_run, folder)
    return load_run(folder)


def test_the_adapter_loads_in_plain_peft_and_says_the_same(tiny_run, tiny_lm_folder):
    from peft import PeftModel
    from transformers import AutoModel

    run = load_run(tiny_run)
    task = prepare(run, lambda _: None)
    merged, _ = load_language(run, task, load_collaborative(run, task).features)
    bare = AutoModel.from_pretrained(tiny_lm_folder, dtype=torch.float32)
    plain = PeftModel.from_pretrained(bare, tiny_run / "lm" / ADAPTER).eval()
    ids = torch.tensor([[3, 14, 15, 92, 65, 35]])
    with torch.inference_mode():
        ours, theirs = (model(input_ids=ids).last_hidden_state for model in (merged.body.model, plain))
        untrained = plain.unload()(input_ids=ids).last_hidden_state
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert (theirs - untrained).abs().max() > 1e-3


def test_the_adapters_card_says_what_it_is_before_and_after_it_was_measured(run):
    path = run.folder / "lm" / ADAPTER / CARD
    (run.folder / "evaluation.json").unlink(missing_ok=True)
    write_adapter_card(run)
    text = path.read_text(encoding="utf-8")
    assert text.startswith(
        "---\nlibrary_name: peft\n"
    )  # its base model lies in a folder, of which the hub knows nothing
    assert "Not evaluated yet: `recllm evaluate tiny`" in text
    assert f"| adapter | {run.adapter.recipe} |" in text
    fingerprint = next(iter(read_json(run.folder / "environment.json")["data"].values()))
    assert fingerprint[:16] in text
    assert "PeftModel.from_pretrained(" in text
    row = {
        "slice": "cold item",
        "rows": 12,
        "users": 7,
        "scorer": "fusion",
        "NDCG@10": [0.25, 0.2, 0.3],
        "MRR": [None] * 3,
    }
    write_json(run.folder / "evaluation.json", {"test": {"metrics": ["NDCG@10", "MRR"], "rows": [row]}})
    write_adapter_card(run)
    assert "| cold item | 12 | fusion | 0.2500 (0.200 … 0.300) | – |" in path.read_text(encoding="utf-8")


def test_the_card_of_a_run_without_a_language_model_names_no_adapter(run):
    without = run.model_copy(update={"model": run.model.model_copy(update={"name": "none", "item_encoder": "minilm"})})
    lines = card(without, "A title")
    assert "| base model | none |" in lines
    assert not [line for line in lines if line.startswith(("| adapter |", "| layers |", "| training |"))]


def test_a_pinned_base_model_is_named_as_transformers_and_peft_take_it(run, tiny_lm_folder):
    facts = read_json(run.folder / ENVIRONMENT)
    write_json(run.folder / ENVIRONMENT, facts | {"models": {"owner/model@0a1b": "f" * 16}})
    pinned = run.model_copy(update={"model": run.model.model_copy(update={"name": "owner/model@0a1b"})})
    model = attach(load_base(tiny_lm_folder).model, AdapterRecipe(tuner="lora", config={"target_modules": ["q_proj"]}))
    save_adapter(pinned, model, trained_values(model), run.folder / "lm")
    config = read_json(run.folder / "lm" / ADAPTER / "adapter_config.json")
    assert (config["base_model_name_or_path"], config["revision"]) == ("owner/model", "0a1b")
    write_adapter_card(pinned)
    text = (run.folder / "lm" / ADAPTER / CARD).read_text(encoding="utf-8")
    assert text.startswith("---\nbase_model: owner/model\n")
    assert 'AutoModel.from_pretrained("owner/model", revision="0a1b"' in text
    # As it was trained over, without asking the hub.
    assert f"| base model | owner/model@0a1b, weights sha256 {'f' * 16} |" in text


def test_the_hub_is_told_base_models_by_its_own_names_alone(run):
    from huggingface_hub import ModelCard

    for name, base in (("smollm2-135m-instruct", "HuggingFaceTB/SmolLM2-135M-Instruct"), ("none", None)):
        named = run.model_copy(
            update={"model": run.model.model_copy(update={"name": name, "item_encoder": "minilm-l6"})}
        )
        write_json(run.folder / ENVIRONMENT, read_json(run.folder / ENVIRONMENT) | {"models": {name: "f" * 16}})
        write_bundle_card(named, run.folder, "fp32", "recommends")
        told = ModelCard.load(run.folder / CARD).data.to_dict()
        expected = {} if base is None else {"base_model": base}
        assert told == expected | {"library_name": "onnx", "tags": ["recommendation", "recllm"]}


def test_a_card_leaks_no_path_and_no_cell(run, tmp_path, monkeypatch):
    named = run.model_copy(update={"data": run.data.model_copy(update={"name": "/data/a|b"})})
    assert "| data | /data/a\\|b |" in card(named, "A title")
    (run.folder / "evaluation.json").unlink(missing_ok=True)
    assert run.folder.is_absolute()
    assert card(run, "A title")[-1].startswith("Not evaluated yet: `recllm evaluate tiny`")
    shutil.copytree(run.folder, tmp_path / "my runs" / "tiny")
    monkeypatch.chdir(tmp_path)
    here = run.model_copy(update={"output": "my runs"})
    assert card(here, "A title")[-1].startswith("Not evaluated yet: `recllm evaluate 'my runs/tiny'`")


def test_the_card_of_a_ranker_has_its_models_figures_alone(run):
    rows = [
        {"slice": "all", "rows": 80, "users": 40, "scorer": scorer, "AUC": [figure, None, None]}
        for scorer, figure in (("relevance", 0.7), ("fusion", 0.9))
    ]
    write_json(run.folder / "evaluation.json", {"test": {"metrics": ["AUC"], "rows": rows}})
    write_bundle_card(run, run.folder, "fp32", "ranks candidates")
    text = (run.folder / CARD).read_text(encoding="utf-8")
    assert "| all | 80 | relevance | 0.7000 |" in text
    assert "fusion" not in text
    assert "recllm.ranker.load_ranker" in text


def test_bundles_that_were_exported_before_are_known(run, tiny_bundle):
    (run.folder / "evaluation.json").unlink(missing_ok=True)
    for name in ("bundle-new", "bundle-old"):
        (run.folder / name).mkdir()
    write_bundle_card(run, run.folder / "bundle-old", "fp32", "recommends")
    write_json(run.folder / "evaluation.json", {"test": {"metrics": ["MRR"], "rows": []}})
    write_bundle_card(run, run.folder / "bundle-new", "fp32", "recommends")
    assert run.folder / "bundle-old" in without_figures(run)
    assert run.folder / "bundle-new" not in without_figures(run)


def test_a_bundle_has_its_card(tiny_bundle):
    text = (tiny_bundle / CARD).read_text(encoding="utf-8")
    assert "\n# tiny: a bundle that recommends (fp32)\n" in text
    assert 'model = recllm.load("bundle-fp32")' in text
    assert CARD in read_json(tiny_bundle / "manifest.json")["files"]


def test_a_tuner_that_keeps_what_does_not_train_is_saved_with_it(tiny_run, tiny_lm_folder, tmp_path):
    from peft import PeftModel
    from transformers import AutoModel

    recipe = AdapterRecipe(tuner="vera", config={"r": 4, "target_modules": ["q_proj"], "save_projection": True})
    model = attach(load_base(tiny_lm_folder).model, recipe)
    save_adapter(load_run(tiny_run), model, trained_values(model), tmp_path)
    bare = AutoModel.from_pretrained(tiny_lm_folder, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(bare, tmp_path / ADAPTER)
    for name, value in model.named_buffers():
        if "vera_" in name:
            assert torch.equal(dict(loaded.named_buffers())[name], value)


def test_an_adalora_adapter_is_saved_with_all_ranks_of_the_best_step(tiny_run, tiny_lm_folder, tmp_path):
    from peft import PeftModel
    from transformers import AutoModel

    recipe = AdapterRecipe(tuner="adalora", config={"init_r": 6, "target_r": 3, "target_modules": ["q_proj", "v_proj"]})
    model = attach(load_base(tiny_lm_folder).model, recipe).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_" in name:
                value.normal_()
    names = [name.rsplit(".", 1)[0] for name, _ in model.named_parameters() if "lora_E" in name]
    # The last step has left three ranks of six; the best one, whose weights are there, had all of them.
    pattern = {name: [True, True, True, False, False, False] for name in names}
    model.active_peft_config.rank_pattern = pattern
    save_adapter(load_run(tiny_run), model, trained_values(model), tmp_path)
    assert model.active_peft_config.rank_pattern is pattern
    bare = AutoModel.from_pretrained(tiny_lm_folder, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(bare, tmp_path / ADAPTER).eval()
    ids = torch.arange(12)[None]
    with torch.inference_mode():
        expected, found = (own(input_ids=ids).last_hidden_state for own in (model, loaded))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("start", "kept"), [("pissa", False), ("olora", False), ("gaussian", True)])
def test_an_adapter_that_changes_its_base_model_is_not_saved_for_peft(start, kept, tiny_run, tiny_lm_folder, tmp_path):
    config = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": start}
    model = attach(load_base(tiny_lm_folder).model, AdapterRecipe(tuner="lora", config=config))
    save_adapter(load_run(tiny_run), model, trained_values(model), tmp_path)
    assert (tmp_path / ADAPTER).is_dir() is kept


def changed(run, **keys):
    """The run with keys of `[model]` changed, whose models are known."""
    names = {value: "f" * 16 for key, value in keys.items() if key in ("name", "likelihood")}
    facts = read_json(run.folder / ENVIRONMENT)
    write_json(run.folder / ENVIRONMENT, facts | {"models": facts["models"] | names})
    return run.model_copy(update={"model": run.model.model_copy(update=keys)})


def adapter_card(run):
    write_adapter_card(run)
    return (run.folder / "lm" / ADAPTER / CARD).read_text(encoding="utf-8")


def test_the_card_of_an_adapter_over_the_first_layers_loads_no_more_of_them(run):
    text = adapter_card(changed(run, layers=1))
    assert ", num_hidden_layers=1)" in text
    assert "| layers | the first 1 |" in text
    text = adapter_card(run)
    assert "num_hidden_layers" not in text
    assert "| layers | all |" in text


def test_a_base_model_by_a_name_of_recllms_own_is_loaded_from_a_folder(run):
    text = adapter_card(changed(run, name="smollm2-135m-instruct"))
    assert 'from_pretrained("FOLDER")  # FOLDER: where smollm2-135m-instruct lies' in text
    assert "FOLDER" not in adapter_card(changed(run, name="owner/model@0a1b"))


def test_a_card_says_what_read_the_text_and_what_was_taken_away(run):
    lines = card(changed(run, likelihood="smollm2-135m", item_encoder="minilm-l6"), "A title")
    assert "| item text by | minilm-l6 |" in lines
    assert f"| likelihood by | smollm2-135m, weights sha256 {'f' * 16} |" in lines
    assert f"| item text by | {Path(run.model.name).name} |" in card(run, "A title")  # of a path the last part
    assert run.model.name not in "\n".join(card(run, "A title"))
    assert not [line for line in card(run, "A title") if line.startswith(("| likelihood by |", "| control |"))]
    control = run.control.model_copy(update={"text": "shuffled"})
    lines = card(run.model_copy(update={"control": control}), "A title")
    assert "| control | control.text = shuffled: not for use |" in lines


def test_the_figures_of_validation_are_none_of_the_test(run):
    write_json(run.folder / "evaluation.json", {"valid": {"metrics": ["MRR"], "rows": []}})
    assert card(run, "A title")[-1].startswith("Not evaluated yet")

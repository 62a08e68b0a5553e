"""Adapters: misspelt keys are named before a model loads, merging changes nothing, the base stays frozen."""

import copy

import pytest
import torch
from transformers import AutoModel, BertConfig, DistilBertConfig, LlamaConfig, MixtralConfig, PhiConfig

from recllm.adapters import AdapterRecipe, attach, check_places, load_adapter, merge
from recllm.bottleneck import Bottleneck
from recllm.errors import RecllmError
from recllm.lm import load_base, skeleton
from recllm.recipes import recipe_names
from recllm.runs import AdapterSettings

IDS = torch.tensor([[3, 14, 15, 92, 65, 35]])


def recipe(**keys):
    # Weights drawn, not zero: an adapter that does nothing would merge into anything.
    config = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False}
    return AdapterRecipe(tuner="lora", config=config | keys)


def hidden(model):
    with torch.inference_mode():
        return model.eval()(input_ids=IDS).last_hidden_state


@pytest.mark.parametrize("name", ["lora", "dora", "rslora", "qlora"])
def test_shipped_recipes_are_peft_configurations(name):
    found = load_adapter(AdapterSettings(recipe=name))
    assert found.tuner == "lora"
    assert (found.quantization is not None) is (name == "qlora")


@pytest.mark.parametrize("name", recipe_names("adapters"))
def test_shipped_recipes_find_their_places_before_any_weights_load(name, tiny_lm_folder):
    check_places(skeleton(tiny_lm_folder), load_adapter(AdapterSettings(recipe=name)))


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (recipe(target_modules=["wq", "wk"]), r"target_modules = wk, wq\. Its linear layers: .*q_proj"),
        (recipe(target_modules=r".*\.wq"), r"target_modules = \.\*\\\.wq\. Its linear"),
        (recipe(target_modules=["q_proj"], layers_to_transform=[0]), r"layers_to_transform needs layers_pattern here"),
        (recipe(target_modules=["q_proj"], layers_pattern="layers"), r"PEFT refuses the adapter 'lora'"),
        (AdapterRecipe(tuner="bottleneck", config={"target_modules": ["nowhere"]}), "nowhere"),
    ],
)
def test_places_that_are_not_there_are_told_before_any_weights_load(found, message, tiny_lm_folder):
    with pytest.raises(RecllmError, match=message):
        check_places(skeleton(tiny_lm_folder), found)


def test_places_are_looked_for_in_the_layers_that_are_kept(tiny_lm_folder):
    last = recipe(target_modules=["q_proj"], layers_to_transform=[1], layers_pattern="layers")
    check_places(skeleton(tiny_lm_folder), last)
    with pytest.raises(RecllmError, match="No module of this model goes by"):
        check_places(skeleton(tiny_lm_folder, 1), last)
    assert next(skeleton(tiny_lm_folder).parameters()).device.type == "meta"


def test_keys_of_the_run_file_go_over_the_recipes():
    found = load_adapter(AdapterSettings.model_validate({"recipe": "lora", "r": 3, "use_rslora": True}))
    assert (found.config["r"], found.config["use_rslora"]) == (3, True)
    assert found.config["target_modules"] == "all-linear"


def test_a_misspelt_key_is_refused_with_the_nearest_right_one():
    with pytest.raises(RecllmError, match=r"key of the adapter 'lora' 'lora_alhpa'. Did you mean 'lora_alpha'?"):
        load_adapter(AdapterSettings.model_validate({"recipe": "lora", "lora_alhpa": 8}))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (
            "bnb_4bit_quant_typ = 'nf4'\nload_in_4bit = true",
            r"Unknown key in \[quantization\].*'bnb_4bit_quant_typ'. Did you",
        ),
        ("bnb_4bit_quant_type = 'nf4'", r"\[quantization\] asks for nothing\. Set load_in_4bit or load_in_8bit"),
        ("load_in_4bit = true\nbnb_4bit_compute_dtype = 'bf16'", r"transformers refuses \[quantization\]"),
        ("load_in_4bit = true\nbnb_4bit_quant_type = 'nf5'", r"Unknown bnb_4bit_quant_type in .*'nf5'"),
    ],
)
def test_quantisation_is_checked_for_transformers_passes_over_what_it_does_not_know(keys, words, tmp_path):
    path = tmp_path / "own.toml"
    path.write_text(f"tuner = 'lora'\n[quantization]\n{keys}\n", encoding="utf-8")
    with pytest.raises(RecllmError, match=words):
        load_adapter(AdapterSettings(recipe=str(path)))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"recipe": "qlora", "init_lora_weights": "orthogonal"}, "base are integers"),
        ({"recipe": "lora", "init_lora_weights": "orthogonal", "r": 5}, r"take an even adapter\.r"),
        ({"recipe": "lora", "task_type": "CAUSAL_LM"}, r"task_type is PEFT's .*Leave it out"),
    ],
)
def test_what_cannot_be_attached_is_refused_before_any_model_loads(keys, words):
    with pytest.raises(RecllmError, match=words):
        load_adapter(AdapterSettings.model_validate(keys))


def test_an_unknown_tuner_is_refused_with_the_nearest_right_one(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('tuner = "lorra"\n[config]\nr = 4\n', encoding="utf-8")
    with pytest.raises(RecllmError, match=r"Unknown tuner 'lorra'. Did you mean 'lora'?"):
        load_adapter(AdapterSettings(recipe=str(path)))


def test_an_unknown_recipe_names_the_choices():
    with pytest.raises(RecllmError, match=r"'loar'. Did you mean 'lora'"):
        load_adapter(AdapterSettings(recipe="loar"))


def test_what_peft_refuses_is_one_message(tiny_lm_folder):
    with pytest.raises(RecllmError, match=r"PEFT refuses the adapter 'lora' for this model"):
        attach(load_base(tiny_lm_folder).model, recipe(target_modules=["no_such_layer"]))


@pytest.mark.parametrize("keys", [{}, {"use_dora": True}, {"use_rslora": True}], ids=["lora", "dora", "rslora"])
def test_merging_changes_no_hidden_state_and_does_so_twice(tiny_lm_folder, keys):
    bare = hidden(load_base(tiny_lm_folder).model)
    adapted = attach(load_base(tiny_lm_folder).model, recipe(**keys))
    weights = copy.deepcopy(adapted.state_dict())
    before = hidden(adapted)
    assert (before - bare).abs().max() > 1e-3
    first = hidden(merge(adapted))
    fresh = attach(load_base(tiny_lm_folder).model, recipe(**keys))
    fresh.load_state_dict(weights)
    second = hidden(merge(fresh))
    # Of the largest value: PEFT keeps names in a set, so every process draws other weights.
    assert (first - before).abs().max() <= 1e-5 * before.abs().max()
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("config", "attention", "feed_forward"),
    [
        (PhiConfig, "self_attn.dense", "mlp.fc2"),
        (DistilBertConfig, "attention.out_lin", "ffn.lin2"),
        (BertConfig, "attention.output.dense", "output.dense"),
        (LlamaConfig, "self_attn.o_proj", "mlp.down_proj"),
    ],
)
def test_bottlenecks_stand_in_both_places_of_a_layer(config, attention, feed_forward):
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    if config is DistilBertConfig:
        small = {"dim": 16, "hidden_dim": 32, "n_layers": 1, "n_heads": 2}
    model = AutoModel.from_config(config(vocab_size=40, **small))
    adapted = attach(model, load_adapter(AdapterSettings(recipe="houlsby")))
    places = [name for name, module in adapted.named_modules() if isinstance(module, Bottleneck)]
    assert len(places) == 2
    assert places[0].endswith(attention)
    assert places[1].endswith(feed_forward)


def test_a_bottleneck_inside_another_one_is_in_the_pass():
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = AutoModel.from_config(LlamaConfig(vocab_size=40, hidden_act="silu", **small))
    adapted = attach(model, AdapterRecipe(tuner="bottleneck", config={"target_modules": ["mlp", "down_proj"]}))
    adapted(input_ids=torch.arange(6)[None]).last_hidden_state.sum().backward()
    trained = {name: value for name, value in adapted.named_parameters() if value.requires_grad}
    assert len({name.rpartition(".")[0].rpartition(".")[0] for name in trained}) == 2
    assert all(value.grad is not None for value in trained.values())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"is_parallel": True, "mh_adapter": True}, "beside feed-forward blocks"),
        ({"is_parallel": True, "output_adapter": False}, "beside feed-forward blocks"),
        ({"output_adapter": False}, "there would be no adapter at all"),
    ],
)
def test_places_of_a_bottleneck_that_cannot_be_are_refused(config, message, tmp_path):
    path = tmp_path / "own.toml"
    lines = [f"{key} = {str(value).lower()}" for key, value in config.items()]
    path.write_text('tuner = "bottleneck"\n[config]\n' + "\n".join(lines) + "\n", encoding="utf-8")
    with pytest.raises(RecllmError, match=message):
        load_adapter(AdapterSettings(recipe=str(path)))


def test_a_model_without_one_of_the_places_is_named():
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = AutoModel.from_config(MixtralConfig(vocab_size=40, num_local_experts=2, num_key_value_heads=2, **small))
    with pytest.raises(
        RecllmError, match=r"A model of the kind 'mixtral' has no module whose name ends in one of down_proj"
    ):
        attach(model, load_adapter(AdapterSettings(recipe="houlsby")))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"target_modules": ["k_proj"]}, r"at 'layers.0.self_attn.k_proj', which is not 16 wide, as the model"),
        ({"target_modules": ["up_proj"]}, r"which is not 16 wide"),
        ({"target_modules": ["self_attn"]}, r"which is an attention, not its last product"),
        ({"target_modules": ["o_proj", "downn_proj"]}, r"No module .* has a name that ends in 'downn_proj'"),
        ({"target_modules": ["down_proj"], "is_parallel": True}, r"which is not 16 wide"),
    ],
)
def test_a_module_that_no_bottleneck_fits_is_named(config, message):
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = AutoModel.from_config(LlamaConfig(vocab_size=40, num_key_value_heads=1, **small))
    with pytest.raises(RecllmError, match=message):
        check_places(model, AdapterRecipe(tuner="bottleneck", config=config))


def test_a_merged_model_has_no_adapter_left(tiny_lm_folder):
    merged = merge(attach(load_base(tiny_lm_folder).model, recipe()))
    bare = load_base(tiny_lm_folder).model
    assert set(merged.state_dict()) == set(bare.state_dict())
    assert merge(bare) is bare


def test_only_the_adapter_trains(tiny_lm_folder):
    adapted = attach(load_base(tiny_lm_folder).model, recipe())
    assert {name.split(".")[-3] for name, value in adapted.named_parameters() if value.requires_grad} == {
        "lora_A",
        "lora_B",
    }


@pytest.mark.parametrize("after", [float("nan"), 1.002])
def test_a_merge_that_changes_the_model_is_refused(after, tiny_lm_folder, monkeypatch):
    model = attach(load_base(tiny_lm_folder).model, recipe(r=2, target_modules=["q_proj"]))
    probes = iter([torch.ones(1), torch.full((1,), after)])
    monkeypatch.setattr("recllm.adapters._probe", lambda _: next(probes))
    with pytest.raises(RecllmError, match="Merging the adapter changes"):
        merge(model)

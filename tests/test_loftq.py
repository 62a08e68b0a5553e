"""LoftQ: LoRA starts from the rounding error of a base model in 4 bits, and is merged over the same rounded weights."""

import shutil

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from recllm.adapters import AdapterRecipe, load_adapter, merge
from recllm.errors import RecllmError
from recllm.lm import adapted, load_base
from recllm.recipes import find_recipe
from recllm.runs import AdapterSettings


def recipe_of(**keys):
    return load_adapter(
        AdapterSettings.model_validate({"recipe": "qlora", "init_lora_weights": "loftq", "r": 16} | keys)
    )


def hidden(model):
    with torch.inference_mode():
        return model.eval()(input_ids=torch.arange(24).view(2, 12)).last_hidden_state.float().numpy()


def exact(recipe, **quantization):
    """The recipe with products in float32, so that nothing but the weights is rounded."""
    own = recipe.quantization | {"bnb_4bit_compute_dtype": "float32"} | quantization
    return recipe.model_copy(update={"quantization": own})


@pytest.fixture(scope="module")
def turned_folder(wide_lm_folder, tmp_path_factory):
    """A model whose layers hold their weights the other way round, with a square one and others."""
    folder = tmp_path_factory.mktemp("turned") / "lm"
    shutil.copytree(wide_lm_folder, folder)
    config = GPT2Config(vocab_size=400, n_embd=128, n_layer=2, n_head=4, n_positions=64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(params=["wide_lm_folder", "turned_folder"])
def folder(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("double", [True, False])
def test_it_starts_nearer_to_the_base_model_than_its_4_bits_are(double, folder):
    recipe = exact(recipe_of(r=96), bnb_4bit_use_double_quant=double)
    bare, rounded = (hidden(load_base(folder, own).model) for own in (None, recipe))
    begun = adapted(load_base(folder, recipe), recipe)
    assert np.abs(hidden(begun) - bare).mean() < 0.5 * np.abs(rounded - bare).mean()

    # What was learnt over 4 bits means the same over the full precision that it is merged with.
    whole = recipe.in_full_precision()
    assert whole.quantization is None
    over = adapted(load_base(folder, whole), whole)
    weights = {name: value for name, value in begun.named_parameters() if "lora_" in name}
    with torch.no_grad():
        for name, value in over.named_parameters():
            if "lora_" in name:
                drawn = torch.randn(value.shape, generator=torch.manual_seed(0)) / 50
                value.copy_(weights[name].add_(drawn))
    trained = hidden(begun)
    np.testing.assert_allclose(hidden(over), trained, atol=1e-4 * np.abs(trained).max())
    np.testing.assert_allclose(hidden(merge(over)), trained, atol=1e-4 * np.abs(trained).max())


@pytest.mark.parametrize("keys", [{}, {"lora_alpha": 4}, {"use_rslora": True}])
def test_the_whole_rank_makes_good_the_whole_error_whatever_the_scaling(keys, folder):
    # Of more ranks than the layers have there are some to spare, which start as LoRA's do.
    recipe = exact(recipe_of(r=160, **keys))
    begun, bare = (hidden(own) for own in (adapted(load_base(folder, recipe), recipe), load_base(folder).model))
    np.testing.assert_allclose(begun, bare, atol=1e-4 * np.abs(bare).max())


def test_ranks_to_spare_can_learn(wide_lm_folder):
    recipe = recipe_of(r=160)
    begun = adapted(load_base(wide_lm_folder, recipe), recipe)
    own = {name: value for name, value in begun.named_parameters() if "q_proj.lora_" in name}
    for name, value in own.items():
        spare = value[128:] if "lora_A" in name else value[:, 128:]
        assert bool(spare.any()) is ("lora_A" in name)


@pytest.mark.parametrize("given", [{"recipe": "lora"}, {"recipe": "adalora"}])
def test_it_needs_4_bits_to_start_from(given):
    with pytest.raises(RecllmError, match=r"starts from the rounding error of a base model in 4 bits. Take .*'qlora'"):
        load_adapter(AdapterSettings.model_validate(given | {"init_lora_weights": "LoftQ"}))


@pytest.mark.parametrize("given", [{"use_dora": True}, {"loftq_config": {"loftq_bits": 8}}])
def test_keys_that_would_not_be_heeded_are_refused(given):
    (name,) = given
    with pytest.raises(RecllmError, match=rf"adapter\.{name} does not go with init_lora_weights = 'loftq'"):
        recipe_of(**given)


def test_layers_that_stay_whole_are_refused(tmp_path):
    path, shipped = tmp_path / "mine.toml", find_recipe("adapters", "qlora").read_text(encoding="utf-8")
    path.write_text(f'{shipped}llm_int8_skip_modules = ["q_proj"]\n', encoding="utf-8")
    with pytest.raises(RecllmError, match=r"quantization.llm_int8_skip_modules does not go with .*'loftq'"):
        load_adapter(AdapterSettings.model_validate({"recipe": str(path), "init_lora_weights": "loftq"}))


def test_a_recipe_file_cannot_say_what_it_was_trained_over():
    with pytest.raises(ValueError, match="_trained_over"):
        AdapterRecipe.model_validate({"tuner": "lora", "_trained_over": {"load_in_4bit": True}})

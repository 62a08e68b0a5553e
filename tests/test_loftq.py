"""LoftQ: LoRA starts from the rounding error of a base model in 4 bits, and is merged over the same rounded weights."""

import numpy as np
import pytest
import torch

from recllm.adapters import AdapterRecipe, load_adapter, merge
from recllm.errors import RecllmError
from recllm.lm import adapted, load_base
from recllm.runs import AdapterSettings


def recipe_of(**keys):
    return load_adapter(
        AdapterSettings.model_validate({"recipe": "qlora", "init_lora_weights": "loftq", "r": 16} | keys)
    )


def hidden(model):
    with torch.inference_mode():
        return model.eval()(input_ids=torch.arange(24).view(2, 12)).last_hidden_state.float().numpy()


@pytest.fixture(scope="module")
def bare(wide_lm_folder):
    return hidden(load_base(wide_lm_folder).model)


@pytest.mark.parametrize("double", [True, False])
def test_it_starts_nearer_to_the_base_model_than_its_4_bits_are(double, wide_lm_folder, bare):
    recipe = recipe_of(r=96)
    quantization = recipe.quantization | {"bnb_4bit_use_double_quant": double, "bnb_4bit_compute_dtype": "float32"}
    recipe = recipe.model_copy(update={"quantization": quantization})
    rounded = hidden(load_base(wide_lm_folder, recipe).model)
    begun = adapted(load_base(wide_lm_folder, recipe), recipe)
    assert np.abs(hidden(begun) - bare).mean() < 0.5 * np.abs(rounded - bare).mean()

    # Trained or not, what was learnt over 4 bits means the same over the full precision that it is merged with.
    whole = recipe.in_full_precision()
    assert whole.quantization is None
    over = adapted(load_base(wide_lm_folder, whole), whole)
    own = {name: value for name, value in begun.named_parameters() if "lora_" in name}
    assert {name for name, _ in over.named_parameters()} >= set(own)
    for name, value in over.named_parameters():
        if name in own:
            torch.testing.assert_close(value, own[name], atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        for name, value in over.named_parameters():
            if name in own:
                value.copy_(own[name].add_(torch.randn(own[name].shape, generator=torch.manual_seed(0)) / 50))
    trained = hidden(begun)
    np.testing.assert_allclose(hidden(over), trained, atol=1e-4 * np.abs(trained).max())
    np.testing.assert_allclose(hidden(merge(over)), trained, atol=1e-4 * np.abs(trained).max())


def test_the_whole_rank_makes_good_the_whole_error(wide_lm_folder, bare):
    recipe = recipe_of(r=128).in_full_precision()
    begun = hidden(adapted(load_base(wide_lm_folder, recipe), recipe))
    np.testing.assert_allclose(begun, bare, atol=1e-4 * np.abs(bare).max())


def test_the_scaling_of_the_adapter_takes_no_part(wide_lm_folder, bare):
    far = [
        np.abs(hidden(adapted(load_base(wide_lm_folder, recipe), recipe)) - bare).mean()
        for recipe in (recipe_of(lora_alpha=alpha).in_full_precision() for alpha in (4, 64))
    ]
    assert far[0] == pytest.approx(far[1], rel=1e-3)


@pytest.mark.parametrize("given", [{"recipe": "lora"}, {"recipe": "adalora"}])
def test_it_needs_4_bits_to_start_from(given):
    with pytest.raises(RecllmError, match=r"starts from the rounding error of a base model in 4 bits. Take .*'qlora'"):
        load_adapter(AdapterSettings.model_validate(given | {"init_lora_weights": "LoftQ"}))


@pytest.mark.parametrize("given", [{"use_dora": True}, {"loftq_config": {"loftq_bits": 8}}])
def test_keys_that_would_not_be_heeded_are_refused(given):
    (name,) = given
    with pytest.raises(RecllmError, match=rf"adapter\.{name} does not go with init_lora_weights = 'loftq'"):
        recipe_of(**given)


def test_a_recipe_file_cannot_say_what_it_was_trained_over():
    with pytest.raises(ValueError, match="_trained_over"):
        AdapterRecipe.model_validate({"tuner": "lora", "_trained_over": {"load_in_4bit": True}})

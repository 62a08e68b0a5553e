"""Every tuner that PEFT has trains, comes back and merges, or is refused before a model loads."""

import copy

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaModel

from recllm.adapters import attach, load_adapter, merge
from recllm.checkpoints import load_trained, save_trained, trained_values
from recllm.errors import RecllmError
from recllm.runs import AdapterSettings

TUNERS = sorted(str(kind.value).lower() for kind in peft.PEFT_TYPE_TO_CONFIG_MAPPING)
KEYS = {
    "boft": "boft_block_size = 4",
    "c3a": "block_size = 8",
    "fourierft": "n_frequency = 20",
    "ia3": "feedforward_modules = []",
    "ln_tuning": "target_modules = ['norm']",
    "miss": "r = 4",
    "psoft": "r = 4",
    "road": "group_size = 4",
    "shira": "r = 4",
    "vblora": "vector_length = 4\nnum_vectors = 16",
    "waveft": "n_frequency = 20",
}
"""What a tuner wants for layers as small as these."""
REFUSED = {
    *("adaption_prompt", "beft", "cartridge", "cpt", "lily", "multitask_prompt_tuning", "p_tuning", "poly"),
    *("prefix_tuning", "prompt_tuning", "shadow", "trainable_tokens", "xlora"),
}
IDS = torch.arange(24).reshape(2, 12)


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    return LlamaModel(config).eval()


def recipe_of(tuner, folder, keys=""):
    keys = KEYS.get(tuner, "") + keys
    targets = "" if "target_modules" in keys else "target_modules = ['q_proj', 'v_proj']\n"
    path = folder / "own.toml"
    path.write_text(f"tuner = '{tuner}'\n[config]\n{targets}{keys}\n", encoding="utf-8")
    return load_adapter(AdapterSettings(recipe=str(path)))


def hidden(model):
    with torch.inference_mode():
        return model.eval()(input_ids=IDS).last_hidden_state


@pytest.mark.filterwarnings("ignore:Failed to load the CUDA", "ignore:Setting boft", "ignore:Sparse invariant")
@pytest.mark.parametrize("tuner", [tuner for tuner in TUNERS if tuner not in REFUSED])
def test_a_tuner_trains_comes_back_and_merges(tuner, base, tmp_path):
    recipe = recipe_of(tuner, tmp_path)
    model = attach(copy.deepcopy(base), recipe)
    optimiser = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], 1e-2)
    for _ in range(2):
        model.train()(input_ids=IDS).last_hidden_state[..., 0].sub(1).square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()
    trained = hidden(model)
    assert (trained - hidden(base)).abs().max() > 1e-3

    save_trained(trained_values(model), tmp_path / "model.safetensors")
    loaded = attach(copy.deepcopy(base), recipe)
    load_trained(loaded, tmp_path / "model.safetensors")
    assert torch.equal(hidden(loaded), trained)
    assert (hidden(merge(loaded)) - trained).abs().max() <= 1e-5 * trained.abs().max()


@pytest.mark.parametrize("tuner", sorted(REFUSED & set(TUNERS)))
def test_a_tuner_that_cannot_be_served_is_refused_with_the_reason(tuner, tmp_path):
    keys = "" if tuner != "adaption_prompt" else "adapter_len = 4"
    with pytest.raises(RecllmError, match=rf"The tuner '{tuner}' is not supported: .+\. Take a recipe of adapters/"):
        recipe_of(tuner, tmp_path, keys)


@pytest.mark.parametrize(
    "keys",
    [
        "lora_bias = true",
        "trainable_token_indices = [1]",
        "layer_replication = [[0, 2], [0, 2]]",
        "alora_invocation_tokens = [5]",
        "arrow_config = {}",
    ],
)
def test_keys_that_cannot_be_served_are_refused_with_the_reason(keys, tmp_path):
    with pytest.raises(RecllmError, match=rf"adapter\.{keys.split()[0]} is not supported: .+ Leave it out"):
        recipe_of("lora", tmp_path, keys)


@pytest.mark.parametrize("keys", ["modules_to_save = ['embed_tokens']", "target_modules = ['q_proj', 'embed_tokens']"])
def test_the_table_of_token_embeddings_stays_frozen(keys, base, tmp_path):
    with pytest.raises(RecllmError, match=r"name the table of token embeddings\. It stays frozen here"):
        attach(copy.deepcopy(base), recipe_of("lora", tmp_path, keys))

"""Names: the mean log-probability of a name's tokens, as transformers gives it, whatever is read beside it."""

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from recllm.lm import BaseModel, load_base
from recllm.names import NameModel, read_names

START = [1, 9, 11]
NAMES = [[5, 6, 7], [8], [4, 4, 12, 13, 14], [7, 6, 5]]


@pytest.fixture(scope="module")
def model(tiny_lm_folder):
    return NameModel(load_base(tiny_lm_folder), len(START)).eval()


@torch.inference_mode()
def test_a_name_is_as_probable_as_transformers_says(model, tiny_lm_folder):
    plain = AutoModelForCausalLM.from_pretrained(tiny_lm_folder, dtype=torch.float32).eval()
    found = read_names(model, [[*START, *name] for name in NAMES])
    assert found.dtype == np.float32
    for name, value in zip(NAMES, found, strict=True):
        ids = torch.tensor([[*START, *name]])
        told = plain(input_ids=ids).logits[0].log_softmax(-1)
        each = [float(told[len(START) - 1 + place, token]) for place, token in enumerate(name)]
        assert value == pytest.approx(np.mean(each), abs=1e-5)
    assert len(set(found.tolist())) == len(NAMES)


def test_what_is_read_beside_a_name_changes_nothing(model, monkeypatch):
    told, rows = [], [[*START, *name] for name in NAMES]
    whole = read_names(model, [None, *rows], progress=told.append)
    assert np.isnan(whole[0])
    assert sum(told) == len(NAMES)
    monkeypatch.setattr("recllm.names.TOKENS_AT_ONCE", 1)
    assert read_names(model, rows) == pytest.approx(whole[1:], abs=1e-6)


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("Cohere", {"logit_scale": 0.3}),
        ("Granite", {"logits_scaling": 3.0}),
        ("Gemma2", {"final_logit_softcapping": 2.0}),
    ],
)
@torch.inference_mode()
def test_what_a_family_does_behind_its_output_matrix_is_done(family, config):
    keys = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    keys |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    plain = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**keys | config))
    plain.lm_head.weight.normal_()
    base = BaseModel(plain.eval().get_decoder(), None, True, None, plain.get_output_embeddings())
    ids = torch.tensor([[*START, 5, 6, 7]])
    told = plain(input_ids=ids).logits[0].log_softmax(-1)
    expected = np.mean([float(told[len(START) - 1 + place, token]) for place, token in enumerate((5, 6, 7))])
    assert read_names(NameModel(base, len(START)), [ids[0].tolist()])[0] == pytest.approx(expected, abs=1e-4)

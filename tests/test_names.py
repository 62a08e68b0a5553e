"""Names: the mean log-probability of a name's tokens, as transformers gives it, whatever is read beside it."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from recllm.lm import load_base
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

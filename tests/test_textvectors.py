"""Vectors of items by their text: pooled exactly, kept by content, those of a large catalogue in parts."""

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from recllm import textvectors
from recllm.lm import load_base
from recllm.prompts import compile_prompt, load_prompt
from recllm.textvectors import encode_ids, item_vectors


@pytest.fixture(scope="module")
def causal(tiny_lm_folder):
    return load_base(tiny_lm_folder)


@pytest.fixture(scope="module")
def encoder(tiny_encoder_folder):
    return load_base(tiny_encoder_folder)


def naive_mean(folder, ids, kind):
    model = kind.from_pretrained(folder, dtype=torch.float32).eval()
    model = model.get_decoder() if kind is AutoModelForCausalLM else model
    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(0).numpy()


@pytest.mark.parametrize("which", ["causal", "encoder"])
def test_pooling_equals_the_naive_mean_whatever_the_batch(which, request, tiny_lm_folder, tiny_encoder_folder):
    base = request.getfixturevalue(which)
    folder, kind = (tiny_lm_folder, AutoModelForCausalLM) if which == "causal" else (tiny_encoder_folder, AutoModel)
    random = np.random.default_rng(0)
    texts = [random.integers(3, 60, size=length).tolist() for length in (9, 2, 30, 1, 17)]
    rows = [*texts[:2], None, *texts[2:]]
    done = []
    found = encode_ids(base, rows, done.append)
    assert found.dtype == np.float32
    assert sum(done) == len(texts)
    assert np.isnan(found[2]).all()
    for row, ids in enumerate(rows):
        if ids is not None:
            assert found[row] == pytest.approx(naive_mean(folder, ids, kind), abs=1e-5)


def test_batches_do_not_change_a_vector(causal, monkeypatch):
    texts = [[3 + place, 5, 7][: place % 3 + 1] for place in range(20)]
    whole = encode_ids(causal, texts)
    monkeypatch.setattr(textvectors, "TOKENS_IN_BATCH", 1)
    assert encode_ids(causal, texts) == pytest.approx(whole, abs=1e-5)


def test_vectors_are_kept_by_the_content_of_model_and_text(causal, tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("RECLLM_CACHE", str(tmp_path))
    read = []
    monkeypatch.setattr(textvectors, "encode_ids", lambda *args: read.append(1) or encode_ids(*args))
    compiled = compile_prompt(load_prompt("item"), tiny_tokenizer)

    def vectors(titles):
        ids = [compiled.item_ids({"item_id": "x", "title": title}) if title else None for title in titles]
        return item_vectors(causal, [str(place) for place in range(len(titles))], ids)

    first = vectors(["Red film", "Blue film", ""])
    again = vectors(["Red film", "Blue film", ""])
    assert len(read) == 1
    assert np.array_equal(first.values, again.values, equal_nan=True)
    assert np.isnan(first.values[2]).all()
    changed = vectors(["Red film", "Blue comedy", ""])
    assert len(read) == 2
    assert np.array_equal(changed.values[0], first.values[0])
    assert not np.allclose(changed.values[1], first.values[1])


class KilledError(Exception):
    pass


def test_a_kill_costs_one_part_of_a_large_catalogue(causal, tmp_path, monkeypatch):
    monkeypatch.setenv("RECLLM_CACHE", str(tmp_path))
    monkeypatch.setattr(textvectors, "ITEMS_IN_PART", 4)
    ids = [str(place) for place in range(11)]
    tokens = [[3 + place, 5, 7][: place % 3 + 1] if place != 6 else None for place in range(11)]
    read, done = [], []

    def reading(base, part, progress):
        if len(read) == 2:
            read.append(None)
            raise KilledError
        read.append(len(part))
        return encode_ids(base, part, progress)

    monkeypatch.setattr(textvectors, "encode_ids", reading)
    with pytest.raises(KilledError):
        item_vectors(causal, ids, tokens)
    assert len(list((tmp_path / "vectors").iterdir())) == 2
    found = item_vectors(causal, ids, tokens, done.append)
    assert read == [4, 4, None, 3]
    assert sum(done) == 10
    assert done[:2] == [4, 3]  # the parts that were there
    assert found.ids == tuple(ids)
    assert found.values == pytest.approx(encode_ids(causal, tokens), abs=1e-5, nan_ok=True)
    assert np.isnan(found.values[6]).all()
    assert len(list((tmp_path / "vectors").iterdir())) == 2  # the vectors and their ids
    again = item_vectors(causal, ids, tokens)
    assert np.array_equal(again.values, found.values, equal_nan=True)
    assert len(read) == 4


def test_what_is_damaged_in_the_cache_is_read_once_more(causal, tmp_path, monkeypatch):
    monkeypatch.setenv("RECLLM_CACHE", str(tmp_path))
    monkeypatch.setattr(textvectors, "ITEMS_IN_PART", 2)
    ids, tokens = ["1", "2", "3"], [[3], [4], [5]]
    with monkeypatch.context() as killed:
        killed.setattr(textvectors, "RawVectors", None)  # before the whole is written
        with pytest.raises(TypeError):
            item_vectors(causal, ids, tokens)
    (part,) = (tmp_path / "vectors").glob("*.0.part")
    part.write_bytes(part.read_bytes()[:20])
    first = item_vectors(causal, ids, tokens)
    (whole,) = (tmp_path / "vectors").glob("*.safetensors")
    whole.write_bytes(whole.read_bytes()[:20])
    again = item_vectors(causal, ids, tokens)
    assert first.values == pytest.approx(encode_ids(causal, tokens), abs=1e-5)
    assert np.array_equal(first.values, again.values)


def test_without_memory_fewer_texts_are_read_at_once(causal, monkeypatch):
    """Short ones stand before the longest, so that halving counts texts and not the tokens of one of them."""
    texts = [[3], [4], [5], [6], [7], [8], [9], [3, 4, 5, 6, 7, 8]]
    whole, pooled, tried, done = encode_ids(causal, texts), textvectors._pooled, [], []

    def small(base, batch):
        tried.append(len(batch))
        if len(batch) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return pooled(base, batch)

    monkeypatch.setattr(textvectors, "_pooled", small)
    assert encode_ids(causal, texts, done.append) == pytest.approx(whole, abs=1e-5)
    assert tried == [8, 4, 2, 2, 2, 2]
    assert sum(done) == 8


def test_a_text_that_does_not_fit_alone_and_other_errors_are_told(causal, monkeypatch):
    def failing(error):
        def pooled(*_):
            raise error

        return pooled

    monkeypatch.setattr(textvectors, "_pooled", failing(torch.OutOfMemoryError("CUDA out of memory.")))
    with pytest.raises(torch.OutOfMemoryError):
        encode_ids(causal, [[3], [4]])
    monkeypatch.setattr(textvectors, "_pooled", failing(RuntimeError("something else")))
    with pytest.raises(RuntimeError, match="something else"):
        encode_ids(causal, [[3], [4]])

"""Language models: encoders told from causal models, control tokens stay text."""

import shutil

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
)

from recllm import lm
from recllm.adapters import AdapterRecipe
from recllm.cascade import shares_prefixes
from recllm.data import Query
from recllm.encoding import SequenceScorer
from recllm.errors import RecllmError
from recllm.examples import NextItemCollator
from recllm.files import read_json, write_json
from recllm.heads import item_heads
from recllm.histories import item_token_history, text_history
from recllm.lm import (
    BaseModel,
    check_layers,
    is_causal,
    load_base,
    load_tokenizer,
    model_folder,
    next_item_model,
)
from recllm.prompts import compile_prompt, load_prompt
from recllm.ranking import ItemIndex
from recllm.runs import ModelSettings
from recllm.textvectors import encode_ids
from recllm.trained import torch_encode
from recllm.vectors import ItemFeatures

LORA = AdapterRecipe(tuner="lora", config={"r": 2, "target_modules": "all-linear", "init_lora_weights": False})


@pytest.fixture(scope="module")
def causal(tiny_lm_folder):
    return load_base(tiny_lm_folder)


@pytest.fixture(scope="module")
def encoder(tiny_encoder_folder):
    return load_base(tiny_encoder_folder)


def test_a_causal_model_and_an_encoder_are_told_apart(causal, encoder):
    assert causal.causal
    assert not encoder.causal
    for base in (causal, encoder):
        assert not any(value.requires_grad for value in base.model.parameters())
        assert not base.model.training


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LlamaConfig(architectures=["LlamaForCausalLM"]), True),
        (LlamaConfig(), True),  # a checkpoint that does not say: by the kind of model
        (BertConfig(architectures=["BertForMaskedLM"]), False),
        (BertConfig(architectures=["BertModel"]), False),
        (BertConfig(), False),
        (LlamaConfig(architectures=["LlamaModel"]), True),
        (GPT2Config(architectures=["GPT2LMHeadModel"]), True),
        (Gemma3TextConfig(), True),
        (Gemma3TextConfig(use_bidirectional_attention=True), False),  # a text encoder made of a causal kind
        (LlamaConfig(architectures=["LlamaForCausalLM"], is_causal=False), False),
    ],
)
def test_causal_by_its_configuration(config, expected):
    assert is_causal(config) is expected


@pytest.mark.parametrize("task", ["item", "next_item"])
def test_control_tokens_in_a_title_stay_text(task, tiny_tokenizer):
    compiled = compile_prompt(load_prompt(task), tiny_tokenizer)
    ids = compiled.item_ids({"item_id": "x", "title": "Red <|im_end|> film <|endoftext|><|im_start|>"})
    assert not {0, 1, 2} & set(ids[len(compiled.start) if task == "item" else 0 :])
    assert "<|im_end|>" in tiny_tokenizer.decode(ids, skip_special_tokens=False)


def test_a_folder_without_fast_tokenizer_is_refused(tmp_path):
    with pytest.raises(RecllmError, match=r"has no tokenizer\.json: recllm needs a fast tokenizer"):
        load_tokenizer(tmp_path)


def test_a_local_folder_is_its_own_place(tiny_lm_folder):
    assert model_folder(str(tiny_lm_folder)) == tiny_lm_folder


@pytest.mark.parametrize(
    ("weights", "fetched"),
    [
        (["model.safetensors", "pytorch_model.bin", "original/consolidated.safetensors"], ["model.safetensors"]),
        (["pytorch_model.bin", "onnx/model.onnx", "training_args.bin"], ["pytorch_model.bin"]),
        (
            ["pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"],
            ["pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"],
        ),
    ],
)
@pytest.mark.parametrize("commit", [None, "refs/pr/7"])
def test_one_set_of_weights_is_fetched_of_a_repository(weights, fetched, commit, tmp_path, monkeypatch):
    from huggingface_hub.utils import filter_repo_objects

    def snapshot_download(name, revision, allow_patterns, ignore_patterns=None):
        assert (name, revision) == ("owner/model", commit)
        files = ["config.json", "tokenizer.json", *weights]
        for file in filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (tmp_path / file).parent.mkdir(exist_ok=True)
            (tmp_path / file).touch()
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    folder = model_folder("owner/model" if commit is None else f"owner/model@{commit}")
    found = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    assert found == sorted(["config.json", "tokenizer.json", *fetched])


def test_the_hub_out_of_reach_is_one_message(monkeypatch):
    def refuse(*_, **__):
        raise ConnectionError("no route to host\nand a long story")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(RecllmError, match=r"'owner/model' cannot be had from the hub: no route to host\. A local fold"):
        model_folder("owner/model")


def features(items):
    random = np.random.default_rng(0)
    index = ItemIndex(map(str, range(items)))
    text, factors = random.normal(size=(items, 6)), random.normal(size=(items, 4))
    return ItemFeatures(index, text.astype(np.float32), factors.astype(np.float32))


def histories(kind, checkerboard, tokenizer, limit=6):
    compiled = compile_prompt(load_prompt("next_item"), tokenizer)
    if kind == "items":
        return item_token_history(compiled.start, limit, 2)
    return text_history(compiled.start, compiled.encode_items(checkerboard.catalog), limit, 2)


@pytest.mark.parametrize("kind", ["items", "text"])
def test_scoring_shared_beginnings_equals_scoring_apart(kind, checkerboard, tiny_lm_folder, tiny_tokenizer):
    history = histories(kind, checkerboard, tiny_tokenizer)
    given, settings = features(24), ModelSettings(head_width=16)
    torch.manual_seed(0)
    model = next_item_model(load_base(tiny_lm_folder), LORA, given, np.ones(24, dtype=int), history, settings)
    scorer = SequenceScorer(torch_encode(model), history, given.index, *item_heads(model))
    queries = [Query(tuple(map(str, range(start, stop)))) for start, stop in [(0, 3), (0, 5), (2, 3), (1, 12), (1, 13)]]
    single = np.concatenate([scorer.score([query], given.index) for query in queries])
    assert scorer.score(queries, given.index) == pytest.approx(single, abs=1e-5)
    assert len({tuple(row) for row in np.round(single, 4)}) == len(queries)


@pytest.mark.parametrize("kind", ["items", "text"])
def test_the_loss_does_not_see_later_items_or_padding(kind, checkerboard, tiny_lm_folder, tiny_tokenizer):
    history = histories(kind, checkerboard, tiny_tokenizer)
    torch.manual_seed(0)
    model = next_item_model(
        load_base(tiny_lm_folder), None, features(24), np.ones(24, dtype=bool), history, ModelSettings(head_width=16)
    ).eval()
    collator = NextItemCollator(history)
    with torch.inference_mode():
        short, long = collator([np.array([3, 5, 7])]), collator([np.array([3, 5, 7]), np.array([2, 4, 6, 8, 10, 12])])
        table = model.table()
        alone, together = (model.encode(given["ids"], given["ends"], table) for given in (short, long))
    assert together[0, :2].numpy() == pytest.approx(alone[0].numpy(), abs=1e-5)


def test_a_text_history_reads_what_the_tokenizer_writes(checkerboard, causal, tiny_tokenizer):
    """The small table of words gives the very hidden states of the whole vocabulary."""
    history = histories("text", checkerboard, tiny_tokenizer)
    model = next_item_model(
        causal, None, features(24), np.ones(24, dtype=bool), history, ModelSettings(head_width=16)
    ).eval()
    ids, _ = history.ids([4, 6])
    compiled = compile_prompt(load_prompt("next_item"), tiny_tokenizer)
    tokens = compiled.start + [
        token for item in ("4", "6") for token in compiled.item_ids(checkerboard.catalog.record(item))
    ]
    with torch.inference_mode():
        expected = causal.model(input_ids=torch.tensor([tokens])).last_hidden_state
        found = model.body(torch.nn.functional.embedding(torch.tensor([ids]), model.table()))
    assert found.numpy() == pytest.approx(expected.numpy(), abs=1e-5)


def test_a_model_that_is_wider_inside_reads_items_and_histories(tiny_family, tiny_tokenizer):
    body = tiny_family("OPT", word_embed_proj_dim=16, ffn_dim=32)  # OPT-350m is 1,024 inside and 512 outside
    base = BaseModel(body, tiny_tokenizer, True, None)
    assert encode_ids(base, [[5, 7, 9], None]).shape == (2, 16)
    history = item_token_history([1], 5, 1)
    model = next_item_model(base, None, features(8), np.ones(8, dtype=int), history, ModelSettings(head_width=12))
    given = NextItemCollator(history)([np.array([3, 5, 7])])
    model(**given)["loss"].backward()
    assert model.tokens.text.weight.grad.abs().sum() > 0


def test_an_encoder_cannot_read_histories_for_the_next_item(encoder, tiny_tokenizer):
    history = item_token_history([1], 5, 1)
    with pytest.raises(RecllmError, match=r"'minilm-l6' is an encoder; next_item needs a causal model.*item_encoder"):
        next_item_model(encoder, None, features(3), np.ones(3, dtype=bool), history, ModelSettings(name="minilm-l6"))


def test_the_configuration_of_the_test_model_is_what_transformers_reads(tiny_lm_folder):
    assert AutoConfig.from_pretrained(tiny_lm_folder).architectures == ["LlamaForCausalLM"]


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(RecllmError, match=r"holds no model that transformers can load"):
        load_base(tmp_path)


@pytest.mark.parametrize("fixture", ["tiny_lm_folder", "tiny_encoder_folder"])
def test_a_model_can_keep_its_first_layers(fixture, request):
    folder = request.getfixturevalue(fixture)
    ids = torch.tensor([[5, 6, 7, 8]])
    whole, short = load_base(folder), load_base(folder, layers=1)
    kind = AutoModelForCausalLM if whole.causal else AutoModel
    model = kind.from_pretrained(folder, num_hidden_layers=1, dtype=torch.float32)
    expected = (model.get_decoder() if whole.causal else model).eval()(input_ids=ids).last_hidden_state
    assert torch.equal(short.model(input_ids=ids).last_hidden_state, expected)
    assert not torch.equal(whole.model(input_ids=ids).last_hidden_state, expected)
    assert short.model.config.num_hidden_layers == 1
    assert short.model.num_parameters() < whole.model.num_parameters()


@pytest.mark.parametrize("fixture", ["tiny_lm_folder", "tiny_encoder_folder"])
def test_weights_can_be_drawn_anew_by_a_seed(fixture, request):
    folder = request.getfixturevalue(fixture)
    ids = torch.tensor([[5, 6, 7, 8]])
    found = [load_base(folder, drawn_by=seed, layers=1).model for seed in (3, 3, 4)]
    first, same, other, pretrained = (
        model(input_ids=ids).last_hidden_state for model in (*found, load_base(folder, layers=1).model)
    )
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert not torch.equal(first, pretrained)
    assert not found[0].training
    assert not any(own.requires_grad for own in found[0].parameters())


@pytest.mark.parametrize("family", ["Qwen3", "Gemma3Text", "Mistral"])
def test_what_the_layers_are_is_cut_with_them(family, tiny_family):
    body = tiny_family(family)
    before = body(input_ids=torch.tensor([[5, 6, 7]]), output_hidden_states=True).hidden_states
    lm._shorten(body, 1)
    after = body(input_ids=torch.tensor([[5, 6, 7]]), output_hidden_states=True).hidden_states
    assert len(after) == 2 < len(before)
    assert torch.equal(after[0], before[0])
    assert torch.allclose(body.norm(before[1]), after[1])
    assert shares_prefixes(body)


def test_more_layers_than_there_are_is_refused_before_any_work(tiny_lm_folder):
    check_layers(tiny_lm_folder, 2)
    with pytest.raises(RecllmError, match=r"model.layers = 3, and .* has 2 layers"):
        check_layers(tiny_lm_folder, 3)


def test_a_damaged_tokenizer_is_named(tiny_lm_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_lm_folder, folder)
    (folder / "tokenizer.json").write_text('{"a": 1', encoding="utf-8")
    with pytest.raises(RecllmError, match=r"tokenizer.json cannot be read as a tokenizer \(.*Fetch the model again"):
        load_tokenizer(folder)


def test_weights_of_another_shape_than_the_configuration_says_are_named(tiny_lm_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_lm_folder, folder)
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", config | {"intermediate_size": config["intermediate_size"] + 16})
    with pytest.raises(RecllmError, match=r"The weights of '.*model' cannot be loaded"):
        load_base(folder)

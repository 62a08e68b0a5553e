"""Small models and data by construction: what every test may lean on without network or training luck."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from recllm.data import Catalog, CheckReport, Dataset, Interactions

if TYPE_CHECKING:  # heavy, and most tests do without
    import torch

USERS, ITEMS = 40, 24
COLOURS = ("Red", "Blue")
GENRES = ("Drama", "Comedy")
CONTROLS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SENTENCES = [
    *(
        f"{colour} film {number} ({genre})"
        for colour, genre in zip(COLOURS, GENRES, strict=True)
        for number in range(ITEMS)
    ),
    *(f"A {colour} film; an item: {colour} film." for colour in COLOURS),
    "This person chose these items, oldest first: a Drama; a Comedy.",
    "Will this person like the next item? Answer: Yes",
    "Will this person like the new item? Answer: No",
    "Items one person chose in order: title, genres, text.",
]

TINY_RUN = """
name = "tiny"
output = "{output}"
[data]
name = "{data}"
[model]
name = "{model}"
max_history = 12
head_width = 16
[light]
width = 16
layers = 1
heads = 2
num_train_epochs = 20
learning_rate = 5e-3
per_device_train_batch_size = 8
max_history = 12
[adapter]
r = 4
[cf]
factors = 4
iterations = 3
[train]
num_train_epochs = 12
learning_rate = 5e-3
head_learning_rate = 1e-2
precision = "fp32"
[export]
recipes = ["fp32"]
gate_queries = 8
"""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Tables in the docs are written by the tests that find them."""
    parser.addoption("--write-docs", action="store_true", help="write the tables of the docs that tests find")


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Tokenizer:
    """A byte-level BPE tokenizer of at most 384 tokens; 0, 1 and 2 are its control tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=list(CONTROLS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer


@pytest.fixture(scope="session")
def tiny_word_tokenizer() -> Tokenizer:
    """A WordPiece tokenizer that writes [CLS] before and [SEP] after a text, as BERT's does."""
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = sorted({word for text in SENTENCES for word, _ in _bert_words(text)})
    letters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    pieces = dict.fromkeys([*specials, *words, *letters, *(f"##{letter}" for letter in letters)])
    tokenizer = Tokenizer(models.WordPiece({piece: row for row, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(specials)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer


@pytest.fixture(scope="session")
def tiny_lm_folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokenizer) -> Path:
    """A folder with a random two-layer Llama and its tokenizer, as `from_pretrained` reads it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny_lm")
    config = LlamaConfig(
        vocab_size=tiny_tokenizer.get_vocab_size(),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    _save(folder, LlamaForCausalLM, config, tiny_tokenizer)
    names = {"bos_token": CONTROLS[1], "eos_token": CONTROLS[2], "pad_token": CONTROLS[0]}
    _save_tokenizer_config(folder, names)
    return folder


@pytest.fixture(scope="session")
def resized_lm(tiny_lm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes the folder of a random model like the tiny one, with other keys in its configuration."""
    import torch
    from transformers import AutoConfig, LlamaForCausalLM

    def make(**keys: int) -> Path:
        folder = tmp_path_factory.mktemp("resized") / "lm"
        shutil.copytree(tiny_lm_folder, folder)
        config = AutoConfig.from_pretrained(tiny_lm_folder)
        config.update(keys)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            LlamaForCausalLM(config).save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def wide_lm_folder(resized_lm: Callable[..., Path]) -> Path:
    """A random model whose layers are as wide as one block of 4-bit weights, at least."""
    return resized_lm(hidden_size=128, intermediate_size=128, num_key_value_heads=4, head_dim=32)


@pytest.fixture(scope="session")
def tiny_encoder_folder(tmp_path_factory: pytest.TempPathFactory, tiny_word_tokenizer: Tokenizer) -> Path:
    """A folder with a random two-layer BERT and its WordPiece tokenizer, as `from_pretrained` reads it."""
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("tiny_encoder")
    config = BertConfig(
        vocab_size=tiny_word_tokenizer.get_vocab_size(),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        pad_token_id=0,
    )
    _save(folder, BertModel, config, tiny_word_tokenizer)
    names = {
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "mask_token": "[MASK]",
    }
    _save_tokenizer_config(folder, names)
    return folder


@pytest.fixture(scope="session")
def tiny_family() -> "Callable[..., torch.nn.Module]":
    """Makes the body of a tiny model of a family, by its name in transformers; keys override its configuration."""
    return _model_of


@pytest.fixture(scope="session")
def checkerboard() -> Dataset:
    """Even users have ten even (red) items each, odd users ten odd (blue) ones, all rated 5.

    A user's items follow the block's cycle (+2, from a start of the user's own), so the block says what is liked
    and the order says what comes next: item after `i` is `(i + 2) % 24`.
    """
    return _checkerboard(liked=10, disliked=0)


@pytest.fixture(scope="session")
def rated_checkerboard() -> Dataset:
    """The checkerboard with eight own items rated 5 and, in between, four of the other colour rated 1."""
    return _checkerboard(liked=8, disliked=4)


@pytest.fixture(scope="session")
def checkerboard_folder(tmp_path_factory: pytest.TempPathFactory, checkerboard: Dataset) -> Path:
    """The checkerboard as files that `read_dataset` reads: interactions.csv and items.csv."""
    folder = tmp_path_factory.mktemp("data") / "checkerboard"
    folder.mkdir()
    checkerboard.interactions.frame.write_csv(folder / "interactions.csv")
    checkerboard.catalog.frame.write_csv(folder / "items.csv")
    return folder


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory, checkerboard_folder: Path, tiny_lm_folder: Path) -> Path:
    """The folder of a run trained on the checkerboard: every scorer, each that can knows the cycle. Read only."""
    from recllm.runs import load_run
    from recllm.train import train_run

    place = tmp_path_factory.mktemp("run")
    file = place / "tiny.toml"
    file.write_text(
        TINY_RUN.format(output=place.as_posix(), data=checkerboard_folder.as_posix(), model=tiny_lm_folder.as_posix()),
        encoding="utf-8",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECLLM_CACHE", str(place / "cache"))
        train_run(load_run(file), say=lambda _: None)
    return place / "tiny"


@pytest.fixture(scope="session")
def tiny_bundle(tiny_run: Path) -> Path:
    """The bundle of `tiny_run` in fp32. Read only."""
    from recllm.export import export_run
    from recllm.runs import load_run
    from recllm.tasks import prepare

    run = load_run(tiny_run)
    (exported,) = export_run(run, prepare(run), ["fp32"], say=lambda _: None)
    assert exported.folder is not None, exported.failures
    return exported.folder


@pytest.fixture(scope="session")
def overflows(tmp_path_factory: pytest.TempPathFactory) -> bool:
    """Whether this processor adds pairs of 8-bit products in 16 bits, which overflow (no VNNI)."""
    from recllm.errors import RecllmError
    from recllm.integer import write_probe
    from recllm.sessions import INTEGERS, check_integer_products

    folder = tmp_path_factory.mktemp("probe")
    write_probe(folder / INTEGERS)
    try:
        check_integer_products(folder, "cpu")
    except RecllmError:
        return True
    return False


@pytest.fixture(scope="session")
def small_cache(
    tmp_path_factory: pytest.TempPathFactory, checkerboard: Dataset, tiny_lm_folder: Path, tiny_encoder_folder: Path
) -> Path:
    """A cache with the small models and the checkerboard under the names that users fetch; users are numbers."""
    cache = tmp_path_factory.mktemp("small") / "cache"
    data, models = cache / "data" / "ml-100k", cache / "models"
    data.mkdir(parents=True)
    models.mkdir()
    named = checkerboard.interactions.frame.with_columns(pl.col("user_id").str.strip_prefix("u"))
    named.write_csv(data / "interactions.csv")
    checkerboard.catalog.frame.write_csv(data / "items.csv")
    (models / "smollm2-135m-instruct").symlink_to(tiny_lm_folder)
    (models / "minilm-l6").symlink_to(tiny_encoder_folder)
    return cache


SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
# Windows shorter than the prompts, so that a query does not see all of its prefix, nor all of its own continuation.
FAMILIES: dict[str, dict[str, object]] = {
    "Llama": {},
    "Qwen2": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    "Qwen3": {},
    "Mistral": {"sliding_window": 3},
    "Gemma": {},
    "Gemma2": {"sliding_window": 7, "attn_logit_softcapping": 0.5, "query_pre_attn_scalar": 5},
    "Gemma3Text": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "Phi3": {"sliding_window": 6},
}


def _model_of(family: str, **config: object) -> "torch.nn.Module":
    import torch
    import transformers

    own = getattr(transformers, f"{family}Config")(**SMALL | FAMILIES.get(family, {}) | config)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}Model")(own)
    for parameter in model.parameters():
        if parameter.dim() == 2:  # at the usual scale a tiny attention is flat, and hides a wrong mask
            torch.nn.init.normal_(parameter, std=0.4)
    return model.eval()


def _checkerboard(liked: int, disliked: int) -> Dataset:
    rng = np.random.default_rng(0)
    events = [event for user in range(USERS) for event in _events(user, liked, disliked, rng)]
    schema = {"user_id": pl.String, "item_id": pl.String, "rating": pl.Float32, "timestamp": pl.Int64, "seq": pl.Int32}
    items = [
        {"item_id": str(item), "title": f"{COLOURS[item % 2]} film {item}", "genres": GENRES[item % 2]}
        for item in range(ITEMS)
    ]
    catalog = Catalog(pl.DataFrame(items, schema=dict.fromkeys(items[0], pl.String)))
    interactions = Interactions(pl.DataFrame(events, schema=schema, orient="row"))
    return Dataset("checkerboard", interactions, catalog, "made by the tests", "CC0-1.0", CheckReport())


def _events(
    user: int, liked: int, disliked: int, rng: np.random.Generator
) -> Iterator[tuple[str, str, float, int, int]]:
    own, other = (2 * int(start) for start in rng.integers(ITEMS // 2, size=2))
    side = user % 2
    rows = [((own + 2 * step) % ITEMS + side, 5.0) for step in range(liked)]
    for step in range(disliked):  # never last: the last event is a liked one
        rows.insert(2 * step + 1, ((other + 2 * step) % ITEMS + 1 - side, 1.0))
    for seq, (item, rating) in enumerate(rows):
        yield f"u{user}", str(item), rating, 1_000 * user + 60 * seq, seq


def _bert_words(text: str) -> list[tuple[str, tuple[int, int]]]:
    return pre_tokenizers.BertPreTokenizer().pre_tokenize_str(text.lower())


def _save(folder: Path, model_class: type, config: object, tokenizer: Tokenizer) -> None:
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model_class(config).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))


def _save_tokenizer_config(folder: Path, names: dict[str, str]) -> None:
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")

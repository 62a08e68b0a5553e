"""Token ids of templates, where control tokens count, and of content, where they are only text."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from recllm.errors import RecllmError


def open_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json.

    Raises:
        RecllmError: it is damaged.
    """
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises this very kind
        raise RecllmError(
            f"{path} cannot be read as a tokenizer ({error}). Fetch the model again, or copy it."
        ) from None


class Tokens:
    """A tokenizer in two copies: one for templates, one without control tokens for content. It can be pickled."""

    begin: list[int]
    """What the tokenizer itself puts before a text ([CLS] of BERT, a beginning-of-text token); often nothing."""
    end: list[int]
    """What it puts after a text ([SEP] of BERT); often nothing."""
    opening: str
    """What it puts before the first word by itself, so that it looks like the others: a space, or nothing."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Copy `tokenizer`, which is left as it is, without its padding and truncation."""
        spec = json.loads(tokenizer.to_str())
        bare = {
            "normalizer": _without_prepend(spec["normalizer"]),
            "pre_tokenizer": _without_prefix(spec["pre_tokenizer"]),
        }
        self.opening = " " if any(spec[part] != own for part, own in bare.items()) else ""
        spec.update(truncation=None, padding=None, **bare)
        # Taken out of the copy, not switched off by `encode_special_tokens`: that property spares the added tokens
        # that are not marked special (Qwen's <tool_call>) and is lost when a tokenizer is pickled to a worker.
        plain = {**spec, "added_tokens": [], "post_processor": None}
        self._template = Tokenizer.from_str(json.dumps(spec))
        self._content = Tokenizer.from_str(json.dumps(plain))
        # The token for unknown letters is an added token too, but content rightly has it.
        unknown_ids = {spec["model"].get("unk_id"), tokenizer.token_to_id(spec["model"].get("unk_token") or "")}
        self._controls = frozenset(token["id"] for token in spec["added_tokens"]) - unknown_ids
        self.begin, self.end = _around(self._template)

    @property
    def name(self) -> str:
        """What is known of the tokenizer, for messages."""
        return f"{type(self._template.model).__name__} with {self._template.get_vocab_size()} tokens"

    def template(self, text: str) -> list[int]:
        """Encode a piece of a template; control tokens in it are control tokens."""
        return list(self._template.encode(text, add_special_tokens=False).ids)

    def content(self, texts: Sequence[str | None], lead: str, cut: int) -> list[list[int] | None]:
        """Encode content, each text behind `lead` and cut to `cut` tokens; None stays None."""
        written = [lead + text for text in texts if text is not None]
        encoded = iter(self._content.encode_batch(written, add_special_tokens=False))
        return [None if text is None else self._uncontrolled(next(encoded).ids)[:cut] for text in texts]

    def is_control(self, ids: Sequence[int]) -> bool:
        """Whether a control token is among them."""
        return not self._controls.isdisjoint(ids)

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`, control tokens included."""
        return str(self._template.decode(ids, skip_special_tokens=False))

    def _uncontrolled(self, ids: Sequence[int]) -> list[int]:
        """Drop what a Unigram model still finds: its vocabulary may hold `</s>` as a piece like any other."""
        return [token for token in ids if token not in self._controls]


def _without_prepend(normalizer: dict[str, Any] | None) -> dict[str, Any] | None:
    """Without Llama 2's step that puts a space before every text, so also before every piece of one.

    Nor one that takes such a space away (DeBERTa), which a piece has where a word begins.
    """
    if normalizer is None or normalizer["type"] == "Prepend":
        return None
    if normalizer["type"] == "Strip":
        return {**normalizer, "strip_left": False}
    if normalizer["type"] == "Sequence":
        steps = [_without_prepend(step) for step in normalizer["normalizers"]]
        return {**normalizer, "normalizers": [step for step in steps if step is not None]}
    return normalizer


def _without_prefix(step: dict[str, Any] | None) -> dict[str, Any] | None:
    """Without the space that a pre-tokenizer puts before every text that has none, so also before every piece of one.

    Where an earlier step takes the spaces out (XLM-R), that space is all that marks a word, and it stays.
    """
    if step is None:
        return None
    if step["type"] == "Sequence":
        first, *others = step["pretokenizers"]
        return {**step, "pretokenizers": [_without_prefix(first), *others]}
    if step["type"] == "Metaspace":
        return {**step, "prepend_scheme": "never"}
    if step["type"] == "ByteLevel":
        return {**step, "add_prefix_space": False}
    return step


def _around(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after a text by itself: ([CLS], [SEP]) of BERT, often nothing."""
    bare = tokenizer.encode("x", add_special_tokens=False).ids
    full = tokenizer.encode("x", add_special_tokens=True).ids
    before = next(place for place in range(len(full)) if full[place : place + len(bare)] == bare)
    return full[:before], full[before + len(bare) :]

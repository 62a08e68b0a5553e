"""Prompts: what the language model reads, compiled once from a TOML file into token pieces."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import PositiveInt
from tokenizers import Tokenizer

from recllm.data import Catalog, Query
from recllm.errors import RecllmError, unknown
from recllm.histories import window_start
from recllm.recipes import Settings, find_recipe, parse, read_toml
from recllm.templates import REST, Slot, literals, render_item, split_item, split_text
from recllm.tokens import Tokens

Task = Literal["relevance", "next_item", "item"]
SLOTS: dict[str, tuple[str, ...]] = {
    "relevance": ("history", "candidate"),
    "next_item": ("history",),
    "item": ("candidate",),
}
"""The slots of `text` by task, in the order they must stand."""
MISSPELT = 0.92
"""So like a column (difflib's ratio) is no other one: `descripton`, but not `genre` beside `genres`."""


UNREAD_COLUMNS = (
    "The prompt '{}' does not read the items' {}. A prompt of your own does that names them, or {{text}} for all of "
    "them: copy the shipped one from prompts/ and change 'item' (prompts/README.md)"
)
"""What is said of columns with text that a prompt leaves out."""
RELEVANCE_KEYS = ("candidate", "max_candidate_tokens", "empty_history", "liked", "disliked")
"""Keys that say nothing in a prompt of another task."""


class Prompt(Settings):
    """One prompt as its TOML file states it."""

    task: Task
    text: str
    """The template; its slots are those of the task in `SLOTS`. Control tokens in it stay control tokens."""
    item: str
    """How one item is written: slots are catalogue columns and {text}; [segments] are optional."""
    candidate: str | None = None
    """How the candidate is written, if not as `item`."""
    separator: str = "; "
    """Stands between two items of a history; in a next-item prompt it closes every item."""
    empty_history: str = "unknown"
    """Takes the history's place where there is none."""
    liked: str = ""
    """Written behind a history item rated at or above `like_at`."""
    disliked: str = ""
    """Written behind a history item rated below `like_at`."""
    answers: tuple[str, str] | None = None
    """The positive answer, then the negative one (relevance prompts only)."""
    max_history: PositiveInt = 30
    """The last so many items of a history are written."""
    history_stride: PositiveInt = 1
    """A longer history begins at a multiple of so many items: then its beginning is the same for some events."""
    max_item_tokens: PositiveInt = 32
    """An item's text is cut after so many tokens."""
    max_candidate_tokens: PositiveInt | None = None
    """The same for the candidate; by default `max_item_tokens`."""

    def check(self, place: str = "prompt") -> None:
        """Check slots, brackets and answers; `place` begins the message.

        Raises:
            RecllmError: an unknown, missing or misplaced slot, an unbalanced brace or bracket, missing answers.
        """
        try:
            _check_slots(self)
            for template in (self.item, self.candidate or self.item):
                if not any(isinstance(part, Slot) for segment in split_item(template) for part in segment.parts):
                    raise RecllmError(f"the item format '{template}' has no slot. Write at least '{{title}}'.")
            if (self.answers is None) == (self.task == "relevance"):
                raise RecllmError(
                    "only a relevance prompt has 'answers', and it needs two, positive first: "
                    'answers = [" Yes", " No"].'
                )
            own = self.model_fields_set.intersection(RELEVANCE_KEYS)
            if own and self.task != "relevance":
                raise RecllmError(
                    f"{', '.join(sorted(own))}: only a relevance prompt has likes, dislikes and its own candidate; "
                    f"in one of task '{self.task}' every item is written as 'item' says, and cut to max_item_tokens."
                )
        except RecllmError as error:
            raise RecllmError(f"{place}: {error}") from None

    def check_against(self, catalog: Catalog) -> None:
        """Check that the slots are columns of `catalog`, and that there is something to write.

        Raises:
            RecllmError: a slot outside brackets that is no column, or one inside that is a misspelt one; or no item at
                all has what is written. The message has the columns that exist.
        """
        columns = [*catalog.text_columns, REST, "item_id"]
        for template in (self.item, self.candidate or self.item):
            for segment in split_item(template):
                for part in segment.parts:
                    if not isinstance(part, Slot) or part.name in columns:
                        continue
                    if segment.optional and difflib.get_close_matches(part.name, columns, n=1, cutoff=MISSPELT):
                        raise unknown(f"column in the prompt's item format '{template}':", part.name, columns)
                    if not segment.optional:
                        hint = f"Put it in brackets to drop it where it is missing: '[{{{part.name}}}]'."
                        raise unknown(f"column in the prompt's item format '{template}':", part.name, columns, hint)
            self._check_written(template, catalog)

    def unread(self, catalog: Catalog) -> list[str]:
        """Columns of `catalog` with text that no item of a history nor any candidate is written with."""
        own = [
            part for text in (self.item, self.candidate or self.item) for seg in split_item(text) for part in seg.parts
        ]
        named = {part.name for part in own if isinstance(part, Slot)}
        filled = [name for name in catalog.text_columns if catalog.frame[name].null_count() < len(catalog)]
        return [] if REST in named else [name for name in filled if name not in named]

    @staticmethod
    def _check_written(template: str, catalog: Catalog) -> None:
        parts = split_item(template)
        if not len(catalog) or any(render_item(parts, catalog.record(item)) is not None for item in catalog.ids):
            return
        filled = [name for name in catalog.text_columns if catalog.frame[name].null_count() < len(catalog)]
        if filled:
            raise RecllmError(
                f"The prompt's item format '{template}' writes nothing of any item: what it names is empty everywhere. "
                f"Columns with text: {', '.join(filled)}. Name one of them in a prompt of your own, or as the title "
                "(title=COLUMN in data.item_columns or by --item-column)."
            )


class Piece(NamedTuple):
    """One piece of a rendered prompt."""

    name: str
    text: str
    n_tokens: int


@dataclass(frozen=True)
class Preview:
    """What the model reads, decoded from the very token ids."""

    text: str
    tokens: list[int]
    pieces: list[Piece]


def load_prompt(name_or_path: str | Path, task: Task | None = None) -> Prompt:
    """Load a shipped prompt by name, or a file by its path, and check it.

    Raises:
        RecllmError: no such prompt, a wrong key or slot, or a prompt for another task than `task`.
    """
    path = find_recipe("prompts", str(name_or_path))
    prompt = parse(Prompt, read_toml(path), str(path))
    prompt.check(str(path))
    if task is not None and prompt.task != task:
        raise RecllmError(f"{path} is a prompt for the task '{prompt.task}'; one for '{task}' is needed here.")
    return prompt


class CompiledPrompt:
    """A prompt in token ids, for one tokenizer; `compile_prompt` makes it. Training and serving both use it.

    Prefix and suffix, template and content are tokenised apart and joined, so every boundary is exact.
    """

    prompt: Prompt
    start: list[int]
    """What stands before the history (before the item, in an item prompt), with the beginning-of-text token."""
    end: list[int]
    """What the tokenizer itself puts at the end of a text ([SEP] of an encoder); often nothing."""
    middle: list[int]
    """What stands between the history and the candidate."""

    def __init__(
        self,
        prompt: Prompt,
        tokenizer: Tokenizer,
        like_at: float | None = None,
        positions: int | None = None,
        *,
        ended: bool = True,
    ) -> None:
        """Compile; arguments as for `compile_prompt`."""
        prompt.check()
        self.prompt = prompt
        self.like_at, self.positions = like_at, positions
        self._tokens = Tokens(tokenizer)
        self.end = self._tokens.end if ended else []
        self._item, self._candidate = split_item(prompt.item), split_item(prompt.candidate or prompt.item)
        self._compile_text()

    def _compile_text(self) -> None:
        prompt = self.prompt
        around = literals(split_text(prompt.text))
        head, head_lead = _lead(self._opened(around[0]))
        middle, self._candidate_lead = _lead(around[1]) if prompt.task == "relevance" else ("", "")
        separator, lead = _lead(prompt.separator)
        self._item_lead = head_lead if prompt.task == "item" else lead
        if prompt.task != "item" and head_lead != lead:
            raise RecllmError(
                f"The text before {{history}} and the separator {prompt.separator!r} must both end in a space, "
                "or neither, so that an item has the same tokens at every place."
            )
        begin = self._tokens.begin
        opening = self._tokens.template(head)
        # A template that writes the beginning-of-text token itself does not get it twice.
        self.start = opening if opening[: len(begin)] == begin else begin + opening
        self.middle, self._tail = self._tokens.template(middle), self._tokens.template(around[-1])
        self._separator = self._tokens.template(separator)
        self._empty = self._tokens.template(head_lead + prompt.empty_history)
        self._marks = self._tokens.template(prompt.disliked), self._tokens.template(prompt.liked)
        wraps = {
            "relevance": ([], []),
            "next_item": ([], self._separator),
            "item": (self.start, self._tail + self.end),
        }
        self._before, self._after = wraps[prompt.task]
        self._item_cut = prompt.max_item_tokens
        if self.positions is not None and prompt.task == "item":
            self._item_cut = min(self._item_cut, self.positions - len(self._before) - len(self._after))
            if self._item_cut < 1:
                raise RecllmError(
                    f"The words around {{candidate}} take all of the {self.positions} tokens that the model reads. "
                    "Shorten the prompt's text."
                )

    def _opened(self, head: str) -> str:
        """What stands before the first slot, behind the space that the tokenizer gives a first word by itself."""
        controlled = self._tokens.is_control(self._tokens.template(head)[:1])
        # A history's items have the same tokens at every place, so the first one gets no space of its own.
        if controlled or head.startswith(" ") or (not head and self.prompt.task != "item"):
            return head
        return self._tokens.opening + head

    def item_text(self, record: Mapping[str, str]) -> str | None:
        """The item as it is written (in an item prompt: the whole text); None when there is nothing to write."""
        text = render_item(self._item, record)
        if text is None or self.prompt.task != "item":
            return text
        return "".join(text if isinstance(part, Slot) else part for part in split_text(self.prompt.text)).strip()

    def item_ids(self, record: Mapping[str, str]) -> list[int] | None:
        """Token ids of one item as it stands in a history, or None when there is nothing to write.

        In a next-item prompt they end with the separator: the hidden state at the last one predicts the next item.
        In an item prompt they are the whole text, with what the tokenizer puts around a text.
        """
        return self._item_ids([record])[0]

    def encode_items(self, catalog: Catalog) -> list[list[int] | None]:
        """`item_ids` of every item, in the catalogue's order."""
        return self._item_ids(catalog.record(item_id) for item_id in catalog.ids)

    def suffix(self, record: Mapping[str, str]) -> list[int] | None:
        """The candidate and the rest of the template up to the answer; None when there is nothing to write."""
        return self._suffix_ids([record])[0]

    def encode_suffixes(self, catalog: Catalog) -> list[list[int] | None]:
        """`suffix` of every item, in the catalogue's order."""
        return self._suffix_ids(catalog.record(item_id) for item_id in catalog.ids)

    def prefix(self, query: Query, catalog: Catalog) -> list[int]:
        """Everything up to the candidate, with the last `max_history` items that `catalog` can write."""
        return self.prefix_ids(self._history_ids(query, catalog), query.ratings)

    def prefix_ids(self, items: Sequence[list[int] | None], ratings: Sequence[float | None] | None = None) -> list[int]:
        """`prefix` from the `item_ids` of the history, oldest first; None items are left out."""
        return self.stem_ids(items, ratings) + self.middle

    def stem_ids(self, items: Sequence[list[int] | None], ratings: Sequence[float | None] | None = None) -> list[int]:
        """The part of a prefix that a longer history goes on from; `middle` is the rest of it."""
        assert self.prompt.task == "relevance"
        return self.start + self._history(items, ratings)

    def first_read(self, items: int) -> int:
        """The first of so many items of a history that is written."""
        return window_start(items, self.prompt.max_history, self.prompt.history_stride)

    @property
    def empty_prefix(self) -> list[int]:
        """The prefix of a user without history: the content-free prompt of calibration."""
        return self.prefix_ids([])

    @cached_property
    def answer_ids(self) -> tuple[int, int]:
        """First token of the positive and of the negative answer.

        Raises:
            RecllmError: they are the same token, or an answer has none.
        """
        assert self.prompt.answers is not None
        positive, negative = (self._tokens.template(answer)[:1] for answer in self.prompt.answers)
        if not positive or not negative or positive == negative:
            raise RecllmError(
                f"The answers {list(self.prompt.answers)} have no first tokens that differ for this tokenizer "
                f"({self._tokens.name}). Choose words that differ at their beginning."
            )
        return positive[0], negative[0]

    @property
    def behind(self) -> list[int]:
        """What stands behind an item in an item prompt, with what the tokenizer puts there."""
        return self._tail + self.end

    def preview(self, query: Query, catalog: Catalog, candidate: str | None = None) -> Preview:
        """What the model reads for `query` and the item `candidate`; by default its last event, after those before."""
        if candidate is None:
            before, candidate = _without_last(query, catalog)
            query = before if self.prompt.task == "relevance" else query
        if candidate not in catalog:
            raise unknown("item", candidate, catalog.ids)
        items = self._history_ids(query, catalog)
        if self.prompt.task == "item":
            named = [("item", self.item_ids(catalog.record(candidate)) or [])]
        elif self.prompt.task == "next_item":
            known = [ids for ids in items if ids is not None]
            kept = known[self.first_read(len(known)) :]
            named = [("start", self.start), *((f"item {place}", ids) for place, ids in enumerate(kept, start=1))]
        else:
            history = self._history(items, query.ratings)
            suffix = self.suffix(catalog.record(candidate)) or self._tail
            split = len(suffix) - len(self._tail)
            named = [("start", self.start), ("history", history), ("middle", self.middle)]
            named += [("candidate", suffix[:split]), ("rest", suffix[split:])]
        tokens = [token for _, ids in named for token in ids]
        pieces = [Piece(name, self._tokens.decode(ids), len(ids)) for name, ids in named]
        return Preview(self._tokens.decode(tokens), tokens, pieces)

    def _history_ids(self, query: Query, catalog: Catalog) -> list[list[int] | None]:
        return self._item_ids(catalog.record(item_id) if item_id in catalog else {} for item_id in query.history)

    def _history(self, items: Sequence[list[int] | None], ratings: Sequence[float | None] | None) -> list[int]:
        known = [(ids, self._mark(ratings, place)) for place, ids in enumerate(items) if ids is not None]
        joined: list[int] = []
        for ids, mark in known[self.first_read(len(known)) :]:
            joined += (self._separator if joined else []) + ids + mark
        return joined or self._empty

    def _mark(self, ratings: Sequence[float | None] | None, place: int) -> list[int]:
        rating = None if ratings is None else ratings[place]
        return [] if rating is None or self.like_at is None else self._marks[rating >= self.like_at]

    def _item_ids(self, records: Iterable[Mapping[str, str]]) -> list[list[int] | None]:
        texts = [render_item(self._item, record) for record in records]
        encoded = self._tokens.content(texts, self._item_lead, self._item_cut)
        # A text of which no token is left (of letters without width, say) is no text.
        return [self._before + ids + self._after if ids else None for ids in encoded]

    def _suffix_ids(self, records: Iterable[Mapping[str, str]]) -> list[list[int] | None]:
        assert self.prompt.task == "relevance"
        texts = [render_item(self._candidate, record) for record in records]
        cut = self.prompt.max_candidate_tokens or self.prompt.max_item_tokens
        encoded = self._tokens.content(texts, self._candidate_lead, cut)
        return [ids + self._tail if ids else None for ids in encoded]


def _without_last(query: Query, catalog: Catalog) -> tuple[Query, str]:
    """The last item of the history that `catalog` has, and the query of before it; without one the catalogue's last."""
    for place in reversed(range(len(query.history))):
        if query.history[place] in catalog:
            ratings = None if query.ratings is None else query.ratings[:place]
            return Query(query.history[:place], query.user_id, ratings), query.history[place]
    return query, catalog.ids[-1]


def compile_prompt(
    prompt: Prompt,
    tokenizer: Tokenizer,
    like_at: float | None = None,
    *,
    positions: int | None = None,
    ended: bool = True,
) -> CompiledPrompt:
    """Compile `prompt` for `tokenizer`, which is left as it is.

    Args:
        prompt: the prompt.
        tokenizer: the model's tokenizer.
        like_at: rating from which a history item gets the mark `liked`, below it `disliked`; None writes no marks.
        positions: the most tokens that the model reads; the text of an item prompt is cut to them. None: any number.
        ended: whether an item prompt ends with what the tokenizer puts behind every text.

    Raises:
        RecllmError: the prompt is not well formed, leaves no room for an item, or (relevance) its answers begin with
            the same token.
    """
    compiled = CompiledPrompt(prompt, tokenizer, like_at, positions, ended=ended)
    if prompt.task == "relevance":
        _ = compiled.answer_ids
    return compiled


def _check_slots(prompt: Prompt) -> None:
    parts = split_text(prompt.text)
    names = tuple(part.name for part in parts if isinstance(part, Slot))
    wanted = SLOTS[prompt.task]
    for name in names:
        if name not in wanted:
            raise unknown(f"slot in the text of a {prompt.task} prompt:", name, wanted)
    if names != wanted:
        order = " and then ".join(f"{{{name}}}" for name in wanted)
        raise RecllmError(f"the text of a {prompt.task} prompt must have {order}, once.")
    if prompt.task == "next_item" and not isinstance(parts[-1], Slot):
        raise RecllmError("the text of a next_item prompt must end with {history}.")


def _lead(text: str) -> tuple[str, str]:
    """Move a last space from `text` to what comes after it: byte-level vocabularies hold words with their space."""
    return (text[:-1], " ") if text.endswith(" ") else (text, "")

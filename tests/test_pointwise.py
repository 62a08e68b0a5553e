"""Pointwise relevance: blocks of like length, groups of users, prefixes that are kept for returning users."""

import numpy as np
import pytest

from recllm import pointwise
from recllm.data import Query
from recllm.errors import RecllmError
from recllm.pointwise import CALL_TOKENS, KeptPrefixes, PointwiseScorer
from recllm.prompts import compile_prompt, load_prompt
from recllm.ranking import ItemIndex


def own_number(ids):
    """A number that every token and place of a text has its part in."""
    return float(np.sin(np.asarray(ids, dtype=np.float64) * np.arange(1, len(ids) + 1)).sum())


class CountingReader:
    """Answers by the text alone, and keeps account of what it read."""

    causal, max_tokens, shares, soft_from = True, 512, True, None

    def __init__(self, tokens_at_once=512):
        self.tokens_at_once = tokens_at_once
        self.passes, self.prefixes_read = [], []

    def whole(self, ids, lengths):
        self.passes.append(ids.shape)
        return np.array([own_number(row[:length]) for row, length in zip(ids, lengths, strict=True)], dtype=np.float32)

    def read(self, ids, lengths):
        self.passes.append(ids.shape)
        rows = [tuple(row[:length].tolist()) for row, length in zip(ids, lengths, strict=True)]
        self.prefixes_read += rows
        return rows

    def take(self, prefixes, row):
        return [prefixes[row]], 10 * len(prefixes[row])

    def join(self, prefixes):
        return [row for own in prefixes for row in own]

    def answers(self, prefixes, ids, lengths):
        self.passes.append((ids.shape[0] * ids.shape[1], ids.shape[2]))
        rows = zip(prefixes, ids, lengths, strict=True)
        return np.array([list(map(own_number, joined(*row))) for row in rows], dtype=np.float32)


def joined(prefix, ids, lengths):
    return [[*prefix, *row[:length]] for row, length in zip(ids, lengths, strict=True)]


@pytest.fixture
def make(tiny_tokenizer, checkerboard):
    prompt = compile_prompt(load_prompt("relevance"), tiny_tokenizer)

    def scorer(keep_bytes=0, **reader):
        return PointwiseScorer(CountingReader(**reader), prompt, checkerboard.catalog, False, keep_bytes)

    return scorer


def test_a_candidate_that_leaves_no_room_is_named(make, monkeypatch):
    """Cut to nothing, every history of every user would be unknown."""
    monkeypatch.setattr(CountingReader, "max_tokens", 20)
    scorer = make()
    with pytest.raises(
        RecllmError, match=r"The prompt does not fit: of 20 tokens the item '\d+' as a candidate takes \d+"
    ):
        scorer.prompts.prefix(Query(("1",)))


def test_a_history_of_which_nothing_has_room_is_not_known(make):
    scorer = make()
    scorer.prompts._items["1"] = [1] * CountingReader.max_tokens
    queries, items = [Query(("1",)), Query(("1", "2"))], ItemIndex(["3", "5"])
    assert [scorer.prompts.knows(query) for query in queries] == [False, True]
    assert np.isnan(scorer.score(queries, items)).tolist() == [[True, True], [False, False]]


QUERIES = [Query(tuple(map(str, range(count)))) for count in (3, 9, 1, 5, 5)] + [Query(("x",)), Query(())]


@pytest.mark.parametrize("keep_bytes", [0, 1_000, 1_000_000])
@pytest.mark.parametrize("tokens", [1, 150, 400, 100_000])
def test_every_pair_gets_the_answer_to_its_own_text(make, checkerboard, keep_bytes, tokens):
    scorer, index = make(keep_bytes, tokens_at_once=tokens), ItemIndex([*checkerboard.catalog.ids, "x"])
    counted = []
    scorer.progress = counted.append
    for _ in range(2):
        found = scorer.score(QUERIES, index)
        assert np.isnan(found[5:]).all()
        assert np.isnan(found[:, -1]).all()
        for row, query in enumerate(QUERIES[:5]):
            texts = [scorer.prompts.whole(query, item) for item in checkerboard.catalog.ids]
            assert found[row, :-1] == pytest.approx([own_number(ids) for ids in texts], abs=1e-3)
    assert sum(counted) == 2 * len(QUERIES)
    assert scorer.kept.size <= keep_bytes
    longest = max(len(scorer.prompts.prefix(query)) for query in QUERIES)
    assert all(rows * length <= max(tokens, length, longest) for rows, length in scorer.reader.passes)


def test_each_query_has_candidates_of_its_own(make, checkerboard):
    scorer = make(tokens_at_once=400)
    rng = np.random.default_rng(0)
    catalog = checkerboard.catalog.ids
    items = [rng.choice(catalog, count, replace=False).tolist() for count in (7, 1, 24, 6, 0, 3, 3)]
    items[0][2] = "x"
    found = scorer.score_lists(QUERIES, items)
    assert [len(own) for own in found] == [7, 1, 24, 6, 0, 3, 3]
    for own, query, named in zip(found[:5], QUERIES, items, strict=False):
        texts = [np.nan if item == "x" else own_number(scorer.prompts.whole(query, item)) for item in named]
        assert own == pytest.approx(texts, abs=1e-3, nan_ok=True)
    assert all(np.isnan(own).all() for own in found[5:])


def test_users_with_few_candidates_are_not_padded_to_those_with_many(make, checkerboard):
    scorer = make(tokens_at_once=100_000)
    scorer.score_lists(QUERIES[:3], [checkerboard.catalog.ids, ["1", "2"], ["3", "4"]])
    assert scorer.reader.passes[0][0] == 1  # the first pass reads one prefix, not all three
    assert max(rows for rows, _ in scorer.reader.passes) <= 24


def test_a_returning_users_prefix_is_read_once(make, checkerboard):
    scorer, index = make(1_000_000), ItemIndex(checkerboard.catalog.ids)
    scorer.score(QUERIES[:3], index)
    assert len(scorer.reader.prefixes_read) == 3
    scorer.score(QUERIES[:5], index)  # the last two are one history
    assert len(scorer.reader.prefixes_read) == 4
    scorer.score(QUERIES[:5], index)
    assert len(scorer.reader.prefixes_read) == 4


def test_what_is_read_to_calibrate_does_not_hang_on_what_was_asked_before(make, checkerboard):
    first, second = make(), make()
    first.calibrated = second.calibrated = True
    first.score_lists(QUERIES[:1], [["3", "4"]])
    first.score_lists(QUERIES[:1], [["5", "3"]])
    second.score_lists(QUERIES[:1], [["5", "3"]])
    shape = (len(checkerboard.catalog.ids), first.reader.passes[1][1])  # the whole stretch
    assert first.reader.passes.count(shape) == second.reader.passes.count(shape) == 1
    assert first.answers([[1]], []).shape == (1, 0)


def test_the_least_recently_used_prefix_goes_first():
    kept = KeptPrefixes(30)
    kept.add((1,), "a", 10)
    kept.add((2,), "b", 10)
    kept.add((3,), "c", 10)
    assert kept.get((1,)) == "a"
    kept.add((4,), "d", 15)
    assert [kept.get((key,)) for key in (1, 2, 3, 4)] == ["a", None, None, "d"]
    assert (len(kept), kept.size) == (2, 25)
    kept.add((5,), "too large", 31)
    assert kept.get((5,)) is None
    assert kept.get((1,)) == "a"


def cost(blocks, lengths):
    return sum(CALL_TOKENS + max(lengths[place] for place in block) * len(block) for block in blocks)


def test_blocks_cost_the_least_of_all_ways_to_cut():
    rng = np.random.default_rng(0)
    for _ in range(20):
        lengths = rng.choice([5, 6, 9, 15, 40], 12).tolist()
        blocks = pointwise._blocks(lengths, 10_000)
        assert sorted(place for block in blocks for place in block) == list(range(12))
        order = np.argsort(lengths, kind="stable").tolist()
        every = []
        for cuts in range(1 << 11):
            stops = [place + 1 for place in range(11) if cuts >> place & 1]
            every.append(cost(np.split(order, stops), lengths))
        assert cost(blocks, lengths) == min(every)


def test_no_block_is_larger_than_a_pass():
    assert [len(block) for block in pointwise._blocks([10] * 25, 100)] == [10, 10, 5]
    assert [len(block) for block in pointwise._blocks([10] * 3, 4)] == [1, 1, 1]


@pytest.mark.parametrize("shares", [True, False])
@pytest.mark.parametrize("tokens", [1, 8, 1000])
def test_answers_come_back_in_the_order_asked(make, shares, tokens):
    scorer = make(tokens_at_once=tokens)
    scorer.reader.shares = shares
    prefixes, suffixes = [[5, 6], [9], [4, 4, 4]], [[1, 2, 3], [4], [7, 8], [2]]  # in no order of length
    expected = [[own_number(prefix + suffix) for suffix in suffixes] for prefix in prefixes]
    assert scorer.answers(prefixes, suffixes) == pytest.approx(np.array(expected), abs=1e-4)


def test_ratings_stay_with_their_items_where_one_is_passed_over(tiny_tokenizer, checkerboard):
    marked = load_prompt("relevance").model_copy(update={"liked": " A", "disliked": " B"})
    prompt = compile_prompt(marked, tiny_tokenizer, like_at=4.0)
    stem = PointwiseScorer(CountingReader(), prompt, checkerboard.catalog, False).prompts.stem
    plain = stem(Query(("1", "2"), "u", (5.0, 1.0)))
    assert stem(Query(("1", "2", "nowhere"), "u", (5.0, 1.0, 5.0))) == plain
    assert stem(Query(("nowhere", "1", "2"), "u", (1.0, 5.0, 1.0))) == plain
    assert stem(Query(("1", "2"), "u", (1.0, 5.0))) != plain


def test_a_pair_is_calibrated_as_in_a_list(tiny_tokenizer, checkerboard):
    prompt = compile_prompt(load_prompt("relevance"), tiny_tokenizer)
    scorer = PointwiseScorer(CountingReader(), prompt, checkerboard.catalog, True)
    query = Query(("1", "2"), "u")
    assert scorer.score_pairs([query], ["5"])[0] == pytest.approx(
        scorer.score([query], ItemIndex(["5"]))[0, 0], abs=1e-4
    )

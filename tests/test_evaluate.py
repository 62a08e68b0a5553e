"""Evaluation: ranks against naive loops, masking, slices, paired intervals, labels and their errors."""

import json

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from recllm.data import Query
from recllm.errors import RecllmError
from recllm.evaluate import KnownScores, evaluate_labels, evaluate_ranking, user_codes, warm_and_cold
from recllm.metrics import user_aucs
from recllm.ranking import ItemIndex
from recllm.results import averaged, resampled
from recllm.splits import Example

ITEMS = ItemIndex(f"i{n}" for n in range(30))
ROWS = 300


@pytest.fixture(scope="module")
def examples():
    rng = np.random.default_rng(0)
    made = []
    for row in range(ROWS):
        drawn = [f"i{n}" for n in rng.permutation(30)[:6]]
        made.append(Example(Query(tuple(drawn[:5]), f"u{row}"), drawn[5], float(row % 2)))
    return made


@pytest.fixture(scope="module")
def known(examples):
    rng = np.random.default_rng(1)
    queries = [example.query for example in examples]
    noise = rng.normal(size=(ROWS, 30)).astype(np.float32)
    better = noise.copy()
    better[np.arange(ROWS), ITEMS.rows(example.item_id for example in examples)] += 0.5
    return {"noise": KnownScores(queries, ITEMS, noise), "better": KnownScores(queries, ITEMS, better)}


def test_ranking_equals_a_naive_loop(examples, known):
    table = evaluate_ranking({"noise": known["noise"]}, examples, ITEMS, resamples=20)
    hits, gains, tops = [], [], set()
    for row, example in enumerate(examples):
        free = [n for n in range(30) if ITEMS.ids[n] not in example.query.history]
        order = sorted(free, key=lambda n: -known["noise"].scores[row, n])
        rank = order.index(ITEMS.ids.index(example.item_id)) + 1
        hits.append(rank <= 10)
        gains.append(1 / np.log2(1 + rank) if rank <= 10 else 0.0)
        tops.update(order[:10])
    assert table.interval("noise", "HitRate@10")[0] == pytest.approx(np.mean(hits))
    assert table.interval("noise", "NDCG@10")[0] == pytest.approx(np.mean(gains))
    assert table.interval("noise", "Coverage@10")[0] == len(tops) / 30
    assert table.per_row["noise"]["NDCG@10"] == pytest.approx(gains)


def test_a_target_that_a_list_would_leave_out_is_not_found():
    """Were it ranked while all else that was seen is left out, leaving out would give it away."""
    query = Query(("i0", "i1"), "u")
    scores = np.zeros((1, 30), np.float32)
    scores[0, :3] = 3.0, 2.0, 1.0
    scorers = {"s": KnownScores([query], ITEMS, scores)}
    again = [Example(query, "i1")]
    assert evaluate_ranking(scorers, again, ITEMS, resamples=5).interval("s", "MRR")[0] == 0.0
    assert evaluate_ranking(scorers, again, ITEMS, exclude_seen=False, resamples=5).interval("s", "MRR")[0] == 0.5
    assert evaluate_ranking(scorers, [Example(query, "i2")], ITEMS, resamples=5).interval("s", "MRR")[0] == 1.0


def test_intervals_hold_the_figure_and_a_pair_is_tighter_than_its_parts(examples, known):
    table = evaluate_ranking(known, examples, ITEMS, ks=(5, 10), seed=1)
    value, low, high = table.interval("better", "NDCG@10")
    assert low < value < high
    gain, from_, to = table.difference("better", "noise", "NDCG@10")
    assert 0 < from_ < gain < to
    assert to - from_ < high - low
    assert gain == pytest.approx(value - table.interval("noise", "NDCG@10")[0])
    assert table.difference("noise", "noise", "MRR") == (0.0, 0.0, 0.0)


def test_interval_width_agrees_with_theory(examples, known):
    value, low, high = evaluate_ranking(known, examples, ITEMS).interval("noise", "HitRate@10")
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(value * (1 - value) / ROWS), rel=0.2)


def test_rows_of_one_user_are_drawn_together(examples, known):
    one = [Example(Query(e.query.history, "same"), e.item_id) for e in examples[:20]]
    scorer = KnownScores([e.query for e in one], ITEMS, known["noise"].scores[:20])
    table = evaluate_ranking({"s": scorer}, one, ITEMS, resamples=50)
    value, *ends = table.interval("s", "MRR")
    assert table.draws["s", "MRR", "all"] == pytest.approx(value)  # one user: nothing varies
    assert np.isnan(ends).all()  # and an interval without a width would say that this is known for sure
    assert np.isnan(table.difference("s", "s", "MRR")[1:]).all()


def test_same_seed_same_table_and_another_seed_another_interval(examples, known):
    def of(seed):
        return evaluate_ranking(known, examples, ITEMS, seed=seed, resamples=100).to_dict()

    assert of(1) == of(1)
    assert of(1) != of(2)


def test_slices_tell_warm_from_cold():
    rows = [Example(Query(("i0",), "a"), "i1"), Example(Query(("i0",), "b"), "i9"), Example(Query((), "c"), "i1")]
    slices = warm_and_cold(rows, cold_items={"i9"})
    assert {name: mask.tolist() for name, mask in slices.items()} == {
        "warm": [True, False, False],
        "cold item": [False, True, False],
        "no history": [False, False, True],
        "with history": [True, True, False],
    }
    assert warm_and_cold(rows, item_counts={"i1": 3})["cold item"].tolist() == [False, True, False]
    assert "with history" not in warm_and_cold([rows[0], rows[2]])  # they are the warm ones
    assert warm_and_cold(rows[:1]) == {}
    scorer = KnownScores([e.query for e in rows], ITEMS, np.tile(-np.arange(30, dtype=np.float32), (3, 1)))
    table = evaluate_ranking({"s": scorer}, rows, ITEMS, cold_items={"i9"}, resamples=10)
    assert table.counts == {
        "all": (3, 3),
        "warm": (1, 1),
        "cold item": (1, 1),
        "no history": (1, 1),
        "with history": (2, 2),
    }
    assert table.interval("s", "HitRate@10", "cold item")[0] == 1.0
    assert table.interval("s", "MRR", "no history")[0] == 0.5
    own = evaluate_ranking({"s": scorer}, rows, ITEMS, slices={"first": np.array([True, False, False])}, resamples=10)
    assert own.counts == {"all": (3, 3), "first": (1, 1)}


def test_known_scores_are_nan_for_what_was_not_scored(known, examples):
    found = known["noise"].score([examples[3].query, Query(("x",))], ItemIndex(["i2", "zz"]))
    assert found[0, 0] == known["noise"].scores[3, 2]
    assert np.isnan(found).tolist() == [[False, True], [True, True]]


def test_tables_are_json_and_text(examples, known):
    table = evaluate_ranking(known, examples, ITEMS, resamples=10)
    assert json.loads(json.dumps(table.to_dict(), allow_nan=False))["rows"][0]["scorer"] == "noise"
    lines = table.lines()
    assert lines[0] == "all: 300 rows, 300 users"
    assert "NDCG@10" in lines[1]
    assert lines[2].startswith("noise")


def test_tables_of_several_seeds_average_with_their_draws(examples, known):
    name = next(iter(known))
    one = evaluate_ranking({name: known[name]}, examples, ITEMS)
    noise = np.random.default_rng(5).normal(size=known[name].scores.shape).astype(np.float32)
    other = KnownScores([example.query for example in examples], ITEMS, noise)
    two = evaluate_ranking({name: other}, examples, ITEMS)
    mean = averaged([one, two])
    rows = (one.per_row[name]["NDCG@10"] + two.per_row[name]["NDCG@10"]) / 2
    assert mean.interval(name, "NDCG@10")[0] == pytest.approx(rows.mean())
    # The same users were drawn, so the draws of the mean are the mean of the draws.
    low, high = mean.interval(name, "NDCG@10")[1:]
    assert low < rows.mean() < high
    assert high - low < one.interval(name, "NDCG@10")[2] - one.interval(name, "NDCG@10")[1]
    with pytest.raises(ValueError, match="same scorers"):
        averaged([one, evaluate_ranking({"other": other}, examples, ITEMS)])


def test_progress_reaches_the_end(examples, known):
    calls = []
    evaluate_ranking(known, examples, ITEMS, resamples=1, progress=lambda done, of: calls.append((done, of)))
    assert calls == [(256, 300), (300, 300)]


def test_mistakes_are_named(examples, known):
    with pytest.raises(RecllmError, match="1 of 1 target items are not among the 30 candidates, first 'zz'"):
        evaluate_ranking(known, [Example(Query(()), "zz")], ITEMS)
    with pytest.raises(RecllmError, match="no example to evaluate on"):
        evaluate_ranking(known, [], ITEMS)
    with pytest.raises(RecllmError, match="AUC needs labels, and 1 of 1"):
        evaluate_labels(known, [Example(Query(()), "i1")])
    table = evaluate_ranking(known, examples, ITEMS, resamples=1)
    with pytest.raises(RecllmError, match="Did you mean 'NDCG@10'"):
        table.interval("noise", "NDCG@1O")
    with pytest.raises(RecllmError, match="Unknown scorer 'nose'"):
        table.difference("better", "nose", "MRR")
    with pytest.raises(RecllmError, match="Unknown slice 'cold'"):
        table.interval("noise", "MRR", "cold")


@pytest.fixture(scope="module")
def labelled():
    rng = np.random.default_rng(5)
    return [
        Example(Query(("i0",), f"u{rng.integers(40)}"), f"i{rng.integers(30)}", float(rng.integers(2)))
        for _ in range(400)
    ]


class Hinted:
    """A little of the label and much noise, by item; NaN for the items in `silent`."""

    def __init__(self, examples, silent=()):
        self.silent = silent
        means = {item: [e.label for e in examples if e.item_id == item] for item in ITEMS.ids}
        self.means = {item: np.mean(labels) if labels else 0.5 for item, labels in means.items()}

    def score(self, queries, candidates):
        row = [np.nan if item in self.silent else self.means[item] for item in candidates.ids]
        return np.tile(np.array(row, np.float32), (len(queries), 1))


def test_labels_equal_scikit_learn(labelled):
    scorer = Hinted(labelled)
    table = evaluate_labels({"hint": scorer}, labelled, resamples=100)
    truth = [e.label for e in labelled]
    scores = [scorer.means[e.item_id] for e in labelled]
    value, low, high = table.interval("hint", "AUC")
    assert value == pytest.approx(roc_auc_score(truth, np.float32(scores)))
    assert low < value < high
    assert table.interval("hint", "scored")[0] == 1.0
    value, low, high = table.interval("hint", "UAUC")
    assert low < value < high
    assert table.difference("hint", "hint", "AUC") == (0.0, 0.0, 0.0)


def test_rows_without_score_count_as_the_mean(labelled):
    silent = {f"i{n}" for n in range(15)}
    table = evaluate_labels({"half": Hinted(labelled, silent), "none": Hinted(labelled, set(ITEMS.ids))}, labelled)
    gone = np.array([e.item_id in silent for e in labelled])
    scores = table.per_row["half"]["score"]
    assert table.interval("half", "scored")[0] == pytest.approx(1 - gone.mean())
    assert scores[gone] == pytest.approx(scores[~gone].mean())
    assert table.interval("none", "AUC")[0] == 0.5
    assert table.interval("none", "scored")[0] == 0.0


def test_a_figure_that_these_rows_cannot_give_is_a_dash_with_its_reason(labelled):
    single = [Example(example.query, example.item_id, example.label) for example in labelled[:1]]
    others = [Example(Query(("i0",), f"v{row}"), e.item_id, e.label) for row, e in enumerate(labelled)]
    lines = evaluate_labels({"hint": Hinted(labelled)}, others, resamples=10).lines()
    assert lines[-1] == "UAUC: not known, for none of these users has rows of both labels"
    assert lines[-2].split()[:2] == ["hint", f"{roc_of(labelled):.4f}"]
    assert lines[-2].split()[3] == "–"
    one = evaluate_labels({"hint": Hinted(labelled)}, single, resamples=10).lines()
    assert [line.split(":")[0] for line in one[-2:]] == ["AUC", "UAUC"]
    assert "nan" not in " ".join(lines + one)


def roc_of(examples):
    scores = Hinted(examples).means
    return roc_auc_score([e.label for e in examples], np.float32([scores[e.item_id] for e in examples]))


class ByItem:
    """The same order in any unit."""

    def __init__(self, scale):
        self.scale = scale

    def score(self, queries, candidates):
        row = self.scale * np.array([int(item[1:]) ** 2 % 11 for item in candidates.ids], np.float32)
        return np.tile(row, (len(queries), 1))


def test_the_same_order_in_other_units_differs_in_no_draw(labelled):
    table = evaluate_labels({"a": ByItem(1.0), "b": ByItem(3.0)}, labelled, resamples=100)
    assert table.difference("a", "b", "AUC") == table.difference("a", "b", "UAUC") == (0.0, 0.0, 0.0)


def test_draws_of_the_auc_inside_users_by_hand(labelled):
    rows = labelled[:120]
    table = evaluate_labels({"a": ByItem(1.0)}, rows, resamples=50)
    codes, labels = user_codes(rows), np.array([row.label for row in rows])
    first, each = user_aucs(codes, labels, table.per_row["a"]["score"])
    known = ~np.isnan(each)
    weights = np.concatenate(list(resampled(codes.max() + 1, 50, 0)))[:, codes[first[known]]]
    assert table.draws["a", "UAUC", "all"] == pytest.approx(weights @ each[known] / weights.sum(1))


def test_rows_without_a_user_are_users_of_their_own():
    rows = [Example(Query(("i0",), user), "i1") for user in (None, None, "u", "u")]
    assert user_codes(rows).tolist() == [0, 1, 2, 2]

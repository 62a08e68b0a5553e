"""The light judge: shares without a row's own label, marked histories, the loss inside users, NaN for unknown."""

import numpy as np
import pytest
import torch

from recllm.data import Query
from recllm.judgedloss import NOTHING, InsideUsers
from recllm.lightjudge import (
    CANDIDATE,
    DISLIKED,
    FACTS,
    LIKED,
    SHRINKAGE,
    UNRATED,
    LightJudge,
    LightJudgeScorer,
    LikeShares,
    PairCollator,
    PairFormat,
    fold_of,
)
from recllm.metrics import user_aucs
from recllm.ranking import ItemIndex
from recllm.sequence import IGNORED
from recllm.splits import Example
from recllm.vectors import ItemFeatures

ITEMS = 12
INDEX = ItemIndex(map(str, range(ITEMS)))
ROWS = [
    Example(Query(("1",), "u"), "2", 1.0),
    Example(Query(("1", "2"), "u"), "3", 0.0),
    Example(Query(("1",), "v"), "2", 0.0),
    Example(Query(("1",), "v"), "2", 0.0),  # the same event again: counted once
]


def judge(inside=NOTHING, seed=0, **kind):
    random = np.random.default_rng(seed)
    text, factors = (random.normal(size=(ITEMS, width)).astype(np.float32) for width in (6, 3))
    text[:, 0] = np.where(np.arange(ITEMS) % 2, 3.0, -3.0)
    torch.manual_seed(seed)
    features = ItemFeatures(INDEX, text, factors)
    return LightJudge(features, width=16, layers=1, heads=2, dropout=0.0, limit=4, inside=inside, **kind)


def form(limit=4):
    return PairFormat(INDEX, LikeShares.fit(ROWS), threshold=4.0, limit=limit)


def test_shares_by_hand():
    shares = LikeShares.fit(ROWS)
    assert shares.middle == pytest.approx(1 / 3)
    assert {item: counts.sum(axis=0).tolist() for item, counts in shares.items.items()} == {"2": [2, 1], "3": [1, 0]}

    def share(number, liked):
        return (liked + SHRINKAGE * shares.middle) / (number + SHRINKAGE) - shares.middle

    asked = shares.facts(Query(("1",), "u"), "2", None)
    assert asked == pytest.approx([share(2, 1), np.log(3), share(2, 1), np.log(3), np.log(2)])
    nobody = shares.facts(Query((), "w"), "9", None)
    assert nobody == pytest.approx([0.0, 0.0, 0.0, 0.0, 0.0])
    rated = shares.facts(Query(("1", "3"), "w"), "9", [1.0, 1.0])
    assert rated[2:4] == pytest.approx([share(2, 2), np.log(3)])
    unrated = shares.facts(Query(("1",), "u"), "2", [])
    assert unrated[2:4] == [0.0, 0.0]  # nobody's label is in the history, so none of the training rows' is seen either
    # In training the fold of the pair is left out: here the row itself, and what shares its fold.
    own = fold_of("u", "2")
    left = [label for user, item, label in (("u", "2", 1.0), ("v", "2", 0.0)) if fold_of(user, item) != own]
    trained = shares.facts(Query(("1",), "u"), "2", None, training=True)
    assert trained[:2] == pytest.approx([share(len(left), sum(left)), np.log1p(len(left))])


def test_a_training_rows_shares_do_not_give_its_label_away():
    random = np.random.default_rng(0)
    rows = [
        Example(Query((), f"u{user}"), str(item), float(random.integers(2)))
        for user in range(60)
        for item in random.permutation(300)[:40]
    ]
    shares = LikeShares.fit(rows)
    facts = np.array([shares.facts(row.query, row.item_id, None, training=True) for row in rows])
    users, labels = np.array([row.query.user_id for row in rows]), np.array([row.label for row in rows])
    for column in range(FACTS):
        _, inside = user_aucs(np.unique(users, return_inverse=True)[1], labels, facts[:, column])
        # With only the own label left out, the user's share would give .0 here and the item's almost that.
        assert 0.3 < np.nanmean(inside) < 0.7


def test_a_history_is_marked_and_its_last_items_are_read():
    pair = form(limit=2).pair(Query(("1", "zz", "4", "5"), "u", (5.0, 5.0, 2.0, 4.0)), "3")
    assert pair.ids == [4, 5, 3]
    assert pair.kinds == [DISLIKED, LIKED, CANDIDATE]
    assert form().pair(Query(("1", "4"), "u"), "3").kinds == [UNRATED, UNRATED, CANDIDATE]
    partly = form().pair(Query(("1", "4", "5"), "u", (None, 2.0, 5.0)), "3")
    assert partly.kinds == [UNRATED, DISLIKED, LIKED, CANDIDATE]
    assert partly.facts[3] == pytest.approx(np.log(3))  # two ratings


def test_the_answer_depends_on_what_was_liked():
    scorer = LightJudgeScorer(judge(), form())
    queries = [Query(("1", "4"), "u", ratings) for ratings in ((5.0, 5.0), (1.0, 5.0))]
    first, second = scorer.score_pairs(queries, ["3", "3"])
    assert abs(first - second) > 1e-4


@pytest.mark.parametrize("relative", [False, True])
def test_unknown_pairs_are_nan_and_a_batch_equals_its_rows(relative):
    model = judge(relative=relative, gated=relative)
    if relative:  # the candidate is one place behind the last item of the longest history
        model.body.blocks[0].relative.bias.weight.data.normal_()
        assert len(model.body.blocks[0].relative.bias.weight) == 4 + 1
    scorer = LightJudgeScorer(model, form())
    queries = [Query(("1", "4", "5"), "u"), Query((), "u"), Query(("zz",), "u"), Query(("7",))]
    scores = scorer.score(queries, ItemIndex(["2", "zz", "9"]))
    assert np.isnan(scores[1:3]).all()
    assert np.isnan(scores[:, 1]).all()
    for row in (0, 3):
        alone = scorer.score(queries[row : row + 1], ItemIndex(["2", "zz", "9"]))[0]
        assert alone == pytest.approx(scores[row], abs=1e-5, nan_ok=True)


def test_the_loss_inside_users_is_of_liked_against_disliked_rows_of_one_user():
    shared = form()
    pairs = [
        shared.pair(Query(("1",), user), item)._replace(label=label)
        for user, item, label in (("u", "2", 1.0), ("u", "3", 0.0), ("u", "4", 0.0), ("v", "5", 1.0))
    ]
    batch = PairCollator()(pairs)
    plain, both = judge().train(), judge(InsideUsers(pairwise=2.0)).train()
    logits = plain(**batch)["logits"].detach().double()
    inside = torch.nn.functional.softplus(logits[1:3] - logits[0]).mean().item()
    assert both(**batch)["loss"].item() - plain(**batch)["loss"].item() == pytest.approx(2.0 * inside, rel=1e-4)
    batch["labels"][1:3] = IGNORED  # rows that fill up a batch have no part in it
    assert both(**batch)["loss"].item() == pytest.approx(plain(**batch)["loss"].item(), rel=1e-6)


def test_it_learns_a_taste_that_only_the_marks_show():
    random = np.random.default_rng(0)
    model, shared = judge(), PairFormat(INDEX, LikeShares.fit(()), 4.0, 4)
    # Everybody has seen one even and one odd item; the liked one says which kind the next liked one is.
    rows = []
    for _ in range(400):
        even, odd = 2 * int(random.integers(6)), 2 * int(random.integers(6)) + 1
        likes_even, item = bool(random.integers(2)), int(random.integers(ITEMS))
        query = Query((str(even), str(odd)), None, (5.0, 1.0) if likes_even else (1.0, 5.0))
        rows.append(shared.pair(query, str(item))._replace(label=float(likes_even == (item % 2 == 0))))
    optimizer, collate = torch.optim.AdamW(model.parameters(), lr=5e-3), PairCollator()
    for step in range(400):
        part = [rows[place] for place in np.random.default_rng(step).integers(0, 300, size=64)]
        optimizer.zero_grad()
        model(**collate(part))["loss"].backward()
        optimizer.step()
    batch = collate(rows[300:])
    found = model.eval()(**batch)["logits"] > 0
    assert (found == (batch["labels"][:, 0] > 0.5)).float().mean() > 0.9


def test_a_rows_own_label_is_left_out_of_its_facts_in_training_only():
    pairs, query = form(), Query(("1",), "u")
    assert pairs.pair(query, "2", 1.0).facts == pairs.shares.facts(query, "2", None, training=True)
    assert pairs.pair(query, "2").facts == pairs.shares.facts(query, "2", None)
    assert pairs.pair(query, "2", 1.0).facts != pairs.pair(query, "2").facts

"""The catalogue loss in pieces: its value, its gradients and its ranks are those of logits in one piece."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from recllm import softmax
from recllm.softmax import Barred, Targets, catalogue_loss, draw_negatives, draw_odds

ROWS, ITEMS, WIDTH = 23, 31, 5


def given(seed=0):
    """Queries, heads, bias, labels and barred pairs, some of which are labels; two items stand out for all rows."""
    torch.manual_seed(seed)
    bias = torch.randn(ITEMS)
    bias[[3, 17]] = -torch.inf
    labels = torch.randint(4, 17, (ROWS,))
    rows = torch.arange(ROWS).repeat_interleave(4)
    items = torch.randint(0, ITEMS, (4 * ROWS,))
    items[::8] = labels[rows[::8]]
    leaves = [torch.randn(ROWS, WIDTH), torch.randn(ITEMS, WIDTH), bias]
    return [leaf.requires_grad_() for leaf in leaves], labels, Barred(rows, items)


def one(labels):
    """Each row's single target."""
    return Targets(labels[:, None], torch.ones(len(labels), 1))


def in_one_piece(queries, heads, bias, labels, barred):
    logits = (queries @ heads.T).float() + bias
    mask = torch.zeros(logits.shape, dtype=torch.bool)
    mask[barred.rows, barred.items] = True
    mask[torch.arange(len(labels)), labels] = False
    return functional.cross_entropy(logits.masked_fill(mask, -torch.inf), labels, reduction="sum")


@pytest.fixture(params=[1, 4, ROWS, 1000])
def in_pieces(request, monkeypatch):
    monkeypatch.setattr(softmax, "ROWS_AT_LEAST", request.param)
    monkeypatch.setattr(softmax, "CELLS_AT_ONCE", (1, 1))


def test_loss_and_gradients_are_those_of_one_piece(in_pieces):
    (leaves, labels, barred), (others, _, _) = given(), given()
    expected = in_one_piece(*leaves, labels, barred)
    found, ranks = catalogue_loss(*others, one(labels), barred)
    (expected * 3.0).backward()
    (found * 3.0).backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    assert len(ranks) == 0
    for leaf, other in zip(leaves, others, strict=True):
        assert other.grad.numpy() == pytest.approx(leaf.grad.numpy(), abs=1e-5)
    assert others[2].grad[[3, 17]].tolist() == [0.0, 0.0]


def test_the_gradient_is_the_slope_of_the_loss(in_pieces):
    (queries, heads, bias), labels, barred = given()
    catalogue_loss(queries, heads, bias, one(labels), barred)[0].backward()
    step = torch.randn(ITEMS, WIDTH, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        up, down = (
            catalogue_loss(queries.double(), (heads + side * step).double(), bias.double(), one(labels), barred)[
                0
            ].item()
            for side in (1e-2, -1e-2)
        )
    assert (up - down) / 2e-2 == pytest.approx((heads.grad * step).sum().item(), rel=1e-3)


def test_ranks_count_a_tie_half(in_pieces):
    (queries, heads, bias), labels, barred = given()
    with torch.no_grad():
        queries[0], bias[:] = 0.0, 0.0
        loss, ranks = catalogue_loss(queries, heads, bias, one(labels), barred, ranks=True)
        logits = (queries @ heads.T).numpy()
    own = logits[np.arange(ROWS), labels].copy()
    logits[barred.rows, barred.items] = -np.inf
    logits[np.arange(ROWS), labels] = own
    ties = (logits == own[:, None]).sum(axis=1) - 1
    assert ranks.tolist() == (1 + (logits > own[:, None]).sum(axis=1) + ties / 2).tolist()
    assert ties[0] > 20
    assert loss.item() == pytest.approx(in_one_piece(queries, heads, bias, labels, barred).item(), rel=1e-5)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_under_autocast_small_gradients_are_there(kind):
    (leaves, labels, barred), (others, _, _) = given(), given()
    in_one_piece(*leaves, labels, barred).backward()
    with torch.autocast("cpu", dtype=kind):
        loss, _ = catalogue_loss(*others, one(labels), barred)
    loss.backward()
    for leaf, other in zip(leaves, others, strict=True):
        assert other.grad.dtype == torch.float32
        near = 1e-5 if kind == torch.float16 else 0.05 * leaf.grad.abs().max().item()
        assert other.grad.numpy() == pytest.approx(leaf.grad.numpy(), abs=near)


def test_ranks_are_those_of_unrounded_logits():
    (queries, heads, bias), labels, barred = given()
    with torch.no_grad():
        bias += 100 * (bias > 0)  # so large that bf16 would tie them
        exact = catalogue_loss(queries, heads, bias, one(labels), barred, ranks=True)[1]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = catalogue_loss(queries, heads, bias, one(labels), barred, ranks=True)[1]
    assert torch.equal(found, exact)


def test_no_label_is_no_loss():
    (queries, heads, bias), labels, _ = given()
    none = torch.zeros(0, dtype=torch.long)
    loss, ranks = catalogue_loss(queries[:0], heads, bias, one(labels[:0]), Barred(none, none), ranks=True)
    loss.backward()
    assert loss.item() == 0.0
    assert len(ranks) == 0
    assert (heads.grad == 0).all()


def test_items_are_drawn_as_often_as_is_said():
    counts = torch.tensor([0, 1, 1, 4, 9, 40, 100])
    odds = draw_odds(counts)
    assert odds[5] / odds[1] == pytest.approx(40**0.75)
    torch.manual_seed(0)
    times, chances = torch.zeros(len(counts)), torch.zeros(len(counts))
    for _ in range(4000):
        drawn, chance = draw_negatives(odds, 3)
        assert drawn.tolist() == sorted(set(drawn.tolist()))
        times[drawn] += 1
        chances[drawn] = chance
    assert (times / 4000).numpy() == pytest.approx(chances.numpy(), abs=0.03)
    assert times[0] == 0


def test_drawn_items_estimate_the_sum_over_all_without_bias():
    torch.manual_seed(0)
    queries, heads, bias = torch.randn(1, WIDTH), torch.randn(ITEMS, WIDTH), torch.randn(ITEMS)
    labels, none = torch.tensor([4]), torch.zeros(0, dtype=torch.long)
    odds = draw_odds(torch.arange(1, ITEMS + 1))

    def mass(offset):  # the sum under the softmax, from its loss
        loss, _ = catalogue_loss(queries, heads, bias, one(labels), Barred(none, none), offset=offset)
        return (loss + (queries @ heads.T)[0, 4] + bias[4]).exp().item()

    found = []
    for _ in range(3000):
        drawn, chance = draw_negatives(odds, 8)
        found.append(mass(torch.full((ITEMS,), -torch.inf).index_put((drawn,), -chance.log())))
    error = np.std(found) / np.sqrt(len(found))
    assert np.mean(found) == pytest.approx(mass(None), abs=4 * error)
    assert 0 < error < 0.03 * np.mean(found)


def test_several_targets_of_a_row_are_learnt_by_their_shares(in_pieces):
    (leaves, labels, barred), (others, _, _) = given(), given()
    items = torch.stack([labels, (labels - 3) % 13 + 4, labels], dim=1)  # the last one only fills the row
    shares = torch.stack([torch.rand(ROWS), torch.rand(ROWS), torch.zeros(ROWS)], dim=1)
    loss, ranks = catalogue_loss(*others, Targets(items, shares), barred, ranks=True)
    loss.backward()
    mask = torch.zeros(ROWS, ITEMS, dtype=torch.bool)
    mask[barred.rows, barred.items] = True
    mask.scatter_(1, items, False)
    logits = (leaves[0] @ leaves[1].T + leaves[2]).masked_fill(mask, -torch.inf)
    expected = -(shares * logits.log_softmax(1).gather(1, items)).sum()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for leaf, other in zip(leaves, others, strict=True):
        assert other.grad.numpy() == pytest.approx(leaf.grad.nan_to_num().numpy(), abs=1e-5)
    first = logits.gather(1, items[:, :1])
    assert ranks.tolist() == (1 + (logits > first).sum(1)).tolist()

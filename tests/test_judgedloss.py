"""The losses of judged pairs by hand: over rows, over pairs of one user's rows, and over all rows of one user."""

import pytest
import torch
from torch.nn import functional

from recllm.judgedloss import NOTHING, InsideUsers, judged_loss, listwise_loss, pairwise_loss
from recllm.sequence import IGNORED

LOGITS = torch.tensor([0.3, -1.0, 2.0, 0.5, -0.2, 1.1, 0.7])
LABELS = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0])
USERS = torch.tensor([4, 4, 4, 4, 7, 7, -1])  # the second has no disliked row, the last row no user


def test_without_weights_only_rows_count():
    assert not NOTHING
    expected = functional.binary_cross_entropy_with_logits(LOGITS, LABELS)
    assert judged_loss(LOGITS, LABELS, USERS, NOTHING, None).item() == pytest.approx(expected.item(), rel=1e-6)
    shared = judged_loss(LOGITS, LABELS, USERS, NOTHING, 14)
    assert shared.item() == pytest.approx(expected.item() / 2, rel=1e-6)


def test_pairs_are_of_a_liked_and_a_disliked_row_of_one_user():
    pairs = [(0, 1), (0, 3), (2, 1), (2, 3)]
    expected = sum(functional.softplus(LOGITS[low] - LOGITS[high]).item() for high, low in pairs) / len(pairs)
    assert pairwise_loss(LOGITS, LABELS, USERS).item() == pytest.approx(expected, rel=1e-6)


def test_a_list_is_all_rows_of_one_user_and_users_count_the_same():
    logits, labels = torch.cat([LOGITS, torch.tensor([0.9, -0.4])]), torch.cat([LABELS, torch.tensor([0.0, 1.0])])
    users = torch.cat([USERS, torch.tensor([9, 9])])
    first = -functional.log_softmax(LOGITS[:4], 0)[[0, 2]].mean()
    second = -functional.log_softmax(logits[7:9], 0)[1]
    assert listwise_loss(logits, labels, users).item() == pytest.approx((first + second).item() / 2, rel=1e-6)


@pytest.mark.parametrize("loss", [pairwise_loss, listwise_loss])
def test_a_row_that_does_not_count_is_in_no_pair_and_no_list(loss):
    more = torch.cat([LOGITS, torch.tensor([50.0])]), torch.cat([LABELS, torch.tensor([float(IGNORED)])])
    found = loss(*more, torch.cat([USERS, torch.tensor([4])]))
    assert found.item() == pytest.approx(loss(LOGITS, LABELS, USERS).item(), rel=1e-6)


@pytest.mark.parametrize("loss", [pairwise_loss, listwise_loss])
def test_users_with_one_label_teach_nothing_and_gradients_still_flow(loss):
    logits = LOGITS[4:].clone().requires_grad_()
    found = loss(logits, LABELS[4:], USERS[4:])
    found.backward()
    assert found.item() == 0.0
    assert torch.equal(logits.grad, torch.zeros(3))


@pytest.mark.parametrize(("weights", "loss"), [((2.0, 0.0), pairwise_loss), ((0.0, 2.0), listwise_loss)])
def test_weights_stand_beside_the_mean_of_the_rows(weights, loss):
    plain, more = (judged_loss(LOGITS, LABELS, USERS, own, None) for own in (NOTHING, InsideUsers(*weights)))
    assert InsideUsers(*weights)
    assert (more - plain).item() == pytest.approx(2.0 * loss(LOGITS, LABELS, USERS).item(), rel=1e-6)


@pytest.mark.parametrize("loss", [pairwise_loss, listwise_loss])
def test_gradients_raise_what_is_liked_and_lower_what_is_not(loss):
    logits = LOGITS.clone().requires_grad_()
    loss(logits, LABELS, USERS).backward()
    assert logits.grad[0] < 0  # the other liked row has more than its share of the list already
    assert (logits.grad[[1, 3]] > 0).all()
    assert torch.isfinite(logits.grad).all()


def test_rows_without_a_user_are_not_of_one():
    given = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0]), torch.tensor([-1, -1])
    assert pairwise_loss(*given).item() == listwise_loss(*given).item() == 0.0

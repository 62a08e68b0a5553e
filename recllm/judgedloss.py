"""The loss of judged pairs: cross-entropy over rows, and over what one user likes more and less."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from recllm.sequence import IGNORED


@dataclass(frozen=True)
class InsideUsers:
    """Weights of the losses inside users, beside cross-entropy. They compare rows of one user that stand together.

    Together: in a micro-batch, or in one sequence where rows are read behind one history.
    """

    pairwise: float = 0.0
    """Of the logistic loss over pairs of a liked and a disliked row."""
    listwise: float = 0.0
    """Of the softmax over all rows."""

    def __bool__(self) -> bool:
        """Whether there is anything to compare."""
        return self.pairwise > 0.0 or self.listwise > 0.0


NOTHING = InsideUsers()


def judged_loss(
    logits: Tensor, labels: Tensor, users: Tensor, inside: InsideUsers, number: Tensor | int | None
) -> Tensor:
    """Binary cross-entropy, and the losses inside users.

    Args:
        logits: float32[batch].
        labels: float32[batch], −100 where a row does not count.
        users: numbers of the rows' users, int64[batch], negative where nobody is known.
        inside: weights beside cross-entropy.
        number: the count of labels over all devices and accumulation steps, Trainer's own; None takes this batch's.
    """
    counts = labels != IGNORED
    total = functional.binary_cross_entropy_with_logits(logits[counts], labels[counts], reduction="sum")
    if inside.pairwise:
        total = total + inside.pairwise * counts.sum() * pairwise_loss(logits, labels, users)
    if inside.listwise:
        total = total + inside.listwise * counts.sum() * listwise_loss(logits, labels, users)
    return total / (counts.sum().clamp(min=1) if number is None else number)


def pairwise_loss(logits: Tensor, labels: Tensor, users: Tensor) -> Tensor:
    """Mean logistic loss over a user's pairs of a liked and a disliked row (Rendle et al. 2009, BPR); 0 without any."""
    pairs = _of_one_user(users) & (labels[:, None] == 1.0) & (labels[None, :] == 0.0)
    if not pairs.any():
        return logits.sum() * 0.0
    return functional.softplus(logits[None, :] - logits[:, None])[pairs].mean()


def listwise_loss(logits: Tensor, labels: Tensor, users: Tensor) -> Tensor:
    """Cross-entropy of a softmax over each user's rows with the even share of the liked ones; 0 without any.

    ListNet's top-one loss (Cao et al. 2007, "Learning to Rank: From Pairwise Approach to Listwise Approach"). Users who
    have both labels count the same each.
    """
    same = _of_one_user(users)
    liked = (labels == 1.0) & (same & (labels[None, :] == 0.0)).any(1)
    if not liked.any():
        return logits.sum() * 0.0
    rows = same & (labels != IGNORED)[None, :]
    others = logits[None, :].expand(len(logits), -1).masked_fill(~rows, -torch.inf)[liked]
    losses = others.logsumexp(1) - logits[liked]
    shares = 1.0 / (same & (labels == 1.0)[None, :]).sum(1)[liked]
    return (shares * losses).sum() / shares.sum()


def _of_one_user(users: Tensor) -> Tensor:
    """Which rows are of one known user: bool[batch, batch]."""
    return (users[:, None] == users[None, :]) & (users >= 0)[:, None]

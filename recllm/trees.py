"""Prompts that begin alike in one sequence: what they share is read once, and each goes on from where it leaves it.

Rows of one user have histories that go on from one another. The longest of them is a trunk; every row is a branch that
sees the trunk up to its own end and itself, by a mask, and has the positions that it would have alone. So a training
step reads a history of 40 films once for 20 rows, and each row is answered as by its whole prompt (tree attention: Miao
et al. 2023, "SpecInfer"; here with gradients).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from recllm.cascade import SAME, pretrained, tells_windows
from recllm.histories import padded
from recllm.sequence import IGNORED

PADDING = -1
FULL, SLIDING = "full_attention", "sliding_attention"
FILLING = 600
"""Ids of other branches in the tree that a model is tried on: more than the windows that families keep silent about."""


class Written(NamedTuple):
    """A row as token ids."""

    stem: list[int]
    """What a longer history goes on from."""
    branch: list[int]
    """The rest of the prompt, up to the answer."""
    label: float
    user: int
    """Number of the user, negative where nobody is known."""


@dataclass(frozen=True)
class Tree:
    """Rows in one sequence of `length` ids.

    Attributes:
        ids: token ids, int64[length].
        positions: of each id in its own prompt, int64[length].
        trunks: number of the trunk that it belongs to, int64[length].
        branches: number of its branch from 1 on, 0 in a trunk, int64[length].
        reach: how many ids of the trunk it sees, int64[length]; in a trunk, which sees what is before it, 0.
        ends: where each row's prompt ends, int64[rows].
    """

    ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    trunks: NDArray[np.int64]
    branches: NDArray[np.int64]
    reach: NDArray[np.int64]
    ends: NDArray[np.int64]


def tree_of(rows: Sequence[tuple[list[int], list[int]]]) -> Tree:
    """Pairs of stem and branch in one sequence; a stem that is the beginning of a longer one is not written again.

    Nor is a branch that a longer stem goes on with: where a history writes its items as the prompt asks about them, one
    pass over a history answers for each of its items.
    """
    trunks: list[tuple[list[int], list[int]]] = []
    for row in sorted(range(len(rows)), key=lambda row: -len(rows[row][0])):
        stem = rows[row][0]
        for trunk, own in trunks:
            if trunk[: len(stem)] == stem:
                own.append(row)
                break
        else:
            trunks.append((stem, [row]))
    columns: list[tuple[int, int, int, int, int]] = []
    ends = np.zeros(len(rows), dtype=np.int64)
    for number, (trunk, own) in enumerate(trunks):
        start = len(columns)
        columns += [(token, place, number, 0, 0) for place, token in enumerate(trunk)]
        for row in sorted(own):
            stem, branch = rows[row]
            whole = len(stem) + len(branch)
            if branch and trunk[len(stem) : whole] == branch:
                ends[row] = start + whole - 1
                continue
            columns += [(token, len(stem) + place, number, row + 1, len(stem)) for place, token in enumerate(branch)]
            ends[row] = len(columns) - 1
    ids, positions, numbers, branches, reach = np.array(columns, dtype=np.int64).reshape(-1, 5).T.copy()
    return Tree(ids, positions, numbers, branches, reach, ends)


def chains_of(rows: Sequence[tuple[list[int], list[int]]], most: int) -> Iterator[list[int]]:
    """Places of rows whose stems go on from one another, in parts of about `most` ids as `tree_of` writes them.

    A part may have as many ids behind its trunk as the trunk has, however long that is.
    """
    part: list[int] = []
    behind, trunk = 0, list[int]()
    # A stem stands right before those that go on from it.
    for place in sorted(range(len(rows)), key=lambda place: rows[place][0]):
        stem, branch = rows[place]
        whole = len(stem) + behind + len(branch)
        if part and (stem[: len(trunk)] != trunk or whole > max(most, 2 * len(stem))):
            yield part
            part, behind = [], 0
        part.append(place)
        behind, trunk = behind + len(branch), stem
    if part:
        yield part


def trees_together(trees: Sequence[Tree]) -> dict[str, Tensor]:
    """Padded tensors of some trees.

    Returns:
        `ids`, `positions`, `trunks`, `branches` and `reach`, int64[trees, length], and `ends`, int64[trees, rows].
    """
    fills = {"ids": 0, "positions": 0, "trunks": PADDING, "branches": PADDING, "reach": 0, "ends": 0}
    return {
        name: torch.from_numpy(padded([getattr(tree, name) for tree in trees], fill)) for name, fill in fills.items()
    }


@dataclass(frozen=True)
class TreeCollator:
    """Blocks of written rows to the tensors of their trees."""

    def __call__(self, blocks: Sequence[Sequence[Written]]) -> dict[str, Tensor]:
        """As `trees_together`, with `lengths` int64[trees], `users` int64[trees, rows], `labels` float32[trees, rows].

        What is no row has the label -100.
        """
        trees = [tree_of([row[:2] for row in block]) for block in blocks]
        labels = np.full((len(blocks), max(map(len, blocks))), IGNORED, dtype=np.float32)
        for place, block in enumerate(blocks):
            labels[place, : len(block)] = [row.label for row in block]
        return {
            **trees_together(trees),
            "lengths": torch.tensor([len(tree.ids) for tree in trees]),
            "users": torch.from_numpy(padded([[row.user for row in block] for block in blocks], PADDING)),
            "labels": torch.from_numpy(labels),
        }


def read_trees(
    body: nn.Module, *, ids: Tensor, positions: Tensor, trunks: Tensor, branches: Tensor, reach: Tensor
) -> Tensor:
    """Hidden states float[trees, length, width] of trees, whose tensors are as `trees_together` gives them."""
    step = torch.arange(ids.shape[1], device=ids.device)
    seen = (branches[:, None, :] == 0) & (positions[:, None, :] < reach[:, :, None])
    seen |= branches[:, None, :] == branches[:, :, None]
    seen &= (trunks[:, None, :] == trunks[:, :, None]) & (step <= step[:, None])
    masks = _masks(pretrained(body).config, seen[:, None], positions)
    found = body(input_ids=ids, attention_mask=masks, position_ids=positions, use_cache=False)
    return found.last_hidden_state  # type: ignore[no-any-return]


def _masks(config: Any, seen: Tensor, positions: Tensor) -> Any:  # noqa: ANN401
    """The mask as a family takes it: one, or one for each kind of its layers."""
    window = getattr(config, "sliding_window", None)
    near = seen if window is None else seen & (positions[:, None, :, None] - positions[:, None, None, :] < window)
    kinds = set(getattr(config, "layer_types", None) or ())
    if kinds == {FULL}:
        near = seen
    own = {FULL: seen, SLIDING: near} if kinds == {FULL, SLIDING} else {"": near}
    if config._attn_implementation == "eager":  # adds its mask
        low = torch.finfo(torch.float32).min
        own = {kind: torch.where(mask, 0.0, low) for kind, mask in own.items()}
    return own.get("", own)


@torch.inference_mode()
def reads_trees(body: nn.Module) -> bool:
    """Whether a causal model reads branches of a trunk as it reads the whole, tried on a small tree.

    Families differ in the masks that their attention takes; where it is another, the hidden states are. Between the
    trunk and the last branches stand so many others that a family which counts places in the sequence, and not
    positions, is found out.
    """
    if not tells_windows(body):
        return False
    device = next(body.parameters()).device
    tree = tree_of([([1, 2, 3, 4], [5, 6])] * (FILLING // 2) + [([1, 2, 3, 4], [5, 6]), ([1, 2], [7, 5])])
    was_training = body.training
    body.eval()
    try:
        with torch.autocast(device.type, enabled=False):  # where rounding hides less
            if not _heeds_its_window(body):
                return False
            given = {name: own.to(device) for name, own in trees_together([tree]).items()}
            ends = given.pop("ends")[0, -2:]
            found = read_trees(body, **given)[0, ends].float()
            whole = torch.tensor([[1, 2, 3, 4, 5, 6], [1, 2, 7, 5, 0, 0]], device=device)
            hidden = body(input_ids=whole, use_cache=False).last_hidden_state
            asked = hidden[[0, 1], [5, 3]].float()
    except Exception:  # whatever a family raises that cannot do it
        return False
    finally:
        body.train(was_training)
    return bool((found - asked).abs().max() <= SAME * asked.abs().max())


def _heeds_its_window(body: nn.Module) -> bool:
    """Whether a window that the configuration states for all layers is heeded: some families leave it lying there."""
    config = pretrained(body).config
    window = getattr(config, "sliding_window", None)
    if window is None or getattr(config, "layer_types", None):
        return True
    ids = torch.arange(1, 7, device=next(body.parameters()).device)[None]
    own = body(input_ids=ids, use_cache=False).last_hidden_state
    config.sliding_window = 1 if window > 1 else 2
    try:
        other = body(input_ids=ids, use_cache=False).last_hidden_state
    finally:
        config.sliding_window = window
    return not torch.equal(own, other)

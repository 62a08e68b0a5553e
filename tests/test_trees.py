"""Trees of prompts: every row is answered as by its whole prompt, in every family, with the same gradients."""

import pytest
import torch

from recllm import trees
from recllm.trees import TreeCollator, Written, read_trees, reads_trees, tree_of, trees_together

FAMILIES = ["Llama", "Qwen2", "Qwen3", "Mistral", "Gemma", "Gemma2", "Gemma3Text", "Phi3"]
LONG = list(range(1, 13))
ROWS = [
    (LONG[:5], [20, 21, 22]),
    (LONG, [23]),
    (LONG[:5], [24, 25]),
    ([9, 8, 7], [26, 27]),  # begins otherwise: a trunk of its own
    (LONG[:9], [28, 29, 30, 31]),
]


def alone(model, stem, branch):
    ids = torch.tensor([[*stem, *branch]])
    return model(input_ids=ids, use_cache=False).last_hidden_state[0, -1]


def together(model, *blocks):
    given = trees_together([tree_of(rows) for rows in blocks])
    ends = given.pop("ends")
    hidden = read_trees(model, **given)
    return [[hidden[place, end] for end in ends[place, : len(rows)]] for place, rows in enumerate(blocks)]


def test_a_tree_writes_each_id_once():
    tree = tree_of(ROWS)
    assert tree.ids.tolist() == [*LONG, 20, 21, 22, 23, 24, 25, 28, 29, 30, 31, 9, 8, 7, 26, 27]
    assert tree.positions.tolist() == [*range(12), 5, 6, 7, 12, 5, 6, 9, 10, 11, 12, 0, 1, 2, 3, 4]
    assert tree.ends.tolist() == [14, 15, 17, 26, 21]
    assert tree.trunks.tolist() == [0] * 22 + [1] * 5
    assert tree.reach[tree.branches == 5].tolist() == [9] * 4


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_branches_are_read_as_whole_prompts(family, tiny_family):
    model = tiny_family(family)
    assert reads_trees(model)
    blocks = [ROWS, ROWS[1:3], [ROWS[3]]]
    for rows, found in zip(blocks, together(model, *blocks), strict=True):
        for (stem, branch), hidden in zip(rows, found, strict=True):
            assert torch.allclose(hidden, alone(model, stem, branch), atol=1e-4)


@torch.inference_mode()
def test_what_a_longer_history_goes_on_with_answers_for_itself(tiny_family):
    rows = [*ROWS, (LONG[:5], LONG[5:8]), (LONG[:11], LONG[11:]), ([9], [8, 7]), (LONG[:5], [*LONG[5:7], 30])]
    tree = tree_of(rows)
    assert len(tree.ids) == len(tree_of(ROWS).ids) + 3  # the last one leaves the trunk
    assert tree.ends[5:8].tolist() == [7, 11, len(tree.ids) - 3]
    for family in ("Llama", "Mistral", "Gemma3Text"):
        model = tiny_family(family)
        (found,) = together(model, rows)
        for (stem, branch), hidden in zip(rows, found, strict=True):
            assert torch.allclose(hidden, alone(model, stem, branch), atol=1e-4)


@torch.inference_mode()
def test_attention_that_adds_its_mask_reads_them_too(tiny_family):
    model = tiny_family("Llama")
    model.config._attn_implementation = "eager"
    (found,) = together(model, ROWS)
    for (stem, branch), hidden in zip(ROWS, found, strict=True):
        assert torch.allclose(hidden, alone(model, stem, branch), atol=1e-4)


@pytest.mark.parametrize("family", ["Mistral", "Gemma2"])
@torch.inference_mode()
def test_a_window_ends_where_it_does_in_the_whole_prompt(family, tiny_family):
    model = tiny_family(family, sliding_window=4)
    (found,) = together(model, ROWS)
    for (stem, branch), hidden in zip(ROWS, found, strict=True):
        assert torch.allclose(hidden, alone(model, stem, branch), atol=1e-4)
    wide = tiny_family(family, sliding_window=64)
    (other,) = together(wide, ROWS)
    assert not torch.allclose(found[1], other[1], atol=1e-4)  # that window matters


def test_gradients_are_those_of_whole_prompts(tiny_family):
    model = tiny_family("Llama").train()

    def gradients(hidden):
        model.zero_grad()
        (torch.stack(hidden) @ torch.linspace(-1, 1, 32)).tanh().sum().backward()
        return [own.grad.clone() for own in model.parameters() if own.grad is not None]

    one = gradients([alone(model, *row) for row in ROWS])
    other = gradients(together(model, ROWS)[0])
    for first, second in zip(one, other, strict=True):
        assert torch.allclose(first, second, atol=1e-4 * float(first.abs().max()))


def test_a_batch_has_no_labels_where_there_are_no_rows():
    rows = [Written(stem, branch, float(place % 2), 7) for place, (stem, branch) in enumerate(ROWS)]
    batch = TreeCollator()([rows, rows[:2]])
    assert batch["labels"].tolist() == [[0, 1, 0, 1, 0], [0, 1, -100, -100, -100]]
    assert batch["users"].tolist() == [[7] * 5, [7, 7, -1, -1, -1]]
    assert batch["lengths"].tolist() == [27, 16]
    assert batch["ids"].shape == batch["reach"].shape == (2, 27)


def test_a_family_with_windows_of_its_own_is_found_out(tiny_family):
    """GPT-Neo's local layers count places in the sequence; GPT-NeoX has no windows, whatever its configuration says."""
    local = tiny_family("GPTNeo", attention_types=[[["global", "local", "local"], 1]], num_layers=3, window_size=16)
    assert not reads_trees(local)
    stray = tiny_family("GPTNeoX")
    assert reads_trees(stray)
    stray.config.sliding_window = 8
    assert not reads_trees(stray)
    assert stray.config.sliding_window == 8


def test_chains_are_what_one_trunk_holds():
    rows = [(LONG[:length], [20, 21]) for length in (9, 3, 12, 6)] + [([9, 8], [22]), ([9, 8, 7], [23])]
    assert list(trees.chains_of(rows, 100)) == [[1, 3, 0, 2], [4, 5]]
    assert all(tree_of([rows[place] for place in chain]).trunks.max() == 0 for chain in trees.chains_of(rows, 100))
    # A part may be twice its trunk: 5 ids, 2 and 2.
    assert list(trees.chains_of([(LONG[:5], [20, 21])] * 5, 8)) == [[0, 1], [2, 3], [4]]
    assert list(trees.chains_of([], 8)) == []


def test_a_model_that_reads_them_otherwise_is_found_out(tiny_family, monkeypatch):
    model = tiny_family("Llama")
    whole = trees._masks
    monkeypatch.setattr(trees, "_masks", lambda config, seen, positions: whole(config, seen, positions) | True)
    assert not reads_trees(model)
    monkeypatch.setattr(trees, "_masks", lambda *_: "no mask")
    assert not reads_trees(model)

"""Item vectors of a trained model: known items keep their own, new ones are told theirs."""

import numpy as np
import pytest
import torch

from recllm.collaborative import load_collaborative
from recllm.heads import borrowed_heads, item_heads, text_heads, told_later
from recllm.likeness import LikenessRidge
from recllm.runs import load_run
from recllm.tasks import prepare
from recllm.trained import load_light


@pytest.fixture
def trained(tiny_run):
    """Task, what is fitted, and the light model."""
    run = load_run(tiny_run)
    task = prepare(run)
    parts = load_collaborative(run, task)
    return task, parts, load_light(run, task, parts.features)[0]


def test_nobody_lends_and_all_have_their_own(trained):
    _, _, model = trained
    found, (own, bias) = borrowed_heads(model, None), item_heads(model)
    assert np.array_equal(found.items, own)
    assert np.array_equal(found.bias, bias)
    assert np.array_equal(found.new, text_heads(model))
    assert found.shrinkage == 1.0


def test_neighbours_lend_the_mean_of_their_own(trained):
    _, parts, model = trained
    found, (own, bias) = borrowed_heads(model, parts.neighbours), item_heads(model)
    whole = np.concatenate([own, bias[:, None]], axis=1)
    near = parts.neighbours.means(whole, np.arange(len(whole)))
    assert np.isfinite(near).any()
    assert np.allclose(found.new[np.isfinite(near)], near[np.isfinite(near)])
    assert found.shrinkage == 1.0  # a mean of heads is short by itself


def test_what_comes_later_is_told_as_what_is_there(trained):
    """Items that are like others as much as known ones are get what these would be told of by all others."""
    _, parts, model = trained
    found = borrowed_heads(model, parts.ridge)
    later = told_later(model, parts.ridge, found.shrinkage)
    assert later.shrinkage == found.shrinkage < 1
    alike = np.zeros((1, len(later.rows)))  # like nothing
    assert np.isnan(later.of(alike, lambda text, _: text)).all()
    alike[0, 0] = 1e-12  # like hardly anything: the mean of all
    told = later.of(
        alike, lambda text, factors: model.heads(torch.from_numpy(text), torch.from_numpy(factors)).detach()
    )
    middle = {part: torch.from_numpy(dual.middle[None]) for part, dual in later.parts.items()}
    with torch.inference_mode():
        heads = model.heads(middle["text"], middle["factors"]).numpy()
    assert np.allclose(told[:, :-1], found.shrinkage * heads, atol=1e-5)


def test_a_new_items_head_is_that_of_what_the_like_of_it_tell(trained):
    task, parts, model = trained
    ridge, rows, (own, bias) = parts.ridge, np.arange(len(task.index)), item_heads(model)
    text, factors = (ridge.means(values.numpy(), rows) for values in (model.text_vectors, model.item_factors))
    with torch.inference_mode():
        told = model.heads(torch.from_numpy(text), torch.from_numpy(factors)).numpy()
    known = ridge.known.copy()
    known[5] = False
    operator = ridge.operator.copy()
    operator[3] = np.nan  # it is like no other
    ridge = LikenessRidge(known, ridge.rows, operator, ridge.share, ridge.scale)
    found = borrowed_heads(model, ridge)
    heads, biases, new = found.items, found.bias, found.new
    others = rows != 3
    # As long as told heads are right: at known items they are on average as far along their own as those are long.
    along = (own * told)[known & others].sum() / (told[known & others] ** 2).sum()
    assert 0 < along < 1
    assert found.shrinkage == pytest.approx(along, abs=1e-5)
    assert np.allclose(new[others, :-1], along * told[others], atol=1e-5)
    assert np.allclose(new[others, -1:], ridge.means(bias[:, None], rows)[others], atol=1e-5)
    before = LikenessRidge(known, ridge.rows, operator, ridge.share, ridge.scale, shrunk=False)
    unshrunk = borrowed_heads(model, before)
    assert np.allclose(unshrunk.new[others, :-1], told[others], atol=1e-5)
    assert unshrunk.shrinkage == 1.0
    assert np.allclose(new[3], text_heads(model)[3])
    assert np.allclose(heads[5], new[5, :-1])
    assert np.allclose(heads[known], own[known])
    assert np.allclose(biases[known], bias[known])
    assert not np.allclose(heads[5], own[5], atol=1e-2)

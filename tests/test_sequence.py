"""Next-item models: they look back only, and cold items are no negatives."""

import numpy as np
import pytest
import torch

from recllm.askedat import PARTS
from recllm.examples import NextItemCollator
from recllm.histories import HistoryFormat
from recllm.ranking import ItemIndex
from recllm.sequence import IGNORED, Drift, ItemProjection, LightBlock, LightBody, NextItemModel, RelativePositions
from recllm.splits import leave_last_out
from recllm.vectors import ItemFeatures
from recllm.windows import Windows

ITEMS, POSITIONS = 24, 8


def light(
    warm=None,
    *,
    dropout=0.0,
    factor_dropout=0.0,
    width=16,
    text=None,
    factors=None,
    negatives=0,
    repeats=False,
    drift=0,
    learnt=0,
    relative=False,
    gated=False,
):
    """A light model over random item vectors."""
    random = np.random.default_rng(0)
    text = random.normal(size=(ITEMS, 6)).astype(np.float32) if text is None else text
    factors = random.normal(size=(ITEMS, 4)).astype(np.float32) if factors is None else factors
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        body = LightBody(width, 2, heads=2, positions=POSITIONS, dropout=dropout, relative=relative, gated=gated)
        return NextItemModel(
            body,
            ItemFeatures(ItemIndex(map(str, range(ITEMS))), text, factors),
            width=width,
            head_width=width,
            warm=np.ones(ITEMS, dtype=bool) if warm is None else warm,
            token_scale=1.0,
            factor_dropout=factor_dropout,
            negatives=negatives,
            repeats=repeats,
            drift=drift,
            learnt=learnt,
        )


def batch(*windows, history=None):
    history = history or HistoryFormat((), (), POSITIONS, 1)
    return NextItemCollator(history)([np.array(window) for window in windows])


def query_vectors(model, rows):
    ids = torch.tensor([rows])
    with torch.inference_mode():
        return model.eval().encode(ids, torch.arange(len(rows))[None], model.table())[0].numpy()


def far_and_near(model):
    """The same model, after it has learnt that distances count."""
    with torch.no_grad():
        for block in model.body.blocks:
            block.relative.bias.weight.normal_(generator=torch.Generator().manual_seed(0))
    return model


def test_every_distance_has_a_bias_and_what_comes_later_is_not_seen():
    positions = RelativePositions(3, 2)
    with torch.no_grad():
        positions.bias.weight.copy_(torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]]))
    later = -np.inf
    first = [[1, later, later], [2, 1, later], [3, 2, 1]]
    second = [[10, later, later], [20, 10, later], [30, 20, 10]]
    assert positions(3).tolist() == [first, second]
    assert positions(2).tolist() == [[row[:2] for row in head[:2]] for head in (first, second)]


def test_distances_make_no_difference_until_that_is_learnt():
    plain, near = light(), light(relative=True)
    near.load_state_dict(plain.state_dict(), strict=False)
    history = [3, 1, 4, 1]
    assert query_vectors(near, history) == pytest.approx(query_vectors(plain, history), abs=1e-5)
    near.train()(**batch(history))["loss"].backward()
    learnt = near.body.blocks[0].relative.bias.weight.grad.abs().sum(dim=1)
    assert (learnt[:3] > 0).all()
    assert (learnt[3:] == 0).all()  # the window is no longer
    assert np.abs(query_vectors(far_and_near(near), history) - query_vectors(plain, history)).max() > 1e-3


READERS = {
    "plain": light(),
    "distances": far_and_near(light(relative=True)),
    "gated": light(gated=True),
    "both": far_and_near(light(relative=True, gated=True)),
}
"""Light models of every kind."""


@pytest.mark.parametrize("model", READERS.values(), ids=READERS)
def test_a_later_item_does_not_change_an_earlier_position(model):
    one, other = query_vectors(model, [3, 1, 4, 1]), query_vectors(model, [3, 1, 20, 21])
    assert other[:2] == pytest.approx(one[:2], abs=1e-6)
    assert np.abs(other[2:] - one[2:]).max() > 1e-3


def test_a_gate_takes_away_and_adds_what_attention_has_mixed():
    """By hand: what is mixed over one place is that place's own value."""
    block = LightBlock(4, heads=2, dropout=0.0, gated=True).eval()
    hidden = torch.randn(1, 1, 4, generator=torch.Generator().manual_seed(0))
    normed = block.norm_in(hidden)
    value = block.qkv(normed)[..., 8:]
    gate = block.gate(normed)
    mixed = block.out(block.norm_mixed(value) * gate * torch.sigmoid(gate))
    after = hidden + mixed
    expected = after + block.down(torch.nn.functional.gelu(block.up(block.norm_mid(after))))
    assert torch.allclose(block(hidden), expected, atol=1e-6)
    with torch.no_grad():
        block.gate.weight.zero_()
        block.gate.bias.fill_(-100.0)  # shut
        block.out.bias.zero_()
        block.down.weight.zero_()
        block.down.bias.zero_()
    assert torch.allclose(block(hidden), hidden, atol=1e-6)


@pytest.mark.parametrize("model", READERS.values(), ids=READERS)
def test_right_padding_is_harmless(model):
    model.eval()
    short, long = [3, 1, 4], [3, 1, 4, 1, 5, 9, 2]
    alone, together = batch(short), batch(short, long)
    with torch.inference_mode():
        table = model.table()
        expected = model.encode(alone["ids"], alone["ends"], table)[0]
        found = model.encode(together["ids"], together["ends"], table)[0, : len(expected)]
        losses = [model(**batch(window))["loss"].item() for window in (short, long)]
        joint = model(**together)["loss"].item()
    assert found.numpy() == pytest.approx(expected.numpy(), abs=1e-5)
    labels = [len(short) - 1, len(long) - 1]
    assert joint == pytest.approx(np.average(losses, weights=labels), rel=1e-5)


@pytest.mark.parametrize("repeats", [False, True])
def test_the_loss_is_the_mean_cross_entropy_over_warm_items_that_may_come_next(repeats):
    warm = np.arange(ITEMS) % 3 != 0
    model, window = light(warm, repeats=repeats).eval(), [1, 2, 4, 2]
    queries = query_vectors(model, window[:-1])
    with torch.inference_mode():
        heads = model.heads(model.text_vectors, model.item_factors).numpy()
        loss = model(**batch(window))["loss"].item()
    logits = queries @ heads.T
    logits[:, ~warm] = -np.inf
    if not repeats:
        logits[0, 1] = logits[1, [1, 2]] = -np.inf
        logits[2, [1, 4]] = -np.inf  # 2 was seen, but it is what comes next
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    expected = -np.log(odds[np.arange(3), window[1:]] / odds.sum(axis=1)).mean()
    assert loss == pytest.approx(expected, rel=1e-5)


def test_drift_lies_on_straight_lines_between_the_ends_of_stretches():
    drift = Drift(4, 2)
    with torch.no_grad():
        drift.ends.copy_(torch.arange(10.0).view(5, 2) ** 2)
    asked = torch.tensor([[0, PARTS // 4, PARTS // 8, PARTS - PARTS // 16, PARTS]])
    ends = drift.ends
    expected = torch.stack([ends[0], ends[1], (ends[0] + ends[1]) / 2, 0.25 * ends[3] + 0.75 * ends[4], ends[4]])
    assert torch.allclose(drift(asked), expected[None])
    assert torch.equal(drift(None), ends[4])


@pytest.mark.parametrize("negatives", [0, ITEMS - 1])
def test_when_it_is_asked_changes_queries_once_that_is_learnt(negatives):
    model = light(drift=4, negatives=negatives)
    inputs = batch(np.stack([[3, 1, 4, 1], [0, PARTS // 2, PARTS // 2, PARTS]], axis=1))
    assert inputs["asked"].tolist() == [[PARTS // 2, PARTS // 2, PARTS]]  # when what follows was chosen
    assert inputs["ids"].tolist() == [[3, 1, 4]]
    assert inputs["labels"].tolist() == [[1, 4, 1]]
    without = {key: value for key, value in inputs.items() if key != "asked"}
    torch.manual_seed(0)
    start = model.train()(**inputs)["loss"]
    torch.manual_seed(0)
    assert torch.equal(start, model(**without)["loss"])  # it starts where time makes no difference
    start.backward()
    learnt = model.drift.ends.grad.abs().sum(1) > 0
    assert learnt.tolist() == [False, False, True, False, True]
    with torch.no_grad():
        model.drift.ends[2] += 1.0
    torch.manual_seed(0)
    changed = model(**inputs)["loss"]
    torch.manual_seed(0)
    assert not torch.equal(changed, model(**without)["loss"])  # without times all are asked now


def test_the_loss_is_divided_by_trainers_own_count():
    model = light().eval()
    given = batch([1, 2, 3, 4])
    assert model(**given, num_items_in_batch=30)["loss"].item() == pytest.approx(model(**given)["loss"].item() / 10)


def test_a_cold_item_is_no_negative():
    warm = np.ones(ITEMS, dtype=bool)
    warm[[7, 11]] = False
    vectors = np.random.default_rng(0).normal(size=(ITEMS, 6)).astype(np.float32)
    moved = vectors.copy()
    moved[[7, 11]] *= -30.0
    losses, gradients = [], []
    for text in (vectors, moved):
        model = light(warm, text=text)
        loss = model(**batch([1, 2, 3, 4, 5]))["loss"]
        loss.backward()
        losses.append(loss.item())
        gradients.append(model.heads.text.weight.grad.clone())
        assert model.bias.grad[[7, 11]].tolist() == [0.0, 0.0]
        others = warm & (np.arange(ITEMS) != 1)  # the first of the window is seen at every place
        assert (model.bias.grad[others] != 0).all()
    assert losses[0] == losses[1]
    assert torch.equal(gradients[0], gradients[1])


def test_ranks_of_the_last_labels_while_validating():
    model = light().eval()
    with torch.no_grad():
        model.bias[:] = torch.linspace(50, -50, ITEMS)  # item 0 first, item 23 last, whatever the history says
    given = batch([5, 6, 2], [9, 0], [1, 2, 3, 23])
    # Seen items are not ranked: 1, 2 and 3 before 23, and only 1 before 4 in the end.
    assert model(**given)["ranks"].tolist() == [3.0, 1.0, 21.0]
    given["labels"][2] = torch.tensor([4, IGNORED, IGNORED])  # the label that is there, not the last place
    assert model(**given)["ranks"].tolist() == [3.0, 1.0, 4.0]
    assert "ranks" not in model.train()(**given)


def test_missing_parts_of_an_item_are_not_missing_numbers():
    projection = ItemProjection(6, 4, 16, scale=0.5)
    text, factors = torch.randn(4, 6), torch.randn(4, 4)
    text[1:3], factors[2:] = torch.nan, torch.nan
    found = projection(text, factors)
    assert torch.isfinite(found).all()
    assert found.square().mean(1).sqrt().detach().numpy() == pytest.approx([0.5] * 4, rel=1e-3)
    found.sum().backward()
    assert all(torch.isfinite(value.grad).all() for value in projection.parameters())


def test_a_learnt_vector_tells_items_apart_that_are_alike_and_one_without_events_has_none():
    vectors = np.ones((ITEMS, 6), dtype=np.float32)
    factors = np.ones((ITEMS, 4), dtype=np.float32)
    factors[[7, 11]] = np.nan
    warm = ~np.isnan(factors[:, 0])
    model = light(warm, text=vectors, factors=factors, learnt=3)
    assert torch.isnan(model.factors()[[7, 11]]).all()
    assert torch.equal(model.factors()[:3], torch.cat([torch.ones(3, 4), model.learnt[:3]], dim=1))
    for made in (model.heads(model.text_vectors, model.factors()), model.table()):
        assert torch.equal(made[7], made[11])
        others = made[torch.from_numpy(warm)]
        assert len(torch.unique(others, dim=0)) == len(others)
    model(**batch([1, 2, 7, 3]))["loss"].backward()
    assert model.learnt.grad[[7, 11]].count_nonzero() == 0
    assert (model.learnt.grad[torch.from_numpy(warm)] != 0).any(1).all()
    assert light(text=vectors).learnt is None


def test_a_learnt_vector_goes_with_the_factors_that_are_dropped():
    vectors = np.ones((ITEMS, 6), dtype=np.float32)
    model = light(text=vectors, learnt=3, factor_dropout=1.0).train()
    model(**batch([1, 2, 3]))["loss"].backward()
    assert not model.learnt.grad.any()


def test_factors_are_dropped_in_training_only():
    model = light(factor_dropout=0.5)
    given = batch([1, 2, 3])
    torch.manual_seed(1)
    drawn = {model(**given)["loss"].item() for _ in range(4)}
    assert len(drawn) == 4
    model.eval()
    assert model(**given)["loss"].item() == model(**given)["loss"].item()


def test_the_item_vectors_are_not_in_the_state_that_is_saved():
    assert not {"text_vectors", "item_factors", "warm"} & set(light().state_dict())


@pytest.mark.parametrize("learnt", [0, 3])
def test_drawn_negatives_give_the_whole_loss_where_all_are_drawn(learnt, monkeypatch):
    warm = np.ones(ITEMS, dtype=bool)
    warm[[7, 11]] = False
    factors = np.random.default_rng(1).normal(size=(ITEMS, 4)).astype(np.float32)
    factors[[7, 11, 13]] = np.nan
    whole, drawn = (light(warm, factors=factors, negatives=negatives, learnt=learnt) for negatives in (0, 21))
    given = batch([1, 2, 3, 4, 2], [7, 9, 12], [13, 20, 0, 5])
    chance = torch.ones(int(warm.sum()))
    monkeypatch.setattr("recllm.sequence.draw_negatives", lambda *_: (torch.from_numpy(np.flatnonzero(warm)), chance))
    losses = [model.train()(**given)["loss"] for model in (whole, drawn)]
    for loss in losses:
        loss.backward()
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-6)
    for (name, left), (_, right) in zip(whole.named_parameters(), drawn.named_parameters(), strict=True):
        assert right.grad.numpy() == pytest.approx(left.grad.numpy(), abs=1e-6), name
    assert drawn.eval()(**given)["ranks"].tolist() == whole.eval()(**given)["ranks"].tolist()


def test_only_drawn_and_shown_items_are_projected(monkeypatch):
    model, drawn = light(negatives=3).train(), torch.tensor([7, 9])
    monkeypatch.setattr("recllm.sequence.draw_negatives", lambda *_: (drawn, torch.tensor([0.2, 0.5])))
    seen = []
    model.heads.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    model(**batch([1, 2, 3]))["loss"].backward()
    assert set(torch.nonzero(model.bias.grad)[:, 0].tolist()) == {2, 3, 7, 9}
    assert seen == [5]  # and item 1, which is only read
    assert light(negatives=ITEMS).negatives == 0  # all of them: nothing to draw


@pytest.mark.parametrize("negatives", [0, 6])
def test_the_light_model_learns_what_comes_next(checkerboard, negatives):
    split = leave_last_out(checkerboard.interactions)
    index = ItemIndex(checkerboard.catalog.ids)
    sequences = [index.rows(query.history) for query in split.train.histories().values()]
    model = light(width=32, negatives=negatives)
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for number in range(15):
        windows = list(Windows(sequences, POSITIONS, epochs=15, seed=0).epoch(number))
        for start in range(0, len(windows), 10):
            optimizer.zero_grad()
            model(**batch(*windows[start : start + 10]))["loss"].backward()
            optimizer.step()
    history = HistoryFormat((), (), POSITIONS, 1)
    valid = [
        [*history.window(index.rows(example.query.history)), index.rows([example.item_id])[0]]
        for example in split.valid
    ]
    ranks = model.eval()(**NextItemCollator(history, last_only=True)([np.array(row) for row in valid]))["ranks"]
    assert (ranks == 1).float().mean() >= 0.95


def test_what_is_rarely_drawn_stands_for_many(monkeypatch):
    model, losses = light(negatives=3).train(), []
    for chance in (1.0, 0.01):
        drawn = torch.tensor([7, 9]), torch.full((2,), chance)
        monkeypatch.setattr("recllm.sequence.draw_negatives", lambda *_, drawn=drawn: drawn)
        losses.append(model(**batch([1, 2, 3]))["loss"].item())
    assert losses[1] > losses[0] + 1.0


def test_factors_that_are_dropped_are_gone_from_the_history_too():
    factors = np.random.default_rng(3).normal(size=(ITEMS, 4)).astype(np.float32)
    models = [light(factor_dropout=1.0, factors=own).train() for own in (factors, 5 * factors)]
    one, other = (model(**batch([1, 2, 3]))["loss"].item() for model in models)
    assert one == pytest.approx(other)

"""Ranking graphs: ONNX Runtime answers as torch does, for every number of users, candidates and tokens."""

import numpy as np
import onnx
import pytest
import torch

from recllm.data import Query
from recllm.errors import RecllmError
from recllm.lm import load_base
from recllm.onnxreader import PREFIX, SUFFIX, OnnxReader
from recllm.pointwise import PointwiseScorer
from recllm.prompts import compile_prompt, load_prompt
from recllm.rankgraphs import write_rank_graphs
from recllm.ranking import ItemIndex, score_pairs
from recllm.relevance import AnswerDifference, RelevanceModel, RelevanceScorer, TorchReader, answer_output


class OfFamily(torch.nn.Module):
    """A relevance model over the bare body of a family."""

    answer = RelevanceModel.answer

    def __init__(self, body):
        super().__init__()
        self.body, self.causal, self.max_tokens = body, True, 128
        output = torch.nn.Linear(body.config.hidden_size, body.config.vocab_size, bias=False)
        self.difference = AnswerDifference(output, (3, 4))


KINDS = {"Llama": {}, "Gemma3Text": {"layer_types": ["sliding_attention", "full_attention"] * 2}}


@pytest.mark.parametrize("family", list(KINDS))
def test_graphs_answer_as_torch(family, tiny_family, tmp_path):
    model = OfFamily(tiny_family(family, num_hidden_layers=4, **KINDS[family])).eval()
    write_rank_graphs(model, tmp_path, 23)
    for name in (PREFIX, SUFFIX):  # each kind of layer was traced once
        assert any(own.name.startswith("layers.2.") for own in onnx.load(tmp_path / name).graph.initializer)
    graphs, reader = OnnxReader.open(tmp_path, 128), TorchReader(model)
    rng = np.random.default_rng(0)
    for users, candidates, length, reach in [(1, 1, 1, 1), (3, 4, 6, 12), (2, 7, 3, 30)]:
        ids = rng.integers(1, 64, (users, reach))
        lengths = np.sort(rng.integers(1, reach + 1, users))
        suffixes, ends = (
            rng.integers(1, 64, (users, candidates, length)),
            rng.integers(1, length + 1, (users, candidates)),
        )
        with torch.inference_mode():
            expected = reader.answers(reader.read(ids, lengths), suffixes, ends)
        read = graphs.read(ids, lengths)
        assert graphs.answers(read, suffixes, ends) == pytest.approx(expected, abs=1e-4)
        apart = [graphs.take(read, row)[0] for row in range(users)]
        assert apart[0].keys.shape[3] == lengths[0]
        assert graphs.answers(graphs.join(apart), suffixes, ends) == pytest.approx(expected, abs=1e-4)


QUERIES = [Query(("2", "4", "6")), Query(("1",)), Query(tuple(map(str, range(20)))), Query(("x", "8"))]


def relevance_model_of(folder, prompt):
    base = load_base(folder)
    return RelevanceModel(base, base.model, answer_output(base), prompt.answer_ids).eval()


@pytest.fixture(scope="module")
def scorers(tiny_lm_folder, tiny_tokenizer, checkerboard, tmp_path_factory):
    """The relevance scorer in torch and in ONNX Runtime."""
    prompt = compile_prompt(load_prompt("relevance"), tiny_tokenizer)
    model = relevance_model_of(tiny_lm_folder, prompt)
    folder = tmp_path_factory.mktemp("graphs")
    write_rank_graphs(model, folder, 23)
    reader = OnnxReader.open(folder, model.max_tokens)
    catalog = checkerboard.catalog
    return RelevanceScorer(model, prompt, catalog), PointwiseScorer(reader, prompt, catalog, keep_bytes=1 << 20)


def test_a_scorer_of_graphs_equals_the_one_of_torch(scorers, checkerboard):
    torch_scorer, onnx_scorer = scorers
    index = ItemIndex(checkerboard.catalog.ids)
    for _ in range(2):  # the second time from kept prefixes
        assert onnx_scorer.score(QUERIES, index) == pytest.approx(torch_scorer.score(QUERIES, index), abs=1e-4)
    assert len(onnx_scorer.kept) == len(QUERIES) + 1  # and the empty history, which calibrates


def test_whole_prompts_are_a_prefix_and_its_last_token(scorers, checkerboard):
    torch_scorer, onnx_scorer = scorers
    items = checkerboard.catalog.ids[: len(QUERIES)]
    expected = score_pairs(torch_scorer, QUERIES, items)
    assert score_pairs(onnx_scorer, QUERIES, items) == pytest.approx(expected, abs=1e-4)


def test_what_cannot_share_a_prefix_is_not_exported(tiny_encoder_folder, tiny_word_tokenizer, tmp_path):
    prompt = compile_prompt(load_prompt("relevance"), tiny_word_tokenizer)
    with pytest.raises(RecllmError, match=r"Only causal models .* are exported for ranking"):
        write_rank_graphs(relevance_model_of(tiny_encoder_folder, prompt), tmp_path, 23)
    assert not list(tmp_path.iterdir())

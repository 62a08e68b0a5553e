"""One contender of the speed benchmark in a process of its own: `contenders.py NAME FOLDER MODEL VOCABULARY`.

It reads one line of JSON per round from standard input, does that work once, and answers with one line: the seconds it
took and the scores. Between rounds it waits for the next line, so that contenders can take turns.
"""

import copy
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float32]
Rank = Callable[[list[int], list[list[int]]], Scores]
"""(history, candidates), both token ids, to float32[candidates]."""
BATCH = 16
"""Full prompts that are read together; more are no faster on two cores."""
KEPT_BYTES = 1 << 30
THREADS = int(os.environ.get("OMP_NUM_THREADS", "0"))
"""As torch's."""


def work(round_: Mapping[str, int], vocabulary: int) -> tuple[list[int], list[list[int]]]:
    """A history and candidates of random tokens; the same for the same seed."""
    rng = np.random.default_rng(round_["seed"])
    history = rng.integers(100, vocabulary, round_["history"]).tolist()
    return history, rng.integers(100, vocabulary, (round_["candidates"], round_["tokens"])).tolist()


def torch_model(model_name: str) -> Any:  # noqa: ANN401  imported late, so that ONNX's contenders do without torch
    """The relevance model of a causal language model, with two made-up answer words."""
    from recllm.lm import load_base, model_folder, scoring_device
    from recllm.relevance import RelevanceModel, answer_output

    base = load_base(model_folder(model_name))
    return RelevanceModel(base, base.model, answer_output(base), (1, 2)).eval().to(scoring_device())


def naive_torch(folder: Path, model_name: str) -> Rank:
    """A full prompt per candidate; answer rows only, at the last position only."""
    import torch

    model = torch_model(model_name)
    device = next(model.parameters()).device

    @torch.inference_mode()
    def rank(history: list[int], candidates: list[list[int]]) -> Scores:
        answers = []
        for start in range(0, len(candidates), BATCH):
            ids = torch.tensor([history + own for own in candidates[start : start + BATCH]], device=device)
            answers.append(model.logits(ids, torch.full((len(ids),), ids.shape[1], device=device)))
        return torch.cat(answers).float().cpu().numpy()

    return rank


def expanded_torch(folder: Path, model_name: str) -> Rank:
    """The history is read once and its keys and values are copied for every candidate."""
    import torch

    model = torch_model(model_name)
    device = next(model.parameters()).device

    @torch.inference_mode()
    def rank(history: list[int], candidates: list[list[int]]) -> Scores:
        cache = model.body(input_ids=torch.tensor([history], device=device), use_cache=True).past_key_values
        answers = []
        for start in range(0, len(candidates), BATCH):
            ids = torch.tensor(candidates[start : start + BATCH], device=device)
            own = copy.deepcopy(cache)  # the model appends to the cache that it is given
            own.batch_repeat_interleave(len(ids))
            hidden = model.body(input_ids=ids, past_key_values=own, use_cache=True).last_hidden_state
            answers.append(model.answer(hidden[:, -1]))
        return torch.cat(answers).float().cpu().numpy()

    return rank


def tree_torch(folder: Path, model_name: str) -> Rank:
    """History and all candidates in one sequence, with a mask that keeps candidates apart."""
    import torch

    model = torch_model(model_name)
    device = next(model.parameters()).device

    @torch.inference_mode()
    def rank(history: list[int], candidates: list[list[int]]) -> Scores:
        reach, count, length = len(history), len(candidates), len(candidates[0])
        total = reach + count * length
        owner = torch.cat([torch.full((reach,), -1), torch.arange(count).repeat_interleave(length)]).to(device)
        step = torch.arange(total, device=device)
        sees = (step <= step[:, None]) & ((owner == owner[:, None]) | (owner == -1))
        mask = torch.zeros(total, total, device=device).masked_fill(~sees, torch.finfo(torch.float32).min)
        places = torch.cat([torch.arange(reach), (reach + torch.arange(length)).repeat(count)]).to(device)
        ids = torch.tensor([history + [token for own in candidates for token in own]], device=device)
        hidden = model.body(
            input_ids=ids, position_ids=places[None], attention_mask=mask[None, None], use_cache=False
        ).last_hidden_state
        answers = model.answer(hidden[0, reach + length - 1 :: length])
        return np.asarray(answers.float().cpu().numpy())

    return rank


def recllm_torch(folder: Path, model_name: str, *, bf16: bool = False, keep: bool = False) -> Rank:
    """The relevance scorer of recllm in torch."""
    from recllm.relevance import RelevanceScorer

    scorer = RelevanceScorer(torch_model(model_name), None, None, bf16=bf16, keep_bytes=KEPT_BYTES if keep else 0)  # type: ignore[arg-type]
    return lambda history, candidates: scorer.answers([history], candidates)[0]


def naive_onnx(folder: Path, model_name: str) -> Rank:
    """A full prompt per candidate by one graph; answer rows only, at the last position only."""
    from recllm.sessions import open_session

    session = open_session(folder / "whole.onnx", threads=THREADS)

    def rank(history: list[int], candidates: list[list[int]]) -> Scores:
        answers = []
        for start in range(0, len(candidates), BATCH):
            ids = np.array([history + own for own in candidates[start : start + BATCH]], dtype=np.int64)
            lengths = np.full(len(ids), ids.shape[1], dtype=np.int64)
            answers.append(session.run(None, {"ids": ids, "lengths": lengths})[0])
        return np.concatenate(answers)

    return rank


def recllm_onnx(folder: Path, model_name: str, *, recipe: str = "fp32", keep: bool = False) -> Rank:
    """The relevance scorer of recllm by ONNX Runtime."""
    from recllm.onnxreader import OnnxReader
    from recllm.pointwise import PointwiseScorer

    reader = OnnxReader.open(folder / recipe, 1 << 20, threads=THREADS)
    scorer = PointwiseScorer(reader, None, None, keep_bytes=KEPT_BYTES if keep else 0)  # type: ignore[arg-type]
    return lambda history, candidates: scorer.answers([history], candidates)[0]


CONTENDERS: dict[str, Callable[[Path, str], Rank]] = {
    "torch fp32 naive": naive_torch,
    "torch fp32 prefix expanded": expanded_torch,
    "torch fp32 tree mask": tree_torch,
    "torch fp32 recllm": recllm_torch,
    "torch fp32 recllm kept": lambda folder, name: recllm_torch(folder, name, keep=True),
    "torch bf16 recllm": lambda folder, name: recllm_torch(folder, name, bf16=True),
    "torch bf16 recllm kept": lambda folder, name: recllm_torch(folder, name, bf16=True, keep=True),
    "onnx fp32 naive": naive_onnx,
    "onnx fp32 recllm": recllm_onnx,
    "onnx fp32 recllm kept": lambda folder, name: recllm_onnx(folder, name, keep=True),
    "onnx int8 recllm": lambda folder, name: recllm_onnx(folder, name, recipe="int8"),
    "onnx w8a8 recllm": lambda folder, name: recllm_onnx(folder, name, recipe="w8a8"),
}


def main() -> None:
    """Answer rounds until the input ends."""
    name, folder, model_name, vocabulary = sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    rank = CONTENDERS[name](folder, model_name)
    print("ready", flush=True)
    for line in sys.stdin:
        round_ = json.loads(line)
        history, candidates = work(round_, vocabulary)
        # A share of the candidates, where every candidate costs the same and the rest is told by that.
        chosen = candidates[round_.get("first", 0) :: round_.get("step", 1)]
        if name.endswith("kept"):
            rank(history, chosen[:1])  # the user has been here before
        start = time.perf_counter()
        scores = rank(history, chosen)
        print(json.dumps({"seconds": time.perf_counter() - start, "scores": scores.tolist()}), flush=True)


if __name__ == "__main__":
    main()

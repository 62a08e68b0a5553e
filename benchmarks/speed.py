"""Seconds of what a user waits for, as ratios inside one run: `recllm bench speed -- [--quick]`.

Ranks candidates after one history with every contender in a process of its own, in turns: full prompts, copied
prefixes, one sequence with a tree mask, recllm in torch and in ONNX Runtime. Shows how cost grows with candidates and,
for whole catalogues, with items and users, what int8 and length order give the encoder, and how long `recllm --help`
takes. Ends with one line of JSON that has the bars.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import catalogues
import numpy as np
import torch
from contenders import CONTENDERS, torch_model, work
from numpy.typing import NDArray
from torch import Tensor, nn

from recllm.export import EncoderGraph
from recllm.gate import load_recipe
from recllm.graphfiles import share_weights
from recllm.integer import quantise_products
from recllm.lm import load_base, load_config, model_folder
from recllm.onnxreader import PREFIX, SUFFIX, WEIGHTS
from recllm.quantise import quantise
from recllm.rankgraphs import write_rank_graphs
from recllm.relevance import RelevanceModel
from recllm.sessions import open_session
from recllm.textvectors import encode_ids
from recllm.tracing import write_graph
from recllm.turning import turned

OPSET = 23
HISTORY, CANDIDATES, TOKENS = 300, 100, 12
SHARE = 10
"""A quick run times full prompts on every tenth candidate of a round, in turns; each costs the same."""
UNASKED, EVERY = ("torch fp32 prefix expanded", "torch fp32 tree mask"), 2
"""Contenders whose time no bar asks for; a quick run has them in every second round."""
GROWTH = (10, 32, 100, 316, 1000)
GROWN = 2000
"""Candidates that one number of them is timed on at most: long lists average by themselves."""
FLAT = 1.05
"""What counts as flat on a machine that others use too."""
CATALOGUES = (1000, 10_000, 100_000, 1_000_000)
SEARCHED_WIDTH = 129
"""Of the light scorer alone: ten million items of all scorers are more than memory holds."""
ENCODER = "minilm-l6"
Bar = dict[str, Any]


class WholeGraph(nn.Module):
    """Full prompts to answers: what recllm's graphs are compared with in ONNX Runtime."""

    def __init__(self, model: RelevanceModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Answers float32[batch] of int64[batch, length]."""
        steps = torch.arange(ids.shape[1]).expand(ids.shape[0], -1)
        mask = torch.ones_like(ids)
        hidden = self.model.body(input_ids=ids, attention_mask=mask, position_ids=steps, use_cache=False)
        at = (lengths - 1)[:, None, None].expand(-1, 1, hidden.last_hidden_state.shape[-1])
        return self.model.answer(torch.gather(hidden.last_hidden_state, 1, at)[:, 0])


def write_graphs(folder: Path, model_name: str, vocabulary: int) -> None:
    """The graphs of the contenders, and the encoder's."""
    model = torch_model(model_name).cpu()
    for name in ("fp32", "int8", "turned", "w8a8"):
        (folder / name).mkdir()
    write_rank_graphs(model, folder / "fp32", OPSET)
    write_rank_graphs(turned(model) or model, folder / "turned", OPSET)
    whole = {
        "ids": (torch.ones(2, 7, dtype=torch.long), ("batch", "length")),
        "lengths": (torch.tensor([7, 3]), ("batch",)),
    }
    write_graph(WholeGraph(model), whole, folder / "whole.onnx", ("answers",), OPSET)
    recipe = load_recipe("int8")
    for path in (folder / "fp32").glob("*.onnx"):
        quantise(path, folder / "int8" / path.name, recipe.precision, recipe.causal)
    # As a model tuned on ml-100k bears it: all layers as integer products, answers rounded twice in two thirds.
    graphs, lost = [folder / "turned" / name for name in (PREFIX, SUFFIX)], iter((1.0, 1.0, 0.0))
    given = samples(folder / "turned", vocabulary)
    quantise_products(graphs, folder / "w8a8", load_recipe("w8a8").causal, given, lambda _: next(lost))
    for name in ("fp32", "int8", "w8a8"):  # as a ranker bundle has them
        share_weights([folder / name / SUFFIX, folder / name / PREFIX], folder / name / WEIGHTS)
    texts = {name: (torch.ones(2, 7, dtype=torch.long), ("batch", "length")) for name in ("ids", "mask")}
    write_graph(EncoderGraph(load_base(model_folder(ENCODER))), texts, folder / "encoder.onnx", ("vectors",), OPSET)
    quantise(folder / "encoder.onnx", folder / "encoder-int8.onnx", "int8", None)


def samples(folder: Path, vocabulary: int) -> dict[str, list[dict[str, NDArray[Any]]]]:
    """What both graphs of a folder are given for one history and a few candidates of random tokens."""
    history, candidates = work({"seed": 0, "history": HISTORY, "candidates": 16, "tokens": TOKENS}, vocabulary)
    prefix = {"ids": np.array([history], dtype=np.int64)}
    keys, values = open_session(folder / PREFIX).run(None, prefix)
    ends = np.full((1, len(candidates)), TOKENS - 1, dtype=np.int64)
    lengths = np.array([HISTORY], dtype=np.int64)
    suffix = {"ids": np.array([candidates], dtype=np.int64), "ends": ends, "lengths": lengths}
    return {"prefix": [prefix], "suffix": [suffix | {"keys": keys, "values": values}]}


class Contender:
    """A contender's process."""

    def __init__(self, name: str, folder: Path, model_name: str, vocabulary: int, threads: int) -> None:
        command = [sys.executable, str(Path(__file__).parent / "contenders.py"), name, str(folder), model_name]
        # Waiting threads must not spin: the others are running meanwhile.
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
        self.name = name
        self.process = subprocess.Popen(
            [*command, str(vocabulary)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        if self._line() != "ready":
            raise SystemExit(f"The contender '{name}' did not start: python {' '.join(command[1:])} {vocabulary}")

    def __call__(self, **round_: int) -> tuple[float, np.ndarray]:
        """Do a round: seconds, and scores float[candidates]."""
        assert self.process.stdin is not None
        print(json.dumps(round_), file=self.process.stdin, flush=True)
        answer = json.loads(self._line())
        return answer["seconds"], np.array(answer["scores"])

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()


@contextmanager
def contenders(names: Sequence[str], *arguments: Any) -> Iterator[dict[str, Contender]]:  # noqa: ANN401
    """The processes of some contenders, loaded one after the other."""
    with ExitStack() as stack:
        running = {}
        for name in names:
            running[name] = Contender(name, *arguments)
            stack.callback(running[name].close)
        yield running


def rank_rounds(
    running: Mapping[str, Contender], rounds: int, share: int, every: int
) -> tuple[dict[str, float], float]:
    """Median seconds of each contender for all candidates, and the largest difference of a float32 score.

    Args:
        running: the contenders.
        rounds: behind one to warm up.
        share: full prompts are read for one of so many candidates.
        every: contenders without a bar are in one of so many rounds.
    """
    times: dict[str, list[float]] = {name: [] for name in running}
    difference = 0.0
    for number in range(-1, rounds):  # the first one warms up
        wanted, scores = {"seed": number + 1, "history": HISTORY, "candidates": CANDIDATES, "tokens": TOKENS}, {}
        for name, contender in running.items():
            if name in UNASKED and max(0, number) % every:
                continue
            part = share if name.endswith("naive") else 1
            seconds, found = contender(**wanted, first=number % part, step=part)
            scores[name] = np.repeat(np.nan, CANDIDATES)
            scores[name][number % part :: part] = found
            if number >= 0:
                times[name].append(seconds * CANDIDATES / len(found))
        exact = [found for name, found in scores.items() if "fp32" in name]
        difference = max(difference, *(float(np.nanmax(np.abs(found - exact[0]))) for found in exact))
        if number >= 0:
            print(f"round {number + 1}: " + ", ".join(f"{name} {times[name][-1]:.2f} s" for name in scores))
    return {name: statistics.median(own) for name, own in times.items()}, difference


def growth(contender: Contender, rounds: int, most: int) -> dict[int, float]:
    """Milliseconds per candidate by the number of candidates, medians of so many rounds, or of `most` candidates."""
    times: dict[int, list[float]] = {count: [] for count in GROWTH}
    for number in range(rounds):
        for count, own in times.items():
            if number * count >= most:
                continue
            own.append(contender(seed=number, history=HISTORY, candidates=count, tokens=TOKENS)[0] / count * 1e3)
    return {count: round(statistics.median(own), 2) for count, own in times.items()}


def in_turns(works: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each work, in turns, after one round to warm up."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, own in works.items():
            start = time.perf_counter()
            own()
            if number:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(own) for name, own in times.items()}


def encoder_seconds(folder: Path, rounds: int, texts: int) -> dict[str, float]:
    """Seconds for item texts of widely differing length: random batches of 32, length order, and int8 in that order."""
    base = load_base(model_folder(ENCODER))
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(3.0, 1.0, texts), 3, 250).astype(int)
    ids = [rng.integers(1000, 20000, length).tolist() for length in lengths]

    @torch.inference_mode()
    def random_batches() -> None:
        for start in range(0, len(ids), 32):
            batch = ids[start : start + 32]
            padded = torch.zeros(len(batch), max(map(len, batch)), dtype=torch.long)
            mask = torch.zeros_like(padded)
            for row, own in enumerate(batch):
                padded[row, : len(own)], mask[row, : len(own)] = torch.tensor(own), 1
            base.model(input_ids=padded, attention_mask=mask)

    sessions = {name: open_session(folder / f"{name}.onnx") for name in ("encoder", "encoder-int8")}
    block = np.array([own[:24] for own in ids if len(own) >= 24][:32], dtype=np.int64)

    def graph(name: str) -> Callable[[], object]:
        return lambda: sessions[name].run(None, {"ids": block, "mask": np.ones_like(block)})

    works = {"random batches": random_batches, "length order": lambda: encode_ids(base, ids)}
    return in_turns(works, rounds) | in_turns({name: graph(name) for name in sessions}, 3 * rounds)


def help_seconds() -> float:
    """Median of seven starts of the command line, the interpreter's included."""
    command = [sys.executable, "-c", "from recllm.cli import main; main(['--help'])"]
    return in_turns({"help": lambda: subprocess.run(command, capture_output=True, check=False)}, 7)["help"]


def token_bounds() -> tuple[float, float]:
    """How many times fewer tokens are read when the history is read once, and when it is kept."""
    naive, suffixes = CANDIDATES * (HISTORY + TOKENS), CANDIDATES * TOKENS
    return naive / (HISTORY + suffixes), naive / suffixes


def bar(value: float, least: float | None = None, most: float | None = None) -> Bar:
    """A figure and whether it holds."""
    holds = (least is None or value >= least) and (most is None or value <= most)
    return {"value": float(f"{value:.4g}"), "bar": least if most is None else most, "holds": bool(holds)}


def ranking_bars(seconds: Mapping[str, float], difference: float) -> dict[str, Bar]:
    """What is asked of ranking."""
    naive = {engine: seconds[f"{engine} fp32 naive"] for engine in ("torch", "onnx")}
    return {
        "torch_fp32_speed_up": bar(naive["torch"] / seconds["torch fp32 recllm"], 19.0),
        "torch_fp32_kept_speed_up": bar(naive["torch"] / seconds["torch fp32 recllm kept"], 24.0),
        "torch_bf16_speed_up": bar(naive["torch"] / seconds["torch bf16 recllm"], 50.0),
        "onnx_fp32_speed_up": bar(naive["onnx"] / seconds["onnx fp32 recllm"], 18.0),
        "onnx_to_torch": bar(seconds["torch fp32 recllm"] / seconds["onnx fp32 recllm"], 0.95),
        "int8_ranker_speed_up": bar(seconds["onnx fp32 recllm"] / seconds["onnx w8a8 recllm"], 1.8),
        "scores_equal": bar(difference, most=1e-4),
    }


def main() -> None:
    """Measure, print rounds and the line of bars."""
    parser = argparse.ArgumentParser(prog="recllm bench speed", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of the full prompts, and fewer rounds")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="a causal language model")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    rounds, share, every, few, most = (7, SHARE, EVERY, 3, GROWN) if given.quick else (15, 1, 1, 7, 7 * GROWTH[-1])
    folder = model_folder(given.model, lambda line: print(line, file=sys.stderr))
    vocabulary = load_config(folder).vocab_size
    torch.set_num_threads(given.threads)
    began = time.perf_counter()

    def done(part: str) -> None:
        print(f"{part}: done after {time.perf_counter() - began:.0f} s")

    with tempfile.TemporaryDirectory() as place:
        print("Writing the ONNX graphs")
        write_graphs(Path(place), str(folder), vocabulary)
        with contenders(list(CONTENDERS), Path(place), str(folder), vocabulary, given.threads) as running:
            done("Graphs and models")
            seconds, difference = rank_rounds(running, rounds, share, every)
            done("Ranking")
            per_candidate = growth(running["torch fp32 recllm"], few, most)
            done("Growth with candidates")
        encoder = encoder_seconds(Path(place), few, 256 if given.quick else 1024)
        done("Encoder")
    catalogue = catalogues.growth(CATALOGUES, given.threads)
    done("Catalogue")
    if not given.quick:
        catalogue["search"] = catalogues.search_alone(10_000_000, SEARCHED_WIDTH, given.threads)
        print(f"8-bit search of 10,000,000 items, {SEARCHED_WIDTH} wide, seconds: {catalogue['search']}")
    rising = max(per_candidate[more] / per_candidate[less] for less, more in pairwise(GROWTH))
    bars = ranking_bars(seconds, difference) | {
        "time_per_candidate_rises": bar(rising, most=FLAT),
        "catalogue_slope_to_product": bar(catalogue["slope"]["even weights"], most=1.5),
        "shortlist_recall": bar(catalogue["recall"], 0.99),
        "catalogue_time_per_user_rises": bar(max(catalogue["rise"].values()), most=FLAT),
        "encoder_int8_speed_up": bar(encoder["encoder"] / encoder["encoder-int8"], 2.0),
        "length_order_speed_up": bar(encoder["random batches"] / encoder["length order"], 2.5),
        "help_seconds": bar(help_seconds(), most=0.3),
    }
    result = {
        "benchmark": "speed",
        "model": given.model,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "threads": given.threads,
        "work": {"history": HISTORY, "candidates": CANDIDATES, "tokens": TOKENS, "rounds": rounds},
        "token_bounds": [round(bound, 1) for bound in token_bounds()],
        "seconds": {name: round(own, 3) for name, own in (seconds | encoder).items()},
        "milliseconds_per_candidate": per_candidate,
        "catalogue": {key: catalogue[key] for key in ("slope", "rise", "shortlist", "recall")}
        | {"search": catalogue.get("search")}
        | {"milliseconds": [[round(value, 3) for value in row.values()] for row in catalogue["calls"]]},
        "bars": bars,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()

"""How the cost of ranking a whole catalogue grows with its size and the users in a call, beside a plain product.

And what the 8-bit shortlist saves of it, with the share of the exact ten best that it holds.
"""

import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper, save

from recllm.catalogue import prepare
from recllm.fusion import Fusion
from recllm.graphs import OPSET, catalogue_graph
from recllm.sessions import open_session
from recllm.shortlist import LISTED, Int8Search, Shortlist, recall

WIDTHS = {"popularity": 1, "mf": 64, "text": 384, "light": 129}
"""Of a run without item-item matrices, which are for small catalogues."""
USERS = (1, 8, 64)
SEEN, TOP, ROUNDS = 50, 10, 5
SHORTLISTED = "int8 shortlist"


def fusions() -> dict[str, Fusion]:
    """Weights that are the same for all items, and weights that go by their events."""
    plain = Fusion.plain(tuple(WIDTHS))
    by_counts = replace(plain, theta=plain.theta + np.array([0.0, 0.1, 0.2]))
    return {"even weights": plain, "weights by counts": by_counts}


def product_graph(path: Path) -> None:
    """One matrix product of queries and items."""
    shapes = {"queries": ["users", "width"], "items": ["width", "items"], "scores": ["users", "items"]}
    values = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()}
    node = helper.make_node("MatMul", ["queries", "items"], ["scores"])
    graph = helper.make_graph([node], "product", [values["queries"], values["items"]], [values["scores"]])
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10), path)


def seconds(sizes: tuple[int, ...], threads: int) -> Iterator[dict[str, Any]]:
    """Median seconds of a call by what computes, items and users; in turns, after one call to warm up."""
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as place:
        paths = {name: Path(place) / f"{at}.onnx" for at, name in enumerate(["product", *fusions()])}
        product_graph(paths["product"])
        for name, fusion in fusions().items():
            catalogue_graph(fusion, WIDTHS, min(sizes), paths[name])
        sessions = {name: open_session(path, threads=threads) for name, path in paths.items()}
    for items in sizes:
        vectors = {name: random.standard_normal((items, width), dtype=np.float32) for name, width in WIDTHS.items()}
        counts = random.integers(0, 1000, items)
        prepared = {name: prepare(fusion, vectors, counts) for name, fusion in fusions().items()}
        ready, even = {name: own.feeds for name, own in prepared.items()}, prepared["even weights"]
        samples = {name: random.standard_normal((1, width), dtype=np.float32) for name, width in WIDTHS.items()}
        shortlist = Shortlist(fusions()["even weights"], even, counts, kind="int8", samples=samples, threads=threads)
        del vectors  # gigabytes
        together = ready["even weights"]["items"]
        for users in USERS:
            own = {name: random.standard_normal((users, width), dtype=np.float32) for name, width in WIDTHS.items()}
            queries = {f"{name}_queries": vectors for name, vectors in own.items()}
            facts = {
                "n_user": np.full(users, SEEN),
                "seen": random.integers(0, items, (users, SEEN)),
                "k": np.array([TOP]),
            }
            feeds: dict[str, Any] = {name: given | queries | facts for name, given in ready.items()}
            left = random.standard_normal((users, len(together)), dtype=np.float32)
            feeds["product"] = {"queries": left, "items": together}

            def call(name: str) -> Any:  # noqa: ANN401
                if name != SHORTLISTED:
                    return sessions[name].run(None, feeds[name])  # noqa: B023
                listed = shortlist.find(own, facts["n_user"], np.full(users, LISTED + SEEN))  # noqa: B023
                places = shortlist.together(listed)  # noqa: B023
                seen = {"seen": np.full((users, 1), -1)}  # noqa: B023
                return sessions["even weights"].run(None, shortlist.feeds(places) | queries | facts | seen), listed  # noqa: B023

            times: dict[str, list[float]] = {name: [] for name in (*sessions, SHORTLISTED)}
            for number in range(ROUNDS + 1):
                for name, taken in times.items():
                    start = time.perf_counter()
                    call(name)
                    if number:
                        taken.append(time.perf_counter() - start)
            rows = sessions["even weights"].run(["rows"], feeds["even weights"])[0]
            found = recall(rows, call(SHORTLISTED)[1])
            medians = {name: float(np.median(taken)) for name, taken in times.items()}
            yield {"items": items, "users": users, "recall": found} | medians


def search_alone(items: int, width: int, threads: int) -> dict[str, float]:
    """Seconds of the 8-bit search of ever so many items, for one user and for many; the items' vectors as they come."""
    random = np.random.default_rng(0)
    search = Int8Search(random.standard_normal((items, width), dtype=np.float32), threads)
    seconds = {}
    for users in (USERS[0], USERS[-1]):
        queries = random.standard_normal((users, width), dtype=np.float32)
        taken = []
        for _ in range(ROUNDS):
            start = time.perf_counter()
            search(queries, LISTED)
            taken.append(time.perf_counter() - start)
        seconds[f"{users} users"] = float(np.median(taken))
    return seconds


def growth(sizes: tuple[int, ...], threads: int) -> dict[str, Any]:
    """Milliseconds of every call, and per fusion the two figures of the bars.

    Returns:
        `calls`; `slope`, of the time over items from the last size but one to the last one in calls of many users, as
        a multiple of the plain product's; `rise`, the largest rise of the time per user with more users in a call;
        `shortlist`, how often as fast as the whole the shortlist ranks the last size, for one user and for many, and
        `recall`, the least share of the ten best in it.
    """
    names = ("product", *fusions(), SHORTLISTED)
    calls = []
    for row in seconds(sizes, threads):
        calls.append(row)
        each = ", ".join(f"{name} {row[name] / row['users'] * 1e3:.2f}" for name in names)
        print(
            f"{row['items']:,} items, {row['users']} users in a call, milliseconds per user: {each} "
            f"({100 * row['recall']:.1f} % of the ten best)"
        )
    before, last = [row for row in calls if row["users"] == USERS[-1]][-2:]
    slopes = {name: last[name] - before[name] for name in names}
    per_user = {name: [row[name] / row["users"] for row in calls if row["items"] == sizes[-1]] for name in fusions()}
    return {
        "calls": [{key: value * 1e3 if key in names else value for key, value in row.items()} for row in calls],
        "slope": {name: slopes[name] / slopes["product"] for name in fusions()},
        "shortlist": [
            row["even weights"] / row[SHORTLISTED]
            for row in calls
            if row["items"] == sizes[-1] and row["users"] in (USERS[0], USERS[-1])
        ],
        "recall": min(row["recall"] for row in calls),
        "rise": {name: max(more / less for less, more in pairwise(own)) for name, own in per_user.items()},
    }

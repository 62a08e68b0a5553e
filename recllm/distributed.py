"""A bundle as a callable without state, for clusters: a batch of rows in, its answers out, the same on every worker.

What splits the rows, runs the workers and writes the answers is Ray Data (`map_batches`), Spark (`mapInPandas`) or
whatever else maps batches; docs/serving.md has the recipes.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from recllm.batch import best_items
from recllm.data.texts import identifier
from recllm.errors import RecllmError
from recllm.query_rows import COLUMNS, BadRow, QueryRow, parse_row
from recllm.ranker import TwoStage, behind, load_ranker
from recllm.runtime import Recommender, load


class BatchRecommender:
    """The `k` best items for every row of a batch; the bundle is loaded once per worker.

    Args:
        bundle: a folder that every worker can read.
        k: how many items.
        exclude_seen: as `recllm.runtime.Recommender.recommend` takes it.
        new_items: how many of the k at least are items of few events.
        provider: cpu, cuda or tensorrt.
        threads: inside one operator; a worker takes one core unless told otherwise.
        index: as `recllm.load` takes it.
        ranker: a ranker bundle that reorders the best.
        rank_top: how many of the best it reorders.
        rank_weight: of its score beside the first one.

    Raises:
        RecllmError: as `recllm.load`, or a `k` that the catalogue has not.
    """

    def __init__(
        self,
        bundle: str | os.PathLike[str],
        k: int = 10,
        *,
        exclude_seen: bool | None = None,
        new_items: int = 0,
        provider: str = "cpu",
        threads: int = 1,
        index: str = "exact",
        ranker: str | os.PathLike[str] | None = None,
        rank_top: int = 100,
        rank_weight: float = 1.0,
    ) -> None:
        recommender = load(bundle, provider=provider, threads=threads, index=index)
        self.k, self.exclude_seen, self.new_items = k, exclude_seen, new_items
        self.recommender: Recommender | TwoStage = recommender
        if ranker is not None:
            judge = load_ranker(ranker, provider=provider, threads=threads, keep_bytes=0)
            judge = behind(recommender, judge, ranker, lambda _: None)
            self.recommender = TwoStage(recommender, judge, rank_top, rank_weight)
        self.recommender.check_k(k, new_items)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
        """Answer the rows of a batch.

        Args:
            batch: columns by name, a dict of arrays or a pandas DataFrame: `user_id`, `history` (item ids, oldest
                first) and, for a ranker, `ratings`.

        Returns:
            Columns `user_id, rank, item_id, score, share_<scorer>…, error`: a line per answer, best first, and one for
            each row that cannot be answered, with the reason in `error`, rank 0 and no item.

        Raises:
            RecllmError: no column `user_id` or `history`: answers of a cluster come in any order, so that a user is
                known by the id only.
        """
        missing = [name for name in ("user_id", "history") if name not in batch]
        if missing:
            raise RecllmError(f"The batch has no column '{missing[0]}'. Its columns: {', '.join(batch)}.")
        columns = {name: [_plain(value) for value in batch[name]] for name in COLUMNS if name in batch}
        ranked = isinstance(self.recommender, TwoStage)
        rows = [
            _row(line, dict(zip(columns, values, strict=True)), ratings=ranked)
            for line, values in enumerate(zip(*columns.values(), strict=True), start=1)
        ]
        good = [row for row in rows if isinstance(row, QueryRow)]
        parts = [self._answers(good)] if good else []
        parts += [_refused(row) for row in rows if isinstance(row, BadRow)]
        empty = pl.DataFrame(schema={"user_id": pl.String, "rank": pl.Int32, "item_id": pl.String, "score": pl.Float32})
        shares = {f"share_{name}": pl.Float32 for name in self.recommender.share_names}
        whole = pl.concat([empty, pl.DataFrame(schema=shares | {"error": pl.String}), *parts], how="diagonal")
        return {name: whole[name].to_numpy() for name in whole.columns}

    def _answers(self, rows: Sequence[QueryRow]) -> pl.DataFrame:
        found = best_items(self.recommender, rows, self.k, exclude_seen=self.exclude_seen, new_items=self.new_items)
        return pl.concat([found.frame, *map(_refused, found.unanswered(rows))], how="diagonal")


def _row(line: int, fields: dict[str, Any], *, ratings: bool) -> QueryRow | BadRow:
    if fields["user_id"] is None or not str(fields["user_id"]).strip():
        return BadRow(line, "no 'user_id', by which an answer of a cluster is known", fields)
    if fields["history"] is None:
        return BadRow(line, "no 'history'; an empty list is one", fields)
    return parse_row(line, fields, ratings=ratings)


def _refused(row: BadRow) -> pl.DataFrame:
    user = row.fields.get("user_id") if isinstance(row.fields, dict) else None
    columns = {"user_id": [_shown(user)], "rank": [0], "error": [row.reason]}
    return pl.DataFrame(columns, schema={"user_id": pl.String, "rank": pl.Int32, "error": pl.String})


def _shown(user: Any) -> str | None:  # noqa: ANN401
    """The user as answers have it; what is no id as it stands."""
    try:
        return None if user is None else identifier(user)
    except ValueError:  # half of a surrogate pair, too, which no frame holds
        return str(user).encode("utf-8", "backslashreplace").decode()


def _plain(value: Any) -> Any:  # noqa: ANN401
    """A cell as JSON would hold it: lists for arrays, None for what is missing (None, NaN, pandas' NA)."""
    if isinstance(value, np.ndarray | list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if _missing(value) else value


def _missing(value: Any) -> bool:  # noqa: ANN401
    try:
        return value is None or bool(value != value)
    except TypeError:  # pandas' NA is neither true nor false
        return True

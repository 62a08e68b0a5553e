"""Parts joined into one file: every kind of file, in the order of the parts, with nothing left beside it."""

from pathlib import Path

import polars as pl
import pytest

from recllm.sheets import join_frames, write_frame


def some_parts(folder: Path, number: int, suffix: str) -> list[Path]:
    paths = [folder / f"{part:08}{suffix}" for part in range(number)]
    for part, path in enumerate(paths):
        ids = [f"u{part}-{row}" for row in range(1 + part % 3)]
        write_frame(pl.DataFrame({"user_id": ids, "rank": [part] * len(ids)}), path, suffix)
    return paths


@pytest.mark.parametrize("number", [1, 2, 1500])
def test_parquet_parts_are_joined_in_their_order_and_nothing_else_is_left(number: int, tmp_path: Path) -> None:
    parts = some_parts(tmp_path, number, ".parquet")
    join_frames(parts, tmp_path / "joined", ".parquet")
    assert pl.read_parquet(tmp_path / "joined").equals(pl.concat([pl.read_parquet(part) for part in parts]))
    assert sorted(tmp_path.iterdir()) == [*parts, tmp_path / "joined"]


@pytest.mark.parametrize(("suffix", "read"), [(".csv", pl.read_csv), (".jsonl", pl.read_ndjson)])
def test_text_parts_are_joined_with_one_header(suffix: str, read: object, tmp_path: Path) -> None:
    parts = some_parts(tmp_path, 5, suffix)
    join_frames(parts, tmp_path / "joined", suffix)
    assert callable(read)
    assert read(tmp_path / "joined").equals(pl.concat([read(part) for part in parts]))


def test_the_same_parts_give_the_same_bytes(tmp_path: Path) -> None:
    parts = some_parts(tmp_path, 150, ".parquet")
    join_frames(parts, tmp_path / "one", ".parquet")
    join_frames(parts, tmp_path / "two", ".parquet")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()

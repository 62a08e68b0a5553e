"""Tables of files: what parts their columns, texts that are kept once, and how much memory they would take."""

import polars as pl
import pytest

from recllm.data import read_interactions
from recllm.data.tables import open_table
from recllm.errors import RecllmError


@pytest.mark.parametrize("sign", [";", "\t"])
def test_commas_part_a_csv_whose_header_has_another_sign_in_a_name(tmp_path, sign):
    file = tmp_path / "log.csv"
    file.write_text(f"user_id,item_id,seen{sign}heard\na,x,1\n", encoding="utf-8")
    table = open_table(file)
    assert table.columns == ["user_id", "item_id", f"seen{sign}heard"]
    assert table.read(["item_id"])["item_id"].to_list() == ["x"]


@pytest.mark.parametrize("kind", [pl.Categorical(), pl.Enum(["b", "5", "a", "x", "4"])], ids=["categorical", "enum"])
def test_texts_that_a_parquet_file_keeps_once_are_texts(tmp_path, kind):
    file = tmp_path / "log.parquet"
    frame = pl.DataFrame({"user_id": ["a", "b"], "item_id": ["x", "x"], "rating": ["4", "5"]})
    frame.select(pl.all().cast(kind)).write_parquet(file)
    assert open_table(file).read(frame.columns).drop("_line").equals(frame)
    assert read_interactions(file).frame["rating"].to_list() == [4.0, 5.0]


def test_long_texts_count_in_what_a_parquet_file_would_take(tmp_path):
    pytest.importorskip("pyarrow.parquet", reason="it knows how much the texts of a file take")
    file = tmp_path / "items.parquet"
    texts = [f"{item} {'word ' * 2000}" for item in range(100)]  # 1 MB in some kB of file
    pl.DataFrame({"item_id": range(100), "story": texts}).write_parquet(file)
    assert file.stat().st_size < 100_000
    assert open_table(file, budget=2_000_000).columns == ["item_id", "story"]
    with pytest.raises(RecllmError, match=r"would take about .* GiB in memory"):
        open_table(file, budget=500_000)

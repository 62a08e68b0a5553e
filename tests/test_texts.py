"""Columns as text: ids of numbers that became floats, and numbers in the text of items."""

import math

import polars as pl

from recllm.data.texts import as_id_lists, as_ids, as_text


def test_ids_that_became_floats_are_whole_numbers_below_nought_too():
    floats = [-1.0, 0.0, 20.0, -1.5]
    assert as_ids(pl.Series("item_id", floats)).to_list() == ["-1", "0", "20", "-1.5"]
    assert as_id_lists(pl.Series("history", [floats, None])).to_list() == [["-1", "0", "20", "-1.5"], []]


def test_an_id_that_is_no_number_is_missing_but_may_be_a_word():
    assert as_ids(pl.Series("user_id", [7.0, math.nan, None])).to_list() == ["7", None, None]
    assert as_id_lists(pl.Series("history", [[7.0, math.nan]])).to_list() == [["7", None]]
    assert as_ids(pl.Series("user_id", ["7.0", "NaN", " "])).to_list() == ["7.0", "NaN", None]


def test_numbers_in_text_are_as_short_as_somebody_would_write_them():
    assert as_text(pl.Series("price", [0.1 + 0.2, 1 / 3, -12.0, 3.25])).to_list() == ["0.3", "0.3333", "-12", "3.25"]


def test_a_vector_is_no_text_and_a_list_of_whole_numbers_is():
    assert as_text(pl.Series("embedding", [[0.123456789, 0.2], None])) is None
    assert as_text(pl.Series("codes", [[3, 4], None])).to_list() == ["3, 4", None]


def test_lists_of_one_length_are_lists_of_ids():
    fixed = pl.Series("history", [[1, 2], [3, 4]], dtype=pl.Array(pl.Int64, 2))
    assert as_id_lists(fixed).to_list() == [["1", "2"], ["3", "4"]]

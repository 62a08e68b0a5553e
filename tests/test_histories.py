"""Histories as ids: windows start at multiples of the stride, item tokens and texts point where they should."""

import json

import numpy as np
import pytest

from recllm.histories import HistoryFormat, item_token_history, padded, text_history


def rows(count):
    return np.arange(count, dtype=np.int64)


@pytest.mark.parametrize("count", range(14))
@pytest.mark.parametrize(("limit", "stride"), [(5, 1), (6, 3), (7, 4), (4, 9)])
def test_a_window_is_the_end_of_the_history_and_starts_at_a_multiple_of_the_stride(count, limit, stride):
    window = HistoryFormat((), (), limit, stride).window(rows(count))
    start = count - len(window)
    assert window.tolist() == list(range(start, count))
    assert len(window) <= limit
    stride = min(stride, limit)  # a longer one would leave nothing
    assert start % stride == 0
    if count > limit:
        assert len(window) > limit - stride  # no more is cut off than the stride asks for
    else:
        assert start == 0


def test_windows_of_a_growing_history_share_their_beginning_between_two_strides():
    history = HistoryFormat((), (), 10, 4)
    starts = [int(history.window(rows(count))[0]) for count in range(11, 19)]
    assert starts == [4, 4, 4, 4, 8, 8, 8, 8]


def test_item_tokens_stand_behind_the_words_of_the_prompt():
    history = item_token_history([7, 9, 7], limit=3, stride=1)
    assert history.vocabulary == (7, 9)
    ids, ends = history.ids([5, 0])
    assert ids == [0, 1, 0, 2 + 5, 2 + 0]
    assert ends == [3, 4]


def test_text_histories_point_into_the_words_that_occur():
    history = text_history([40, 41], [[50, 51, 60], None, [51, 60]], limit=3, stride=1)
    assert history.vocabulary == (40, 41, 50, 51, 60)
    ids, ends = history.ids([2, 0])
    assert [history.vocabulary[place] for place in ids] == [40, 41, 51, 60, 50, 51, 60]
    assert ends == [3, 6]


def test_an_item_without_text_is_left_out_of_a_text_history_before_it_is_cut():
    history = text_history([40], [[50], None, [51]], limit=2, stride=1)
    assert history.window(np.array([0, 1, 2, 1])).tolist() == [0, 2]


@pytest.mark.parametrize(
    "history", [item_token_history([7, 9], 50, 10), text_history([1], [[2, 3], None], 50, 10)], ids=["items", "text"]
)
def test_json_keeps_a_history_format(history):
    assert HistoryFormat.from_dict(json.loads(json.dumps(history.to_dict()))) == history


def test_a_text_history_loses_its_oldest_items_where_the_model_reads_no_more():
    texts = [[50] * 3, [51] * 2, [52] * 4]
    history = text_history([40, 41], texts, limit=9, stride=1, positions=9)
    assert history.window(np.array([0, 1, 2])).tolist() == [1, 2]
    assert history.window(np.array([0, 1, 0])).tolist() == [1, 0]
    assert len(history.ids(history.window(np.array([2, 2, 0, 2])))[0]) <= 9
    assert text_history([40], texts, limit=9, stride=1, positions=3).window(np.array([0, 2])).tolist() == []
    assert HistoryFormat.from_dict(json.loads(json.dumps(history.to_dict()))) == history


def test_padding_fills_on_the_right():
    assert padded([[1, 2], [], [3]], fill=-1).tolist() == [[1, 2], [-1, -1], [3, -1]]
    assert padded([]).shape == (0, 0)


def test_a_text_history_that_just_fits_stays_whole():
    history = HistoryFormat((1, 2), (0,), 9, 1, texts=((0, 1), (0, 1)), positions=5)
    assert history.fitting(np.array([0, 1])).tolist() == [0, 1]

"""Which column is which: of several that could be meant always the same one, and none of them twice."""

import pytest

from recllm.data.columns import EVENT_COLUMNS, map_columns
from recllm.data.tables import open_table


@pytest.fixture
def mapped(tmp_path):
    """Maps the columns of a file with this header."""

    def of(header, given=None):
        file = tmp_path / "log.csv"
        file.write_text(f"{header}\n{','.join('1' for _ in header.split(','))}\n", encoding="utf-8")
        return map_columns(open_table(file), EVENT_COLUMNS, given, "data.columns")

    return of


def test_of_names_that_differ_in_signs_only_the_first_in_the_file_is_taken(mapped):
    assert mapped("User ID,user_id,item_id,ItemId") == {"user_id": "User ID", "item_id": "item_id"}
    assert mapped("user_id,User ID,ItemId,item_id") == {"user_id": "user_id", "item_id": "ItemId"}


def test_a_column_that_is_given_for_one_thing_is_not_guessed_to_be_another(mapped):
    header = "item,product,stars,score"  # what was bought with what, as if an item were a user
    assert mapped(header, {"user_id": "item"}) == {"user_id": "item", "item_id": "product", "rating": "score"}
    assert mapped(header, {"user_id": "item", "timestamp": "score"})["rating"] == "stars"
    assert "rating" not in mapped("user,item,score", {"timestamp": "score"})

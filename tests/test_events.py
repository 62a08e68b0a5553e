"""Events as one table: weights that count, and the same order of users whatever the order of the file."""

import numpy as np
import pytest

from recllm.data import read_interactions
from recllm.errors import RecllmError


@pytest.mark.parametrize("weight", ["0", "-1", "", "much"])
def test_an_event_weight_that_is_no_positive_number_is_refused(tmp_path, weight):
    file = tmp_path / "log.csv"
    file.write_text(f"user_id,item_id,event_weight\na,x,0.5\na,y,{weight}\nb,x,1\n", encoding="utf-8")
    with pytest.raises(RecllmError, match=r"row 2 has an event weight that is no positive number \(as 1 of 3 rows\)"):
        read_interactions(file)


def test_users_who_began_in_one_second_stand_by_their_ids_whatever_the_order_of_the_file(tmp_path):
    file = tmp_path / "log.csv"
    users = [f"u{user:02}" for user in range(20)]
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(users)
        rows = [f"{user},{item},{at}\n" for user in order for item, at in (("x", 100), ("y", 200))]
        file.write_text("user_id,item_id,timestamp\nz,x,99\n" + "".join(rows), encoding="utf-8")
        assert read_interactions(file).users() == ["z", *users]

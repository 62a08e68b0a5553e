"""Joining sources: namespaces, kinds of events, weights, rating scales, clocks, duplicates, items of several."""

import json
import re
import shutil

import numpy as np
import polars as pl
import pytest

from recllm import cli
from recllm.data import read_dataset
from recllm.data.join import join_sources
from recllm.errors import RecllmError
from recllm.mf import user_items_matrix
from recllm.priors import Popularity
from recllm.ranking import ItemIndex

SHOP = """user_id,item_id,kind,timestamp
ann,1,view,100
ann,1,buy,160
ann,2,view,130
bob,2,like,150
bob,3,unsubscribe,170
"""
APP = """user_id,item_id,rating,timestamp
ann,2,10,3640
ann,9,0,3700
bob,1,5,3690
"""
SHOP_ITEMS = "item_id,title,colour\n1,Red shoe,red\n2,Blue shoe,\n3,Hat,grey\n"
APP_ITEMS = "item_id,title,colour,story\n2,The blue shoe,blue,A long walk\n9,A song,,\n1,Other red shoe,red,\n"
JOIN = """
{head}
[[source]]
name = "shop"
interactions = "{folder}/shop.csv"
items = "{folder}/shop-items.csv"
users = "people"
items_namespace = "goods"
event = "kind"
weight = 2.0
events = {{ view = {{ weight = 0.25 }}, buy = {{ weight = 1.0 }}, like = {{ rating = 5 }} }}

[[source]]
name = "app"
interactions = "{folder}/app.csv"
items = "{folder}/app-items.csv"
users = "people"
{app}
rating_scale = [0, 10]
clock = -3540
"""


@pytest.fixture
def joined(tmp_path):
    for name, text in {
        "shop.csv": SHOP,
        "app.csv": APP,
        "shop-items.csv": SHOP_ITEMS,
        "app-items.csv": APP_ITEMS,
    }.items():
        (tmp_path / name).write_text(text, encoding="utf-8")

    def join(head="", app='items_namespace = "goods"', change=lambda text: text):
        file, target = tmp_path / "join.toml", tmp_path / "joined"
        file.write_text(change(JOIN.format(folder=tmp_path.as_posix(), head=head, app=app)), encoding="utf-8")
        lines = []
        join_sources(file, target, lines.append)
        return read_dataset(str(target)), lines

    return join


def rows(dataset, *columns):
    return dataset.interactions.frame.select(columns).rows()


def test_one_history_of_several_sources_in_one_clock(joined):
    dataset, lines = joined()
    assert rows(dataset, "user_id", "item_id", "timestamp", "rating", "weight") == [
        # The app's clock runs 59 minutes ahead: its 3640 is 100 here. Of one second the first source comes first.
        ("people:ann", "goods:2", 130, 5.0, 1.0),  # rated 10 of 10 before it was viewed in the shop
        ("people:ann", "goods:1", 160, None, 2.0),  # viewed, then bought: where it was last, as heavy as the purchase
        ("people:ann", "goods:9", 160, 1.0, 1.0),
        ("people:bob", "goods:2", 150, 5.0, 2.0),  # a like
        ("people:bob", "goods:1", 150, 3.0, 1.0),
    ]
    assert [line for line in lines if line.startswith("shop: ") and "warning" not in line] == [
        "shop: 1 events of kinds that [source.events] does not name, left out",
        "shop: 4 events of 2 users",
    ]


def test_weights_reach_factorization_and_popularity(joined):
    dataset, _ = joined("merged_weight = 'sum'")
    items, matrix = user_items_matrix(dataset.interactions)
    frame = dataset.interactions.frame
    assert matrix.sum() == pytest.approx(frame["weight"].sum())
    first = frame.filter((pl.col("user_id") == "people:ann") & (pl.col("item_id") == "goods:1"))
    assert first["weight"].to_list() == [2.5]  # a view and a purchase: 2 · .25 + 2 · 1
    weight = frame.filter(pl.col("item_id") == "goods:2")["weight"].sum()
    popularity = Popularity.fit(dataset.interactions)
    assert popularity.item_vectors(ItemIndex(["goods:2"]))[0, 0] == pytest.approx(np.log1p(weight))
    assert "goods:2" in items


def test_namespaces_keep_what_is_different_apart(joined):
    dataset, _ = joined(app="", change=lambda text: text.replace('users = "people"', 'users = ""'))
    assert set(rows(dataset, "item_id")) == {("goods:1",), ("goods:2",), ("app:1",), ("app:2",), ("app:9",)}
    assert set(rows(dataset, "user_id")) == {("ann",), ("bob",)}


@pytest.mark.parametrize("named", [True, False])
def test_namespaces_are_told_of_where_there_are_any(named, joined):
    """Without any, ids stand as they are."""

    def change(text):
        return text if named else text.replace('users = "people"', 'users = ""').replace('"goods"', '""')

    _, lines = joined(change=change)
    told = [line for line in lines if line.startswith("Ids are written with their namespaces")]
    assert told == ["Ids are written with their namespaces: user 'people:ann', item 'goods:2'"] * named


def test_an_item_takes_each_column_from_the_first_source_that_has_it(joined):
    dataset, _ = joined()
    record = dataset.catalog.record("goods:2")
    assert (record["title"], record["colour"], record["story"]) == ("Blue shoe", "blue", "A long walk")
    assert dataset.catalog.record("goods:9")["title"] == "A song"


@pytest.mark.parametrize(
    ("rule", "kept"),
    [
        ("first", [("people:ann", 100)]),
        ("last", [("people:ann", 160)]),
        ("keep", [("people:ann", 100), ("people:ann", 160)]),
    ],
)
def test_duplicate_rules_over_all_sources(joined, tmp_path, rule, kept):
    joined(f"duplicates = '{rule}'")
    frame = pl.read_parquet(tmp_path / "joined" / "interactions.parquet").filter(pl.col("item_id") == "goods:1")
    assert frame.filter(pl.col("user_id") == "people:ann").select("user_id", "timestamp").rows() == kept


def test_the_first_of_several_events_knows_nothing_of_the_later_ones(joined):
    dataset, _ = joined("duplicates = 'first'")
    assert rows(dataset, "user_id", "item_id", "timestamp", "rating", "weight")[:2] == [
        ("people:ann", "goods:1", 100, None, 0.5),  # a view, though a purchase comes at 160
        ("people:ann", "goods:2", 100, 5.0, 1.0),
    ]
    for rule in ("first", "keep"):
        with pytest.raises(RecllmError, match=r"merged_weight .* goes with duplicates = 'last'"):
            joined(f"duplicates = '{rule}'\nmerged_weight = 'sum'")


def test_the_last_rating_and_the_sum_are_over_all_events_of_a_source_too(joined, tmp_path):
    def twice(text):
        app = tmp_path / "app.csv"
        app.write_text(APP + "bob,1,9,3750\n", encoding="utf-8")
        return text

    dataset, _ = joined("merged_weight = 'sum'", change=twice)
    assert ("people:bob", "goods:1", 210, pytest.approx(4.6), 2.0) in rows(
        dataset, "user_id", "item_id", "timestamp", "rating", "weight"
    )


def test_the_column_of_kinds_may_be_called_as_one_of_ours(joined, tmp_path):
    def called_rating(text):
        shop = tmp_path / "shop.csv"
        shop.write_text(SHOP.replace("kind", "rating"), encoding="utf-8")
        return text.replace('event = "kind"', 'event = "rating"')

    plain, _ = joined()
    shutil.rmtree(tmp_path / "joined")
    called, _ = joined(change=called_rating)
    assert called.interactions.frame.equals(plain.interactions.frame)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace('name = "app"', 'name = "shop"'), "two sources have the same name"),
        (lambda text: text.replace("buy =", "bye ="), "kind of event in 'shop'"),
        (lambda text: text.replace('event = "kind"', ""), "give both or none"),
        (lambda text: text.replace('event = "kind"', 'event = "kin"'), "Source 'shop': .*'kin'"),
        (lambda text: text.replace("rating_scale = [0, 10]", "rating_scale = [5, 5]"), "lowest, then the highest"),
        (lambda text: text.replace("clock =", "clok ="), "clok"),
        (
            lambda text: text.replace("rating_scale = [0, 10]", "rating_scale = [0, 5]"),
            r"Source 'app': 1 ratings lie outside of rating_scale = \[0, 5\], the first is 10",
        ),
        (
            lambda text: text.replace("clock = -3540", "clock = -3660"),
            r"Source 'app': clock = -3660 moves 1 events out of",
        ),
        (lambda text: text.replace("clock = -3540", "clock = nan"), r"clock'.*finite number"),
        (lambda text: text.replace("weight = 2.0", "weight = inf"), r"weight'.*finite number"),
        (lambda text: text.replace("[0, 10]", "[0, nan]"), "rating_scale.*finite number"),
        (
            lambda text: text.replace('users = "people"', 'users = "people:old"', 1),
            "the namespaces 'people' and 'people:old' could make one id of two",
        ),
        (
            lambda text: text.replace('items_namespace = "goods"', 'items_namespace = "goods:old"', 1),
            "the namespaces 'goods' and 'goods:old' could make one id of two",
        ),
        (lambda text: text.replace("[0, 10]", "[10, 0]"), "lowest, then the highest"),
        (lambda text: text.replace("clock = -3540", "clock = 9e9"), r"moves 3 events out of the years 1970 to 2200"),
        (lambda text: re.sub(r'interactions = ".*/app\.csv"', "", text), r"give data \(a name or a folder\) or inter"),
    ],
)
def test_mistakes_are_named(joined, change, message):
    with pytest.raises(RecllmError, match=message):
        joined(change=change)


def test_times_in_some_sources_only_are_refused(joined, tmp_path):
    pl.read_csv(APP.encode()).drop("timestamp").write_csv(tmp_path / "app.csv")
    with pytest.raises(RecllmError, match="Source 'app' has events without a time stamp"):
        joined()


def test_a_source_without_items_takes_none_of_another_one(joined, tmp_path):
    (tmp_path / "shop-items.csv").rename(tmp_path / "items.csv")
    (tmp_path / "app-items.csv").unlink()

    def change(text):
        return text.replace("shop-items.csv", "items.csv").replace(
            f'items = "{tmp_path.as_posix()}/app-items.csv"\n', ""
        )

    dataset, _ = joined(app="", change=change)
    assert dataset.catalog.record("goods:1")["title"] == "Red shoe"
    assert dataset.catalog.record("app:1") == {"item_id": "app:1"}


def test_that_a_join_goes_by_time_is_said_of_a_column_of_order(tmp_path):
    log = "user_id,item_id,seq,timestamp\nu,1,1,20\nu,2,2,10\n"
    said = []
    (tmp_path / "log.csv").write_text(log, encoding="utf-8")
    (tmp_path / "join.toml").write_text(
        f'[[source]]\nname = "a"\ninteractions = "{tmp_path.as_posix()}/log.csv"\n', encoding="utf-8"
    )
    join_sources(tmp_path / "join.toml", tmp_path / "out", said.append)
    assert pl.read_parquet(tmp_path / "out" / "interactions.parquet")["item_id"].to_list() == ["a:2", "a:1"]
    assert "a: events that stand before an earlier one by the order column; a join goes by time" in said
    assert not any("is followed" in line for line in said)


def test_what_is_dropped_of_a_source_is_said_with_its_name(joined, tmp_path):
    (tmp_path / "app.csv").write_text(APP + ",1,5,3650\nbob,9,5,soon\n", encoding="utf-8")
    _, said = joined()
    warnings = [line for line in said if line.startswith("app: warning") and "1980" not in line]
    assert len(warnings) == 2
    assert "rows without user or item id, dropped: 1" in warnings[0]
    assert "time stamps that are unreadable" in warnings[1]


def test_the_command_says_how_to_go_on(joined, tmp_path, capsys):
    joined()
    with pytest.raises(SystemExit) as stopped:
        cli.main(["data", "join", str(tmp_path / "join.toml"), str(tmp_path / "joined")])
    assert stopped.value.code == 2
    assert "is there already" in capsys.readouterr().err


def joined_one(tmp_path, log, keys, file="log.csv"):
    """The frame of one source that is joined by itself."""
    (tmp_path / file).write_text(log, encoding="utf-8")
    (tmp_path / "items.csv").write_text("item_id,title\n1,A\n2,B\n", encoding="utf-8")
    folder = tmp_path.as_posix()
    source = (
        f'name = "a"\nusers = ""\nitems_namespace = ""\ninteractions = "{folder}/{file}"\nitems = "{folder}/items.csv"'
    )
    (tmp_path / "join.toml").write_text(f"[[source]]\n{source}\n{keys}\n", encoding="utf-8")
    join_sources(tmp_path / "join.toml", tmp_path / "out", lambda _: None)
    return pl.read_parquet(tmp_path / "out" / "interactions.parquet")


def test_a_scale_that_begins_at_one_ends_at_one(tmp_path):
    frame = joined_one(tmp_path, "user_id,item_id,rating,timestamp\nu,1,1,1\nu,2,7,2\n", "rating_scale = [1, 7]")
    assert frame["rating"].to_list() == [1.0, 5.0]


def test_an_events_own_rating_goes_before_that_of_its_kind(tmp_path):
    log = "user_id,item_id,rating,kind,timestamp\nu,1,2,like,1\nu,2,,like,2\n"
    frame = joined_one(tmp_path, log, 'event = "kind"\nevents = { like = { rating = 5 } }')
    assert frame["rating"].to_list() == [2.0, 5.0]


def test_the_weights_of_a_set_that_was_joined_before_are_kept(tmp_path):
    log = "user_id,item_id,event_weight,timestamp\nu,1,0.5,1\nu,2,4,2\n"
    assert joined_one(tmp_path, log, "weight = 2.0")["event_weight"].to_list() == [1.0, 8.0]


def test_an_event_weighs_what_it_did_times_its_kind_times_its_source(tmp_path):
    log = "user_id,item_id,kind,event_weight,timestamp\nu,1,view,0.5,1\nu,2,buy,4,2\n"
    keys = 'weight = 2.0\nevent = "kind"\nevents = { view = { weight = 0.25 }, buy = { weight = 3 } }'
    assert joined_one(tmp_path, log, keys)["event_weight"].to_list() == [0.25, 24.0]


def test_ratings_are_brought_to_one_scale_and_those_of_kinds_are_on_it(tmp_path):
    log = "user_id,item_id,rating,kind,timestamp\nu,1,0,seen,1\nu,2,10,seen,2\nv,1,,like,3\nv,2,5,like,4\n"
    keys = 'rating_scale = [0, 10]\nevent = "kind"\nevents = { seen = {}, like = { rating = 4 } }'
    assert joined_one(tmp_path, log, keys)["rating"].to_list() == [1.0, 5.0, 4.0, 3.0]


def test_events_of_several_kinds_are_no_duplicates_of_each_other(tmp_path):
    log = "user_id,item_id,kind,timestamp\nu,1,like,1\nu,1,buy,2\nu,1,view,3\n"
    keys = 'event = "kind"\nevents = { view = {}, buy = { weight = 4 }, like = { rating = 5 } }'
    frame = joined_one(tmp_path, log, keys)
    assert frame.select("timestamp", "event_weight", "rating").rows() == [(3, 4.0, 5.0)]
    for rule in ("first", "last"):
        with pytest.raises(RecllmError, match="duplicates is for a source without event"):
            joined_one(tmp_path, log, f'duplicates = "{rule}"\n{keys}')


@pytest.mark.parametrize("number", [int, float])  # a missing one in its column makes a float of it
def test_kinds_may_be_numbers(number, tmp_path):
    kinds = [(1, number(1)), (2, number(4)), (1, None), (2, number(9))]  # item, kind
    log = "".join(
        json.dumps({"user_id": f"u{at}", "item_id": item, "kind": kind, "timestamp": at}) + "\n"
        for at, (item, kind) in enumerate(kinds)
    )
    keys = 'event = "kind"\nevents = { 1 = { weight = 0.25 }, 4 = { weight = 2 } }'
    frame = joined_one(tmp_path, log, keys, file="log.jsonl")
    assert frame.select("item_id", "event_weight").rows() == [("1", 0.25), ("2", 2.0)]


@pytest.mark.parametrize(("rule", "kept"), [("first", (1, 2.0)), ("last", (3, 3.0)), ("keep", (3, 3.0))])
def test_a_source_may_have_a_rule_of_its_own_for_its_duplicates(tmp_path, rule, kept):
    """What it lets through goes by the join's rule, the last one stays."""
    log = "user_id,item_id,rating,timestamp\nu,1,2,1\nu,1,4,2\nu,1,3,3\n"
    frame = joined_one(tmp_path, log, f'duplicates = "{rule}"')
    assert frame.select("timestamp", "rating").rows() == [kept]


@pytest.mark.parametrize("timed", [True, False])
def test_users_stand_in_the_order_of_their_first_events_each_ones_events_together(tmp_path, timed):
    rows = ["z,1,10", "a,1,20", "z,2,30", "b,1,40", "a,2,50"]
    rows = rows if timed else [row.rpartition(",")[0] for row in rows]
    log = f"user_id,item_id{',timestamp' if timed else ''}\n" + "\n".join(rows) + "\n"
    frame = joined_one(tmp_path, log, "")
    assert frame.select("user_id", "item_id", "seq").rows() == [
        ("z", "1", 0),
        ("z", "2", 1),
        ("a", "1", 0),
        ("a", "2", 1),
        ("b", "1", 0),
    ]


def test_a_clock_of_part_of_a_second_moves_to_the_nearest_second(tmp_path):
    log = "user_id,item_id,timestamp\nu,1,100\n"
    assert joined_one(tmp_path, log, "clock = -0.25")["timestamp"].to_list() == [100]


PAIR = """
{head}
[[source]]
name = "shop"
interactions = "{folder}/shop.csv"
users = "people"
{shop}
[[source]]
name = "app"
interactions = "{folder}/app.csv"
users = "people"
"""


def paired(folder, shop, app, *, head="", of_shop=""):
    """What is said when two logs are joined, and the events."""
    (folder / "shop.csv").write_text(shop, encoding="utf-8")
    (folder / "app.csv").write_text(app, encoding="utf-8")
    (folder / "pair.toml").write_text(PAIR.format(folder=folder, head=head, shop=of_shop), encoding="utf-8")
    said = []
    join_sources(folder / "pair.toml", folder / "pair", said.append)
    return "\n".join(said), pl.read_parquet(folder / "pair" / "interactions.parquet")


def test_the_scale_of_ratings_is_that_of_the_kinds_that_are_taken(tmp_path):
    shop = "user_id,item_id,kind,rating,timestamp\n1,a,view,0,100\n1,b,rate,3,110\n"
    keys = 'event = "kind"\nevents = { rate = {} }\nrating_scale = [1, 5]'
    said, events = paired(tmp_path, shop, "user_id,item_id,timestamp\n1,c,100\n", of_shop=keys)
    assert "1 events of kinds that [source.events] does not name" in said
    assert events["rating"].drop_nulls().to_list() == [3.0]


def test_sources_of_one_namespace_whose_ids_never_meet_are_told(tmp_path):
    shop, app = "user_id,item_id,timestamp\n17.0,a,100\n", "user_id,item_id,timestamp\n17,c,100\n"
    said, _ = paired(tmp_path, shop, app)
    assert "app: warning: no user_id is that of another source of its namespace 'people' ('people:17' here" in said
    assert "'people:17.0' there); are they written alike?" in said
    assert "no item_id" not in said  # each has a namespace of its own


def test_weights_beyond_single_precision_are_refused(tmp_path):
    log = "user_id,item_id,timestamp,event_weight\n1,a,100,1e30\n"
    with pytest.raises(RecllmError, match=r"Source 'shop': 1 events weigh more than single precision holds"):
        paired(tmp_path, log, log, of_shop="weight = 1e30")


def test_how_to_read_a_join_that_keeps_all_events_is_said(tmp_path):
    log = "user_id,item_id,timestamp\n1,a,100\n"
    said, _ = paired(tmp_path, log, log, head='duplicates = "keep"')
    assert "--set data.duplicates=keep" in said


def test_a_mistake_in_a_source_is_told_in_the_words_of_a_join_file(tmp_path):
    with pytest.raises(
        RecllmError, match=r"Source 'shop': .* has no column for 'user_id'.*columns and item_columns of the"
    ):
        paired(tmp_path, "who,item_id\n1,a\n", "user_id,item_id\n1,a\n")

"""The report is one well-formed, escaped page that needs no network, and its charts put values where they belong."""

import itertools
import math
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest

from recllm import charts
from recllm.report import (
    CurvePoint,
    Recommendations,
    Recommended,
    Report,
    TableRow,
    WeightCurve,
    render,
    scorer_colours,
    share_scale,
    write_report,
)

VOID = {"meta", "rect", "circle", "line", "polyline", "path"}
HOSTILE = "</title><script>alert(1)</script>\"'&"


class Tags(HTMLParser):
    """Collects tags and text, and checks that every tag is closed in its order."""

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.attributes, self.text = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.attributes.extend(attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)
        self.attributes.extend(attrs)

    def handle_data(self, data):
        self.text.append(data)


def parsed(page):
    tags = Tags()
    tags.feed(page)
    tags.close()
    assert tags.open == []
    return tags


def full_report(name="lm"):
    shares = {"mf": 0.5, name: -0.25, "light": math.nan}
    rows = [Recommended(1, f"Alien {name}", 0.25, shares)]
    return Report(
        title=f"Run {name}",
        facts={"data": name},
        learning_curve=[
            CurvePoint(name, 1, train_loss=7.0),
            CurvePoint(name, 10, train_loss=5.5),
            CurvePoint(name, 10, valid_metric=0.061),
        ],
        table=[
            TableRow("mf", {"NDCG@10": (0.05, 0.04, 0.06), "AUC": (0.8, 0.79, 0.81)}),
            TableRow(name, {"NDCG@10": (0.07, 0.06, 0.08)}),
        ],
        weights_by_user=[
            WeightCurve("mf", [0, 10, 100], [0.0, 0.4, 0.9]),
            WeightCurve(name, [0, 10, 100], [1, 0.6, 0.2]),
        ],
        weights_by_item=[WeightCurve(name, [0], [1.0])],
        users=[Recommendations(f"User {name}", f"Seen: {name}", rows)],
        cold_items=[Recommendations("A new film", "", rows, column="For user")],
        seconds={"train": 61.25},
        next_commands=[f"recllm recommend {name}"],
    )


def svgs(page):
    return [ET.fromstring(text) for text in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)]


def test_the_page_is_closed_and_shows_every_part():
    tags = parsed(render(full_report()))
    text = " ".join(tags.text)
    for part in ("Metrics", "Learning curves", "Fusion weights", "Recommendations", "nobody has rated", "Next", "Time"):
        assert part in text
    assert "0.0700" in text
    assert "61.2 s" in text
    assert "For user" in tags.text
    assert "recllm recommend lm" in text


def test_titles_with_markup_stay_text():
    page = render(full_report(HOSTILE))
    tags = parsed(page)
    assert "script" not in tags.seen
    assert f"Alien {HOSTILE}" in tags.text
    assert len(svgs(page)) == 8  # each of them parses as XML


def test_a_chart_alone_is_a_picture_with_all_its_colours():
    lines = [charts.Line(f"scorer {place}", [0, 10], [0.0, place], place) for place in range(14)]
    text = charts.picture(charts.line_chart("Trials", lines, "trial", "AUC"))
    root = ET.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert set(re.findall(r"var\((--[\w-]+)\)", text)) <= set(re.findall(r"(--[\w-]+):", text))
    for kind in ("line", "grid", "muted"):
        assert f"svg .{kind} " in text
    strokes = re.findall(r'class="line" stroke="([^"]+)"', text)
    assert len(set(strokes)) == len(strokes) == 14


@pytest.mark.parametrize("palette", [charts.LIGHT, charts.DARK])
def test_every_colour_is_another_one(palette):
    assert len(set(palette)) == len(palette) == 14


def test_names_of_lines_stay_above_the_ticks():
    lines = [charts.Line(f"scorer {place}", [0, 10], [0.0, 1.0], place) for place in range(11)]
    chart = ET.fromstring(charts.line_chart("Weights", lines, "events", "weight"))
    names = [float(text.get("y")) for text in chart.iter("text") if text.text.startswith("scorer")]
    ticks = [float(text.get("y")) for text in chart.iter("text") if text.text == "10"]
    assert len(names) == 11
    assert max(names) <= min(ticks) - 12


def test_a_metric_that_nobody_has_is_explained_and_has_no_chart():
    nobody = {"AUC": (math.nan, math.nan, math.nan)}
    page = render(Report("Run", {}, table=[TableRow("mf", nobody)], unknown={"AUC": "not known, for one <label>"}))
    assert not svgs(page)
    assert "AUC: not known, for one &lt;label&gt;." in page
    assert "<td>–</td>" in page


def test_slices_have_their_tables():
    row = TableRow("mf", {"AUC": (0.5, 0.4, 0.6)})
    page = render(Report("Run", {}, table=[row], slices={"cold <item>: 7 rows of 5 users": [row]}))
    tags = parsed(page)
    assert "cold <item>: 7 rows of 5 users" in tags.text
    assert tags.seen.count("table") == 2


def test_the_page_asks_nothing_of_the_network_and_runs_no_script():
    page = render(full_report())
    tags = parsed(page)
    assert not {"script", "link", "img", "iframe", "object"} & set(tags.seen)
    assert not {"src", "href", "onload", "onclick"} & {name for name, _ in tags.attributes}
    assert "://" not in page
    assert "url(" not in page
    assert "@import" not in page


def test_every_chart_has_a_name_and_a_description():
    for chart in svgs(render(full_report())):
        assert chart.get("role") == "img"
        assert [child.tag for child in chart][:2] == ["title", "desc"]
        assert chart.findtext("title")


def test_parts_that_are_empty_are_left_out():
    page = render(Report("Run", {}))
    assert parsed(page).seen.count("section") == 0


def test_the_best_value_of_each_metric_is_bold_and_a_missing_one_is_a_dash():
    page = render(full_report())
    assert re.findall(r"<strong>(.*?)</strong>", page) == ["0.8000", "0.0700"]  # mf's row comes first
    assert "<td>–</td>" in page


def test_a_scorer_has_one_colour_on_the_whole_page():
    assert scorer_colours(full_report()) == {"mf": 0, "lm": 1, "light": 2}
    page = render(full_report())
    assert page.count('<span style="background:var(--scorer-1)"></span>lm') == 2


def test_share_scale_covers_the_longest_stacks_and_passes_over_nan():
    rows = [Recommended(1, "a", 0, {"x": 1.0, "y": -0.5, "z": math.nan}), Recommended(2, "b", 0, {"x": 1.0, "y": 2.0})]
    assert share_scale(rows) == (-0.5, 3.0)
    assert share_scale([]) == (0.0, 1.0)


def test_shares_stack_away_from_zero_on_both_sides():
    bar = ET.fromstring(charts.share_bar("t", {"a": 1.0, "b": -1.0, "c": 1.0}, -2.0, 2.0, {"a": 0, "b": 1, "c": 2}))
    boxes = [(float(box.get("x")), float(box.get("width"))) for box in bar.iter("rect")]
    assert boxes == [(200.0, 100.0), (100.0, 100.0), (300.0, 100.0)]
    assert [box.findtext("title") for box in bar.iter("rect")] == ["a +1.00", "b −1.00", "c +1.00"]
    assert [line.get("x1") for line in bar.iter("line")] == ["200.0"]


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0, 0.07, [0, 0.02, 0.04, 0.06]),
        (-3, 9, [0, 5]),
        (2.1, 4.9, [3, 4]),
        (0, 10_000, [0, 2000, 4000, 6000, 8000, 10_000]),
    ],
)
def test_ticks_are_round(low, high, ticks):
    assert charts.round_ticks(low, high) == pytest.approx(ticks)


def test_count_ticks_begin_at_zero_and_end_inside():
    assert charts.count_ticks(100) == [0, 1, 3, 10, 30, 100]
    assert charts.count_ticks(0) == [0]
    axis = charts.Axis(0, 99, 0, 200, counts=True)
    assert axis.place(9) == pytest.approx(100)


@pytest.mark.parametrize(
    "values", [[], [3.0], [0.0, 0.0], [math.nan], [5.0, 5.0 + 1e-16], [-1e-12, 1e-12], [1e9, 1e9 + 1]]
)
def test_an_axis_is_never_empty(values):
    low, high = charts.widened(values)
    assert low < high
    assert 1 < len(charts.round_ticks(low, high)) < 12
    assert all(low <= value <= high for value in values if math.isfinite(value))


@pytest.mark.parametrize(
    ("value", "step", "text"),
    [
        (0.0712, None, "0.0712"),
        (1234.5, None, "1,234"),
        (-0.5, 0.1, "−0.5"),
        (-0.001, 0.1, "0.0"),
        (0.30000000000000004, 0.1, "0.3"),
        (2000, 1000, "2,000"),
        (math.nan, None, "–"),
        (0, None, "0"),
    ],
)
def test_numbers_are_written_to_be_read(value, step, text):
    assert charts.number(value, step) == text


def test_a_line_leaves_out_what_is_not_finite_and_names_its_end():
    line = charts.Line("mf", [0, 1, 2], [1.0, math.nan, 3.0], 4)
    chart = ET.fromstring(charts.line_chart("t", [line], "step", "loss"))
    (polyline,) = chart.iter("polyline")
    assert len(polyline.get("points").split()) == 2
    assert polyline.get("stroke") == "var(--scorer-4)"
    assert "mf" in [text.text for text in chart.iter("text")]


def test_end_labels_do_not_overlap_and_stay_inside():
    lines = [charts.Line(f"scorer {index}", [0, 1], [0.5, 0.5], index) for index in range(6)]
    chart = ET.fromstring(charts.line_chart("t", lines, "events", "weight"))
    heights = sorted(float(text.get("y")) for text in chart.iter("text") if (text.text or "").startswith("scorer"))
    assert min(after - before for before, after in itertools.pairwise(heights)) >= 14
    assert heights[-1] <= 190


def test_bars_begin_at_zero_and_carry_their_interval():
    bars = [charts.Bar("mf", 0.5, 0.4, 0.6, 0), charts.Bar("none", math.nan, math.nan, math.nan, 1)]
    chart = ET.fromstring(charts.interval_bars("t", bars))
    (box,) = chart.iter("rect")
    halo, whisker = chart.iter("path")
    assert halo.get("d") == whisker.get("d")
    zero = float(next(line for line in chart.iter("line")).get("x1"))
    assert float(box.get("x")) == zero
    ends = [float(end) for end in re.findall(r"[MH]([\d.]+)", whisker.get("d"))[:2]]
    assert ends[0] < zero + float(box.get("width")) < ends[1]


def test_write_report_makes_the_folder(tmp_path):
    path = tmp_path / "new" / "report.html"
    write_report(path, full_report())
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old", encoding="utf-8")

    def full(self, text, **_):
        self.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="no space"):
        write_report(path, full_report())
    assert path.read_bytes() == b"old"
    assert [own.name for own in tmp_path.iterdir()] == ["report.html"]

"""The quickstart on small models in place of fetched ones: every stage, the bars from what was measured, the page."""

import json
import re

import pytest

from recllm.errors import RecllmError
from recllm.quickstart import bars, quickstart, quickstart_run
from recllm.runs import load_run


@pytest.fixture(scope="module")
def walked(tmp_path_factory, small_cache):
    """A quickstart of four steps: its folder, the lines it said and what it returned."""
    place = tmp_path_factory.mktemp("quickstart")
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECLLM_CACHE", str(small_cache))
        patch.delenv("RECLLM_DATA", raising=False)
        result = quickstart(place / "runs" / "demo", steps=4, say=said.append)
    return place / "runs" / "demo", said, result


def test_it_returns_what_json_can_hold(walked):
    folder, _, result = walked
    assert json.loads(json.dumps(result)).keys() == {"metrics", "parity", "paths", "seconds", "bars"}
    assert {row["scorer"] for row in result["metrics"]["test"]["rows"]} >= {"popularity", "mf", "light", "lm", "fusion"}
    assert set(result["bars"]) == {
        "seconds_total",
        "ndcg_ratio_fusion_to_mf",
        "fusion_not_below_a_scorer",
        "fusion_best_on_validation",
    }
    assert all(bar.keys() >= {"value", "bar", "holds"} for bar in result["bars"].values())
    assert result["bars"]["fusion_best_on_validation"]["holds"] is True
    assert result["paths"]["run"] == str(folder)


def test_it_recommends_to_three_users_and_places_a_new_item(walked):
    _, said, _ = walked
    assert len([line for line in said if re.match(r"\s+User \d+, \d+ events", line)]) == 3
    assert any("New item: The Matrix (1999)" in line for line in said)
    shares = [line for line in said if " = popularity " in line]
    for line in shares:
        score, parts = line.rsplit(" = ", 1)
        assert float(score.split()[-1]) == pytest.approx(sum(map(float, re.findall(r"[+-]\d+\.\d+", parts))), abs=0.05)
    assert len(shares) >= 3


def test_the_page_stands_alone(walked):
    folder, _, _ = walked
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"(src|href)=[\"']https?:", page)
    for heading in ("Metrics", "Learning curves", "Fusion weights", "Recommendations"):
        assert heading in page


def test_only_a_quickstart_is_replaced_by_one(walked, tiny_run, tmp_path):
    folder, _, _ = walked
    assert load_run(folder).train == quickstart_run(folder, 4, 0).train
    with pytest.raises(RecllmError, match=r"holds something that is not a quickstart's\. Name another folder: --out"):
        quickstart(tiny_run, steps=4)
    (tmp_path / "thesis.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(RecllmError, match=r"is not a quickstart's"):
        quickstart(tmp_path, steps=4)
    assert (tiny_run / "fusion.json").is_file()


def test_bars_are_computed_from_the_tables():
    class Figures:
        scorers = ("mf unfaded", "light", "fusion")

        def __init__(self, mf, light, fusion):
            self.values = {"mf unfaded": mf, "light": light, "fusion": fusion}

        def interval(self, name, _metric):
            return (self.values[name], 0.0, 1.0)

        def difference(self, a, b, _metric):
            gap = self.values[a] - self.values[b]
            return gap, gap - 0.01, gap + 0.01

    good = bars({"test": Figures(mf=0.1, light=0.2, fusion=0.2), "valid": Figures(mf=0.1, light=0.2, fusion=0.2)}, 9.0)
    assert all(bar["holds"] for bar in good.values())
    bad = bars({"test": Figures(mf=0.1, light=0.2, fusion=0.1), "valid": Figures(mf=0.1, light=0.2, fusion=0.1)}, 999.0)
    assert not any(bar["holds"] for bar in bad.values())

"""Make the tables of README.md and docs/quality.md from benchmarks/results/: `python benchmarks/tables.py [--check]`.

A table stands between `<!-- table NAME -->` and `<!-- end -->`; everything in between is written anew.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs" / "quality.md")
PLACE = re.compile(r"(<!-- table ([^\n]+?) -->\n).*?(<!-- end -->)", re.DOTALL)
Result = dict[str, Any]


def results() -> dict[str, Result]:
    """Every kept result, by the name of its file."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(_folder().glob("*.json"))}


def _folder() -> Path:
    return Path(__file__).parent / "results"


def rows_of(result: Result, part: str = "all", row_slice: str = "all") -> dict[str, dict[str, Any]]:
    """The rows of one table by scorer."""
    rows = result["tables"][part]["rows"]
    return {row["scorer"]: row for row in rows if row["slice"] == row_slice}


def figure(interval: list[float | None]) -> str:
    """A figure with its interval."""
    value, low, high = interval
    if value is None:  # no user with both labels, as one
        return "–"
    ends = "" if low is None or high is None else f" ({low:.3f} … {high:.3f})"
    return f"{value:.4f}{ends}".replace("0.", ".")


def best_reference(rows: dict[str, dict[str, Any]], metric: str) -> str:
    """The reference with the highest figure."""
    return max((name for name in rows if name.startswith("ref ")), key=lambda name: rows[name][metric][0])


def summary(found: dict[str, Result]) -> Iterator[str]:
    """One line per ranking result: the best reference beside the fusion."""
    yield "| set | best reference | its NDCG@10 | fusion without LM | fusion NDCG@10 | HitRate@10 | ratio | seeds |"
    yield "|---|---|---|---|---|---|---|---|"
    for name, result in found.items():
        if result["protocol"] != "topk" or name.endswith("quick"):
            continue
        rows = rows_of(result)
        if not any(scorer.startswith("ref ") for scorer in rows):
            continue  # run to see what the language model adds, without references
        best = best_reference(rows, "NDCG@10")
        ratio = rows["fusion"]["NDCG@10"][0] / rows[best]["NDCG@10"][0]
        without = figure(rows["fusion without lm"]["NDCG@10"]) if "fusion without lm" in rows else "–"
        cells = [
            result["data"],
            best.removeprefix("ref "),
            figure(rows[best]["NDCG@10"]),
            without,
            figure(rows["fusion"]["NDCG@10"]),
            figure(rows["fusion"]["HitRate@10"]),
            f"{ratio:.2f}",
            str(len(result["seeds"])),
        ]
        yield f"| {' | '.join(cells)} |"


def full(result: Result, part: str = "all") -> Iterator[str]:
    """Every scorer of one result."""
    rows = rows_of(result, part)
    metrics = ["AUC", "UAUC"] if "AUC" in result["tables"][part]["metrics"] else ["HitRate@10", "NDCG@10", "MRR"]
    yield f"| scorer | {' | '.join(metrics)} |"
    yield "|---" * (len(metrics) + 1) + "|"
    for name, row in rows.items():
        yield f"| {name} | {' | '.join(figure(row[metric]) for metric in metrics)} |"


def bars(found: dict[str, Result]) -> Iterator[str]:
    """Every bar of every result, whether it holds or not."""
    yield "| result | bar | asked | measured | holds |"
    yield "|---|---|---|---|---|"
    for name, result in found.items():
        for bar, facts in result["bars"].items():
            value = "–" if facts["value"] is None else facts["value"]  # against a figure of 0
            yield f"| {name} | {bar} | {facts['bar']} | {value} | {'yes' if facts['holds'] else 'no'} |"


def fading(found: dict[str, Result]) -> Iterator[str]:
    """NDCG@10 on validation without fading and with the best half-life, by set and scorer: means over the seeds."""
    yield "| set | scorer | nothing fades | best | half-life of the best |"
    yield "|---|---|---|---|---|"
    shown: dict[str, str] = {}
    for name, result in found.items():
        if result["protocol"] != "topk" or name.endswith("quick") or result.get("control"):
            continue
        # Of several results of a set its plain one, which has the shortest name.
        shown[result["data"]] = min(shown.get(result["data"], name), name, key=len)
    for name in shown.values():
        result = found[name]
        for scorer, first in result["half_lives"][0].items():
            seeds = [own[scorer] for own in result["half_lives"]]
            figures = {key: sum(own[key] for own in seeds) / len(seeds) for key in first}
            if not figures:
                continue  # popularity of events without times
            best = max(figures, key=figures.__getitem__)
            plain = figure([figures["None"], None, None]) if "None" in figures else "–"
            unit = "day" if scorer == "popularity" else "event"
            half_life = "–" if best == "None" else f"{float(best):g} {unit}{'' if float(best) == 1.0 else 's'}"
            cells = [result["data"], scorer, plain, figure([figures[best], None, None]), half_life]
            yield f"| {' | '.join(cells)} |"


def fusions(found: dict[str, Result]) -> Iterator[str]:
    """Validation figures of every fusion that was tried, the mean over the seeds."""
    kinds = list(dict.fromkeys(kind for each in found.values() for own in each["fusion"] for kind in own["candidates"]))
    kinds = [kind for kind in kinds if not kind.startswith("only ")]
    yield f"| result | best single | {' | '.join(kinds)} |"
    yield "|---" * (len(kinds) + 2) + "|"
    for name, result in found.items():
        if result.get("control"):
            continue  # chosen for what lacks a part
        tried = [own["candidates"] for own in result["fusion"]]
        single = [max(value for kind, value in own.items() if kind.startswith("only ")) for own in tried]
        cells = [figure([sum(single) / len(single), None, None])]
        for kind in kinds:
            known = [own[kind] for own in tried if kind in own]
            cells.append(figure([sum(known) / len(known), None, None]) if known else "–")
        yield f"| {name} | {' | '.join(cells)} |"


def curve(found: dict[str, Result], part: str = "all") -> Iterator[str]:
    """The cold-item results by the number of events that were given back, ranked among the items of `part`."""
    kept = {
        (result["data"], int(events[1])): result
        for name, result in found.items()
        if result["protocol"] == "cold-item" and (events := re.search(r"-(\d+)-events$", name))
    }
    shown = ("text", "neighbours", "mf", "ease", "transitions", "light", "lm", "fusion")
    yield f"| set | events | {' | '.join(shown)} |"
    yield "|---" * (len(shown) + 2) + "|"
    for (data, events), result in sorted(kept.items(), key=lambda entry: entry[0]):
        rows = rows_of(result, part)
        cells = [figure([rows[name]["NDCG@10"][0], None, None]) if name in rows else "–" for name in shown]
        yield f"| {data} | {events} | {' | '.join(cells)} |"


def controls(found: dict[str, Result]) -> Iterator[str]:
    """What is left where a part was taken away, under the result of the same set and protocol with all of it.

    Cold items are ranked among themselves: among all items hardly one of them is in a list of ten.
    """
    lacking: dict[str, list[str]] = {}
    for name, result in found.items():
        if result.get("control"):
            lacking.setdefault(name.replace(f"-{result['control']}", ""), []).append(name)
    shown = ("light", "lm", "likelihood", "fusion without lm", "fusion")
    yield f"| result | seeds | lacks | {' | '.join(shown)} | the language model adds |"
    yield "|---" * (len(shown) + 4) + "|"
    for whole, others in lacking.items():
        for name in [own for own in (whole,) if own in found and own not in others] + others:
            result = found[name]
            part = "among cold items" if "among cold items" in result["tables"] else "all"
            rows, metric = rows_of(result, part), "AUC" if "AUC" in result["tables"][part]["metrics"] else "NDCG@10"
            cells = [figure([rows[scorer][metric][0], None, None]) if scorer in rows else "–" for scorer in shown]
            adds = result["differences"][part].get("fusion without lm")
            cells.append("–" if adds is None else "{:+.4f} ({:+.4f} … {:+.4f})".format(*adds))
            yield f"| {whole} | {len(result['seeds'])} | {result.get('control') or 'nothing'} | {' | '.join(cells)} |"


def table(name: str, found: dict[str, Result]) -> list[str]:
    """The lines of a table: `summary`, `bars` and so on, or a result's name, with or without a part behind a colon."""
    special: dict[str, Callable[[dict[str, Result]], Iterator[str]]] = {
        "summary": summary,
        "bars": bars,
        "fading": fading,
        "fusions": fusions,
        "controls": controls,
        "curve": curve,
        "curve: among cold items": partial(curve, part="among cold items"),
    }
    if name in special:
        return list(special[name](found))
    result, _, part = name.partition(": ")
    if result not in found:
        sys.exit(f"There is no result '{result}'; kept are: {', '.join(found)}.")
    return [*full(found[result], part or "all"), "", f"`{found[result]['command']}`"]


def written(text: str, found: dict[str, Result]) -> str:
    """The page with its tables made anew."""
    return PLACE.sub(lambda place: f"{place[1]}{chr(10).join(table(place[2], found))}\n{place[3]}", text)


def main() -> None:
    """Write the pages, or only say whether they are as the results are."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where a page is behind")
    check = parser.parse_args().check
    found = results()
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        new = written(text, found)
        if new != text and check:
            sys.exit(f"{page.name} is not what benchmarks/results/ says. Run: python benchmarks/tables.py")
        page.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()

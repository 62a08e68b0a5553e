"""The report of a run: one HTML file without network or scripts, with curves, metrics, fusion weights and shares."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from recllm import charts
from recllm.files import written

Interval = tuple[float, float, float]
"""A value and the two ends of its confidence interval."""


@dataclass(frozen=True)
class CurvePoint:
    """What was logged of `scorer` at a training step; None for what was not."""

    scorer: str
    step: int
    train_loss: float | None = None
    valid_metric: float | None = None


@dataclass(frozen=True)
class TableRow:
    """The metrics of one scorer, by metric name."""

    scorer: str
    metrics: Mapping[str, Interval]


@dataclass(frozen=True)
class WeightCurve:
    """The fusion's weight of one scorer against a number of events."""

    scorer: str
    counts: Sequence[float]
    weights: Sequence[float]


@dataclass(frozen=True)
class Recommended:
    """One recommended item; the shares add up to the score."""

    rank: int
    title: str
    score: float
    shares: Mapping[str, float]


@dataclass(frozen=True)
class Recommendations:
    """A ranked list with what it was made from: the user's history, or an item's text.

    `column` heads the titles: a new item's list may name the users that it suits.
    """

    name: str
    context: str
    rows: Sequence[Recommended]
    column: str = "Title"


@dataclass(frozen=True)
class Report:
    """All that the page shows, as plain data; an empty part is left out of the page.

    `table` is of all rows and `slices` of some, by what they are; `unknown` says of a metric why no scorer has it, and
    `ahead` by scorer what the fusion is ahead by.
    """

    title: str
    facts: Mapping[str, str]
    learning_curve: Sequence[CurvePoint] = ()
    valid_metric: str = "NDCG@10"
    table: Sequence[TableRow] = ()
    slices: Mapping[str, Sequence[TableRow]] = field(default_factory=dict)
    unknown: Mapping[str, str] = field(default_factory=dict)
    ahead: Mapping[str, str] = field(default_factory=dict)
    weights_by_user: Sequence[WeightCurve] = ()
    weights_by_item: Sequence[WeightCurve] = ()
    users: Sequence[Recommendations] = ()
    cold_items: Sequence[Recommendations] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    seconds_note: str = ""
    next_commands: Sequence[str] = ()


def write_report(path: Path, report: Report) -> None:
    """Write the page to `path`; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    page = render(report)
    with written(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def render(report: Report) -> str:
    """The page as text; everything that comes from data is escaped."""
    colours = scorer_colours(report)
    seconds = {name: f"{value:,.1f} s" for name, value in report.seconds.items()}
    scale = share_scale(row for part in (*report.users, *report.cold_items) for row in part.rows)
    sections = [
        _section("Metrics", METRICS_NOTE, _metrics(report, colours)),
        _section("What the fusion is ahead by", AHEAD_NOTE, _pairs(report.ahead)),
        _section("Learning curves", CURVES_NOTE, _curves(report, colours)),
        _section("Fusion weights", WEIGHTS_NOTE, _weights(report, colours)),
        _section("Recommendations", SHARES_NOTE, _lists(report.users, scale, colours)),
        _section("Items that nobody has rated", COLD_NOTE, _lists(report.cold_items, scale, colours)),
        _section("Next", "", "".join(f"<pre><code>{escape(line)}</code></pre>" for line in report.next_commands)),
        _section("Time", report.seconds_note, _pairs(seconds)),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(report.title)}</title><style>{STYLE}</style></head>\n"
        f"<body><main><h1>{escape(report.title)}</h1>{_pairs(report.facts)}\n{''.join(sections)}</main></body></html>\n"
    )


def scorer_colours(report: Report) -> dict[str, int]:
    """One colour number per scorer, the same in every chart, in the order of first appearance."""
    names = [row.scorer for row in report.table]
    names += [curve.scorer for curve in (*report.weights_by_user, *report.weights_by_item)]
    names += [point.scorer for point in report.learning_curve]
    names += [name for part in (*report.users, *report.cold_items) for row in part.rows for name in row.shares]
    return {name: index for index, name in enumerate(dict.fromkeys(names))}


def share_scale(rows: Iterable[Recommended]) -> tuple[float, float]:
    """The scale of all share bars: the largest sum of negative shares and of positive ones, with zero inside."""
    low, high = 0.0, 0.0
    for row in rows:
        known = [share for share in row.shares.values() if math.isfinite(share)]
        low = min(low, sum(share for share in known if share < 0))
        high = max(high, sum(share for share in known if share > 0))
    return (low, high) if high > low else (0.0, 1.0)


METRICS_NOTE = (
    "Bars begin at zero; whiskers are 95% intervals over users. The best value of a column is bold. Where items are "
    "ranked, a row of which a scorer knows nothing counts as a miss."
)
AHEAD_NOTE = (
    "The fusion less each other row of the table, on the same rows, with the 95 % interval of a paired bootstrap over "
    "users. Where it reaches below zero, this measurement does not tell the two apart."
)
CURVES_NOTE = "Training loss, and the metric on validation."
WEIGHTS_NOTE = "How much a scorer counts, by how many events are known. Fitted on validation."
SHARES_NOTE = (
    "Each score is exactly the sum of its shares: to the right of the line they raise it, to the left they lower it."
)
COLD_NOTE = "No event is known of them; they are known by their text alone."


def _section(title: str, note: str, body: str) -> str:
    if not body:
        return ""
    lead = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{lead}{body}</section>\n"


def _pairs(pairs: Mapping[str, str]) -> str:
    rows = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in pairs.items())
    return f"<dl>{rows}</dl>" if rows else ""


def _figures(pictures: Mapping[str, str]) -> str:
    figures = [f"<figure><figcaption>{escape(name)}</figcaption>{svg}</figure>" for name, svg in pictures.items()]
    return f'<div class="charts">{"".join(figures)}</div>' if figures else ""


def _metric_names(table: Sequence[TableRow]) -> list[str]:
    return list(dict.fromkeys(name for row in table for name in row.metrics))


def _metrics(report: Report, colours: Mapping[str, int]) -> str:
    parts = [_metric_charts(report.table, colours), _metric_table(report.table)]
    parts += [f'<p class="note">{escape(f"{metric}: {why}.")}</p>' for metric, why in report.unknown.items()]
    for name, rows in report.slices.items():
        parts.append(f"<h3>{escape(name)}</h3>{_metric_table(rows, name)}")
    return "".join(parts)


def _metric_charts(table: Sequence[TableRow], colours: Mapping[str, int]) -> str:
    pictures = {}
    for metric in _metric_names(table):
        if not any(math.isfinite(row.metrics[metric][0]) for row in table if metric in row.metrics):
            continue
        found = [(row.scorer, row.metrics[metric]) for row in table if metric in row.metrics]
        pictures[metric] = charts.interval_bars(
            f"{metric} by scorer", [charts.Bar(name, *values, colours[name]) for name, values in found]
        )
    return _figures(pictures)


def _metric_table(table: Sequence[TableRow], part: str = "all rows") -> str:
    metrics = _metric_names(table)
    if not metrics:
        return ""
    best = {name: max((row.metrics[name][0] for row in table if name in row.metrics), default=0.0) for name in metrics}
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in metrics)
    rows = []
    for row in table:
        cells = "".join(_metric_cell(row.metrics.get(name), best[name]) for name in metrics)
        rows.append(f'<tr><th scope="row">{escape(row.scorer)}</th>{cells}</tr>')
    return _table(f'<th scope="col">Scorer</th>{head}', rows, f"Metrics with their intervals, {part}")


def _metric_cell(interval: Interval | None, best: float) -> str:
    if interval is None or not math.isfinite(interval[0]):
        return "<td>–</td>"
    value, low, high = interval
    shown = f"<strong>{value:.4f}</strong>" if value == best else f"{value:.4f}"
    return f"<td>{shown}<small>{low:.4f}–{high:.4f}</small></td>"


def _table(head: str, rows: Sequence[str], name: str) -> str:
    # A wide table scrolls in its own box, which the keyboard must be able to reach.
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(name)}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _curves(report: Report, colours: Mapping[str, int]) -> str:
    pictures = {}
    for scorer in dict.fromkeys(point.scorer for point in report.learning_curve):
        points = [point for point in report.learning_curve if point.scorer == scorer]
        for what, values in (
            ("training loss", [(point.step, point.train_loss) for point in points]),
            (f"{report.valid_metric} on validation", [(point.step, point.valid_metric) for point in points]),
        ):
            known = [(step, value) for step, value in values if value is not None]
            if known:
                name = f"{scorer}: {what}"
                steps, heights = [float(step) for step, _ in known], [value for _, value in known]
                # The panel's caption names the scorer; the line's label is free for its last value.
                line = charts.Line(charts.number(heights[-1]), steps, heights, colours[scorer])
                pictures[name] = charts.line_chart(name, [line], "step", what)
    return _figures(pictures)


def _weights(report: Report, colours: Mapping[str, int]) -> str:
    pictures = {}
    for of, curves in (("user", report.weights_by_user), ("item", report.weights_by_item)):
        if curves:
            lines = [charts.Line(curve.scorer, curve.counts, curve.weights, colours[curve.scorer]) for curve in curves]
            name = f"by the number of events of the {of}"
            pictures[name.capitalize()] = charts.line_chart(
                f"Fusion weights {name}", lines, f"events of the {of}", "weight", counts=True
            )
    return _figures(pictures)


def _lists(parts: Sequence[Recommendations], scale: tuple[float, float], colours: Mapping[str, int]) -> str:
    names = dict.fromkeys(name for part in parts for row in part.rows for name in row.shares)
    swatches = "".join(
        f'<li><span style="background:{charts.colour(colours[name])}"></span>{escape(name)}</li>' for name in names
    )
    legend = f'<ul class="legend">{swatches}</ul>' if swatches else ""
    return legend + "".join(_list(part, scale, colours) for part in parts)


def _list(part: Recommendations, scale: tuple[float, float], colours: Mapping[str, int]) -> str:
    rows = []
    for row in part.rows:
        bar = charts.share_bar(f"Shares of {row.title}", row.shares, *scale, colours)
        shares = " · ".join(f"{name} {charts.signed(share)}" for name, share in row.shares.items())
        rows.append(
            f'<tr><td>{row.rank}</td><td class="title">{escape(row.title)}</td><td>{charts.signed(row.score)}</td>'
            f'<td class="bar">{bar}<small>{escape(shares)}</small></td></tr>'
        )
    columns = (("Rank", ""), (part.column, "title"), ("Score", ""), ("Shares", "bar"))
    head = "".join(f'<th scope="col" class="{style}">{escape(name)}</th>' for name, style in columns)
    context = f'<p class="note">{escape(part.context)}</p>' if part.context else ""
    return f"<h3>{escape(part.name)}</h3>{context}" + _table(head, rows, f"Recommendations: {part.name}")


STYLE = f"""
:root {{ color-scheme: light dark; --box: #f5f7f9; {charts.colours_of(charts.LIGHT, charts.INK)} }}
@media screen and (prefers-color-scheme: dark) {{
  :root {{ --box: #1c222b; {charts.colours_of(charts.DARK, charts.DARK_INK)} }} }}
@media print {{ * {{ print-color-adjust: exact; -webkit-print-color-adjust: exact; }}
  figure, tr {{ break-inside: avoid; }} h2, h3, .note {{ break-after: avoid; }} }}
{charts.STYLE}"""
STYLE += """
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 64rem; margin: 0 auto; padding: 2rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 1rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .25rem; border-top: 1px solid var(--rule); padding-top: 1rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 0; }
.note, small, dt { color: var(--muted); }
.note { margin: 0 0 .75rem; overflow-wrap: anywhere; }
small { display: block; font-size: .75rem; font-variant-numeric: tabular-nums; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 13rem), 1fr)); gap: .5rem 1.5rem;
  margin: 0; }
dt { font-size: .8rem; } dd { margin: 0; overflow-wrap: anywhere; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)); gap: 1.25rem 2rem; }
figure { margin: 0; } figcaption { font-weight: 600; margin-bottom: .25rem; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg.shares { height: 16px; }
td:not(.bar) small { white-space: nowrap; }
.scroll { overflow-x: auto; margin-top: 1rem; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .35rem .6rem; border-bottom: 1px solid var(--rule); vertical-align: top; }
thead th { color: var(--muted); font-weight: 500; }
tbody th, th:first-child, td:first-child, .title, .bar { text-align: left; }
td:first-child { width: 3.5rem; }
.title { min-width: 9rem; }
.bar { width: 50%; min-width: 13rem; }
.legend { display: flex; flex-wrap: wrap; gap: .25rem 1rem; list-style: none; margin: 0; padding: 0; font-size: .9rem; }
.legend span { display: inline-block; width: .8rem; height: .8rem; margin-right: .4rem; vertical-align: -.05rem; }
pre { background: var(--box); padding: .6rem .8rem; margin: .5rem 0; overflow-x: auto; }
"""

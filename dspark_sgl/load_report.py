"""The report of `bench load` as one HTML page: pictures inside, no script, nothing from the network, fit for a phone.

Only draws what the JSON says.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from html import escape
from typing import Any

from .frontier import MEANING
from .load_client import by_load
from .picture import new_figure

Entry = dict[str, Any]

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; color: #222; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
figure { margin: 0; } svg { width: 100%; height: auto; } figcaption { color: #555; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } tr.load th { text-align: left; padding-top: 1rem; }
"""


def check() -> None:
    """Before the minutes of a run: the pictures can be drawn."""
    new_figure("--html", 1, 1)


def page(report: dict[str, Any]) -> str:
    """HTML of what `dspark-sgl bench load` writes as JSON."""
    points, run = report["points"], report["run"]
    arms = list(dict.fromkeys(point["arm"] for point in points))
    versions = ", ".join(f"{name} {number}" for name, number in run["versions"].items())
    about = (
        f"{run['model']}, {run['prompts']['count']} prompts of {run['prompts']['file']}, {run['max_new_tokens']} "
        f"output tokens on average; medians of {run['passes']} passes, arms in turn; {run['date']}; {versions}"
    )
    figures = "\n".join(
        f'<figure id="{name}"><h2>{escape(title)}</h2>{drawing}<figcaption>{escape(caption)}</figcaption></figure>'
        for name, title, caption, drawing in _figures(points, arms)
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Under load: {escape(run['model'])}</title><style>{STYLE}</style></head><body>\n"
        f"<h1>Under load: {escape(run['model'])}</h1>\n<p>{escape(about)}</p>\n{figures}\n"
        f"<h2>Frontiers</h2>{_frontiers(report)}\n"
        f"<h2>All figures</h2><div class=wide>{_table(points)}</div>\n</body></html>\n"
    )


# -- Pictures ----------------------------------------------------------------------------------------------------------


def _figures(points: Sequence[Entry], arms: Sequence[str]) -> Iterator[tuple[str, str, str, str]]:
    """Name, title, caption, SVG."""
    yield (
        "frontier",
        "Throughput against speed for one user",
        "Up and to the right is better. Each dot is a load; bars span the passes.",
        _drawn(points, arms, _frontier, "tokens per second for one user", "output tokens per second", log=False),
    )
    yield (
        "throughput",
        "Throughput against load",
        "Bars span the passes.",
        _drawn(points, arms, _over_load("output_tps"), _load_axis(points), "output tokens per second"),
    )
    yield (
        "depth",
        "Depth against load",
        "Drafts verified per request and step, plain steps included.",
        _drawn(points, arms, _over_load("depth"), _load_axis(points), "drafts per request"),
    )
    yield (
        "survival",
        "Acceptance by position",
        "Share of rounds that accepted k drafts or more, at the lightest load.",
        _drawn(points, arms, _survival, "k", "share of rounds", log=False),
    )
    yield (
        "reliability",
        "Predicted and observed survival",
        "Drafts by the chance they were verified for, all loads; a larger dot is more drafts. On the line: calibrated.",
        _drawn(points, arms, _reliability, "predicted", "accepted", log=False),
    )
    for name, title in (("ttft_ms", "Time to first token"), ("itl_ms", "Time between tokens")):
        caption = "Lines: median; thin: 99th percentile. Milliseconds."
        yield name, title, caption, _drawn(points, arms, _percentiles(name), _load_axis(points), "ms")


Draw = Callable[[Any, Sequence[Entry], str, str], None]
"""Axes, one arm's points, its name and its colour."""


def _drawn(points: Sequence[Entry], arms: Sequence[str], draw: Draw, x: str, y: str, log: bool = True) -> str:
    figure = new_figure("--html", 8, 4.5)
    axes = figure.add_subplot(xlabel=x, ylabel=y)
    for number, arm in enumerate(arms):
        draw(axes, [point for point in points if point["arm"] == arm], arm, f"C{number}")
    if log:
        loads = sorted({_load(point) for point in points})
        axes.set_xscale("log", base=2)
        axes.set_xticks(loads, [f"{load:g}" for load in loads])
    else:
        axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    # Several pictures on one page must not share the names that clip paths and glyphs go by.
    prefix = f"{re.sub('[^a-z]', '', y)}{len(svg)}-"
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}", svg[svg.index("<svg") :])
    return re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)


def _load(point: Entry) -> float:
    return float(point["concurrency"] if point["rate"] is None else point["rate"])


def _load_axis(points: Sequence[Entry]) -> str:
    return "users at once" if points[0]["rate"] is None else "requests per second"


def _bars(points: Sequence[Entry], name: str) -> list[list[float]]:
    """What `errorbar` takes: how far the least and the most lie from the median."""
    spreads = [(point[name], *point[f"{name}_spread"]) for point in points]
    return [[middle - least for middle, least, _ in spreads], [most - middle for middle, _, most in spreads]]


def _frontier(axes: Any, points: Sequence[Entry], arm: str, colour: str) -> None:
    x, y = [point["tps_per_user"] for point in points], [point["output_tps"] for point in points]
    bars = {"xerr": _bars(points, "tps_per_user"), "yerr": _bars(points, "output_tps")}
    axes.errorbar(x, y, **bars, fmt="o-", markersize=4, elinewidth=0.8, color=colour, label=arm)


def _over_load(name: str) -> Draw:
    def draw(axes: Any, points: Sequence[Entry], arm: str, colour: str) -> None:
        bars = _bars(points, name) if f"{name}_spread" in points[0] else None
        x, y = [_load(point) for point in points], [point[name] for point in points]
        axes.errorbar(x, y, yerr=bars, fmt="o-", markersize=4, elinewidth=0.8, color=colour, label=arm)

    return draw


def _survival(axes: Any, points: Sequence[Entry], arm: str, colour: str) -> None:
    known = points[0]["survival"]
    if known:
        axes.plot(range(1, 1 + len(known)), known, "o-", markersize=4, color=colour, label=arm)


def _reliability(axes: Any, points: Sequence[Entry], arm: str, colour: str) -> None:
    axes.axline((0, 0), slope=1, color="0.8", linewidth=0.8, zorder=0)
    bins = [row for point in points for row in zip(*point["reliability"].values(), strict=True)]
    if bins:
        predicted, observed, count = zip(*bins, strict=True)
        areas = [60 * n / max(count) for n in count]
        axes.scatter(predicted, observed, areas, color=colour, alpha=0.6, label=arm)


def _percentiles(name: str) -> Draw:
    def draw(axes: Any, points: Sequence[Entry], arm: str, colour: str) -> None:
        x = [_load(point) for point in points]
        axes.plot(x, [point[name]["p50"] for point in points], "o-", markersize=4, color=colour, label=arm)
        axes.plot(x, [point[name]["p99"] for point in points], "-", linewidth=0.7, color=colour)

    return draw


# -- The tables --------------------------------------------------------------------------------------------------------


def _frontiers(report: dict[str, Any]) -> str:
    first, *others = report["frontier"]
    rows = [["arm", "area", *(label for label, _ in by_load(report["points"]))]]
    for arm in others:
        told = report["frontier"][arm]
        ratios = [told["area"], *told["matched"]]
        rows.append([escape(arm), *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios)])
    cells = ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows]
    return f"<p>{escape(MEANING.format(first=first))}</p><div class=wide><table>{''.join(cells)}</table></div>"


def _table(points: Sequence[Entry]) -> str:
    titles = (
        *("arm", "tokens/s", "least", "most", "for a user", "depth", "plain steps", "length"),
        *("TTFT p50", "p90", "p99", "ITL p50", "p90", "p99"),
    )
    rows = ["<tr>" + "".join(f"<th>{title}</th>" for title in titles) + "</tr>"]
    for label, mine in by_load(points):
        rows.append(f"<tr class=load><th colspan={len(titles)}>{label}</th></tr>")
        rows += ["<tr>" + "".join(f"<td>{cell}</td>" for cell in _cells(point)) + "</tr>" for point in mine]
    return f"<table>{''.join(rows)}</table>"


def _cells(point: Entry) -> list[str]:
    least, most = point["output_tps_spread"]
    length = "" if point["accepted_length"] is None else f"{point['accepted_length']:.2f}"
    times = [f"{point[name][p]:.0f}" for name in ("ttft_ms", "itl_ms") for p in ("p50", "p90", "p99")]
    speeds = [f"{value:.1f}" for value in (point["output_tps"], least, most, point["tps_per_user"])]
    return [escape(point["arm"]), *speeds, f"{point['depth']:.2f}", f"{point['plain_share']:.0%}", length, *times]

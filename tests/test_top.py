"""`dspark-sgl top` on two scrapes with known figures, and the dashboard's queries against the metrics that exist."""

from __future__ import annotations

import json
import re
from collections import deque
from importlib.util import find_spec
from pathlib import Path

import pytest
from prometheus_client import Counter, Gauge

from dspark_sgl.cli import main
from dspark_sgl.metrics import METRICS, PREFIX
from dspark_sgl.scrape import Scrape, Span
from dspark_sgl.top_command import BARS, frame, sparkline

DASHBOARD = Path(__file__).parent.parent / "docs" / "grafana.json"
BEFORE = """\
dspark_policy{dp_rank="0",digest="0123456789ab",name="adaptive"} 1
dspark_cost_ready{dp_rank="0"} 1
dspark_steps_total{dp_rank="0",kind="round"} 10
dspark_emitted_tokens_total{dp_rank="0",kind="round"} 100
dspark_draft_tokens_total{dp_rank="0",outcome="accepted"} 50
"""
AFTER = """\
dspark_policy{dp_rank="0",digest="0123456789ab",name="adaptive"} 1
dspark_policy{dp_rank="0",digest="ffffffffffff",name="latency"} 0
dspark_cost_ready{dp_rank="0"} 1
dspark_steps_total{dp_rank="0",kind="round"} 18
dspark_steps_total{dp_rank="0",kind="plain"} 2
dspark_emitted_tokens_total{dp_rank="0",kind="round"} 136
dspark_emitted_tokens_total{dp_rank="0",kind="plain"} 4
dspark_tokens_saved_total{dp_rank="0"} 20
dspark_draft_tokens_total{dp_rank="0",outcome="accepted"} 70
dspark_draft_tokens_total{dp_rank="0",outcome="rejected"} 30
dspark_accepted_length_sum{dp_rank="0"} 36
dspark_accepted_length_count{dp_rank="0"} 16
dspark_phase_seconds_total{dp_rank="0",phase="draft"} 0.1
dspark_phase_seconds_total{dp_rank="0",phase="round"} 3
sglang:num_running_reqs{dp_rank="0"} 1
sglang:num_running_reqs{dp_rank="1"} 1
sglang:token_usage{dp_rank="0"} 0.25
"""


def span() -> Span:
    return Span(Scrape.of(BEFORE, 100.0), Scrape.of(AFTER, 102.0))


def test_a_screen_shows_the_interval_and_not_the_past() -> None:
    screen = "\n".join(frame("http://here", span(), [10.0, 20.0], [2.5]))
    assert "adaptive (01234567)" in screen
    for row, figures in {
        "requests": ["2", "-", "25%"],
        "tokens/s": ["20.0", "10.0"],
        "depth": ["2.50"],
        "steps": ["5.0", "20%"],
        "drafts": ["25.0", "40%", "2.25"],
        "ms per step": ["10.0"],
    }.items():
        line = next(line for line in screen.splitlines() if line.startswith(row))
        assert re.findall(r"(?<=\s)(-|[\d.]+%?)(?=\s|$)", line.removeprefix(row))[: len(figures)] == figures
    assert "round" not in screen, "a whole step is no part of a step"
    assert "!" not in screen


def test_what_is_wrong_is_said() -> None:
    wrong = AFTER.replace('cost_ready{dp_rank="0"} 1', 'cost_ready{dp_rank="0"} 0') + (
        'dspark_policy_reloads_total{dp_rank="0",result="refused"} 3\ndspark_unsound_drafts_total{dp_rank="0"} 7\n'
    )
    screen = frame("http://here", Span(Scrape.of(BEFORE, 0.0), Scrape.of(wrong, 1.0)), deque(), deque())
    assert [line[:4] for line in screen if line.startswith("!")] == ["! 3 ", "! 7 ", "! no"]


def test_a_server_that_began_anew_does_not_count_backwards() -> None:
    anew = Span(Scrape.of(AFTER, 0.0), Scrape.of(BEFORE, 1.0))
    assert anew.grown("dspark_steps_total") == 10


def test_bars_are_as_high_as_their_values() -> None:
    assert sparkline([0, 4, 8]) == BARS[0] + BARS[4] + BARS[8]
    assert sparkline([]) == sparkline([0.0]) == ""


@pytest.mark.parametrize(
    ("argument", "said"),
    [(["--url", "http://127.0.0.1:9"], "is the server running"), (["--interval", "0"], "0.1 to 3600")],
)
def test_a_mistake_is_one_line(argument: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", "--once", *argument]) == 1
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def exported() -> set[str]:
    """Every sample name that a scraper sees of ours."""
    suffixes = {"counter": ("_total",), "gauge": ("",), "histogram": ("_sum", "_count", "_bucket")}
    return {PREFIX + metric.name + suffix for metric in METRICS for suffix in suffixes[metric.kind]}


def test_the_dashboard_asks_for_metrics_that_exist() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    queries = [target["expr"] for panel in panels for target in panel["targets"]]
    asked = {name for query in queries for name in re.findall(r"dspark_\w+", query)}
    assert asked <= exported()
    shown = {name.removesuffix(end) for name in asked for end in ("_total", "_sum", "_count", "_bucket")}
    assert {PREFIX + metric.name for metric in METRICS} <= shown | asked, "a metric that no panel shows"
    labels = {label for metric in METRICS for label in metric.labels} | {"instance", "dp_rank", "le"}
    for query in queries:
        assert set(re.findall(r"(\w+)(?:=~|!~|=|!=)\"", query)) <= labels
        assert query.count("(") == query.count(")") and query.count("{") == query.count("}")
    assert all(panel["description"] for panel in panels)


def test_sglangs_own_metrics_of_the_dashboard_are_sglangs() -> None:
    spec = find_spec("sglang")
    assert spec is not None and spec.submodule_search_locations is not None
    source = Path(spec.submodule_search_locations[0], "srt/observability/metrics_collector.py").read_text()
    asked = set(re.findall(r"sglang:\w+", DASHBOARD.read_text()))
    assert asked and all(f'"{name}"' in source for name in asked)


def test_a_scrape_reads_what_the_client_writes() -> None:
    from prometheus_client import CollectorRegistry, generate_latest

    registry = CollectorRegistry()
    Counter("dspark_steps", "help", ["kind"], registry=registry).labels("round").inc(3)
    Gauge("dspark_depth", "help", registry=registry).set(2.5)
    scrape = Scrape.of(generate_latest(registry).decode(), 0.0)
    assert scrape.total("dspark_steps_total", kind="round") == 3
    assert scrape.total("dspark_steps_total", kind="plain") is None
    assert scrape.total("dspark_steps_total", name="a label may have any name") is None
    assert scrape.greatest("dspark_depth") == 2.5

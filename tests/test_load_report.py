"""The load report: every figure of the JSON is on the page, every picture is drawn, nothing is fetched."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest

from dspark_sgl.cli import main
from dspark_sgl.cpu_activation import has_accelerator
from dspark_sgl.frontier import Frontier, compare
from dspark_sgl.load_arms import parse_arms
from dspark_sgl.load_client import Load, Served
from dspark_sgl.load_command import Point, table
from dspark_sgl.load_report import page
from dspark_sgl.policies.errors import PolicyError

from .draft_checkpoints import TARGET, write_draft

FIGURES = ("frontier", "throughput", "depth", "survival", "reliability", "ttft_ms", "itl_ms")


def served(speed: float, depth: float) -> Served:
    return Served(
        output_tps=speed,
        tps_per_user=speed / 4,
        ttft_ms=(100.0, 150.0, 200.0),
        itl_ms=(20.0, 30.0, 45.0),
        depth=depth,
        plain=0.0 if depth else 1.0,
        accepted_length=1.5 if depth else None,
        accepted={1: 50, 2: 30, 3: 20} if depth else {},
        reliability={"predicted": [0.0, 6.0], "happened": [0.0, 5.0], "count": [0.0, 10.0]} if depth else {},
    )


@pytest.fixture
def report() -> dict:
    points = [
        Point(arm, Load(concurrency=users), tuple(served(speed * users + i, depth) for i in (0, 2, 1)))
        for users in (1, 4)
        for arm, speed, depth in (("plain", 20, 0.0), ("<mine>", 30, 2.5))
    ]
    run = {
        "model": "tiny",
        "prompts": {"file": "p.jsonl", "count": 8},
        "max_new_tokens": 16,
        "passes": 3,
        "date": "2026-01-01",
        "versions": {"sglang": "0"},
    }
    entries = [point.entry() for point in points]
    return json.loads(json.dumps({"points": entries, "frontier": compare(entries), "run": run}))


def test_figures_are_medians_with_their_spread(report: dict) -> None:
    first = report["points"][1]
    assert (first["arm"], first["output_tps"], first["output_tps_spread"]) == ("<mine>", 31.0, [30.0, 32.0])
    assert first["survival"] == [0.5, 0.2]
    assert first["reliability"] == {"predicted": [0.6], "observed": [0.5], "count": [30.0]}
    assert report["points"][0]["survival"] == report["points"][0]["reliability"]["count"] == []
    assert first["ttft_ms"] == {"p50": 100.0, "p90": 150.0, "p99": 200.0}


def test_the_table_compares_with_plain_decoding(report: dict) -> None:
    lines = table(report)
    assert [line for line in lines if line in ("1 users", "4 users")] == ["1 users", "4 users"]
    assert re.search(r"<mine> +31\.0 +\(30\.0 to 32\.0\) +1\.48 ", lines[3])
    assert lines[-3].startswith("Over plain: the area") and re.fullmatch(r"<mine>( +\d\.\d\d){3}", lines[-1])


def points(*pairs: tuple[float, float], arm: str = "a") -> list[dict]:
    return [{"arm": arm, "tps_per_user": speed, "output_tps": throughput} for speed, throughput in pairs]


def test_a_frontier_leaves_out_what_is_worse_in_both_figures() -> None:
    """Alone a user gets 30 tokens/s; of two each gets 25, of four 10; eight get less and make less."""
    frontier = Frontier.of(points((30, 30), (25, 50), (10, 40), (8, 60), (5, 55)))
    assert frontier == Frontier((8, 25, 30), (60, 50, 30))
    assert frontier.area == pytest.approx(8 * 60 + 17 * 55 + 5 * 40)
    assert [frontier.speed_at(t) for t in (61, 60, 55, 40, 10)] == [None, 8, 16.5, 27.5, 30]


def test_frontiers_are_compared_with_the_first_arms() -> None:
    """Half as fast again at every load."""
    told = compare([*points((20, 20), (10, 40), arm="plain"), *points((30, 30), (15, 60), arm="mine")])
    assert told["plain"] == {"area": 1, "matched": [1, 1]}
    # Where plain makes 20, mine is as fast as it gets; where plain makes 40, mine still gives a user 25.
    assert told["mine"] == {"area": pytest.approx(2.25), "matched": [1.5, 2.5]}


def test_the_page_stands_alone(report: dict) -> None:
    html = page(report)
    assert not re.search(r"<script|<link|(src|href)=\"(?!#)[^\"]*\"|url\((?!#)", html.replace("http://www.w3.org", ""))
    assert "width=device-width" in html and "&lt;mine&gt;" in html and "<mine>" not in html
    for name in FIGURES:
        figure = re.search(rf'<figure id="{name}">.*?(<svg.*?</svg>)', html, re.DOTALL)
        assert figure is not None
        drawn = ElementTree.fromstring(figure[1].replace("xlink:href", "href"))
        assert len(drawn.findall(".//{http://www.w3.org/2000/svg}path")) > 10
    named = re.findall(r'\bid="([^"]+)"', html)
    assert len(named) == len(set(named))
    assert html.partition("All figures")[2].count("<td>") == 14 * len(report["points"])


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_a_browser_shows_all_of_it(report: dict, tmp_path: Path) -> None:
    """On a phone's screen: the page is as wide as the screen and every picture has a size."""
    file = tmp_path / "report.html"
    probe = (
        "<script>document.title = JSON.stringify({wide: document.documentElement.scrollWidth, "
        "sizes: [...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect().height)})</script>"
    )
    file.write_text(page(report).replace("</body>", probe + "</body>"))
    browser = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--window-size=500,900"]
    shot = tmp_path / "report.png"
    subprocess.run([*browser, f"--screenshot={shot}", file.as_uri()], check=True, timeout=120, capture_output=True)
    shown = subprocess.run(
        [*browser, "--dump-dom", file.as_uri()], check=True, timeout=120, capture_output=True, text=True
    )
    measured = json.loads(re.search(r"<title>(.*?)</title>", shown.stdout)[1].replace("&quot;", '"'))
    assert measured["wide"] <= 500
    assert len(measured["sizes"]) == len(FIGURES) and min(measured["sizes"]) > 100
    assert shot.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--arms", "plain,adaptvie"], "did you mean 'adaptive'"),
        (["--arms", "plain,plain"], "names 'plain' twice"),
        (["--arms", "NOBODY_SGL:off"], "unknown"),
        (["--arms", "plain", "--model", "/nowhere/at/all"], "--model: /nowhere/at/all: no such folder"),
        (["--arms", "sglang:DSPARK", "--draft", "./none"], "--draft: ./none: no such folder"),
        (["--arms", "sglang:DSPRK"], "SGLang has no such algorithm; there are"),
        (["--concurrency", "1,x"], "numbers above 0"),
        (["--rate", "0"], "numbers above 0"),
        (["--html", "/nowhere/report.html"], "cannot be written"),
    ],
)
def test_a_mistake_is_one_line_before_a_server_starts(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Hello"}\n')
    assert main(["bench", "load", "--prompts", str(prompts), "--model", str(tmp_path), *arguments]) == 1
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


@pytest.fixture
def target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "config.json").write_text(json.dumps(TARGET))
    return str(tmp_path / "target")


def test_sglangs_own_algorithm_is_an_arm_with_the_draft_that_ours_would_find(target: str, tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="no draft is shipped or cached"):
        parse_arms("sglang:DSPARK", "DSPARK_SGL", target, None)
    cached = write_draft(tmp_path / "cache" / "dspark_sgl" / "drafts" / "mine")
    arms = parse_arms("plain,fixed-3,sglang:dspark,sglang:NGRAM", "DSPARK_SGL", target, None)
    assert [(arm.algorithm, arm.draft, bool(arm.policy)) for arm in arms] == [
        (None, None, False),
        ("DSPARK_SGL", None, True),
        ("DSPARK", str(cached), False),
        ("NGRAM", None, False),
    ]
    named = parse_arms("fixed-3,sglang:DSPARK,sglang:EAGLE", "DSPARK_SGL", target, "me/mine")
    assert [arm.draft for arm in named] == ["me/mine", "me/mine", None]


@pytest.mark.skipif(has_accelerator(), reason="SGLang's own runs here")
def test_sglangs_own_algorithm_needs_a_gpu(target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "Hello"}\n')
    run = ["bench", "load", "--prompts", str(tmp_path / "p.jsonl"), "--model", target]
    assert main([*run, "--arms", "plain,sglang:NGRAM"]) == 1
    assert "'sglang:NGRAM' needs a GPU" in capsys.readouterr().err

"""Explaining a policy: the rule that fires and why the others do not, the limits, and the depth over loads."""

import json
import sys
from pathlib import Path

import pytest

from dspark_sgl.cli import main
from dspark_sgl.policies import RequestLimits, find_policy, parse_policy
from dspark_sgl.policies.explain import explain, parse_load

Captured = pytest.CaptureFixture[str]

POLICY = """
version: 1
schedule: {kind: table, by: batch.size, points: {1: 6, 16: 3, 64: 0}}
tiers: {fast: {min_depth: 2}}
rules:
  - when: gpu.throttled
    set: {depth: {max: 1}}
  - when: request.context_len > 5000
    set: {depth: {max: 2}}
  - when: batch.size >= 64
    set: {schedule: {kind: fixed, depth: 1}}
"""


def test_every_rule_has_a_verdict():
    found = explain(parse_policy(POLICY), parse_load(["batch.size=64", "context.mean=6000"]), block=7)
    assert [(rule.holds, rule.fires, rule.absent) for rule in found.rules] == [
        (False, False, ("gpu.throttled",)),
        (True, True, ()),
        (True, True, ()),
    ]
    assert found.active.rule == 2
    assert found.limits == {"default": RequestLimits(2), "fast": RequestLimits(2, min_depth=2)}
    found = explain(parse_policy(POLICY), parse_load(["batch.size=64", "gpu.throttled=true"]), block=7)
    assert [rule.fires for rule in found.rules] == [True, False, False]


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("batch.sise=3", "did you mean 'batch.size'?"),
        ("batch.size", "--set takes SIGNAL=VALUE, not 'batch.size'"),
        ("batch.size=3,kv.usage", "--set takes SIGNAL=VALUE, not 'kv.usage'"),
        ("load=3", "docs/policies.md lists the signals"),
        ("kv.usage=95", "a number from 0 to 1, not '95'"),
        ("batch.size=many", "a number"),
        ("batch.size=-1", "a number"),
        ("batch.size=nan", "a number"),
        ("gpu.throttled=1", "true or false"),
    ],
)
def test_a_wrong_load_is_one_line(setting: str, words: str, capsys: Captured):
    assert main(["policy", "explain", "off", "--set", setting]) == 1
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def explained(capsys: Captured, *arguments: str) -> dict:
    assert main(["policy", "explain", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def depths(report: dict, context: int) -> list[float]:
    return [point["depth"] for point in report["grid"]["points"] if point["context"] == context]


def test_fixed_and_table_are_what_they_say_at_every_load(capsys: Captured, tmp_path: Path):
    assert set(depths(explained(capsys, "fixed-3"), 8000)) == {3}
    assert set(depths(explained(capsys, "off"), 8000)) == {0}
    assert set(depths(explained(capsys, "fixed-7", "--block", "4"), 1000)) == {4}
    (tmp_path / "p.yaml").write_text(POLICY)
    report = explained(capsys, str(tmp_path / "p.yaml"))
    assert depths(report, 1000) == [6, 6, 6, 6, 3, 3, 1, 1, 1]
    assert depths(report, 8000) == [2, 2, 2, 2, 2, 2, 1, 1, 1]
    assert [point["line"] for point in report["grid"]["points"]][:9] == [None] * 6 + [10] * 3


def test_the_adaptive_policy_goes_less_deep_as_the_batch_grows(capsys: Captured):
    found = depths(explained(capsys, "adaptive"), 1000)
    assert found[0] > found[-1]
    assert found == sorted(found, reverse=True)


@pytest.mark.parametrize(
    "name", ["adaptive", "latency", "throughput", "slo-interactive", "long-context", "power-capped"]
)
def test_every_shipped_policy_can_be_explained_in_words(name: str, capsys: Captured):
    assert main(["policy", "explain", "--set", "batch.size=80,kv.usage=0.97", "--set", "queue.length=3", name]) == 0
    text = capsys.readouterr().out
    for rule in find_policy(name).rules:
        assert f"line {rule.line}, {rule.when}: " in text
    assert "batch.size=80  queue.length=3  kv.usage=0.97" in text
    assert "context" in text


def test_a_table_by_a_signal_that_nobody_gives_stays_shallow(capsys: Captured, tmp_path: Path):
    (tmp_path / "p.yaml").write_text("version: 1\nschedule: {kind: table, by: gpu.util, points: {0: 7, 0.9: 1}}\n")
    report = explained(capsys, str(tmp_path / "p.yaml"))
    assert set(depths(report, 1000)) == {1}
    assert set(depths(explained(capsys, str(tmp_path / "p.yaml"), "--set", "gpu.util=0.5"), 1000)) == {7}
    assert main(["policy", "explain", str(tmp_path / "p.yaml")]) == 0
    assert "; gpu.util is not given: its shallowest point holds" in capsys.readouterr().out


def test_a_picture_is_drawn_or_its_absence_is_one_line(
    capsys: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert main(["policy", "explain", "fixed-3", "--plot", str(tmp_path / "p.png")]) == 0
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert main(["policy", "explain", "fixed-3", "--plot", str(tmp_path / "nowhere" / "p.png")]) == 1
    assert "cannot be written" in capsys.readouterr().err
    for name in ("", "p", "p.yaml"):
        assert main(["policy", "explain", "no-such-policy", "--plot", str(tmp_path / name)]) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"error: --plot: {tmp_path / name} ") and error.count("\n") == 1
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["policy", "explain", "fixed-3", "--plot", str(tmp_path / "q.png")]) == 1
    assert capsys.readouterr().err == "error: --plot: needs matplotlib: pip install 'dspark-sgl[plot]'\n"


@pytest.mark.parametrize("block", ["0", "65"])
def test_a_block_that_no_drafter_has_is_refused(block: str, capsys: Captured):
    assert main(["policy", "explain", "off", "--block", block]) == 1
    assert "from 1 to 64" in capsys.readouterr().err


def test_the_schema_can_be_had(capsys: Captured):
    assert main(["policy", "schema"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "dspark-sgl policy"

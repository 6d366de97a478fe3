"""The simulator: what can be worked out by hand comes out, the same seed gives the same run, and policies act in it."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from dspark_sgl.cli import main
from dspark_sgl.policies.cost import CostModel, CostPoint
from dspark_sgl.policies.errors import PolicyError
from dspark_sgl.policies.expected_tree import expected_trees
from dspark_sgl.policies.reader import parse_policy
from dspark_sgl.policies.shipped import find_policy
from dspark_sgl.policies.simulator import Machine, simulate
from dspark_sgl.policies.workload import closed_loop, load_trace, open_loop

PLAIN_S, DRAFT_S, ROW_S = 0.04, 0.005, 0.001


def costs(row_s: float) -> CostModel:
    points = [CostPoint("draft", 1, 7, 0, DRAFT_S)]
    points += [CostPoint("plain", n, n, 0, PLAIN_S + row_s * (n - 1)) for n in (1, 256)]
    points += [CostPoint("verify", 1, n, 0, PLAIN_S + row_s * (n - 1)) for n in (1, 2048)]
    return CostModel.from_points(points)


def machine(max_running: int = 64, kv_tokens: int = 100_000) -> Machine:
    """A step is 40 ms and a millisecond for every row beyond the first; a draft pass is 5 ms; a prefill 10 ms."""
    return Machine(costs(ROW_S), 7, 0.01, 0.0, kv_tokens, max_running)


def test_plain_decoding_takes_as_long_as_it_must():
    """Ten requests one after the other, 21 tokens each: one from the prefill, twenty steps."""
    result = simulate(find_policy("off"), closed_loop(1, 10, 100, 21, [0.8], spread=0), machine())
    assert result.seconds == pytest.approx(10 * (0.01 + 20 * PLAIN_S))
    assert result.output_tps == pytest.approx(210 / result.seconds)
    assert result.user_tps == pytest.approx(1 / PLAIN_S)
    assert result.steps == 210
    assert (result.depth, result.plain_share, result.accepted_length) == (0, 1, 1)


def test_speculation_emits_what_its_chances_say():
    """Chances 0.8, 0.64, ..: five drafts yield 1 + 0.8 + 0.64 + 0.512 + 0.41 + 0.328 tokens a round."""
    work = closed_loop(1, 200, 100, 2000, [0.8] * 7, spread=0)
    result = simulate(find_policy("fixed-5"), work, machine())
    expected = 1 + sum(0.8**k for k in range(1, 6))
    assert result.accepted_length == pytest.approx(expected, rel=0.01)
    assert result.user_tps == pytest.approx(expected / (PLAIN_S + DRAFT_S + 5 * ROW_S), rel=0.02)


def test_a_tree_emits_what_its_nodes_say():
    """Its best node has 0.5; four of its twelve have depth 1, and so on: a round emits one and their sum."""
    text = "version: 1\nschedule: {kind: fixed, depth: 7}\nshape: {kind: tree, max_nodes: 12, branch: 3}\n"
    work = replace(closed_loop(1, 200, 100, 2000, [0.5] * 7, spread=0), side=0.4)
    result = simulate(parse_policy(text), work, machine())
    survival, _ = expected_trees(work.survival, 0.4, 12, 3)
    expected = 1 + survival.sum()
    assert expected > 1.2 * (1 + sum(0.5**k for k in range(1, 8)))
    assert result.depth == 12
    assert result.accepted_length == pytest.approx(expected, rel=0.01)
    assert result.user_tps == pytest.approx(expected / (PLAIN_S + DRAFT_S + 12 * ROW_S), rel=0.02)


def test_auto_grows_trees_for_few_users_and_chains_for_many():
    text = "version: 1\nschedule: {kind: throughput}\nshape: {kind: auto, max_nodes: 16}\n"
    few, many = (
        simulate(parse_policy(text), replace(closed_loop(n, 20 * n, 50, 60, [0.6] * 7), side=0.3), machine(256))
        for n in (1, 64)
    )
    assert few.depth > 7 > many.depth


def test_trees_without_second_choices_are_chains():
    chains = "version: 1\nschedule: {kind: throughput}\n"
    work = closed_loop(4, 100, 50, 60, [0.6] * 7)
    tree, chain = (
        simulate(parse_policy(text), work, machine())
        for text in (f"{chains}shape: {{kind: tree, max_nodes: 16}}\n", chains)
    )
    assert (tree.seconds, tree.depth) == (chain.seconds, chain.depth)


def test_the_same_seed_gives_the_same_run_and_another_one_another():
    work = open_loop(5, 300, 100, 50, [0.7] * 7, seed=3)
    runs = [simulate(find_policy("adaptive"), work, machine(), seed) for seed in (1, 1, 2)]
    assert runs[0].seconds == runs[1].seconds
    assert (runs[0].timeline == runs[1].timeline).all()
    assert runs[0].seconds != runs[2].seconds


def test_depth_falls_as_users_come():
    depths = [
        simulate(find_policy("throughput"), closed_loop(users, 400, 50, 60, [0.6] * 7), machine(256)).depth
        for users in (1, 8, 64, 256)
    ]
    probes = 0.01  # where plain decoding wins, what is left of the depth is them
    assert all(fewer > more - probes for fewer, more in pairwise(depths))
    assert depths[0] > 2 * depths[-1]


def test_where_drafts_are_useless_adaptive_is_plain_but_for_its_probes():
    work = closed_loop(16, 500, 50, 100, [0.02] * 7)
    plain, adaptive = (simulate(find_policy(name), work, machine()) for name in ("off", "adaptive"))
    assert adaptive.plain_share > 0.97
    assert adaptive.output_tps > 0.98 * plain.output_tps


def test_a_scheduler_goes_by_what_it_believes_and_time_by_the_truth():
    work = closed_loop(16, 400, 50, 60, [0.6] * 7)
    right = simulate(find_policy("throughput"), work, machine())
    wrong = simulate(find_policy("throughput"), work, replace(machine(), believed=costs(100 * ROW_S)))
    assert wrong.depth < 0.1 < right.depth and wrong.output_tps < right.output_tps
    plain = simulate(find_policy("off"), work, machine())
    assert wrong.output_tps == pytest.approx(plain.output_tps, rel=0.02)


def test_rules_see_the_simulated_load():
    text = (
        "version: 1\nschedule: {kind: fixed, depth: 6}\nrules:\n  - when: batch.size > 4\n    set: {depth: {max: 1}}\n"
    )
    few, many = (simulate(parse_policy(text), closed_loop(n, 100, 50, 50, [0.8] * 7), machine()) for n in (4, 16))
    assert few.depth == 6
    assert many.depth < 2


def test_rules_about_requests_see_what_has_been_written():
    """1000 tokens, one at a time in a round that verifies one draft nobody accepts: plain once 900 are out."""
    text = "version: 1\nschedule: {kind: fixed, depth: 1}\nrules:\n"
    text += "  - when: request.output_len > 900\n    set: {depth: {max: 0}}\n"
    result = simulate(parse_policy(text), closed_loop(1, 1, 100, 1000, [0.0], spread=0), machine())
    assert result.plain_share == pytest.approx(0.1, abs=0.01)
    assert (result.timeline[0, 1], result.timeline[-1, 1]) == (1, 0)


def test_users_who_wait_are_the_queue():
    text = "version: 1\nschedule: {kind: fixed, depth: 3}\nrules:\n"
    text += "  - when: queue.length > 0\n    set: {depth: {max: 0}}\n"
    many, few = (
        simulate(parse_policy(text), closed_loop(users, 200, 100, 50, [0.8] * 7), machine(max_running=8))
        for users in (64, 8)
    )
    assert few.plain_share == 0
    assert many.plain_share > 0.7


def test_requests_wait_where_the_kv_pool_is_full():
    work = closed_loop(16, 100, 500, 100, [0.5], spread=0)
    wide = simulate(find_policy("off"), work, machine())
    tight = simulate(find_policy("off"), work, machine(kv_tokens=4 * 600))
    assert wide.timeline[:, 2].max() == 16
    assert tight.timeline[:, 2].max() == 4
    assert tight.ttft_s >= 0


def test_a_pause_is_idle_time_for_one_and_spaces_many():
    """Of four who ask together the first is prefilled alone, before the others have come."""
    pause = 0.5
    alone = simulate(find_policy("off"), closed_loop(1, 10, 100, 21, [0.8], spread=0, pause=pause), machine())
    assert alone.seconds == pytest.approx(10 * (0.01 + 20 * PLAIN_S) + 9 * pause)
    assert alone.ttft_s == pytest.approx(0.01)
    busy, paused = (
        simulate(find_policy("off"), closed_loop(2, 100, 100, 21, [0.8], pause=wait), machine()) for wait in (0, pause)
    )
    assert 1.1 * busy.seconds < paused.seconds < busy.seconds + 100 * pause
    assert paused.output_tps * paused.seconds == busy.output_tps * busy.seconds
    pause, step = 0.001, PLAIN_S + 3 * ROW_S
    four = simulate(find_policy("off"), closed_loop(4, 8, 100, 21, [0.8], spread=0, pause=pause), machine())
    assert four.seconds == pytest.approx(2 * (2 * 0.01 + 20 * step) + pause)
    assert four.steps == 2 * (2 + 20)


def test_an_idle_server_waits_for_the_next_arrival():
    work = open_loop(0.1, 20, 50, 10, [0.5], seed=0)
    result = simulate(find_policy("off"), work, machine())
    assert result.seconds > float(work.arrival[-1])
    assert result.ttft_s == pytest.approx(0.01, rel=0.2)


def test_a_trace_is_replayed_in_order_of_arrival(tmp_path: Path):
    file = tmp_path / "t.jsonl"
    rows = [
        {"arrival": 9.0, "prompt": 20, "output": 30, "acceptance": [0.5]},
        {"arrival": 1.0, "prompt": 10, "output": 20, "acceptance": [0.9, 0.8]},
    ]
    file.write_text("\n".join(json.dumps(row) for row in rows))
    work = load_trace(file)
    assert work.arrival.tolist() == [1.0, 9.0]
    assert work.prompt.tolist() == [10, 20]
    assert work.survival[work.kind].tolist() == [[0.9, pytest.approx(0.72)], [0.5, 0.0]]
    assert simulate(find_policy("fixed-2"), work, machine()).requests == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no request"),
        ('{"arrival": 1}', ":1:1: not a request"),
        ('{"arrival": 0, "prompt": 0, "output": 5, "acceptance": [0.5]}', ":1:1: not a request"),
        ('{"arrival": 0, "prompt": 1, "output": 5, "acceptance": [1.5]}', ":1:1: not a request"),
        ('{"arrival": NaN, "prompt": 1, "output": 5, "acceptance": [0.5]}', ":1:1: not a request"),
        ('{"arrival": Infinity, "prompt": 1, "output": 5, "acceptance": [0.5]}', ":1:1: not a request"),
        ('{"arrival": 0, "prompt": Infinity, "output": 5, "acceptance": [0.5]}', ":1:1: not a request"),
        ('{"arrival": 0, "prompt": 1, "output": 1e23, "acceptance": [0.5]}', ":1:1: not a request"),
        ('{"arrival": 0, "prompt": 1, "output": 5, "acceptance": "1"}', ":1:1: not a request"),
        ('{"arrival": 0, "prompt": 1, "output": 5, "acceptance": {"1": 0}}', ":1:1: not a request"),
        ('{"arrival": 0, "prompt": true, "output": 5, "acceptance": [true]}', ":1:1: not a request"),
    ],
)
def test_a_bad_trace_is_one_line(tmp_path: Path, text: str, words: str):
    file = tmp_path / "t.jsonl"
    file.write_text(text)
    with pytest.raises(PolicyError) as caught:
        load_trace(file)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--seed", "-1"], "--seed: must be 0 or more, not -1"),
        (["--prefill-ms", "nan"], "--prefill-ms: must be from 0 to"),
        (["--prefill-ms", "-5000"], "--prefill-ms: must be from 0 to"),
        (["--prefill-token-us", "inf"], "--prefill-token-us: must be from 0 to"),
        (["--prompt-tokens", "9" * 20], "--prompt-tokens: must be from 1 to"),
        (["--block", "65"], "--block: must be from 1 to 64"),
        (["--side", "nan"], "--side: must be from 0 to 1"),
        (["--users", "1.5"], "--users: takes whole numbers"),
        (["--rate", "nan"], "--rate: takes numbers"),
        (["--cost", "nowhere.json"], "`dspark-sgl profile --list` lists"),
    ],
)
def test_a_wrong_option_is_one_line(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]):
    assert main(["policy", "simulate", "off", *arguments]) == 1
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_the_header_says_what_was_simulated(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    costs(ROW_S).save(tmp_path / "c.json", {})
    run = ["policy", "simulate", "off", "--users", "1", "--requests", "2", "--acceptance", "0.3"]
    for more, machine_, prefill in (
        ([], "reference: an 8B model", "; prefill: 4 ms and 30 us"),
        (["--prefill-ms", "7"], "reference: an 8B model", "; prefill: 7 ms and 30 us"),
        (["--cost", str(tmp_path / "c.json")], str(tmp_path / "c.json"), "; the reference machine's prefill: 4 ms"),
    ):
        assert main([*run, *more]) == 0
        header = capsys.readouterr().out.splitlines()[0]
        assert header.startswith(machine_) and prefill in header
        assert header.endswith("; drafts accepted: 0.3 per position")


def test_every_token_is_accounted_for():
    work = replace(closed_loop(8, 200, 40, 30, [0.9] * 7, spread=0.8), users=8)
    result = simulate(find_policy("fixed-7"), work, machine())
    durations = np.diff(np.concatenate([[0], result.timeline[:, 0]]))
    decoded = float((result.timeline[:, 3] * durations).sum())
    assert decoded == pytest.approx(float(work.output.sum()) - work.size)

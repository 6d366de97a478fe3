"""The `throughput` schedule in a closed loop: near the best fixed depth at every load, and soon again after a change"""

from __future__ import annotations

import numpy as np
import pytest

from .closed_loop import ClosedLoop, Machine

SEEDS = (0, 1, 2)
CPU = Machine(lambda rows: 0.020 + 0.002 * rows)
DEAR = Machine(lambda rows: 0.020 + 0.002 * rows, draft=0.008, slope=0.0004)
"""Drafting costs a third of a step, so poor drafts do not pay at all."""
ROOMY = Machine(lambda rows: 0.060 + 0.001 * rows, first=2.0)
"""Rounds gain little, and the first one after plain steps pays for memory."""
STAIRS = Machine(lambda rows: 0.030 * (1 + (rows - 1) // 16))
"""Sixteen rows for the price of one, so Theta falls at every step and rises again behind it."""
GPU = Machine(lambda rows: 0.001 + max(0.0059, 2.67e-5 * rows), draft=0.001, slope=1.9e-5)


def ratio(machine: Machine, requests: int, chance: float, steps: int, warm: int = 0, **more: float) -> float:
    """Tokens per second as a share of the best fixed depth's, plain decoding among them; mean over the seeds."""
    best, found = max(machine.fixed(requests, chance)), []
    for seed in SEEDS:
        loop = ClosedLoop(machine, seed, **more)
        if warm:
            loop.run(requests, chance, warm)
        found.append(loop.run(requests, chance, steps) / best)
    return float(np.mean(found))


@pytest.mark.parametrize(("requests", "chance"), [(1, 0.8), (4, 0.6), (16, 0.6), (32, 0.7)])
def test_where_drafting_pays_the_best_depth_is_reached(requests: int, chance: float) -> None:
    # One request's tokens of so few steps scatter by a few per cent.
    assert ratio(CPU, requests, chance, 200) > (0.98 if requests > 1 else 0.94)


@pytest.mark.parametrize(("requests", "chance"), [(1, 0.1), (16, 0.1), (16, 0.3), (32, 0.3)])
def test_where_plain_decoding_is_best_trying_costs_little(requests: int, chance: float) -> None:
    assert max(DEAR.fixed(requests, chance)) == DEAR.fixed(requests, chance)[0]
    assert ratio(DEAR, requests, chance, 400, warm=200) > 0.98


def test_a_first_round_that_is_slow_does_not_make_rounds_dear() -> None:
    assert ratio(ROOMY, 32, 0.58, 250) > 0.99


@pytest.mark.parametrize("requests", [16, 32])
def test_rows_that_come_in_steps_do_not_stop_the_search(requests: int) -> None:
    assert ratio(STAIRS, requests, 0.7, 200) > 0.97


def test_a_load_beyond_the_profile_is_priced_as_the_curve_ends() -> None:
    assert ratio(GPU, 128, 0.6, 50) > 0.95


@pytest.mark.parametrize("discarded", [0.0, 0.4])
def test_drafts_that_get_good_are_drafted_again(discarded: float) -> None:
    """One request, plain steps for long, then drafts that are worth 2.4 times as much; plans that are dropped are none
    of them steps."""
    waited = []
    for seed in SEEDS:
        loop = ClosedLoop(DEAR, seed, discarded=discarded)
        loop.run(1, 0.8, 100)
        loop.run(1, 0.05, 500)
        before = len(loop.rounds)
        loop.run(1, 0.85, 260)
        rounds = np.convolve(loop.rounds[before:], np.ones(20), "valid")
        assert rounds.max() >= 18, "still plain"
        waited.append(int(np.argmax(rounds >= 18)))
    assert max(waited) < 220


def test_without_a_profile_steps_teach_what_they_cost() -> None:
    for seed in SEEDS:
        loop = ClosedLoop(CPU, seed, profile=[])
        loop.run(4, 0.6, 100)
        assert loop.cost.ready
        assert loop.run(4, 0.6, 200) > 0.97 * max(CPU.fixed(4, 0.6))

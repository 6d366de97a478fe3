"""The governor with its real parts and no server: where a drafter has nothing to say, no policy verifies it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from dspark_sgl.governor import Governor
from dspark_sgl.load import LoadMeter
from dspark_sgl.plan import MOST_ROWS
from dspark_sgl.policies.calibration import Calibration
from dspark_sgl.policies.cost import CostModel, CostPoint
from dspark_sgl.policies.forest import Forest
from dspark_sgl.policies.hardware import HardwareSampler
from dspark_sgl.policies.signals import RequestSignals
from dspark_sgl.policy_watch import PolicyWatch
from dspark_sgl.request_view import RequestLoad

BLOCK = 4


def requests(count: int) -> list[RequestLoad]:
    signals = RequestSignals(tier="default", context_len=100, output_len=10, accept_length=math.nan, temperature=0.0)
    return [RequestLoad(signals, None, str(i)) for i in range(count)]


def governor_of(
    folder: Path,
    policy: str,
    *,
    room: int = 0,
    whole: bool = True,
    cost: CostModel | None = None,
    calibration: Calibration | None = None,
) -> Governor:
    """policy: YAML behind its version; room, whole: as for Governor; without a cost model it has no prices"""
    file = folder / "policy.yaml"
    file.write_text(f"version: 1\n{policy}\n")
    watch, load = PolicyWatch(str(file)), LoadMeter(HardwareSampler())
    watch.close()
    cost, calibration = cost or CostModel.from_points([]), calibration or Calibration()
    return Governor(watch, BLOCK, room, whole, cost, calibration, load, None, None)


@pytest.mark.parametrize(
    "schedule", ["{kind: fixed, depth: 4}", "{kind: threshold, confidence: 0.01}", "{kind: throughput}"]
)
def test_a_confidence_of_zero_is_the_end_of_a_chain(tmp_path: Path, schedule: str) -> None:
    calibration = Calibration()
    policy = f"schedule: {schedule}\ndepth: {{min: 2}}"
    governor = governor_of(tmp_path, policy, whole=False, calibration=calibration)
    record = governor.plan(requests(4))
    plan = record.plan
    assert min(plan.depths) >= 2
    confidence = np.array([[0.9, 0.9, 0.9, 0.9], [0.9, 0.0, 0.9, 0.9], [0.0] * 4, [0.9, math.nan, 0.9, 0.9]])
    deepest = max(plan.depths)
    verified = governor.select(record, Forest.chains(4, deepest), confidence[:, :deepest])
    assert verified.sum(1).tolist() == [plan.depths[0], 1, 0, 1]
    before = calibration.expected(1, BLOCK)[0, 0]
    accepted = np.array([plan.depths[0], 1, 0, 1])
    rows = np.arange(deepest + 1)
    record.live = np.ones(len(accepted), bool)
    governor.learn(record, np.where(rows <= accepted[:, None], rows, -1))
    assert calibration.expected(1, BLOCK)[0, 0] > before, "a draft that was not there has not been rejected"


def test_a_draft_that_returns_nan_is_looked_at_before_it_is_verified(tmp_path: Path) -> None:
    governor = governor_of(tmp_path, "schedule: {kind: fixed, depth: 3}")
    settled = []
    for said in (0.9, math.nan, math.nan, 0.9, 0.9):
        record = governor.plan(requests(2))
        settled.append(record.plan.settled)
        verified = governor.select(record, Forest.chains(2, 3), np.full((2, 3), said))
        assert verified.all() or not record.plan.settled
        record.live = np.ones(2, bool)
        governor.learn(record, np.zeros((2, 1), dtype=np.int64))
    assert settled == [True, True, False, False, True]


def test_rounds_of_requests_that_had_ended_cost_time_and_count_for_nothing(tmp_path: Path) -> None:
    calibration = Calibration()
    governor = governor_of(tmp_path, "schedule: {kind: fixed, depth: 3}", calibration=calibration)
    before = calibration.expected(1, BLOCK).tolist()
    for live, offered, emitted in (([False, False], 0, 0), ([True, False], 3, 4)):
        record = governor.plan(requests(2))
        record.rows, record.live = 8, np.array(live)
        assert record.step.emitted == sum(live), "of a plain step"
        governor.select(record, Forest.chains(2, 3), np.full((2, 3), 0.9))
        governor.learn(record, np.array([[0, 1, 2, 3], [0, -1, -1, -1]]))
        assert (record.step.kind, record.step.rows, record.step.requests) == ("round", 8, 2)
        assert (record.step.offered, record.step.emitted, len(record.predicted)) == (offered, emitted, offered)
        assert (calibration.expected(1, BLOCK).tolist() == before) == (not any(live))


def test_where_no_tree_pays_a_chain_is_asked_about(tmp_path: Path) -> None:
    """A plain step of sixteen users is left for drafts of one token each, though a tree of any would lose."""
    points = [CostPoint("plain", 16, 16, 0, 0.100), CostPoint("plain", 1, 1, 0, 0.050)]
    points += [CostPoint("draft", 16, 16 * d, 0, 0.003) for d in (1, 4)]
    points += [CostPoint("verify", 16, rows, 0, 0.060 + 0.0025 * rows) for rows in (16, 32, 80)]
    policy = "schedule: {kind: throughput}\nshape: {kind: auto, max_nodes: 16}"
    governor = governor_of(tmp_path, policy, room=16, cost=CostModel(points, "profiled"))
    # What trees have shown so far: their best nodes hardly ever survive.
    governor._past["tree"].best_nodes.observe(np.full((16, 16), 0.02))
    plan = governor.plan(requests(16)).plan
    assert plan.tree is None and min(plan.depths) >= 1


def test_a_round_has_no_more_rows_than_there_is_room_for(tmp_path: Path) -> None:
    """Requests that do not speculate leave theirs to others."""
    governor = governor_of(tmp_path, "schedule: {kind: fixed, depth: 4}")
    silent = [RequestLoad(request.signals, 0, request.rid) for request in requests(1000)]
    for batch, depth in ((requests(400), 4), (requests(1000), 1), (requests(1500), 0), (requests(100) + silent, 4)):
        depths = governor.plan(batch).plan.depths
        assert max(depths) == depth and len(batch) + sum(depths) <= MOST_ROWS

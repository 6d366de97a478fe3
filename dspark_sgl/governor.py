"""Decides every step of a running server by the policy in force: signals in, depths out, and learns from what came.

Lives on tensor-parallel rank 0 only; the worker sends its answers to the others. Plain numbers between two steps: it
never touches a tensor of the model and never waits for a device, a file or a clock.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dspark_sgl.kernels.tree_draft import TreeShape
from dspark_sgl.policies.batch import Batch, Bools, Floats, Ints
from dspark_sgl.policies.calibration import Calibration
from dspark_sgl.policies.cost import CostModel
from dspark_sgl.policies.forest import Forest
from dspark_sgl.policies.history import Chains, probe_weight
from dspark_sgl.policies.reliability import Tally
from dspark_sgl.policies.shape import ShapeChooser

from .bad_drafts import BadDrafts
from .clock import ROUND
from .load import LoadMeter, Step
from .metrics import Metrics
from .minute import Minute
from .plan import MOST_ROWS, Past, Plan, StepRecord
from .policy_in_force import PolicyInForce
from .policy_watch import PolicyWatch
from .recorder import Recorder
from .request_view import RequestLoad
from .step_metrics import publish_seconds, publish_step

logger = logging.getLogger(__name__)

TREE = "tree"
"""A round that drafted trees, to the cost model, which learns what those take by themselves."""


class Governor:
    """Plans steps by the policy, chooses among what was drafted, keeps cost and calibration up to date.

    block: the deepest path the drafter proposes; room: the most nodes of its trees, 0 where it drafts none
    whole: its chains are always as deep as was asked for
    calibration: of the confidence that a chain comes with; a tree's is another figure and is learned by itself
    """

    def __init__(
        self,
        watch: PolicyWatch,
        block: int,
        room: int,
        whole: bool,
        cost: CostModel,
        calibration: Calibration,
        load: LoadMeter,
        metrics: Metrics | None,
        recorder: Recorder | None,
    ) -> None:
        self._whole, self.load, self._metrics, self._recorder = whole, load, metrics, recorder
        self._current = PolicyInForce(watch, block, room, cost, load.signals, metrics)
        # A chain's confidence, q of a chosen node and the promise of a drawn one are three different quantities; each
        # has its own calibration.
        known = {"chain": calibration, "tree": Calibration(), "drawn tree": Calibration()}
        self._past = {kind: Past(mine, Chains(block)) for kind, mine in known.items()}
        self._as_it_comes = Calibration()
        self._shape = ShapeChooser(block, room)
        self._minute = Minute()
        self._survival = Tally()
        self._bad = BadDrafts([self._as_it_comes, *known.values()])
        self._sound = True  # False after NaN drafts: the next round is looked at before it is verified
        self._latest: StepRecord | None = None

    # -- A step, in this order. The next one may be planned before this one has been learned from --------------------

    def plan(self, requests: Sequence[RequestLoad]) -> StepRecord:
        """How deep to draft each request, before anything is drafted; all 0 is a plain step."""
        self._current.refresh()
        self._current.name_unknown({request.signals.tier for request in requests})
        lens = [request.signals.context_len for request in requests]
        snapshot = self.load.snapshot(lens)
        active = self._current.rules.batch(snapshot)
        limits = [self._current.rules.request(active, snapshot, r.signals, r.max_depth) for r in requests]
        deepest = np.array([limit.max_depth for limit in limits])
        room = max(0, (MOST_ROWS - len(requests)) // max(1, int((deepest > 0).sum())))
        batch = Batch(
            min_depth=np.array([limit.min_depth for limit in limits]).clip(max=room),
            max_depth=deepest.clip(max=room),
            weight=np.array([limit.weight for limit in limits]),
            context=sum(lens),
            signals=snapshot.values,
        )
        scheduler = self._current.scheduler(active.schedule)
        method = self._current.policy.accept.method
        shape = self._shape.settle(active.shape, len(requests))
        tree = None if shape is None else TreeShape(max(1, min(shape.max_nodes, room)), shape.branch)
        drawn = method != "match" and any(request.signals.temperature > 0 for request in requests)
        past = self._past["chain" if tree is None else "drawn tree" if drawn else "tree"]
        depths = scheduler.draft_depths(batch, *past.expected(len(lens), tree))
        if tree is not None and active.shape.kind == "auto" and not depths.any():
            # The tree does not pay. A chain may, and only where neither does is the step plain.
            tree, past = None, self._past["chain"]
            depths = scheduler.draft_depths(batch, *past.expected(len(lens), tree))
        drafted, batch = depths.tolist(), batch.within(depths)
        settled = tree is None and self._whole and self._sound and scheduler.takes_all(batch)
        return StepRecord(requests, batch, scheduler, active, Plan(drafted, method, tree, settled), past)

    def started(self, record: StepRecord) -> None:
        """This plan is carried out; others are made ahead and dropped, and must leave no trace."""
        self._latest = record
        record.probe = record.scheduler.started()

    def select(
        self, record: StepRecord, forest: Forest, confidence: Floats | None, unsound: Bools | None = None
    ) -> Bools:
        """bool `[n, N]`: which drafts to verify; of a settled plan, which is being verified, those to learn from.

        confidence: `[n, N]`, or None from a drafter without; unsound: bool `[n, N]`, drafts that must not
        """
        record.forest, record.confidence = forest, confidence
        bad = self._bad.total
        if confidence is None:
            known = record.past.calibration.expected(len(record.plan.depths), max(1, int(forest.depth.max())))
            survival = np.where(forest.depth > 0, np.take_along_axis(known, (forest.depth - 1).clip(0), 1), 0.0)
        else:
            said = record.past.calibration if self._current.policy.calibration.method == "sts" else self._as_it_comes
            survival = said.apply(confidence, forest)
        if record.plan.settled:
            kept = forest.depth <= record.batch.max_depth[:, None]
        else:
            kept = record.scheduler.select(record.batch, survival, None if forest.is_chain else forest.depth)
            if confidence is not None:
                kept &= forest.closed(confidence > 0)  # where a path ends, no schedule goes on
        if unsound is not None and unsound.any():
            kept &= forest.closed(~unsound)
            self._bad.unsound += int(unsound.sum())
        self._sound = self._bad.total == bad
        live = np.ones(len(kept), dtype=bool) if record.live is None else record.live
        record.past.observe(forest, survival[live], np.array(record.plan.depths)[live], record.probe)
        record.survival, record.verified, record.offered = survival, kept, kept.sum(1).tolist()
        return kept

    def learn(self, record: StepRecord, path: Ints) -> None:
        """What a round accepted. path: int64 `[n, P]`, rows as in `Forest.on_path`"""
        assert record.forest is not None and record.verified is not None and record.live is not None
        live = record.live
        record.verified = record.verified & live[:, None]
        record.offered, record.lengths = record.verified.sum(1).tolist(), ((path >= 0).sum(1) * live).tolist()
        survived = record.forest.on_path(record.verified, path)
        self._survival.add(record.predicted, survived[record.verified])
        tested = record.forest.tested(record.verified, survived)
        learning = record.confidence if self._current.policy.calibration.online else None
        weight = probe_weight(len(record.plan.depths)) if record.probe else 1
        record.past.calibration.observe(learning, record.forest.depth, tested, survived, weight)
        speaking = sum(1 for k in record.offered if k)
        if speaking:
            self._shape.learn(sum(record.offered) / speaking)
        self._bad.name()
        if self._recorder is not None:
            self._recorder.write(record.requests, record.forest, record.verified, survived, record.confidence)

    def timed(self, record: StepRecord, seconds: float) -> None:
        """This step took so long, the engine's share included."""
        step, tree = record.step, record.plan.tree is not None
        kind = TREE if tree and step.kind == ROUND else step.kind
        self.load.record(step, seconds)
        cost, policy = self._current.cost, self._current.policy
        if step.kind == ROUND and cost.ready:
            self._shape_paid(record, step, seconds)
        known = kind, step.requests, step.rows, step.context
        expected = cost.step_seconds(*known, step.depth) if cost.ready else None
        if self._metrics is not None:
            publish_seconds(self._metrics, step.kind, seconds, expected)
        self._minute.add(step, seconds, expected)
        if self._minute.is_full:
            logger.info("dspark: policy %s: %s", policy.name, self._minute.line)
            self._minute = Minute()
        if policy.cost.refine == "online":
            cost.observe(*known, seconds, step.depth)

    def publish(self, record: StepRecord, phases: Mapping[str, float]) -> None:
        """Put a step that has been learned from on `/metrics`. phases: host seconds since the server started"""
        if self._metrics is not None:
            publish_step(self._metrics, record, self._bad, phases)

    def _shape_paid(self, record: StepRecord, step: Step, seconds: float) -> None:
        """A round for the contest of trees and chains, in which requests that had ended do not count."""
        if not record.counted:
            return
        plain = self._current.cost.plain_seconds(step.requests, step.context)
        promised, tree = record.counted + float(record.predicted.sum()), record.plan.tree is not None
        self._shape.paid(tree, step.requests, promised / step.requests, step.emitted / step.requests, seconds / plain)

    def report(self) -> dict[str, Any]:
        """What `/server_info` shows of the policy: which, its rule, and the last decision."""
        self._current.refresh()
        return {
            **self._current.report,
            "decision": {} if self._latest is None else self._latest.decision,
            "reliability": self._survival.report,
        }

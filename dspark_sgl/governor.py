"""The policy in force on a running server: signals in, depths out, and what happened learned from.

Lives on tensor-parallel rank 0 only; the worker sends its answers to the others. Plain numbers between two steps: it
never touches a tensor of the model and never waits for a device, a file or a clock.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dspark_sgl.policies.calibration import Calibration
from dspark_sgl.policies.cost import CostModel
from dspark_sgl.policies.language import ACCEPT_METHODS, DEFAULT_TIER, Policy, Schedule
from dspark_sgl.policies.rules import Active, RuleBook
from dspark_sgl.policies.scheduler import Batch, Scheduler, make_scheduler

from .clock import PLAIN, ROUND
from .load import LoadMeter, Step
from .metrics import Metrics
from .policy_watch import PolicyWatch
from .recorder import Recorder
from .request_view import RequestLoad

logger = logging.getLogger(__name__)

Floats = NDArray[np.float64]

CAUSALITY = "early_stop"
"""Rounds are synchronous: this step's confidences are at hand, and an early stop keeps them from biasing the output."""


MOST_TIERS_NAMED = 100
"""Clients choose these names; the log must not grow with them."""


@dataclass(frozen=True)
class Plan:
    """What the coming step shall do. depths: how deep to draft each request; method: how drafts are accepted"""

    depths: list[int]
    method: str

    @property
    def wire(self) -> list[int]:
        """As numbers, for the other ranks."""
        return [ACCEPT_METHODS.index(self.method), *self.depths]

    @classmethod
    def from_wire(cls, numbers: list[int]) -> Plan:
        return cls(numbers[1:], ACCEPT_METHODS[numbers[0]])


@dataclass
class _Ride:
    """One step from plan to learning: what it was decided from, what was decided, what came of it."""

    requests: Sequence[RequestLoad]
    batch: Batch
    scheduler: Scheduler
    active: Active
    drafted: list[int]
    confidence: Floats | None = None
    survival: Floats | None = None
    offered: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)

    @property
    def predicted(self) -> float:
        """Drafts expected to be accepted, of those offered."""
        if self.survival is None:
            return 0.0
        return float(sum(row[:k].sum() for row, k in zip(self.survival, self.offered, strict=True)))

    @property
    def step(self) -> Step:
        n = len(self.drafted)
        spoke = [length for length, offered in zip(self.lengths, self.offered, strict=True) if offered]
        return Step(
            kind=ROUND if self.offered else PLAIN,
            requests=n,
            rows=n + sum(self.offered),
            context=self.batch.context,
            offered=sum(self.offered),
            speculating=len(spoke),
            emitted=sum(self.lengths) if self.offered else n,
            gained=sum(spoke),
        )


class Governor:
    """Plans steps by the policy, chooses among what was drafted, keeps cost and calibration up to date.

    block: the deepest path the drafter proposes
    """

    def __init__(
        self,
        watch: PolicyWatch,
        block: int,
        cost: CostModel,
        calibration: Calibration,
        load: LoadMeter,
        metrics: Metrics | None,
        recorder: Recorder | None,
    ) -> None:
        self._watch, self._block = watch, block
        self._profile, self._calibration, self.load, self._metrics = cost, calibration, load, metrics
        self._recorder = recorder
        self._as_it_comes = Calibration()
        self._unknown_tiers: set[str] = set()
        self._ride: _Ride | None = None
        self._decision: dict[str, Any] = {}
        self._adopt(watch.first)
        watch.start()

    # -- A step, in order: timed (the one before), plan, select, learn -----------------------------------------------

    def timed(self, seconds: float) -> None:
        """The step before this one, which was planned here, took so long, the engine's share included."""
        ride, self._ride = self._ride, None
        if ride is None:
            return
        step = ride.step
        self.load.record(step, seconds)
        if self._metrics is not None:
            self._metrics.set("cost_ready", self._cost.ready)
            if self._cost.ready:
                self._metrics.add("step_seconds_observed", seconds, step.kind)
                self._metrics.add("step_seconds_predicted", self._expected_seconds(step), step.kind)
        if self._policy.cost.refine == "online":
            self._cost.observe(step.kind, step.requests, step.rows, step.context, seconds)

    def plan(self, requests: Sequence[RequestLoad]) -> Plan:
        """How deep to draft each request, before anything is drafted; all 0 is a plain step."""
        self._refresh()
        self._name_unknown_tiers(requests)
        lens = [request.signals.context_len for request in requests]
        snapshot = self.load.snapshot(lens)
        active = self._rules.batch(snapshot)
        limits = [self._rules.request(active, snapshot, r.signals, r.max_depth) for r in requests]
        batch = Batch(
            min_depth=np.array([limit.min_depth for limit in limits]),
            max_depth=np.array([limit.max_depth for limit in limits]),
            weight=np.array([limit.weight for limit in limits]),
            context=sum(lens),
            signals=snapshot.values,
        )
        scheduler = self._scheduler(active.schedule)
        drafted = scheduler.draft_depths(batch, self._calibration.expected(len(lens), self._block)).tolist()
        self._ride = _Ride(requests, batch, scheduler, active, drafted)
        self._decision = {"rule": active.rule, "requests": len(lens), "drafted": sum(drafted), "verified": 0}
        return Plan(drafted, self._policy.accept.method)

    def select(self, confidence: Floats | None) -> list[int]:
        """How deep to verify each request. confidence: `[n, D]` of the drafts, or None from a drafter without."""
        ride = self._ride
        assert ride is not None
        if confidence is None:
            ride.survival = self._calibration.expected(len(ride.drafted), max(ride.drafted))
        else:
            said = self._calibration if self._policy.calibration.method == "sts" else self._as_it_comes
            ride.confidence, ride.survival = confidence, said.apply(confidence)
        kept = np.minimum(ride.scheduler.select(ride.batch, ride.survival).sum(1), ride.drafted)
        if confidence is not None:
            kept = np.minimum(kept, (confidence > 0).cumprod(1).sum(1))  # where a chain ends, no schedule goes on
        ride.offered = kept.tolist()
        self._decision["verified"] = sum(ride.offered)
        return ride.offered

    def learn(self, lengths: Sequence[int]) -> None:
        """What the planned step emitted, per request."""
        ride = self._ride
        assert ride is not None
        ride.lengths = list(lengths)
        if ride.offered:
            learning = ride.confidence if self._policy.calibration.online else None
            self._calibration.observe(learning, np.array(ride.offered), np.array(ride.lengths) - 1)
            if self._recorder is not None:
                self._recorder.write(ride.requests, ride.confidence, ride.offered, ride.lengths)

    def publish(self, phases: Mapping[str, float]) -> None:
        """Put the step just planned and learned from on `/metrics`. phases: host seconds since the server started"""
        metrics, ride = self._metrics, self._ride
        if metrics is None or ride is None:
            return
        step = ride.step
        metrics.phases(phases)
        metrics.add("steps", 1, step.kind)
        metrics.add("emitted_tokens", step.emitted, step.kind)
        metrics.set("depth", step.offered / step.requests)
        metrics.set("rows", step.rows)
        metrics.set("active_rule", 0 if ride.active.rule is None else ride.active.rule + 1)
        if step.offered:
            accepted = step.gained - step.speculating
            metrics.add("draft_tokens", accepted, "accepted")
            metrics.add("draft_tokens", step.offered - accepted, "rejected")
            metrics.observe("accepted_length", [n for n, k in zip(ride.lengths, ride.offered, strict=True) if k])
            metrics.add("survival_predicted", ride.predicted)
            metrics.add("survival_observed", accepted)
        metrics.total("bad_confidences", self._calibration.bad + self._as_it_comes.bad)

    def _expected_seconds(self, step: Step) -> float:
        if step.kind == PLAIN:
            return self._cost.plain_seconds(step.requests, step.context)
        return float(self._cost.round_seconds(step.requests, np.array([step.rows]), step.context)[0])

    # -- The policy --------------------------------------------------------------------------------------------------

    def _refresh(self) -> None:
        """Take over what was saved since; only ever called between two steps."""
        saved = self._watch.take()
        if saved is not None:
            self._adopt(saved)

    def _adopt(self, policy: Policy) -> None:
        """Take over a policy, between two steps."""
        self._policy = policy
        self._cost = self._profile if policy.cost.source == "profiled" else CostModel()
        if not self._cost.ready:
            logger.warning(
                "dspark: policy %s: no step has been measured; rounds stay shallow until some are", policy.name
            )
        self._rules = RuleBook(policy, self._block)
        self._schedulers: dict[Schedule, Scheduler] = {}
        for line in self._rules.missing(self.load.signals):
            logger.warning("dspark: policy %s: %s", policy.name, line)
        if self._metrics is not None:
            self._metrics.policy(policy.name, policy.digest)

    def _name_unknown_tiers(self, requests: Sequence[RequestLoad]) -> None:
        """A tier that the policy does not know is served as the default one; the log says so, once a tier."""
        named = {request.signals.tier for request in requests}
        unknown = named - self._unknown_tiers - {DEFAULT_TIER, *self._policy.tiers}
        if unknown and len(self._unknown_tiers) < MOST_TIERS_NAMED:
            self._unknown_tiers |= unknown
            tiers = ", ".join(sorted(unknown))
            logger.warning("dspark: policy %s has no tier %s: served as default", self._policy.name, tiers)

    def _scheduler(self, schedule: Schedule) -> Scheduler:
        """One scheduler per schedule of the policy, kept while the policy is: it remembers its probes."""
        if schedule not in self._schedulers:
            self._schedulers[schedule] = make_scheduler(schedule, self._cost, self._policy.cost.margin, CAUSALITY)
        return self._schedulers[schedule]

    def report(self) -> dict[str, Any]:
        """What `/server_info` shows of the policy: which, its rule, and the last decision."""
        self._refresh()
        reloads = self._watch.reloads
        return {
            "policy": self._policy.name,
            "digest": self._policy.digest,
            "reloads": {"accepted": reloads.accepted, "refused": reloads.refused},
            "tiers": list(self._policy.tiers),
            "cost": self._cost.source,
            "decision": self._decision,
        }

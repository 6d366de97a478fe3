"""The policy in force on a running server: signals in, depths out, and what happened learned from.

Lives on tensor-parallel rank 0 only; the worker sends its answers to the others. Plain numbers between two steps: it
never touches a tensor of the model and never waits for a device, a file or a clock.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dspark_sgl.kernels.tree_draft import TreeShape
from dspark_sgl.policies.batch import Batch, Bools, Floats, Ints, Scheduler
from dspark_sgl.policies.calibration import Calibration
from dspark_sgl.policies.cost import CostModel
from dspark_sgl.policies.forest import Forest
from dspark_sgl.policies.history import Chains, news
from dspark_sgl.policies.language import DEFAULT_TIER, Policy, Schedule
from dspark_sgl.policies.reliability import Tally
from dspark_sgl.policies.rules import RuleBook
from dspark_sgl.policies.scheduler import make_scheduler
from dspark_sgl.policies.shape import ShapeChooser, most_nodes

from .clock import PLAIN, ROUND
from .load import LoadMeter, Step
from .metrics import Metrics
from .minute import Minute
from .plan import Past, Plan, Ride
from .policy_watch import PolicyWatch
from .recorder import Recorder
from .request_view import RequestLoad

logger = logging.getLogger(__name__)

CAUSALITY = "early_stop"
"""Rounds are synchronous: this step's confidences are at hand, and an early stop keeps them from biasing the output."""

TREE = "tree"
"""A round that drafted trees, to the cost model, which learns what those take by themselves."""
MOST_TIERS_NAMED = 100
"""Clients choose these names; the log must not grow with them."""


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
        self._watch, self._block, self._room, self._whole = watch, block, room, whole
        self._profile, self.load, self._metrics = cost, load, metrics
        self._learned = CostModel()  # outlives a reload, as the profile does
        # A chain's confidence, q of a node that was chosen and the promise of one that was drawn are three figures.
        known = {"chain": calibration, "tree": Calibration(), "drawn tree": Calibration()}
        self._past = {kind: Past(mine, Chains(block)) for kind, mine in known.items()}
        self._as_it_comes = Calibration()
        self._shape = ShapeChooser(block, room)
        self._minute = Minute()
        self._survival = Tally()
        self._recorder = recorder
        self._unknown_tiers: set[str] = set()
        self._unsound = self._bad_drafts_named = 0
        self._sound = True  # the drafts that were looked at last; others are not verified unseen
        self._latest: Ride | None = None
        self._adopt(watch.first)
        watch.start()

    # -- In order: plan, started, select, learn, timed. The next may be planned before this one has been learned from --

    def timed(self, ride: Ride, seconds: float) -> None:
        """This step took so long, the engine's share included."""
        step, tree = ride.step, ride.plan.tree is not None
        kind = TREE if tree and step.kind == ROUND else step.kind
        self.load.record(step, seconds)
        if step.kind == ROUND and self._cost.ready:
            self._shape_paid(ride, seconds)
        expected = self._expected_seconds(step, kind) if self._cost.ready else None
        if self._metrics is not None:
            self._metrics.set("cost_ready", self._cost.ready)
            if expected is not None:
                self._metrics.add("step_seconds_observed", seconds, step.kind)
                self._metrics.add("step_seconds_predicted", expected, step.kind)
        self._minute.add(step, seconds, expected)
        if self._minute.is_full:
            logger.info("dspark: policy %s: %s", self._policy.name, self._minute.line)
            self._minute = Minute()
        if self._policy.cost.refine == "online":
            self._cost.observe(kind, step.requests, step.rows, step.context, seconds, step.depth)

    def plan(self, requests: Sequence[RequestLoad]) -> Ride:
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
        method = self._policy.accept.method
        tree = self._shape.settle(active.shape, len(requests))
        drawn = method != "match" and any(request.signals.temperature > 0 for request in requests)
        past = self._past["chain" if tree is None else "drawn tree" if drawn else "tree"]
        grown = None if tree is None else TreeShape(tree.max_nodes, tree.branch)
        depths = scheduler.draft_depths(batch, *past.expected(len(lens), grown))
        drafted, batch = depths.tolist(), batch.within(depths)
        settled = grown is None and self._whole and self._sound and scheduler.takes_all(batch)
        return Ride(requests, batch, scheduler, active, Plan(drafted, method, grown, settled), past)

    def started(self, ride: Ride) -> None:
        """This plan is carried out; others are made ahead and dropped, and must leave no trace."""
        self._latest = ride
        ride.probe = ride.scheduler.started()

    def select(self, ride: Ride, forest: Forest, confidence: Floats | None, unsound: Bools | None = None) -> Bools:
        """bool `[n, N]`: which drafts to verify; of a settled plan, which of those that are may count.

        confidence: `[n, N]`, or None from a drafter without; unsound: bool `[n, N]`, drafts that must not
        """
        ride.forest, ride.confidence = forest, confidence
        bad = self._bad_drafts
        if confidence is None:
            known = ride.past.calibration.expected(len(ride.plan.depths), max(1, int(forest.depth.max())))
            survival = np.where(forest.depth > 0, np.take_along_axis(known, (forest.depth - 1).clip(0), 1), 0.0)
        else:
            said = ride.past.calibration if self._policy.calibration.method == "sts" else self._as_it_comes
            survival = said.apply(confidence, forest)
        if ride.plan.settled:
            kept = forest.depth <= ride.batch.max_depth[:, None]
        else:
            kept = ride.scheduler.select(ride.batch, survival, None if forest.is_chain else forest.depth)
            if confidence is not None:
                kept &= forest.closed(confidence > 0)  # where a path ends, no schedule goes on
        if unsound is not None and unsound.any():
            kept &= forest.closed(~unsound)
            self._unsound += int(unsound.sum())
        self._sound = self._bad_drafts == bad
        ride.past.observe(forest, survival, np.array(ride.plan.depths), ride.probe)
        ride.survival, ride.verified, ride.offered = survival, kept, kept.sum(1).tolist()
        ride.rows = len(kept) + sum(ride.offered)
        return kept

    def learn(self, ride: Ride, path: Ints, live: Bools) -> None:
        """What a round accepted. path: int64 `[n, P]`, rows as in `Forest.on_path`

        live: bool `[n]`, the requests whose tokens count; others had ended when the round began, unknown to the host
        """
        assert ride.forest is not None and ride.verified is not None
        ride.verified = ride.verified & live[:, None]
        ride.offered, ride.lengths = ride.verified.sum(1).tolist(), ((path >= 0).sum(1) * live).tolist()
        survived = ride.forest.on_path(ride.verified, path)
        self._survival.add(ride.predicted, survived[ride.verified])
        tested = ride.forest.tested(ride.verified, survived)
        learning = ride.confidence if self._policy.calibration.online else None
        weight = news(len(ride.plan.depths)) if ride.probe else 1
        ride.past.calibration.observe(learning, ride.forest.depth, tested, survived, weight)
        speaking = sum(1 for k in ride.offered if k)
        if speaking:
            self._shape.learn(sum(ride.offered) / speaking)
        self._name_bad_drafts()
        if self._recorder is not None:
            self._recorder.write(ride.requests, ride.forest, ride.verified, survived, ride.confidence)

    def publish(self, ride: Ride, phases: Mapping[str, float]) -> None:
        """Put a step that has been learned from on `/metrics`. phases: host seconds since the server started"""
        metrics = self._metrics
        if metrics is None:
            return
        step = ride.step
        metrics.phases(phases)
        metrics.add("steps", 1, step.kind)
        metrics.add("emitted_tokens", step.emitted, step.kind)
        metrics.set("depth", step.offered / step.requests)
        metrics.set("width", step.offered / max(1, step.speculating))
        metrics.set("rows", step.rows)
        metrics.set("active_rule", 0 if ride.active.rule is None else ride.active.rule + 1)
        if step.offered:
            accepted = step.gained - step.speculating
            metrics.add("draft_tokens", accepted, "accepted")
            metrics.add("draft_tokens", step.offered - accepted, "rejected")
            metrics.observe("accepted_length", [n for n, k in zip(ride.lengths, ride.offered, strict=True) if k])
            predicted = float(ride.predicted.sum())
            metrics.add("survival_predicted", predicted)
            metrics.add("survival_observed", accepted)
            metrics.add("calibration_error", abs(predicted - accepted))
            metrics.add("tokens_saved", accepted)
        metrics.total("bad_confidences", self._bad_confidences)
        metrics.total("unsound_drafts", self._unsound)

    def _shape_paid(self, ride: Ride, seconds: float) -> None:
        step = ride.step
        plain = self._cost.plain_seconds(step.requests, step.context)
        promised = 1 + float(ride.predicted.sum()) / step.requests
        tree = ride.plan.tree is not None
        self._shape.paid(tree, step.requests, promised, step.emitted / step.requests, seconds / plain)

    def _expected_seconds(self, step: Step, kind: str) -> float:
        if kind == PLAIN:
            return self._cost.plain_seconds(step.requests, step.context)
        return float(self._cost.round_seconds(step.requests, np.array([step.rows]), step.context, step.depth, kind)[0])

    # -- The policy --------------------------------------------------------------------------------------------------

    def _refresh(self) -> None:
        """Take over what was saved since; only ever called between two steps."""
        saved = self._watch.take()
        if saved is not None:
            self._adopt(saved)

    def _adopt(self, policy: Policy) -> None:
        """Take over a policy, between two steps."""
        self._policy = policy
        self._cost = self._profile if policy.cost.source == "profiled" else self._learned
        if not self._cost.ready:
            logger.warning(
                "dspark: policy %s: no step has been measured; rounds stay shallow until some are", policy.name
            )
        self._rules = RuleBook(policy, self._block)
        asked = most_nodes(policy)
        if asked > self._room > 0:
            logger.warning(
                "dspark: policy %s: trees of %d nodes are cut to %d, for which the server has reserved KV; "
                "for more start it with this policy or --speculative-num-draft-tokens %d",
                *(policy.name, asked, self._room, asked + 1),
            )
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

    @property
    def _bad_confidences(self) -> int:
        said = [self._as_it_comes, *(past.calibration for past in self._past.values())]
        return sum(calibration.bad for calibration in said)

    @property
    def _bad_drafts(self) -> int:
        return self._unsound + self._bad_confidences

    def _name_bad_drafts(self) -> None:
        """The log says when a draft model returns no numbers: the first time, and whenever it is ten times as many."""
        bad = self._bad_drafts
        if bad >= max(1, 10 * self._bad_drafts_named):
            self._bad_drafts_named = bad
            logger.warning(
                "dspark: the draft has returned NaN, or a confidence outside 0 to 1, for %d drafts: none is accepted, "
                "and answers stay exact; check its checkpoint",
                bad,
            )

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
            "decision": {} if self._latest is None else self._latest.decision,
            "reliability": self._survival.report,
        }

"""Holds the policy in force, its rules, its schedulers and the prices it goes by; a saved one replaces it whole.

The log says what of a policy this server cannot do. Never plans a step.
"""

from __future__ import annotations

import logging
from collections.abc import Set
from typing import Any

from dspark_sgl.policies.batch import Scheduler
from dspark_sgl.policies.cost import CostModel
from dspark_sgl.policies.language import DEFAULT_TIER, Policy, Schedule
from dspark_sgl.policies.rules import RuleBook
from dspark_sgl.policies.scheduler import make_scheduler
from dspark_sgl.policies.shape import most_nodes

from .metrics import Metrics
from .policy_watch import PolicyWatch

logger = logging.getLogger(__name__)

CAUSALITY = "early_stop"
"""What `auto` means here: `select` sees this round's own confidences, and an early stop keeps them from biasing it."""
MOST_TIERS_NAMED = 100
"""Clients choose these names; the log must not grow with them."""


class PolicyInForce:
    """block, room: as in `Governor`; profile: what steps cost, measured at the start; signals: that can be read here"""

    policy: Policy
    rules: RuleBook
    cost: CostModel

    def __init__(
        self, watch: PolicyWatch, block: int, room: int, profile: CostModel, signals: Set[str], metrics: Metrics | None
    ) -> None:
        self._watch, self._block, self._room, self._signals, self._metrics = watch, block, room, signals, metrics
        self._profile, self._learned = profile, CostModel()  # both outlive a reload
        self._unknown_tiers: set[str] = set()
        self._adopt(watch.first)
        watch.start()

    def refresh(self) -> None:
        """Take over what was saved since; only ever called between two steps."""
        saved = self._watch.take()
        if saved is not None:
            self._adopt(saved)

    def _adopt(self, policy: Policy) -> None:
        self.policy, self.rules = policy, RuleBook(policy, self._block)
        self.cost = self._profile if policy.cost.source == "profiled" else self._learned
        self._schedulers: dict[Schedule, Scheduler] = {}
        if not self.cost.ready:
            self._warn("no step has been measured; rounds stay shallow until some are")
        asked = most_nodes(policy)
        if asked > self._room > 0:
            self._warn(
                f"trees of {asked} nodes are cut to {self._room}, for which the server has reserved KV; for more start "
                f"it with this policy or --speculative-num-draft-tokens {asked + 1}"
            )
        for line in self.rules.missing(self._signals):
            self._warn(line)
        if self._metrics is not None:
            self._metrics.policy(policy.name, policy.digest)

    def scheduler(self, schedule: Schedule) -> Scheduler:
        """One per schedule of the policy, kept while the policy is: it remembers its probes."""
        if schedule not in self._schedulers:
            self._schedulers[schedule] = make_scheduler(schedule, self.cost, self.policy.cost.margin, CAUSALITY)
        return self._schedulers[schedule]

    def name_unknown(self, tiers: Set[str]) -> None:
        """A tier that the policy does not know is served as the default one; the log says so, once a tier."""
        unknown = tiers - self._unknown_tiers - {DEFAULT_TIER, *self.policy.tiers}
        if unknown and len(self._unknown_tiers) < MOST_TIERS_NAMED:
            self._unknown_tiers |= unknown
            self._warn(f"there is no tier {', '.join(sorted(unknown))}: served as default")

    @property
    def report(self) -> dict[str, Any]:
        """For `/server_info`."""
        reloads = self._watch.reloads
        return {
            "policy": self.policy.name,
            "digest": self.policy.digest,
            "reloads": {"accepted": reloads.accepted, "refused": reloads.refused},
            "tiers": list(self.policy.tiers),
            "cost": self.cost.source,
        }

    def _warn(self, line: str) -> None:
        logger.warning("dspark: policy %s: %s", self.policy.name, line)

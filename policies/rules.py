"""A policy's rules against the load of a moment: which schedule is in force, and which limits each request has.

Pure and deterministic: the same policy, snapshot and request give the same answer on every rank. Never reads a device.
"""

from collections.abc import Collection
from dataclasses import dataclass

from .cells import Cells
from .conditions import Condition, Surroundings, compile_condition
from .language import DEFAULT_TIER, Depth, Policy, Rule, Schedule, Shape, Tier
from .limits import RequestLimits, fold
from .signals import RequestSignals, Snapshot, Value

_NO_SIGNALS = Snapshot({})
_MOST_KNOWN = 4096  # limits kept by what a rule can tell about a request, and forgotten together


@dataclass(frozen=True, slots=True)
class Active:
    """What is in force for a batch. `rule`: index of the batch-wide rule that fired, None when none did."""

    schedule: Schedule
    shape: Shape
    depth: Depth
    rule: int | None = None


class RuleBook:
    """The first rule that matches wins. A rule whose condition hangs on an absent signal does not match.

    Schedule and shape come from the first batch-wide rule that matches; a request's bounds from the first rule of
    either kind that matches for it. What a rule leaves out stays as the policy says. Not for several threads at once.

    `block`: the depth of the drafter. `per_request`: whether any rule reads `request.*`; if not, `request` is cheap.
    """

    def __init__(self, policy: Policy, block: int) -> None:
        self._policy = policy
        self._block = block
        self._plain = Active(policy.schedule, policy.shape, policy.depth)
        compiled = [(index, rule, compile_condition(rule.when)) for index, rule in enumerate(policy.rules)]
        self._batch = [(entry[2], self._activate(*entry[:2])) for entry in compiled if not entry[2].per_request]
        self._request = [(i, condition, self._depth(rule)) for i, rule, condition in compiled if condition.per_request]
        self._conditions = [condition for _, _, condition in compiled]
        self._default = policy.tiers.get(DEFAULT_TIER, Tier())
        self.per_request = bool(self._request)
        self._cells = Cells(condition.tree for _, condition, _ in self._request)
        self._mixed = any(not name.startswith("request.") for _, each, _ in self._request for name in each.signals)
        self._known: dict[tuple[object, ...], RequestLimits] = {}
        self._snapshot = _NO_SIGNALS
        self._about: RequestSignals | None = None
        self._surroundings = Surroundings(self._look_up) if compiled else None

    def missing(self, available: Collection[str]) -> list[str]:
        """One line per rule that reads a batch-wide signal which this machine does not have."""
        lines = []
        for rule, condition in zip(self._policy.rules, self._conditions, strict=True):
            absent = sorted(name for name in condition.signals - set(available) if not name.startswith("request."))
            if absent:
                names = ", ".join(absent)
                lines.append(f"rule at line {rule.line} ({rule.when.strip()}): {names} cannot be read on this machine")
        return lines

    def batch(self, snapshot: Snapshot) -> Active:
        """What is in force for the whole batch."""
        if self._mixed:
            self._known.clear()
        self._snapshot, self._about = snapshot, None
        for condition, active in self._batch:
            if self._holds(condition):
                return active
        return self._plain

    def request(
        self, active: Active, snapshot: Snapshot, request: RequestSignals, max_depth: int | None = None
    ) -> RequestLimits:
        """The limits of one request under what `batch` found. `max_depth`: what the request itself asked for."""
        if len(self._known) > _MOST_KNOWN or (self._mixed and snapshot is not self._snapshot):
            self._known.clear()
        key = (active.rule, request.tier, max_depth, self._cells.of(request) if self.per_request else None)
        limits = self._known.get(key)
        if limits is None:
            tier = self._policy.tiers.get(request.tier, self._default)
            limits = fold(self._bounds(active, snapshot, request), tier, max_depth, self._block)
            self._known[key] = limits
        return limits

    def _bounds(self, active: Active, snapshot: Snapshot, request: RequestSignals) -> Depth:
        self._snapshot, self._about = snapshot, request
        for index, condition, depth in self._request:
            if active.rule is not None and index > active.rule:
                break
            if self._holds(condition):
                return depth
        return active.depth

    def _holds(self, condition: Condition) -> bool:
        return self._surroundings is not None and condition.holds(self._surroundings)

    def _look_up(self, name: str) -> Value | None:
        if name.startswith("request."):
            return self._about.get(name) if self._about else None
        value = self._snapshot.values.get(name)
        return value if value is None or isinstance(value, bool) else float(value)

    def _activate(self, index: int, rule: Rule) -> Active:
        policy = self._policy
        return Active(rule.schedule or policy.schedule, rule.shape or policy.shape, self._depth(rule), index)

    def _depth(self, rule: Rule) -> Depth:
        """The rule's bounds over the policy's."""
        said, policy = rule.depth or Depth(), self._policy.depth
        low = policy.min if said.min is None else said.min
        return Depth(low, policy.max if said.max is None else said.max)

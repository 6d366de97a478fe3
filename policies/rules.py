"""A policy's rules against the load of a moment: which schedule is in force, and which limits each request has.

Pure and deterministic: the same policy, snapshot and request give the same answer on every rank. Never reads a device.
"""

from collections.abc import Collection
from dataclasses import dataclass

from .cells import Cells
from .conditions import Condition, Surroundings, compile_condition
from .language import DEFAULT_TIER, Depth, Policy, Rule, Schedule, Shape, TableSchedule, Tier
from .limits import RequestLimits, fold
from .signals import SIGNALS, RequestSignals, Snapshot, Value

_NO_SIGNALS = Snapshot({})
_MOST_KNOWN = 4096  # requests that computed numbers set apart must not fill the memory


@dataclass(frozen=True, slots=True)
class Active:
    """What is in force for a batch. `rule`: index of the batch-wide rule that fired, None when none did."""

    schedule: Schedule
    shape: Shape
    depth: Depth
    rule: int | None = None


@dataclass(frozen=True, slots=True)
class _Compiled:
    """A rule that is ready to be asked, and what is in force while it holds."""

    rule: Rule
    condition: Condition
    index: int
    active: Active


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
        self._default = policy.tiers.get(DEFAULT_TIER, Tier())
        self._rules = [_compile(rule, index, policy) for index, rule in enumerate(policy.rules)]
        self._for_batch = [each for each in self._rules if not each.condition.per_request]
        self._for_request = [each for each in self._rules if each.condition.per_request]
        self.per_request = bool(self._for_request)
        # What conditions are asked about, set before each.
        self._snapshot = _NO_SIGNALS
        self._about: RequestSignals | None = None
        self._surroundings = Surroundings(self._look_up) if self._rules else None
        # Limits by all that a rule or a tier can tell about a request; of one step only, where rules mix in its load.
        self._known: dict[tuple[object, ...], RequestLimits] = {}
        self._cells = Cells(each.condition.tree for each in self._for_request)
        self._mixed = any(_batch_wide(each.condition) for each in self._for_request)

    def missing(self, available: Collection[str]) -> list[str]:
        """One line per rule and per table that reads a batch-wide signal which this machine does not have."""
        lines = []
        tables = [("the policy's", self._policy.schedule), *(_table_of(each.rule) for each in self._rules)]
        for whose, schedule in tables:
            if isinstance(schedule, TableSchedule) and schedule.by not in available:
                lines.append(f"{whose} table: {schedule.by} cannot be read here; the shallowest point holds")
        for each in self._rules:
            absent = sorted(_batch_wide(each.condition) - set(available))
            if absent:
                when = " ".join(each.rule.when.split())
                lines.append(f"rule at line {each.rule.line} ({when}): {', '.join(absent)} cannot be read here")
        return lines

    def batch(self, snapshot: Snapshot) -> Active:
        """What is in force for the whole batch."""
        if self._mixed:
            self._known.clear()
        self._snapshot, self._about = snapshot, None
        for each in self._for_batch:
            if self._holds(each.condition):
                return each.active
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
        for each in self._for_request:
            if active.rule is not None and each.index > active.rule:
                break
            if self._holds(each.condition):
                return each.active.depth
        return active.depth

    def _holds(self, condition: Condition) -> bool:
        return self._surroundings is not None and condition.holds(self._surroundings)

    def _look_up(self, name: str) -> Value | None:
        if name.startswith("request."):
            return self._about.get(name) if self._about else None
        value = self._snapshot.values.get(name)
        return value if value is None or isinstance(value, bool) else float(value)


def _compile(rule: Rule, index: int, policy: Policy) -> _Compiled:
    said, default = rule.depth or Depth(), policy.depth
    depth = Depth(
        default.min if said.min is None else said.min,
        default.max if said.max is None else said.max,
    )
    active = Active(rule.schedule or policy.schedule, rule.shape or policy.shape, depth, index)
    return _Compiled(rule, compile_condition(rule.when), index, active)


def _table_of(rule: Rule) -> tuple[str, Schedule | None]:
    return f"rule at line {rule.line}, its", rule.schedule


def _batch_wide(condition: Condition) -> frozenset[str]:
    return frozenset(name for name in condition.signals if SIGNALS[name].scope == "batch")

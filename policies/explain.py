"""Why a policy does what it does at a given load: which rule fires, which limits follow, which rules stay silent.

Asks the same conditions and the same `RuleBook` that the server asks. How deep the scheduler then goes is in grid.py.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .conditions import Surroundings, compile_condition
from .language import DEFAULT_TIER, Policy
from .limits import RequestLimits
from .rules import Active, RuleBook
from .signals import SIGNALS, RequestSignals, Snapshot, Value
from .suggest import did_you_mean, short

# What is assumed about a load that says nothing of it. Every other signal is absent unless it is given.
ASSUMED: Mapping[str, Value] = {
    "batch.size": 8.0,
    "queue.length": 0.0,
    "kv.usage": 0.5,
    "context.mean": 1000.0,
    "request.tier": DEFAULT_TIER,
    "request.output_len": 256.0,
    "request.temperature": 0.0,
}


@dataclass(frozen=True)
class Load:
    """A moment of a server: batch-wide signals, and the request that is asked about."""

    values: Mapping[str, Value] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Value | None:
        if name in ("context.max", "request.context_len") and name not in self.values:
            return self["context.mean"]
        return self.values.get(name, ASSUMED.get(name))

    @property
    def snapshot(self) -> Snapshot:
        known = {name: self[name] for name, signal in SIGNALS.items() if signal.scope == "batch"}
        return Snapshot({name: value for name, value in known.items() if isinstance(value, (bool, float))})

    def request(self, tier: str) -> RequestSignals:
        number = {name: self[f"request.{name}"] for name in ("context_len", "output_len", "temperature")}
        accepted = self["request.accept_length"]
        return RequestSignals(
            tier,
            int(number["context_len"] or 0),
            int(number["output_len"] or 0),
            float("nan") if accepted is None else float(accepted),
            float(number["temperature"] or 0),
        )


@dataclass(frozen=True)
class Verdict:
    """A rule at a load. `absent`: signals that it reads and nobody gave; `fires`: it holds and none before it did."""

    line: int
    when: str
    per_request: bool
    holds: bool
    fires: bool
    absent: tuple[str, ...]


@dataclass(frozen=True)
class Explanation:
    """What is in force at a load. `limits`: by tier, for a request that asks for nothing itself."""

    active: Active
    rules: tuple[Verdict, ...]
    limits: Mapping[str, RequestLimits]


def parse_load(settings: Sequence[str]) -> Load:
    """Reads `batch.size=32,kv.usage=0.9`; a one-line ValueError for an unknown signal or a value of another type."""
    values: dict[str, Value] = {}
    for setting in ",".join(settings).split(",") if settings else ():
        name, equals, text = setting.partition("=")
        if not equals:
            raise ValueError(f"--set takes SIGNAL=VALUE, not {short(setting)}")
        if name not in SIGNALS:
            hint = did_you_mean(name, SIGNALS) or "; docs/policies.md lists the signals"
            raise ValueError(f"--set {short(setting)}: unknown signal{hint}")
        values[name] = _value(name, text)
    return Load(values)


def explain(policy: Policy, load: Load, block: int) -> Explanation:
    """What the rules make of this load; `block`: the drafter's depth."""
    book, snapshot = RuleBook(policy, block), load.snapshot
    active = book.batch(snapshot)
    tiers = sorted({DEFAULT_TIER, *policy.tiers, str(load["request.tier"])})
    limits = {tier: book.request(active, snapshot, load.request(tier)) for tier in tiers}
    return Explanation(active, tuple(_verdicts(policy, load, active)), limits)


def _verdicts(policy: Policy, load: Load, active: Active) -> list[Verdict]:
    surroundings = Surroundings(load.__getitem__)
    verdicts: list[Verdict] = []
    decided = False  # whether an earlier rule has decided the request's bounds
    for index, rule in enumerate(policy.rules):
        condition = compile_condition(rule.when)
        holds = condition.holds(surroundings)
        fires = holds and (not decided if condition.per_request else index == active.rule)
        absent = tuple(sorted(name for name in condition.signals if load[name] is None))
        verdicts.append(Verdict(rule.line, " ".join(rule.when.split()), condition.per_request, holds, fires, absent))
        decided = decided or holds
    return verdicts


def _value(name: str, text: str) -> Value:
    kind = SIGNALS[name].kind
    if kind == "text":
        return text
    if kind == "bool" and text in ("true", "false"):
        return text == "true"
    try:
        number = float(text) if kind == "number" else float("nan")
    except ValueError:
        number = float("nan")
    highest = SIGNALS[name].highest
    if not 0 <= number <= highest or math.isinf(number):
        share = f"a number from 0 to {highest:g}"
        wanted = "true or false" if kind == "bool" else "a number, 0 or more" if math.isinf(highest) else share
        raise ValueError(f"--set {name}: must be {wanted}, not {short(text)}")
    return number

"""Reads the rules of a policy and refuses those that cannot mean what they say: a typo, a wrong type, a rule that
nothing reaches, a tier that nobody has.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .conditions import Condition, compile_condition
from .expressions import MAX_LENGTH, ConditionError, Node
from .grammar import Json, Key, Reader, Record
from .language import DEFAULT_TIER, Depth, Policy, Rule
from .nodes import Located
from .reachability import implies, impossible
from .suggest import did_you_mean, short

MAX_RULES = 32


@dataclass(frozen=True)
class ReadRule:
    """A rule with what its checks need: the compiled condition, and the places of `when` and of what it sets."""

    rule: Rule
    condition: Condition
    when: Located
    settings: Mapping[str, Located]


@dataclass(frozen=True)
class When:
    """A CEL condition, compiled."""

    def read(self, value: Located) -> Condition:
        text = value.condition(MAX_LENGTH)
        try:
            return compile_condition(text)
        except ConditionError as error:
            raise value.error_at(error.offset, f"{value.path}: {error.message}") from None

    def schema(self) -> Json:
        return {"anyOf": [{"type": "string", "minLength": 1, "maxLength": MAX_LENGTH}, {"type": "boolean"}]}


class Rules:
    """A list of `{when: condition, set: {schedule, shape, depth}}`."""

    def __init__(self, schedule: Reader[Any], shape: Reader[Any], depth: Reader[Any]) -> None:
        self.settings: Record[dict[str, Any]] = Record(
            dict[str, Any],
            Key("schedule", schedule, "the schedule while the rule holds; batch-wide rules only"),
            Key("shape", shape, "the shape while the rule holds; batch-wide rules only"),
            Key("depth", depth, "bounds while the rule holds; what it leaves out stays as the policy says"),
        )
        self.rule: Record[dict[str, Any]] = Record(
            dict[str, Any],
            Key("when", When(), "a CEL condition over signals", True),
            Key("set", self.settings, "what changes while it holds", True),
        )

    def read(self, value: Located) -> tuple[ReadRule, ...]:
        return tuple(self._read_one(item) for item in value.items(MAX_RULES))

    def _read_one(self, value: Located) -> ReadRule:
        entries = self.rule.open(value)
        made = self.rule.build(value, entries)
        if not made["set"]:
            raise entries["set"].error(f"{entries['set'].path} is empty: a rule sets schedule, shape or depth")
        if made["set"].get("depth") == Depth():
            raise entries["set"].error(f"{entries['set'].path}.depth is empty: it sets min, max or both")
        line = value.node.start_mark.line + 1
        rule = Rule(made["when"].text, line=line, **made["set"])
        return ReadRule(rule, made["when"], entries["when"], self.settings.open(entries["set"]))

    def schema(self) -> Json:
        item = self.rule.schema()
        settings = item["properties"]["set"]
        settings["minProperties"] = settings["properties"]["depth"]["minProperties"] = 1
        return {"type": "array", "maxItems": MAX_RULES, "items": item}


def check_rules(rules: Sequence[ReadRule], policy: Policy) -> None:
    """Raises a located PolicyError for the first rule that cannot mean what it says."""
    for index, entry in enumerate(rules):
        _check_scope(entry)
        _check_constant(entry)
        _check_possible(entry)
        _check_depth(entry, policy)
        _check_tier_names(entry, policy)
        _check_reached(entry, rules[:index])


def _check_scope(entry: ReadRule) -> None:
    for key in ("schedule", "shape"):
        if entry.condition.per_request and key in entry.settings:
            reads = sorted(name for name in entry.condition.signals if name.startswith("request."))
            raise entry.settings[key].error(
                f"a rule that reads {reads[0]} holds for single requests and may set depth only; {key} is the batch's"
            )


def _check_constant(entry: ReadRule) -> None:
    if entry.condition.constant is False:
        raise entry.when.error(f"{entry.when.path} is never true, so the rule does nothing")


def _check_possible(entry: ReadRule) -> None:
    if found := impossible(entry.condition.tree):
        node, why = found
        raise entry.when.error_at(node.offset, f"{entry.when.path}: {why}")


def _check_depth(entry: ReadRule, policy: Policy) -> None:
    said, most = entry.rule.depth, policy.depth.max
    if said is None or said.min is None or said.max is not None or most is None or said.min <= most:
        return
    place = entry.settings["depth"]
    raise place.error(f"{place.path}.min is {said.min}, above the policy's depth.max, {most}")


def _check_reached(entry: ReadRule, earlier: Sequence[ReadRule]) -> None:
    # Schedule and shape come from rules about the batch alone: those about requests do not stand in their way.
    whole = bool(entry.settings.keys() & {"schedule", "shape"})
    for other in earlier:
        if whole and other.condition.per_request:
            continue
        if other.condition.constant or implies(entry.condition.tree, other.condition.tree):
            held = "always holds" if other.condition.constant else "holds whenever this one does"
            raise entry.when.error(f"unreachable: the rule at line {other.rule.line} comes first and {held}")


def _check_tier_names(entry: ReadRule, policy: Policy) -> None:
    known = {*policy.tiers, DEFAULT_TIER}
    for node in entry.condition.tree.walk():
        for literal in _tier_literals(node):
            if literal.value not in known:
                hint = did_you_mean(str(literal.value), known) or f"; declared are {', '.join(sorted(known))}"
                raise entry.when.error_at(literal.offset, f"no tier is called {short(literal.value)}{hint}")


def _tier_literals(node: Node) -> list[Node]:
    """The texts that this comparison holds against request.tier."""
    if not any(part.op == "signal" and part.value == "request.tier" for part in node.parts):
        return []
    return [leaf for leaf in node.walk() if leaf.op == "literal" and leaf.kind == "text"]

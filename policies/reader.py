"""From a YAML file to a `Policy`, or to one located error. The grammar below is the whole language.

The same declarations make the JSON Schema (schema.py), and a test compares them with docs/policies.md. To add a kind of
schedule: a dataclass in language.py, its record here, its scheduler in scheduler.py.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from . import causality, language
from .errors import PolicyError
from .grammar import DepthOrBlock, Flag, Integer, Key, Named, Number, Record, Text, Variants, Word
from .language import MAX_DEPTH, MAX_NODES, Depth, Policy, Schedule, Shape, Tier
from .nodes import MAX_BYTES, Located, compose
from .points import Points, check_table
from .rule_reader import Rules, check_rules
from .signals import BATCH_NUMBERS
from .suggest import short

_NAME = Text(
    64,
    r"[A-Za-z0-9][A-Za-z0-9._-]*",
    "may hold letters, digits, '.', '_' and '-' only: it becomes a metrics label",
)
_VERSION = Integer(1, 10**6)
_CAUSALITY = Key("causality", Word(language.CAUSALITIES), "in which order decisions may look at confidences")


def _one_of_depth_and_nodes(_: object, entries: Mapping[str, Located], value: Located) -> None:
    if len(entries.keys() & {"depth", "nodes"}) != 1:
        raise value.error(f"a fixed {value.path} needs one of depth and nodes")


def _a_chain_has_no_tree(shape: Shape, entries: Mapping[str, Located], value: Located) -> None:
    if shape.kind == "chain":
        for key in ("max_nodes", "branch"):
            if key in entries:
                raise entries[key].error(f"{value.path}.{key} does nothing for a chain; set kind: tree or kind: auto")


def _min_below_max(depth: Depth, entries: Mapping[str, Located], value: Located) -> None:
    if depth.min is not None and depth.max is not None and depth.min > depth.max:
        raise entries["min"].error(f"{value.path}.min is {depth.min}, above its max, {depth.max}")


def _tier_min_below_max(tier: Tier, entries: Mapping[str, Located], value: Located) -> None:
    if tier.max_depth is not None and tier.min_depth > tier.max_depth:
        raise entries["min_depth"].error(f"min_depth is {tier.min_depth}, above max_depth, {tier.max_depth}")


SCHEDULE: Variants[Schedule] = Variants(
    {
        "fixed": Record(
            language.FixedSchedule,
            Key("depth", Integer(0, MAX_DEPTH), "draft tokens per request and round; 0 is plain decoding"),
            Key("nodes", Integer(0, MAX_NODES), "tree nodes per request and round; on a chain, its depth"),
            check=_one_of_depth_and_nodes,
        ),
        "threshold": Record(
            language.ThresholdSchedule,
            Key("confidence", Number(0, 1, above=True), "keep tokens whose calibrated survival is this high", True),
        ),
        "table": Record(
            language.TableSchedule,
            Key("by", Word(BATCH_NUMBERS), "the signal to look up", True),
            Key("points", Points(), "depth at values of the signal, increasing", True),
            Key("interpolate", Word(language.INTERPOLATIONS), "between two points: the lower one's depth, or a line"),
            check=check_table,
        ),
        "throughput": Record(language.ThroughputSchedule, _CAUSALITY),
        "slo": Record(
            language.SloSchedule,
            Key("tokens_per_second_per_user", Number(0, 1e6, above=True), "the speed promised to every user", True),
            _CAUSALITY,
        ),
    }
)
SHAPE = Record(
    language.Shape,
    Key("kind", Word(language.SHAPES), "chain, tree, or auto: whichever suits what the schedule buys"),
    Key("max_nodes", Integer(1, MAX_NODES), "most draft tokens of a tree"),
    Key("branch", Integer(1, 16), "most children of a node"),
    check=_a_chain_has_no_tree,
)
DEPTH = Record(
    language.Depth,
    Key("min", Integer(0, MAX_DEPTH), "least depth of every request; above 0 the batch is never decoded plainly"),
    Key("max", DepthOrBlock(), "greatest depth; block: as deep as the drafter goes"),
    check=_min_below_max,
)
ACCEPT = Record(
    language.Accept,
    Key("method", Word(language.ACCEPT_METHODS), "how draft tokens are judged; every method is exact"),
)
COST = Record(
    language.Cost,
    Key("source", Word(language.COST_SOURCES), "where step times come from: profiled at start, or learned only"),
    Key("refine", Word(language.REFINEMENTS), "whether measured steps go on correcting them"),
    Key("margin", Number(0, 1), "how much more than plain decoding speculation must promise"),
)
CALIBRATION = Record(
    language.Calibration,
    Key("method", Word(language.CALIBRATIONS), "sequential temperature scaling, or confidence as it comes"),
    Key("online", Flag(), "whether live acceptance goes on correcting it"),
)
TIER = Record(
    language.Tier,
    Key("weight", Number(0, 1000, above=True), "what a token of this tier counts in the objective"),
    Key("min_depth", Integer(0, MAX_DEPTH), "least depth of its requests; above 0 the batch is never decoded plainly"),
    Key("max_depth", DepthOrBlock(), "greatest depth of its requests; block: as deep as the drafter goes"),
    check=_tier_min_below_max,
)
TIERS = Named(_NAME, TIER, most=32)
RULES = Rules(SCHEDULE, SHAPE, DEPTH)
POLICY: Record[dict[str, Any]] = Record(
    dict[str, Any],
    Key("version", _VERSION, "of the language; this release reads 1", True),
    Key("name", _NAME, "shown in metrics and logs; without it, the file's name"),
    Key("description", Text(2000), "for people"),
    Key("schedule", SCHEDULE, "how deep to verify, within the limits below", True),
    Key("shape", SHAPE, "what is drafted"),
    Key("depth", DEPTH, "bounds for every request"),
    Key("accept", ACCEPT, "how draft tokens are judged"),
    Key("cost", COST, "the price of a step"),
    Key("calibration", CALIBRATION, "how confidence becomes a chance"),
    Key("tiers", TIERS, "classes of requests, chosen by a request's custom_params.dspark.tier"),
    Key("rules", RULES, "what changes with the load; evaluated every step, first match wins"),
)


def load_policy(path: str | Path) -> Policy:
    """Reads a policy file."""
    return parse_policy(read_policy_file(path), str(path))


def read_policy_file(path: str | Path) -> bytes:
    """The content of a file, as much of it as could be a policy; a PolicyError when it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read(MAX_BYTES + 1)
    except IsADirectoryError:
        raise PolicyError(str(path), 0, 0, "is a folder, not a policy file") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise PolicyError(str(path), 0, 0, f"cannot be read: {reason}") from None


def parse_policy(data: str | bytes, file: str = "policy") -> Policy:
    """Reads a policy from text; `file` is what errors call it; its stem names a nameless policy."""
    if isinstance(data, str):
        data = data.encode("utf-8", "surrogatepass")
    root = compose(data, file)
    _check_version(root)
    entries = POLICY.open(root)
    said = POLICY.build(root, entries)
    said.pop("version")
    rules = said.pop("rules", ())
    policy = Policy(
        **{
            **said,
            "name": said["name"] if "name" in said else _name_of_file(file, root),
            "description": said.get("description", "").strip(),
            "tiers": MappingProxyType(said.get("tiers", {})),
            "rules": tuple(entry.rule for entry in rules),
            "digest": hashlib.sha256(data).hexdigest()[:12],
        }
    )
    _check_tiers(policy, entries)
    _check_causality(policy.schedule, policy, entries["schedule"])
    for entry in rules:
        if entry.rule.schedule:
            _check_causality(entry.rule.schedule, policy, entry.settings["schedule"])
    check_rules(rules, policy)
    return policy


def _check_version(root: Located) -> None:
    """Before anything else is looked at: what a newer language added must not be called a typo."""
    for key, value in root.entries():
        if key.node.value == "version" and (version := _VERSION.read(value)) != 1:
            raise value.error(f"version {version} of the language needs a newer dspark-sgl; this release reads 1")


def _name_of_file(file: str, root: Located) -> str:
    stem = Path(file).stem
    if not _NAME.fits(stem):
        raise root.error(
            f"the file's name would be the policy's, but {short(stem)} {_NAME.rule}; give it the key 'name'"
        )
    return stem


def _check_tiers(policy: Policy, entries: Mapping[str, Located]) -> None:
    most = policy.depth.max
    if most is None or "tiers" not in entries:
        return
    for key, value in entries["tiers"].entries():
        least = policy.tiers[key.node.value].min_depth
        if least > most:
            raise value.error(f"{value.path}.min_depth is {least}, above the policy's depth.max, {most}")


def _check_causality(schedule: Schedule, policy: Policy, value: Located) -> None:
    reason = causality.objection(schedule, policy.accept)
    if reason:
        raise {key.node.value: place for key, place in value.entries()}["causality"].error(reason)

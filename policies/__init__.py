"""Policies: how much of a draft is worth the target's time. Plain Python.

Nothing in this folder imports torch, SGLang or any other part of this project, so that a policy can be
checked, explained and simulated in milliseconds on a machine that has neither. What computes with arrays
(scheduler, cost, calibration, simulator) is imported from its own module: reading a policy needs no numpy.
"""

from .errors import PolicyError
from .language import (
    Accept,
    Calibration,
    Cost,
    Depth,
    FixedSchedule,
    Policy,
    Rule,
    Schedule,
    Shape,
    SloSchedule,
    TableSchedule,
    ThresholdSchedule,
    ThroughputSchedule,
    Tier,
)
from .limits import RequestLimits
from .reader import load_policy, parse_policy
from .requests import RequestOptions, parse_request_options
from .rules import Active, RuleBook
from .shipped import find_policy, shipped_names
from .signals import SIGNALS, RequestSignals, Signal, Snapshot

__all__ = [
    "SIGNALS",
    "Accept",
    "Active",
    "Calibration",
    "Cost",
    "Depth",
    "FixedSchedule",
    "Policy",
    "PolicyError",
    "RequestLimits",
    "RequestOptions",
    "RequestSignals",
    "Rule",
    "RuleBook",
    "Schedule",
    "Shape",
    "Signal",
    "SloSchedule",
    "Snapshot",
    "TableSchedule",
    "ThresholdSchedule",
    "ThroughputSchedule",
    "Tier",
    "find_policy",
    "load_policy",
    "parse_policy",
    "parse_request_options",
    "shipped_names",
]

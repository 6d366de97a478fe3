"""Policies: how much of a draft is worth the target's time. Plain Python.

Nothing in this folder imports torch, SGLang or any other part of this project, so that a policy can be
checked, explained and simulated in milliseconds on a machine that has neither.
"""

from .errors import PolicyError
from .language import Accept, FixedSchedule, Policy, load_policy, parse_policy
from .requests import RequestOptions, parse_request_options
from .scheduler import FixedScheduler, RequestLimits, Scheduler, make_scheduler
from .shipped import find_policy, shipped_names

__all__ = [
    "Accept",
    "FixedSchedule",
    "FixedScheduler",
    "Policy",
    "PolicyError",
    "RequestLimits",
    "RequestOptions",
    "Scheduler",
    "find_policy",
    "load_policy",
    "make_scheduler",
    "parse_policy",
    "parse_request_options",
    "shipped_names",
]

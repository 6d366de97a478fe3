"""From a policy to depths: how many draft tokens each request of a batch gets in the coming round.

Schedulers are plain arithmetic over plain numbers: the engine calls them between two steps, so they never
block, never read a clock or a device, and give the same answer on every rank for the same input.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from .errors import PolicyError
from .language import FixedSchedule, Policy


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """The most draft tokens this request may use: the drafter's block and the request's own wish, folded."""

    max_depth: int


class Scheduler(Protocol):
    def depths(self, requests: Sequence[RequestLimits]) -> list[int]:
        """Draft tokens to verify per request, same order; never above its `max_depth`."""
        ...


@dataclass(frozen=True)
class FixedScheduler:
    """The same depth for everyone, whatever the load."""

    depth: int

    def depths(self, requests: Sequence[RequestLimits]) -> list[int]:
        return [min(self.depth, request.max_depth) for request in requests]


def make_scheduler(policy: Policy) -> Scheduler:
    """The scheduler of a policy with a fixed depth, the one kind that there is a scheduler for."""
    schedule = policy.schedule
    if isinstance(schedule, FixedSchedule) and schedule.depth is not None:
        return FixedScheduler(schedule.depth)
    raise PolicyError(policy.name, 0, 0, "this release schedules a fixed depth only; take one of fixed-1 to fixed-7")

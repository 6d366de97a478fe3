"""From a policy to depths: how deep each request of a batch is drafted, and which of its drafts are verified.

A round asks twice: `draft_depths` before anything is drafted, from what history predicts, and `select` afterwards, from
the survival of what was drafted. Plain arithmetic between two steps: a scheduler never blocks, never reads a clock or a
device, and gives the same answers for the same questions in the same order.
"""

from dataclasses import dataclass

import numpy as np

from .batch import Batch, Bools, Floats, Ints, Scheduler, clipped, nodes_depth, rank, required
from .cost import CostModel
from .language import FixedSchedule, Schedule, SloSchedule, TableSchedule, ThresholdSchedule, ThroughputSchedule
from .value import ValueScheduler


def make_scheduler(schedule: Schedule, cost: CostModel, margin: float, causality: str) -> Scheduler:
    """The scheduler of a schedule. causality: what `auto` means in this engine, `early_stop` or `lagged`"""
    match schedule:
        case FixedSchedule(depth, nodes):
            return FixedScheduler(depth, nodes)
        case ThresholdSchedule(confidence):
            return ThresholdScheduler(confidence)
        case TableSchedule(by, points, interpolate):
            return TableScheduler(by, points, interpolate)
        case ThroughputSchedule(said):
            return ValueScheduler(cost, margin, causality if said == "auto" else said, None)
        case SloSchedule(speed, said):
            return ValueScheduler(cost, margin, causality if said == "auto" else said, speed)


@dataclass(frozen=True)
class FixedScheduler(Scheduler):
    """The same for everyone, whatever the load: a depth, or a number of nodes, the likeliest ones."""

    depth: int | None
    nodes: int | None

    def draft_depths(self, batch: Batch, expected: Floats, depth: Ints | None = None) -> Ints:
        wanted = self.depth if self.depth is not None else self.nodes
        return clipped(wanted or 0, batch)

    def takes_all(self, batch: Batch) -> bool:
        return self.nodes is None

    def select(self, batch: Batch, survival: Floats, depth: Ints | None = None) -> Bools:
        at = nodes_depth(survival, depth)
        wanted = batch.max_depth if self.depth is None else clipped(self.depth, batch)
        allowed = (at > 0) & (at <= wanted[:, None])
        if self.nodes is None:
            return allowed
        return allowed & ((rank(survival, allowed) < self.nodes) | required(batch.min_depth, survival, at, allowed))


@dataclass(frozen=True)
class ThresholdScheduler(Scheduler):
    """Every node whose survival stays at or above `confidence`."""

    confidence: float

    def draft_depths(self, batch: Batch, expected: Floats, depth: Ints | None = None) -> Ints:
        return batch.max_depth

    def takes_all(self, batch: Batch) -> bool:
        return False

    def select(self, batch: Batch, survival: Floats, depth: Ints | None = None) -> Bools:
        at = nodes_depth(survival, depth)
        allowed = (at > 0) & (at <= batch.max_depth[:, None])
        return allowed & ((survival >= self.confidence) | required(batch.min_depth, survival, at, allowed))


@dataclass(frozen=True)
class TableScheduler(Scheduler):
    """Depth straight from one signal; while that is absent, its shallowest point."""

    by: str
    points: tuple[tuple[float, int], ...]
    interpolate: str

    def draft_depths(self, batch: Batch, expected: Floats, depth: Ints | None = None) -> Ints:
        value = batch.signals.get(self.by)
        shallowest = min(depth for _, depth in self.points)
        return clipped(shallowest if value is None else self._depth(float(value)), batch)

    def takes_all(self, batch: Batch) -> bool:
        return True

    def select(self, batch: Batch, survival: Floats, depth: Ints | None = None) -> Bools:
        at = nodes_depth(survival, depth)
        return (at > 0) & (at <= self.draft_depths(batch, survival)[:, None])

    def _depth(self, value: float) -> int:
        places, depths = zip(*self.points, strict=True)
        if self.interpolate == "linear":
            return round(float(np.interp(value, places, depths)))
        return int(depths[max(0, int(np.searchsorted(places, value, side="right")) - 1)])

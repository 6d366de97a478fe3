"""What the engine knows about its load: the scheduler's signals of a policy, and how they are averaged.

Only looks at numbers that are at hand; never waits, never reads a device: a sampler's thread does that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dspark_sgl.policies.hardware import HardwareSampler
from dspark_sgl.policies.signals import SIGNALS, Snapshot

ENGINE_SIGNALS = frozenset(signal.name for signal in SIGNALS.values() if signal.source == "scheduler")
HALF_LIFE_S = 1.0
"""Running means forget half of what they know in this much decoding time."""


@dataclass(frozen=True)
class Step:
    """One decode step as it was.

    kind: `plain` or `round`; requests: in the batch; rows: of the target's forward; context: KV tokens of the batch
    offered: draft tokens verified; speculating: requests that had any; emitted: tokens of the whole batch
    gained: tokens emitted by the speculating requests; depth: of the deepest draft that was made
    """

    kind: str
    requests: int
    rows: int
    context: int
    offered: int
    speculating: int
    emitted: int
    gained: int
    depth: int


class LoadMeter:
    """Running means over decode steps, and the snapshot of a moment."""

    def __init__(self, hardware: HardwareSampler) -> None:
        self._hardware = hardware
        self.signals = ENGINE_SIGNALS | hardware.available()
        self._scheduler: Any = None
        self._seconds = self._steps = self._emitted = self._requests = 0.0
        self._offered = self._rounds = self._gained = 0.0
        self._rows = 0

    def watch(self, scheduler: Any) -> None:
        """From now on queue and KV figures are those of this SGLang scheduler."""
        self._scheduler = scheduler

    def record(self, step: Step, seconds: float) -> None:
        """A decode step that took `seconds`, the engine's share included."""
        keep = 0.5 ** (seconds / HALF_LIFE_S)
        self._seconds = self._seconds * keep + seconds
        self._steps = self._steps * keep + 1
        self._emitted = self._emitted * keep + step.emitted
        self._requests = self._requests * keep + step.requests
        self._offered = self._offered * keep + step.offered
        self._rounds = self._rounds * keep + step.speculating
        self._gained = self._gained * keep + step.gained
        self._rows = step.rows

    def snapshot(self, lens: Sequence[int]) -> Snapshot:
        """The batch-wide signals now. lens: tokens in the KV of each request of the coming step."""
        values: dict[str, float | bool] = {
            "batch.size": len(lens),
            "context.mean": sum(lens) / len(lens),
            "context.max": max(lens),
        }
        if self._steps:
            values["batch.tokens"] = self._rows
            values["step.ms"] = 1e3 * self._seconds / self._steps
            values["tps.total"] = self._emitted / self._seconds
            values["tps.user"] = self._emitted / self._requests * self._steps / self._seconds
        if self._rounds > 0.5:
            values["accept.length"] = self._gained / self._rounds
            values["accept.rate"] = (self._gained - self._rounds) / self._offered
        if self._scheduler is not None:
            values["queue.length"] = len(self._scheduler.waiting_queue)
            values["kv.usage"] = self._scheduler.pool_stats_observer.get_pool_stats().get_max_pool_usage()
        values.update(self._hardware.latest())
        return Snapshot(values)

"""A minute of decoding in one log line, for people. An idle server says nothing. Decides nothing."""

from __future__ import annotations

from dataclasses import dataclass

from .clock import PLAIN
from .load import Step

LENGTH_S = 60.0


@dataclass
class Minute:
    """Decode steps added up. requests, emitted, ..: sums of what `Step` says; told: seconds of the steps that the cost
    model had an opinion on, expected: its opinion"""

    seconds: float = 0.0
    steps: int = 0
    plain: int = 0
    requests: int = 0
    emitted: int = 0
    offered: int = 0
    speculating: int = 0
    gained: int = 0
    told: float = 0.0
    expected: float = 0.0

    def add(self, step: Step, seconds: float, expected: float | None) -> None:
        """A step that took `seconds`, of which the cost model had expected so many."""
        self.seconds += seconds
        self.steps += 1
        self.plain += step.kind == PLAIN
        self.requests += step.requests
        self.emitted += step.emitted
        self.offered += step.offered
        self.speculating += step.speculating
        self.gained += step.gained
        if expected is not None:
            self.told += seconds
            self.expected += expected

    @property
    def is_full(self) -> bool:
        return self.seconds >= LENGTH_S

    @property
    def line(self) -> str:
        """Of at least one step."""
        users, rate = self.requests / self.steps, self.emitted / self.seconds
        parts = [
            f"{self.emitted} tokens in {self.seconds:.0f} s of decoding",
            f"{rate:.1f} a second, {rate / users:.1f} for each of {users:.1f} requests",
            f"{self.steps} steps, {self.plain / self.steps:.0%} plain",
            f"depth {self.offered / self.requests:.2f}",
        ]
        if self.speculating:
            accepted = (self.gained - self.speculating) / self.offered
            parts.append(f"length {self.gained / self.speculating:.2f}, {accepted:.0%} of drafts accepted")
        if self.expected:
            parts.append(f"steps took {self.told / self.expected:.2f} of the expected time")
        return "; ".join(parts)

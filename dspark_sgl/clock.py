"""Where a step's time goes: seconds per phase and counts since the server started. Never waits for a device.

Where SGLang schedules a step while the one before is still running, the wait for that one is the engine's.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

PREFILL, PLAIN, ROUND = "prefill", "plain", "round"


class RoundClock:
    """Host wall time per phase. On an asynchronous device a phase counts what the host spends launching it."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._counts: Counter[str] = Counter()
        self._accepted: Counter[int] = Counter()
        self._entered_at = self._left_at = time.perf_counter()
        self._kind = PREFILL
        self._gap = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of the block to `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - start

    def enter(self, idle: bool) -> float | None:
        """A step begins. Returns the seconds of the decode step before, the engine's share included; None where that
        was a prefill. idle: the scheduler had nothing to do since, so the engine's usual share stands in for the gap"""
        now = time.perf_counter()
        inside, gap = self._left_at - self._entered_at, now - self._left_at
        self._entered_at = now
        if self._kind == PREFILL:
            return None
        if idle:
            gap = self._gap
        else:
            self._gap += 0.1 * (gap - self._gap)
            self._seconds["engine"] += gap
        return inside + gap

    def leave(self, kind: str, requests: int) -> None:
        """Back to the scheduler, after a step of this kind over so many requests."""
        self._left_at = time.perf_counter()
        self._kind = kind
        self._counts[kind] += 1
        self._counts[f"{kind}_requests"] += requests
        self._seconds[kind] += self._left_at - self._entered_at

    def count(self, drafted: int, lengths: list[int]) -> None:
        """A verify round: draft tokens verified, and tokens emitted by each request that had any."""
        self._counts["drafted"] += drafted
        self._counts["emitted"] += sum(lengths)
        self._counts["request_rounds"] += len(lengths)
        self._accepted.update(lengths)

    @property
    def seconds(self) -> dict[str, float]:
        """Totals so far by phase; a copy."""
        return dict(self._seconds)

    def report(self) -> dict[str, object]:
        """Totals, JSON-ready. `accepted_length` counts the bonus token."""
        rounds = self._counts["request_rounds"]
        return {
            "accepted_length": self._counts["emitted"] / rounds if rounds else None,
            "accepted_histogram": {str(length): n for length, n in sorted(self._accepted.items())},
            "counts": dict(self._counts),
            "seconds": {name: round(value, 4) for name, value in self._seconds.items()},
        }

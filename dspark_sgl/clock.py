"""Where a round's time goes: seconds per phase and token counts since the server started. Never waits for a device."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager


class RoundClock:
    """Host wall time per phase. On an asynchronous device a phase counts what the host spends launching it."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._counts: Counter[str] = Counter()
        self._accepted: Counter[int] = Counter()
        self._left_at = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of the block to `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - start

    @contextmanager
    def step(self, kind: str) -> Iterator[None]:
        """One call from the scheduler; the time since the last one is the engine's."""
        start = time.perf_counter()
        if kind != "prefill" and start - self._left_at < 1.0:  # longer is idleness, not work
            self._seconds["engine"] += start - self._left_at
        self._counts[kind] += 1
        try:
            yield
        finally:
            self._left_at = time.perf_counter()
            self._seconds[kind] += self._left_at - start

    def count(self, drafted: int, lengths: list[int]) -> None:
        """A verify round: draft tokens verified, and tokens emitted by each request that had any."""
        self._counts["drafted"] += drafted
        self._counts["emitted"] += sum(lengths)
        self._counts["request_rounds"] += len(lengths)
        self._accepted.update(lengths)

    def report(self) -> dict[str, object]:
        """Totals, JSON-ready. `accepted_length` counts the bonus token."""
        rounds = self._counts["request_rounds"]
        return {
            "accepted_length": self._counts["emitted"] / rounds if rounds else None,
            "accepted_histogram": {str(length): n for length, n in sorted(self._accepted.items())},
            "counts": dict(self._counts),
            "seconds": {name: round(value, 4) for name, value in self._seconds.items()},
        }

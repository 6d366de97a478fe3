"""Depth, batch and speed of a simulated server over time, in few enough entries to draw. Never knows a cost."""

import numpy as np

from .batch import Floats

STRETCHES = 100
"""A timeline has at least so many entries and at most twice as many: a picture needs no more."""


class Timeline:
    """Depth, batch and speed over time: stretches of equal steps, halved in number whenever there are too many."""

    def __init__(self) -> None:
        self._rows: list[list[float]] = []
        self._every, self._open = 1, [0.0, 0.0, 0.0, 0.0, 0]

    def add(self, seconds: float, nodes: int, requests: int, tokens: int) -> None:
        now = self._open
        now[0] += seconds
        now[1] += nodes
        now[2] += requests
        now[3] += tokens
        now[4] += 1
        if now[4] >= self._every:
            self._rows.append(now)
            self._open = [0.0, 0.0, 0.0, 0.0, 0]
            if len(self._rows) >= 2 * STRETCHES:
                pairs = zip(self._rows[::2], self._rows[1::2], strict=False)
                self._rows = [[x + y for x, y in zip(a, b, strict=True)] for a, b in pairs]
                self._every *= 2

    def rows(self) -> Floats:
        """float64 `[T, 4]`: end in seconds of decoding, depth, requests running, output tokens per second."""
        whole = np.array([*self._rows, *([self._open] if self._open[4] else [])], dtype=np.float64).reshape(-1, 5)
        seconds, nodes, requests, tokens, steps = whole.T
        return np.stack([seconds.cumsum(), nodes / requests, requests / steps, tokens / seconds], axis=1)

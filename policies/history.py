"""What trees of the latest rounds promised, so that the next one can be priced before it is drafted."""

import numpy as np

from .batch import Floats
from .language import MAX_NODES

FOLLOW = 0.1
"""Share of the latest round in what is expected of the next."""


class BestNodes:
    """The survival of a tree's best node, its second best, and so on: running means over requests and rounds."""

    def __init__(self) -> None:
        self._mean = np.zeros(MAX_NODES)
        self.known = False

    def observe(self, survival: Floats) -> None:
        """`[n, N]`, calibrated, 0 where there is no node."""
        latest = np.zeros(MAX_NODES)
        latest[: survival.shape[1]] = -np.sort(-survival, axis=1).mean(0)
        self._mean += (FOLLOW if self.known else 1.0) * (latest - self._mean)
        self.known = True

    def expected(self, requests: int, nodes: int) -> Floats:
        """float64 `[requests, nodes]`, the same for all."""
        return np.tile(self._mean[:nodes], (requests, 1))

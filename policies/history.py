"""What the drafts of the latest rounds promised, so that the next round can be priced before it drafts."""

import numpy as np

from .batch import Floats, Ints
from .language import MAX_NODES

FOLLOW = 0.1
"""Share of the latest round in what is expected of the next."""
LATEST = 64
"""Chains that are remembered."""
PROBE = 8
"""Chains that a probe counts for at least: of one request it is all that was seen of the latest hundred steps."""


def probe_weight(requests: int) -> int:
    """How many times each request of a probe is entered."""
    return max(1, PROBE // max(1, requests))


class Chains:
    """The survival of chains, draft by draft, of the latest requests and rounds.

    Not their mean: a schedule verifies the good ones and leaves the rest, so a round is worth more than the mean says.
    """

    def __init__(self, block: int) -> None:
        self.block = block
        self._latest = np.empty((0, block))

    @property
    def known(self) -> bool:
        return len(self._latest) == LATEST

    def observe(self, survival: Floats, drafted: Ints, follow: Floats, probe: bool = False) -> None:
        """`[n, N]`, calibrated; drafted: int64 `[n]`, how deep; follow: float64 `[block]`, the chance that a draft
        survives if the one before it does, for drafts that were not made; probe: plain steps came before."""
        block = self.block
        chains = np.zeros((len(survival), block))
        chains[:, : survival.shape[1]] = survival[:, :block]
        made = np.arange(1, block + 1) <= drafted[:, None]
        for k in range(block):
            before = chains[:, k - 1] if k else 1.0
            chains[:, k] = np.where(made[:, k], chains[:, k], before * follow[k])
        spoke = chains[drafted > 0]
        # Of a large batch some, evenly: all of it would be one round.
        some = spoke[:: max(1, 4 * len(spoke) // LATEST)]
        if probe:
            some = some.repeat(probe_weight(len(some)), axis=0)
        self._latest = np.concatenate([self._latest, some])[-LATEST:]

    def expected(self, requests: int) -> Floats:
        """float64 `[requests, block]`: spread as they were, the best in the last row; one request: the mean."""
        ranked = np.sort(self._latest, axis=0)
        sums = np.concatenate([np.zeros((1, ranked.shape[1])), np.cumsum(ranked, axis=0)])
        edges = np.linspace(0, len(ranked), requests + 1)
        at = np.stack([np.interp(edges, np.arange(len(sums)), column) for column in sums.T], axis=1)
        spread: Floats = np.diff(at, axis=0) * requests / len(ranked)
        return spread


class BestNodes:
    """The survival of a tree's best node, its second best, and so on: running means over requests and rounds."""

    def __init__(self) -> None:
        self._mean = np.zeros(MAX_NODES)
        self.known = False

    def observe(self, survival: Floats, probe: bool = False) -> None:
        """`[n, N]`, calibrated, 0 where there is no node; probe: as above"""
        latest = np.zeros(MAX_NODES)
        latest[: survival.shape[1]] = -np.sort(-survival, axis=1).mean(0)
        kept = (1 - FOLLOW) ** (probe_weight(len(survival)) if probe else 1)
        self._mean += (1 - kept if self.known else 1.0) * (latest - self._mean)
        self.known = True

    def expected(self, requests: int, nodes: int) -> Floats:
        """float64 `[requests, nodes]`, the same for all."""
        return np.tile(self._mean[:nodes], (requests, 1))

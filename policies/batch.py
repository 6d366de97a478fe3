"""What a scheduler is asked about: the requests of one step, and the drafts among which it chooses."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Batch:
    """The requests of one step, n of them.

    min_depth, max_depth: int64 `[n]`, the first never above the second; weight: float64 `[n]`, in the objective
    context: KV tokens of the batch; signals: the snapshot of the moment
    """

    min_depth: Ints
    max_depth: Ints
    weight: Floats
    context: int
    signals: Mapping[str, float | bool]

    @property
    def size(self) -> int:
        return len(self.max_depth)

    def within(self, depths: Ints) -> "Batch":
        """The same requests, none of them deeper than this: what is left to choose once so deep has been drafted."""
        limit = np.minimum(self.max_depth, depths)
        return replace(self, min_depth=np.minimum(self.min_depth, limit), max_depth=limit)


class Scheduler(Protocol):
    def draft_depths(self, batch: Batch, expected: Floats, depth: Ints | None = None) -> Ints:
        """int64 `[n]`: how deep to draft; 0 everywhere is a plain step.

        expected: float64 `[n, N]`, the survival that history predicts; depth: as in `select`
        Changes nothing but what `select` and `started` are about: a plan may be dropped and another be made.
        """
        ...

    def started(self) -> bool:
        """The step that was planned last is run. Whether it is a probe: a round among plain steps."""
        return False

    def takes_all(self, batch: Batch) -> bool:
        """Whether `select` will take all there is of chains, or nearly so that a look at them is not worth its time.

        batch: within what will be drafted
        """
        ...

    def select(self, batch: Batch, survival: Floats, depth: Ints | None = None) -> Bools:
        """bool `[n, N]`: what to verify, closed under parents.

        batch: within what was drafted
        survival: float64 `[n, N]`, of a node and all above it, so never above its parent's; parents come first
        depth: int64 `[n, N]`, 1 for children of the anchor, 0 where there is no node; None for chains
        """
        ...


def nodes_depth(survival: Floats, depth: Ints | None) -> Ints:
    """int64 `[n, N]`: the depth of every node; of a chain, 1, 2, .."""
    return np.broadcast_to(np.arange(1, survival.shape[1] + 1), survival.shape) if depth is None else depth


def clipped(depth: int, batch: Batch) -> Ints:
    """int64 `[n]`: this depth for everyone, within everyone's limits."""
    within: Ints = np.minimum(np.maximum(np.int64(depth), batch.min_depth), batch.max_depth)
    return within


def rank(survival: Floats, allowed: Bools) -> Ints:
    """int64 `[n, N]`: each node's place in its request by survival, parents before children of the same survival."""
    order = np.argsort(-np.where(allowed, survival, -1.0), axis=1, kind="stable")
    places = np.empty_like(order)
    np.put_along_axis(places, order, np.broadcast_to(np.arange(order.shape[1]), order.shape), axis=1)
    return places


def required(least: Ints, survival: Floats, at: Ints, allowed: Bools) -> Bools:
    """bool `[n, N]`: of the allowed nodes, those without which a request stays above its least depth.

    Of a chain the first ones; of a tree the likeliest, down to the first that is deep enough, and all where none is:
    how deep a tree has become depends on the tokens drawn for it, and must not decide about them. least: int64 `[n]`
    """
    goal = least[:, None]
    if not goal.any():
        return np.zeros_like(allowed)
    places = rank(survival, allowed)
    last = np.where(allowed & (at >= goal), places, survival.shape[1]).min(axis=1, initial=survival.shape[1])
    needed: Bools = allowed & (goal > 0) & (places <= last[:, None])
    return needed

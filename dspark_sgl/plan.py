"""What is decided for one decode step, and what becomes of it: the plan, and the record the governor keeps of it.

Plain numbers; decides nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from dspark_sgl.kernels.tree_draft import TreeShape
from dspark_sgl.policies.batch import Batch, Bools, Floats, Ints, Scheduler, nodes_depth
from dspark_sgl.policies.calibration import Calibration
from dspark_sgl.policies.forest import Forest
from dspark_sgl.policies.history import BestNodes, Chains
from dspark_sgl.policies.language import ACCEPT_METHODS
from dspark_sgl.policies.rules import Active

from .clock import PLAIN, ROUND
from .load import Step
from .request_view import RequestLoad

MOST_ROWS = 2048
"""Of a round. So many keep any device busy, and no memory has been set aside for the logits of more."""


@dataclass(frozen=True)
class Plan:
    """What the coming step shall do.

    depths: how deep to draft each request; method: how drafts are accepted; tree: of which size, None for chains
    settled: all that is drafted is verified, so nobody has to look at it first
    """

    depths: list[int]
    method: str
    tree: TreeShape | None = None
    settled: bool = False

    @property
    def wire(self) -> list[int]:
        """As numbers, for the other ranks; as many for any plan of so many requests."""
        tree = self.tree or TreeShape(0, 0)
        return [ACCEPT_METHODS.index(self.method), tree.max_nodes, tree.branch, self.settled, *self.depths]

    @classmethod
    def from_wire(cls, numbers: list[int]) -> Plan:
        method, nodes, branch, settled, *depths = numbers
        return cls(depths, ACCEPT_METHODS[method], TreeShape(nodes, branch) if nodes else None, bool(settled))

    @classmethod
    def plain(cls, requests: int) -> Plan:
        return cls([0] * requests, ACCEPT_METHODS[0])


@dataclass(frozen=True)
class Past:
    """What rounds of one kind have taught: how far to trust their confidence, and what their drafts promised."""

    calibration: Calibration
    chains: Chains
    best_nodes: BestNodes = field(default_factory=BestNodes)

    def expected(self, requests: int, tree: TreeShape | None) -> tuple[Floats, Ints | None]:
        """Survival `[requests, N]` of what will be drafted, and its depth; of a tree's nodes that is not known yet."""
        if tree is not None and self.best_nodes.known:
            nodes = self.best_nodes.expected(requests, tree.max_nodes)
            return nodes, np.ones(nodes.shape, dtype=np.int64)
        if tree is None and self.chains.known:
            return self.chains.expected(requests), None
        chain = self.calibration.expected(requests, self.chains.block)
        return chain, None if tree is None else nodes_depth(chain, None)

    def observe(self, forest: Forest, survival: Floats, drafted: Ints, probe: bool) -> None:
        """A round's drafts before they are verified. drafted: int64 `[n]`, how deep"""
        if forest.is_chain:
            self.chains.observe(survival, drafted, self.calibration.follow(self.chains.block), probe)
        else:
            self.best_nodes.observe(survival, probe)


@dataclass
class StepRecord:
    """One step from plan to learning: what it was decided from, what was decided, what came of it."""

    requests: Sequence[RequestLoad]
    batch: Batch
    scheduler: Scheduler
    active: Active
    plan: Plan
    past: Past
    probe: bool = False
    forest: Forest | None = None
    confidence: Floats | None = None
    verified: Bools | None = None
    survival: Floats | None = None
    rows: int = 0
    """Rows that the target's forward computed, of a round."""
    live: Bools | None = None
    """bool `[n]`, once learned from: requests that had not ended before the step began. Only they are counted below."""
    offered: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)

    @property
    def predicted(self) -> Floats:
        """Survival of the verified drafts, as `verified` lists them."""
        return np.empty(0) if self.survival is None else self.survival[self.verified]

    @property
    def decision(self) -> dict[str, int | None]:
        """For people: the rule, requests, drafts that were asked for, and how many of those were verified."""
        drafted, verified = sum(self.plan.depths), sum(self.offered)
        return {"rule": self.active.rule, "requests": len(self.requests), "drafted": drafted, "verified": verified}

    @property
    def counted(self) -> int:
        """Requests whose tokens count."""
        return len(self.requests) if self.live is None else int(self.live.sum())

    @property
    def step(self) -> Step:
        n = len(self.plan.depths)
        spoke = [length for length, offered in zip(self.lengths, self.offered, strict=True) if offered]
        return Step(
            kind=ROUND if self.offered else PLAIN,
            requests=n,
            rows=self.rows or n,
            context=self.batch.context,
            offered=sum(self.offered),
            speculating=len(spoke),
            emitted=sum(self.lengths) if self.offered else self.counted,
            gained=sum(spoke),
            depth=max(self.plan.depths),
        )

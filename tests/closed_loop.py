"""A server's decode steps without the server: real scheduler, cost model and history against a stated machine.

The machine is a formula for what a step takes and the drafts survive with stated chances, so the best fixed depth is
known exactly. What the policy is told is what a server is told: confidences, acceptance, and seconds with noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dspark_sgl.policies.batch import Batch
from dspark_sgl.policies.calibration import Calibration
from dspark_sgl.policies.cost import CostModel, CostPoint
from dspark_sgl.policies.forest import Forest
from dspark_sgl.policies.history import Chains, probe_weight
from dspark_sgl.policies.language import ThroughputSchedule
from dspark_sgl.policies.scheduler import make_scheduler

BLOCK = 7
SPREAD = 4.0
"""Of the chances of single drafts around their mean, as the sum of a beta distribution's two figures."""

Verify = Callable[[int], float]


@dataclass(frozen=True)
class Machine:
    """verify: seconds of a target forward by rows; a plain step is one of `n` rows; draft: `draft + slope n sqrt(d)`

    first: what the first round after plain steps takes, as a multiple of the others
    """

    verify: Verify
    draft: float = 0.003
    slope: float = 0.0002
    first: float = 1.0

    def drafting(self, requests: int, depth: int) -> float:
        return self.draft + self.slope * requests * depth**0.5 if depth else 0.0

    def seconds(self, requests: int, rows: int, depth: int) -> float:
        return self.drafting(requests, depth) + self.verify(rows)

    def profile(self, most: int = 32, rounds: float = 1.0) -> list[CostPoint]:
        """As a server measures it at its start; rounds: how much too dear it took them to be"""
        points = []
        for n in (2**k for k in range(most.bit_length())):
            points.append(CostPoint("plain", n, n, 0, self.verify(n)))
            for d in (1, (BLOCK + 1) // 2, BLOCK):
                points.append(CostPoint("draft", n, n * d, 0, rounds * self.drafting(n, d)))
                points.append(CostPoint("verify", n, n * (d + 1), 0, rounds * self.verify(n * (d + 1))))
        return points

    def fixed(self, requests: int, chance: float) -> list[float]:
        """Tokens per second of plain decoding and of every fixed depth, with drafts that survive with this chance."""
        tokens = [requests * float((chance ** np.arange(k + 1)).sum()) for k in range(BLOCK + 1)]
        return [t / self.seconds(requests, requests * (k + 1), k) for k, t in enumerate(tokens)]


class ClosedLoop:
    """discarded: share of plans that are dropped because requests came or went; noise: of each step's seconds."""

    def __init__(
        self,
        machine: Machine,
        seed: int,
        noise: float = 0.03,
        discarded: float = 0.0,
        profile: list[CostPoint] | None = None,
    ) -> None:
        self._machine, self._noise, self._discarded = machine, noise, discarded
        self.cost = CostModel(machine.profile() if profile is None else profile, "profiled")
        self._scheduler = make_scheduler(ThroughputSchedule(), self.cost, 0.02, "early_stop")
        self._calibration, self._chains = Calibration(), Chains(BLOCK)
        self._dice = np.random.default_rng(seed)
        self._drafted = False
        self.rounds: list[bool] = []

    def run(self, requests: int, chance: float, steps: int) -> float:
        """Tokens per second of so many steps. chance: mean, of a draft to survive where the one before it does"""
        taken = [self._step(requests, chance) for _ in range(steps)]
        return sum(tokens for tokens, _ in taken) / sum(seconds for _, seconds in taken)

    def _step(self, n: int, chance: float) -> tuple[int, float]:
        batch = Batch(np.zeros(n, np.int64), np.full(n, BLOCK), np.ones(n), 0, {})
        known = self._chains.expected(n) if self._chains.known else self._calibration.expected(n, BLOCK)
        depths = self._scheduler.draft_depths(batch, known)
        if self._dice.random() < self._discarded:
            depths = self._scheduler.draft_depths(batch, known)
        probe = self._scheduler.started()
        tokens = rows = n
        deep = int(depths.max())
        if deep:
            accepted, offered = self._round(batch.within(depths), depths, chance, probe)
            tokens, rows = n + accepted, n + offered
        seconds = self._machine.seconds(n, rows, deep) * float(np.exp(self._dice.normal(0, self._noise)))
        if deep and not self._drafted:
            seconds *= self._machine.first
        self._drafted = deep > 0
        self.rounds.append(self._drafted)
        self.cost.observe("round" if deep else "plain", n, rows, 0, seconds, deep)
        return tokens, seconds

    def _round(self, batch: Batch, depths: np.ndarray, chance: float, probe: bool) -> tuple[int, int]:
        """Drafts that were accepted, and that were verified."""
        n, deep = batch.size, int(depths.max())
        confidence = self._dice.beta(chance * SPREAD, (1 - chance) * SPREAD, (n, deep))
        chains = Forest.chains(n, deep)
        survival = self._calibration.apply(confidence, chains)
        settled = self._scheduler.takes_all(batch)
        kept = np.ones((n, deep), dtype=bool) if settled else self._scheduler.select(batch, survival)
        survived = (self._dice.random((n, deep)) < confidence).cumprod(1).astype(bool) & kept
        self._chains.observe(survival, depths, self._calibration.follow(BLOCK), probe)
        weight = probe_weight(n) if probe else 1
        self._calibration.observe(confidence, chains.depth, chains.tested(kept, survived), survived, weight)
        return int(survived.sum()), int(kept.sum())

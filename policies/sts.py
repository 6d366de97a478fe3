"""Sequential temperature scaling: one temperature per position, fitted so that survival means what it says.

With c_k the drafter's confidence in draft k, given that those before it survive,

    a_k = product over i <= k of sigmoid(logit(c_i) / T_i)        against        y_k = all of drafts 1..k accepted

T_1, T_2, .. are chosen left to right, each by the least ECE of a_k while those before it stay. Below the floor, the ECE
that a perfect prediction would show on as many samples, differences are noise: among temperatures that good the one of
the least log-loss is taken. Every round that was offered k drafts is a sample for position k, however early it failed:
y_k is 0 then. T_k > 0, so the order of confidences within a position stays; and on the rounds it is fitted on, a
position's ECE is never above that with T_k = 1.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .batch import Floats, Ints
from .calibration import logit, sigmoid
from .reliability import Reliability, auc

LEAST_SAMPLES = 100
"""Rounds below which a position is not fitted: it gets the temperature of the one before it."""
LOWEST, HIGHEST = 0.15, 7.0
CANDIDATES = 96


@dataclass(frozen=True)
class Rounds:
    """Verify rounds. logits: float64 `[n, D]`, anything where not offered; offered, accepted: int64 `[n]`, drafts"""

    logits: Floats
    offered: Ints
    accepted: Ints

    @classmethod
    def of(cls, confidence: Floats, offered: Ints, accepted: Ints) -> "Rounds":
        """confidence: float64 `[n, D]`, 0 to 1"""
        return cls(logit(confidence), offered, accepted)

    def __len__(self) -> int:
        return len(self.offered)

    def take(self, which: NDArray[np.bool_]) -> "Rounds":
        """Those rounds only. which: bool `[n]`"""
        return Rounds(self.logits[which], self.offered[which], self.accepted[which])

    def survival(self, temperatures: Sequence[float]) -> Floats:
        """float64 `[n, D]`: a_k; the last temperature holds for every position behind it."""
        depth = self.logits.shape[1]
        scale = np.array([*temperatures, *[temperatures[-1]] * depth][:depth])
        survival: Floats = np.cumprod(sigmoid(self.logits / scale), axis=1, dtype=np.float64)
        return survival


@dataclass(frozen=True)
class Position:
    """How well survival to one position is predicted. accepted: share of samples; floor: the least ECE to expect"""

    samples: int
    accepted: float
    ece: float
    floor: float
    auc: float


def fit(rounds: Rounds) -> list[float]:
    """T_1, T_2, .. as far as there are samples; at least one is returned, 1 where there is nothing to fit."""
    temperatures: list[float] = []
    before = np.ones(len(rounds))
    for k in range(rounds.logits.shape[1]):
        known = rounds.offered > k
        if known.sum() < LEAST_SAMPLES:
            break
        logits, happened = rounds.logits[:, k], rounds.accepted[known] > k
        temperature = _best(before[known], logits[known], happened)
        before = before * sigmoid(logits / temperature)
        temperatures.append(temperature)
    return temperatures or [1.0]


def _best(before: Floats, logits: Floats, happened: NDArray[np.bool_]) -> float:
    """before: survival up to the position; logits: of the position; happened: whether it survived, all `[n]`"""
    at_one = Reliability.of(before * sigmoid(logits), happened).ece
    best, best_rank = 1.0, (1, math.inf)
    for temperature in [1.0, *np.geomspace(LOWEST, HIGHEST, CANDIDATES).tolist()]:
        chance = before * sigmoid(logits / temperature)
        found = Reliability.of(chance, happened)
        good = found.ece <= min(at_one, found.floor)
        rank = (0, _log_loss(chance, happened)) if good else (1, found.ece)
        if rank < best_rank:
            best, best_rank = temperature, rank
    return best


def _log_loss(chance: Floats, happened: NDArray[np.bool_]) -> float:
    said = np.where(happened, chance, 1 - chance)
    return float(-np.log(said.clip(min=1e-12)).mean())


def judge(rounds: Rounds, temperatures: Sequence[float]) -> list[Position]:
    """Every position that has a sample, first to last."""
    survival, found = rounds.survival(temperatures), []
    for k in range(rounds.logits.shape[1]):
        known = rounds.offered > k
        if known.any():
            chance, happened = survival[known, k], rounds.accepted[known] > k
            bins, rank = Reliability.of(chance, happened), auc(chance, happened)
            found.append(Position(len(chance), float(happened.mean()), bins.ece, bins.floor, rank))
    return found

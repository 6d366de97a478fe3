"""From a drafter's confidence to a chance: sequential temperature scaling, and what acceptance has taught since.

A draft at position k with confidence c survives, given that those before it did, with chance

    sigmoid(logit(c) / T_k + b_k),        survival_k = product over its path

`T_k` come with the draft (`sts.json`), `b_k` begin at 0, and both follow live acceptance: no temperature moves a
confidence of 0.5, which a draft may state where 0.15 is true if the texts, or the target's weights, are not those it
was trained on. Memory is bounded and old evidence fades. Confidence that is no probability counts as 0: nothing is
verified on the strength of a NaN.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .batch import Bools, Floats, Ints
from .errors import PolicyError
from .forest import Forest

VERSION = 1
POSITIONS = 64
LEARN = 0.01
"""Step of the online temperatures, in logarithm per round."""
SHIFT = 0.02
"""Step of the online shifts, per round."""
MEMORY = 500.0
"""Drafts per position after which half of the running acceptance has been replaced."""
FORGET = 256.0
"""Rounds that test no draft of a position after which half of its running acceptance and of its shift has been
forgotten. What was poor a while ago would otherwise never be tried again."""
PRIOR, PRIOR_WEIGHT = 0.6, 8.0
"""What a position is believed to be accepted with before anything is known, worth so many drafts."""


class Calibration:
    """`temperatures`: T_1, T_2, ..; the last one holds for every position behind it."""

    def __init__(self, temperatures: Sequence[float] = (1.0,)) -> None:
        known = [*temperatures, *[temperatures[-1]] * POSITIONS][:POSITIONS]
        self._log = np.log(np.array(known, dtype=np.float64))
        self._shift = np.zeros(POSITIONS)
        self._reached = np.full(POSITIONS, PRIOR_WEIGHT)
        self._survived = np.full(POSITIONS, PRIOR_WEIGHT * PRIOR)
        self.bad = 0

    @property
    def temperatures(self) -> Floats:
        temperatures: Floats = np.exp(self._log)
        return temperatures

    def apply(self, confidence: Floats, drafted: Forest | None = None) -> Floats:
        """float64 `[n, N]`: survival along chains, or of `drafted`. confidence: `[n, N]`, conditional, as said"""
        drafted = drafted or Forest.chains(*confidence.shape)
        return drafted.survival(self.conditional(confidence, drafted.depth))

    def conditional(self, confidence: Floats, depth: Ints) -> Floats:
        """float64 `[n, N]`: the calibrated chance of each draft, given that its parent survives. depth: from 1"""
        wrong = ~((confidence >= 0) & (confidence <= 1))
        if wrong.any():
            self.bad += int(wrong.sum())
            confidence = np.where(wrong, 0.0, confidence)
        at = (depth - 1).clip(0, POSITIONS - 1)
        return sigmoid(logit(confidence) / np.exp(self._log)[at] + self._shift[at])

    def expected(self, requests: int, depth: int) -> Floats:
        """float64 `[requests, depth]`: the survival that history predicts, the same for all."""
        return np.tile(np.cumprod(self.follow(depth)), (requests, 1))

    def follow(self, depth: int) -> Floats:
        """float64 `[depth]`: how often the draft at each position has been accepted where the one before it was."""
        chance: Floats = (self._survived / self._reached)[:depth]
        return chance

    def observe(self, confidence: Floats | None, depth: Ints, tested: Bools, survived: Bools, weight: int = 1) -> None:
        """A round. All `[n, N]`; tested: drafts whose parent was accepted; survived: those that were accepted too

        A request was tried at a depth where any of its drafts there was tested. weight: how many rounds it counts for
        in the running acceptance
        """
        tried, passed = weight * _requests_at(depth, tested), weight * _requests_at(depth, survived)
        fade = 0.5 ** (tried / MEMORY)
        self._reached = self._reached * fade + tried
        self._survived = self._survived * fade + passed
        forgotten = np.where(tried == 0, 1 - 0.5 ** (1 / FORGET), 0.0)
        self._reached += forgotten * (PRIOR_WEIGHT - self._reached)
        self._survived += forgotten * (PRIOR_WEIGHT * PRIOR - self._survived)
        if confidence is not None:
            self._follow(confidence, depth, tested, survived)

    def _follow(self, confidence: Floats, depth: Ints, tested: Bools, survived: Bools) -> None:
        """One step down the gradient of the log-loss, with p = sigmoid(z / T + b):

        d/dlog T of -log P = (y - p) z / T,   d/db of -log P = -(y - p)
        """
        at = (depth - 1).clip(0, POSITIONS - 1)
        scaled = logit(np.nan_to_num(confidence, nan=0.0).clip(0, 1)) / np.exp(self._log)[at]
        surprise = np.where(tested, survived - sigmoid(scaled + self._shift[at]), 0.0)
        count = np.bincount(at.ravel(), tested.ravel(), POSITIONS)
        slope = np.bincount(at.ravel(), (surprise * scaled).ravel(), POSITIONS) / np.maximum(count, 1)
        rise = np.bincount(at.ravel(), surprise.ravel(), POSITIONS) / np.maximum(count, 1)
        self._log = (self._log - LEARN * slope).clip(-2, 2)
        kept = np.where(count == 0, 0.5 ** (1 / FORGET), 1.0)
        self._shift = (kept * self._shift + SHIFT * rise).clip(-4, 4)

    @classmethod
    def from_json(cls, file: Path) -> "Calibration":
        """The temperatures beside a draft: `{"version": 1, "temperatures": [..]}`."""
        try:
            content = json.loads(file.read_text())
            temperatures = [float(value) for value in content["temperatures"]]
            if content["version"] != VERSION or not temperatures or not all(0 < t < 100 for t in temperatures):
                raise ValueError
        except (OSError, ValueError, KeyError, TypeError):
            problem = 'holds no temperatures; expected {"version": 1, "temperatures": [1.1, ...]}; delete or replace it'
            raise PolicyError(str(file), 0, 0, problem) from None
        return cls(temperatures)


def _requests_at(depth: Ints, which: Bools) -> Ints:
    """int64 `[POSITIONS]`: how many requests have such a draft at each depth, from 1 on."""
    has = np.zeros((len(depth), POSITIONS + 1), dtype=bool)
    np.put_along_axis(has, np.where(which, depth, 0).clip(max=POSITIONS), True, axis=1)
    found: Ints = has[:, 1:].sum(0)
    return found


def logit(chance: Floats) -> Floats:
    """log(c / (1 - c)), finite: what is nearer to 0 or 1 than 1e-6 counts as that."""
    inside = chance.clip(1e-6, 1 - 1e-6)
    odds: Floats = np.log(inside / (1 - inside))
    return odds


def sigmoid(value: Floats) -> Floats:
    """1 / (1 + exp(-z))"""
    chance: Floats = 1 / (1 + np.exp(-value))
    return chance

"""From a drafter's confidence to a chance: sequential temperature scaling, and what acceptance has taught since.

A draft at position k with confidence c survives, given that those before it did, with chance

    sigmoid(logit(c) / T_k),        survival_k = product over its path

`T_k` come with the draft (`sts.json`) and follow live acceptance. Memory is bounded and old evidence fades. Confidence
that is no probability counts as 0: nothing is verified on the strength of a NaN.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .errors import PolicyError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

VERSION = 1
POSITIONS = 64
LEARN = 0.01
"""Step of the online temperatures, in logarithm per round."""
MEMORY = 500.0
"""Drafts per position after which half of the running acceptance has been replaced."""
PRIOR, PRIOR_WEIGHT = 0.6, 8.0
"""What a position is believed to be accepted with before anything is known, worth so many drafts."""


class Calibration:
    """`temperatures`: T_1, T_2, ..; the last one holds for every position behind it."""

    def __init__(self, temperatures: Sequence[float] = (1.0,)) -> None:
        known = [*temperatures, *[temperatures[-1]] * POSITIONS][:POSITIONS]
        self._log = np.log(np.array(known, dtype=np.float64))
        self._reached = np.full(POSITIONS, PRIOR_WEIGHT)
        self._survived = np.full(POSITIONS, PRIOR_WEIGHT * PRIOR)
        self.bad = 0

    @property
    def temperatures(self) -> Floats:
        temperatures: Floats = np.exp(self._log)
        return temperatures

    def apply(self, confidence: Floats) -> Floats:
        """float64 `[n, D]`: survival along chains. confidence: `[n, D]`, conditional, as the drafter says"""
        survival: Floats = np.cumprod(self.conditional(confidence), axis=1, dtype=np.float64)
        return survival

    def conditional(self, confidence: Floats, depth: Ints | None = None) -> Floats:
        """float64 `[n, N]`: the calibrated chance of each draft, given that its parent survives.

        depth: int64 `[n, N]` from 1, for nodes of a tree; None for chains
        """
        wrong = ~((confidence >= 0) & (confidence <= 1))
        if wrong.any():
            self.bad += int(wrong.sum())
            confidence = np.where(wrong, 0.0, confidence)
        position = np.arange(confidence.shape[1]) if depth is None else np.maximum(depth - 1, 0)
        temperature = np.exp(self._log)[position.clip(max=POSITIONS - 1)]
        return sigmoid(logit(confidence) / temperature)

    def expected(self, requests: int, depth: int) -> Floats:
        """float64 `[requests, depth]`: the survival that history predicts, the same for all."""
        chance = (self._survived / self._reached)[:depth]
        return np.tile(np.cumprod(chance), (requests, 1))

    def observe(self, confidence: Floats | None, offered: Ints, accepted: Ints) -> None:
        """A round of chains. confidence: `[n, D]` or None; offered, accepted: int64 `[n]`, drafts of each request"""
        place = np.arange(int(offered.max(initial=0)))
        # Draft k was put to the test where k were offered and those before it accepted.
        reached = (place < offered[:, None]) & (place <= accepted[:, None])
        survived = place < accepted[:, None]
        tested = reached.sum(0)
        fade = 0.5 ** (tested / MEMORY)
        at = slice(0, len(place))
        self._reached[at] = self._reached[at] * fade + tested
        self._survived[at] = self._survived[at] * fade + (reached & survived).sum(0)
        if confidence is not None and len(place):
            self._follow(confidence[:, : len(place)], reached, survived)

    def _follow(self, confidence: Floats, reached: NDArray[np.bool_], survived: NDArray[np.bool_]) -> None:
        """One step down the gradient of the log-loss: d/dlog T of -log P = (y - p) z / T, with p = sigmoid(z / T)."""
        at = slice(0, confidence.shape[1])
        scaled = logit(np.nan_to_num(confidence, nan=0.0).clip(0, 1)) / np.exp(self._log[at])
        slope = np.where(reached, (survived - sigmoid(scaled)) * scaled, 0.0).sum(0) / np.maximum(reached.sum(0), 1)
        self._log[at] = (self._log[at] - LEARN * slope).clip(-2, 2)

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


def logit(chance: Floats) -> Floats:
    """log(c / (1 - c)), finite: what is nearer to 0 or 1 than 1e-6 counts as that."""
    inside = chance.clip(1e-6, 1 - 1e-6)
    odds: Floats = np.log(inside / (1 - inside))
    return odds


def sigmoid(value: Floats) -> Floats:
    """1 / (1 + exp(-z))"""
    chance: Floats = 1 / (1 + np.exp(-value))
    return chance

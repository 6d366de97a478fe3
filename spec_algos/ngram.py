"""Prompt look-up: what followed the last tokens when they came before is proposed again. No weights, host code only.

    x_k = t[j + k],   t[j - n + 1 .. j] = t[i - n + 1 .. i],   i the anchor's place, n the largest, j < i the latest

A match of n tokens makes the first draft as credible as matches of n have proved to be. Had it been right, the second
one stands behind a match of n + 1. So confidence is one running figure per length of match, kept for each request and,
as what a new one starts from, for all of them. Where nothing is found nothing is proposed. Tokens are chosen, never
drawn: acceptance is by match.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch

from .protocol import Drafter, DrafterContext, History, Proposal, Round

SHORTEST, LONGEST = 2, 32
"""Matches shorter than this say nothing; longer ones are not told apart."""
CANDIDATES = 32
"""Earlier places compared per look-up, the latest first: what bounds a step's work."""
REMEMBERED = 65_536
"""Tokens of one request that are searched at least; of a longer one the last ones, at most twice as many."""
_NOWHERE = -1


@dataclass(frozen=True)
class Match:
    """The last `length` tokens stood before, too, and ended at `end`."""

    end: int
    length: int


class SuffixIndex:
    """Where in one text its last tokens came before. Grows with the text, a few operations per token.

    Places where the same pair of tokens ends are chained, the latest first, as in LZ77. Memory: two integers a token
    and one entry for each pair.
    """

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self._tokens = array("q")
        self._before = array("i")  # the last place before this one where the same pair ended
        self._latest: dict[tuple[int, int], int] = {}

    def extend(self, tokens: Sequence[int]) -> None:
        if len(self._tokens) + len(tokens) > 2 * REMEMBERED:
            tokens = [*self._tokens, *tokens][-REMEMBERED:]
            self._clear()
        for token in tokens:
            place = len(self._tokens)
            self._tokens.append(token)
            pair = (self._tokens[place - 1] if place else _NOWHERE, token)
            self._before.append(self._latest.get(pair, _NOWHERE))
            self._latest[pair] = place

    def longest_match(self) -> Match | None:
        """The longest of the latest `CANDIDATES` places; of equally long ones the latest."""
        last = len(self._tokens) - 1
        if last < SHORTEST:
            return None
        best, place = None, self._before[last]
        for _ in range(CANDIDATES):
            if place == _NOWHERE:
                break
            length = self._common(place, last)
            if length >= SHORTEST and (best is None or length > best.length):
                best = Match(place, length)
                if length == LONGEST:
                    break
            place = self._before[place]
        return best

    def _common(self, place: int, last: int) -> int:
        """How many tokens up to these two places are the same, up to `LONGEST`."""
        tokens, length = self._tokens, 0
        while length < LONGEST and length <= place and tokens[place - length] == tokens[last - length]:
            length += 1
        return length

    def continuation(self, end: int, count: int) -> list[int]:
        """What followed `end`, `count` tokens; where that runs into the text's end it is taken to go round."""
        followed = self._tokens[end + 1 : end + 1 + count].tolist()
        return [followed[k % len(followed)] for k in range(count)]


class Agreement:
    """How often a text went on as it had before, by length of match. Old evidence fades.

    belief: what is assumed of each length until there is evidence, worth `WEIGHT` tokens
    """

    WEIGHT, MEMORY = 8.0, 200.0

    def __init__(self, belief: Agreement | None = None) -> None:
        self._belief = belief
        self._tried, self._agreed = [0.0] * (LONGEST + 1), [0.0] * (LONGEST + 1)

    def chance(self, length: int) -> float:
        n = min(length, LONGEST)
        before = n / (n + 3) if self._belief is None else self._belief.chance(n)
        return (self._agreed[n] + self.WEIGHT * before) / (self._tried[n] + self.WEIGHT)

    def observe(self, length: int, agreed: bool) -> None:
        n, keep = min(length, LONGEST), 1 - 1 / self.MEMORY
        self._tried[n] = self._tried[n] * keep + 1
        self._agreed[n] = self._agreed[n] * keep + agreed
        if self._belief is not None:
            self._belief.observe(n, agreed)


class Reader:
    """One request: its text so far, and what was proposed for what comes next."""

    def __init__(self, everyone: Agreement) -> None:
        self._index, self._agreement = SuffixIndex(), Agreement(everyone)
        self._read = self._length = 0
        self._proposed: list[int] = []

    def catch_up(self, history: History) -> None:
        """Read what the request has emitted since, and learn from it what the last proposal was worth."""
        new = history.tail(len(history) - self._read)
        for k, (proposed, token) in enumerate(zip(self._proposed, new, strict=False)):
            self._agreement.observe(self._length + k, proposed == token)
            if proposed != token:
                break
        self._proposed = []
        self._read += len(new)
        self._index.extend(new)

    def propose(self, depth: int) -> tuple[list[int], list[float]]:
        """Up to `depth` tokens and the chance of each, given those before it; none where nothing came before."""
        match = self._index.longest_match()
        if match is None:
            return [], []
        self._length, self._proposed = match.length, self._index.continuation(match.end, depth)
        return self._proposed, [self._agreement.chance(match.length + k) for k in range(depth)]


class NgramDrafter(Drafter):
    """Reads along with every request that may be drafted for; a request's index goes when the request does."""

    algorithm: ClassVar[str] = "NGRAM_SGL"

    def __init__(self, context: DrafterContext) -> None:
        super().__init__(context)
        self._everyone = Agreement()
        self._readers: WeakKeyDictionary[Any, Reader] = WeakKeyDictionary()

    @property
    def block(self) -> int:
        return self.context.block

    def propose(self, round: Round) -> Proposal:
        depth = min(max(round.depths), self.block)
        found = [
            self._reader(history).propose(depth) if wanted else ([], [])
            for history, wanted in zip(round.histories, round.depths, strict=True)
        ]
        device, missing = round.anchors.device, [0] * depth
        tokens = torch.tensor([(drafts + missing)[:depth] for drafts, _ in found], device=device)
        chances = torch.tensor([(sure + missing)[:depth] for _, sure in found], dtype=torch.float32, device=device)
        return Proposal(tokens, confidence=chances)

    def _reader(self, history: History) -> Reader:
        """The one that reads this request, at the end of its text."""
        reader = self._readers.get(history.key)
        if reader is None:
            reader = self._readers[history.key] = Reader(self._everyone)
        reader.catch_up(history)
        return reader

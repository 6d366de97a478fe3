"""Drawing the tokens of draft chains, and keeping what rejection sampling must know of the draw.

A position's token is the argmax of its logits for a greedy request and a sample of `q = softmax(logits / T)` otherwise.
Whether a position's logits depend on the tokens before it is the drafter's business: one that goes left to right draws
them one by one, one whose positions are independent draws them all at once. Never decides how much is verified.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .rejection import DraftDistribution, draw


@dataclass(frozen=True)
class DraftChain:
    """A drafted block.

    tokens: int64 `[bs, D]`
    distribution: what they were drawn from, or None when all were chosen
    token_probs: float32 `[bs, D]`, q of each token; 1 for a greedy request
    """

    tokens: Tensor
    distribution: DraftDistribution | None
    token_probs: Tensor | None


@dataclass(frozen=True)
class ChainDraw:
    """How the drafts of one round are drawn.

    vocab: int64 `[Vq]`, token ids of the logits' columns, or None for the target's whole vocabulary
    temperature: float32 `[bs]`; None when drafts are chosen, not drawn: every request is greedy, or acceptance is by
        match. greedy: bool `[bs]`
    generator: the round's source of randomness
    """

    vocab: Tensor | None
    temperature: Tensor | None
    greedy: Tensor
    generator: torch.Generator

    def room(self, bs: int, depth: int, columns: int) -> Tensor | None:
        """float32 `[bs, D, Vq]` for the q of a chain, or None when nothing will be drawn at random."""
        if self.temperature is None:
            return None
        return torch.empty(bs, depth, columns, dtype=torch.float32, device=self.greedy.device)

    def columns(self, logits: Tensor, q: Tensor | None) -> Tensor:
        """int64 `[bs, ...]`, the column drawn from each row of logits `[bs, ..., Vq]`; fills in q of the same shape."""
        best = logits.argmax(-1)
        if q is None or self.temperature is None:
            return best
        each = (-1, *[1] * (logits.dim() - 2))  # one value per request, whatever stands between it and the columns
        torch.softmax(logits.float() / self.temperature.view(*each, 1), dim=-1, out=q)
        return best.where(self.greedy.view(each), draw(q.flatten(0, -2), self.generator).view_as(best))

    def tokens(self, columns: Tensor) -> Tensor:
        return columns if self.vocab is None else self.vocab[columns]

    def chain(self, columns: Tensor, q: Tensor | None) -> DraftChain:
        """columns: int64 `[bs, D]`; q: what they were drawn from, `[bs, D, Vq]`, whose greedy requests are zeroed"""
        tokens = self.tokens(columns)
        if q is None:
            return DraftChain(tokens, None, None)
        distribution = DraftDistribution(q, self.vocab)
        token_probs = distribution.of(columns).masked_fill_(self.greedy[:, None], 1.0)
        # A greedy request's residual is its one-hot target itself: nothing of q may be taken from it.
        q.masked_fill_(self.greedy[:, None, None], 0.0)
        return DraftChain(tokens, distribution, token_probs)


def draw_at_once(logits: Tensor, draw: ChainDraw) -> DraftChain:
    """All positions in one go, each on its own. logits: `[bs, D, Vq]`"""
    q = draw.room(*logits.shape)
    return draw.chain(draw.columns(logits, q), q)


def certainty(logits: Tensor) -> Tensor:
    """float32 `[...]`: `max_v softmax(l)(v)`, the likeliest token's chance at temperature 1. logits: `[..., Vq]`

    For a token taken greedily that is its own chance. For one drawn at random it is not, on purpose: a confidence that
    read the token it decides about would let verification depend on what was drawn, and bias rejection sampling.
    """
    scores = logits.float()
    return (scores.amax(-1) - scores.logsumexp(-1)).exp()

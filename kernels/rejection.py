"""Chain rejection sampling: accept draft tokens so that what is emitted is distributed as the target's own samples.

With `p` the target's (filtered) distribution after row `k - 1` and `q` the distribution `x_k` was drawn from, `x_k` is
accepted with probability `min(1, p(x_k) / q(x_k))`; at the first rejection the token is drawn from
`normalise(max(p - q, 0))`, and after the last accepted row from `p` itself. Then for every token v

    P(v) = q(v) min(1, p(v)/q(v)) + P(reject) max(p(v)-q(v), 0) / sum_u max(p(u)-q(u), 0)
         = min(q(v), p(v)) + max(p(v) - q(v), 0) = p(v),

because `P(reject) = 1 - sum_u min(p(u), q(u)) = sum_u max(p(u) - q(u), 0)`. This holds only if whether `x_k` is offered
at all was settled before it was drawn: choosing depths is the policy's business and never looks at the drawn tokens.

If `q(x_k)` is NaN or infinite the draft model is broken: the draft counts as not offered and the token is drawn from
`p`. Never decides how deep a request is drafted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .layout import TreeLayout
from .walk import NO_ROW, Acceptance


@dataclass(frozen=True)
class DraftDistribution:
    """The distribution each draft token was drawn from.

    probs: float32 `[bs, D, Vq]`, `probs[i, k]` sums to 1; all zero for a request that drafted deterministically
    vocab: int64 `[Vq]`, the token ids of its columns, or None when they are the target's whole vocabulary
    """

    probs: Tensor
    vocab: Tensor | None

    def of(self, columns: Tensor) -> Tensor:
        """float32 `[bs, D]`: q of the drawn tokens, given by column."""
        return self.probs.gather(2, columns[:, :, None]).squeeze(2)


@dataclass(frozen=True)
class Coins:
    """The randomness of one round of rejection, tossed before anything is known of it.

    tries: float32 `[bs, W - 1]`, row r + 1's at r; last: float64 `[bs]`, of the draw at a path's end; all in `[0, 1)`
    """

    tries: Tensor
    last: Tensor

    @classmethod
    def toss(cls, layout: TreeLayout, generator: torch.Generator) -> Coins:
        bs, width, device = layout.batch_size, layout.max_width, layout.tokens.device
        return cls(torch.rand(bs, width - 1, generator=generator, device=device), toss(bs, generator))


def reject_chain(
    layout: TreeLayout,
    target_probs: Tensor,
    draft: DraftDistribution,
    token_probs: Tensor,
    generator: torch.Generator,
) -> Acceptance:
    """Rejection sampling along each chain.

    layout: chains, drafts in rows 1..; target_probs: float32 `[rows, V]`, packed, each row normalised
    draft: what they were drawn from
    token_probs: float32 `[bs, D]`, q of each draft token, `D >= W - 1`
    """
    coins = Coins.toss(layout, generator)
    if target_probs.is_cuda:
        from . import rejection_triton

        return rejection_triton.reject_chain(layout, target_probs, draft, token_probs, coins)
    return reject_chain_torch(layout, target_probs, draft, token_probs, coins)


def reject_chain_torch(
    layout: TreeLayout, target_probs: Tensor, draft: DraftDistribution, token_probs: Tensor, coins: Coins
) -> Acceptance:
    """The reference, given the coins."""
    bs, width, device = layout.batch_size, layout.max_width, layout.tokens.device
    starts = layout.starts
    row = torch.arange(width - 1, device=device)
    exists = layout.valid[:, 1:]
    parent = (starts[:, None] + row).where(exists, 0)
    p = target_probs[parent, layout.tokens[:, 1:]]
    # u < p/q written without a division, so that q = 0 (never drawn) cannot produce a NaN.
    passed = exists & (coins.tries * token_probs[:, : width - 1] < p)
    accepted = passed.to(torch.int64).cumprod(1).sum(1)
    request, next_draft = torch.arange(bs, device=device), accepted.clamp(max=draft.probs.shape[1] - 1)
    rejected = (accepted < layout.counts - 1) & token_probs[request, next_draft].isfinite()
    q = draft.probs[request, next_draft]
    last = target_probs[starts + accepted]
    left = residual(last, q, rejected.float(), draft.vocab)
    # p == q leaves an empty residual by rounding alone; a rejection there has probability 0 but for that rounding.
    empty = left.sum(1, keepdim=True) <= 0
    bonus = draw_at_torch(torch.where(empty, last, left), coins.last)
    place = torch.arange(width, device=device)
    path = place.expand(bs, width).where(place <= accepted[:, None], NO_ROW)
    return Acceptance(path=path, lengths=accepted + 1, bonus=bonus)


def residual(p: Tensor, q: Tensor, share: Tensor, vocab: Tensor | None) -> Tensor:
    """float32 `[n, V]`: `max(p - share q, 0)`, not normalised. p: `[n, V]`; q: `[n, Vq]`; share: `[n]`"""
    # Where nothing is taken q is not read: a draft model's NaN may stand there.
    taken = (q * share[:, None].to(q.dtype)).masked_fill_(share[:, None] == 0, 0.0)
    left = p - taken if vocab is None else p.index_add(1, vocab, -taken)
    return left.clamp_(min=0)


def draw(weights: Tensor, generator: torch.Generator) -> Tensor:
    """int64 `[n]`: one sample per row of unnormalised `weights` float32 `[n, V]`."""
    return draw_at(weights, toss(len(weights), generator))


def toss(count: int, generator: torch.Generator) -> Tensor:
    """float64 `[count]`, uniform over `[0, 1)`: what a draw takes."""
    return torch.rand(count, dtype=torch.float64, generator=generator, device=generator.device)


def draw_at(weights: Tensor, coins: Tensor) -> Tensor:
    """int64 `[n]`: the sample that each of the coins, float64 `[n]`, stands for.

    Inverse transform: the first v with `w_1 + ... + w_v > u (w_1 + ... + w_V)`, `u ~ U[0, 1)`. Strictly greater, so a
    token of weight 0 is never drawn; float64, so that the sum over a large vocabulary keeps its small terms. Weights of
    NaN stand for no token: what comes then is some column, for the caller not to use.
    """
    if weights.is_cuda:
        from . import rejection_triton

        return rejection_triton.draw_at(weights, coins)
    return draw_at_torch(weights, coins)


def draw_at_torch(weights: Tensor, coins: Tensor) -> Tensor:
    """The reference."""
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    point = torch.minimum(coins[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, point, right=True).squeeze(1).clamp_(max=weights.shape[-1] - 1)

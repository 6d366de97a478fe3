"""Chain rejection sampling: accept draft tokens so that what is emitted is distributed as the target's own samples.

With `p` the target's (filtered) distribution after row `k - 1` and `q` the distribution `x_k` was drawn from, `x_k` is
accepted with probability `min(1, p(x_k) / q(x_k))`; at the first rejection the token is drawn from
`normalise(max(p - q, 0))`, and after the last accepted row from `p` itself. Then for every token v

    P(v) = q(v) min(1, p(v)/q(v)) + P(reject) max(p(v)-q(v), 0) / sum_u max(p(u)-q(u), 0)
         = min(q(v), p(v)) + max(p(v) - q(v), 0) = p(v),

because `P(reject) = 1 - sum_u min(p(u), q(u)) = sum_u max(p(u) - q(u), 0)`. This holds only if whether `x_k` is offered
at all was settled before it was drawn: choosing depths is the policy's business and never looks at the drawn tokens.
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


def reject_chain(
    layout: TreeLayout,
    target_probs: Tensor,
    draft: DraftDistribution,
    draft_probs: Tensor,
    generator: torch.Generator,
) -> Acceptance:
    """Rejection sampling along each chain.

    layout: chains, drafts in rows 1..; target_probs: float32 `[rows, V]`, packed, each row normalised
    draft_probs: float32 `[bs, D]`, q of each draft token, `D >= W - 1`
    """
    bs, width, device = layout.batch_size, layout.max_width, layout.tokens.device
    starts = layout.qo_indptr[:-1].long()
    if width > 1:
        row = torch.arange(width - 1, device=device)
        exists = layout.valid[:, 1:]
        parent = (starts[:, None] + row).where(exists, 0)
        p = target_probs[parent, layout.tokens[:, 1:]]
        # u < p/q written without a division, so that q = 0 (never drawn) cannot produce a NaN.
        coin = torch.rand(bs, width - 1, generator=generator, device=device)
        passed = exists & (coin * draft_probs[:, : width - 1] < p)
        accepted = passed.to(torch.int64).cumprod(1).sum(1)
    else:
        accepted = torch.zeros(bs, dtype=torch.int64, device=device)

    last = target_probs[starts + accepted]
    offered = torch.tensor(layout.widths, device=device) - 1
    rejected = accepted < offered
    bonus = _draw_after(last, rejected, accepted, draft, generator)
    place = torch.arange(width, device=device)
    path = place.expand(bs, width).where(place <= accepted[:, None], NO_ROW)
    return Acceptance(path=path, lengths=accepted + 1, bonus=bonus)


def _draw_after(
    target: Tensor, rejected: Tensor, depth: Tensor, draft: DraftDistribution, generator: torch.Generator
) -> Tensor:
    """int64 `[bs]`: a draw from the residual where a draft was rejected at `depth`, from the target elsewhere."""
    bs = target.shape[0]
    q = draft.probs[torch.arange(bs, device=target.device), depth.clamp(max=draft.probs.shape[1] - 1)]
    q = q * rejected[:, None]
    residual = target.clone()
    if draft.vocab is None:
        residual -= q
    else:
        residual.index_add_(1, draft.vocab, -q)
    residual.clamp_(min=0)
    # p == q leaves an empty residual by rounding alone; a rejection there has probability 0 but for that rounding.
    empty = residual.sum(1, keepdim=True) <= 0
    return draw(torch.where(empty, target, residual), generator)


def draw(weights: Tensor, generator: torch.Generator) -> Tensor:
    """int64 `[n]`: one sample per row of unnormalised `weights` float32 `[n, V]`.

    Inverse transform: the first v with `w_1 + ... + w_v > u (w_1 + ... + w_V)`, `u ~ U[0, 1)`. Strictly greater, so a
    token of weight 0 is never drawn; float64, so that the sum over a large vocabulary keeps its small terms.
    """
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    coin = torch.rand(total.shape, dtype=torch.float64, generator=generator, device=weights.device)
    point = torch.minimum(coin * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, point, right=True).squeeze(1)

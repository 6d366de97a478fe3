"""The distribution a request samples from: temperature, then top-k, top-p and min-p, as SGLang's PyTorch sampler
defines them.

Rejection sampling is exact with respect to this filtered distribution. Never draws a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

HEAD = 1024
"""Columns sorted first. Top-p and top-k nearly always end inside; where they do not, the whole row is sorted."""


@dataclass(frozen=True)
class Filters:
    """Sampling parameters, one entry per row of the logits.

    temperature: float32 `[n]`, > 0; top_k: int32 or int64 `[n]`; top_p, min_p: float32 `[n]`
    active: False when no row filters anything, which skips the sort
    max_top_k: no row's top_k is greater, as the host knows it; None where it does not
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    active: bool
    max_top_k: int | None = None

    def rows(self, owner: Tensor) -> Filters:
        """The same parameters per packed row; `owner` int64 `[rows]` is each row's request."""
        temperature, top_k, top_p, min_p = (x[owner] for x in (self.temperature, self.top_k, self.top_p, self.min_p))
        return Filters(temperature, top_k, top_p, min_p, self.active, self.max_top_k)


def filtered_probs(logits: Tensor, filters: Filters) -> Tensor:
    """float32 `[n, V]`: softmax(logits / T) restricted to what the filters keep, normalised.

    With the probabilities in descending order `p_1 >= p_2 >= ...`, position i is kept when
    `i <= top_k`, `p_1 + ... + p_{i-1} <= top_p`, and `p_i >= min_p * p_1`. A row that filters nothing stays as it is.

    Where every row has a top_k of at most `HEAD`, and the host knows it, only so many columns are sorted and nothing is
    waited for. With top-p or min-p alone the host waits for a GPU once, to hear whether all rows end within `HEAD`
    columns; where one does not (a flat distribution, a high top-p), all rows are sorted whole.
    """
    probs = torch.softmax(logits.to(torch.float32, copy=True).div_(filters.temperature[:, None]), dim=-1)
    if not filters.active:
        return probs
    vocabulary = probs.shape[1]
    bounded = filters.max_top_k is not None and filters.max_top_k <= HEAD
    head = min(filters.max_top_k if bounded else HEAD, vocabulary)
    whole = (filters.top_k >= vocabulary) & (filters.top_p >= 1) & (filters.min_p <= 0)
    values, columns = probs.topk(head, dim=-1)
    if head < vocabulary and not bounded and not bool((whole | _ends_inside(values, filters)).all()):
        values, columns = probs.sort(dim=-1, descending=True)
    rank = torch.arange(values.shape[1], device=values.device)
    before = values.cumsum(-1) - values
    keep = (
        (rank < filters.top_k[:, None])
        & (before <= filters.top_p[:, None])
        & (values >= filters.min_p[:, None] * values[:, :1])
    )
    kept = values.where(keep, 0)
    kept = torch.where(whole[:, None], values, kept.div_(kept.sum(-1, keepdim=True)))
    return probs.masked_fill_(~whole[:, None], 0).scatter_(1, columns, kept)


def _ends_inside(values: Tensor, filters: Filters) -> Tensor:
    """bool `[n]`: everything beyond these leading columns is filtered away."""
    return (
        (filters.top_k <= values.shape[1])
        | (values.sum(-1) > filters.top_p)
        | (values[:, -1] < filters.min_p * values[:, 0])
    )

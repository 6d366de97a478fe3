"""The DSpark loss over a hot vocabulary, computed in chunks that stay in cache, gradients included.

Logits over ten thousand columns for thousands of positions do not fit a cache, and autograd would walk them a dozen
times. Here each chunk is multiplied, compared and turned into gradients at once; only the small results are kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def chunk_rows(device: torch.device) -> int:
    """Rows worked on at once: what a CPU's cache holds; a GPU would rather have few launches."""
    return 256 if device.type == "cpu" else 8192


@dataclass(frozen=True)
class LossWeights:
    """Weights of L1(p_d, p_t), of the cross entropy against p_t, of the confidence, and the position decay."""

    l1: float = 0.9
    ce: float = 0.1
    confidence: float = 1.0
    decay: float = 4.0


@torch.compile(dynamic=True)
def compare(logits: Tensor, p_t: Tensor, weight: Tensor, l1: float, ce: float) -> tuple[Tensor, Tensor, Tensor]:
    """One chunk, fused into a few passes: logits [n, v] and p_t [n, v] -> d loss / d logits, |p_d - p_t|_1, CE.

    d|.|_1/dlogits = p_d * (sign - <sign, p_d>) and dCE/dlogits = p_d - p_t; the gradient is weighted, the rest is not.
    """
    p_t = p_t.float()
    log_d = logits.float().log_softmax(-1)
    p_d = log_d.exp()
    diff = p_d - p_t
    sign = diff.sign()
    centre = (sign * p_d).sum(-1, keepdim=True)
    grad = weight[:, None] * (ce * diff + l1 * p_d * (sign - centre))
    return grad.to(logits.dtype), diff.abs().sum(-1), -(p_t * log_d).sum(-1)


class DistributionLoss(torch.autograd.Function):
    """sum_i w_i (l1 * |p_d - p_t|_1 + ce * CE(p_t, p_d)) with p_d = softmax(h E^T + z W2^T), all over the hot rows."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        latent: Tensor,
        w2: Tensor,
        head: Tensor,
        target: Tensor,
        rows: Tensor,
        weight: Tensor,
        l1: float,
        ce: float,
    ) -> tuple[Tensor, Tensor]:
        """hidden [n, h], latent [n, r], w2 [v, r], head [v, h] in the dtype to multiply in; target [m, v]
        probabilities, rows int64 [n] -> target row, weight float32 [n].

        Returns the loss (scalar) and the total variation 0.5 * |p_d - p_t|_1 of each position [n], both float32.
        """
        dtype = head.dtype
        hidden, latent, w2_low = hidden.to(dtype), latent.to(dtype), w2.to(dtype)
        grad_hidden, grad_latent = torch.empty_like(hidden), torch.empty_like(latent)
        grad_w2 = torch.zeros(w2.shape, device=w2.device)
        tv = torch.empty(len(hidden), device=hidden.device)
        loss = torch.zeros((), device=hidden.device)
        chunk = chunk_rows(hidden.device)
        for at in range(0, len(hidden), chunk):
            s = slice(at, at + chunk)
            logits = torch.addmm(hidden[s] @ head.T, latent[s], w2_low.T)
            grad, distance, xent = compare(logits, target[rows[s]], weight[s], l1, ce)
            loss += (weight[s] * (l1 * distance + ce * xent)).sum()
            tv[s] = 0.5 * distance
            grad_hidden[s], grad_latent[s] = grad @ head, grad @ w2_low
            grad_w2 += grad.T @ latent[s]
        ctx.save_for_backward(grad_hidden, grad_latent, grad_w2.to(w2.dtype))
        ctx.mark_non_differentiable(tv)
        return loss, tv

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """grad: of the loss, a scalar. The gradients of hidden, latent and w2, which `forward` has made already."""
        grad_hidden, grad_latent, grad_w2 = ctx.saved_tensors
        return grad * grad_hidden, grad * grad_latent, grad * grad_w2, *([None] * 6)


@torch.no_grad()
def hot_probabilities(final: Tensor, head: Tensor) -> Tensor:
    """softmax over the hot rows of final [m, h] @ head [v, h]^T, in the dtype of `final`.

    The cold rows' share (about two per cent) is left out here, which costs nothing in what the draft learns; the
    evaluation normalises over the whole vocabulary.
    """
    out = torch.empty(len(final), len(head), dtype=final.dtype, device=final.device)
    chunk = chunk_rows(final.device)
    for at in range(0, len(final), chunk):
        out[at : at + chunk] = (final[at : at + chunk] @ head.T).float().softmax(-1)
    return out

"""A linear layer over few rows, as decoding and verification have them.

On a CPU, oneDNN wants the second factor of a bfloat16 product in blocks and reorders it in every call. For few rows
`(W x^T)^T` makes that the handful of rows and not the whole weight; a row's result is then also the same to the bit
whatever rows come with it. Elsewhere this is torch's own `linear`. Never copies a weight.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear as plain_linear

FEW_ROWS = 64
"""Up to here the weight, not the rows, decides what a product costs. Measured; beyond it both orders cost the same."""


def _blocked_bfloat16() -> bool:
    """Does oneDNN multiply bfloat16 in hardware here (AVX-512 or AMX on x86)?"""
    try:
        return bool(torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):
        return False


BLOCKED_BFLOAT16 = _blocked_bfloat16()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x W^T + b`: x `[rows, k]` or `[..., k]`, weight `[n, k]`, bias `[n]` -> `[..., n]`."""
    few = (
        BLOCKED_BFLOAT16
        and x.dim() == 2
        and 0 < x.shape[0] <= FEW_ROWS
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.bfloat16
    )
    if not few:
        return plain_linear(x, weight, bias)
    one = x.shape[0] == 1
    out = torch.mv(weight, x.view(-1)).view(1, -1) if one else torch.mm(weight, x.t()).t().contiguous()
    return out if bias is None else out.add_(bias)

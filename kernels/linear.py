"""A linear layer over few rows, as decoding and verification have them, on whatever CPU there is.

With bfloat16 in hardware (AVX-512, AMX), oneDNN wants the second factor of a product in blocks and reorders it in every
call. For few rows `(W x^T)^T` makes that the handful of rows and not the whole weight; a row's result is then also the
same to the bit whatever rows come with it.

Without it, which is most x86 machines, torch multiplies half-width numbers one by one: six rows cost six times as much
as one, and nothing is left to gain by verifying. FBGEMM keeps a second copy of the weight as float16 in blocks, widens
it in registers and adds in float32: six rows cost what one does. Weights opt in (`keep_packed`), for the memory.

Elsewhere this is torch's own `linear`. Never changes a weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear as plain_linear

FEW_ROWS = 64
"""Up to here the weight, not the rows, decides what a product costs. Measured; beyond it both orders cost the same."""

HALF = (torch.bfloat16, torch.float16)
LARGEST = torch.finfo(torch.float16).max
PACKED = "_dspark_packed"
"""Attribute of a weight that has opted in: FBGEMM's copy, or None until the first product after a change."""


def _blocked_bfloat16() -> bool:
    """Does oneDNN multiply bfloat16 in hardware here (AVX-512 or AMX on x86)?"""
    try:
        return bool(torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):
        return False


BLOCKED_BFLOAT16 = _blocked_bfloat16()
PACKS = not BLOCKED_BFLOAT16 and "fbgemm" in torch.backends.quantized.supported_engines
"""Whether a packed copy is what this machine multiplies fastest with."""


def packs(weight: Tensor) -> bool:
    """Whether `keep_packed` would copy this weight `[n, k]`."""
    return PACKS and weight.device.type == "cpu" and weight.dtype in HALF and weight.dim() == 2


def keep_packed(weight: Tensor) -> Tensor:
    """The same weight; `linear` will keep a copy of it in the form that is fast here, if any is, for as long as the
    weight lives. Call it again when its values have changed."""
    if packs(weight):
        setattr(weight, PACKED, None)
    return weight


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x W^T + b`: x `[rows, k]` or `[..., k]`, weight `[n, k]`, bias `[n]` -> `[..., n]`."""
    if hasattr(weight, PACKED):
        return _packed_linear(x, weight, bias)
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


def _packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """float16 holds every bfloat16 from 6e-5 up exactly, and to 3e-8 below."""
    packed: Any = getattr(weight, PACKED)
    if packed is None:
        if weight.abs().max() > LARGEST:
            delattr(weight, PACKED)
            return plain_linear(x, weight, bias)
        packed = torch.ops.quantized.linear_prepack_fp16(weight.float(), None)
        setattr(weight, PACKED, packed)
    out = torch.ops.quantized.linear_dynamic_fp16(x.float(), packed).to(x.dtype)
    return out if bias is None else out.add_(bias)

"""A linear layer on a CPU, from the one row of a decode step to the rows of a prefill chunk.

What a CPU multiplies fastest is a weight that lies in blocks. Left in rows it is reordered in every call, which for few
rows costs more than the product; and numbers that the CPU does not multiply are widened one by one. So weights opt in
(`keep_packed`) to a second copy in the form that this machine is fast with, made once:

    float32, and bfloat16 where the CPU multiplies it (AVX512-BF16, AMX)    oneDNN's blocks
    float16, and bfloat16 elsewhere    FBGEMM's, as float16, widened in registers and added up in float32

Eight rows then cost little more than one, which is what verification lives on, and a row's result is the same to the
bit whatever rows come with it (tested with AVX2 and AVX-512, not with AMX). What has not opted in, and other machines,
have torch's own `linear`. Never changes a weight.
"""

from __future__ import annotations

import platform
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear as plain_linear

PACKED = "_dspark_packed"
"""Attribute of a weight that has opted in: its packed copy, or None until the first product after a change."""
ROWS = 32
"""That oneDNN is told to lay blocks out for. Measured: any other number of rows is as fast with them."""
LONG = 1024
"""Terms of a sum that oneDNN cuts in pieces where there is one row only. Seen with AVX-512, in either type."""
LARGEST = torch.finfo(torch.float16).max


class Packed(Protocol):
    """A copy of a weight `[n, k]`."""

    def __init__(self, weight: Tensor) -> None: ...

    def times(self, x: Tensor) -> Tensor:
        """`x W^T`: x `[rows, k]` -> `[rows, n]`, of x's type."""
        ...


class Blocked:
    """oneDNN's, of the weight's own type."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)

    def times(self, x: Tensor) -> Tensor:
        if x.shape[0] == 1 and x.shape[1] > LONG:
            # Alone, a row's sum would be cut in pieces and rounded otherwise than in company.
            return self.times(torch.cat((x, x)))[:1]
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, None, "none", [], "")
        return product


class Widened:
    """FBGEMM's, as float16: that holds every bfloat16 from 6e-5 up to 65504 exactly, and to 3e-8 below."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = torch.ops.quantized.linear_prepack_fp16(weight.float(), None)

    def times(self, x: Tensor) -> Tensor:
        product: Tensor = torch.ops.quantized.linear_dynamic_fp16(x.float(), self._weight)
        return product.to(x.dtype)


def _forms() -> dict[torch.dtype, type[Packed]]:
    """The form of each type that has one on this machine."""
    forms: dict[torch.dtype, type[Packed]] = {}
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return forms
    if "fbgemm" in torch.backends.quantized.supported_engines:
        forms |= {torch.bfloat16: Widened, torch.float16: Widened}
    if torch.backends.mkldnn.is_available():
        forms[torch.float32] = Blocked
        in_hardware = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        if in_hardware and torch.ops.mkldnn._is_mkldnn_bf16_supported():
            forms[torch.bfloat16] = Blocked
    return forms


FORMS = _forms()


def packs(weight: Tensor) -> bool:
    """Whether `keep_packed` would copy this weight `[n, k]`."""
    return weight.dtype in FORMS and weight.device.type == "cpu" and weight.dim() == 2


def keep_packed(weight: Tensor) -> Tensor:
    """The same weight; `linear` will keep a copy of it in the form that is fast here, if any is, for as long as the
    weight lives. Call it again when its values have changed."""
    if packs(weight):
        setattr(weight, PACKED, None)
    return weight


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x W^T + b`: x `[rows, k]` or `[..., k]`, weight `[n, k]`, bias `[n]` -> `[..., n]`."""
    packed = _packed(weight) if hasattr(weight, PACKED) else None
    if packed is None or x.dtype != weight.dtype:
        return plain_linear(x, weight, bias)
    out = packed.times(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], len(weight))
    return out if bias is None else out.add_(bias)


def _packed(weight: Tensor) -> Packed | None:
    """The weight's copy, made now if need be; None where that could not hold it."""
    packed: Packed | None = getattr(weight, PACKED)
    if packed is None:
        form = FORMS[weight.dtype]
        if form is Widened and weight.abs().max() > LARGEST:
            delattr(weight, PACKED)
            return None
        packed = form(weight)
        setattr(weight, PACKED, packed)
    return packed

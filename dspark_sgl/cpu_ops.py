"""Layer arithmetic for the CPU platform, where SGLang's generic path leaves half the step on the table.

Each function computes what SGLang's own computes, to float32 rounding, in fewer or better suited torch
operations. It never changes what a model computes, never repacks or copies a weight, and falls back to
the plain operation wherever its condition does not hold.
"""

from __future__ import annotations

import torch
from sglang.srt.layers.quantization.unquant import UnquantizedEmbeddingMethod, UnquantizedLinearMethod
from torch.nn.functional import linear as plain_linear

# Up to here the weight, not the rows, decides what a product costs. Measured; beyond it both orders cost the same.
FEW_ROWS = 64


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x W^T + b``: x [rows, k] or [..., k], weight [n, k], bias [n] -> [..., n].

    For few bfloat16 rows it is computed as ``(W x^T)^T``. oneDNN wants the second factor of a product in
    blocks and reorders it in every call; here that is the handful of rows and not the whole weight. A row's
    result is then also the same to the bit whatever rows come with it, which verification likes.
    """
    if (
        x.dim() != 2
        or not 0 < x.shape[0] <= FEW_ROWS
        or weight.dtype != torch.bfloat16
        or x.dtype != torch.bfloat16
        or not BLOCKED_BFLOAT16
    ):
        return plain_linear(x, weight, bias)
    if x.shape[0] == 1:
        out = torch.mv(weight, x.view(-1)).view(1, -1)
    else:
        out = torch.mm(weight, x.t()).t().contiguous()
    return out if bias is None else out.add_(bias)


def _blocked_bfloat16() -> bool:
    """Does oneDNN multiply bfloat16 in hardware here (AVX-512 or AMX on x86)?"""
    try:
        return bool(torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):
        return False


BLOCKED_BFLOAT16 = _blocked_bfloat16()


class CpuLinearMethod(UnquantizedLinearMethod):
    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return linear(x, layer.weight, bias)


class CpuHeadMethod(UnquantizedEmbeddingMethod):
    """The vocabulary projection; looking embeddings up stays as it was."""

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return linear(x.to(layer.weight.dtype), layer.weight, bias)


def install(model: torch.nn.Module) -> None:
    """Give the unquantized layers of a loaded model the methods above."""
    modules = list(model.modules())
    full_precision_head = any(getattr(m, "use_fp32_lm_head", False) for m in modules)
    for module in modules:
        method = type(getattr(module, "quant_method", None))
        if method is UnquantizedLinearMethod:
            module.quant_method = CpuLinearMethod()
        elif method is UnquantizedEmbeddingMethod and not full_precision_head:
            module.quant_method = CpuHeadMethod()

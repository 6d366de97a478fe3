"""Linear layers for the CPU platform: SGLang's unquantised methods, with the product that suits few rows.

They compute what SGLang's own compute, to float32 rounding; they never change a model or copy a weight.
"""

from __future__ import annotations

import torch
from sglang.srt.layers.quantization.unquant import UnquantizedEmbeddingMethod, UnquantizedLinearMethod

from dspark_sgl.kernels.linear import linear


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

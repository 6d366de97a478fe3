"""Linear layers for the CPU platform: SGLang's unquantised methods, with the product that suits few rows.

They compute what SGLang's own compute, to the rounding of a float32 sum. They never change a weight, and keep a second
copy of each that is used, if memory allows (`kernels/linear.py`).
"""

from __future__ import annotations

import logging

import psutil
import torch
from sglang.srt.layers.quantization.unquant import UnquantizedEmbeddingMethod, UnquantizedLinearMethod

from dspark_sgl.kernels.linear import PACKED, keep_packed, linear, packs

logger = logging.getLogger(__name__)


class CpuLinearMethod(UnquantizedLinearMethod):
    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return linear(x, layer.weight, bias)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        _repack(layer.weight)


class CpuHeadMethod(UnquantizedEmbeddingMethod):
    """The vocabulary projection; looking embeddings up stays as it was."""

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return linear(x.to(layer.weight.dtype), layer.weight, bias)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        _repack(layer.weight)


def install(model: torch.nn.Module) -> None:
    """Give the unquantized layers of a loaded model the methods above, and its weights packed copies."""
    modules = list(model.modules())
    full_precision_head = any(getattr(m, "use_fp32_lm_head", False) for m in modules)
    weights = []
    for module in modules:
        method = type(getattr(module, "quant_method", None))
        if method is UnquantizedLinearMethod:
            module.quant_method = CpuLinearMethod()
        elif method is UnquantizedEmbeddingMethod and not full_precision_head:
            module.quant_method = CpuHeadMethod()
        elif type(module) is not torch.nn.Linear:  # those of a draft, which we multiply with ourselves
            continue
        if packs(module.weight):
            weights.append(module.weight)
    size, free = sum(weight.nbytes for weight in weights), psutil.virtual_memory().available
    if 2 * size > free:
        logger.warning(
            "dspark: packed copies of the weights make steps several times as fast, but would take %.1f of the %.1f GB "
            "of memory left: serving without",
            *(size / 1e9, free / 1e9),
        )
        return
    for weight in weights:
        keep_packed(weight)


def _repack(weight: torch.Tensor) -> None:
    """SGLang has written new values into a weight, as it does at the end of every update."""
    if hasattr(weight, PACKED):
        keep_packed(weight)

"""Linear layers for the CPU platform: SGLang's unquantised methods, with the product that suits few rows.

They compute what SGLang's own compute, to the rounding of a float32 sum. They never change a weight, and keep a second
copy of each that is used, if memory allows (`kernels/linear.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import wraps
from typing import Any

import psutil
import torch
from sglang.srt.layers.quantization.unquant import UnquantizedEmbeddingMethod, UnquantizedLinearMethod

from dspark_sgl.kernels.linear import keep_packed, linear, packs

logger = logging.getLogger(__name__)


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
    weights = []
    for module in modules:
        method = type(getattr(module, "quant_method", None))
        if method is UnquantizedLinearMethod:
            module.quant_method = CpuLinearMethod()
        elif method is UnquantizedEmbeddingMethod and not full_precision_head:
            module.quant_method = CpuHeadMethod()
        elif type(module) is not torch.nn.Linear:  # those of a draft, which we multiply with ourselves
            continue
        weights.append(module.weight)
    _pack(model, [weight for weight in weights if packs(weight)])


def _pack(model: Any, weights: Sequence[torch.Tensor]) -> None:
    """Opt these weights in, now and after every later change of them."""
    if not weights:
        return
    size, free = sum(weight.nbytes for weight in weights), psutil.virtual_memory().available
    if 2 * size > free:
        logger.warning(
            "dspark: packed copies of the weights make steps several times as fast, but would take %.1f of the %.1f GB "
            "of memory left: serving without",
            *(size / 1e9, free / 1e9),
        )
        return
    load = model.load_weights

    @wraps(load)
    def load_and_pack(*args: Any, **kwargs: Any) -> Any:
        try:
            return load(*args, **kwargs)
        finally:
            for weight in weights:
                keep_packed(weight)

    for weight in weights:
        keep_packed(weight)
    model.load_weights = load_and_pack

"""Stands in for the compiled half of `sglang-kernel` where the installed torch is older than the one it was built for.

`sgl_kernel` falls back to a module of this name on the path. Its norms and renormalisations already go through
FlashInfer; what is left of a dense model's path is here. Any other operation fails by its name when it is called.
"""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import torch

_library = torch.library.Library("sgl_kernel", "FRAGMENT")


def _define(schema: str, run: object) -> None:
    _library.define(schema)
    _library.impl(schema.partition("(")[0], run, "CompositeExplicitAutograd")


def _weak_ref_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Keeps the memory alive, which a weak reference would not: a graph's outputs stay as long as the graph."""
    return tensor.view_as(tensor)


def _silu_and_mul(out: torch.Tensor, x: torch.Tensor) -> None:
    gate, up = x.chunk(2, -1)
    out.copy_(torch.nn.functional.silu(gate) * up)


_define("weak_ref_tensor(Tensor(a) tensor) -> Tensor(a)", _weak_ref_tensor)
_define("silu_and_mul(Tensor! out, Tensor input) -> ()", _silu_and_mul)


class _NotForThisGPU(ModuleType):
    """A feature of later GPUs whose module imports a compiler of its own at the top; it answers that it cannot run."""

    DualGemmQuantMode = SimpleNamespace(UNQUANT=0, FP8=1)
    MAX_DUAL_GEMM_DECODE_TOKENS = 0

    @staticmethod
    def can_use_dual_gemm(*_: object, **__: object) -> bool:
        return False


_DUAL_GEMM = "sglang.kernels.ops.gemm.cutedsl_dual_gemm"
sys.modules[_DUAL_GEMM] = _NotForThisGPU(_DUAL_GEMM)

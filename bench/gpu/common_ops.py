"""Stands in for the compiled half of `sglang-kernel` where the installed torch is older than the one it was built for.

`sgl_kernel` falls back to a module of this name on the path. Its norms and renormalisations already go through
FlashInfer; what is left of a dense model's path is here. Any other operation fails by its name when it is called.
"""

from __future__ import annotations

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

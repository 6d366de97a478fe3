"""SGLang's seeded draw on a plain CPU: its hash is a kernel that a CPU lacks, and the rest of it wants a compiler.

The same numbers as SGLang's on a GPU: a seed draws the same there. Never keeps a state: a draw is a function of seed,
position and distribution.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF


def multinomial_with_seed(logprobs: Tensor, seed: Tensor, positions: Tensor) -> Tensor:
    """int64 `[n, 1]`: `argmax_j logprobs[i, j] - log(-log u_ij)`, u uniform: a draw from softmax(logprobs[i]).

    logprobs: `[n, V]`, unnormalised; seed: int64 or uint64 `[n]`; positions: `[n]`
    """
    uniform = hashed(seed.to(torch.int64), positions.to(torch.int64), logprobs.shape[1]).double().div_(_LOW)
    # As SGLang has it: u = 0 and u = 1 have no logarithm or none of that.
    gumbel = uniform.log_().clamp_(torch.finfo(torch.float64).min, -(2.0**-32)).neg_().log_().neg_()
    return gumbel.add_(logprobs.double()).argmax(dim=1, keepdim=True)


def hashed(seed: Tensor, positions: Tensor, columns: int) -> Tensor:
    """int64 `[n, columns]` in [0, 2^32): MurmurHash3 of a seed's two halves, a position and a column.

    seed, positions: int64 `[n]`
    """
    h = torch.zeros_like(seed)
    for block in (seed & _LOW, (seed >> 32) & _LOW, positions & _LOW):
        h = _joined(h, _scrambled(block))
    h = _joined(h[:, None], _scrambled(torch.arange(columns, device=seed.device)))
    h ^= 16  # bytes that went in
    h ^= h >> 16
    h = h.mul_(0x85EBCA6B).bitwise_and_(_LOW)
    h ^= h >> 13
    h = h.mul_(0xC2B2AE35).bitwise_and_(_LOW)
    return h.bitwise_xor_(h >> 16)


def _scrambled(block: Tensor) -> Tensor:
    return _rotated(block * 0xCC9E2D51 & _LOW, 15) * 0x1B873593 & _LOW


def _joined(h: Tensor, block: Tensor) -> Tensor:
    return _rotated(h ^ block, 13).mul_(5).add_(0xE6546B64).bitwise_and_(_LOW)


def _rotated(word: Tensor, left: int) -> Tensor:
    return ((word << left) | (word >> (32 - left))) & _LOW

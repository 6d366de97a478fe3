"""Rotary embedding on the CPU platform: SGLang's result to the bit, in a third of its calls to torch.

For the few rows of a decode step a call costs more than what it computes. SGLang's native form takes some forty a
layer: queries, then keys, each cut in halves (a, b), multiplied and joined. Here both are rotated together, and the
table holds every position's cosines twice and its sines with the sign that each half takes:

    (a cos - b sin, b cos + a sin) = (a, b) * (cos, cos) + (b, a) * (-sin, sin)

Heads that are rotated in part, or pair by pair, go SGLang's way.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from sglang.kernels.fused_op import BaseFusedOp
from sglang.srt.layers.rotary_embedding import RotaryEmbedding
from torch import Tensor

TABLE = "_dspark_table"
"""Attribute of an embedding: SGLang's own table that ours was made from, and ours."""


def register(platform: str) -> None:
    """Have SGLang's embeddings rotate by `rotate` on this platform, save those that compute something else."""
    for kind in (RotaryEmbedding, *_below(RotaryEmbedding)):
        if kind.forward_native is RotaryEmbedding.forward_native:
            BaseFusedOp.register_oot_forward(kind, rotate, platform)


def _below(kind: type[RotaryEmbedding]) -> Iterator[type[RotaryEmbedding]]:
    for child in kind.__subclasses__():
        yield child
        yield from _below(child)


def rotate(
    self: RotaryEmbedding, positions: Tensor, query: Tensor, key: Tensor, *others: Any, **named: Any
) -> tuple[Tensor, Tensor]:
    """positions: int64 `[n]`; query, key: `[n, heads * head size]`, each with heads of its own number"""
    if not self.is_neox_style or self.rotary_dim != self.head_size or others or named:
        return self.forward_native(positions, query, key, *others, **named)
    cos, sin = _table(self, query.dtype).index_select(0, positions.flatten()).unbind(1)
    parts = query.flatten(1), key.flatten(1)
    both, width = torch.cat(parts, 1), parts[0].shape[1]
    halves = both.view(len(both), both.shape[1] // self.head_size, 2, self.head_size // 2)
    rotated = (halves * cos).add_(halves.flip(2).mul_(sin)).view(both.shape)
    return rotated[:, :width].view(query.shape), rotated[:, width:].view(key.shape)


def _table(self: RotaryEmbedding, dtype: torch.dtype) -> Tensor:
    """`[positions, 2, 1, 2, size / 2]`: cosines and signed sines of both halves, made again where SGLang's table has
    been."""
    made = self.__dict__.get(TABLE)
    if made is None or made[0] is not self.cos_sin_cache or made[1].dtype != dtype:
        cos, sin = self.cos_sin_cache.to(dtype).chunk(2, -1)
        table = torch.stack((torch.stack((cos, cos), 1), torch.stack((-sin, sin), 1)), 1).unsqueeze(2)
        made = self.__dict__[TABLE] = (self.cos_sin_cache, table)
    return made[1]

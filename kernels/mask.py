"""What each verify row sees, in FlashInfer's form: for every row of a request its whole prefix, then its ancestors.

Flat, a request's `n` rows of `prefix + n` entries follow one another and the requests likewise. Packed, eight entries
share a byte, the first in the lowest bit, and each request begins on a byte of its own. A chain needs no mask.
Never plans a forward and never looks at tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .layout import TreeLayout


@dataclass(frozen=True)
class PackedMask:
    """bits: uint8 `[starts[-1]]`; starts: int32 `[bs + 1]`, the byte at which each request begins"""

    bits: Tensor
    starts: Tensor


def flat_mask(layout: TreeLayout, prefix_lens: Tensor, *, total: int, longest: int) -> Tensor:
    """bool `[n]`, `n >= sum_i n_i (prefix_i + n_i)`: what SGLang hands to FlashInfer, which packs it.

    prefix_lens: int64 or int32 `[bs]`, the tokens before each request's rows
    total, longest: their sum and the greatest, or more, as the host knows them, so that it need not wait for a device;
        what is beyond the last request's entries is anything
    """
    if prefix_lens.is_cuda:
        from . import mask_triton

        return mask_triton.flat_mask(layout, prefix_lens, total=total, longest=longest)
    return flat_mask_torch(layout, prefix_lens)


def fill_packed_mask(mask: PackedMask, layout: TreeLayout, prefix_lens: Tensor, *, longest: int) -> None:
    """The same packed, into memory that is there and whose `starts` are filled in already; the flat one is never there.

    longest: the greatest of `prefix_lens`, or more, as the host knows it
    """
    if prefix_lens.is_cuda:
        from . import mask_triton

        mask_triton.fill_packed_mask(mask, layout, prefix_lens, longest=longest)
    else:
        bits = packed_mask_torch(layout, prefix_lens).bits
        mask.bits[: len(bits)] = bits


def flat_mask_torch(layout: TreeLayout, prefix_lens: Tensor) -> Tensor:
    """The reference: ones, and the ancestor mask where the rows themselves stand."""
    owner = layout.owner
    row_widths = (prefix_lens + layout.counts)[owner]
    starts = row_widths.cumsum(0) - row_widths + prefix_lens[owner]
    mask = torch.ones(int(row_widths.sum()), dtype=torch.bool, device=prefix_lens.device)
    exists = layout.valid[owner]
    places = starts[:, None] + torch.arange(layout.max_width, device=prefix_lens.device)
    mask[places[exists]] = layout.ancestor_mask()[exists]
    return mask


def packed_mask_torch(layout: TreeLayout, prefix_lens: Tensor) -> PackedMask:
    """The reference: the flat mask, bit by bit."""
    flat = flat_mask_torch(layout, prefix_lens)
    sizes = entries(layout, prefix_lens)
    starts = byte_starts(sizes)
    owner = torch.arange(len(sizes), device=flat.device).repeat_interleave(sizes)
    place = torch.arange(len(flat), device=flat.device) - (sizes.cumsum(0) - sizes)[owner]
    worth = flat.to(torch.uint8) << (place % 8).to(torch.uint8)
    bits = worth.new_zeros(int(starts[-1])).index_add_(0, starts[owner] + place // 8, worth)
    return PackedMask(bits, starts)


def entries(layout: TreeLayout, prefix_lens: Tensor) -> Tensor:
    """int64 `[bs]`: `n_i (prefix_i + n_i)`, the entries of each request's mask."""
    return layout.counts * (prefix_lens + layout.counts)


def byte_starts(sizes: Tensor) -> Tensor:
    """int32 `[bs + 1]`: where each request's bytes begin. sizes: int64 `[bs]`, entries"""
    return torch.nn.functional.pad((sizes + 7) // 8, (1, 0)).cumsum(0, dtype=torch.int32)

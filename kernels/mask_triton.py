"""The twin of `mask.py`: every byte is computed from the tree itself, by climbing from its row towards its column."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .layout import TreeLayout
from .mask import PackedMask, entries

ENTRIES = 2048
"""Mask entries of one program."""


def flat_mask(layout: TreeLayout, prefix_lens: Tensor, *, total: int, longest: int) -> Tensor:
    """As `mask.flat_mask`."""
    starts = torch.nn.functional.pad(entries(layout, prefix_lens), (1, 0)).cumsum(0)
    size = layout.max_width * (total + sum(layout.widths))
    most = layout.max_width * (longest + layout.max_width)
    out = torch.empty(size, dtype=torch.uint8, device=prefix_lens.device)
    _fill(out, layout, prefix_lens, starts, most, 1)
    return out.view(torch.bool)


def fill_packed_mask(mask: PackedMask, layout: TreeLayout, prefix_lens: Tensor, *, longest: int) -> None:
    """As `mask.fill_packed_mask`."""
    most = layout.max_width * (longest + layout.max_width)
    _fill(mask.bits, layout, prefix_lens, mask.starts, most, 8)


def _fill(out: Tensor, layout: TreeLayout, prefix_lens: Tensor, starts: Tensor, most: int, bits: int) -> None:
    """out: uint8; starts: `[bs + 1]`, in bytes; most: the greatest request's entries, or more; bits: entries a byte"""
    _mask[(triton.cdiv(most, ENTRIES), layout.batch_size)](
        out,
        starts,
        layout.parents.contiguous(),
        prefix_lens.contiguous(),
        layout.qo_indptr,
        layout.max_width,
        BITS=bits,
        BYTES=ENTRIES // bits,
    )


@triton.jit
def _mask(out, starts, parents, prefix_lens, row_starts, width, BITS: tl.constexpr, BYTES: tl.constexpr):
    """out: uint8; starts: `[bs + 1]`; parents: int64 `[bs, width]`; prefix_lens: `[bs]`; row_starts: int32 `[bs + 1]`

    A request's own entries are counted in int32: 64 rows of a million tokens each fit.
    """
    request = tl.program_id(1)
    prefix = tl.load(prefix_lens + request).to(tl.int32)
    rows = tl.load(row_starts + request + 1) - tl.load(row_starts + request)
    columns = prefix + rows
    byte = tl.program_id(0) * BYTES + tl.arange(0, BYTES)
    bit = tl.arange(0, BITS)
    entry = byte[:, None] * BITS + bit[None, :]
    exists = entry < rows * columns
    column = entry % columns - prefix  # negative in the prefix, which every row sees
    at = entry // columns
    # Parents precede children: the climb is over at the column's row, or above it.
    climbing = exists & (column >= 0) & (at > column)
    while tl.max(climbing.to(tl.int32)) > 0:
        up = tl.load(parents + request.to(tl.int64) * width + at, climbing, 0).to(tl.int32)
        at = tl.where(climbing, up, at)
        climbing = climbing & (at > column)
    seen = exists & ((column < 0) | (at == column))
    start = tl.load(starts + request)
    size = tl.load(starts + request + 1) - start
    tl.store(out + start + byte, tl.sum(seen.to(tl.int32) << bit[None, :], 1).to(tl.uint8), byte < size)

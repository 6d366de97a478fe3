"""The twin of `walk.py`: one launch, one program a request, its tree in registers.

No `from __future__ import annotations` in these files: Triton reads `tl.constexpr` off the parameters.
"""

import triton
import triton.language as tl
from torch import Tensor

from .layout import TreeLayout
from .walk import Acceptance


def walk(layout: TreeLayout, target_tokens: Tensor) -> Acceptance:
    """As `walk.walk`."""
    bs, width, steps = layout.batch_size, layout.max_width, layout.path_width
    path = target_tokens.new_empty(bs, steps)
    lengths, bonus = target_tokens.new_empty(bs), target_tokens.new_empty(bs)
    _walk[(bs,)](
        path,
        lengths,
        bonus,
        layout.tokens.contiguous(),
        layout.parents.contiguous(),
        target_tokens.contiguous(),
        layout.qo_indptr,
        width,
        steps,
        ROWS=triton.next_power_of_2(width),
        num_warps=1,
    )
    return Acceptance(path, lengths, bonus)


@triton.jit
def _walk(path, lengths, bonus, tokens, parents, target, starts, width, steps, ROWS: tl.constexpr):
    """path: int64 `[bs, steps]`; lengths, bonus: int64 `[bs]`; tokens, parents, target: int64 `[bs, width]`;
    starts: int32 `[bs + 1]`"""
    request = tl.program_id(0)
    mine = request.to(tl.int64) * width
    at = tl.arange(0, ROWS)
    # Without the anchor, so that the parent -1 is nobody's.
    draft = (at > 0) & (at < tl.load(starts + request + 1) - tl.load(starts + request))
    token = tl.load(tokens + mine + at, draft, 0)
    parent = tl.load(parents + mine + at, draft, -1)
    row = request * 0
    last = row
    length = row
    for step in range(steps):
        tl.store(path + request.to(tl.int64) * steps + step, row.to(tl.int64))
        length += (row >= 0).to(tl.int32)
        last = tl.where(row >= 0, row, last)
        hit = draft & (parent == row) & (token == tl.load(target + mine + last))
        first = tl.min(tl.where(hit, at, ROWS), 0)
        row = tl.where(first < ROWS, first, -1)  # walk.NO_ROW
    tl.store(lengths + request, length.to(tl.int64))
    tl.store(bonus + request, tl.load(target + mine + last))

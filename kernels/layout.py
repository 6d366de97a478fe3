"""The shape of one verify batch: a ragged forest of draft tokens, one tree per request.

A chain is a tree without branches, so everything after the drafter speaks of trees only. This module lays rows out and
never decides which draft tokens are worth a row (policies do) nor whether one is accepted (`walk`, `rejection`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from .staging import staged

ROOT = -1
"""Parent of the anchor row."""
NO_NODE = -1
"""Parent, in a proposal, of what is no node: there 0 is the anchor."""


@dataclass(frozen=True)
class TreeLayout:
    """The rows the target verifies, padded to `[bs, W]`, `W = max(widths)`.

    Row 0 of a request is its anchor: the last token the target produced, whose KV is not written yet. Rows `1..n-1` are
    draft tokens; a parent always precedes its children.

    widths: rows of each request, anchor included (host); a request that does not speculate has width 1
    tokens: int64 `[bs, W]`, 0 in padding
    parents: int64 `[bs, W]`, row index in the same request, `ROOT` at the anchor and in padding
    depths: int64 `[bs, W]`, 0 at the anchor
    is_chain: every row's parent is the row before it, so the accepted path is a prefix and no KV has to move
    path_width: rows of the longest path, the anchor included
    nodes: int64 `[bs, W]`, which proposed node a row of a tree is (0 = the anchor, `m + 1` = node `m`); None of
        chains and of what `padded` returns
    """

    widths: tuple[int, ...]
    tokens: Tensor
    parents: Tensor
    depths: Tensor
    is_chain: bool
    path_width: int
    nodes: Tensor | None = None

    @property
    def batch_size(self) -> int:
        return len(self.widths)

    @property
    def max_width(self) -> int:
        return self.tokens.shape[1]

    @cached_property
    def is_uniform(self) -> bool:
        return min(self.widths) == max(self.widths)

    @cached_property
    def valid(self) -> Tensor:
        """bool `[bs, W]`: rows that exist."""
        return torch.arange(self.max_width, device=self.tokens.device) < self.counts[:, None]

    @cached_property
    def counts(self) -> Tensor:
        """int64 `[bs]`: `widths`, on the device."""
        return staged(self.widths, self.tokens.device)

    @cached_property
    def starts(self) -> Tensor:
        """int64 `[bs]`: each request's first packed row."""
        return self.qo_indptr[:-1].long()

    @cached_property
    def place(self) -> Tensor:
        """int64 `[rows]`: where each packed row stands in `[bs * W]`. Worked out on the host, which would have to wait
        for a device to count the rows that exist."""
        if self.is_uniform:
            return torch.arange(self.batch_size * self.max_width, device=self.tokens.device)
        widths = torch.tensor(self.widths)
        first = widths.cumsum(0) - widths
        owner = torch.arange(self.batch_size).repeat_interleave(widths)
        place = owner * self.max_width + torch.arange(len(owner)) - first[owner]
        return staged(place, self.tokens.device)

    @cached_property
    def owner(self) -> Tensor:
        """int64 `[rows]`: the request of each packed row."""
        return self.place // self.max_width

    @cached_property
    def qo_indptr(self) -> Tensor:
        """int32 `[bs + 1]`: where each request's packed rows begin."""
        return staged(list(accumulate(self.widths, initial=0)), self.tokens.device, torch.int32)

    def pack(self, padded: Tensor) -> Tensor:
        """`[bs, W, ...]` -> `[rows, ...]`, requests one after the other."""
        if self.is_uniform:
            return padded.flatten(0, 1)
        return padded.flatten(0, 1)[self.place]

    def pad(self, packed: Tensor, fill: float = 0) -> Tensor:
        """`[rows, ...]` -> `[bs, W, ...]`; the inverse of `pack`."""
        shape = (self.batch_size, self.max_width, *packed.shape[1:])
        if self.is_uniform:
            return packed.view(shape)
        padded = packed.new_full(shape, fill)
        padded.view(-1, *packed.shape[1:])[self.place] = packed
        return padded

    def widened(self, requests: int, width: int) -> TreeLayout:
        """The same trees among `requests` requests of `width` rows each: the rows and requests added are dead.

        A dead row is token 0 at the anchor's position. No live row attends to it, and what it yields is dropped.
        """
        if self.widths == (width,) * requests:
            return self
        more = (0, width - self.max_width, 0, requests - self.batch_size)
        pad = torch.nn.functional.pad
        return replace(
            self,
            widths=(width,) * requests,
            tokens=pad(self.tokens, more),
            parents=pad(self.parents, more, value=ROOT),
            depths=pad(self.depths, more),
            nodes=None,
        )

    def ancestor_mask(self) -> Tensor:
        """bool `[rows, W]`: entry (i, j) says that row j of the same request is row i or one of its ancestors."""
        bs, width, device = self.batch_size, self.max_width, self.tokens.device
        if self.is_chain:
            closed = torch.ones(width, width, dtype=torch.bool, device=device).tril().expand(bs, width, width)
            return self.pack(closed.contiguous())
        closed = torch.eye(width, dtype=torch.bool, device=device).repeat(bs, 1, 1)
        parents = self.parents.clamp(min=0)[:, :, None].expand(bs, width, width)
        has_parent = (self.parents != ROOT)[:, :, None]
        for _ in range(self.path_width - 1):
            # A row sees what its parent sees; after `depth` rounds the closure is complete.
            closed |= closed.gather(1, parents) & has_parent
        return self.pack(closed)


def chain_layout(anchors: Tensor, drafts: Tensor, depths: Sequence[int]) -> TreeLayout:
    """A chain per request: the anchor, then its first `depths[i]` draft tokens.

    anchors: int64 `[bs]`; drafts: int64 `[bs, D]`, `D >= max(depths)`
    """
    bs, width, device = anchors.shape[0], max(depths) + 1, anchors.device
    row = torch.arange(width, device=device).expand(bs, width)
    tokens, parents = torch.cat([anchors[:, None], drafts[:, : width - 1]], dim=1), row - 1
    widths = tuple(depth + 1 for depth in depths)
    if min(widths) < width:
        exists = row <= staged(depths, device)[:, None]
        tokens, parents, row = tokens.where(exists, 0), parents.where(exists, ROOT), row.where(exists, 0)
    return TreeLayout(widths, tokens, parents, row, is_chain=True, path_width=width)


def tree_layout(anchors: Tensor, drafts: Tensor, parents: Tensor, keep: Tensor) -> TreeLayout:
    """A tree per request: the anchor, then the proposed nodes that are kept, in their order.

    anchors: int64 `[bs]`; drafts: int64 `[bs, N]`
    parents: int64 `[bs, N]`; `parents[i, n]` is the parent's row (0 = the anchor, `m + 1` = node `m < n`), or
        `NO_NODE`
    keep: bool `[bs, N]`, closed under parents; what is kept where there is no node is ignored
    parents and keep decide the shape, and that is worked out on the host, whatever device the tokens are on: a GPU
    would take a launch for each of these steps and have the host wait for the widths.
    Raises ValueError where a parent does not precede its child, or is not there.
    """
    parents, keep = parents.cpu(), keep.cpu()
    bs, nodes = parents.shape
    order = torch.arange(1, nodes + 1)
    if bool((parents >= order).any()):
        raise ValueError("a draft tree's parents must precede their children")
    keep = torch.cat([torch.ones_like(keep[:, :1]), keep & (parents != NO_NODE)], dim=1)
    if bool((keep[:, 1:] & ~keep.gather(1, parents.clamp(min=0))).any()):
        raise ValueError("a draft tree's node hangs from a node that is absent")
    depth = torch.zeros(bs, nodes + 1, dtype=torch.int64)
    up = torch.nn.functional.pad(parents.clamp(min=0), (1, 0))
    while not torch.equal(depth, deeper := torch.nn.functional.pad(depth.gather(1, up)[:, 1:] + 1, (1, 0))):
        depth = deeper  # one pass a level
    # Dropped nodes leave gaps; a stable sort closes them and the parents are renumbered.
    order = torch.sort(~keep, dim=1, stable=True).indices
    new_row = torch.empty_like(order).scatter_(1, order, torch.arange(nodes + 1).expand_as(order))
    widths = keep.sum(1).tolist()
    width = max(widths)
    order, kept = order[:, :width], keep.gather(1, order)[:, :width]
    all_parents = torch.nn.functional.pad(parents, (1, 0), value=ROOT)
    moved = new_row.gather(1, all_parents.clamp(min=0)).where(all_parents != ROOT, ROOT)
    new_parents, depths = moved.gather(1, order).where(kept, ROOT), depth.gather(1, order).where(kept, 0)
    deepest = int(depths.max())
    rows = torch.stack([new_parents, depths, order.where(kept, 0), kept.long()])
    new_parents, depths, chosen, exists = staged(rows, drafts.device).unbind()
    all_tokens = torch.cat([anchors[:, None], drafts], dim=1)
    return TreeLayout(
        widths=tuple(widths),
        tokens=all_tokens.gather(1, chosen).where(exists.bool(), 0),
        parents=new_parents,
        depths=depths,
        is_chain=False,
        path_width=deepest + 1,
        nodes=chosen,
    )

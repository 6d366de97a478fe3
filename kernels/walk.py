"""Acceptance by walking the tree: follow the child that equals the target's own token. Never draws a random number.

Exact for every tree, however it was chosen. The target's token at a row is fixed before its children are looked at
(argmax at temperature 0, an independent sample otherwise: the *match* method), and it is emitted whether or not a child
equals it; the children only decide whether the row after it has been computed already.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .layout import TreeLayout

NO_ROW = -1


@dataclass(frozen=True)
class Acceptance:
    """What one verify round yields per request.

    path: int64 `[bs, P]`, accepted rows from the anchor down, `NO_ROW` after the end; `P` = greatest depth + 1
    lengths: int64 `[bs]`, rows on the path = tokens emitted (accepted drafts and one token of the target's own)
    bonus: int64 `[bs]`, the target's own token after the last accepted row: the next anchor
    """

    path: Tensor
    lengths: Tensor
    bonus: Tensor

    def emitted(self, layout: TreeLayout) -> Tensor:
        """int64 `[bs, P]`: the tokens to emit, accepted drafts then the bonus; 0 after the end."""
        drafts = layout.tokens.gather(1, self.path.clamp(min=0))
        # The path starts at the anchor, which was emitted in the round before: shift left, bonus in the last place.
        tokens = torch.cat([drafts[:, 1:], torch.zeros_like(self.bonus)[:, None]], dim=1)
        tokens.scatter_(1, self.lengths[:, None] - 1, self.bonus[:, None])
        place = torch.arange(tokens.shape[1], device=tokens.device)
        return tokens.where(place < self.lengths[:, None], 0)


def path_lengths(path: Tensor) -> list[int]:
    """`Acceptance.lengths` out of its path, on the host."""
    lengths: list[int] = (path != NO_ROW).sum(1).tolist()
    return lengths


def walk(layout: TreeLayout, target_tokens: Tensor) -> Acceptance:
    """Follow the target's own tokens down each tree; of two children with the same token, the first.

    target_tokens: int64 `[bs, W]`, the token the target emits after each row; padding is ignored
    """
    if target_tokens.is_cuda:
        from . import walk_triton

        return walk_triton.walk(layout, target_tokens)
    return walk_torch(layout, target_tokens)


def walk_torch(layout: TreeLayout, target_tokens: Tensor) -> Acceptance:
    """The reference: one step down all trees at a time."""
    row = torch.zeros(layout.batch_size, dtype=torch.int64, device=layout.tokens.device)
    alive = torch.ones(layout.batch_size, dtype=torch.bool, device=row.device)
    path = [row]
    for _ in range(layout.path_width - 1):
        wanted = target_tokens.gather(1, row[:, None])
        hit = layout.valid & (layout.parents == row[:, None]) & (layout.tokens == wanted)
        alive = alive & hit.any(1)
        row = torch.where(alive, hit.to(torch.int8).argmax(1), row)
        path.append(row.where(alive, NO_ROW))
    stacked = torch.stack(path, dim=1)
    return Acceptance(
        path=stacked,
        lengths=(stacked != NO_ROW).sum(1),
        bonus=target_tokens.gather(1, row[:, None]).squeeze(1),
    )

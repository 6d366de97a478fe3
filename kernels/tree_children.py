"""Picking the children of a tree's nodes: the likeliest, or drawn at random without replacement.

Chosen, a child's chance of surviving its parent is q itself: on real text it is right to a few percent at every level,
for first children and for their siblings, and no mixture with the confidence head orders nodes better.

Drawn, so that rejection sampling can follow the tree (`tree_rejection.py`):

    x_1 ~ q,   x_i ~ q_i = q without x_1 .. x_{i-1}, normalised

Whether the i-th draw is offered must be settled before it is made. So draws are ranked by what they promise beforehand,
and not by what they bring: the first one the drafter's confidence c, later ones a share of 1 - c and never more than
the draw before,

    gain_1 = c,   gain_i = min(gain_{i-1}, (1 - c) REST / i)

A greedy request in a batch that draws has its children chosen. Never decides which nodes are expanded or verified.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .linear import linear

REST = 0.28
"""Measured: of what one draw leaves to be rejected, the second accepts 0.15, the third 0.08, the fourth 0.06."""
CACHED = 1 << 19
"""Logits worked on at once on a CPU. Beyond what its cache holds a row costs several times as much."""
NOBODY = -1
BLOCK = 128
"""Columns whose maximum is taken first. Selecting costs more than reading, so it is done on maxima."""


@dataclass(frozen=True)
class TreeDraw:
    """How the nodes of a batch's trees are drawn.

    temperature: float32 `[bs]`; greedy: bool `[bs]`, requests whose nodes are chosen; generator: of all randomness
    """

    temperature: Tensor
    greedy: Tensor
    generator: torch.Generator


@dataclass(frozen=True)
class NodeDistributions:
    """What the children of each expanded node were drawn from.

    probs: float32 `[bs, E, Vq]`; all zero for a request whose nodes were chosen; rows that no place names are anything
    vocab: int64 `[Vq]`, token ids of the columns, None for the target's whole vocabulary
    place: int64 `[bs, N + 1]`, each node's row in `probs` (0: the anchor's, m + 1: node m's), -1 for a node that was
        not expanded
    """

    probs: Tensor
    vocab: Tensor | None
    place: Tensor


class KeptDistributions:
    """q of the nodes that may still end up in a tree, in `room` rows a request however many nodes are expanded.

    A node that is not among the best found so far never is again, and its row goes to another. One row more takes in
    every q that is not worth keeping: to skip them the host would have to wait for their number.

    best, in the methods: int64 `[bs, B]`, numbers of the best nodes found so far (0: the anchor, m + 1: node m)
    """

    def __init__(self, room: int) -> None:
        self._room = room
        self._rows: Tensor | None = None

    def keep(self, q: Tensor, number: Tensor, best: Tensor) -> None:
        """q: float32 `[bs, F, Vq]`, what the children of nodes `number` int64 `[bs, F]` were drawn from."""
        bs, _, columns = q.shape
        if self._rows is None:
            self._rows = q.new_empty(bs, self._room + 1, columns)
            self._holder = number.new_full((bs, self._room + 1), NOBODY)
        held = _among(self._holder[:, :-1], best)
        fresh = _among(number, best)
        free = held.to(torch.uint8).sort(dim=1, stable=True).indices
        turn = (fresh.cumsum(1) - 1).clamp(min=0)
        slot = free.gather(1, turn).where(fresh, self._room)
        self._holder.scatter_(1, slot, number.where(fresh, NOBODY))
        start = torch.arange(bs, device=q.device)[:, None] * (self._room + 1)
        self._rows.view(-1, columns).index_copy_(0, (start + slot).flatten(), q.flatten(0, 1))

    def of(self, best: Tensor, vocab: Tensor | None) -> NodeDistributions | None:
        """None where nothing was drawn."""
        if self._rows is None:
            return None
        held = best[:, :, None] == self._holder[:, None]
        return NodeDistributions(self._rows, vocab, held.to(torch.uint8).argmax(2).where(held.any(2), -1))


def _among(numbers: Tensor, best: Tensor) -> Tensor:
    """bool `[bs, n]`."""
    return (numbers[:, :, None] == best[:, None]).any(2)


@dataclass(frozen=True)
class Picked:
    """columns: int64 `[.., B]`; chance: float32 `[.., B]`, falling; q: float32 `[.., Vq]` where they were drawn"""

    columns: Tensor
    chance: Tensor
    q: Tensor | None

    def view(self, bs: int, count: int) -> Picked:
        q = None if self.q is None else self.q.view(bs, count, -1)
        return Picked(self.columns.view(bs, count, -1), self.chance.view(bs, count, -1), q)

    def repeated(self, count: int) -> Picked:
        """`[bs, count, B]` of chosen children `[bs, B]`."""
        columns, chance = (t[:, None].expand(-1, count, -1) for t in (self.columns, self.chance))
        return Picked(columns, chance, None)


@dataclass(frozen=True)
class Scores:
    """The logits of `n` nodes, `base[owner] + latent w2^T`, which need not be written out.

    base: `[bs, Vq]`, rows apart; owner: int64 `[n]`, the request of each node; latent: `[n, r]` and w2: `[Vq, r]`, or
    None where a node's logits are its request's
    """

    base: Tensor
    owner: Tensor
    latent: Tensor | None = None
    w2: Tensor | None = None

    @property
    def columns(self) -> int:
        return self.base.shape[1]

    def rows(self, which: slice) -> Tensor:
        """`[n, Vq]` of these nodes."""
        logits = self.base[self.owner[which]]
        return logits if self.latent is None or self.w2 is None else logits + linear(self.latent[which], self.w2)


@dataclass(frozen=True)
class Candidates:
    """What `n` nodes may have for children.

    columns: int64 `[n, B]`, the likeliest, and chance: float32 `[n, B]`, theirs at temperature 1, falling
    drawn: int64 `[n, B]`, drawn without replacement from q: float32 `[n, Vq]`, which is zero for greedy requests; None
    where nothing is drawn
    """

    columns: Tensor
    chance: Tensor
    drawn: Tensor | None = None
    q: Tensor | None = None


def pick(scores: Scores, branch: int, draw: TreeDraw | None, sure: Tensor | None) -> Picked:
    """At most `branch` children of each node.

    sure: float32 `[n]`, the drafter's confidence where it has one: the likeliest token's chance stands in
    """
    found = candidates(scores, min(branch, scores.columns), draw)
    if draw is None or found.drawn is None:
        return Picked(found.columns, found.chance, None)
    greedy, likeliest = draw.greedy[scores.owner, None], found.chance[:, :1]
    promised = gains(likeliest[:, 0] if sure is None else sure, found.chance.shape[1])
    promised = promised.where(likeliest.isfinite(), torch.nan)  # confidence does not make up for logits of NaN
    return Picked(found.columns.where(greedy, found.drawn), found.chance.where(greedy, promised), found.q)


def candidates(scores: Scores, branch: int, draw: TreeDraw | None) -> Candidates:
    if scores.base.is_cuda:
        from . import tree_children_triton

        return tree_children_triton.candidates(scores, branch, draw)
    return candidates_torch(scores, branch, draw)


def candidates_torch(scores: Scores, branch: int, draw: TreeDraw | None) -> Candidates:
    """The reference; on a CPU for as many nodes at a time as its cache holds the logits of."""
    n = len(scores.owner)
    size = max(1, CACHED // scores.columns) if scores.base.device.type == "cpu" else n
    parts = [_candidates_of(scores, slice(i, i + size), branch, draw) for i in range(0, n, size)]
    if len(parts) == 1:
        return parts[0]
    names = ("columns", "chance") if draw is None else ("columns", "chance", "drawn", "q")
    return Candidates(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


def _candidates_of(scores: Scores, which: slice, branch: int, draw: TreeDraw | None) -> Candidates:
    logits = scores.rows(which)
    chance, columns = leading(torch.softmax(logits, -1, dtype=torch.float32), branch)
    if draw is None:
        return Candidates(columns, chance)
    owner = scores.owner[which]
    q = torch.softmax(logits.float() / draw.temperature[owner, None], -1)
    drawn = draw_distinct(q, branch, draw.generator)
    return Candidates(columns, chance, drawn, q.masked_fill_(draw.greedy[owner, None], 0.0))


def leading(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The greatest `count` of each row and their columns, `[n, count]`: they lie in the `count` blocks of greatest
    maximum, since each other block stands behind that many. values: `[n, V]`, not negative"""
    columns = values.shape[-1]
    if columns <= BLOCK * count:
        return values.topk(count, dim=-1)
    blocks = torch.nn.functional.pad(values, (0, -columns % BLOCK), value=-1.0).unflatten(-1, (-1, BLOCK))
    chosen = blocks.amax(-1).topk(count, dim=-1).indices
    inside = blocks.gather(-2, chosen[..., None].expand(*chosen.shape, BLOCK)).flatten(-2)
    best, place = inside.topk(count, dim=-1)
    return best, chosen.gather(-1, place // BLOCK) * BLOCK + place % BLOCK


def gains(sure: Tensor, count: int) -> Tensor:
    """float32 `[n, count]`: what each of the draws after a node promises. sure: float32 `[n]`, c"""
    place = torch.arange(1, count + 1, device=sure.device)
    rest = (1 - sure)[:, None] * REST / place
    return torch.cat([sure[:, None], rest[:, 1:]], dim=1).cummin(dim=1).values


def draw_distinct(q: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """int64 `[n, count]`: so many different columns of each row of q `[n, V]`, in the order in which they are drawn.

    Inverse transform on one running sum: the i-th point is uniform over what is left, and skips, from left to right,
    the stretches of the columns drawn before it.
    """
    rows = torch.arange(q.shape[0], device=q.device)
    ends = q.cumsum(-1, dtype=torch.float64)
    last = torch.nextafter(ends[:, -1], torch.zeros_like(ends[:, -1]))
    drawn: list[Tensor] = []
    for _ in range(count):
        taken = torch.stack(drawn, 1).sort(dim=1).values if drawn else rows[:, None][:, :0]
        begin, end = ends[rows[:, None], (taken - 1).clamp(min=0)].where(taken > 0, 0.0), ends.gather(1, taken)
        width = end - begin
        coin = torch.rand(len(rows), dtype=torch.float64, generator=generator, device=q.device)
        point = coin * (ends[:, -1] - width.sum(1))
        for start, size in zip(begin.T, width.T, strict=True):
            point = point + size.where(point >= start, 0.0)
        column = torch.searchsorted(ends, torch.minimum(point, last)[:, None], right=True).squeeze(1)
        drawn.append(column.clamp_(max=q.shape[-1] - 1))  # of NaN: some column, of a child that has no chance
    return torch.stack(drawn, dim=1)

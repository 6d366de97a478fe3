"""The twin of `tree_rejection.py`: one program a request walks its tree; p and q are read where they lie, and nothing
of the vocabulary's size is written.

A child costs one pass over p and q, a node one over q, the end two over p and q. Sums are kept in float64, as there.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tree_rejection
from .layout import TreeLayout
from .rejection import Coins
from .rejection_triton import column_of, drawn, left_over, tile, total
from .tree_children import NodeDistributions
from .walk import Acceptance

SPENT = tl.constexpr(tree_rejection.SPENT)


def reject_tree(layout: TreeLayout, target_probs: Tensor, of: NodeDistributions, coins: Coins) -> Acceptance:
    """As `tree_rejection.reject_tree_torch`."""
    assert layout.nodes is not None
    bs, device = layout.batch_size, layout.tokens.device
    path = torch.empty(bs, layout.path_width, dtype=torch.int64, device=device)
    lengths, bonus = path.new_empty(bs), path.new_empty(bs)
    vocabulary = target_probs.shape[1]
    _tree[(bs,)](
        path,
        lengths,
        bonus,
        layout.tokens.contiguous(),
        layout.parents.contiguous(),
        layout.nodes.contiguous(),
        of.place.contiguous(),
        layout.qo_indptr,
        target_probs.contiguous(),
        of.probs.contiguous(),
        column_of(of.vocab, vocabulary),
        coins.tries,
        coins.last,
        layout.max_width,
        layout.path_width,
        of.place.shape[1],
        of.probs.shape[1],
        vocabulary,
        of.probs.shape[2],
        HOT=of.vocab is not None,
        ROWS=triton.next_power_of_2(layout.max_width),
        TILE=tile(vocabulary),
    )
    return Acceptance(path, lengths, bonus)


@triton.jit
def at_token(p, q, column, share, token, columns, HOT: tl.constexpr):
    """float32 each: `left_over` and q at one token, which has a column."""
    one = token + tl.arange(0, 1)
    left = tl.sum(left_over(p, q, column, share, one, columns, HOT), 0)
    at = one
    if HOT:
        at = tl.load(column + one)
    return left, tl.sum(tl.load(q + at), 0)


@triton.jit
def _tree(
    path,
    lengths,
    bonus,
    tokens,
    parents,
    nodes,
    place,
    starts,
    target,
    draft,
    column,
    tries,
    coins,
    width,
    steps,
    places,
    expanded,
    columns,
    draft_columns,
    HOT: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    """path: int64 `[bs, steps]`; lengths, bonus: int64 `[bs]`; tokens, parents, nodes: int64 `[bs, width]`

    starts: int32 `[bs + 1]`; place: int64 `[bs, places]`
    target: float32 `[rows, columns]`; draft: float32 `[bs, expanded, draft_columns]`
    tries: float32 `[bs, width - 1]`; coins: float64 `[bs]`
    """
    request = tl.program_id(0).to(tl.int64)
    first = tl.load(starts + request).to(tl.int64)
    at = tl.arange(0, ROWS).to(tl.int64)
    # Without the anchor, so that the parent -1 is nobody's.
    draft_row = (at > 0) & (at < tl.load(starts + request + 1) - first)
    parent = tl.load(parents + request * width + at, draft_row, -1)
    row = request * 0
    length = request * 0
    alive = row == 0
    scale = tl.sum(tl.zeros([1], tl.float64), 0)  # A
    p = target + first * columns
    q = draft + request * expanded * draft_columns
    for step in range(steps):
        tl.store(path + request * steps + step, tl.where(alive, row, -1))  # walk.NO_ROW
        length += alive.to(tl.int64)
        if alive:
            scale = scale * 0
            node = tl.load(nodes + request * width + row)
            where = tl.maximum(tl.load(place + request * places + node), 0)
            p = target + (first + row) * columns
            q = draft + (request * expanded + where) * draft_columns
            # S: a row's sum is what is left of it when nothing is taken.
            mass_left = total(q, q, None, scale.to(tl.float32), draft_columns, False, TILE)
            deterministic = mass_left == 0
            taken = row * 0 - 1
            child = tl.min(tl.where(parent == row, at, ROWS), 0)
            while (child < ROWS) & (deterministic | (mass_left > SPENT)):
                token = tl.load(tokens + request * width + child)
                rest = total(p, q, column, scale.to(tl.float32), columns, HOT, TILE)  # Z
                kept = scale
                if rest <= 0:  # p == q leaves nothing by rounding alone
                    kept = scale * 0
                    rest = total(p, q, column, kept.to(tl.float32), columns, HOT, TILE)
                left, mine = at_token(p, q, column, kept.to(tl.float32), token, columns, HOT)
                chance = tl.where(deterministic, 1.0, mine.to(tl.float64) / tl.where(deterministic, 1.0, mass_left))
                if tl.load(tries + request * (width - 1) + child - 1) * chance * rest < left:
                    taken = child
                elif not deterministic:
                    scale += rest / mass_left
                    mass_left -= mine.to(tl.float64)
                child = tl.min(tl.where((parent == row) & (at > child) & (taken < 0), at, ROWS), 0)
            alive = taken >= 0
            if alive:
                row = taken
    token = drawn(p, q, column, scale.to(tl.float32), tl.load(coins + request), columns, HOT, TILE)
    tl.store(lengths + request, length)
    tl.store(bonus + request, token.to(tl.int64))

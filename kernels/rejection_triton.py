"""The twins of `rejection.py`: one program a row or request, which goes over the vocabulary in tiles.

What is drawn from is always `max(p - share q, 0)`: share is 0 for p itself and 1 for the residual. It is computed where
it is read and never stored. Sums are kept in float64, as there.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .layout import TreeLayout
from .rejection import Coins, DraftDistribution
from .walk import Acceptance

TILE = 2048
"""Columns of the vocabulary at a time."""


def draw_at(weights: Tensor, coins: Tensor) -> Tensor:
    """As `rejection.draw_at`."""
    rows, columns = weights.shape
    out = torch.empty(rows, dtype=torch.int64, device=weights.device)
    if rows:
        _draw[(rows,)](out, weights.contiguous(), coins, columns, TILE=tile(columns))
    return out


def reject_chain(
    layout: TreeLayout, target_probs: Tensor, draft: DraftDistribution, token_probs: Tensor, coins: Coins
) -> Acceptance:
    """As `rejection.reject_chain_torch`."""
    bs, width, device = layout.batch_size, layout.max_width, layout.tokens.device
    path = torch.empty(bs, width, dtype=torch.int64, device=device)
    lengths, bonus = path.new_empty(bs), path.new_empty(bs)
    vocabulary = target_probs.shape[1]
    _chain[(bs,)](
        path,
        lengths,
        bonus,
        layout.tokens.contiguous(),
        layout.qo_indptr,
        target_probs.contiguous(),
        draft.probs.contiguous(),
        column_of(draft.vocab, vocabulary),
        token_probs.contiguous(),
        coins.tries,
        coins.last,
        width,
        draft.probs.shape[1],
        vocabulary,
        draft.probs.shape[2],
        HOT=draft.vocab is not None,
        ROWS=triton.next_power_of_2(width),
        TILE=tile(vocabulary),
    )
    return Acceptance(path, lengths, bonus)


def tile(columns: int) -> int:
    return min(TILE, triton.next_power_of_2(columns))


def column_of(vocab: Tensor | None, columns: int) -> Tensor | None:
    """int32 `[V]`: each token's column among those of `vocab`, distinct token ids; -1 where it has none."""
    if vocab is None:
        return None
    table = torch.full((columns,), -1, dtype=torch.int32, device=vocab.device)
    return table.scatter_(0, vocab, torch.arange(len(vocab), dtype=torch.int32, device=vocab.device))


@triton.jit
def left_over(p, q, column, share, v, columns, HOT: tl.constexpr):
    """float32 tile `max(p - share q, 0)` at v, 0 beyond the vocabulary.

    p, q: float32, one row each; column: int32 `[V]` of `column_of`, read if HOT; share: float32
    """
    inside = v < columns
    at = v
    drafted = tl.where(inside, share, 0.0) > 0
    if HOT:
        at = tl.load(column + v, drafted, -1)
        drafted = drafted & (at >= 0)
    return tl.maximum(tl.load(p + v, inside, 0.0) - share * tl.load(q + at, drafted, 0.0), 0.0)


@triton.jit
def total(p, q, column, share, columns, HOT: tl.constexpr, TILE: tl.constexpr):
    """float64: the sum of `left_over`."""
    amount = (share * 0).to(tl.float64)
    for start in range(0, columns, TILE):
        w = left_over(p, q, column, share, start + tl.arange(0, TILE), columns, HOT)
        amount += tl.sum(w.to(tl.float64), 0)
    return amount


@triton.jit
def drawn(p, q, column, share, coin, columns, HOT: tl.constexpr, TILE: tl.constexpr):
    """int32: the token for a coin, float64, by weight `left_over`; where all of that is 0, by p."""
    whole = total(p, q, column, share, columns, HOT, TILE)
    if whole <= 0:
        share = share * 0.0
        whole = total(p, q, column, share, columns, HOT, TILE)
    # Never the whole itself, though the product may round to it: 1 - 2^-52.
    point = tl.minimum(coin * whole, whole * 0.9999999999999998)
    start = 0
    before = whole * 0
    v = tl.arange(0, TILE)
    end = tl.sum(left_over(p, q, column, share, v, columns, HOT).to(tl.float64), 0)
    while (end <= point) & (start + TILE < columns):
        start += TILE
        before = end
        end = before + tl.sum(left_over(p, q, column, share, start + v, columns, HOT).to(tl.float64), 0)
    w = left_over(p, q, column, share, start + v, columns, HOT).to(tl.float64)
    # A parallel sum need not rise from term to term: only a token of weight counts, and the last one if none passes.
    passed = (before + tl.cumsum(w, 0) > point) & (w > 0)
    found = tl.min(tl.where(passed, v, TILE), 0)
    last = tl.max(tl.where(w > 0, v, 0), 0)
    return start + tl.where(found < TILE, found, last)


@triton.jit
def _draw(out, weights, coins, columns, TILE: tl.constexpr):
    """out: int64 `[n]`; weights: float32 `[n, V]`; coins: float64 `[n]`"""
    row = tl.program_id(0)
    p = weights + row.to(tl.int64) * columns
    coin = tl.load(coins + row)
    nothing = (coin * 0).to(tl.float32)  # a share of q: the row itself is what is drawn from
    token = drawn(p, p, None, nothing, coin, columns, False, TILE)
    tl.store(out + row, token.to(tl.int64))


@triton.jit
def _chain(
    path,
    lengths,
    bonus,
    tokens,
    starts,
    target,
    draft,
    column,
    token_probs,
    tries,
    coins,
    width,
    depth,
    columns,
    draft_columns,
    HOT: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    """path: int64 `[bs, width]`; lengths, bonus: int64 `[bs]`; tokens: int64 `[bs, width]`; starts: int32 `[bs + 1]`

    target: float32 `[rows, columns]`; draft: float32 `[bs, depth, draft_columns]`; column: int32 `[columns]`
    token_probs: float32 `[bs, depth]`; tries: float32 `[bs, width - 1]`; coins: float64 `[bs]`
    """
    request = tl.program_id(0).to(tl.int64)
    first = tl.load(starts + request)
    offered = tl.load(starts + request + 1) - first - 1
    at = tl.arange(0, ROWS)  # draft `at` stands in row at + 1 and is tried after row at
    tried = at < offered
    token = tl.load(tokens + request * width + at + 1, tried, 0)
    p = tl.load(target + (first + at).to(tl.int64) * columns + token, tried, 0.0)
    q = tl.load(token_probs + request * depth + at, tried, 0.0)
    coin = tl.load(tries + request * (width - 1) + at, tried, 0.0)
    # Not `coin q >= p`, which a q of NaN would not be.
    accepted = tl.min(tl.where(tried & ((coin * q < p) == 0), at, offered), 0)
    sound = tl.sum(tl.where(tried & (at == accepted) & (q < float("inf")), 1, 0), 0) > 0
    rejected = tl.where(sound, 1.0, 0.0)
    after = target + (first + accepted).to(tl.int64) * columns
    before = draft + (request * depth + accepted) * draft_columns  # not there, and not read, where none was rejected
    final = drawn(after, before, column, rejected, tl.load(coins + request), columns, HOT, TILE)
    tl.store(path + request * width + at, tl.where(at <= accepted, at, -1).to(tl.int64), at < width)  # walk.NO_ROW
    tl.store(lengths + request, accepted.to(tl.int64) + 1)
    tl.store(bonus + request, final.to(tl.int64))

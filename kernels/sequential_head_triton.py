"""The twin of `sequential_head.draft_chain`: a step is three launches, and each value of `U_k + B_k` is written once.

    score   a tile of the vocabulary for all requests: W2 is read once a step, its product with each latent is added to
            U_k in float32 and divided by T; the tile's maximum, its place and its sum of exponentials are kept
    choose  one program a request: the argmax, or the tile and then the token that a coin stands for
    spread  scores become q, in place

A batch that is greedy throughout keeps maxima alone: nothing of the vocabulary's size is written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .draft_chain import ChainDraw, DraftChain
from .rejection import toss
from .sequential_head import SequentialHead

TILE = 128
"""Columns of the vocabulary at a time."""
SHARED = 64 << 10
"""Bytes of shared memory for a tile's rows of W2, as 128 rows of 256 bfloat16 take. Some cards have 99 KB in all."""
SPREAD = 2048
"""Columns at a time where nothing is multiplied."""
ROWS = 16
"""Requests at a time, the least that a matrix unit takes."""


def draft_chain(
    head: SequentialHead, base_logits: Tensor, hidden: Tensor, anchors: Tensor, draw: ChainDraw
) -> DraftChain:
    """As `sequential_head.draft_chain`."""
    bs, depth, columns = base_logits.shape
    q = draw.room(bs, depth, columns)
    previous, state = anchors, head.initial_state(bs)
    drawn = []
    for k in range(depth):
        latent, state = head.latent(previous, hidden[:, k], state)
        coins = None if q is None else toss(bs, draw.generator)
        drawn.append(step(base_logits[:, k], latent, head.w2, draw, coins, None if q is None else q[:, k]))
        previous = draw.tokens(drawn[k])
    return draw.chain(torch.stack(drawn, dim=1), q)


def step(base: Tensor, latent: Tensor, w2: Tensor, draw: ChainDraw, coins: Tensor | None, q: Tensor | None) -> Tensor:
    """int64 `[n]`, the column drawn from each row of `softmax((base + latent w2^T) / T)`, which goes into q.

    base: `[n, Vq]`; latent: `[n, r]`; w2: `[Vq, r]`; coins: float64 `[n]` and q: float32 `[n, Vq]`, rows apart, or None
    where all are greedy
    """
    n, columns = base.shape
    rank = w2.shape[1]
    padded = max(16, triton.next_power_of_2(rank))
    tile = tile_of(padded, w2.element_size())
    tiles = triton.cdiv(columns, tile)
    most = torch.empty(n, tiles, dtype=torch.float32, device=base.device)
    where, mass = torch.empty_like(most, dtype=torch.int32), torch.empty_like(most)
    column = torch.empty(n, dtype=torch.int64, device=base.device)
    _score[(tiles,)](
        q,
        most,
        where,
        mass,
        base,
        latent.contiguous(),
        w2.contiguous(),
        draw.temperature,
        n,
        columns,
        rank,
        tiles,
        base.stride(0),
        0 if q is None else q.stride(0),
        DRAWN=q is not None,
        RANK=padded,
        ROWS=ROWS,
        TILE=tile,
    )
    total = None if q is None else torch.empty(n, 2, dtype=torch.float32, device=base.device)
    _choose[(n,)](
        column,
        total,
        q,
        most,
        where,
        mass,
        coins,
        draw.greedy,
        columns,
        tiles,
        0 if q is None else q.stride(0),
        DRAWN=q is not None,
        TILES=triton.next_power_of_2(tiles),
        TILE=tile,
    )
    if q is not None:
        _spread[(n, triton.cdiv(columns, SPREAD))](q, total, columns, q.stride(0), TILE=SPREAD)
    return column


def tile_of(rank: int, itemsize: int) -> int:
    """Columns of a tile whose rows of W2, `rank` values each, fit in shared memory; at least 16, for a matrix unit."""
    tile = TILE
    while tile > 16 and tile * rank * itemsize > SHARED:
        tile //= 2
    return tile


@triton.jit
def _score(
    q,
    most,
    where,
    mass,
    base,
    latent,
    w2,
    temperature,
    n,
    columns,
    rank,
    tiles,
    base_stride,
    q_stride,
    DRAWN: tl.constexpr,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    """q: float32 `[n, columns]`; most, mass: float32 `[n, tiles]`; where: int32 `[n, tiles]`

    base: `[n, columns]`; latent: `[n, rank]`; w2: `[columns, rank]`; temperature: float32 `[n]`
    """
    tile = tl.program_id(0)
    v = tile * TILE + tl.arange(0, TILE)
    r = tl.arange(0, RANK)
    inside = v < columns
    weights = tl.load(w2 + v[None, :].to(tl.int64) * rank + r[:, None], inside[None, :] & (r[:, None] < rank), 0.0)
    for first in range(0, n, ROWS):
        row = first + tl.arange(0, ROWS)
        real = row < n
        mine = tl.load(latent + row[:, None] * rank + r[None, :], real[:, None] & (r[None, :] < rank), 0.0)
        both = real[:, None] & inside[None, :]
        at = row[:, None].to(tl.int64)
        score = tl.dot(mine, weights, input_precision="ieee")
        score += tl.load(base + at * base_stride + v[None, :], both, 0.0).to(tl.float32)
        if DRAWN:
            score = score / tl.load(temperature + row, real, 1.0)[:, None]
            tl.store(q + at * q_stride + v[None, :], score, both)
        score = tl.where(inside[None, :], score, float("-inf"))
        top = tl.max(score, 1)
        hit = tl.min(tl.where(score == top[:, None], v[None, :], columns), 1)
        tl.store(most + row * tiles + tile, top, real)
        tl.store(where + row * tiles + tile, hit, real)
        if DRAWN:
            tl.store(mass + row * tiles + tile, tl.sum(tl.exp(score - top[:, None]), 1), real)


@triton.jit
def _choose(
    column,
    total,
    q,
    most,
    where,
    mass,
    coins,
    greedy,
    columns,
    tiles,
    q_stride,
    DRAWN: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
):
    """column: int64 `[n]`; total: float32 `[n, 2]`, maximum and sum of exponentials

    q, most, where, mass: as `_score` left them; coins: float64 `[n]`; greedy: bool `[n]`
    """
    row = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, TILES)
    known = tile < tiles
    top = tl.load(most + row * tiles + tile, known, float("-inf"))
    highest = tl.max(top, 0)
    best = tl.min(tl.where(top == highest, tl.load(where + row * tiles + tile, known, columns), columns), 0)
    best = tl.minimum(best, columns - 1)  # of NaN nothing is highest
    if DRAWN:
        part = tl.load(mass + row * tiles + tile, known, 0.0).to(tl.float64) * tl.exp((top - highest).to(tl.float64))
        part = tl.where(known, part, 0.0)
        whole = tl.sum(part, 0)
        tl.store(total + row * 2, highest)
        tl.store(total + row * 2 + 1, whole.to(tl.float32))
        # Never the whole itself, though the product may round to it: 1 - 2^-52.
        point = tl.minimum(tl.load(coins + row) * whole, whole * 0.9999999999999998)
        ends = tl.cumsum(part, 0)
        chosen = tl.min(tl.where((ends > point) & (part > 0), tile, TILES), 0)
        chosen = tl.where(chosen < TILES, chosen, tl.max(tl.where(part > 0, tile, 0), 0))
        before = tl.sum(tl.where(tile < chosen, part, 0.0), 0)
        v = chosen * TILE + tl.arange(0, TILE)
        inside = v < columns
        score = tl.load(q + row * q_stride + v, inside, float("-inf"))
        weight = tl.where(inside, tl.exp((score - highest).to(tl.float64)), 0.0)
        passed = (before + tl.cumsum(weight, 0) > point) & (weight > 0)
        found = tl.min(tl.where(passed, v, columns), 0)
        last = tl.max(tl.where(weight > 0, v, 0), 0)
        token = tl.where(found < columns, found, last)
        if not tl.load(greedy + row).to(tl.int1):
            best = token
    tl.store(column + row, best.to(tl.int64))


@triton.jit
def _spread(q, total, columns, q_stride, TILE: tl.constexpr):
    """q: float32 `[n, columns]`, scores that become probabilities; total: float32 `[n, 2]` of `_choose`"""
    row = tl.program_id(0).to(tl.int64)
    v = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = v < columns
    highest, whole = tl.load(total + row * 2), tl.load(total + row * 2 + 1)
    score = tl.load(q + row * q_stride + v, inside, 0.0)
    tl.store(q + row * q_stride + v, tl.exp(score - highest) / whole, inside)

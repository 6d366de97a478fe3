"""The twin of `tree_children.candidates`: of the vocabulary's size it writes q, where anything is drawn, and no more.

score   a tile of the vocabulary for all nodes: W2 is read once, its product with each latent is added to the
        node's base logits in float32; the tile's maximum and sum of exponentials are kept, at temperature 1 and,
        where nodes are drawn, at the request's, whose scores go into q
lead    one program a node: the `branch` greatest columns lie in the `branch` tiles of greatest maximum, since each
        other tile stands behind that many. Those alone are computed again
draw    one program a node: the i-th coin picks a tile and then a column from what the draws before it have left
spread  scores become q, in place (`sequential_head_triton.py`)
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .sequential_head_triton import ROWS, SPREAD, _spread, tile_of
from .tree_children import Candidates, Scores, TreeDraw

TOGETHER = 1 << 13
"""Values of W2 that a program of `lead` multiplies at a time."""


def candidates(scores: Scores, branch: int, draw: TreeDraw | None) -> Candidates:
    """As `tree_children.candidates`."""
    coins = None
    if draw is not None:
        size, device = (len(scores.owner), branch), scores.base.device
        coins = torch.rand(size, dtype=torch.float64, generator=draw.generator, device=device)
    return candidates_at(scores, branch, draw, coins)


def candidates_at(scores: Scores, branch: int, draw: TreeDraw | None, coins: Tensor | None) -> Candidates:
    """The same for given coins, float64 `[n, branch]`; None where nothing is drawn."""
    base, owner = scores.base, scores.owner
    n, columns = len(owner), scores.columns
    latent = None if scores.latent is None else scores.latent.contiguous()
    w2 = None if scores.w2 is None else scores.w2.contiguous()
    rank = 1 if w2 is None else w2.shape[1]
    padded = max(16, triton.next_power_of_2(rank))
    tile = tile_of(padded, base.element_size() if w2 is None else w2.element_size())
    tiles, places = triton.cdiv(columns, tile), triton.next_power_of_2(branch)
    most = torch.empty(n, tiles, dtype=torch.float32, device=base.device)
    mass = torch.empty_like(most)
    warm = None if draw is None else torch.empty_like(most)
    q = None if draw is None else base.new_empty(n, columns, dtype=torch.float32)
    temperature = None if draw is None else draw.temperature
    _score[(tiles,)](
        q,
        most,
        mass,
        warm,
        base,
        owner,
        latent,
        w2,
        temperature,
        n,
        columns,
        rank,
        tiles,
        base.stride(0),
        DRAWN=draw is not None,
        HEAD=w2 is not None,
        RANK=padded,
        ROWS=ROWS,
        TILE=tile,
    )
    likeliest = torch.empty(n, branch, dtype=torch.int64, device=base.device)
    chance = torch.empty(n, branch, dtype=torch.float32, device=base.device)
    _lead[(n,)](
        likeliest,
        chance,
        most,
        mass,
        base,
        owner,
        latent,
        w2,
        columns,
        rank,
        tiles,
        base.stride(0),
        HEAD=w2 is not None,
        BRANCH=branch,
        PLACES=places,
        RANK=padded,
        AT_ONCE=min(padded, max(1, TOGETHER // (places * tile))),
        TILES=triton.next_power_of_2(tiles),
        TILE=tile,
    )
    if draw is None or q is None:
        return Candidates(likeliest, chance)
    drawn, total = torch.empty_like(likeliest), torch.empty(n, 2, dtype=torch.float32, device=base.device)
    _draw[(n,)](
        drawn,
        total,
        q,
        most,
        warm,
        owner,
        temperature,
        draw.greedy,
        coins,
        columns,
        tiles,
        BRANCH=branch,
        PLACES=places,
        TILES=triton.next_power_of_2(tiles),
        TILE=tile,
    )
    _spread[(n, triton.cdiv(columns, SPREAD))](q, total, columns, columns, TILE=SPREAD)
    return Candidates(likeliest, chance, drawn, q)


@triton.jit
def _score(
    q,
    most,
    mass,
    warm,
    base,
    owner,
    latent,
    w2,
    temperature,
    n,
    columns,
    rank,
    tiles,
    base_stride,
    DRAWN: tl.constexpr,
    HEAD: tl.constexpr,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    """q: float32 `[n, columns]`, logits over temperature; most, mass, warm: float32 `[n, tiles]`

    base: `[bs, columns]`; owner: int64 `[n]`; latent: `[n, rank]`; w2: `[columns, rank]`; temperature: float32 `[bs]`
    """
    tile = tl.program_id(0)
    v = tile * TILE + tl.arange(0, TILE)
    inside = v < columns
    if HEAD:
        r = tl.arange(0, RANK)
        weights = tl.load(w2 + v[None, :].to(tl.int64) * rank + r[:, None], inside[None, :] & (r[:, None] < rank), 0.0)
    for first in range(0, n, ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)
        real = row < n
        both = real[:, None] & inside[None, :]
        request = tl.load(owner + row, real, 0)
        score = tl.load(base + request[:, None] * base_stride + v[None, :], both, 0.0).to(tl.float32)
        if HEAD:
            mine = tl.load(latent + row[:, None] * rank + r[None, :], real[:, None] & (r[None, :] < rank), 0.0)
            score += tl.dot(mine, weights, input_precision="ieee")
        known = tl.where(inside[None, :], score, float("-inf"))
        top = tl.max(known, 1)
        above = tl.where(top == float("-inf"), 0.0, top)  # a tile without a chance has no mass
        at = row * tiles + tile
        tl.store(most + at, top, real)
        tl.store(mass + at, tl.sum(tl.exp(known - above[:, None]), 1), real)
        if DRAWN:
            heat = tl.load(temperature + request, real, 1.0)
            tl.store(q + row[:, None] * columns + v[None, :], score / heat[:, None], both)
            tl.store(warm + at, tl.sum(tl.exp(known / heat[:, None] - (above / heat)[:, None]), 1), real)


@triton.jit
def _lead(
    likeliest,
    chance,
    most,
    mass,
    base,
    owner,
    latent,
    w2,
    columns,
    rank,
    tiles,
    base_stride,
    HEAD: tl.constexpr,
    BRANCH: tl.constexpr,
    PLACES: tl.constexpr,
    RANK: tl.constexpr,
    AT_ONCE: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
):
    """likeliest: int64 `[n, BRANCH]`; chance: float32 `[n, BRANCH]`; the rest as `_score` read and left it"""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, TILES)
    free = tile < tiles
    top = tl.load(most + row * tiles + tile, free, float("-inf"))
    highest = tl.max(top, 0)
    total = tl.sum(tl.where(free, tl.load(mass + row * tiles + tile, free, 0.0) * tl.exp(top - highest), 0.0), 0)
    place = tl.arange(0, PLACES)
    begin = tl.zeros([PLACES], dtype=tl.int32)
    for b in tl.static_range(BRANCH):
        best = tl.max(tl.where(free, top, float("-inf")), 0)
        hit = tl.min(tl.where(free & (top == best), tile, TILES), 0)
        begin = tl.where(place == b, hit * TILE, begin)
        free &= tile != hit
    v = begin[:, None] + tl.arange(0, TILE)[None, :]
    offered = (place < BRANCH)[:, None] & (v < columns)
    score = tl.load(base + tl.load(owner + row) * base_stride + v, offered, 0.0).to(tl.float32)
    if HEAD:
        for start in range(0, RANK, AT_ONCE):
            r = start + tl.arange(0, AT_ONCE)
            mine = tl.load(latent + row * rank + r, r < rank, 0.0).to(tl.float32)
            at = v[:, :, None].to(tl.int64) * rank + r[None, None, :]
            weights = tl.load(w2 + at, offered[:, :, None] & (r < rank)[None, None, :], 0.0).to(tl.float32)
            score += tl.sum(weights * mine[None, None, :], 2)
    for b in tl.static_range(BRANCH):
        best = tl.max(tl.max(tl.where(offered, score, float("-inf")), 1), 0)
        hit = tl.min(tl.min(tl.where(offered & (score == best), v, columns), 1), 0)
        tl.store(likeliest + row * BRANCH + b, tl.minimum(hit, columns - 1).to(tl.int64))  # of NaN nothing is highest
        tl.store(chance + row * BRANCH + b, tl.exp(best - highest) / total)
        offered &= v != hit


@triton.jit
def _draw(
    drawn,
    total,
    q,
    most,
    warm,
    owner,
    temperature,
    greedy,
    coins,
    columns,
    tiles,
    BRANCH: tl.constexpr,
    PLACES: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
):
    """drawn: int64 `[n, BRANCH]`; total: float32 `[n, 2]`, maximum and sum of exponentials, of greedy requests such
    that all of q comes to zero

    q, most, warm: as `_score` left them; coins: float64 `[n, BRANCH]`; greedy: bool `[bs]`
    """
    row = tl.program_id(0).to(tl.int64)
    request = tl.load(owner + row)
    tile = tl.arange(0, TILES)
    known = tile < tiles
    top = tl.load(most + row * tiles + tile, known, float("-inf")) / tl.load(temperature + request)
    highest = tl.max(top, 0)
    part = tl.load(warm + row * tiles + tile, known, 0.0).to(tl.float64) * tl.exp((top - highest).to(tl.float64))
    part = tl.where(known, part, 0.0)
    chosen_only = tl.load(greedy + request).to(tl.int1)
    tl.store(total + row * 2, tl.where(chosen_only, float("inf"), highest))
    tl.store(total + row * 2 + 1, tl.where(chosen_only, 1.0, tl.sum(part, 0).to(tl.float32)))
    place = tl.arange(0, PLACES)
    taken = tl.full([PLACES], -1, dtype=tl.int32)
    for b in tl.static_range(BRANCH):
        left = tl.sum(part, 0)
        # Never the whole itself, though the product may round to it: 1 - 2^-52.
        point = tl.minimum(tl.load(coins + row * BRANCH + b) * left, left * 0.9999999999999998)
        ends = tl.cumsum(part, 0)
        chosen = tl.min(tl.where((ends > point) & (part > 0), tile, TILES), 0)
        chosen = tl.where(chosen < TILES, chosen, tl.max(tl.where(part > 0, tile, 0), 0))
        before = tl.sum(tl.where(tile < chosen, part, 0.0), 0)
        v = chosen * TILE + tl.arange(0, TILE)
        score = tl.load(q + row * columns + v, v < columns, float("-inf"))
        gone = tl.max((v[:, None] == taken[None, :]).to(tl.int32), 1) > 0
        weight = tl.where((v < columns) & ~gone, tl.exp((score - highest).to(tl.float64)), 0.0)
        found = tl.min(tl.where((before + tl.cumsum(weight, 0) > point) & (weight > 0), v, columns), 0)
        hit = tl.where(found < columns, found, tl.max(tl.where(weight > 0, v, -1), 0))
        # Nothing has any weight left: some column that has not been drawn.
        spare = tl.max((place[:, None] == taken[None, :]).to(tl.int32), 1) == 0
        hit = tl.where(hit >= 0, hit, tl.min(tl.where(spare, place, PLACES), 0))
        tl.store(drawn + row * BRANCH + b, hit.to(tl.int64))
        taken = tl.where(place == b, hit, taken)
        part = tl.where(tile == chosen, tl.sum(tl.where(v == hit, 0.0, weight), 0), part)

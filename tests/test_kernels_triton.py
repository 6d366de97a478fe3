"""Triton twins against the torch references, for the same randomness: the same rows, tokens and bits.

Without a GPU they run in Triton's interpreter, with one they are compiled; the tests are the same.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from triton_interpreter import DEVICE, interpreted

from dspark_sgl.kernels.draft_chain import ChainDraw
from dspark_sgl.kernels.layout import ROOT, TreeLayout, chain_layout, tree_layout
from dspark_sgl.kernels.mask import flat_mask_torch, packed_mask_torch
from dspark_sgl.kernels.rejection import Coins, DraftDistribution, draw_at_torch, reject_chain_torch, toss
from dspark_sgl.kernels.sequential_head import Linear, SequentialHead
from dspark_sgl.kernels.tree_children import Candidates, NodeDistributions, Scores, TreeDraw
from dspark_sgl.kernels.tree_draft import IndependentChildren, TreeShape, grow_tree
from dspark_sgl.kernels.tree_rejection import reject_tree_torch
from dspark_sgl.kernels.walk import Acceptance, walk_torch

pytest.importorskip("triton")
with interpreted():
    from dspark_sgl.kernels import (
        mask_triton,
        rejection_triton,
        sequential_head_triton,
        tree_children_triton,
        tree_rejection_triton,
        walk_triton,
    )

SEEDS = range(200)
SMALLEST = 1 if DEVICE == "cpu" else 2
"""Tokens of a vocabulary. For one of a single token Triton 3.6 does not compile, and nobody has one."""


def generator(seed: int) -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(seed)


def batch(seed: int) -> int:
    """Requests: few in most cases, since each is a program and programs are interpreted one by one."""
    return {0: 1, 50: 48, 100: 96}.get(seed, 1 + seed % 5)


def integers(low: int, high: int, shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    return torch.randint(low, high, shape, generator=g, device=DEVICE)


def random_tree(seed: int, vocabulary: int = 3) -> TreeLayout:
    """Ragged trees, the anchor alone among them; siblings may carry the same token."""
    g, bs, nodes = generator(seed), batch(seed), 1 + seed % 19
    parents = torch.stack([integers(0, n + 1, (bs,), g) for n in range(nodes)], dim=1)
    drafts, count = integers(0, vocabulary, (bs, nodes), g), integers(0, nodes + 1, (bs, 1), g)
    parents = parents.where(torch.arange(nodes, device=DEVICE) < count, ROOT)
    return tree_layout(parents.new_zeros(bs), drafts, parents, torch.ones_like(parents, dtype=torch.bool))


def random_chain(seed: int, vocabulary: int) -> TreeLayout:
    g, bs, depth = generator(seed), batch(seed), seed % 9
    drafts = integers(0, vocabulary, (bs, max(depth, 1)), g)
    return chain_layout(drafts[:, 0], drafts, integers(0, depth + 1, (bs,), g).tolist())


def same(got: Acceptance, wanted: Acceptance) -> None:
    assert torch.equal(got.path, wanted.path)
    assert torch.equal(got.lengths, wanted.lengths)
    assert torch.equal(got.bonus, wanted.bonus)


@pytest.mark.parametrize("seed", SEEDS)
def test_walk(seed: int) -> None:
    layout = random_tree(seed) if seed % 3 else random_chain(seed, 2)
    target = integers(0, 3, tuple(layout.tokens.shape), generator(seed + 1))
    same(walk_triton.walk(layout, target), walk_torch(layout, target))


def known(prefix: Tensor) -> dict[str, int]:
    """What a host knows of the prefixes."""
    return {"total": int(prefix.sum()), "longest": int(prefix.max())}


@pytest.mark.parametrize("seed", SEEDS)
def test_masks(seed: int) -> None:
    layout = random_tree(seed) if seed % 4 else random_chain(seed, 3)
    longest = 1 + [0, 7, 40, 3000][seed % 4] if layout.batch_size < 10 else 20
    prefix = integers(0, longest, (layout.batch_size,), generator(seed)).to([torch.int32, torch.int64][seed % 2])
    flat, wanted_flat = mask_triton.flat_mask(layout, prefix, **known(prefix)), flat_mask_torch(layout, prefix)
    assert torch.equal(flat[: len(wanted_flat)], wanted_flat)
    wanted = packed_mask_torch(layout, prefix)
    packed = replace(wanted, bits=torch.zeros_like(wanted.bits))
    mask_triton.fill_packed_mask(packed, layout, prefix, longest=int(prefix.max()))
    assert torch.equal(packed.bits, wanted.bits)
    entry = 0
    for i, width in enumerate(layout.widths):
        size = width * (int(prefix[i]) + width)
        bits = packed.bits[packed.starts[i] : packed.starts[i + 1]].cpu().numpy()
        assert np.array_equal(np.packbits(flat[entry : entry + size].cpu().numpy(), bitorder="little"), bits)
        entry += size


def weights(rows: int, columns: int, g: torch.Generator) -> Tensor:
    """Some rows flat, some sharp, some with tokens of weight 0, at either end too."""
    scores = torch.randn(rows, columns, generator=g, device=DEVICE)
    scores *= torch.tensor([0.1, 1.0, 6.0], device=DEVICE)[torch.arange(rows, device=DEVICE) % 3, None]
    gone = torch.rand(rows, columns, generator=g, device=DEVICE) < 0.3
    gone.scatter_(1, integers(0, columns, (rows, 1), g), False)
    return torch.softmax(scores.masked_fill(gone, -torch.inf), -1)


def between(w: Tensor, token: Tensor, coins: Tensor, slack: float) -> None:
    """The token's stretch of the sum, in float64, holds the point; and it has weight."""
    ends = w.double().cumsum(1)
    point, here = coins * ends[:, -1], token[:, None]
    own = w.double().gather(1, here)[:, 0]
    end = ends.gather(1, here)[:, 0]
    assert (own > 0).all()
    assert (point < end + slack).all() and (point >= end - own - slack).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_draws(seed: int) -> None:
    g, columns = generator(seed), [SMALLEST, 2, 17, 129, 1000, 2048, 2049, 5003][seed % 8]
    w = weights(batch(seed), columns, g) * (1 + seed % 3)
    coins = torch.rand(len(w), generator=g, dtype=torch.float64, device=DEVICE)
    coins[0] = [0.0, 1 - 2**-53, 0.5][seed % 3]
    got = rejection_triton.draw_at(w, coins)
    assert torch.equal(got, draw_at_torch(w, coins))
    between(w, got, coins, 1e-12)


@pytest.mark.parametrize("columns", [32_000, 128_256, 151_936, 262_144])
def test_draws_over_real_vocabularies(columns: int) -> None:
    w, coins = weights(2, columns, generator(columns)), torch.tensor([0.93, 0.41], dtype=torch.float64, device=DEVICE)
    got = rejection_triton.draw_at(w, coins)
    assert torch.equal(got, draw_at_torch(w, coins))
    between(w, got, coins, 1e-12)


def chain_case(seed: int, columns: int) -> tuple[TreeLayout, Tensor, DraftDistribution, Tensor, Coins]:
    """Chains drawn from q over all or some of the vocabulary; p may equal q, and some requests are greedy."""
    g = generator(seed)
    layout = random_chain(seed, columns)
    bs, width = layout.tokens.shape
    depth = max(width - 1, 1) + seed % 2
    hot = None if seed % 3 == 0 else torch.randperm(columns, generator=g, device=DEVICE)[: (columns + 1) // 2]
    q = weights(bs * depth, columns if hot is None else len(hot), g).view(bs, depth, -1)
    drawn = torch.multinomial(q.flatten(0, 1), 1, generator=g).view(bs, depth)
    token_probs = q.gather(2, drawn[..., None])[..., 0]
    tokens = drawn if hot is None else hot[drawn]
    layout = chain_layout(layout.tokens[:, 0], tokens, [n - 1 for n in layout.widths])
    p = weights(len(layout.owner), columns, g)
    if hot is None and seed % 2 and width > 1:
        padded = layout.pad(p)
        padded[:, : width - 1] = 0.5 * padded[:, : width - 1] + 0.5 * q[:, : width - 1]
        p = layout.pack(padded)
    greedy = torch.rand(bs, generator=g, device=DEVICE) < 0.2
    q[greedy], token_probs[greedy] = 0.0, 1.0
    certain = torch.nn.functional.one_hot(p.argmax(-1), columns).to(p.dtype)
    p = torch.where(greedy[layout.owner][:, None], certain, p)
    coins = Coins.toss(layout, g)
    coins.tries[torch.rand(coins.tries.shape, generator=g, device=DEVICE) < 0.2] = 0.0  # rejects where p is 0 only
    return layout, p, DraftDistribution(q, hot), token_probs, coins


def check_chain(seed: int, columns: int) -> None:
    layout, p, draft, token_probs, coins = chain_case(seed, columns)
    got = rejection_triton.reject_chain(layout, p, draft, token_probs, coins)
    same(got, reject_chain_torch(layout, p, draft, token_probs, coins))
    # The last draw, in float64: from what is left of p where a draft was turned down.
    place = torch.arange(layout.batch_size, device=DEVICE)
    accepted = got.lengths - 1
    rejected = got.lengths < torch.tensor(layout.widths, device=DEVICE)
    q = torch.zeros(len(place), columns, dtype=torch.float64, device=DEVICE)
    taken = draft.probs[place, accepted.clamp(max=draft.probs.shape[1] - 1)].double() * rejected[:, None]
    q.index_copy_(1, torch.arange(columns, device=DEVICE) if draft.vocab is None else draft.vocab, taken)
    left = (p[layout.qo_indptr[:-1].long() + accepted].double() - q).clamp(min=0)
    between(left, got.bonus, coins.last, 1e-6)


@pytest.mark.parametrize("seed", SEEDS)
def test_chain_rejection(seed: int) -> None:
    check_chain(seed, [SMALLEST, 3, 18, 131, 700, 2500][seed % 6])


@pytest.mark.parametrize("columns", [32_000, 151_936])
def test_chain_rejection_over_real_vocabularies(columns: int) -> None:
    check_chain(2, columns)


def test_an_empty_residual_is_drawn_from_the_target() -> None:
    """p == q to the bit, and a coin that rejects all the same: q of the token is overstated."""
    p = torch.tensor([[0.25, 0.0, 0.75]], device=DEVICE).expand(2, 3).contiguous()
    layout = chain_layout(p.new_zeros(1).long(), p.new_full((1, 1), 2).long(), [1])
    draft = DraftDistribution(p[None, :1].contiguous(), None)
    coins = Coins(p.new_full((1, 1), 0.9), p.new_full((1,), 0.6, dtype=torch.float64))
    of = p.new_ones(1, 1)
    got = rejection_triton.reject_chain(layout, p, draft, of, coins)
    same(got, reject_chain_torch(layout, p, draft, of, coins))
    assert got.lengths.tolist() == [1] and got.bonus.tolist() == [2]


def tree_case(seed: int, columns: int) -> tuple[TreeLayout, Tensor, NodeDistributions, Coins]:
    """Trees drawn without replacement, cut behind a random node; some requests greedy, some p close to q, some q that
    have spent all their mass before the last child."""
    g, bs, levels = generator(seed), batch(seed), 1 + seed % 3
    hot = None if seed % 3 == 0 else torch.randperm(columns, generator=g, device=DEVICE)[: (columns + 1) // 2]
    scores = torch.randn(bs, levels, columns if hot is None else len(hot), generator=g, device=DEVICE)
    scores *= [0.1, 1.0, 6.0, 60.0][seed % 4]
    greedy = torch.rand(bs, generator=g, device=DEVICE) < 0.2
    draw = TreeDraw(torch.ones(bs, device=DEVICE), greedy, g)
    anchors, depths = integers(0, columns, (bs,), g), torch.full((bs,), levels, device=DEVICE)
    tree = grow_tree(IndependentChildren(scores, hot), anchors, depths, TreeShape(1 + seed % 13, 1 + seed % 4), draw)
    assert tree.drawn is not None
    number = torch.arange(tree.tokens.shape[1], device=DEVICE)
    kept = (tree.parents >= 0) & (number < integers(0, len(number) + 1, (bs, 1), g))
    layout = tree_layout(anchors, tree.tokens, tree.parents, kept)
    p = weights(len(layout.owner), columns, g)
    if hot is None and seed % 2:
        near = torch.softmax(scores, -1)[layout.owner, layout.pack(layout.depths).clamp(max=levels - 1)]
        p = 0.3 * p + 0.7 * near
    certain = torch.nn.functional.one_hot(p.argmax(-1), columns).to(p.dtype)
    p = torch.where(greedy[layout.owner][:, None], certain, p)
    coins = Coins.toss(layout, g)
    coins.tries[torch.rand(coins.tries.shape, generator=g, device=DEVICE) < 0.2] = 0.0  # rejects where p is 0 only
    coins.tries[torch.rand(coins.tries.shape, generator=g, device=DEVICE) < 0.3] = 1.0  # most likely rejects
    return layout, p, tree.drawn, coins


@pytest.mark.parametrize("seed", SEEDS)
def test_tree_rejection(seed: int) -> None:
    layout, p, drawn, coins = tree_case(seed, [SMALLEST, 3, 18, 131, 700, 2500][seed % 6])
    got = tree_rejection_triton.reject_tree(layout, p, drawn, coins)
    same(got, reject_tree_torch(layout, p, drawn, coins))


@pytest.mark.parametrize("columns", [32_000, 151_936])
def test_tree_rejection_over_real_vocabularies(columns: int) -> None:
    layout, p, drawn, coins = tree_case(4, columns)
    got = tree_rejection_triton.reject_tree(layout, p, drawn, coins)
    same(got, reject_tree_torch(layout, p, drawn, coins))


def test_a_draft_that_has_spent_its_mass() -> None:
    """One token has all of q but 4e-18: the second child and those after it are not tried, and take nothing from p."""
    bs, columns = 40, 1000
    draft, target = torch.zeros(2, columns, device=DEVICE)
    draft[[0, 1, 2, 700]] = torch.tensor([9.0, 7.0, 6.6, 6.5], device=DEVICE)
    target[[700, 9, 0]] = torch.tensor([9.0, 8.9, 8.5], device=DEVICE)
    cold, nobody = torch.full((bs,), 0.05, device=DEVICE), torch.zeros(bs, dtype=torch.bool, device=DEVICE)
    anchors, g = torch.zeros(bs, dtype=torch.int64, device=DEVICE), generator(0)
    children = IndependentChildren(draft.expand(bs, 1, -1), None)
    tree = grow_tree(children, anchors, anchors + 1, TreeShape(4, 4), TreeDraw(cold, nobody, g))
    assert tree.drawn is not None
    layout = tree_layout(anchors, tree.tokens, tree.parents, tree.parents >= 0)
    p = torch.softmax(target / 0.05, -1).expand(len(layout.owner), -1)
    coins = Coins.toss(layout, g)
    got = tree_rejection_triton.reject_tree(layout, p, tree.drawn, coins)
    same(got, reject_tree_torch(layout, p, tree.drawn, coins))
    assert set(got.bonus.tolist()) == {700, 9}


def head_case(seed: int, columns: int) -> tuple[SequentialHead, Tensor, Tensor, Tensor, ChainDraw]:
    """Heads of all three kinds, whole and hot vocabularies, batches greedy throughout, in part and not at all."""
    g, bs, depth = generator(seed), min(batch(seed), 70), 1 + seed % 4
    rank, size = [1, 4, 17, 32, 64, 256][seed // 5 % 6], 6  # 256 of float32: half a tile
    hot = None if seed % 2 else torch.randperm(columns, generator=g, device=DEVICE)[: (columns + 1) // 2]

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device=DEVICE)

    w2 = random(columns if hot is None else len(hot), rank)
    gate = Linear(random(rank, size + rank), random(rank)) if seed % 3 == 1 else None
    joint = Linear(random(3 * rank, 2 * rank + size), random(3 * rank)) if seed % 3 == 2 else None
    head = SequentialHead(random(columns, rank), w2, gate, joint)
    greedy = torch.rand(bs, generator=g, device=DEVICE) < [0.3, 1.1, -1.0][seed % 7 % 3]
    warmth = None if greedy.all() else 0.3 + torch.rand(bs, generator=g, device=DEVICE)
    base = random(bs, depth, len(w2)) * [0.1, 1.0, 5.0][seed % 3]
    draw = ChainDraw(hot, warmth, greedy, generator(seed + 1))
    return head, base, random(bs, depth, size), integers(0, columns, (bs,), g), draw


def check_head(seed: int, columns: int) -> None:
    """Each step from the tokens that the twin itself drew before it, in float64."""
    head, base, hidden, anchors, draw = head_case(seed, columns)
    got = sequential_head_triton.draft_chain(head, base, hidden, anchors, draw)
    coins, bs = generator(seed + 1), len(anchors)
    previous, state = anchors, head.initial_state(bs)
    for k in range(base.shape[1]):
        latent, state = head.latent(previous, hidden[:, k], state)
        scores = base[:, k].double() + latent.double() @ head.w2.double().T
        previous = got.tokens[:, k]
        column = previous if draw.vocab is None else (draw.vocab == previous[:, None]).int().argmax(1)
        own = scores.gather(1, column[:, None])[:, 0]
        assert (own[draw.greedy] >= scores.amax(1)[draw.greedy] - 1e-4).all()
        if draw.temperature is None:
            continue
        q = torch.softmax(scores / draw.temperature[:, None].double(), -1)
        assert got.distribution is not None and got.token_probs is not None
        drawn = ~draw.greedy
        torch.testing.assert_close(got.distribution.probs[drawn, k].double(), q[drawn], rtol=1e-3, atol=1e-6)
        assert not got.distribution.probs[draw.greedy, k].any()
        torch.testing.assert_close(
            got.token_probs[drawn, k], got.distribution.of(column[:, None].expand(bs, k + 1))[drawn, k]
        )
        between(q[drawn], column[drawn], toss(bs, coins)[drawn], 1e-4)


@pytest.mark.parametrize("seed", SEEDS)
def test_sequential_head(seed: int) -> None:
    check_head(seed, [2, 17, 127, 128, 129, 300, 1000][seed % 7])


def test_a_tile_fits_the_shared_memory_of_small_cards() -> None:
    sizes = [(16, 2), (256, 2), (256, 4), (512, 2), (1024, 4), (2048, 4)]
    assert [sequential_head_triton.tile_of(*size) for size in sizes] == [128, 128, 64, 64, 16, 16]


@pytest.mark.parametrize("columns", [32_000, 151_936])
def test_sequential_head_over_real_vocabularies(columns: int) -> None:
    check_head(20, columns)


def children_case(seed: int, columns: int) -> tuple[Scores, int, TreeDraw | None]:
    """Nodes of several requests, with a head and without; base logits a level of several; drawn, chosen and mixed."""
    g, bs = generator(seed), min(batch(seed), 20) if seed % 50 == 0 else 1 + seed % 3
    rank = [1, 4, 17, 32, 64, 256][seed // 5 % 6]

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device=DEVICE)

    owner = torch.arange(bs, device=DEVICE).repeat_interleave(1 + seed % 3)
    base = (random(bs, 2, columns) * [0.1, 1.0, 5.0][seed % 3])[:, seed % 2]
    head = (None, None) if seed % 4 == 0 else (random(len(owner), rank) / rank**0.5, random(columns, rank))
    warmth, greedy = 0.3 + torch.rand(bs, generator=g, device=DEVICE), torch.rand(bs, generator=g, device=DEVICE) < 0.3
    draw = None if seed % 5 == 0 else TreeDraw(warmth, greedy, generator(seed + 1))
    return Scores(base, owner, *head), min(columns, [1, 2, 3, 4, 2, 4, 5, 4, 1, 8, 3, 16][seed // 3 % 12]), draw


def check_children(scores: Scores, branch: int, draw: TreeDraw | None, coins: Tensor | None) -> Candidates:
    """Against all logits written out, in float64."""
    got = tree_children_triton.candidates_at(scores, branch, draw, coins)
    logits = scores.base.double()[scores.owner]
    if scores.latent is not None and scores.w2 is not None:
        logits = logits + scores.latent.double() @ scores.w2.double().T
    best, of = logits.topk(branch, dim=-1).values, got.columns
    torch.testing.assert_close(logits.gather(1, of), best, rtol=0, atol=1e-4)
    torch.testing.assert_close(got.chance.double(), logits.softmax(-1).gather(1, of), rtol=1e-3, atol=1e-9)
    assert (of.sort(1).values.diff() > 0).all() and (got.chance.diff() <= 0).all()
    if draw is None:
        assert got.drawn is None and got.q is None
        return got
    assert got.drawn is not None and got.q is not None and coins is not None
    greedy, warmth = draw.greedy[scores.owner], draw.temperature[scores.owner, None].double()
    q = torch.softmax(logits / warmth, -1)
    assert not got.q[greedy].any()
    torch.testing.assert_close(got.q[~greedy].double(), q[~greedy], rtol=1e-3, atol=1e-6)
    assert (got.drawn.sort(1).values.diff() > 0).all() and (got.drawn >= 0).all() and (got.drawn < q.shape[1]).all()
    for place in range(branch):
        if q.sum(1).min() > 1e-3:  # less is a matter of rounding
            between(q / q.sum(1, keepdim=True), got.drawn[:, place], coins[:, place], 1e-4)
        q = q.scatter(1, got.drawn[:, place, None], 0.0)
    return got


@pytest.mark.parametrize("seed", SEEDS)
def test_children(seed: int) -> None:
    scores, branch, draw = children_case(seed, [2, 17, 127, 128, 129, 300, 1000][seed % 7])
    size = (len(scores.owner), branch)
    coins = torch.rand(size, generator=generator(seed), dtype=torch.float64, device=DEVICE)
    coins[0] = [0.0, 1 - 2**-53, 0.5][seed % 3]
    check_children(scores, branch, draw, None if draw is None else coins)


@pytest.mark.parametrize("columns", [32_000, 151_936])
def test_children_over_real_vocabularies(columns: int) -> None:
    scores, _, draw = children_case(13, columns)
    coins = torch.rand(len(scores.owner), 4, generator=generator(0), dtype=torch.float64, device=DEVICE)
    check_children(scores, 4, draw, coins)


def test_children_that_nothing_is_left_for() -> None:
    """One token has all there is of q: those drawn after it are others, and of NaN there are columns all the same."""
    base = torch.full((2, 300), -1e4, device=DEVICE)
    base[0, 200], base[1, 7] = 1e4, torch.nan
    draw = TreeDraw(torch.ones(2, device=DEVICE), torch.zeros(2, dtype=torch.bool, device=DEVICE), generator(0))
    got = tree_children_triton.candidates(Scores(base, torch.arange(2, device=DEVICE)), 3, draw)
    assert got.drawn is not None
    assert got.drawn[0].tolist()[0] == 200 and len(set(got.drawn[0].tolist())) == 3
    assert got.chance[0].tolist() == [1, 0, 0] and got.chance[1].isnan().all()
    columns = torch.cat([got.drawn, got.columns])
    assert ((columns >= 0) & (columns < 300)).all()


def test_every_kernel_compiles_for_gpus() -> None:
    """No GPU is needed to compile: types and layouts that the interpreter does not look at are checked here."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "tests.compile_kernels"]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]

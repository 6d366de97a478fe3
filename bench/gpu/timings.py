"""Each Triton twin against its torch reference and against the time that its bytes take at the speed of a copy."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dspark_sgl.kernels.draft_chain import ChainDraw
from dspark_sgl.kernels.layout import chain_layout, tree_layout
from dspark_sgl.kernels.mask import flat_mask_torch
from dspark_sgl.kernels.rejection import Coins, DraftDistribution, draw_at_torch, reject_chain_torch
from dspark_sgl.kernels.sequential_head import SequentialHead, draft_chain_torch
from dspark_sgl.kernels.tree_children import Scores, TreeDraw, candidates_torch
from dspark_sgl.kernels.tree_draft import IndependentChildren, TreeShape, grow_tree
from dspark_sgl.kernels.tree_rejection import reject_tree_torch
from dspark_sgl.kernels.walk import walk_torch

DEPTH, NODES, BRANCH = 7, 16, 4


@dataclass(frozen=True)
class Case:
    """bytes: the fewest that it must read and write"""

    operation: str
    size: str
    torch: Callable[[], object]
    triton: Callable[[], object]
    bytes: int


def measure(small: bool) -> list[tuple[str, ...]]:
    """A row per operation and size, as text."""
    device = "cpu" if small else "cuda"
    speed = copy_speed(device, 1 << (20 if small else 31))
    sizes = [(2, 300, 16)] if small else [(n, v, 256) for v in (32_000, 151_936) for n in (1, 64, 256)]
    rows = []
    for requests, vocabulary, rank in sizes:
        for case in cases(requests, vocabulary, rank, device):
            reference, ours = (1e6 * median_seconds(run, small) for run in (case.torch, case.triton))
            floor = 1e6 * case.bytes / speed
            times = (f"{reference:.0f}", f"{ours:.0f}", f"{floor:.1f}", f"{ours / floor:.1f}")
            rows.append((case.operation, case.size, *times))
    if not small:
        torch.cuda.empty_cache()  # servers are about to share the card
    return [("copy", f"{speed / 1e12:.2f} TB/s", "", "", "", ""), *rows]


def cases(n: int, vocabulary: int, rank: int, device: str) -> Iterator[Case]:
    """n: requests"""
    from dspark_sgl.kernels import (
        mask_triton,
        rejection_triton,
        sequential_head_triton,
        tree_children_triton,
        tree_rejection_triton,
        walk_triton,
    )

    g = torch.Generator(device).manual_seed(0)
    size = f"{n} x {vocabulary}"

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device=device)

    weights = torch.softmax(random(n, vocabulary), -1)
    coins = torch.rand(n, dtype=torch.float64, generator=g, device=device)
    yield Case(
        "draw",
        size,
        lambda: draw_at_torch(weights, coins),
        lambda: rejection_triton.draw_at(weights, coins),
        4 * n * vocabulary,
    )

    warm, nobody = torch.ones(n, device=device), torch.zeros(n, dtype=torch.bool, device=device)
    half = torch.bfloat16 if device == "cuda" else torch.float32
    head = SequentialHead(random(vocabulary, rank).to(half), random(vocabulary, rank).to(half))
    base, hidden = random(n, DEPTH, vocabulary).to(half), random(n, DEPTH, 8).to(half)
    anchors = torch.zeros(n, dtype=torch.int64, device=device)
    draw = ChainDraw(None, warm, nobody, g)
    yield Case(
        f"sequential head, {DEPTH} drafts",
        f"{size}, rank {rank}",
        lambda: draft_chain_torch(head, base, hidden, anchors, draw),
        lambda: sequential_head_triton.draft_chain(head, base, hidden, anchors, draw),
        DEPTH * vocabulary * (head.w2.element_size() * rank + n * (base.element_size() + 4)),
    )

    owner = torch.arange(n, device=device).repeat_interleave(BRANCH)
    level = Scores(base[:, 1], owner, random(len(owner), rank).to(half), head.w2)
    for kind, drawing in (("chosen", None), ("drawn", TreeDraw(warm, nobody, g))):
        yield Case(
            f"children of {BRANCH} nodes a request, {kind}",
            f"{size}, rank {rank}",
            partial(candidates_torch, level, BRANCH, drawing),
            partial(tree_children_triton.candidates, level, BRANCH, drawing),
            vocabulary
            * (head.w2.element_size() * rank + n * base.element_size() + 4 * len(owner) * (drawing is not None)),
        )

    chain = draft_chain_torch(head, base, hidden, anchors, draw)
    assert chain.distribution is not None and chain.token_probs is not None
    draft, token_probs = DraftDistribution(chain.distribution.probs, None), chain.token_probs
    layout = chain_layout(anchors, chain.tokens, [DEPTH] * n)
    target = torch.softmax(random(len(layout.owner), vocabulary), -1)
    tossed = Coins.toss(layout, g)
    yield Case(
        f"chain rejection, {DEPTH} drafts",
        size,
        lambda: reject_chain_torch(layout, target, draft, token_probs, tossed),
        lambda: rejection_triton.reject_chain(layout, target, draft, token_probs, tossed),
        8 * n * vocabulary,  # p and q of the row it ends in
    )

    depths = torch.full((n,), DEPTH, device=device)
    children = IndependentChildren(random(n, DEPTH, vocabulary), None)
    tree = grow_tree(children, anchors, depths, TreeShape(NODES, BRANCH), TreeDraw(warm, nobody, g))
    assert tree.drawn is not None
    nodes = tree.drawn
    forest = tree_layout(anchors, tree.tokens, tree.parents, tree.parents >= 0)
    p, flips = torch.softmax(random(len(forest.owner), vocabulary), -1), Coins.toss(forest, g)
    yield Case(
        f"tree rejection, {NODES} nodes",
        size,
        lambda: reject_tree_torch(forest, p, nodes, flips),
        lambda: tree_rejection_triton.reject_tree(forest, p, nodes, flips),
        8 * n * vocabulary,
    )

    longest = 2000 if device == "cuda" else 20
    wanted, prefix = forest.tokens, torch.full((n,), longest, device=device)
    rows = f"{n} x {NODES + 1} rows"
    yield Case(
        "walk", rows, lambda: walk_torch(forest, wanted), lambda: walk_triton.walk(forest, wanted), 24 * wanted.numel()
    )
    yield Case(
        "mask",
        f"{rows}, prefix {longest}",
        lambda: flat_mask_torch(forest, prefix),
        lambda: mask_triton.flat_mask(forest, prefix, total=n * longest, longest=longest),
        int(((prefix + NODES + 1) * (NODES + 1)).sum()),
    )


def copy_speed(device: str, size: int) -> float:
    """Bytes read and written per second by a device-to-device copy."""
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    out = torch.empty_like(source)
    return 2 * size / median_seconds(lambda: out.copy_(source), device == "cpu")


def median_seconds(run: Callable[[], object], small: bool) -> float:
    if not small:
        from triton.testing import do_bench

        return 1e-3 * float(do_bench(run, warmup=25, rep=100, return_mode="median"))
    times = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)

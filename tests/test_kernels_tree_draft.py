"""Trees hold the best nodes there are: against a best-first search written with a heap, one node at a time."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from dspark_sgl.kernels.layout import NO_NODE
from dspark_sgl.kernels.sequential_head import Linear, SequentialHead
from dspark_sgl.kernels.tree_children import TreeDraw
from dspark_sgl.kernels.tree_draft import (
    Children,
    DraftTree,
    IndependentChildren,
    MarkovChildren,
    StepChildren,
    TreeShape,
    grow_tree,
)

VOCAB, RANK, HIDDEN, DEPTH = 950, 5, 7, 4
KINDS = ("vanilla", "gated", "rnn", "independent", "steps")


@dataclass(frozen=True)
class Case:
    """log_q: what follows a path of tokens, float64 `[Vq]`, computed from the path's first token on each time

    chain: only the likeliest child of the node before is ever followed
    """

    children: Children
    log_q: Callable[[int, list[int]], Tensor]
    anchors: Tensor
    vocab: Tensor
    chain: bool = False

    def follows(self, request: int, path: tuple[int, ...]) -> bool:
        """Whether this node may have children."""
        words = [int(self.anchors[request]), *path]
        best = [int(self.vocab[self.log_q(request, words[:k]).argmax()]) for k in range(1, len(words))]
        return not self.chain or best == list(path)


def case(kind: str, seed: int, bs: int, columns: int = 11) -> Case:
    g = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    vocab = torch.randperm(VOCAB, generator=g)[:columns]
    logits, hidden = random(bs, DEPTH, columns), random(bs, DEPTH, HIDDEN)
    anchors = torch.randint(VOCAB, (bs,), generator=g)
    if kind == "independent":

        def alone(request: int, path: list[int]) -> Tensor:
            return logits[request, len(path) - 1].double().log_softmax(-1)

        return Case(IndependentChildren(logits, vocab), alone, anchors, vocab)
    head = SequentialHead(
        w1=random(VOCAB, RANK),
        w2=random(columns, RANK),
        gate=Linear(random(RANK, HIDDEN + RANK), random(RANK)) if kind == "gated" else None,
        joint=Linear(random(3 * RANK, 2 * RANK + HIDDEN), random(3 * RANK)) if kind in ("rnn", "steps") else None,
    )

    def along(request: int, path: list[int]) -> Tensor:
        state = head.initial_state(1)
        for k, token in enumerate(path):
            bias, state = head.step(torch.tensor([token]), hidden[request, k, None], state)
        return (logits[request, len(path) - 1] + bias[0]).double().log_softmax(-1)

    if kind == "steps":
        # The head stands for a module that feeds on its own state; where it is asked twice a level it would be wrong.
        def step(level: int, tokens: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
            bias, after = head.step(tokens, hidden[:, level], state)
            assert after is not None
            return logits[:, level] + bias, after

        start = head.initial_state(bs)
        assert start is not None
        children = StepChildren(step(0, anchors, start), step, DEPTH, vocab)
        return Case(children, along, anchors, vocab, chain=True)
    return Case(MarkovChildren(head, logits, hidden, vocab), along, anchors, vocab)


def best_first(case: Case, request: int, depth: int, shape: TreeShape) -> dict[tuple[int, ...], float]:
    """Paths without the anchor, and their survival, as a heap finds them."""
    found: dict[tuple[int, ...], float] = {}
    heap: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    while heap and len(found) <= shape.max_nodes:
        cost, path = heapq.heappop(heap)
        found[path] = float(torch.tensor(-cost).exp())
        if len(path) < depth and case.follows(request, path):
            log_q = case.log_q(request, [int(case.anchors[request]), *path])
            for value, column in zip(*log_q.topk(min(shape.branch, len(log_q))), strict=True):
                heapq.heappush(heap, (cost - float(value), (*path, int(case.vocab[column]))))
    del found[()]
    return found


def paths(tree: DraftTree, request: int) -> dict[tuple[int, ...], float]:
    """Every node's path and survival, in the tree's order; a parent must come before its children."""
    at: list[tuple[int, ...]] = [()]
    survival = [1.0]
    for token, parent, chance in zip(
        tree.tokens[request].tolist(), tree.parents[request].tolist(), tree.chance[request].tolist(), strict=True
    ):
        if parent == NO_NODE:
            assert chance == 0
            at.append((-1,))
            survival.append(0.0)
            continue
        assert parent < len(at) and at[parent] != (-1,)
        at.append((*at[parent], token))
        survival.append(survival[parent] * chance)
    return {path: s for path, s in zip(at, survival, strict=True) if path not in ((), (-1,))}


@pytest.mark.parametrize("seed", range(25))
@pytest.mark.parametrize("kind", KINDS)
def test_the_tree_is_that_of_a_best_first_search(kind: str, seed: int) -> None:
    bs = 1 + seed % 3
    found = case(kind, seed, bs, columns=[11, 701][seed % 2])
    shape = TreeShape(max_nodes=[1, 2, 5, 16, 40, 300][seed % 6], branch=1 + seed % 5)
    depths = torch.tensor([(seed + i) % (DEPTH + 1) for i in range(bs)])
    tree = grow_tree(found.children, found.anchors, depths, shape)
    for request in range(bs):
        wanted = best_first(found, request, int(depths[request]), shape)
        got = paths(tree, request)
        assert got.keys() == wanted.keys()
        assert list(got.values()) == pytest.approx([wanted[path] for path in got], rel=1e-4)
        assert all(a >= b * (1 - 1e-5) for a, b in pairwise(got.values())), "best first"


@pytest.mark.parametrize("kind", KINDS)
def test_one_child_each_is_the_greedy_chain(kind: str) -> None:
    found = case(kind, 3, 2)
    tree = grow_tree(found.children, found.anchors, torch.full((2,), DEPTH), TreeShape(9, 1))
    assert tree.parents.tolist() == [list(range(DEPTH))] * 2
    for request in range(2):
        path = [int(found.anchors[request])]
        for token in tree.tokens[request].tolist():
            assert token == int(found.vocab[found.log_q(request, path).argmax()])
            path.append(token)


def test_side_branches_follow_their_own_parent() -> None:
    """What a Markov head is for: after another sibling, other children."""
    found = case("vanilla", 1, 1)
    tree = grow_tree(found.children, found.anchors, torch.tensor([2]), TreeShape(30, 4))
    children: dict[int, set[int]] = {}
    for token, parent in zip(tree.tokens[0].tolist(), tree.parents[0].tolist(), strict=True):
        children.setdefault(parent, set()).add(token)
    of_siblings = [frozenset(children[node + 1]) for node in range(30) if tree.parents[0, node] == 0]
    assert len(set(of_siblings)) > 1


def test_equal_chances_keep_parents_first() -> None:
    """Certain tokens: every survival on the path is exactly 1, and order alone tells parent from child."""
    logits = torch.full((1, 3, 4), -1e4)
    logits[:, :, 2] = 1e4
    children = IndependentChildren(logits, None)
    tree = grow_tree(children, torch.zeros(1, dtype=torch.int64), torch.tensor([3]), TreeShape(3, 2))
    assert tree.tokens.tolist() == [[2, 2, 2]] and tree.parents.tolist() == [[0, 1, 2]]


def full_width(all_survival: Tensor, fresh: Tensor, most: int, beam: int | None) -> Tensor:
    """What a GPU expands of a level: as many nodes as a tree may have, whatever they are worth."""
    return fresh.topk(min(most, fresh.shape[1], beam or most), dim=1).indices


@pytest.mark.parametrize("on_gpu", [False, True], ids=["cpu", "as on a GPU"])
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("kind", KINDS)
def test_a_trees_nodes_keep_what_their_children_were_drawn_from(
    kind: str, seed: int, on_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In no more rows than a tree has nodes, its anchor and one to spare."""
    if on_gpu:
        monkeypatch.setattr("dspark_sgl.kernels.tree_draft._worth_expanding", full_width)
    bs = 1 + seed % 3
    found, shape = case(kind, seed, bs), TreeShape([1, 3, 9, 24][seed % 4], 1 + seed % 4)
    warmth = torch.linspace(0.5, 1.5, bs)
    draw = TreeDraw(warmth, torch.zeros(bs, dtype=torch.bool), torch.Generator().manual_seed(seed))
    tree = grow_tree(found.children, found.anchors, torch.full((bs,), DEPTH), shape, draw)
    assert tree.drawn is not None and tree.drawn.probs.shape[1] <= shape.max_nodes + 2
    for request in range(bs):
        words, parents = [[int(found.anchors[request])]], tree.parents[request].tolist()
        for token, parent in zip(tree.tokens[request].tolist(), parents, strict=True):
            words.append([*words[parent], token])
        for number in {parent for parent in parents if parent != NO_NODE}:
            q = tree.drawn.probs[request, tree.drawn.place[request, number]]
            wanted = (found.log_q(request, words[number]) / warmth[request]).softmax(-1)
            assert tree.drawn.place[request, number] >= 0
            torch.testing.assert_close(q.double(), wanted, rtol=1e-4, atol=1e-6)

"""Growing draft trees: what most likely follows each request's anchor, best first.

    survival(v) = survival(parent(v)) chance(v | parent(v)),   survival(anchor) = 1

A tree holds the `max_nodes` nodes of greatest survival among all paths whose every step is one of the `branch` children
picked for the step before (`tree_children.py`: the likeliest, or drawn at random). It is grown level by level: a node
is expanded only while it is among the best `max_nodes` found so far. Nothing is lost by that, since no child survives
better than its parent.

What may follow a node is asked of `Children`. Base logits are computed once for every depth, so a drafter whose head
conditions on the token before (`MarkovChildren`) gives each branch its own distribution for one product over the
expanded nodes of a level; one without such a head (`IndependentChildren`) has the same for all nodes of a level. One
that runs its model for each node it expands is asked about the best of each level alone (`StepChildren`): its tree is a
chain with leaves beside it. Never decides how much of a tree is verified.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .layout import NO_NODE
from .sequential_head import Linear, SequentialHead, confidence
from .tree_children import KeptDistributions, NodeDistributions, Picked, Scores, TreeDraw, pick


@dataclass(frozen=True)
class TreeShape:
    """A tree has at most `max_nodes` draft tokens and a node at most `branch` children."""

    max_nodes: int
    branch: int


@dataclass(frozen=True)
class DraftTree:
    """One tree per request, nodes in falling order of survival, so that every prefix is a tree too.

    tokens: int64 `[bs, N]`; parents: int64 `[bs, N]`: 0 = the anchor, `m + 1` = node `m`, `NO_NODE` = no node
    chance: float32 `[bs, N]`, that a node survives if its parent does; 0 where there is no node, NaN where the draft
        model's logits were
    drawn: what its nodes were drawn from, None where all were chosen
    """

    tokens: Tensor
    parents: Tensor
    chance: Tensor
    drawn: NodeDistributions | None


class Children(Protocol):
    """depth: how many levels it knows; vocab: int64 `[Vq]`, token ids of the columns, None for the whole vocabulary

    beam: the most nodes of a level that it can be asked about, None for any number; the others stay leaves
    """

    @property
    def beam(self) -> int | None: ...

    @property
    def depth(self) -> int: ...

    @property
    def vocab(self) -> Tensor | None: ...

    def of(
        self, level: int, tokens: Tensor, state: Tensor | None, branch: int, draw: TreeDraw | None
    ) -> tuple[Picked, Tensor | None]:
        """Picks children for the F frontier nodes of every request.

        level: of the children, 0 for the anchors'; tokens: int64 `[bs, F]`; state: the head's recurrent state on
            reaching them, `[bs, F, r]`, or None
        Returns children `[bs, F, branch]` and the state after each node.
        """
        ...


@dataclass(frozen=True)
class MarkovChildren:
    """Through DSpark's sequential head: `softmax(U_k + B_k)` after each node's own token and, for rnn, its own path.

    base_logits: `[bs, D, Vq]`; hidden: `[bs, D, H]`; proj: the confidence head, where the draft has one
    """

    head: SequentialHead
    base_logits: Tensor
    hidden: Tensor
    vocab: Tensor | None
    proj: Linear | None = None
    beam: None = None

    @property
    def depth(self) -> int:
        return self.base_logits.shape[1]

    def of(
        self, level: int, tokens: Tensor, state: Tensor | None, branch: int, draw: TreeDraw | None
    ) -> tuple[Picked, Tensor | None]:
        bs, count = tokens.shape
        owner = torch.arange(bs, device=tokens.device).repeat_interleave(count)
        previous, hidden = tokens.flatten(), self.hidden[owner, level]
        before = self.head.initial_state(bs * count) if state is None else state.flatten(0, 1)
        latent, after = self.head.latent(previous, hidden, before)
        sure = None
        if draw is not None and self.proj is not None:
            sure = confidence(self.head, self.proj, hidden[:, None], previous, previous[:, None])[:, 0]
        picked = pick(Scores(self.base_logits[:, level], owner, latent, self.head.w2), branch, draw, sure)
        return picked.view(bs, count), None if after is None else after.view(bs, count, -1)


@dataclass(frozen=True)
class IndependentChildren:
    """Every node of a level has children of the same distribution. logits: `[bs, D, Vq]`"""

    logits: Tensor
    vocab: Tensor | None
    beam: None = None

    @property
    def depth(self) -> int:
        return self.logits.shape[1]

    def of(
        self, level: int, tokens: Tensor, state: Tensor | None, branch: int, draw: TreeDraw | None
    ) -> tuple[Picked, Tensor | None]:
        bs, count = tokens.shape
        rows = torch.arange(bs, device=tokens.device)
        if draw is None:
            return pick(Scores(self.logits[:, level], rows), branch, None, None).repeated(count), None
        rows = rows.repeat_interleave(count)
        return pick(Scores(self.logits[:, level], rows), branch, draw, None).view(bs, count), None


@dataclass(frozen=True)
class StepChildren:
    """From a model that takes one step after another.

    first: logits after the anchors, `[bs, Vq]`, and what the next step starts from, `[bs, r]`
    step: (level, tokens int64 `[bs]`, what the step before left `[bs, r]`) -> the same after those tokens
    """

    first: tuple[Tensor, Tensor]
    step: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
    depth: int
    vocab: Tensor | None
    beam: int = 1

    def of(
        self, level: int, tokens: Tensor, state: Tensor | None, branch: int, draw: TreeDraw | None
    ) -> tuple[Picked, Tensor | None]:
        logits, after = self.first if state is None else self.step(level, tokens[:, 0], state[:, 0])
        rows = torch.arange(len(tokens), device=tokens.device)
        return pick(Scores(logits, rows), branch, draw, None).view(len(tokens), 1), after[:, None]


@dataclass(frozen=True)
class _Nodes:
    """Nodes found so far, `[bs, P]` each, level after level.

    log_survival: float32; up: int64, a node's parent, counted as in `DraftTree`
    """

    tokens: Tensor
    log_survival: Tensor
    chance: Tensor
    up: Tensor

    def __add__(self, more: _Nodes) -> _Nodes:
        pairs = zip(self._all, more._all, strict=True)
        return _Nodes(*(torch.cat(pair, dim=1) for pair in pairs))

    @property
    def _all(self) -> tuple[Tensor, ...]:
        return self.tokens, self.log_survival, self.chance, self.up


def grow_tree(
    children: Children, anchors: Tensor, depths: Tensor, shape: TreeShape, draw: TreeDraw | None = None
) -> DraftTree:
    """anchors: int64 `[bs]`; depths: int64 `[bs]`, how deep each tree may go, 0 is no tree; draw: None to choose

    Survival is added up in logarithms, in float32, where a child is never above its parent.
    """
    tokens, state = anchors[:, None], None
    log_survival = torch.zeros(tokens.shape, device=tokens.device)
    number = torch.zeros_like(tokens)  # of the nodes that are expanded: 0 = the anchor, m + 1 = node m
    found: _Nodes | None = None
    kept = KeptDistributions(_most_expanded(children, shape.max_nodes))
    for level in range(children.depth):
        picked, carried = children.of(level, tokens, state, shape.branch, draw)
        named = picked.columns if children.vocab is None else children.vocab[picked.columns]
        reachable = log_survival[..., None] + picked.chance.log()
        # Logits of NaN promise nothing: what would follow is no node.
        reachable = reachable.masked_fill((depths[:, None, None] <= level) | picked.chance.isnan(), -torch.inf)
        fresh = _Nodes(
            tokens=named.flatten(1),
            log_survival=reachable.flatten(1),
            chance=picked.chance.flatten(1),
            up=number[..., None].expand_as(reachable).flatten(1),
        )
        before = 0 if found is None else found.tokens.shape[1]
        found = fresh if found is None else found + fresh
        if picked.q is not None:
            kept.keep(picked.q, number, _numbers(_best(found, shape.max_nodes)))
        if level + 1 == children.depth:
            break
        place = _worth_expanding(found.log_survival, fresh.log_survival, shape.max_nodes, children.beam)
        if place.shape[1] == 0:
            break
        tokens, log_survival = fresh.tokens.gather(1, place), fresh.log_survival.gather(1, place)
        number = place + before + 1
        if carried is not None:
            parent = (place // named.shape[2])[..., None].expand(-1, -1, carried.shape[-1])
            state = carried.gather(1, parent)
    assert found is not None
    order = _best(found, shape.max_nodes)
    return _tree(found, order, kept.of(_numbers(order), children.vocab))


def _best(found: _Nodes, most: int) -> Tensor:
    """int64 `[bs, N]`: the best of the nodes found so far, the best first. Equals stay in order, so a node that is not
    among them now is not when more are found."""
    return found.log_survival.sort(dim=1, descending=True, stable=True).indices[:, :most]


def _numbers(nodes: Tensor) -> Tensor:
    """int64 `[bs, N + 1]`: the anchor and these nodes, counted as in `DraftTree.parents`."""
    return torch.nn.functional.pad(nodes + 1, (1, 0))


def _most_expanded(children: Children, most: int) -> int:
    """Of a tree's nodes and its anchor, those that may be asked for children: no leaf of the deepest level is."""
    return min(most + 1, 1 + (children.depth - 1) * (most if children.beam is None else children.beam))


def _worth_expanding(all_survival: Tensor, fresh: Tensor, most: int, beam: int | None) -> Tensor:
    """int64 `[bs, F]`: which nodes of the newest level to expand, best first: those among the best `most` found so far,
    no more than `beam` of them.

    Where a request has fewer such nodes than another, its next best come along; they do no harm.
    """
    width = min(most, fresh.shape[1])
    if not fresh.is_cuda:  # where a row more costs less than waiting for this figure
        bar = all_survival.topk(min(most, all_survival.shape[1]), dim=1).values[:, -1:]
        alive = (fresh >= bar) & (fresh > -torch.inf)
        width = int(alive.sum(1).max())
    return fresh.topk(width if beam is None else min(width, beam), dim=1).indices


def _tree(found: _Nodes, order: Tensor, drawn: NodeDistributions | None) -> DraftTree:
    """The nodes in this order, int64 `[bs, N]`, best first; a parent stands before its children where they are equally
    good, since levels stand in order and the sort is stable."""
    exists = found.log_survival.gather(1, order) > -torch.inf
    chance = found.chance.gather(1, order)
    place = torch.zeros(len(order), found.tokens.shape[1] + 1, dtype=torch.int64, device=order.device)
    rank = torch.arange(1, order.shape[1] + 1, device=order.device).expand_as(order)
    place.scatter_(1, order + 1, rank)
    return DraftTree(
        tokens=found.tokens.gather(1, order).where(exists, 0),
        parents=place.gather(1, found.up.gather(1, order)).where(exists, NO_NODE),
        chance=chance.where(exists | chance.isnan(), 0),
        drawn=drawn,
    )

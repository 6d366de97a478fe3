"""Rejection sampling down a tree whose children were drawn without replacement.

At a node the target's distribution is p and the children x_1, x_2, .. x_m were drawn in this order, x_i from q_i
(`tree_children.py`). They are tried in this order, from p_1 = p on:

    accept x_i with probability min(1, p_i(x_i) / q_i(x_i)),   else   p_{i+1} = max(p_i - q_i, 0), normalised

An accepted child is the next node; where all are rejected, or there are none, the next token is drawn from p_{m+1}.
Never decides which children are offered, and never draws one.

The token t emitted after a node is distributed as p. Let V_i(t) be its distribution when trying starts at x_i, given
x_1 .. x_{i-1}; claim: V_i = p_i. It holds for i = m + 1 by construction. Given the earlier ones, x_i is distributed as
q_i, so with V_{i+1} = p_{i+1} the token v comes out with

    q_i(v) min(1, p_i(v) / q_i(v)) + P(reject) p_{i+1}(v) = min(q_i(v), p_i(v)) + max(p_i(v) - q_i(v), 0) = p_i(v),

since P(reject) = sum_u max(p_i(u) - q_i(u), 0). By induction V_1 = p.

The step needs that x_i is distributed as q_i *given that it is tried*: whether a node has an i-th child may depend on
x_1 .. x_{i-1}, on what stands above and beside the node and on what a draw promises, never on x_i or what hangs from
it. Trees are cut in falling order of promises made before each draw, where nothing below a node stands before it;
pruning drawn children by their own probability is biased, and tests/test_kernels_tree_rejection.py shows it.

None of the p_i has to be kept. With S_i what q has left, sum of q(v) over v not among x_1 .. x_{i-1}, and

    r_i = max(p - A_i q, 0),   Z_i = sum_v r_i(v),   A_1 = 0,   A_{i+1} = A_i + Z_i / S_i

it is p_i = r_i / Z_i, by induction: p_{i+1} is max(r_i / Z_i - q / S_i, 0), normalised, wherever q_i = q / S_i. At the
x_j before, q_i is 0 instead; but x_j was rejected, so r_j(x_j) / Z_j < q(x_j) / S_j, which says r_{j+1}(x_j) = 0, and A
only grows. So a node is one number, A, and p and q are read where they lie.

An i-th child exists only where S_i > 0. At a low temperature x_1 .. x_{i-1} may hold all of q but rounding: nothing can
be drawn from that, and `draw_distinct` answers with a repeat or some other column. So a child with S_i <= `SPENT`
counts as not offered, and so do those after it. S_i reads x_1 .. x_{i-1} only: the premise above holds, and nothing is
approximated.

A request whose nodes were chosen has q = 0 and a p that is one-hot: a child is accepted where it is the argmax, and
rejecting one takes nothing away.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .layout import TreeLayout
from .rejection import Coins, draw_at_torch, residual
from .tree_children import NodeDistributions
from .walk import NO_ROW, Acceptance

SPENT = 1e-9
"""S_i at or below which no child can have been drawn: float64 sums of q are right to some 1e-13."""


def reject_tree(
    layout: TreeLayout, target_probs: Tensor, drawn: NodeDistributions, generator: torch.Generator
) -> Acceptance:
    """layout: trees, siblings in the order of their draws; target_probs: float32 `[rows, V]`, packed, normalised"""
    coins = Coins.toss(layout, generator)
    if target_probs.is_cuda:
        from . import tree_rejection_triton

        return tree_rejection_triton.reject_tree(layout, target_probs, drawn, coins)
    return reject_tree_torch(layout, target_probs, drawn, coins)


def reject_tree_torch(layout: TreeLayout, target_probs: Tensor, drawn: NodeDistributions, coins: Coins) -> Acceptance:
    """The reference, given the coins: one step down all trees at a time."""
    assert layout.nodes is not None
    starts, children = layout.starts, children_table(layout)
    requests = torch.arange(layout.batch_size, device=starts.device)
    row = torch.zeros_like(requests)
    scale = torch.zeros_like(coins.last)  # A at each request's node
    path = [row]
    standing = requests  # those that go on
    for _ in range(layout.path_width - 1):
        at = row[standing]
        p, q = target_probs[starts[standing] + at], _distribution(layout, drawn, standing, at)
        rows = children[standing, at]
        tokens = layout.tokens[standing].gather(1, rows.clamp(min=0))
        tries = coins.tries[standing].gather(1, (rows - 1).clamp(min=0))
        taken, scale[standing] = _try_children(rows, tokens, tries, p, q, drawn.vocab)
        went = taken != NO_ROW
        standing, taken = standing[went], taken[went]
        row = row.index_put((standing,), taken)
        scale[standing] = 0.0
        path.append(torch.full_like(row, NO_ROW).index_copy(0, standing, taken))
    p, q = target_probs[starts + row], _distribution(layout, drawn, requests, row)
    left, _ = _left(p, q, scale, drawn.vocab)
    stacked = torch.stack(path, dim=1)
    return Acceptance(stacked, (stacked != NO_ROW).sum(1), draw_at_torch(left, coins.last))


def _try_children(
    rows: Tensor, tokens: Tensor, tries: Tensor, p: Tensor, q: Tensor, vocab: Tensor | None
) -> tuple[Tensor, Tensor]:
    """int64 `[m]`, the accepted child of each node, or `NO_ROW`; float64 `[m]`, A after those that were rejected.

    rows, tokens: int64 `[m, B]`, its children, `NO_ROW` behind the last; tries: float32 `[m, B]`; p: float32 `[m, V]`;
    q: float32 `[m, Vq]`
    """
    taken = torch.full_like(rows[:, 0], NO_ROW)
    mass_left = q.sum(1, dtype=torch.float64)  # S
    deterministic = mass_left == 0
    scale = torch.zeros_like(mass_left)  # A
    for child, token, coin in zip(rows.T, tokens.T, tries.T, strict=True):
        offered = (child != NO_ROW) & (deterministic | (mass_left > SPENT))
        trying = (offered & (taken == NO_ROW)).nonzero().squeeze(1)
        if len(trying) == 0:
            break
        left, total = _left(p[trying], q[trying], scale[trying], vocab)
        token = token[trying]
        mine = q[trying].gather(1, _columns(token, vocab)[:, None]).squeeze(1).double()
        chance = torch.where(deterministic[trying], 1.0, mine / mass_left[trying])
        passed = coin[trying] * chance * total < left.gather(1, token[:, None]).squeeze(1)
        taken[trying] = torch.where(passed, child[trying], NO_ROW)
        fell = ~passed & ~deterministic[trying]
        lost = trying[fell]
        scale[lost] += total[fell] / mass_left[lost]
        mass_left[lost] -= mine[fell]
    return taken, scale


def _left(p: Tensor, q: Tensor, scale: Tensor, vocab: Tensor | None) -> tuple[Tensor, Tensor]:
    """r, float32 `[n, V]`, and Z, float64 `[n]`."""
    left = residual(p, q, scale.float(), vocab)
    total = left.sum(1, dtype=torch.float64)
    # p == q leaves nothing by rounding alone; a rejection there has probability 0 but for that rounding.
    empty = total <= 0
    return torch.where(empty[:, None], p, left), torch.where(empty, p.sum(1, dtype=torch.float64), total)


def _distribution(layout: TreeLayout, drawn: NodeDistributions, requests: Tensor, row: Tensor) -> Tensor:
    """float32 `[n, Vq]`: what the children of these rows were drawn from; of a row without any it does not matter."""
    assert layout.nodes is not None
    place = drawn.place[requests, layout.nodes[requests, row]]
    return drawn.probs[requests, place.clamp(min=0)]


def _columns(tokens: Tensor, vocab: Tensor | None) -> Tensor:
    """int64 `[n]`: the column of each token; drafts come from the vocabulary, so each has one."""
    return tokens if vocab is None else (vocab[None] == tokens[:, None]).to(torch.uint8).argmax(1)


def children_table(layout: TreeLayout) -> Tensor:
    """int64 `[bs, W, B]`: the rows that follow each row, in order, `NO_ROW` behind the last."""
    parents = layout.parents.where(layout.valid, NO_ROW)
    same = (parents[:, :, None] == parents[:, None, :]).tril(-1)
    place = same.sum(2)
    hangs = parents >= 0
    width = int(place[hangs].max()) + 1 if bool(hangs.any()) else 1
    table = torch.full((*parents.shape, width), NO_ROW, dtype=torch.int64, device=parents.device)
    request, row = hangs.nonzero(as_tuple=True)
    table[request, parents[request, row], place[request, row]] = row
    return table

"""Rejection sampling down a tree whose children were drawn without replacement.

At a node the target's distribution is p and the children x_1, x_2, .. x_m were drawn in this order, x_i from q_i
(`tree_children.py`). They are tried in this order, from p_1 = p on:

    accept x_i with probability min(1, p_i(x_i) / q_i(x_i)),   else   p_{i+1} = max(p_i - q_i, 0), normalised

An accepted child is the next node; where all are rejected, or there are none, the next token is drawn from p_{m+1}.

The token t emitted after a node is distributed as p. Let V_i(t) be its distribution when trying starts at x_i, given
x_1 .. x_{i-1}; claim: V_i = p_i. It holds for i = m + 1 by construction. Given the earlier ones, x_i is distributed as
q_i, so with V_{i+1} = p_{i+1} the token v comes out with

    q_i(v) min(1, p_i(v) / q_i(v)) + P(reject) p_{i+1}(v) = min(q_i(v), p_i(v)) + max(p_i(v) - q_i(v), 0) = p_i(v),

since P(reject) = sum_u max(p_i(u) - q_i(u), 0). By induction V_1 = p.

The step needs that x_i is distributed as q_i *given that it is tried*: whether a node has an i-th child may depend on
x_1 .. x_{i-1}, on what stands above and beside the node and on what a draw promises, never on x_i or what hangs from
it. Trees are cut in falling order of promises made before each draw, where nothing below a node stands before it;
pruning drawn children by their own probability is biased, and tests/test_kernels_tree_rejection.py shows it.

A request whose nodes were chosen has q = 0 and a p that is one-hot: a child is accepted where it is the argmax, and
rejecting one takes nothing away.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .layout import TreeLayout
from .rejection import draw, residual
from .tree_children import NodeDistributions
from .walk import NO_ROW, Acceptance


def reject_tree(
    layout: TreeLayout, target_probs: Tensor, drawn: NodeDistributions, greedy: Tensor, generator: torch.Generator
) -> Acceptance:
    """layout: trees, siblings in the order of their draws; target_probs: float32 `[rows, V]`, packed, normalised

    greedy: bool `[bs]`, requests whose nodes were chosen
    """
    assert layout.nodes is not None
    starts = layout.qo_indptr[:-1].long()
    children = children_table(layout)
    row = torch.zeros_like(starts)
    left = target_probs[starts].clone()
    path = [row]
    standing = torch.arange(layout.batch_size, device=row.device)  # the requests that go on
    for _ in range(layout.path_width - 1):
        node = layout.nodes[standing, row[standing]]
        q = drawn.probs[standing, drawn.place[standing, node].clamp(min=0)]
        taken = _try_children(standing, children[standing, row[standing]], layout, left, q, drawn, greedy, generator)
        went = taken != NO_ROW
        standing, taken = standing[went], taken[went]
        row = row.clone()
        row[standing] = taken
        left[standing] = target_probs[starts[standing] + taken]
        path.append(torch.full_like(row, NO_ROW).index_copy(0, standing, taken))
    stacked = torch.stack(path, dim=1)
    return Acceptance(path=stacked, lengths=(stacked != NO_ROW).sum(1), bonus=draw(left, generator))


def _try_children(
    requests: Tensor,
    children: Tensor,
    layout: TreeLayout,
    left: Tensor,
    q: Tensor,
    drawn: NodeDistributions,
    greedy: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """int64 `[m]`: the accepted child of each request's node, or `NO_ROW`; `left` `[bs, V]` becomes what is left of p.

    requests: int64 `[m]`; children: int64 `[m, B]`, rows; q: float32 `[m, Vq]`, what the first child was drawn from
    """
    taken = torch.full_like(requests, NO_ROW)
    trying = torch.arange(len(requests), device=requests.device)
    for child in children.T:
        trying = trying[(child[trying] != NO_ROW) & (taken[trying] == NO_ROW)]
        if len(trying) == 0:
            break
        at, token = requests[trying], layout.tokens[requests[trying], child[trying]]
        offered = _columns(token, drawn.vocab)
        chance = q[trying, offered].masked_fill(greedy[at], 1.0)
        coin = torch.rand(len(trying), generator=generator, device=token.device)
        passed = coin * chance < left[at, token]
        taken[trying] = torch.where(passed, child[trying], NO_ROW)
        lost, offered = trying[~passed], offered[~passed]
        left[requests[lost]] = _left_over(left[requests[lost]], q[lost], drawn.vocab)
        q[lost, offered] = 0.0
        q[lost] /= q[lost].sum(1, keepdim=True).clamp(min=torch.finfo(q.dtype).tiny)
    return taken


def _left_over(p: Tensor, q: Tensor, vocab: Tensor | None) -> Tensor:
    """float32 `[n, V]`: `max(p - q, 0)`, normalised."""
    rest = residual(p, q, p.new_ones(len(p)), vocab)
    total = rest.sum(1, keepdim=True)
    # p == q leaves nothing by rounding alone; a rejection there has probability 0 but for that rounding.
    return torch.where(total > 0, rest / total.clamp(min=torch.finfo(p.dtype).tiny), p)


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

"""A draft's NaN stays where it is: it names no token that is not there, grows no node and takes nothing from p."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dspark_sgl.kernels.layout import NO_NODE, chain_layout
from dspark_sgl.kernels.rejection import DraftDistribution, draw, reject_chain
from dspark_sgl.kernels.tree_children import TreeDraw, draw_distinct
from dspark_sgl.kernels.tree_draft import IndependentChildren, TreeShape, grow_tree

VOCAB = 7


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_whatever_is_drawn_is_a_column() -> None:
    nothing = torch.full((50, VOCAB), torch.nan)
    assert set(draw(nothing, generator()).tolist()) <= set(range(VOCAB))
    assert set(draw_distinct(nothing, 3, generator()).flatten().tolist()) <= set(range(VOCAB))


def test_a_request_that_rejects_nothing_reads_no_q() -> None:
    """Two requests: of one the second draft, of NaN, was not offered and its first is accepted; the other rejects."""
    p = torch.zeros(4, VOCAB)
    p[0, 3] = p[1, 4] = p[2, 5] = p[3, 6] = 1.0
    q = torch.full((2, 2, VOCAB), 1 / VOCAB)
    q[0, 1] = torch.nan
    layout = chain_layout(torch.zeros(2, dtype=torch.int64), torch.tensor([[3, 0], [2, 0]]), [1, 1])
    probs = torch.tensor([[1 / VOCAB, torch.nan], [1 / VOCAB, 1 / VOCAB]])
    accepted = reject_chain(layout, p, DraftDistribution(q, None), probs, generator())
    assert accepted.lengths.tolist() == [2, 1] and accepted.bonus.tolist() == [4, 5]


def test_a_draft_of_nan_is_as_if_it_had_not_been_offered() -> None:
    """Its first draft is accepted for sure; the second was drawn from NaN, so p after the first says what comes."""
    p = torch.zeros(3, VOCAB)
    p[0, 3] = p[1, 4] = p[2, 5] = 1.0
    q = torch.full((1, 2, VOCAB), 1 / VOCAB)
    q[0, 1] = torch.nan
    layout = chain_layout(torch.zeros(1, dtype=torch.int64), torch.tensor([[3, 4]]), [2])
    for nothing in (torch.nan, torch.inf):
        probs = torch.tensor([[1 / VOCAB, nothing]])
        accepted = reject_chain(layout, p, DraftDistribution(q, None), probs, generator())
        assert accepted.lengths.tolist() == [2] and accepted.bonus.tolist() == [4]


@pytest.mark.parametrize("drawn", [False, True])
def test_a_tree_ends_above_logits_of_nan(drawn: bool) -> None:
    """Of two requests the first one's second level is NaN: it keeps its first, the other its whole tree."""
    g = generator()
    logits = torch.randn(2, 3, VOCAB, generator=g)
    broken = logits.clone()
    broken[0, 1, 2] = torch.nan

    def tree(of: Tensor) -> tuple[list[list[int]], Tensor]:
        draw = TreeDraw(torch.ones(2), torch.zeros(2, dtype=torch.bool), generator()) if drawn else None
        anchors, depths = torch.zeros(2, dtype=torch.int64), torch.full((2,), 3)
        grown = grow_tree(IndependentChildren(of, None), anchors, depths, TreeShape(8, 2), draw)
        return grown.parents.tolist(), grown.chance

    whole, _ = tree(logits)
    parents, chance = tree(broken)
    assert [p for p in parents[0] if p != NO_NODE] == [0, 0]
    assert parents[1] == whole[1]
    assert chance[0].isnan().any(), "it is counted"
    assert not chance[1].isnan().any()


def test_nan_does_not_pass_for_a_sound_draft() -> None:
    from dspark_sgl.spec_algos.protocol import Proposal

    tokens = torch.zeros(1, 3, dtype=torch.int64)
    proposal = Proposal(tokens, token_probs=torch.tensor([[0.5, torch.nan, 1.0]]))
    assert proposal.unsound is not None and proposal.unsound.tolist() == [[False, True, False]]
    assert replace(proposal, token_probs=None).unsound is None

"""Recorded drafts are the drafts that would have been made without a recording. The recordings need a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dspark_sgl.kernels.draft_chain import ChainDraw
from dspark_sgl.kernels.sequential_head import SequentialHead, draft_chain
from dspark_sgl.kernels.tree_children import TreeDraw
from dspark_sgl.kernels.tree_draft import MarkovChildren, TreeShape, grow_tree
from dspark_sgl.spec_algos.draft_graph import DraftGraphs, DraftInputs
from dspark_sgl.spec_algos.protocol import Proposal

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="recordings are CUDA graphs")
HIDDEN, DEPTH, VOCAB, RANK = 32, 5, 500, 16
TREE = TreeShape(12, 3)


class Model:
    """Random weights of a head; `draft` is what a drafter would have recorded."""

    def __init__(self, device: str) -> None:
        g = torch.Generator(device).manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, device=device)

        self.head = SequentialHead(random(VOCAB, RANK), random(VOCAB, RANK))
        self.lm_head, self.generator = random(VOCAB, HIDDEN), torch.Generator(device).manual_seed(1)
        self._random, self._device = random, device

    def inputs(self, requests: int, drawn: bool) -> DraftInputs:
        every = torch.arange(requests, device=self._device)
        temperature = 0.5 + 0.1 * every if drawn else None
        greedy = every % 3 == 0 if drawn else every >= 0
        return DraftInputs(self._random(requests, DEPTH, HIDDEN), 7 + every, greedy, temperature, 1 + every % DEPTH)

    def draft(self, tree: TreeShape | None, inputs: DraftInputs) -> Proposal:
        logits = inputs.hidden @ self.lm_head.T
        if tree is None:
            draw = ChainDraw(None, inputs.temperature, inputs.greedy, self.generator)
            chain = draft_chain(self.head, logits, inputs.hidden, inputs.anchors, draw)
            return Proposal.of_chain(chain, None)
        at_random = None
        if inputs.temperature is not None:
            at_random = TreeDraw(inputs.temperature, inputs.greedy, self.generator)
        assert inputs.depths is not None
        children = MarkovChildren(self.head, logits, inputs.hidden, None)
        grown = grow_tree(children, inputs.anchors, inputs.depths, tree, at_random)
        return Proposal(grown.tokens, grown.parents, confidence=grown.chance, drawn=grown.drawn)


def test_room_holds_more_requests_and_keeps_what_it_is_filled_with() -> None:
    inputs = Model("cpu").inputs(3, drawn=True)
    room = inputs.room(4)
    assert room.hidden.shape == (4, DEPTH, HIDDEN) and room.temperature is not None and room.depths is not None
    assert room.depths.tolist() == [0] * 4 and room.greedy.all()
    room.fill(inputs)
    assert room.depths.tolist() == [1, 2, 3, 0] and torch.equal(room.hidden[:3], inputs.hidden)
    assert torch.equal(room.temperature[:3], inputs.temperature)


def test_all_recordings_share_one_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    graphs = DraftGraphs(most_values=100)
    assert graphs.reserve(TreeShape(4, 2), 3, 10, 10)  # four requests' worth: 60 are left
    assert not graphs.reserve(TreeShape(5, 2), 4, 10, 10), "more than half of that"
    assert graphs.reserve(TreeShape(5, 2), 2, 10, 10)  # 40
    assert graphs.reserve(TreeShape(4, 2), 4, 10, 10), "what is there already costs nothing"
    assert graphs.reserve(TreeShape(6, 2), 8, 0, 10), "what is chosen keeps nothing"
    assert not graphs.reserve(TreeShape(7, 2), 8, 0, 20), "more at work than there ever was room for"
    assert graphs.reserve(None, 2, 10, 1) and not graphs.reserve(None, 4, 10, 1)


@pytest.mark.parametrize("tree", [None, TREE], ids=["chain", "tree"])
def test_the_first_requests_of_a_proposal(tree: TreeShape | None) -> None:
    model = Model("cpu")
    whole = model.draft(tree, model.inputs(5, drawn=True))
    part = whole.first(2)
    assert torch.equal(part.tokens, whole.tokens[:2])
    if tree is None:
        assert part.distribution is not None and len(part.distribution.probs) == 2
        assert part.token_probs is not None and len(part.token_probs) == 2
    else:
        assert part.parents is not None and part.confidence is not None and part.drawn is not None
        assert {len(part.parents), len(part.confidence), len(part.drawn.probs), len(part.drawn.place)} == {2}


def anchors_q(proposal: Proposal) -> Tensor:
    """`[bs, Vq]`."""
    assert proposal.drawn is not None
    return proposal.drawn.probs[torch.arange(len(proposal.tokens)), proposal.drawn.place[:, 0]]


@needs_gpu
@pytest.mark.parametrize("tree", [None, TREE], ids=["chain", "tree"])
def test_a_replay_drafts_what_an_eager_pass_does(tree: TreeShape | None) -> None:
    model, graphs = Model("cuda"), DraftGraphs()
    for requests in (1, 3, 4, 2, 7, 3):
        inputs = model.inputs(requests, drawn=False)
        got = graphs.run(tree, lambda given: model.draft(tree, given), inputs, model.generator)
        wanted = model.draft(tree, inputs)
        assert torch.equal(got.tokens, wanted.tokens)
        if tree is not None:
            assert got.parents is not None and wanted.parents is not None
            assert got.confidence is not None and wanted.confidence is not None
            assert torch.equal(got.parents, wanted.parents)
            assert torch.allclose(got.confidence, wanted.confidence, atol=1e-5)


@needs_gpu
@pytest.mark.parametrize("tree", [None, TREE], ids=["chain", "tree"])
def test_every_replay_tosses_new_coins(tree: TreeShape | None) -> None:
    model, graphs = Model("cuda"), DraftGraphs()
    inputs, seen = model.inputs(6, drawn=True), []
    for _ in range(8):
        got = graphs.run(tree, lambda given: model.draft(tree, given), inputs, model.generator)
        seen.append(got.tokens.clone())
        probs = got.distribution.probs if tree is None else anchors_q(got)  # type: ignore[union-attr]
        sums = probs.sum(-1)
        assert torch.allclose(sums, (sums > 0.5).float(), atol=1e-4)  # 1 where drawn, 0 of greedy requests
    changed = (torch.stack(seen) != seen[0]).flatten(2).any(-1).any(0)
    assert changed.tolist() == [not greedy for greedy in inputs.greedy.tolist()]


@needs_gpu
def test_a_recording_follows_the_generators_seed() -> None:
    model, graphs = Model("cuda"), DraftGraphs()
    inputs, drawn = model.inputs(4, drawn=True), []
    for seed in (5, 6, 5):
        graphs.run(None, lambda given: model.draft(None, given), inputs, model.generator)  # recorded by now
        model.generator.manual_seed(seed)
        got = graphs.run(None, lambda given: model.draft(None, given), inputs, model.generator)
        drawn.append(got.tokens.clone())
    assert torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[0], drawn[1])

"""Which acceptance a batch gets, and that a greedy request among sampled ones emits its argmax whichever it is."""

from __future__ import annotations

import pytest
import torch

from dspark_sgl.kernels.draft_chain import ChainDraw, draw_at_once
from dspark_sgl.kernels.filters import Filters
from dspark_sgl.kernels.layout import chain_layout
from dspark_sgl.sampling import Sampling, accept
from dspark_sgl.spec_algos.protocol import Proposal

VOCAB, DEPTH = 12, 3


@pytest.mark.parametrize("method", ["match", "auto"])
def test_a_greedy_request_among_sampled_ones_emits_its_argmax(method: str) -> None:
    g, bs = torch.Generator().manual_seed(0), 40
    greedy, ones = torch.arange(bs) % 2 == 0, torch.ones(bs)
    top_k = torch.full((bs,), 1 << 30).masked_fill(greedy, 1)
    sampling = Sampling(Filters(ones, top_k, ones, 0 * ones, active=True), greedy, all_greedy=False, any_greedy=True)
    draw = ChainDraw(None, None if method == "match" else ones, greedy, g)
    chain = draw_at_once(torch.randn(bs, DEPTH, VOCAB, generator=g), draw)
    layout = chain_layout(torch.zeros(bs, dtype=torch.int64), chain.tokens, [DEPTH] * bs)
    logits = torch.randn(len(layout.owner), VOCAB, generator=g)
    given = logits.clone()
    proposal = Proposal(chain.tokens, None, chain.distribution, chain.token_probs)
    accepted = accept(layout, logits, proposal, sampling, method, g)
    assert torch.equal(logits, given)
    best, emitted = layout.pad(logits.argmax(-1)), accepted.emitted(layout)
    for i, length in enumerate(accepted.lengths.tolist()):
        said = emitted[i, :length].tolist() == best[i, :length].tolist()
        assert said or not greedy[i]
    assert (accepted.lengths[greedy] > 1).any() and not torch.equal(accepted.bonus, best[:, 0])

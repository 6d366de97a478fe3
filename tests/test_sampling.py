"""A batch of unlike requests: each is accepted by its own distribution, whichever acceptance the batch gets."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import chisquare

from dspark_sgl.cpu_seeds import multinomial_with_seed
from dspark_sgl.deterministic import seeded_draw
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
    filters = Filters(ones, top_k, ones, 0 * ones, active=True)
    sampling = Sampling(filters, 7 * ones.long(), greedy, all_greedy=False, any_greedy=True)
    draw = ChainDraw(None, None if method == "match" else ones, greedy, g)
    chain = draw_at_once(torch.randn(bs, DEPTH, VOCAB, generator=g), draw)
    layout = chain_layout(torch.zeros(bs, dtype=torch.int64), chain.tokens, [DEPTH] * bs)
    logits = torch.randn(len(layout.owner), VOCAB, generator=g)
    given = logits.clone()
    proposal = Proposal.of_chain(chain, None)
    accepted = accept(layout, logits, proposal, sampling, method, g)
    assert torch.equal(logits, given)
    best, emitted = layout.pad(logits.argmax(-1)), accepted.emitted(layout)
    for i, length in enumerate(accepted.lengths.tolist()):
        said = emitted[i, :length].tolist() == best[i, :length].tolist()
        assert said or not greedy[i]
    assert (accepted.lengths[greedy] > 1).any() and not torch.equal(accepted.bonus, best[:, 0])


@pytest.mark.parametrize("method", ["match", "auto"])
@pytest.mark.parametrize("bounded", [True, False], ids=["all top-k", "some unfiltered"])
def test_sampled_requests_beside_others_keep_their_distribution(method: str, bounded: bool) -> None:
    """Thousands of each kind with the same target and q; the first token of each is counted by kind."""
    g, bs = torch.Generator().manual_seed(1), 9000
    kind = torch.arange(bs) % 3
    greedy, ones = kind == 0, torch.ones(bs)
    widest = 6 if bounded else 1 << 30
    top_k = torch.tensor([1, 3, widest])[kind]
    temperature = torch.tensor([1.0, 0.7, 1.3])[kind]
    filters = Filters(temperature, top_k, ones, 0 * ones, active=True, max_top_k=widest)
    sampling = Sampling(filters, 7 * ones.long(), greedy, all_greedy=False, any_greedy=True)
    said, off = torch.randn(2, VOCAB, generator=g)
    chain = draw_at_once(
        (said + 0.7 * off).expand(bs, 1, VOCAB), ChainDraw(None, None if method == "match" else temperature, greedy, g)
    )
    layout = chain_layout(torch.zeros(bs, dtype=torch.int64), chain.tokens, [1] * bs)
    proposal = Proposal.of_chain(chain, None)
    accepted = accept(layout, said.expand(2 * bs, VOCAB).clone(), proposal, sampling, method, g)
    first = accepted.emitted(layout)[:, 0]
    assert (first[greedy] == said.argmax()).all()
    assert (accepted.lengths > 1).double().mean() > 0.05
    expected = []
    for warmth, kept in ((0.7, 3), (1.3, widest)):
        p = torch.softmax(said.double() / warmth, 0)
        p[p.argsort(descending=True)[kept:]] = 0
        expected.append(p / p.sum())
    for i, p in enumerate(expected):
        counts = first[kind == i + 1].bincount(minlength=VOCAB)
        assert counts[p == 0].sum() == 0
        assert chisquare(counts[p > 0], (p * counts.sum())[p > 0]).pvalue > 1e-4
        other = expected[1 - i] + 1e-9
        assert chisquare(counts, other / other.sum() * counts.sum()).pvalue < 1e-6


@pytest.mark.parametrize("active", [False, True], ids=["whole distributions", "filtered"])
def test_a_seeded_round_emits_what_plain_steps_draw(active: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every row what is drawn from it alone. That SGLang draws the same is `test_server_deterministic.py`'s."""
    monkeypatch.setattr("sglang.srt.layers.sampler.multinomial_with_seed", multinomial_with_seed)
    g, bs = torch.Generator().manual_seed(2), 60
    lens, seeds = torch.randint(1, 900, (bs,), generator=g), torch.randint(0, 1 << 40, (bs,), generator=g)
    greedy, ones = torch.arange(bs) % 5 == 0, torch.ones(bs)
    temperature = torch.where(greedy, 1.0, 0.3 + torch.rand(bs, generator=g))
    top_k = torch.full((bs,), 5 if active else VOCAB).masked_fill(greedy, 1)
    filters = Filters(temperature, top_k, 0.9 * ones if active else ones, 0 * ones, active or bool(greedy.any()))
    sampling = Sampling(filters, lens, greedy, all_greedy=False, any_greedy=True, seeds=seeds)
    depths = [i % (DEPTH + 1) for i in range(bs)]
    layout = chain_layout(torch.zeros(bs, dtype=torch.int64), torch.zeros(bs, DEPTH, dtype=torch.int64), depths)
    logits = 2 * torch.randn(len(layout.owner), VOCAB, generator=g)
    logits[:, 0] += 3  # what is drafted everywhere
    chain = draw_at_once(torch.zeros(bs, DEPTH, VOCAB), ChainDraw(None, None, greedy, g))
    accepted = accept(layout, logits, Proposal.of_chain(chain, None), sampling, "auto", g)
    emitted = accepted.emitted(layout)
    assert accepted.lengths.max() == DEPTH + 1
    for i, length in enumerate(accepted.lengths.tolist()):
        rows = logits[int(layout.starts[i]) :][:length]
        for depth, row in enumerate(rows):
            one = filters.rows(torch.tensor([i]))
            drawn = seeded_draw(row[None], one, seeds[i : i + 1], lens[i : i + 1] + depth)
            assert int(emitted[i, depth]) == int(drawn)
            assert not greedy[i] or int(drawn) == int(row.argmax())

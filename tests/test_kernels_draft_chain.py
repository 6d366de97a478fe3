"""Independent positions: the draws against their distribution, and a confidence that does not read what was drawn."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import chisquare

from dspark_sgl.kernels.draft_chain import ChainDraw, certainty, draw_at_once
from dspark_sgl.kernels.layout import chain_layout
from dspark_sgl.kernels.rejection import reject_chain

VOCAB, BATCH, DEPTH = 11, 3, 5
HOT = torch.tensor([0, 2, 3, 7, 9])


def seeded(vocab: torch.Tensor | None, temperature: torch.Tensor | None, greedy: torch.Tensor) -> ChainDraw:
    return ChainDraw(vocab, temperature, greedy, torch.Generator().manual_seed(0))


def test_greedy_drafts_are_the_argmax_over_the_hot_rows() -> None:
    logits = torch.randn(BATCH, DEPTH, len(HOT))
    chain = draw_at_once(logits, seeded(HOT, None, torch.ones(BATCH, dtype=torch.bool)))
    assert torch.equal(chain.tokens, HOT[logits.argmax(-1)])
    assert chain.distribution is None and chain.token_probs is None


@pytest.mark.parametrize("vocab", [None, HOT])
def test_every_position_is_drawn_from_its_own_distribution_at_its_requests_temperature(
    vocab: torch.Tensor | None,
) -> None:
    torch.manual_seed(0)
    half, columns = 20_000, VOCAB if vocab is None else len(vocab)
    logits = torch.randn(1, 2, columns).expand(2 * half, 2, columns)
    temperature = torch.tensor([0.7, 1.5]).repeat_interleave(half)
    chain = draw_at_once(logits, seeded(vocab, temperature, torch.zeros(2 * half, dtype=torch.bool)))
    assert chain.distribution is not None and chain.token_probs is not None
    for requests, heat in ((slice(0, half), 0.7), (slice(half, None), 1.5)):
        for k in range(2):
            wanted = torch.softmax(logits[0, k].double() / heat, -1)
            counts = torch.bincount(chain.tokens[requests, k], minlength=VOCAB)
            counts = counts if vocab is None else counts[vocab]
            assert counts.sum() == half
            assert chisquare(counts.numpy(), (wanted * half).numpy()).pvalue > 1e-4
            torch.testing.assert_close(chain.distribution.probs[requests.start, k], wanted.float())
    first, second = (chain.tokens[:half] == (0 if vocab is None else vocab[0])).double().T
    assert abs(float((first * second).mean() - first.mean() * second.mean())) < 0.01, "positions know nothing of others"


def test_a_greedy_request_in_a_sampled_batch_leaves_nothing_to_subtract() -> None:
    greedy = torch.tensor([True, False, False])
    logits = torch.randn(BATCH, DEPTH, VOCAB)
    chain = draw_at_once(logits, seeded(None, torch.ones(BATCH), greedy))
    assert chain.distribution is not None and chain.token_probs is not None
    assert torch.equal(chain.tokens[0], logits[0].argmax(-1))
    assert chain.distribution.probs[0].abs().sum() == 0 and bool((chain.token_probs[0] == 1).all())
    assert float(chain.distribution.probs[1:].sum(-1).sub(1).abs().max()) < 1e-5


def test_certainty_is_the_chance_of_the_likeliest_token() -> None:
    logits = torch.randn(BATCH, DEPTH, VOCAB)
    torch.testing.assert_close(certainty(logits), torch.softmax(logits, -1).amax(-1))


@pytest.mark.parametrize("honest", [True, False])
def test_a_confidence_that_reads_the_drawn_token_would_bias_the_output(honest: bool) -> None:
    """One draft, verified if its confidence passes a threshold. q = (0.9, 0.1), p = (0.5, 0.5): by the drawn token's
    chance the second token is never put to the test, and p(first) is 0.9 min(1, 5/9) + 0.1 * 0.5 = 0.55."""
    n = 40_000
    logits = torch.tensor([0.9, 0.1]).log().expand(n, 1, 2)
    chain = draw_at_once(logits, seeded(None, torch.ones(n), torch.zeros(n, dtype=torch.bool)))
    assert chain.distribution is not None and chain.token_probs is not None
    confidence = certainty(logits) if honest else chain.token_probs
    depths = (confidence[:, 0] > 0.5).long().tolist()
    layout = chain_layout(torch.zeros(n, dtype=torch.int64), chain.tokens, depths)
    target = torch.full((sum(layout.widths), 2), 0.5)
    accepted = reject_chain(layout, target, chain.distribution, chain.token_probs, torch.Generator().manual_seed(1))
    counts = torch.bincount(accepted.emitted(layout)[:, 0], minlength=2)
    assert (chisquare(counts.numpy()).pvalue > 1e-4) == honest

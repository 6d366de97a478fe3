"""The sequential and confidence heads against SGLang's own modules, and the draws against their distribution."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from scipy.stats import chisquare
from sglang.srt.models.dspark import DSparkConfidenceHead, build_markov_head
from torch import Tensor

from dspark_sgl.kernels.draft_chain import ChainDraw
from dspark_sgl.kernels.sequential_head import Linear, SequentialHead, confidence, draft_chain

VOCAB, RANK, HIDDEN, BATCH, DEPTH = 11, 4, 8, 3, 5


def heads(kind: str, vocab: Tensor | None = None) -> tuple[torch.nn.Module, SequentialHead]:
    torch.manual_seed(0)
    config = SimpleNamespace(vocab_size=VOCAB, hidden_size=HIDDEN, markov_rank=RANK, markov_head_type=kind)
    module = build_markov_head(config)
    w2 = module.markov_w2.weight
    ours = SequentialHead(
        w1=module.markov_w1.weight,
        w2=w2 if vocab is None else w2[vocab],
        gate=Linear(module.gate_proj.weight, module.gate_proj.bias) if kind == "gated" else None,
        joint=Linear(module.joint_proj.weight, module.joint_proj.bias) if kind == "rnn" else None,
    )
    return module, ours


@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn"])
@torch.no_grad()
def test_bias_and_state_equal_sglangs(kind: str) -> None:
    module, ours = heads(kind)
    hidden = torch.randn(BATCH, DEPTH, HIDDEN)
    theirs_state, state = module.init_state(hidden), ours.initial_state(BATCH)
    for k in range(DEPTH):
        previous = torch.randint(VOCAB, (BATCH,))
        wanted, theirs_state = module.step_bias(previous, hidden_states=hidden[:, k], state=theirs_state)
        got, state = ours.step(previous, hidden[:, k], state)
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn"])
@torch.no_grad()
def test_greedy_chain_is_the_step_by_step_argmax_over_the_hot_rows(kind: str) -> None:
    hot = torch.tensor([0, 2, 3, 7, 9])
    module, ours = heads(kind, hot)
    hidden, base = torch.randn(BATCH, DEPTH, HIDDEN), torch.randn(BATCH, DEPTH, len(hot))
    anchors = torch.randint(VOCAB, (BATCH,))
    greedy = torch.ones(BATCH, dtype=torch.bool)
    chain = draft_chain(ours, base, hidden, anchors, ChainDraw(hot, None, greedy, torch.Generator()))
    previous, state = anchors, module.init_state(hidden)
    for k in range(DEPTH):
        bias, state = module.step_bias(previous, hidden_states=hidden[:, k], state=state)
        previous = hot[(base[:, k] + bias[:, hot]).argmax(-1)]
        assert torch.equal(chain.tokens[:, k], previous)
    assert chain.distribution is None


@torch.no_grad()
def test_sampled_tokens_have_the_distribution_that_is_reported() -> None:
    _, ours = heads("vanilla")
    samples = 20_000
    base, hidden = torch.randn(1, 2, VOCAB).expand(samples, 2, VOCAB), torch.zeros(samples, 2, HIDDEN)
    chain = draft_chain(
        ours,
        base,
        hidden,
        torch.zeros(samples, dtype=torch.int64),
        ChainDraw(
            None,
            torch.full((samples,), 0.7),
            torch.zeros(samples, dtype=torch.bool),
            torch.Generator().manual_seed(0),
        ),
    )
    assert chain.distribution is not None and chain.token_probs is not None
    first = torch.bincount(chain.tokens[:, 0], minlength=VOCAB)
    expected = chain.distribution.probs[0, 0].double()
    assert chisquare(first.numpy(), (expected / expected.sum() * samples).numpy()).pvalue > 1e-4
    common = int(first.argmax())
    after = chain.tokens[chain.tokens[:, 0] == common]
    row = chain.distribution.probs[chain.tokens[:, 0] == common][0, 1].double()
    counts = torch.bincount(after[:, 1], minlength=VOCAB)
    assert chisquare(counts.numpy(), (row / row.sum() * len(after)).numpy()).pvalue > 1e-4
    torch.testing.assert_close(
        chain.token_probs, chain.distribution.probs.gather(2, chain.tokens[:, :, None]).squeeze(2)
    )


@torch.no_grad()
def test_a_greedy_request_in_a_sampled_batch_leaves_nothing_to_subtract() -> None:
    _, ours = heads("vanilla")
    greedy = torch.tensor([True, False, False])
    chain = draft_chain(
        ours,
        torch.randn(BATCH, DEPTH, VOCAB),
        torch.zeros(BATCH, DEPTH, HIDDEN),
        torch.zeros(BATCH, dtype=torch.int64),
        ChainDraw(None, torch.ones(BATCH), greedy, torch.Generator().manual_seed(0)),
    )
    assert chain.distribution is not None and chain.token_probs is not None
    assert chain.distribution.probs[0].abs().sum() == 0 and bool((chain.token_probs[0] == 1).all())


@pytest.mark.parametrize("with_markov", [True, False])
@torch.no_grad()
def test_confidence_equals_sglangs(with_markov: bool) -> None:
    module, ours = heads("vanilla")
    head = DSparkConfidenceHead(hidden_size=HIDDEN, markov_rank=RANK, with_markov=with_markov)
    hidden = torch.randn(BATCH, DEPTH, HIDDEN)
    anchors, tokens = torch.randint(VOCAB, (BATCH,)), torch.randint(VOCAB, (BATCH, DEPTH))
    wanted, _ = head.predict(hidden.flatten(0, 1), anchor_tokens=anchors, draft_tokens=tokens, markov_head=module)
    got = confidence(ours, Linear(head.proj.weight, head.proj.bias), hidden, anchors, tokens)
    torch.testing.assert_close(got, wanted.view(BATCH, DEPTH))

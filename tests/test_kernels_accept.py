"""Acceptance is exact: what a round emits is distributed as the target's own samples. Biased variants must fail.

The target here is a table: p(next | last token), so that the distribution of any continuation is known in closed form.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from dspark_sgl.kernels.filters import Filters, filtered_probs
from dspark_sgl.kernels.layout import TreeLayout, chain_layout, tree_layout
from dspark_sgl.kernels.rejection import DraftDistribution, draw, reject_chain
from dspark_sgl.kernels.walk import NO_ROW, Acceptance, walk

VOCAB, SAMPLES = 6, 60_000
REJECT_BELOW = 1e-4
"""Of a correct sampler, one run in ten thousand fails; seeds are fixed, so a failure is not chance."""


def table(seed: int, sharpness: float) -> Tensor:
    """float32 `[VOCAB, VOCAB]`: row v is the distribution after token v."""
    g = torch.Generator().manual_seed(seed)
    return torch.softmax(torch.randn(VOCAB, VOCAB, generator=g) * sharpness, dim=-1)


def draw_chain(q: Tensor, anchors: Tensor, depth: int, g: torch.Generator) -> tuple[Tensor, DraftDistribution, Tensor]:
    tokens, probs, last = [], [], anchors
    for _ in range(depth):
        probs.append(q[last])
        last = draw(probs[-1], g)
        tokens.append(last)
    drafts, distribution = torch.stack(tokens, 1), DraftDistribution(torch.stack(probs, 1), None)
    return drafts, distribution, distribution.of(drafts)


def chain_rejection(p: Tensor, q: Tensor, anchors: Tensor, g: torch.Generator) -> tuple[TreeLayout, Acceptance]:
    drafts, distribution, of = draw_chain(q, anchors, 2, g)
    layout = chain_layout(anchors, drafts, [2] * len(anchors))
    return layout, reject_chain(layout, layout.pack(p[layout.tokens]), distribution, of, g)


def chain_match(p: Tensor, q: Tensor, anchors: Tensor, g: torch.Generator) -> tuple[TreeLayout, Acceptance]:
    drafts, _, _ = draw_chain(q, anchors, 2, g)
    layout = chain_layout(anchors, drafts, [2] * len(anchors))
    return layout, walk(layout, layout.pad(draw(layout.pack(p[layout.tokens]), g)))


def tree_match(p: Tensor, q: Tensor, anchors: Tensor, g: torch.Generator) -> tuple[TreeLayout, Acceptance]:
    """Two best children of the anchor, and the best child of each."""
    first = q[anchors].topk(2).indices
    second = q[first].argmax(-1)
    drafts = torch.cat([first, second], dim=1)
    parents = torch.tensor([0, 0, 1, 2]).expand(len(anchors), 4)
    layout = tree_layout(anchors, drafts, parents, torch.ones_like(parents, dtype=torch.bool))
    return layout, walk(layout, layout.pad(draw(layout.pack(p[layout.tokens]), g)))


def greedy_about_the_draft(p: Tensor, q: Tensor, anchors: Tensor, g: torch.Generator) -> tuple[TreeLayout, Acceptance]:
    """Biased on purpose: resamples from p, not from the residual, after a rejection."""
    layout, accepted = chain_rejection(p, q, anchors, g)
    after = layout.tokens.gather(1, accepted.lengths[:, None] - 1).squeeze(1)
    return layout, Acceptance(accepted.path, accepted.lengths, draw(p[after], g))


def choosing_what_was_drawn(p: Tensor, q: Tensor, anchors: Tensor, g: torch.Generator) -> tuple[TreeLayout, Acceptance]:
    """Biased on purpose: offers a draft only when it turned out probable, the anticipation the paper warns of."""
    drafts, distribution, of = draw_chain(q, anchors, 2, g)
    depths = torch.where(of[:, 0] > 1 / VOCAB, 2, 0).tolist()
    layout = chain_layout(anchors, drafts, depths)
    return layout, reject_chain(layout, layout.pack(p[layout.tokens]), distribution, of, g)


def p_value(method: Callable[..., tuple[TreeLayout, Acceptance]], p: Tensor, q: Tensor, seed: int) -> float:
    """Chi-square of the first three tokens against p(a) p(b|a) p(c|b), over rounds until three are emitted."""
    g = torch.Generator().manual_seed(seed)
    anchors = torch.zeros(SAMPLES, dtype=torch.int64)
    text, written = torch.zeros(SAMPLES, 16, dtype=torch.int64), torch.zeros_like(anchors)
    for _ in range(3):
        layout, accepted = method(p, q, anchors, g)
        # Each round writes over what the one before left behind its end.
        emitted = accepted.emitted(layout)
        text.scatter_(1, written[:, None] + torch.arange(emitted.shape[1]), emitted)
        written += accepted.lengths
        anchors = accepted.bonus
    code = text[:, 0] * VOCAB**2 + text[:, 1] * VOCAB + text[:, 2]
    observed = torch.bincount(code, minlength=VOCAB**3).double()
    expected = torch.tensor(
        [p[0, a] * p[a, b] * p[b, c] for a, b, c in itertools.product(range(VOCAB), repeat=3)], dtype=torch.float64
    )
    # Cells too rare for the approximation are pooled.
    rare = expected * SAMPLES < 5
    observed = torch.cat([observed[~rare], observed[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    expected, observed = expected[expected > 0], observed[expected > 0]
    return float(chisquare(observed.numpy(), (expected / expected.sum() * SAMPLES).numpy()).pvalue)


def distributions(temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    logits = table(1, 1.5).log()
    rows = torch.ones(VOCAB)
    filters = Filters(rows * temperature, (rows * VOCAB).long(), rows * top_p, rows * 0, active=top_p < 1)
    return filtered_probs(logits, filters), table(2, 1.0)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.9)])
@pytest.mark.parametrize("method", [chain_rejection, chain_match, tree_match])
def test_emitted_text_has_the_targets_distribution(
    method: Callable[..., tuple[TreeLayout, Acceptance]], temperature: float, top_p: float
) -> None:
    assert p_value(method, *distributions(temperature, top_p), seed=3) > REJECT_BELOW


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.9)])
@pytest.mark.parametrize("method", [greedy_about_the_draft, choosing_what_was_drawn])
def test_a_biased_sampler_is_caught(
    method: Callable[..., tuple[TreeLayout, Acceptance]], temperature: float, top_p: float
) -> None:
    assert p_value(method, *distributions(temperature, top_p), seed=3) < 1e-12


def test_the_papers_counter_example_is_biased() -> None:
    """SPS(1,2,3) = 1, 0.5, 0.45; p = (0.7, 0.3), q = (0.5, 0.5): looking at x_1 first emits A with 0.85."""
    g = torch.Generator().manual_seed(0)
    anchors = torch.zeros(SAMPLES, dtype=torch.int64)
    p, q = torch.tensor([[0.7, 0.3], [0.7, 0.3]]), torch.tensor([[0.5, 0.5], [0.5, 0.5]])
    drafts, distribution, of = draw_chain(q, anchors, 2, g)
    retrospective = torch.where(drafts[:, 0] == 0, 2, 0).tolist()
    for depths, share in ((retrospective, 0.85), ([2] * SAMPLES, 0.7)):
        layout = chain_layout(anchors, drafts, depths)
        accepted = reject_chain(layout, layout.pack(p[layout.tokens]), distribution, of, g)
        assert (accepted.emitted(layout)[:, 0] == 0).double().mean() == pytest.approx(share, abs=0.01)


def test_a_rejected_token_outside_the_drafts_vocabulary_can_be_drawn() -> None:
    """A draft over a hot vocabulary leaves the rest to the residual."""
    g = torch.Generator().manual_seed(0)
    p = table(4, 1.0)
    hot = torch.tensor([1, 4])
    anchors = torch.zeros(SAMPLES, dtype=torch.int64)
    q = torch.tensor([0.3, 0.7]).expand(SAMPLES, 1, 2)
    column = draw(q[:, 0], g)[:, None]
    distribution = DraftDistribution(q, hot)
    layout = chain_layout(anchors, hot[column], [1] * SAMPLES)
    accepted = reject_chain(layout, layout.pack(p[layout.tokens]), distribution, distribution.of(column), g)
    counts = torch.bincount(accepted.emitted(layout)[:, 0], minlength=VOCAB)
    assert chisquare(counts.numpy(), (p[0].double() / p[0].double().sum() * SAMPLES).numpy()).pvalue > REJECT_BELOW


@pytest.mark.parametrize("seed", range(40))
def test_walk_follows_the_target(seed: int) -> None:
    """Against a walk written as a loop, on random trees of every shape."""
    g = torch.Generator().manual_seed(seed)
    bs, nodes = 1 + seed % 4, 1 + seed % 8
    drafts = torch.randint(3, (bs, nodes), generator=g)
    parents = torch.stack([torch.randint(0, n + 1, (bs,), generator=g) for n in range(nodes)], dim=1)
    layout = tree_layout(parents.new_zeros(bs), drafts, parents, torch.ones_like(parents, dtype=torch.bool))
    target = torch.randint(3, (bs, layout.max_width), generator=g)
    accepted = walk(layout, target)
    for i in range(bs):
        row, emitted = 0, []
        while True:
            wanted = int(target[i, row])
            emitted.append(wanted)
            children = [
                r for r in range(1, layout.widths[i]) if layout.parents[i, r] == row and layout.tokens[i, r] == wanted
            ]
            if not children:
                break
            row = children[0]
        assert accepted.emitted(layout)[i, : accepted.lengths[i]].tolist() == emitted
        assert (accepted.path[i] != NO_ROW).sum() == len(emitted) and accepted.bonus[i] == emitted[-1]


@pytest.mark.parametrize("seed", range(60))
def test_filters_equal_the_full_sort(seed: int) -> None:
    """The leading-columns shortcut keeps exactly what sorting the whole row keeps."""
    g = torch.Generator().manual_seed(seed)
    rows, vocab = 3, [50, 3000][seed % 2]
    logits = torch.randn(rows, vocab, generator=g) * [0.2, 1, 4][seed % 3]
    temperature = torch.rand(rows, generator=g) + 0.5
    top_k = torch.randint(1, vocab, (rows,), generator=g)
    top_p = torch.rand(rows, generator=g)
    min_p = torch.rand(rows, generator=g) * 0.2 * (seed % 2)
    got = filtered_probs(logits, Filters(temperature, top_k, top_p, min_p, active=True))
    for row in range(rows):
        probs = torch.softmax(logits[row] / temperature[row], -1)
        values, order = probs.sort(descending=True)
        keep, total = torch.zeros(vocab, dtype=torch.bool), 0.0
        for rank in range(vocab):
            keep[rank] = rank < top_k[row] and total <= top_p[row] and values[rank] >= min_p[row] * values[0]
            total += float(values[rank])
        wanted = torch.zeros(vocab).scatter_(0, order, values.where(keep, 0))
        assert torch.allclose(got[row], wanted / wanted.sum(), atol=1e-5)


def test_a_row_that_filters_nothing_stays_as_it_is_and_has_nobody_sorted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flat over 3000 columns, it would never end within the leading ones; the row beside it does."""
    logits = torch.randn(2, 3000, generator=torch.Generator().manual_seed(0)) * torch.tensor([[0.01], [4.0]])
    given, ones = logits.clone(), torch.ones(2)
    filters = Filters(ones * 0.8, torch.tensor([1 << 30, 1 << 30]), torch.tensor([1.0, 0.9]), ones * 0, active=True)
    alone = filtered_probs(logits[1:], filters.rows(torch.tensor([1])))
    monkeypatch.setattr(Tensor, "sort", lambda *_, **__: pytest.fail("sorted"))
    got = filtered_probs(logits, filters)
    assert torch.equal(logits, given), "the caller's logits"
    assert torch.equal(got[0], torch.softmax(logits[0] / 0.8, -1))
    assert torch.equal(got[1:], alone) and 0 < int((got[1] > 0).sum()) < 1000


def test_a_bound_on_top_k_needs_no_look_at_the_probabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, ones = torch.randn(4, 3000, generator=torch.Generator().manual_seed(1)), torch.ones(4)
    filters = Filters(ones, torch.tensor([1, 5, 40, 17]), torch.tensor([1.0, 0.3, 1.0, 0.999]), ones * 0, active=True)
    wanted = filtered_probs(logits, filters)
    monkeypatch.setattr("dspark_sgl.kernels.filters._ends_inside", lambda *_: pytest.fail("waited"))
    assert torch.allclose(filtered_probs(logits, replace(filters, max_top_k=40)), wanted, atol=1e-7)

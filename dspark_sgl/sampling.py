"""How a batch samples, and which acceptance is exact for it. Never touches KV or the scheduler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Generator, Tensor

from dspark_sgl.kernels.filters import Filters, filtered_probs
from dspark_sgl.kernels.layout import TreeLayout
from dspark_sgl.kernels.rejection import draw, reject_chain
from dspark_sgl.kernels.tree_rejection import reject_tree
from dspark_sgl.kernels.walk import Acceptance, walk
from dspark_sgl.spec_algos.protocol import Proposal

from .deterministic import seeded_draw


@dataclass(frozen=True)
class Sampling:
    """SGLang's sampling parameters of a batch, as the kernels take them.

    lens: int64 `[bs]`, the position of each anchor
    greedy: bool `[bs]`, temperature 0; all_greedy, any_greedy: every request is, some are
    seeds: int64 `[bs]`, to which SGLang ties every draw (`deterministic.py`); None where it does not
    """

    filters: Filters
    lens: Tensor
    greedy: Tensor
    all_greedy: bool
    any_greedy: bool
    seeds: Tensor | None = None

    @classmethod
    def of(cls, info: Any, lens: Tensor) -> Sampling:
        """From a `SamplingBatchInfo`. SGLang spells temperature 0 as top_k = 1."""
        filters = Filters(
            temperature=info.temperatures.view(-1),
            top_k=info.top_ks.view(-1),
            top_p=info.top_ps.view(-1),
            min_p=info.min_ps.view(-1),
            active=info.need_top_p_sampling or info.need_top_k_sampling or info.need_min_p_sampling,
            max_top_k=info.max_top_k,
        )
        return cls(filters, lens, filters.top_k <= 1, info.is_all_greedy, info.is_any_greedy, info.sampling_seed)

    def draft_temperature(self, method: str) -> Tensor | None:
        """What a drafter samples at; None where the likeliest drafts are best: when nobody samples, and where they have
        to match a draw of the target's own."""
        likeliest = self.all_greedy or self.seeds is not None or method == "match"
        return None if likeliest else self.filters.temperature


def accept(
    layout: TreeLayout, logits: Tensor, proposal: Proposal, sampling: Sampling, method: str, generator: Generator
) -> Acceptance:
    """Decide what one round emits; exact for every method.

    logits: `[rows, V]`, constrained; method: `match`, or `rejection` (also `auto`): rejection where the drafts were
    drawn at random from a known q, match elsewhere
    """
    if sampling.all_greedy:
        return walk(layout, layout.pad(logits.argmax(-1)))
    owner = layout.owner
    if sampling.seeds is not None:
        positions = layout.pack(sampling.lens[:, None] + layout.depths)
        drawn = seeded_draw(logits, sampling.filters.rows(owner), sampling.seeds[owner], positions)
        return walk(layout, layout.pad(drawn))
    probs = filtered_probs(logits, sampling.filters.rows(owner))
    if sampling.any_greedy:
        greedy, best = sampling.greedy[owner][:, None], logits.argmax(-1, keepdim=True)
        peak = probs.gather(1, best).masked_fill_(greedy, 1.0)
        probs.masked_fill_(greedy, 0.0).scatter_(1, best, peak)
    if method != "match":
        if proposal.drawn is not None:
            return reject_tree(layout, probs, proposal.drawn, generator)
        if proposal.distribution is not None and proposal.token_probs is not None and layout.is_chain:
            return reject_chain(layout, probs, proposal.distribution, proposal.token_probs, generator)
    return walk(layout, layout.pad(draw(probs, generator)))

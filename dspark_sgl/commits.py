"""What a drafter is told of each step: which rows entered the target's KV, and what came after each of them.

One function per kind of step. Reads SGLang's batch and output and changes neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dspark_sgl.spec_algos.protocol import Commit


def prefill_commit(batch: Any, sampled: Tensor, hidden: Tensor | None, kept: Tensor | None) -> Commit:
    """A prefill chunk.

    sampled: int64 `[bs]`, the token the target drew after each chunk; it counts where the prompt ends with the chunk
    kept: int64 `[m]`, the rows of the chunk that `hidden` has, None for all of them
    """
    starts, counts = list(batch.prefix_lens), list(batch.extend_lens)
    device = batch.input_ids.device
    positions = [torch.arange(start, start + count) for start, count in zip(starts, counts, strict=True)]
    successors = torch.empty_like(batch.input_ids, dtype=torch.int64)
    successors[:-1] = batch.input_ids[1:]
    last = torch.tensor(counts, device=device).cumsum(0) - 1
    successors[last] = _tails(batch.reqs, sampled)
    commit = Commit(
        positions=torch.cat(positions).to(device),
        cache_locs=batch.out_cache_loc,
        successors=successors,
        hidden=hidden,
        req_slots=batch.req_pool_indices,
        starts=starts,
        counts=counts,
    )
    return commit if kept is None else _of_rows(commit, kept)


def step_commit(batch: Any, starts: Sequence[int], slots: Tensor, anchors: Tensor, hidden: Tensor | None) -> Commit:
    """A plain decode step: one row per request, followed by the token just sampled.

    starts: tokens in each request's KV before the step; slots, anchors: int64 `[bs]`
    """
    return Commit(
        positions=torch.tensor(starts, device=slots.device),
        cache_locs=slots,
        successors=anchors,
        hidden=hidden,
        req_slots=batch.req_pool_indices,
        starts=starts,
        counts=[1] * len(starts),
    )


def path_commit(batch: Any, lengths: Sequence[int], front: Tensor, emitted: Tensor, hidden: Tensor | None) -> Commit:
    """The accepted paths of a verify round: the anchor and the accepted drafts, each followed by what was emitted.

    lengths: rows of each path; front: int64 `[bs, P]`, the KV slots they now have; emitted: int64 `[bs, P]`
    hidden: `[sum(lengths), K * H]`, row by row along the paths
    """
    device, starts = front.device, batch.seq_lens_cpu.tolist()
    counts = torch.tensor(lengths, device=device)
    place = torch.arange(front.shape[1], device=device).expand_as(front)
    on_path = place < counts[:, None]
    return Commit(
        positions=(torch.tensor(starts, device=device)[:, None] + place)[on_path],
        cache_locs=front[on_path],
        successors=emitted[on_path],
        hidden=hidden,
        req_slots=batch.req_pool_indices,
        starts=starts,
        counts=lengths,
    )


def _tails(requests: Sequence[Any], sampled: Tensor) -> Tensor:
    """int64 `[bs]`: the token after each chunk: the next of the prompt, or the sampled one when the prompt has ended.

    A request that was retracted prefills its prompt and its output so far; SGLang's fill ids are both together.
    """
    tails = sampled.clone()
    for i, request in enumerate(requests):
        ids, end = request.full_untruncated_fill_ids, request.extend_end
        if end < len(ids):
            tails[i] = ids[end]
    return tails


def _of_rows(commit: Commit, kept: Tensor) -> Commit:
    """The commit of a target that hands out the hidden states of some rows only, the last ones of each request."""
    owner = torch.repeat_interleave(torch.tensor(commit.counts)).to(kept.device)
    counts = owner[kept].bincount(minlength=len(commit.counts)).tolist()
    ends = [start + count for start, count in zip(commit.starts, commit.counts, strict=True)]
    return replace(
        commit,
        positions=commit.positions[kept],
        cache_locs=commit.cache_locs[kept],
        successors=commit.successors[kept],
        starts=[end - count for end, count in zip(ends, counts, strict=True)],
        counts=counts,
    )

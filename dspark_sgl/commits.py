"""What a drafter is told of each step: which rows entered the target's KV, and what came after each of them.

One function per kind of step. Reads SGLang's batch and output and changes neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dspark_sgl.kernels.layout import TreeLayout
from dspark_sgl.kernels.staging import staged
from dspark_sgl.kernels.walk import NO_ROW
from dspark_sgl.spec_algos.protocol import DEAD_SLOT, Commit


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
    last = staged(counts, device).cumsum(0) - 1
    successors[last] = _tails(batch.reqs, sampled)
    commit = Commit(
        positions=staged(torch.cat(positions), device),
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
        positions=staged(starts, slots.device),
        cache_locs=slots,
        successors=anchors,
        hidden=hidden,
        req_slots=batch.req_pool_indices,
        starts=starts,
        counts=[1] * len(starts),
    )


def verify_commit(
    batch: Any,
    layout: TreeLayout,
    path: Tensor,
    emitted: Tensor,
    lengths: Sequence[int],
    slots: Tensor,
    hidden: Tensor | None,
) -> tuple[Commit, Tensor]:
    """A verify round: the rows of the accepted paths, and which of the packed rows these are, int64 `[n]`.

    path: int64 `[bs, P]`, rows of each tree; lengths: of each path; emitted: int64 `[bs, P]`, what came after each row
    slots: int64 `[bs, S]`, KV slots of the positions from each anchor on, where the paths' KV belongs
    hidden: `[rows, K * H]`, of all packed rows
    """
    width, starts = path.shape[1], batch.seq_lens_cpu.tolist()
    place, positions = staged(path_rows(lengths, width, starts), path.device)
    kept = (layout.starts[:, None] + path).flatten()[place]
    commit = Commit(
        positions=positions,
        cache_locs=slots[:, :width].flatten()[place],
        successors=emitted.flatten()[place],
        hidden=None if hidden is None else hidden[kept],
        req_slots=batch.req_pool_indices,
        starts=starts,
        counts=lengths,
    )
    return commit, kept


def early_commit(
    batch: Any, layout: TreeLayout, path: Tensor, emitted: Tensor, slots: Tensor, hidden: Tensor | None
) -> tuple[Commit, Tensor]:
    """As `verify_commit`, before the host knows how long the paths are: `P` rows of every request, of which those
    behind its path go to `DEAD_SLOT`."""
    (requests, width), starts = path.shape, batch.seq_lens_cpu.tolist()
    kept = (layout.starts[:, None] + path.clamp(min=0)).flatten()
    commit = Commit(
        positions=(batch.seq_lens[:, None] + torch.arange(width, device=path.device)).flatten(),
        cache_locs=slots[:, :width].where(path != NO_ROW, DEAD_SLOT).flatten(),
        successors=emitted.flatten(),
        hidden=None if hidden is None else hidden[kept],
        req_slots=batch.req_pool_indices,
        starts=starts,
        counts=[width] * requests,
    )
    return commit, kept


def path_rows(lengths: Sequence[int], width: int, starts: Sequence[int]) -> Tensor:
    """Of a verify round: where the rows of the accepted paths stand in `[bs, width]`, and their positions; int64
    `[2, sum(lengths)]`, on the host.

    lengths: rows of each path, the anchor's included; starts: the anchors' positions
    A boolean mask would say the same, and the host would wait for the device to count it at every use.
    """
    counts = torch.tensor(lengths)
    owner = torch.arange(len(counts)).repeat_interleave(counts)
    place = torch.arange(len(owner)) - (counts.cumsum(0) - counts)[owner]
    return torch.stack([owner * width + place, torch.tensor(starts)[owner] + place])


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

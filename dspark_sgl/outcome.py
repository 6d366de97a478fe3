"""What a step hands back to SGLang's scheduler: its tokens, the state it leaves, log-probabilities. Runs no model."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.logprob_processor import compute_spec_logprobs
from sglang.srt.managers.scheduler import GenerationBatchResult
from torch import Tensor

from dspark_sgl.kernels.layout import TreeLayout
from dspark_sgl.kernels.walk import NO_ROW, Acceptance

from .decode_state import DecodeState


def step_result(
    output: Any,
    tokens: Tensor,
    lengths: Tensor,
    anchors: Tensor,
    lens: Tensor,
    *,
    stride: int,
    can_run_cuda_graph: bool = False,
) -> GenerationBatchResult:
    """What a decode step of `bs` requests returns.

    output: the target's logits output; tokens: int64 `[bs * stride]`, of which the first `lengths[i]` of each stride
    count; lengths: int64 `[bs]`, tokens gained; anchors: int64 `[bs]`, those of the next step; lens: int64 `[bs]`,
    tokens in the KV after this one
    """
    return GenerationBatchResult(
        logits_output=output,
        next_token_ids=tokens,
        accept_lens=lengths.to(torch.int32),
        can_run_cuda_graph=can_run_cuda_graph,
        next_draft_input=DecodeState(anchors),
        speculative_num_draft_tokens=stride,
        new_seq_lens=lens,
    )


def attach_logprobs(batch: Any, output: Any, layout: TreeLayout, accepted: Acceptance, emitted: Tensor) -> None:
    """Log-probabilities of the emitted tokens, int64 `[bs, P]`, each from the row it was emitted after."""
    row = layout.starts[:, None] + accepted.path.clamp(min=0)
    rows = sum(layout.widths)
    # What a path does not have goes to a row behind the last: picking by a mask would wait for the device to count.
    target = row.where(accepted.path != NO_ROW, rows).flatten()
    after = torch.zeros(rows + 1, dtype=torch.int64, device=row.device).scatter_(0, target, emitted.flatten())
    compute_spec_logprobs(batch, output, after[:rows], accept_index=row)

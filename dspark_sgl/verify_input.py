"""Tells an attention backend what a verify forward looks like: ragged rows, one tree per request. Decides neither."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from sglang.srt.mem_cache.kv_loc_plan import IdSpaceKind
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode
from sglang.srt.speculative.spec_info import SpecInput, SpecInputType
from torch import Tensor

from dspark_sgl.kernels.layout import TreeLayout
from dspark_sgl.kernels.mask import flat_mask
from dspark_sgl.kernels.staging import staged

from .verify_plan import HostPlan


class VerifyInput(SpecInput):
    """SGLang's `batch.spec_info` during the target's verify forward.

    layout: the rows; lens: int64 `[bs]`, the prefix of each request; lens_cpu: the same on the host
    capture: what the forward keeps for the drafter
    absent: the prefix of requests that are there only to fill a graph; None where no graph is replayed
    positions: int64 `[rows]`, `lens[request] + depth`
    qo_lens: rows of each request, for backends that plan on the host
    tree_mask: bool `[rows, W]`, None for chains (which are causal)
    custom_mask: whether there is one, which is all that FlashInfer's backend asks of it before it captures a graph
    """

    def __init__(self, layout: TreeLayout, lens: Tensor, lens_cpu: Tensor, capture: CaptureHiddenMode) -> None:
        super().__init__(SpecInputType.DFLASH_VERIFY)
        self.layout, self._lens_cpu = layout, lens_cpu
        self.absent: int | None = None
        self.draft_token_num = layout.max_width
        self.num_tokens_per_req = layout.max_width
        self.num_tokens_for_logprob_per_req = layout.max_width
        self.capture_hidden_mode = capture
        self.positions = layout.pack(lens[:, None] + layout.depths)
        self.qo_lens = list(layout.widths)
        # FlashInfer computes what a chain sees by itself, four times as fast as it reads a mask.
        self.custom_mask = None if layout.is_chain else self.positions

    @cached_property
    def tree_mask(self) -> Tensor | None:
        return None if self.layout.is_chain else self.layout.ancestor_mask()

    def generate_attn_arg_prefill(
        self,
        *,
        req_pool_indices: Tensor,
        paged_kernel_lens: Tensor,
        paged_kernel_lens_sum: int,
        translator: Any,
        plan: Any,
        kv_start_idx: Tensor | None = None,
        kind: IdSpaceKind = IdSpaceKind.FULL,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | HostPlan | None]:
        """FlashInfer's ragged prefill arguments: kv_indices, kv_indptr, qo_indptr, and a bool mask, None for chains.

        paged_kernel_lens: `[bs]`, the prefix of each request, without the verify rows; a sliding window sees the part
            of it that begins at `kv_start_idx`
        The mask is flat: for every row, its whole prefix, then its ancestors among the request's rows. For a graph
        that is replayed it is a `HostPlan` instead, which says the same of all four.
        """
        device, requests = paged_kernel_lens.device, paged_kernel_lens.shape[0]
        # A graph's batch is padded with requests that are not there.
        layout = (
            self.layout if requests == self.layout.batch_size else self.layout.widened(requests, self.layout.max_width)
        )
        host = None
        if self.absent is not None and kv_start_idx is None:
            missing = requests - len(self._lens_cpu)
            prefix = torch.nn.functional.pad(self._lens_cpu, (0, missing), value=self.absent)
            host = HostPlan(layout, paged_kernel_lens, prefix)
            kv_lens, kv_indptr, qo_indptr = paged_kernel_lens + layout.max_width, host.kv_indptr, host.qo_indptr
        else:
            kv_lens = paged_kernel_lens + staged(layout.widths, device)
            kv_indptr = torch.nn.functional.pad(kv_lens.cumsum(0, dtype=torch.int32), (1, 0))
            qo_indptr = layout.qo_indptr
        total = paged_kernel_lens_sum + sum(layout.widths)
        kv_indices = torch.empty(total, dtype=torch.int32, device=device)
        translator.pack_read_stream(
            plan,
            req_pool_indices=req_pool_indices,
            seq_lens=kv_lens,
            indptr=kv_indptr,
            out=kv_indices,
            kv_start_idx=kv_start_idx,
            kind=kind,
            num_token_blocks=None,
            kv_lens_sum=total,
        )
        if host is not None or layout.is_chain:
            return kv_indices, kv_indptr, qo_indptr, host
        longest = int(self._lens_cpu.max())
        mask = flat_mask(layout, paged_kernel_lens, total=paged_kernel_lens_sum, longest=longest)
        return kv_indices, kv_indptr, qo_indptr, mask

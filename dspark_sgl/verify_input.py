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


class VerifyInput(SpecInput):
    """SGLang's `batch.spec_info` during the target's verify forward.

    layout: the rows; lens: int64 `[bs]`, the prefix of each request; longest: the greatest of them, on the host
    capture: what the forward keeps for the drafter
    positions: int64 `[rows]`, `lens[request] + depth`
    qo_lens: rows of each request, for backends that plan on the host
    tree_mask: bool `[rows, W]`, None for chains (which are causal)
    custom_mask: there is one, which is all that FlashInfer's backend asks of this name before it captures a graph
    """

    def __init__(self, layout: TreeLayout, lens: Tensor, longest: int, capture: CaptureHiddenMode) -> None:
        super().__init__(SpecInputType.DFLASH_VERIFY)
        self.layout, self._longest = layout, longest
        self.draft_token_num = layout.max_width
        self.num_tokens_per_req = layout.max_width
        self.num_tokens_for_logprob_per_req = layout.max_width
        self.capture_hidden_mode = capture
        self.positions = layout.pack(lens[:, None] + layout.depths)
        self.qo_lens = list(layout.widths)
        self.custom_mask = self.positions

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
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """FlashInfer's ragged prefill arguments: kv_indices, kv_indptr, qo_indptr, and a bool mask.

        paged_kernel_lens: `[bs]`, the prefix of each request, without the verify rows; a sliding window sees the part
            of it that begins at `kv_start_idx`
        The mask is flat: for every row, its whole prefix, then its ancestors among the request's rows.
        """
        device, requests = paged_kernel_lens.device, paged_kernel_lens.shape[0]
        # A graph's batch is padded with requests that are not there.
        layout = (
            self.layout if requests == self.layout.batch_size else self.layout.padded(requests, self.layout.max_width)
        )
        kv_lens = paged_kernel_lens + torch.tensor(layout.widths, dtype=torch.int64, device=device)
        kv_indptr = torch.zeros(requests + 1, dtype=torch.int32, device=device)
        kv_indptr[1:] = kv_lens.cumsum(0)
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
        )
        mask = flat_mask(layout, paged_kernel_lens, total=paged_kernel_lens_sum, longest=self._longest)
        return kv_indices, kv_indptr, layout.qo_indptr, mask

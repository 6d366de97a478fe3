"""Plans FlashInfer's verify forward from what the host knows, where a CUDA graph is replayed.

FlashInfer's plan reads lengths off the device and packs the mask there, and waits at each, so a GPU would stand idle
before every verify. The host has known all of it since the round began: how long each prefix is, and how many rows the
graph has. Only for graphs, whose every request has as many rows. Never decides what is verified.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dspark_sgl.kernels.layout import TreeLayout
from dspark_sgl.kernels.mask import PackedMask, fill_packed_mask
from dspark_sgl.kernels.staging import pinned


class HostPlan:
    """Of a batch of `n` requests with `W` rows each. SGLang carries it to FlashInfer's wrapper as if it were the mask.

    prefix_lens: `[n]`, tokens before each request's rows; prefix_cpu: int64 `[n]`, the same on the host
    qo_indptr, kv_indptr: int32 `[n + 1]`, where each request's rows and its KV begin; mask_starts: where the bytes of
        its mask do
    """

    def __init__(self, layout: TreeLayout, prefix_lens: Tensor, prefix_cpu: Tensor) -> None:
        self.layout, self.prefix_lens, self._prefix_cpu = layout, prefix_lens, prefix_cpu
        rows = torch.full_like(prefix_cpu, layout.max_width)
        lens = prefix_cpu + rows
        table = torch.zeros(3, len(lens) + 1, dtype=torch.int32)
        table[:, 1:] = torch.stack([rows, lens, (rows * lens + 7) // 8]).cumsum(1)
        self._host = pinned(table, prefix_lens.device)
        self.qo_indptr, self.kv_indptr, self.mask_starts = self._host.to(prefix_lens.device, non_blocking=True)

    def plan(self, wrapper: Any, plan: Callable[..., None], kv_indices: Tensor, *sizes: Any, **how: Any) -> None:
        """`plan`: FlashInfer's own. A wrapper that was made with room for a mask reads one, for trees."""
        qo_indptr, kv_indptr, _ = self._host
        last_page = torch.ones(self.layout.batch_size, dtype=torch.int32)
        plan(qo_indptr, kv_indptr, kv_indices, last_page, *sizes, custom_mask=None, **how)
        if wrapper._custom_mask_buf is not None:
            wrapper._mask_indptr_buf.copy_(self.mask_starts)
            mask = PackedMask(wrapper._custom_mask_buf, wrapper._mask_indptr_buf)
            fill_packed_mask(mask, self.layout, self.prefix_lens, longest=int(self._prefix_cpu.max()))


def plan_on_host(wrapper: Any) -> None:
    """From now on the wrapper is planned by a `HostPlan` where it is handed one in place of a mask."""
    # Not its `begin_forward`, for which SGLang may have put a plan of its own that wants other lengths.
    wrapper.begin_forward = partial(_begin_forward, wrapper, wrapper.plan)


def _begin_forward(
    wrapper: Any,
    plan: Callable[..., None],
    qo_indptr: Tensor,
    kv_indptr: Tensor,
    kv_indices: Tensor,
    last_page_len: Tensor,
    *sizes: Any,
    custom_mask: Tensor | HostPlan | None = None,
    **how: Any,
) -> None:
    if isinstance(custom_mask, HostPlan):
        custom_mask.plan(wrapper, plan, kv_indices, *sizes, **how)
    else:
        plan(qo_indptr, kv_indptr, kv_indices, last_page_len, *sizes, custom_mask=custom_mask, **how)

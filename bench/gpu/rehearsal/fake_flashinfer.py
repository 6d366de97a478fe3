"""FlashInfer's wrappers in torch: what they plan they keep in the buffers that theirs keep it in, and run from there.

A plan is made from lengths on the host and a kernel reads those on the device, so a run checks that both agree: on a
GPU it would compute over a wrong part of the KV cache. Only what SGLang's backend asks for is here; positions, scales,
windows and soft caps are refused.
"""

from __future__ import annotations

from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

_library = torch.library.Library("rehearsal", "DEF")
_library.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor qo_indptr, Tensor kv_indptr, Tensor kv_indices, Tensor? mask,"
    " Tensor? mask_indptr, Tensor planned, bool causal, float scale) -> Tensor"
)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qo_indptr: Tensor,
    kv_indptr: Tensor,
    kv_indices: Tensor,
    mask: Tensor | None,
    mask_indptr: Tensor | None,
    planned: Tensor,
    causal: bool,
    scale: float,
) -> Tensor:
    """q: `[rows, heads, dim]`; k, v: `[slots, kv heads, dim]`; planned: int32 `[2, bs + 1]`, both indptr on the host"""
    rows, pages = qo_indptr.tolist(), kv_indptr.tolist()
    _check_plan(planned, qo_indptr, kv_indptr)
    out = torch.zeros_like(q)
    group = q.shape[1] // k.shape[1]
    for request in range(len(rows) - 1):
        first, last = rows[request], rows[request + 1]
        slots = kv_indices[pages[request] : pages[request + 1]].long()
        n, m = last - first, len(slots)
        if not n or not m:
            continue
        keys = k[slots].transpose(0, 1).repeat_interleave(group, 0)
        values = v[slots].transpose(0, 1).repeat_interleave(group, 0)
        if mask is not None and mask_indptr is not None:
            start = int(mask_indptr[request])
            packed = mask[start : start + (n * m + 7) // 8]
            seen = (packed[:, None] >> torch.arange(8) & 1).flatten()[: n * m].view(n, m).bool()
        elif causal:
            seen = torch.ones(n, m, dtype=torch.bool).tril(m - n)
        else:
            seen = torch.ones(n, m, dtype=torch.bool)
        scores = (q[first:last].transpose(0, 1).float() @ keys.transpose(1, 2).float()) * scale
        scores = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        out[first:last] = (scores @ values.float()).transpose(0, 1).to(out.dtype)
    return out


def _packed(entries: Tensor) -> Tensor:
    """uint8: eight entries a byte, the first in the lowest bit."""
    return torch.from_numpy(np.packbits(entries.bool().numpy(), bitorder="little"))


def _check_plan(planned: Tensor, qo_indptr: Tensor, kv_indptr: Tensor) -> None:
    """A request that is not there counts one token on the host, on the device its block as well: nobody reads it."""
    rows, (lens, expected) = qo_indptr.tolist(), (indptr.diff() for indptr in (kv_indptr, planned[1]))
    absent = expected == 1
    if planned[0].tolist() != rows or not bool(((lens == expected) | absent).all()):
        raise RuntimeError(f"planned for {planned.tolist()}, run with {[rows, kv_indptr.tolist()]}")


_library.impl("attention", _attention, "CompositeExplicitAutograd")


class _Paged:
    """What the decode and the prefill wrapper share."""

    is_cuda_graph_enabled: bool
    device = torch.device("cpu")
    _backend = "fa2"

    def __init__(
        self, use_cuda_graph: bool, indptr: Tensor | None, indices: Tensor | None, last: Tensor | None
    ) -> None:
        self.is_cuda_graph_enabled = use_cuda_graph
        self._paged_kv_indptr_buf, self._paged_kv_indices_buf = indptr, indices
        self._paged_kv_last_page_len_buf = last
        self._fixed_batch_size = len(last) if use_cuda_graph and last is not None else 0
        self._custom_mask_buf: Tensor | None = None
        self._mask_indptr_buf: Tensor | None = None
        self._qo_indptr_buf: Tensor | None = None
        self._planned: Tensor | None = None

    def _check(self, indices: Tensor, last: Tensor, page_size: int) -> None:
        assert page_size == 1
        if self.is_cuda_graph_enabled:
            if len(last) != self._fixed_batch_size:
                raise ValueError(f"a batch of {len(last)} where the graph has {self._fixed_batch_size}")
            if len(indices) > len(self._paged_kv_indices_buf):
                raise ValueError("kv indices exceed their buffer")

    def _keep(self, indptr: Tensor, indices: Tensor, last: Tensor) -> None:
        if self.is_cuda_graph_enabled:
            self._paged_kv_indptr_buf.copy_(indptr)
            self._paged_kv_last_page_len_buf.copy_(last)
            if indices.data_ptr() != self._paged_kv_indices_buf.data_ptr():
                self._paged_kv_indices_buf[: len(indices)].copy_(indices)
        else:
            self._paged_kv_indptr_buf, self._paged_kv_indices_buf = indptr.clone(), indices.clone()
            self._paged_kv_last_page_len_buf = last

    def _plan_host(self, qo_indptr: Tensor, kv_indptr: Tensor) -> None:
        """The scheduling data of the GPU's kernel: a graph reads it where the first plan put it."""
        planned = torch.stack([qo_indptr.int(), kv_indptr.int()])
        if self._planned is not None and self.is_cuda_graph_enabled:
            self._planned.copy_(planned)
        else:
            self._planned = planned

    def _attend(
        self, q: Tensor, cache: tuple[Tensor, Tensor], causal: bool, sm_scale: float | None, given: dict[str, Any]
    ) -> Tensor:
        for name, value in given.items():
            assert value in (None, -1, 0, 0.0, 1.0), f"{name}={value}"
        return torch.ops.rehearsal.attention(
            q,
            cache[0].view(-1, *cache[0].shape[-2:]),
            cache[1].view(-1, *cache[1].shape[-2:]),
            self._qo_indptr_buf,
            self._paged_kv_indptr_buf,
            self._paged_kv_indices_buf,
            self._custom_mask_buf,
            self._mask_indptr_buf,
            self._planned,
            causal,
            sm_scale or q.shape[-1] ** -0.5,
        )


class BatchPrefillWithPagedKVCacheWrapper(_Paged):
    def __init__(
        self,
        workspace: Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf: Tensor | None = None,
        paged_kv_indptr_buf: Tensor | None = None,
        paged_kv_indices_buf: Tensor | None = None,
        paged_kv_last_page_len_buf: Tensor | None = None,
        custom_mask_buf: Tensor | None = None,
        mask_indptr_buf: Tensor | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(use_cuda_graph, paged_kv_indptr_buf, paged_kv_indices_buf, paged_kv_last_page_len_buf)
        self._float_workspace_buffer = self._int_workspace_buffer = workspace
        self._pin_memory_int_workspace_buffer = workspace
        self._qo_indptr_buf = qo_indptr_buf
        self._custom_mask_buf, self._mask_indptr_buf = custom_mask_buf, mask_indptr_buf
        self._max_total_num_rows: int | None = None
        # `fast_prefill_plan` of SGLang calls it with what it has put into the buffers itself.
        self._cached_module = SimpleNamespace(plan=lambda *a: self._plan_host(a[3], a[4]))

    def plan(
        self,
        qo_indptr: Tensor,
        kv_indptr: Tensor,
        kv_indices: Tensor,
        last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        custom_mask: Tensor | None = None,
        window_left: int = -1,
        **_: Any,
    ) -> None:
        assert window_left == -1
        self._check(kv_indices, last_page_len, page_size)
        self._keep(kv_indptr, kv_indices, last_page_len)
        rows = int(qo_indptr[-1])
        if self.is_cuda_graph_enabled:
            self._max_total_num_rows = self._max_total_num_rows or rows
            if rows > self._max_total_num_rows:
                raise ValueError(f"{rows} rows where the graph has {self._max_total_num_rows}")
            self._qo_indptr_buf.copy_(qo_indptr)
        else:
            self._qo_indptr_buf = qo_indptr.clone()
            self._custom_mask_buf = self._mask_indptr_buf = None
        if custom_mask is not None:
            sizes = (qo_indptr[1:] - qo_indptr[:-1]) * (kv_indptr[1:] - kv_indptr[:-1])
            if len(custom_mask) < int(sizes.sum()):
                raise ValueError(f"a mask of {len(custom_mask)} entries where {int(sizes.sum())} are read")
            packed = [_packed(entries) for entries in custom_mask[: int(sizes.sum())].split(sizes.tolist())]
            starts = torch.tensor([0, *accumulate(map(len, packed))], dtype=torch.int32)
            if self.is_cuda_graph_enabled:
                self._custom_mask_buf[: int(starts[-1])].copy_(torch.cat(packed))
                self._mask_indptr_buf.copy_(starts)
            else:
                self._custom_mask_buf, self._mask_indptr_buf = torch.cat(packed), starts
        self._plan_host(qo_indptr, kv_indptr)

    begin_forward = plan

    def forward(
        self,
        q: Tensor,
        cache: tuple[Tensor, Tensor],
        causal: bool = False,
        sm_scale: float | None = None,
        **given: Any,
    ) -> Tensor:
        return self._attend(q, cache, causal, sm_scale, given)


class BatchDecodeWithPagedKVCacheWrapper(_Paged):
    def __init__(
        self,
        workspace: Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
        paged_kv_indptr_buffer: Tensor | None = None,
        paged_kv_indices_buffer: Tensor | None = None,
        paged_kv_last_page_len_buffer: Tensor | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(use_cuda_graph, paged_kv_indptr_buffer, paged_kv_indices_buffer, paged_kv_last_page_len_buffer)
        if use_cuda_graph:
            self._qo_indptr_buf = torch.arange(self._fixed_batch_size + 1, dtype=torch.int32)

    def plan(
        self,
        indptr: Tensor,
        indices: Tensor,
        last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        **_: Any,
    ) -> None:
        self._check(indices, last_page_len, page_size)
        self._keep(indptr, indices, last_page_len)
        if not self.is_cuda_graph_enabled:
            self._qo_indptr_buf = torch.arange(len(last_page_len) + 1, dtype=torch.int32)
        self._plan_host(self._qo_indptr_buf, indptr)

    begin_forward = plan

    def forward(self, q: Tensor, cache: tuple[Tensor, Tensor], sm_scale: float | None = None, **given: Any) -> Tensor:
        return self._attend(q, cache, False, sm_scale, given)


def fast_decode_plan(
    wrapper: BatchDecodeWithPagedKVCacheWrapper,
    indptr: Tensor,
    indices: Tensor,
    last_page_len: Tensor,
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim: int,
    page_size: int,
    global_override_indptr_cpu: Tensor | None = None,
    **_: Any,
) -> None:
    """A graph's buffers are the caller's own, so nothing is copied; lengths come from the host where it knows them."""
    wrapper._check(indices, last_page_len, page_size)
    host = indptr if global_override_indptr_cpu is None else global_override_indptr_cpu
    wrapper._plan_host(wrapper._qo_indptr_buf, host)


class BatchPrefillWithRaggedKVCacheWrapper:
    """SGLang makes one and asks nothing of it under SGLANG_FLASHINFER_USE_PAGED=1."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

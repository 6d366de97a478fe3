"""Attention for SGLang on a plain CPU: prefill, decode and tree verification in one batched backend.

Every forward, whatever its mode, is a list of *segments*: `rows` consecutive query rows of one request behind a prefix
of `prefix` cached tokens. Segments of similar size are padded to a common rectangle (a *bucket*), and each bucket is
one gather of keys and values and one fused attention call per layer. Everything that depends on lengths, slots and
masks is computed once per forward (`cpu_attention_plan.py`).

    out[row] = softmax(cap(scale * q[row] K^T) + mask[row]) V,   mask in {0, -inf}

A row sees its whole prefix (or its window of it) and, of the new rows of its own request: those up to and including
itself (causal), all of them (`ENCODER_ONLY` layers, a drafter's block), or those that `spec_info.tree_mask` names (a
draft tree).

It never loops over requests inside a layer, never launches a kernel that a CPU lacks, and never answers a mode it does
not know: MLA, cross attention and attention sinks raise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from .cpu_attention_plan import EXACT_ROWS, Batch, Bucket, Plan, View, make_plan
from .deterministic import deterministic

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner

NAME = "dspark_cpu"


class CpuAttentionBackend(AttentionBackend):
    """See the module. One per model runner; the target and the draft each have their own."""

    def __init__(self, model_runner: ModelRunner) -> None:
        super().__init__()
        if getattr(model_runner, "use_mla_backend", False):
            raise NotImplementedError(f"attention backend {NAME!r} does not serve MLA models")
        self.req_to_token = model_runner.req_to_token_pool.req_to_token
        self.pool = model_runner.token_to_kv_pool
        self._exact = not model_runner.is_draft_worker and deterministic()
        self.forward_metadata: Batch | None = None
        self._swa_layers: dict[int, tuple[int, bool]] = (
            self.pool.layers_mapping if isinstance(self.pool, SWAKVPool) else {}
        )
        self._swa_out_loc: Tensor | None = None
        self._plans: dict[View, Plan] = {}
        self._layer_plans: dict[int, Plan] = {}

    def support_triton(self) -> bool:
        return False

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Read lengths and slots of this forward once; plans follow with the first layer of each kind."""
        self._plans, self._layer_plans = {}, {}
        self.forward_metadata = None
        if forward_batch.forward_mode.is_idle() or forward_batch.batch_size == 0:
            return
        self.forward_metadata = read_batch(forward_batch, self.req_to_token)
        if self._swa_layers and forward_batch.out_cache_loc is not None:
            self._swa_out_loc = self.pool.translate_loc_from_full_to_swa(forward_batch.out_cache_loc)

    def forward_extend(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> Tensor:
        """q: [rows, q heads * head dim]; k, v: [rows, kv heads, dim] -> [rows, q heads * v head dim]."""
        if layer.is_cross_attention:
            raise NotImplementedError(f"attention backend {NAME!r} has no cross attention")
        if kwargs.get("sinks") is not None:
            raise NotImplementedError(f"attention backend {NAME!r} has no attention sinks")
        if save_kv_cache and k is not None:
            loc = KVWriteLoc(forward_batch.out_cache_loc, self._swa_out_loc)
            self.pool.set_kv_buffer(layer, loc, k, v)
        if self.forward_metadata is None:
            return q.new_empty(q.shape[0], layer.tp_q_head_num * layer.v_head_dim)
        plan = self._layer_plans.get(layer.layer_id)
        if plan is None:
            plan = self._layer_plans[layer.layer_id] = self._plan(layer, q.dtype)
        keys, values = self.pool.get_key_buffer(layer.layer_id), self.pool.get_value_buffer(layer.layer_id)
        outs = [attend(bucket, q, keys, values, layer) for bucket in plan.buckets]
        out = outs[0] if len(outs) == 1 else torch.cat(outs)
        return out if plan.order is None else out.index_select(0, plan.order)

    forward_decode = forward_extend

    def _plan(self, layer: RadixAttention, dtype: torch.dtype) -> Plan:
        batch, causal = self.forward_metadata, layer.attn_type != AttentionType.ENCODER_ONLY
        assert batch is not None, "init_forward_metadata comes before the layers"
        view = View(
            window=layer.sliding_window_size,
            causal=causal,
            group=layer.tp_q_head_num // layer.tp_k_head_num,
            kv_heads=layer.tp_k_head_num,
            width=layer.tp_k_head_num * layer.qk_head_dim,
            capped=layer.logit_cap > 0,
            swa_pool=bool(self._swa_layers) and self._swa_layers[layer.layer_id][1],
            dtype=dtype,
            exact=self._exact and causal and batch.tree is None,
        )
        if view not in self._plans:
            translate = self.pool.translate_loc_from_full_to_swa if view.swa_pool else None
            self._plans[view] = make_plan(batch, view, translate)
        return self._plans[view]


def read_batch(forward_batch: ForwardBatch, req_to_token: Tensor) -> Batch:
    """Bring every mode to the same form: rows behind prefixes.

    `seq_lens` counts the new rows in decode and extend, and does not in TARGET_VERIFY.
    """
    mode = forward_batch.forward_mode
    lens = forward_batch.seq_lens.tolist()
    if mode.is_target_verify():
        spec = forward_batch.spec_info
        rows = getattr(spec, "qo_lens", None)
        rows = [int(spec.draft_token_num)] * len(lens) if rows is None else list(rows)
        prefix = lens
    elif mode.is_decode():
        rows = [1] * len(lens)
        prefix = [n - 1 for n in lens]
    else:
        rows = forward_batch.extend_seq_lens.tolist()
        prefix = [n - new for n, new in zip(lens, rows, strict=True)]
    longest = max(p + n for p, n in zip(prefix, rows, strict=True))
    slots = req_to_token[forward_batch.req_pool_indices, :longest].long()
    if not mode.is_target_verify():
        return Batch(rows, prefix, slots)

    # The block under verification is where this forward writes it, whether or not the table says so yet.
    row_of = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(rows))
    start = torch.tensor(prefix)[row_of]
    first = torch.cumsum(torch.tensor([0, *rows[:-1]]), 0)[row_of]
    slots[row_of, start + torch.arange(len(row_of)) - first] = forward_batch.out_cache_loc.long()
    tree = getattr(spec, "tree_mask", None)
    if not hasattr(spec, "tree_mask") and getattr(spec, "custom_mask", None) is not None:
        raise NotImplementedError(f"attention backend {NAME!r} reads spec_info.tree_mask, not custom_mask")
    depth = None if tree is None else forward_batch.positions - start
    return Batch(rows, prefix, slots, tree, depth)


def attend(bucket: Bucket, q: Tensor, keys: Tensor, values: Tensor, layer: RadixAttention) -> Tensor:
    """One bucket: q [all rows, q heads * d], pool k and v [slots, kv heads, d] -> [batch * rows, q heads * dv]."""
    b, n, heads, dim = bucket.batch, bucket.rows, layer.tp_k_head_num, layer.qk_head_dim
    if isinstance(bucket.slots, slice):
        keys, values = keys[bucket.slots], values[bucket.slots]
    else:
        keys, values = keys.index_select(0, bucket.slots), values.index_select(0, bucket.slots)
    if keys.dtype != q.dtype:
        keys, values = keys.to(q.dtype), values.to(q.dtype)
    keys = keys.view(b, bucket.keys, heads, dim).transpose(1, 2)
    values = values.view(b, bucket.keys, heads, layer.v_head_dim).transpose(1, 2)
    q = q[bucket.q_rows] if isinstance(bucket.q_rows, slice) else q.index_select(0, bucket.q_rows)
    group = layer.tp_q_head_num // heads
    by_rows = in_chunks if bucket.chunks else fused
    if not bucket.fold:
        q = q.view(b, n, layer.tp_q_head_num, dim).transpose(1, 2)
        out = by_rows(q, keys, values, bucket, layer)
        return out.transpose(1, 2).reshape(b * n, -1)
    q = q.view(b, n, heads, group, dim).transpose(1, 2).reshape(b, heads, n * group, dim)
    out = by_rows(q, keys, values, bucket, layer)
    return out.view(b, heads, n, group, -1).transpose(1, 2).reshape(b * n, -1)


def in_chunks(q: Tensor, keys: Tensor, values: Tensor, bucket: Bucket, layer: RadixAttention) -> Tensor:
    """The same as `fused`, EXACT_ROWS rows at a time: as heads of their own when folded, as requests otherwise."""
    b, heads, rows, dim = q.shape
    q = pad(q, (0, 0, 0, bucket.chunks * EXACT_ROWS - rows))
    if bucket.fold:
        out = fused(q.view(b, heads * bucket.chunks, EXACT_ROWS, dim), keys, values, bucket, layer)
    else:
        q = q.view(heads, bucket.chunks, EXACT_ROWS, dim).transpose(0, 1)
        keys, values = keys.expand(bucket.chunks, -1, -1, -1), values.expand(bucket.chunks, -1, -1, -1)
        out = fused(q, keys, values, bucket, layer).transpose(0, 1)
    return out.reshape(b, heads, bucket.chunks * EXACT_ROWS, -1)[:, :, :rows].contiguous()


def fused(q: Tensor, keys: Tensor, values: Tensor, bucket: Bucket, layer: RadixAttention) -> Tensor:
    """[batch, heads, rows, d] attention; the logit cap, which the fused kernel lacks, goes step by step."""
    if layer.logit_cap > 0:
        if bucket.chunks:
            shared = q.shape[1] // keys.shape[1]
            keys, values = keys.repeat_interleave(shared, 1), values.repeat_interleave(shared, 1)
        scores = torch.matmul(q, keys.transpose(2, 3)).float() * layer.scaling
        scores = layer.logit_cap * torch.tanh(scores / layer.logit_cap)
        if bucket.mask is not None:
            scores = scores + bucket.mask
        return torch.matmul(torch.softmax(scores, dim=-1).to(q.dtype), values)
    return scaled_dot_product_attention(
        q,
        keys,
        values,
        attn_mask=bucket.mask,
        is_causal=bucket.causal,
        scale=layer.scaling,
        enable_gqa=q.shape[1] != keys.shape[1],
    )


def register() -> None:
    """Make `--attention-backend dspark_cpu` known, for targets and drafts. Safe to call more than once."""
    from sglang.srt.arg_groups import choices
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS, register_attention_backend

    if NAME in ATTENTION_BACKENDS:
        return
    register_attention_backend(NAME)(CpuAttentionBackend)
    choices.add_attention_backend_choices([NAME])
    choices.add_draft_attention_backend_choices([NAME])
    choices.add_deterministic_attention_backend_choices([NAME])
    choices.add_radix_supported_deterministic_attention_backend_choices([NAME])

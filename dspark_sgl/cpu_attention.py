"""Attention for SGLang on a plain CPU: prefill, decode and tree verification in one batched backend.

Every forward, whatever its mode, is a list of *segments*: ``rows`` consecutive query rows of one
request behind a prefix of ``prefix`` cached tokens. Segments of similar size are padded to a common
rectangle (a *bucket*) and each bucket is one gather of keys and values and one fused attention call
per layer. Everything that depends on lengths, slots and masks is computed once per forward.

    out[row] = softmax(cap(scale * q[row] K^T) + mask[row]) V,   mask in {0, -inf}

A row sees its whole prefix (or its window of it) and, of the new rows of its own request: those up to
and including itself (causal), all of them (``ENCODER_ONLY`` layers, a drafter's block), or those that
``spec_info.tree_mask`` names (a draft tree).

It never loops over requests inside a layer, never launches a kernel that a CPU lacks, and never
answers a mode it does not know: MLA, cross attention and attention sinks raise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from torch.nn.functional import scaled_dot_product_attention

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner

NAME = "dspark_cpu"

# A long causal run of rows is cut here, so that early rows do not pay for late keys and a mask stays small.
CHUNK_ROWS = 256
# Below this many rows the query heads of one key head ride as extra rows of one small matrix product
# (one pass over K and V); above, the fused kernel's own grouping is as quick and needs no copy of q.
FOLD_ROWS = 32
# Padding a bucket may gather before a second bucket is cheaper, in key elements (keys * kv heads * head
# dim): measured, a bucket costs about as much as reading this many.
BUCKET_COST = 120_000
# Key elements of a bucket of several segments: what was gathered should still be in the cache when it is used.
BUCKET_SIZE = 1_000_000
# Rows at which computing on a key costs as much again as fetching it. Measured.
ROWS_PER_FETCH = 12


@dataclass(frozen=True)
class Segment:
    """``rows`` query rows from flat row ``first`` on; row r sees keys ``[0, prefix + r]`` when causal.

    ``keys`` is how many tokens of the request there are to see (prefix and new rows together).
    """

    request: int
    first: int
    rows: int
    prefix: int
    keys: int


@dataclass(frozen=True)
class Bucket:
    """Segments padded to one rectangle ``batch x rows x keys``.

    slots: int64 [batch * keys], or the slice of the pool they are when they lie in a row.
    q_rows: int64 [batch * rows], the flat row of each padded row, or the slice they are.
    mask: additive, query dtype, [batch, 1, rows (x group when folded), keys]; None: everything is visible.
    """

    batch: int
    rows: int
    keys: int
    slots: torch.Tensor | slice
    q_rows: torch.Tensor | slice
    mask: torch.Tensor | None
    causal: bool
    fold: bool


@dataclass(frozen=True)
class Plan:
    """The buckets of a forward, and where each flat row is found in their concatenated output (None: in order)."""

    buckets: tuple[Bucket, ...]
    order: torch.Tensor | None


@dataclass(frozen=True)
class View:
    """What a layer looks like to the planner; layers with the same view share a plan."""

    window: int
    causal: bool
    group: int
    width: int
    capped: bool
    swa_pool: bool
    dtype: torch.dtype


@dataclass(frozen=True)
class Batch:
    """One forward. ``slots`` int64 [requests, longest]: the pool slot of every token, prefix then new rows.

    ``tree``: bool [sum rows, max rows] and ``depth``: int64 [sum rows] (position minus prefix) for a draft
    tree, None when new rows follow one another.
    """

    rows: list[int]
    prefix: list[int]
    slots: torch.Tensor
    tree: torch.Tensor | None = None
    depth: torch.Tensor | None = None


class CpuAttentionBackend(AttentionBackend):
    """See the module. One per model runner; the target and the draft each have their own."""

    def __init__(self, model_runner: ModelRunner) -> None:
        super().__init__()
        if getattr(model_runner, "use_mla_backend", False):
            raise NotImplementedError(f"attention backend {NAME!r} does not serve MLA models")
        self.req_to_token = model_runner.req_to_token_pool.req_to_token
        self.pool = model_runner.token_to_kv_pool
        self.forward_metadata: Batch | None = None
        self._swa_layers: dict[int, tuple[int, bool]] = (
            self.pool.layers_mapping if isinstance(self.pool, SWAKVPool) else {}
        )
        self._swa_out_loc: torch.Tensor | None = None
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
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        **kwargs,
    ) -> torch.Tensor:
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
        view = View(
            window=layer.sliding_window_size,
            causal=layer.attn_type != AttentionType.ENCODER_ONLY,
            group=layer.tp_q_head_num // layer.tp_k_head_num,
            width=layer.tp_k_head_num * layer.qk_head_dim,
            capped=layer.logit_cap > 0,
            swa_pool=bool(self._swa_layers) and self._swa_layers[layer.layer_id][1],
            dtype=dtype,
        )
        if view not in self._plans:
            translate = self.pool.translate_loc_from_full_to_swa if view.swa_pool else None
            assert self.forward_metadata is not None, "init_forward_metadata comes before the layers"
            self._plans[view] = make_plan(self.forward_metadata, view, translate)
        return self._plans[view]


def read_batch(forward_batch: ForwardBatch, req_to_token: torch.Tensor) -> Batch:
    """Bring every mode to the same form: rows behind prefixes.

    ``seq_lens`` counts the new rows in decode and extend, and does not in TARGET_VERIFY.
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
    if tree is None and getattr(spec, "custom_mask", None) is not None:
        raise NotImplementedError(f"attention backend {NAME!r} reads spec_info.tree_mask, not custom_mask")
    depth = None if tree is None else forward_batch.positions - start
    return Batch(rows, prefix, slots, tree, depth)


def segments_of(batch: Batch, view: View) -> list[Segment]:
    """One segment per request; long causal runs behind a prefix or a window are cut into chunks."""
    segments: list[Segment] = []
    first = 0
    for i, (rows, prefix) in enumerate(zip(batch.rows, batch.prefix, strict=True)):
        ordered = view.causal and batch.tree is None
        step = CHUNK_ROWS if ordered and (prefix > 0 or view.window >= 0 or view.capped) else max(rows, 1)
        for at in range(0, rows, step):
            n = min(step, rows - at)
            keys = prefix + at + n if ordered else prefix + rows
            segments.append(Segment(i, first + at, n, prefix + at if ordered else prefix, keys))
        first += rows
    return segments


def bucketed(segments: list[Segment], width: int) -> list[list[Segment]]:
    """Group segments of similar size: close a bucket once its padding costs more than another bucket would."""

    def cost(rows: int, keys: int) -> float:
        return keys * width * (1 + rows / ROWS_PER_FETCH)

    buckets: list[list[Segment]] = []
    rows = keys = 0
    waste = 0.0
    for s in sorted(segments, key=lambda s: (s.rows, s.keys), reverse=True):
        new_keys = max(keys, s.keys)
        added = len(buckets[-1]) * (cost(rows, new_keys) - cost(rows, keys)) if buckets else 0.0
        added += cost(rows, new_keys) - cost(s.rows, s.keys)
        full = buckets and (len(buckets[-1]) + 1) * new_keys * width > BUCKET_SIZE
        if not buckets or full or waste + added > BUCKET_COST:
            buckets.append([])
            rows, keys, waste, added = s.rows, s.keys, 0.0, 0.0
        buckets[-1].append(s)
        keys = max(keys, s.keys)
        waste += added
    return sorted((sorted(b, key=lambda s: s.first) for b in buckets), key=lambda b: b[0].first)


def make_plan(batch: Batch, view: View, translate=None) -> Plan:
    """Buckets for layers of this ``view``; ``translate`` maps slots into a separate sliding-window pool."""
    total = sum(batch.rows)
    buckets: list[Bucket] = []
    found = torch.empty(total, dtype=torch.int64)
    offset = 0
    for group in bucketed(segments_of(batch, view), view.width):
        bucket, real, flat = make_bucket(group, batch, view, translate)
        found[flat] = torch.nonzero(real).flatten() + offset
        offset += bucket.batch * bucket.rows
        buckets.append(bucket)
    in_order = offset == total and torch.equal(found, torch.arange(total))
    return Plan(tuple(buckets), None if in_order else found)


def make_bucket(
    group: list[Segment], batch: Batch, view: View, translate=None
) -> tuple[Bucket, torch.Tensor, torch.Tensor]:
    """The bucket, which of its padded rows are real (bool [batch * rows]) and their flat rows (int64).

    A key column c of a segment is token ``start + c`` of its request, ``start`` > 0 where a window lets the
    bucket skip the front. Padding repeats a real token's slot: its weight is zero, and it must be finite.
    """
    request, first, rows, prefix, keys = (
        torch.tensor([getattr(s, f) for s in group]) for f in ("request", "first", "rows", "prefix", "keys")
    )
    n = int(rows.max())
    r = torch.arange(n)
    real = r < rows[:, None]
    flat = first[:, None] + torch.where(real, r, 0)
    position = prefix[:, None] + (torch.where(real, r, 0) if batch.depth is None else batch.depth[flat])
    # A draft tree's rows sit at prefix + depth, so the first row of a request is always its lowest.
    start = (prefix - view.window).clamp(min=0) if view.window >= 0 else torch.zeros_like(prefix)
    span = int((keys - start).max())
    token = start[:, None] + torch.arange(span)
    valid = token < keys[:, None]
    token = torch.where(valid, token, start[:, None])
    slots = batch.slots[request[:, None], token].flatten()
    if translate is not None:
        slots = translate(slots).long()

    # Prefill from nothing: the kernel's own causal rule says it all, padding included.
    fused_causal = (
        view.causal
        and batch.tree is None
        and n >= FOLD_ROWS
        and not view.capped
        and view.window < 0
        and not int(prefix.max())
    )
    one_half_row = n == 1 and view.dtype != torch.float32  # the kernel has a quicker way for these
    fold = view.group > 1 and (view.capped or (n < FOLD_ROWS and not one_half_row))
    mask = None
    if not fused_causal:
        mask = visible(batch, view, flat, position, prefix, token, valid)
        mask = additive(mask, real, view, fold)
    bucket = Bucket(
        batch=len(group),
        rows=n,
        keys=span,
        slots=as_run(slots),
        q_rows=as_run(flat.flatten()),
        mask=mask,
        causal=fused_causal,
        fold=fold,
    )
    return bucket, real.flatten(), flat[real]


def visible(
    batch: Batch,
    view: View,
    flat: torch.Tensor,
    position: torch.Tensor,
    prefix: torch.Tensor,
    token: torch.Tensor,
    valid: torch.Tensor,
) -> torch.Tensor:
    """bool [batch, rows, keys]: may this row (``flat``, at ``position``) see this key (``token``)?"""
    at = token
    see = valid[:, None, :]
    if batch.tree is not None and batch.depth is not None and view.causal:
        new = token - prefix[:, None]
        inside = new.clamp(0, batch.tree.shape[1] - 1)
        see = see & (
            (new < 0)[:, None, :] | batch.tree[flat].gather(2, inside[:, None, :].expand(-1, flat.shape[1], -1))
        )
        own = (flat[:, :1] + inside).clamp(max=len(batch.depth) - 1)
        at = torch.where(new < 0, token, prefix[:, None] + batch.depth[own])
    elif view.causal:
        see = see & (token[:, None, :] <= position[:, :, None])
    if view.window >= 0:
        see = see & (at[:, None, :] >= position[:, :, None] - view.window)
    return see.expand(-1, flat.shape[1], -1)


def additive(see: torch.Tensor, real: torch.Tensor, view: View, fold: bool) -> torch.Tensor | None:
    """0 where visible, -inf elsewhere, [batch, 1, rows, keys]; rows repeat per query head when folded."""
    see = see | ~real[:, :, None]  # a padding row must not divide by nothing
    if bool(see.all()):
        return None
    mask = torch.zeros(see.shape, dtype=view.dtype).masked_fill_(~see, float("-inf"))
    if fold and mask.shape[1] > 1:
        mask = mask.repeat_interleave(view.group, dim=1)
    return mask[:, None]


def as_run(index: torch.Tensor) -> torch.Tensor | slice:
    """A slice when the indices follow one another: a view then replaces a copy."""
    first, last = int(index[0]), int(index[-1])
    if last - first == len(index) - 1 and torch.equal(index, torch.arange(first, last + 1)):
        return slice(first, last + 1)
    return index


def attend(
    bucket: Bucket, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, layer: RadixAttention
) -> torch.Tensor:
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
    if not bucket.fold:
        q = q.view(b, n, layer.tp_q_head_num, dim).transpose(1, 2)
        out = fused(q, keys, values, bucket, layer)
        return out.transpose(1, 2).reshape(b * n, -1)
    q = q.view(b, n, heads, group, dim).transpose(1, 2).reshape(b, heads, n * group, dim)
    out = fused(q, keys, values, bucket, layer)
    return out.view(b, heads, n, group, -1).transpose(1, 2).reshape(b * n, -1)


def fused(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, bucket: Bucket, layer: RadixAttention
) -> torch.Tensor:
    """[batch, heads, rows, d] attention; the logit cap, which the fused kernel lacks, goes step by step."""
    if layer.logit_cap > 0:
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
    """Make ``--attention-backend dspark_cpu`` known, for targets and drafts. Safe to call more than once."""
    from sglang.srt.arg_groups import choices
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS, register_attention_backend

    if NAME in ATTENTION_BACKENDS:
        return
    register_attention_backend(NAME)(CpuAttentionBackend)
    choices.add_attention_backend_choices([NAME])
    choices.add_draft_attention_backend_choices([NAME])

"""How a forward's attention is laid out: rows behind prefixes, cut and padded into buckets of one rectangle each.

Everything that depends on lengths, slots and masks and on nothing else, computed once per forward for all layers that
look alike. Never touches a query, a key or a value.

How many rows and keys a matrix product has decides in which order it adds, so a row's last bits depend on its company.
An *exact* plan leaves it none: every row is computed among `EXACT_ROWS` rows and over whole rungs of `EXACT_KEYS` keys,
counted from where its own window begins. Then its result is a function of its query and its keys alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

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
# Shape of every product of an exact plan. Fewer rows make a verify slower and more of them a decode step; measured.
EXACT_ROWS = 8
EXACT_KEYS = 128


@dataclass(frozen=True)
class Segment:
    """`rows` query rows from flat row `first` on; row r sees keys `[0, prefix + r]` when causal.

    `keys` is how many tokens of the request there are to see (prefix and new rows together), of which those before
    `start` are out of every row's window.
    """

    request: int
    first: int
    rows: int
    prefix: int
    keys: int
    start: int


@dataclass(frozen=True)
class Bucket:
    """Segments padded to one rectangle `batch x rows x keys`.

    slots: int64 [batch * keys], or the slice of the pool they are when they lie in a row.
    q_rows: int64 [batch * rows], the flat row of each padded row, or the slice they are.
    mask: additive, query dtype, [batch, 1, rows (x group when folded), keys]; None: everything is visible. Of an exact
    plan, [batch, kv heads * chunks, EXACT_ROWS, keys] when folded and [chunks, 1, EXACT_ROWS, keys] otherwise.
    chunks: of EXACT_ROWS rows, which rows (x group) are padded to; 0 where the plan is not exact.
    """

    batch: int
    rows: int
    keys: int
    slots: Tensor | slice
    q_rows: Tensor | slice
    mask: Tensor | None
    causal: bool
    fold: bool
    chunks: int


@dataclass(frozen=True)
class Plan:
    """The buckets of a forward, and where each flat row is found in their concatenated output (None: in order)."""

    buckets: tuple[Bucket, ...]
    order: Tensor | None


@dataclass(frozen=True)
class View:
    """What a layer looks like to the planner; layers with the same view share a plan."""

    window: int
    causal: bool
    group: int
    kv_heads: int
    width: int
    capped: bool
    swa_pool: bool
    dtype: torch.dtype
    exact: bool = False

    def start(self, position: int) -> int:
        """The first key that a row at this position is computed with."""
        first = max(0, position - self.window) if self.window >= 0 else 0
        return first - first % EXACT_KEYS if self.exact else first

    def same_keys(self, position: int) -> int:
        """How many rows from this position on are computed with the same keys by an exact plan."""
        rows = EXACT_KEYS - position % EXACT_KEYS
        if self.window >= 0:
            rows = min(rows, EXACT_KEYS - (position - self.window) % EXACT_KEYS)
        return rows


@dataclass(frozen=True)
class Batch:
    """One forward. `slots` int64 [requests, longest]: the pool slot of every token, prefix then new rows.

    `tree`: bool [sum rows, max rows] and `depth`: int64 [sum rows] (position minus prefix) for a draft
    tree, None when new rows follow one another.
    """

    rows: list[int]
    prefix: list[int]
    slots: Tensor
    tree: Tensor | None = None
    depth: Tensor | None = None


def segments_of(batch: Batch, view: View) -> list[Segment]:
    """One segment per request; long causal runs behind a prefix or a window are cut into chunks."""
    segments: list[Segment] = []
    first = 0
    for i, (rows, prefix) in enumerate(zip(batch.rows, batch.prefix, strict=True)):
        ordered = view.causal and batch.tree is None
        most = CHUNK_ROWS if ordered and (prefix > 0 or view.window >= 0 or view.capped) else max(rows, 1)
        at = 0
        while at < rows:
            n = min(view.same_keys(prefix + at) if view.exact else most, rows - at)
            keys = prefix + at + n if ordered else prefix + rows
            before = prefix + at if ordered else prefix
            # A draft tree's rows sit at prefix + depth, so the first row of a request is always its lowest.
            segments.append(Segment(i, first + at, n, before, keys, view.start(before)))
            at += n
        first += rows
    return segments


def bucketed(segments: list[Segment], view: View) -> list[list[Segment]]:
    """Group segments of similar size: close a bucket once its padding costs more than another bucket would."""
    if not view.exact:
        return similar(segments, view)
    rungs = groupby(sorted(segments, key=rung), key=rung)
    return [bucket for _, same in rungs for bucket in similar(list(same), view)]


def rung(segment: Segment) -> int:
    """Keys that a segment of an exact plan is computed with."""
    return -(-(segment.keys - segment.start) // EXACT_KEYS) * EXACT_KEYS


def similar(segments: list[Segment], view: View) -> list[list[Segment]]:
    """The buckets of segments that may share one."""

    def cost(rows: int, keys: int) -> float:
        return keys * view.width * (1 + rows / ROWS_PER_FETCH)

    buckets: list[list[Segment]] = []
    rows = keys = 0
    waste = 0.0
    for s in sorted(segments, key=lambda s: (s.rows, s.keys), reverse=True):
        new_keys = max(keys, s.keys)
        added = len(buckets[-1]) * (cost(rows, new_keys) - cost(rows, keys)) if buckets else 0.0
        added += cost(rows, new_keys) - cost(s.rows, s.keys)
        full = buckets and (len(buckets[-1]) + 1) * new_keys * view.width > BUCKET_SIZE
        full = full or (view.exact and rows >= FOLD_ROWS)
        if not buckets or full or waste + added > BUCKET_COST:
            buckets.append([])
            rows, keys, waste, added = s.rows, s.keys, 0.0, 0.0
        buckets[-1].append(s)
        keys = max(keys, s.keys)
        waste += added
    return sorted((sorted(b, key=lambda s: s.first) for b in buckets), key=lambda b: b[0].first)


def make_plan(batch: Batch, view: View, translate: Callable[[Tensor], Tensor] | None = None) -> Plan:
    """Buckets for layers of this `view`; `translate` maps slots into a separate sliding-window pool."""
    total = sum(batch.rows)
    buckets: list[Bucket] = []
    found = torch.empty(total, dtype=torch.int64)
    offset = 0
    for group in bucketed(segments_of(batch, view), view):
        bucket, real, flat = make_bucket(group, batch, view, translate)
        found[flat] = torch.nonzero(real).flatten() + offset
        offset += bucket.batch * bucket.rows
        buckets.append(bucket)
    in_order = offset == total and torch.equal(found, torch.arange(total))
    return Plan(tuple(buckets), None if in_order else found)


def make_bucket(
    group: list[Segment], batch: Batch, view: View, translate: Callable[[Tensor], Tensor] | None = None
) -> tuple[Bucket, Tensor, Tensor]:
    """The bucket, which of its padded rows are real (bool [batch * rows]) and their flat rows (int64).

    A key column c of a segment is token `start + c` of its request, `start` > 0 where a window lets the
    bucket skip the front. Padding repeats a real token's slot: its weight is zero, and it must be finite.
    """
    request, first, rows, prefix, keys, start = (
        torch.tensor([getattr(s, f) for s in group]) for f in ("request", "first", "rows", "prefix", "keys", "start")
    )
    n = int(rows.max())
    r = torch.arange(n)
    real = r < rows[:, None]
    flat = first[:, None] + torch.where(real, r, 0)
    position = prefix[:, None] + (torch.where(real, r, 0) if batch.depth is None else batch.depth[flat])
    span = rung(group[0]) if view.exact else int((keys - start).max())
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
        and not view.exact
    )
    fold = (view.group > 1 or view.exact) and (view.capped or n < FOLD_ROWS)
    chunks = -(-n * (view.group if fold else 1) // EXACT_ROWS) if view.exact else 0
    mask = None
    if not fused_causal:
        mask = additive(visible(batch, view, flat, position, prefix, token, valid), real, view, fold)
    if mask is not None and view.exact:
        mask = mask_in_chunks(mask, chunks, view.kv_heads if fold else None)
    bucket = Bucket(
        batch=len(group),
        rows=n,
        keys=span,
        slots=as_run(slots),
        q_rows=as_run(flat.flatten()),
        mask=mask,
        causal=fused_causal,
        fold=fold,
        chunks=chunks,
    )
    return bucket, real.flatten(), flat[real]


def visible(
    batch: Batch,
    view: View,
    flat: Tensor,
    position: Tensor,
    prefix: Tensor,
    token: Tensor,
    valid: Tensor,
) -> Tensor:
    """bool [batch, rows, keys]: may this row (`flat`, at `position`) see this key (`token`)?"""
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


def additive(see: Tensor, real: Tensor, view: View, fold: bool) -> Tensor | None:
    """0 where visible, -inf elsewhere, [batch, 1, rows, keys]; rows repeat per query head when folded."""
    see = see | ~real[:, :, None]  # a padding row must not divide by nothing
    if bool(see.all()) and not view.exact:
        return None
    mask = torch.zeros(see.shape, dtype=view.dtype).masked_fill_(~see, float("-inf"))
    if fold and (mask.shape[1] > 1 or view.exact):
        mask = mask.repeat_interleave(view.group, dim=1)
    return mask[:, None]


def mask_in_chunks(mask: Tensor, chunks: int, heads: int | None) -> Tensor:
    """A mask [batch, 1, rows, keys] in chunks of EXACT_ROWS rows, as `Bucket` says; once per head where there are
    several requests, since no stride fits both."""
    batch, _, rows, keys = mask.shape
    mask = torch.nn.functional.pad(mask, (0, 0, 0, chunks * EXACT_ROWS - rows))
    if heads is None:
        return mask.view(chunks, 1, EXACT_ROWS, keys)
    return mask.expand(-1, heads, -1, -1).reshape(batch, heads * chunks, EXACT_ROWS, keys)


def as_run(index: Tensor) -> Tensor | slice:
    """A slice when the indices follow one another: a view then replaces a copy."""
    first, last = int(index[0]), int(index[-1])
    if last - first == len(index) - 1 and torch.equal(index, torch.arange(first, last + 1)):
        return slice(first, last + 1)
    return index

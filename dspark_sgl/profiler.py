"""Measures, before the server takes requests, what a step costs on this machine: the points a cost model is made of.

Runs the real forwards (a plain step, the drafter's proposal, a verify) on made-up requests whose KV slots nobody owns
yet. Never keeps anything but seconds: the request table is put back as it was.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardBatch, ForwardMode
from torch import Tensor

from dspark_sgl.kernels.layout import chain_layout
from dspark_sgl.policies.cost import DISTURBED, CostPoint, disturbance
from dspark_sgl.spec_algos.protocol import Commit, Drafter, History, Round

from .graphs import VerifyGraphs, live_rows
from .ranks import agree
from .verify_input import VerifyInput

logger = logging.getLogger(__name__)

MOST_REQUESTS = 32
LEAST_PASSES, PASSES, ENOUGH_S, MOST_S = 2, 3, 10.0, 60.0
"""A step's time is its least of `PASSES` passes over all steps, since a neighbour may slow one down and never speeds
one up. After `ENOUGH_S` seconds `LEAST_PASSES` will do, unless they contradict each other; after `MOST_S` one will: a
server that starts late is worse off than one that learns its costs from its first steps."""
SHORT_CONTEXT, LONG_CONTEXT = 64, 1024


class NoHistory(History):
    """A made-up request has said nothing."""

    @property
    def key(self) -> Any:
        return self

    def __len__(self) -> int:
        return 0

    def tail(self, count: int) -> list[int]:
        return []


@dataclass(frozen=True)
class MadeUp:
    """Requests in mid-generation that nobody has asked.

    requests, lens: int64 `[n]`; slots: int64 `[n, S]`, for what follows; context: tokens in the KV of each
    """

    requests: Tensor
    lens: Tensor
    slots: Tensor
    context: int

    @property
    def count(self) -> int:
        return int(self.requests.shape[0])


class StepProfiler:
    """Times the steps of one worker. `width`: KV slots reserved per request and round, the anchor's included."""

    def __init__(
        self,
        target: Any,
        drafter: Drafter,
        capture: CaptureHiddenMode,
        block: int,
        width: int,
        graphs: VerifyGraphs | None = None,
    ) -> None:
        self._target, self._drafter, self._capture, self._graphs = target, drafter, capture, graphs
        self._block, self._width = block, width
        self._table: Tensor = target.req_to_token_pool.req_to_token
        self._capacity = int(target.token_to_kv_pool_allocator.available_size())
        self.device = target.device
        self._device = torch.get_device_module(target.device)
        self._generator = torch.Generator(device=target.device).manual_seed(0)

    @torch.no_grad()
    def run(self) -> list[CostPoint]:
        """Every point of the grid; a few dozen forwards, the same ones on every tensor-parallel rank."""
        start = time.perf_counter()
        best: dict[tuple[str, int, int, int], CostPoint] = {}
        for done in range(1, PASSES + 1):
            for point in (point for load in self._loads() for point in self._measure(load)):
                key = (point.kind, point.requests, point.rows, point.context)
                best[key] = min(point, best.get(key, point), key=lambda measured: measured.seconds)
            # By rank 0's clock: ranks that run different forwards end the server.
            elapsed = time.perf_counter() - start
            enough = done >= LEAST_PASSES and elapsed > ENOUGH_S and disturbance(best.values()) <= DISTURBED
            spent = enough or elapsed > MOST_S
            if agree(torch.tensor([int(spent)], device=self.device)).item():
                break
        logger.info("dspark: %d kinds of step profiled in %.1f s", len(best), time.perf_counter() - start)
        return list(best.values())

    def _loads(self) -> Iterator[MadeUp]:
        """Batches of 1, 2, 4 .. requests on a short context, and a few of them on a long one."""
        rows, columns = self._table.shape
        longest = columns - self._width
        counts = [2**k for k in range(MOST_REQUESTS.bit_length()) if 2**k < rows]
        for context, chosen in ((SHORT_CONTEXT, counts), (LONG_CONTEXT, [n for n in counts if n in (1, 8, 32)])):
            context = min(context, longest)
            for count in chosen:
                if count * (context + self._width) < self._capacity:
                    yield from self._load(count, context)

    def _load(self, count: int, context: int) -> Iterator[MadeUp]:
        span = context + self._width
        rows = torch.arange(1, count + 1, device=self._table.device)
        before = self._table[rows, :span].clone()
        slots = torch.arange(1, count * span + 1, device=self._table.device).view(count, span)
        self._table[rows, :span] = slots.to(self._table.dtype)
        try:
            yield MadeUp(rows, torch.full_like(rows, context), slots[:, context:], context)
        finally:
            self._table[rows, :span] = before

    def _measure(self, load: MadeUp) -> Iterator[CostPoint]:
        n, total = load.count, load.count * load.context
        yield CostPoint("plain", n, n, total, self._seconds(partial(self._plain, load)))
        for depth in sorted({1, (self._block + 1) // 2, self._block}):
            yield CostPoint("draft", n, n * depth, total, self._seconds(partial(self._draft, load, depth)))
            yield CostPoint("verify", n, n * (depth + 1), total, self._seconds(partial(self._verify, load, depth)))

    def _seconds(self, step: Callable[[], None]) -> float:
        """Of a step that follows one of its own size, as most do: on a CPU the first one pays for its memory."""
        step()
        self._device.synchronize()
        start = time.perf_counter()
        step()
        self._device.synchronize()
        return time.perf_counter() - start

    def _plain(self, load: MadeUp) -> None:
        """A decode step, its token, and the drafter kept in step."""
        slots = load.slots[:, 0]
        batch = self._batch(ForwardMode.DECODE, load, torch.ones_like(slots), load.lens, slots, 1)
        self._finish(self._target.forward(batch).logits_output, load, load.lens, slots)

    def _draft(self, load: MadeUp, depth: int) -> None:
        self._drafter.propose(
            Round(
                anchors=torch.ones_like(load.lens),
                lens=load.lens,
                lens_cpu=load.lens.cpu(),
                req_slots=load.requests,
                cache_locs=load.slots,
                histories=[NoHistory()] * load.count,
                depths=[depth] * load.count,
                temperature=None,
                greedy=torch.ones(load.count, dtype=torch.bool, device=load.lens.device),
                generator=self._generator,
            )
        )

    def _verify(self, load: MadeUp, depth: int) -> None:
        """A verify of `depth` drafts per request, all accepted: what follows it is at its dearest."""
        drafts = torch.ones(load.count, depth, dtype=torch.int64, device=load.lens.device)
        layout = chain_layout(drafts[:, 0], drafts, [depth] * load.count)
        wide = layout if self._graphs is None else self._graphs.fit(layout)
        spec = VerifyInput(wide, load.lens, torch.full((load.count,), load.context), self._capture)
        slots = load.slots[:, : wide.max_width].flatten()
        batch = self._batch(ForwardMode.TARGET_VERIFY, load, wide.pack(wide.tokens), spec.positions, slots, 0)
        batch.spec_info = spec
        output = self._target.forward(batch).logits_output
        live_rows(layout, wide, output)
        positions = layout.pack(load.lens[:, None] + layout.depths)
        self._finish(output, load, positions, load.slots[:, : depth + 1].flatten())

    def _finish(self, output: Any, load: MadeUp, positions: Tensor, slots: Tensor) -> None:
        output.next_token_logits.argmax(-1)
        self._drafter.observe(
            Commit(
                positions=positions,
                cache_locs=slots,
                successors=torch.ones_like(positions),
                hidden=output.hidden_states if self._drafter.uses_target_hidden else None,
                req_slots=load.requests,
                starts=[load.context] * load.count,
                counts=[positions.shape[0] // load.count] * load.count,
            )
        )

    def _batch(
        self, mode: ForwardMode, load: MadeUp, tokens: Tensor, positions: Tensor, slots: Tensor, new: int
    ) -> ForwardBatch:
        """A forward over these rows. new: tokens of a request that SGLang counts into `seq_lens` already: 1 in a decode
        step, 0 in a verify"""
        lens = load.lens + new
        batch = ForwardBatch(
            forward_mode=mode,
            batch_size=load.count,
            input_ids=tokens,
            req_pool_indices=load.requests,
            seq_lens=lens,
            out_cache_loc=slots,
            seq_lens_sum=int(lens.sum()),
            seq_lens_cpu=lens.cpu(),
            positions=positions,
            capture_hidden_mode=self._capture,
        )
        self._target.kv_index_translator.bind_own_plan(batch)
        return batch

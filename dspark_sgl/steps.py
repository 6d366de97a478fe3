"""The decode steps of one worker as its policy sees them: planned before, learned from when the host knows what came.

Where SGLang overlaps its scheduler with a GPU, a step is learned from while the next one runs, and the one after that
is planned then, for the same requests; elsewhere a step is learned from at its end. Never touches the model. A governor
plans on rank 0, and the other ranks are told.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dspark_sgl.kernels.layout import TreeLayout
from dspark_sgl.kernels.staging import Fetched, Mark
from dspark_sgl.kernels.walk import path_lengths

from .clock import PREFILL, RoundClock
from .governor import Governor
from .plan import Plan, StepRecord
from .ranks import agree
from .request_view import RequestBook
from .seen import Seen


@dataclass
class _Step:
    """A decode step from plan to learning.

    plain: nobody can speculate, whatever the policy says
    lens: tokens in each request's KV when it began
    record: the governor's record of it; on rank 0 only
    layout, seen, path: filled in when a round has been enqueued; a plain step has none
    span: the device's ends of the step before and of this one; where the scheduler overlaps
    """

    requests: Sequence[Any]
    plain: bool
    plan: Plan
    record: StepRecord | None
    lens: Sequence[int] = ()
    layout: TreeLayout | None = None
    seen: Seen | None = None
    path: Fetched | None = None
    span: tuple[Mark, Mark] | None = None


class Steps:
    """Plans, times and learns from decode steps.

    ahead: SGLang overlaps its scheduler with the device. Three steps are then alive at once: `_before`, which is
        learned from now, `_open`, which runs, and `_next`, planned ahead
    seeds: requests whose draws are tied to a seed are speculated (`deterministic.py`)
    """

    def __init__(self, ahead: bool, device: torch.device | str, seeds: bool) -> None:
        self.clock = RoundClock()
        self.governor: Governor | None = None
        self._ahead, self._device, self._seeds = ahead, device, seeds
        self._book = RequestBook()
        self._before: _Step | None = None
        self._open: _Step | None = None
        self._next: _Step | None = None
        self._ended: Mark | None = None

    def begin(self, batch: Any) -> None:
        """SGLang's scheduler has a batch."""
        self._before, self._open = self._open, None
        seconds = self.clock.enter(batch.after_idle_gap)
        if not self._ahead:
            self._time(self._before, seconds)
        elif self._ended is None or batch.after_idle_gap:
            self._ended = Mark(self._device)  # with nothing to do, the device begins now

    def plan(self, batch: Any) -> Plan:
        """How deep each request is drafted, and how drafts are accepted."""
        info = batch.sampling_info
        # A processor sees one row per request, and a seed promises the tokens of plain decoding.
        plain = info.has_custom_logit_processor or (info.sampling_seed is not None and not self._seeds)
        lens = batch.seq_lens_cpu.tolist()
        step, self._next = self._next, None
        if step is None or step.requests != batch.reqs or step.plain != plain:
            step = self._planned(list(batch.reqs), lens, plain)
        step.lens = lens
        step.plan = Plan.from_wire(agree(torch.tensor(step.plan.wire)).tolist())
        self._open = step
        if self.governor is not None and step.record is not None:
            self.governor.started(step.record)
        return step.plan

    def _planned(self, requests: Sequence[Any], lens: Sequence[int], plain: bool) -> _Step:
        if self.governor is None:
            return _Step(requests, plain, Plan.plain(len(requests)), None)
        record = self.governor.plan([self._book.load(*r, plain) for r in zip(requests, lens, strict=True)])
        return _Step(requests, plain, record.plan, record)

    def select(self, seen: Seen) -> Tensor:
        """bool `[bs, N]`, on the host: the drafts that are worth the target's time."""
        kept = torch.zeros(seen.shape, dtype=torch.bool)
        if self.governor is not None:
            assert self._open is not None and self._open.record is not None
            kept = torch.from_numpy(self.governor.select(self._open.record, *seen.drafts))
        return agree(kept)

    def enqueued(self, layout: TreeLayout, seen: Seen, path: Fetched) -> None:
        """A round has been enqueued; its path arrives later. path: as in `Acceptance`"""
        assert self._open is not None
        if self._open.record is not None:
            self._open.record.rows = sum(layout.widths)
        self._open.layout, self._open.seen, self._open.path = layout, seen, path

    def end(self, kind: str, batch: Any) -> None:
        """Back to SGLang's scheduler, after a step of this kind."""
        self.clock.leave(kind, len(batch.reqs))
        if self._ahead:
            assert self._ended is not None
            began, self._ended = self._ended, Mark(self._device)
            if self._open is not None:
                self._open.span = began, self._ended
            self._learn(self._before)
            if self.governor is not None and self._before is not None and self._before.span is not None:
                # By the host's clock a step ends where the next is scheduled: at once after a plain one, which has
                # published its lengths before it ran, and after acceptance otherwise. The device's clock is fair.
                start, end = self._before.span
                self._time(self._before, end.since(start))
            # The device is busy, and most steps are followed by one of the same requests.
            self._next = self._open and self._planned(
                self._open.requests, batch.seq_lens_cpu.tolist(), self._open.plain
            )
        elif kind != PREFILL:
            self._learn(self._open)

    def _time(self, step: _Step | None, seconds: float | None) -> None:
        if step is not None and step.record is not None and self.governor is not None and seconds is not None:
            self.governor.timed(step.record, seconds)

    def _learn(self, step: _Step | None) -> None:
        """What a step brought, for clock, requests and policy."""
        if step is None:
            return
        live = np.array([not (self._ahead and _was_over(*r)) for r in zip(step.requests, step.lens, strict=True)])
        if step.record is not None:
            step.record.live = live
        if step.layout is not None and step.seen is not None and step.path is not None:
            path, widths = step.path.get(), step.layout.widths
            spoke, lengths = [i for i, width in enumerate(widths) if width > 1 and live[i]], path_lengths(path)
            self.clock.count(sum(widths[i] - 1 for i in spoke), [lengths[i] for i in spoke])
            for i in spoke:
                self._book.count(step.requests[i], lengths[i])
            if self.governor is not None and step.record is not None:
                if step.plan.settled:
                    self.governor.select(step.record, *step.seen.drafts)
                self.governor.learn(step.record, path.numpy())
        if self.governor is not None and step.record is not None:
            self.governor.publish(step.record, self.clock.seconds)


def _was_over(request: Any, length: int) -> bool:
    """Whether a request had ended, or lost its KV, before a step that it was part of: where the scheduler overlaps, it
    reads an end when the next step is on its way. length: tokens in its KV when the step began, without the anchor
    """
    written = len(request.origin_input_ids) + len(request.output_ids)
    return bool(request.is_retracted or (request.finished() and length + 1 >= written))

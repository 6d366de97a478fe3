"""CUDA graphs for what comes after a block pass: the vocabulary head, and the tokens drawn from it step by step.

A sequential head is dozens of kernels of a few microseconds each, and a host asks for them more slowly than a GPU runs
them. They are recorded when first asked for, per rung of requests and kind of draft, and only replayed from then on.
A recording and what it returns stay for ever, so all of a drafter's share one budget; what would exceed it runs
eagerly. Never decides what is drafted, and is not there on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from .protocol import Proposal

MOST_REQUESTS = 64
MOST_VALUES = 1 << 28
"""Float32 that all recordings of a drafter together may keep for what was drawn from: 1 GiB."""


@dataclass(frozen=True)
class DraftInputs:
    """What drafts are made of, a row per request.

    hidden: `[bs, D, H]`, features of the block; anchors: int64 `[bs]`; greedy: bool `[bs]`
    temperature: float32 `[bs]`; None when drafts are chosen, not drawn: every request is greedy, or acceptance is by
        match
    depths: int64 `[bs]`, how deep trees go; None of chains
    """

    hidden: Tensor
    anchors: Tensor
    greedy: Tensor
    temperature: Tensor | None
    depths: Tensor | None

    def room(self, requests: int) -> DraftInputs:
        """The same for so many requests, in memory of its own: nobody in it drafts yet."""
        hidden = self.hidden.new_zeros(requests, *self.hidden.shape[1:])
        anchors = torch.zeros(requests, dtype=torch.int64, device=hidden.device)
        greedy = torch.ones(requests, dtype=torch.bool, device=hidden.device)
        temperature = None if self.temperature is None else torch.ones(requests, device=hidden.device)
        depths = None if self.depths is None else torch.zeros_like(anchors)
        return DraftInputs(hidden, anchors, greedy, temperature, depths)

    def fill(self, other: DraftInputs) -> None:
        """Copy `other`'s requests into the first rows. Those after them keep what they had, which nobody reads."""
        for mine, theirs in zip(self._tensors, other._tensors, strict=True):
            mine[: len(theirs)].copy_(theirs)

    @property
    def _tensors(self) -> list[Tensor]:
        drawn = () if self.temperature is None else (self.greedy, self.temperature)
        return [self.hidden, self.anchors, *drawn, *(() if self.depths is None else (self.depths,))]


def _rung(requests: int) -> int:
    return 1 << (requests - 1).bit_length()


Draft = Callable[[DraftInputs], Proposal]


@dataclass(frozen=True)
class _Recording:
    graph: torch.cuda.CUDAGraph
    inputs: DraftInputs
    proposal: Proposal


class DraftGraphs:
    """One recording per kind of draft and rung. What a replay returns is overwritten by the next."""

    def __init__(self, most_values: int = MOST_VALUES) -> None:
        self._recordings: dict[tuple[Hashable, int], _Recording] = {}
        self._reserved: set[tuple[Hashable, int]] = set()
        self._most = self._left = most_values
        self._pool = torch.cuda.graph_pool_handle()

    def reserve(self, kind: Hashable, requests: int, kept: int, at_work: int) -> bool:
        """Sets memory aside for a recording of so many requests' drafts of this kind, unless it has some; False where
        it does not fit. It may take half of what is left, so that smaller ones still fit.

        kept, at_work: float32 values of q per request: those held for good, and those needed while the recording runs,
            in memory that all share
        """
        rung = _rung(requests)
        if (kind, rung) in self._reserved:
            return True
        if requests > MOST_REQUESTS or rung * (kept + at_work) > self._most or 2 * rung * kept > self._left:
            return False
        self._left -= rung * kept
        self._reserved.add((kind, rung))
        return True

    def run(self, kind: Hashable, draft: Draft, inputs: DraftInputs, generator: torch.Generator) -> Proposal:
        """`draft(inputs)`. kind: all that `draft` depends on besides its inputs; generator: its source of randomness"""
        requests = len(inputs.anchors)
        rung = _rung(requests)
        recording = self._recordings.get((kind, rung))
        if recording is None:
            recording = self._recordings[kind, rung] = self._record(draft, inputs.room(rung), generator)
        recording.inputs.fill(inputs)
        recording.graph.replay()
        return recording.proposal.first(requests)

    def _record(self, draft: Draft, inputs: DraftInputs, generator: torch.Generator) -> _Recording:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            draft(inputs)  # kernels are compiled and libraries set up, which a graph cannot hold
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        if inputs.temperature is not None:
            graph.register_generator_state(generator)
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            proposal = draft(inputs)
        return _Recording(graph, inputs, proposal)

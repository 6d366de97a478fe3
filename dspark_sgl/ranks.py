"""Tensor-parallel agreement: rank 0 decides, the rest receive. Two ranks that disagree on a shape hang the server."""

from __future__ import annotations

import torch
from sglang.srt.runtime_context import get_parallel
from torch import Tensor


def is_leader() -> bool:
    """Whether decisions are made here."""
    return bool(get_parallel().tp_rank == 0)


def agree(decision: Tensor) -> Tensor:
    """Rank 0's value of `decision`, on the host or on the device; free on one rank."""
    parallel = get_parallel()
    if parallel.tp_size > 1:
        decision, ranks = decision.contiguous(), parallel.tp_group
        group = ranks.cpu_group if decision.device.type == "cpu" else ranks.device_group
        torch.distributed.broadcast(decision, src=ranks.first_rank, group=group)
    return decision

"""Numbers between host and device, without waits that nobody asked for.

PyTorch's own copy of pageable memory to a GPU waits for all that the GPU still has to do, so what a round sends goes
through pinned memory. What the host wants to know is on its way as soon as it exists; only who reads it waits.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor


def staged(values: Sequence[int] | Tensor, device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """`values`, which the host knows, as a tensor on `device`."""
    return pinned(torch.as_tensor(values, dtype=dtype), device).to(device, non_blocking=True)


def pinned(host: Tensor, device: torch.device) -> Tensor:
    """The same numbers in memory from which a copy to `device` needs no wait."""
    return host.pin_memory() if device.type == "cuda" else host


class Fetched:
    """A tensor of a device on its way to the host: asked for at once, waited for when it is read.

    What is asked of the device afterwards is not waited for.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._event = None
        self._host = tensor
        if tensor.device.type == "cuda":
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def get(self) -> Tensor:
        if self._event is not None:
            self._event.synchronize()
        return self._host


class Mark:
    """The moment at which a device is done with all that has been asked of it so far."""

    def __init__(self, device: torch.device | str) -> None:
        self._event = None
        self._seconds = time.perf_counter()
        if torch.device(device).type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record()

    def since(self, earlier: Mark) -> float:
        """Seconds between the two; waits until this one has passed."""
        if self._event is None or earlier._event is None:
            return self._seconds - earlier._seconds
        self._event.synchronize()
        return earlier._event.elapsed_time(self._event) / 1e3

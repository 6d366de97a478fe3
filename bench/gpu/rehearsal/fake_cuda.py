"""`torch.cuda` without a device: tensors asked for on "cuda" lie on the CPU, and streams are none. See `fake_graphs.py`
for what a capture is. Nothing here knows SGLang."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from fake_graphs import CUDAGraph, capturing, graph
from torch.overrides import TorchFunctionMode

MEMORY = 141 << 30
_PROPERTIES = SimpleNamespace(
    name="NVIDIA H200",
    major=9,
    minor=0,
    total_memory=MEMORY,
    multi_processor_count=132,
    warp_size=32,
    max_threads_per_multi_processor=2048,
    regs_per_multiprocessor=65536,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    L2_cache_size=60 << 20,
    is_integrated=False,
    is_multi_gpu_board=False,
    uuid="GPU-00000000-0000-0000-0000-000000000000",
)


# -- Devices -------------------------------------------------------------------------------------------------------


def _on_cpu(value: Any) -> Any:
    """A device that means CUDA, as the CPU."""
    if isinstance(value, torch.device):
        return torch.device("cpu") if value.type == "cuda" else value
    if isinstance(value, str) and (value == "cuda" or value.startswith("cuda:")):
        return "cpu"
    return value


SEES_CUDA = ("dspark_sgl.kernels.tree_draft", "dspark_sgl.kernels.mask", "dspark_sgl.kernels.walk", "dspark_sgl.worker")
"""Modules to whom a tensor is one of a GPU, as far as they ask: they take the branch, or Triton's kernel, of a GPU."""

_IS_CUDA = torch.Tensor.is_cuda.__get__


class _OnCpu(TorchFunctionMode):
    """Every call of torch that names a CUDA device names the CPU instead."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func == _IS_CUDA and sys._getframe(1).f_globals.get("__name__") in SEES_CUDA:
            return True
        kwargs = dict(kwargs or {})
        device = kwargs.get("device")
        if device is not None:
            # A bare number is the index of a CUDA device.
            kwargs["device"] = "cpu" if isinstance(device, int) else _on_cpu(device)
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return func(*map(_on_cpu, args), **kwargs)


class Generator(torch.Generator):
    def __new__(cls, device: Any = "cpu") -> Generator:
        return super().__new__(cls, _on_cpu(device))


# -- Streams and events --------------------------------------------------------------------------------------------


class Stream:
    """The order of the program is the only one there is."""

    priority = 0
    device_index = 0
    device = torch.device("cuda", 0)

    def __init__(self, *_: Any, **__: Any) -> None:
        # SGLang insists that streams differ.
        self.cuda_stream = self.stream_id = id(self)

    def _nothing(self, *_: Any, **__: Any) -> None: ...

    synchronize = wait_event = wait_stream = _nothing

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record()
        return event

    def query(self) -> bool:
        return True

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: Any) -> None: ...


class Event:
    cuda_event = 0

    def __init__(self, *_: Any, **__: Any) -> None:
        self._at = 0.0

    def record(self, stream: Any = None) -> None:
        self._at = time.perf_counter()

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Event) -> float:
        return (end._at - self._at) * 1e3


_current = Stream()


def _set_stream(stream: Stream) -> None:
    global _current
    _current = stream


class StreamContext:
    def __init__(self, stream: Stream | None) -> None:
        self._stream = stream

    def __enter__(self) -> None:
        self._before = _current
        if self._stream is not None:
            _set_stream(self._stream)

    def __exit__(self, *_: Any) -> None:
        _set_stream(self._before)


class Device:
    """`with torch.cuda.device(0):`; there is only one."""

    def __init__(self, *_: Any) -> None: ...

    def __enter__(self) -> None: ...

    def __exit__(self, *_: Any) -> None: ...


# -- Putting it in place -------------------------------------------------------------------------------------------


def install(module: ModuleType) -> None:
    """Once torch has been imported."""
    assert module is torch
    _install_cuda()
    _install_tensors()
    _install_processes()


def _answer(value: Any) -> Callable[..., Any]:
    return lambda *_, **__: value


def _install_cuda() -> None:
    cuda = torch.cuda
    nothing = (
        *("init", "_lazy_init", "set_device", "synchronize", "empty_cache", "ipc_collect"),
        *("reset_peak_memory_stats", "reset_max_memory_allocated", "manual_seed", "manual_seed_all"),
    )
    for name in nothing:
        setattr(cuda, name, _answer(None))
    for name, value in {
        "is_available": True,
        "is_initialized": True,
        "is_bf16_supported": True,
        "is_current_stream_capturing": False,
        "device_count": 1,
        "current_device": 0,
        "get_device_name": _PROPERTIES.name,
        "get_device_capability": (9, 0),
        "get_device_properties": _PROPERTIES,
        "get_arch_list": ["sm_90"],
        "mem_get_info": (MEMORY - (4 << 30), MEMORY),
        "memory_allocated": 0,
        "memory_reserved": 0,
        "max_memory_allocated": 0,
        "max_memory_reserved": 0,
        "default_stream": _current,
        "graph_pool_handle": (0, 0),
        "can_device_access_peer": False,
    }.items():
        setattr(cuda, name, _answer(value))
    cuda.memory_stats = lambda *_: dict.fromkeys(("reserved_bytes.all.current", "reserved_bytes.all.peak"), 0)
    cuda.is_current_stream_capturing = capturing
    cuda.device = cuda.device_of = Device
    cuda.StreamContext = cuda.stream = StreamContext
    cuda.current_stream = lambda *_: _current
    cuda.set_stream = _set_stream
    cuda.Stream = cuda.ExternalStream = torch.cuda.streams.Stream = Stream
    cuda.Event = torch.cuda.streams.Event = Event
    cuda.CUDAGraph = torch.cuda.graphs.CUDAGraph = CUDAGraph
    cuda.graph = torch.cuda.graphs.graph = graph
    torch.get_device_module = lambda device=None: torch.cuda
    torch.accelerator.current_accelerator = lambda *_, **__: torch.device("cuda")
    torch.accelerator.is_available = _answer(True)
    torch.accelerator.synchronize = _answer(None)
    torch.Stream, torch.Event = Stream, Event


def _install_tensors() -> None:
    torch.Generator = Generator
    torch.Tensor.cuda = lambda self, *_, **__: self
    torch.Tensor.pin_memory = lambda self, *_: self
    torch.Tensor.is_pinned = lambda self, *_: True
    torch.Tensor.record_stream = lambda self, _: None
    torch.nn.Module.cuda = lambda self, *_: self
    to = torch.nn.Module.to
    torch.nn.Module.to = lambda self, *args, **kwargs: to(
        self, *map(_on_cpu, args), **{name: _on_cpu(value) for name, value in kwargs.items()}
    )
    impl = torch.library.Library.impl

    def impl_on_cpu(self: Any, name: Any, run: Any, key: str = "", **kwargs: Any) -> Any:
        return impl(self, name, run, "CPU" if key == "CUDA" else key, **kwargs)

    torch.library.Library.impl = impl_on_cpu
    # A mode is in force in the thread that entered it.
    _OnCpu().__enter__()
    run = threading.Thread.run

    def run_on_cpu(self: threading.Thread) -> None:
        with _OnCpu():
            run(self)

    threading.Thread.run = run_on_cpu


def _install_processes() -> None:
    """NCCL's groups are Gloo's."""
    import torch.distributed as dist
    from torch.distributed import distributed_c10d as c10d

    def gloo(make: Callable[..., Any]) -> Callable[..., Any]:
        def made(*args: Any, **kwargs: Any) -> Any:
            kwargs.pop("device_id", None)
            if kwargs.get("backend") is not None:
                kwargs["backend"] = "gloo"
            return make(*["gloo" if arg == "nccl" else arg for arg in args], **kwargs)

        return made

    for name in ("init_process_group", "new_group"):
        made = gloo(getattr(c10d, name))
        setattr(c10d, name, made)
        setattr(dist, name, made)

"""CUDA graphs as tapes: every operation of a capture with its arguments and results, run again at a replay.

A replay works on the tensors of the capture and writes into its results. Python code in between does not run, as on a
GPU; a result of another shape, and a host that waits for the device during a capture, are errors. Nothing here knows
SGLang.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

Entry = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any]
_tape: list[Entry] | None = None


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive"}
"""What the host learns from values or whose shape depends on them."""


class _Recorder(TorchDispatchMode):
    """Runs every operation and writes it on the tape, save those that only look at memory in another way."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        by_mask = name in ("index", "index_put", "index_put_") and any(
            t.dtype in (torch.bool, torch.uint8) for t in _tensors(args[1])
        )
        if by_mask or name in WAITING:
            raise RuntimeError(f"{name} waits for the device, which a capture must not")
        with _untaped():
            out = func(*args, **kwargs)
        if func._schema.is_mutable:
            _write(func, args, kwargs, None)
        elif "empty" not in name:
            # A packed weight has no storage to share.
            given = {t.untyped_storage().data_ptr() for t in _tensors([args, kwargs]) if not t.is_mkldnn}
            made = [t for t in _tensors(out) if t.untyped_storage().data_ptr() not in given]
            if made:
                _write(func, args, kwargs, out)
        return out


@contextmanager
def _untaped() -> Iterator[None]:
    """What an operation launches by itself belongs to it."""
    global _tape
    tape, _tape = _tape, None
    try:
        yield
    finally:
        _tape = tape


def _write(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    assert _tape is not None
    _tape.append((func, args, kwargs, out))


def launch(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A kernel that torch does not see: it writes into tensors that it is given."""
    if _tape is None:
        return run(*args, **kwargs)
    with _disable_current_modes():
        out = run(*args, **kwargs)
    _write(run, args, kwargs, None)
    return out


class CUDAGraph:
    def __init__(self, keep_graph: bool = False) -> None:
        self.tape: list[Entry] = []

    def replay(self) -> None:
        with torch.inference_mode():
            for func, args, kwargs, out in self.tape:
                new = func(*args, **kwargs)
                if out is None:
                    continue
                for old, fresh in zip(_tensors(out), _tensors(new), strict=True):
                    if old.shape != fresh.shape:
                        raise RuntimeError(f"{func}: captured {tuple(old.shape)}, replayed {tuple(fresh.shape)}")
                    old.copy_(fresh)

    def reset(self) -> None:
        self.tape.clear()

    def register_generator_state(self, generator: torch.Generator) -> None:
        """A replay draws anew as it is."""

    def pool(self) -> tuple[int, int]:
        return (0, 0)


@contextmanager
def graph(cuda_graph: CUDAGraph, pool: Any = None, stream: Any = None, **_: Any) -> Iterator[None]:
    global _tape
    assert _tape is None, "captures do not nest"
    _tape = cuda_graph.tape
    try:
        with _Recorder():
            yield
    finally:
        _tape = None


def capturing() -> bool:
    return _tape is not None

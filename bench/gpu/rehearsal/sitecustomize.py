"""A CUDA device that is not there: with this folder on PYTHONPATH, SGLang takes its GPU path and computes on the CPU.

Python imports this module at the start of every process, SGLang's children included. Each patch below waits for the
module that it changes. Nothing is skipped or made up: what a kernel would compute is computed by torch or by Triton's
interpreter, and a CUDA graph is what a real one is, a tape of kernels with fixed arguments. It never makes anything
faster, and it is never imported where the rehearsal did not put it on the path.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

Patch = Callable[[ModuleType], None]


def _torch(torch: ModuleType) -> None:
    import fake_cuda

    fake_cuda.install(torch)


def _flashinfer(flashinfer: ModuleType) -> None:
    """Its wrappers and plans."""
    import fake_flashinfer as fake

    for name in (
        "BatchDecodeWithPagedKVCacheWrapper",
        "BatchPrefillWithPagedKVCacheWrapper",
        "BatchPrefillWithRaggedKVCacheWrapper",
        "fast_decode_plan",
    ):
        setattr(flashinfer, name, getattr(fake, name))


def _interpreter(interpreter: ModuleType) -> None:
    """A Triton kernel that is launched while a graph is captured is one entry of its tape."""
    import fake_graphs

    run = interpreter.InterpretedFunction.run
    interpreter.InterpretedFunction.run = lambda *args, **kwargs: fake_graphs.launch(run, *args, **kwargs)


def _loader(loader: ModuleType) -> None:
    """SGLang's kernels that nvcc compiles at first use."""
    import fake_jit

    loader.load_jit = fake_jit.load_jit


def _runner(runner: ModuleType) -> None:
    """Says in the log which graphs are replayed."""
    execute = runner.DecodeCudaGraphRunner.execute

    def told(self: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        out = execute(self, batch, *args, **kwargs)
        who = "draft" if self.model_runner.is_draft_worker else "target"
        width, padded = self.captured_req_width, self.bs
        print(f"rehearsal: replayed {who}, {width} rows, {batch.batch_size} requests as {padded}", flush=True)
        return out

    runner.DecodeCudaGraphRunner.execute = told


PATCHES: dict[str, Patch] = {
    "torch": _torch,
    "flashinfer": _flashinfer,
    "triton.runtime.interpreter": _interpreter,
    "sglang.srt.model_executor.runner.decode_cuda_graph_runner": _runner,
    "sglang.kernels.jit.utils.compile.loader": _loader,
}


class _Patching(importlib.abc.Loader):
    """A module's own loader, and the patch after it."""

    def __init__(self, loader: importlib.abc.Loader, patch: Patch) -> None:
        self._loader, self._patch = loader, patch

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        self._patch(module)

    def __getattr__(self, name: str) -> object:
        return getattr(self._loader, name)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in PATCHES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Patching(spec.loader, PATCHES[name])
        return spec


sys.meta_path.insert(0, _Finder())

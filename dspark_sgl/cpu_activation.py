"""Whether this machine is a plain CPU: the entry point of `sglang.srt.platforms`.

SGLang calls it while its own platform module is half imported, so nothing here may import SGLang.
"""

from __future__ import annotations

import os

import torch

ENTRY_POINT = "dspark_cpu"
CPU_PLATFORM = "dspark_sgl.cpu_platform:CpuPlatform"


def activate() -> str | None:
    """SGLang's question to a platform plugin: the class to use on this machine, or None for "not mine"."""
    wanted = os.environ.get("SGLANG_PLATFORM")
    if wanted and wanted != ENTRY_POINT:
        return None
    if os.environ.get("SGLANG_USE_CPU_ENGINE") == "1":
        return None
    return None if has_accelerator() else CPU_PLATFORM


def has_accelerator() -> bool:
    """A GPU, or another device that torch computes on."""
    return torch.cuda.is_available() or torch.accelerator.current_accelerator(check_available=True) is not None

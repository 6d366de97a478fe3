"""A plain CPU as an SGLang platform: `python -m sglang.launch_server --model-path M` and nothing else.

It fills in only what the user left open (attention backend, memory, chunk size). `cpu_activation.py` says when SGLang
takes it. SGLang imports this module while it is being imported itself; whoever needs it imports `sglang` before.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.model_executor.cuda_graph_config import Backend, Phase, with_phase
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform

ATTENTION_BACKEND = "dspark_cpu"

# KV slots unless the user sizes memory: SGLang's rule takes most of the machine, whose memory is not ours alone,
# and touches all of it at start. A CPU is saturated long before this many tokens are in flight.
MAX_TOTAL_TOKENS = 131_072
# A prefill chunk holds up every running request; on a CPU rows are at full speed from a few hundred on.
CHUNKED_PREFILL = 1024
# Sizes SGLang's table of requests (this many rows of context-length entries, zeroed at start).
MAX_RUNNING_REQUESTS = 256


class CpuPlatform(CpuDeviceMixin, SRTPlatform):
    """No graphs, no Triton, no pinned memory; our attention backend for targets and drafts."""

    # Not PlatformEnum.CPU: that one stands for SGLang's CPU engine and its compiled kernels.
    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"
    capabilities = PlatformCapabilities()

    def get_device(self, device_id: int = 0) -> str:  # SGLang compares `server_args.device` with strings
        return "cpu"

    def apply_server_args_defaults(self, server_args: Any) -> None:
        """Fill what the user left open. Reads resolve to earlier answers of SGLang's own rules for "cpu"."""
        if server_args.attention_backend in (None, "intel_amx", "torch_native"):
            server_args.attention_backend = ATTENTION_BACKEND
        if server_args.max_total_tokens is None and server_args.mem_fraction_static is None:
            server_args.max_total_tokens = MAX_TOTAL_TOKENS
        if server_args.chunked_prefill_size is None:
            server_args.chunked_prefill_size = CHUNKED_PREFILL
        if server_args.max_running_requests is None:
            server_args.max_running_requests = MAX_RUNNING_REQUESTS
        # An idle scheduler that polls would hold one of the cores that the next request needs.
        server_args.sleep_on_idle = True
        for phase in (Phase.PREFILL, Phase.DECODE):
            server_args.cuda_graph_config = with_phase(server_args.cuda_graph_config, phase, backend=Backend.DISABLED)

    def get_default_attention_backend(self) -> str:
        return ATTENTION_BACKEND

    def get_default_speculative_draft_attention_backend(self, algorithm: str) -> str:
        return ATTENTION_BACKEND

    def supports_speculative_draft_attention_backend(self, algorithm: str, backend: str) -> bool:
        return backend == ATTENTION_BACKEND

    def supports_speculative_algorithm(self, algorithm: str) -> bool:
        """Every plugin's own algorithm; SGLang's built-in ones launch kernels that a CPU lacks."""
        from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

        return algorithm.upper() not in SpeculativeAlgorithm.__members__

    def get_kv_pool_cls(self, *, kind: str) -> type | None:
        from .cpu_kv_pool import CpuKVPool

        return CpuKVPool if kind == "mha" else None

    def init_backend(self) -> None:
        from . import cpu_attention, cpu_rope

        cpu_attention.register()
        cpu_rope.register(self.get_dispatch_key_name())
        torch.set_flush_denormal(True)

    def post_load_model(self, model: torch.nn.Module) -> None:
        from .cpu_ops import install

        install(model)

    def get_torch_profiler_activity_str(self) -> str:
        return "CPU"

    def get_torch_profiler_activity(self) -> torch.profiler.ProfilerActivity:
        return torch.profiler.ProfilerActivity.CPU

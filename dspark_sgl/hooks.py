"""The thirteen functions of SGLang that we hook for want of an extension point. Each is in `compat_surface.py`.

A server whose algorithm is not ours gets an option it may ignore and, on our CPU platform, torch twins of SGLang's
kernels for the slot table and for seeded draws; nothing else changes for it.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.mem_cache.allocation_sizing import get_alloc_reserve_per_decode
from sglang.srt.platforms import current_platform
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from sglang.srt.runtime_context import get_spec

from dspark_sgl.policies.requests import parse_request_options

from .algorithm import DrafterAlgorithm, is_ours
from .cpu_kv_pool import assign_slots, last_slots
from .cpu_platform import CpuPlatform
from .cpu_seeds import multinomial_with_seed
from .deepseek_v4 import hand_over
from .deterministic import deterministic
from .settings import add_cli_args
from .stops import cut_runs, trim_turn
from .unserved import refuse_request

ADD_CLI_ARGS = "sglang.srt.server_args.ServerArgs.add_cli_args"
VALIDATE_REQUEST = "sglang.srt.managers.tokenizer_manager.TokenizerManager._validate_one_request"
INTERNAL_STATE = (
    "sglang.srt.managers.scheduler_components.internal_state.SchedulerInternalStateController._add_speculative"
)
POOL_STATS = "sglang.srt.managers.scheduler.Scheduler.init_pool_stats_observer"
SLOT_HEADROOM = "sglang.srt.mem_cache.kv_cache_configurator.get_req_to_token_extra_context_len"
ACCEPTED_RUNS = (
    "sglang.srt.managers.scheduler_components.batch_result_processor.SchedulerBatchResultProcessor"
    "._resolve_spec_v2_tokens"
)
SESSION_TURN = "sglang.srt.session.session_controller.Session.create_req"
OUTPUT_HEADROOM = "sglang.srt.managers.tokenizer_manager.compute_num_reserved_tokens"
ASSIGN_SLOTS = "sglang.srt.mem_cache.allocation.assign_req_to_token_pool_func"
LAST_SLOTS = "sglang.srt.mem_cache.allocation.get_last_loc"
SEEDED_DRAW = "sglang.srt.layers.sampler.multinomial_with_seed"
DEEPSEEK_V4 = "sglang.srt.arg_groups.deepseek_v4_hook.apply_deepseek_v4_defaults"
BATCH_INVARIANCE = "sglang.srt.model_executor.model_runner.ModelRunner.maybe_enable_batch_invariant_mode"


def register() -> None:
    """Hand the hooks to SGLang, which applies them once all plugins are loaded."""
    HookRegistry.register(ADD_CLI_ARGS, add_cli_args, HookType.BEFORE)
    HookRegistry.register(DEEPSEEK_V4, hand_over, HookType.BEFORE)
    HookRegistry.register(VALIDATE_REQUEST, _before_validate_request, HookType.BEFORE)
    HookRegistry.register(INTERNAL_STATE, _after_internal_state, HookType.AFTER)
    HookRegistry.register(POOL_STATS, _after_pool_stats, HookType.AFTER)
    HookRegistry.register(SLOT_HEADROOM, _after_slot_headroom, HookType.AFTER)
    HookRegistry.register(ACCEPTED_RUNS, _after_accepted_runs, HookType.AFTER)
    HookRegistry.register(SESSION_TURN, _before_session_turn, HookType.BEFORE)
    HookRegistry.register(OUTPUT_HEADROOM, _after_output_headroom, HookType.AFTER)
    if isinstance(current_platform, CpuPlatform):
        HookRegistry.register(ASSIGN_SLOTS, assign_slots, HookType.REPLACE)
        HookRegistry.register(LAST_SLOTS, last_slots, HookType.REPLACE)
        HookRegistry.register(SEEDED_DRAW, multinomial_with_seed, HookType.REPLACE)
        HookRegistry.register(BATCH_INVARIANCE, _no_kernels_for_batch_invariance, HookType.REPLACE)


def _before_validate_request(_manager: Any, request: Any, _input_ids: list[int]) -> None:
    """Refuse with a 400 what cannot be served: SGLang answers a ValueError here with its text."""
    if not is_ours(get_spec().speculative_algorithm):
        return
    params = request.sampling_params
    if isinstance(params, dict):
        parse_request_options(params.get("custom_params"))
    refuse_request(request, deterministic())


def _after_internal_state(_result: Any, controller: Any, state: dict[str, Any]) -> None:
    """`/server_info` shows what speculation does: accepted length, its histogram, seconds per phase."""
    scheduler = controller.scheduler
    if isinstance(scheduler.spec_algorithm, DrafterAlgorithm) and scheduler.draft_worker is not None:
        state["dspark"] = scheduler.draft_worker.report()


def _after_pool_stats(_result: Any, scheduler: Any) -> None:
    """From here on the scheduler can say how full its queue and its KV pool are, signals of a policy; and it knows how
    long a request can grow."""
    if isinstance(scheduler.spec_algorithm, DrafterAlgorithm) and scheduler.draft_worker is not None:
        scheduler.draft_worker.watch(scheduler)
        # The last of a pool that a round may reserve is nobody's; a lone request that grew into it would be aborted.
        room = scheduler.max_total_num_tokens - get_alloc_reserve_per_decode() - scheduler.page_size
        too_long = max(0, scheduler.max_req_len - room)
        scheduler.max_req_len -= too_long
        scheduler.max_req_input_len -= too_long


def _after_slot_headroom(columns: int) -> int:
    """Columns of a request's row in the slot table beyond the context length: all that a round reserves fits.

    SGLang keeps room for one verify and reserves two, so a wide tree near the end of the context would leave its row.
    """
    return max(columns, get_alloc_reserve_per_decode()) if is_ours(get_spec().speculative_algorithm) else columns


def _after_accepted_runs(runs: list[list[int]], _processor: Any, _result: Any, batch: Any) -> list[list[int]]:
    return cut_runs(runs, batch.reqs) if isinstance(batch.spec_algorithm, DrafterAlgorithm) else runs


def _before_session_turn(session: Any, request: Any, *_: Any, **__: Any) -> None:
    # Of a streaming session SGLang trims the last turn itself.
    if not session.streaming and is_ours(get_spec().speculative_algorithm):
        trim_turn(session, request.session_params.rid)


def _after_output_headroom(tokens: int) -> int:
    """Output tokens that a request is refused for at the context's end: none, since `SLOT_HEADROOM` has room."""
    return 0 if is_ours(get_spec().speculative_algorithm) else tokens


def _no_kernels_for_batch_invariance(_runner: Any) -> None:
    """SGLang would put Triton kernels in place of torch's; a CPU's products do without (`deterministic.py`)."""

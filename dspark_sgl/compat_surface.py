"""The list itself: every name of SGLang that our code uses, with the parameters we pass by name.

Add a line when you import something new (a test compares the list with the imports), and name what would break.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class HostName:
    """One name of SGLang's: where it is, which parameters we pass to it, and what we need it for."""

    path: str
    parameters: tuple[str, ...] = ()
    why: str = ""


def _srt(path: str, parameters: str, why: str) -> HostName:
    return HostName(f"sglang.srt.{path}", tuple(parameters.split()), why)


_DEEPSEEK_V4 = (
    _srt(
        "arg_groups.deepseek_v4_hook.apply_deepseek_v4_defaults",
        "server_args model_arch",
        "handing DeepSeek-V4 over to SGLang's own DSPARK",
    ),
    _srt("arg_groups.overrides.declare_resolution", "", "handing DeepSeek-V4 over to SGLang's own DSPARK"),
    _srt("arg_groups.overrides.model_config_of", "server_args", "handing DeepSeek-V4 over to SGLang's own DSPARK"),
    _srt("arg_groups.overrides.resolving_view", "server_args", "handing DeepSeek-V4 over to SGLang's own DSPARK"),
    _srt(
        "speculative.dspark_components.dspark_config.checkpoint_bundles_dspark_draft",
        "hf_config",
        "handing DeepSeek-V4 over to SGLang's own DSPARK",
    ),
)

_PLUGIN = (
    _srt("plugins.hook_registry.HookRegistry.register", "target hook hook_type", "hooking where no extension point is"),
    _srt("plugins.hook_registry.HookType.BEFORE", "", "hooking where no extension point is"),
    _srt("plugins.hook_registry.HookType.AFTER", "", "hooking where no extension point is"),
    _srt("mem_cache.kv_cache_configurator.get_req_to_token_extra_context_len", "", "room at the context's end"),
    _srt("mem_cache.allocation_sizing.get_alloc_reserve_per_decode", "", "room at the context's end"),
    _srt("managers.tokenizer_manager.compute_num_reserved_tokens", "", "requests up to the context's end"),
    _srt(
        "managers.scheduler_components.batch_result_processor.SchedulerBatchResultProcessor._resolve_spec_v2_tokens",
        "result batch",
        "runs that end where plain decoding stops",
    ),
    _srt("session.session_controller.Session.create_req", "", "sessions that go on from where a turn stopped"),
    _srt("server_args.ServerArgs.add_cli_args", "parser", "adding --dspark-policy"),
    _srt("managers.tokenizer_manager.TokenizerManager._validate_one_request", "", "refusing bad custom_params"),
    _srt(
        "managers.scheduler_components.internal_state.SchedulerInternalStateController._add_speculative",
        "",
        "showing what speculation does in /server_info",
    ),
    _srt("managers.scheduler.Scheduler.init_pool_stats_observer", "", "queue and KV pool as signals of a policy"),
    _srt(
        "managers.scheduler_components.pool_stats_observer.SchedulerPoolStatsObserver.get_pool_stats",
        "",
        "how full the KV pool is",
    ),
)

_ALGORITHM = (
    _srt("speculative.spec_info.SpeculativeAlgorithm.register", "name supports_overlap spec_class", "our algorithms"),
    _srt("speculative.spec_info.SpeculativeAlgorithm.from_string", "name", "recognising our algorithms"),
    _srt("speculative.spec_registry.CustomSpecAlgo.is_dflash_family", "", "capturing the target's hidden states"),
    _srt("speculative.spec_registry.CustomSpecAlgo.is_eagle", "", "sizing the draft's KV, prefixes by pairs of tokens"),
    _srt("speculative.spec_registry.CustomSpecAlgo.is_eagle3", "", "capturing the target's hidden states"),
    _srt("speculative.spec_registry.CustomSpecAlgo.has_draft_kv", "", "sizing the draft's KV"),
    _srt("speculative.spec_registry.CustomSpecAlgo.handle_server_args", "server_args", "settings of a speculative run"),
    _srt("speculative.spec_registry.CustomSpecAlgo.supports_target_verify_for_draft", "", "the draft's block pass"),
    _srt(
        "managers.overlap_utils.FutureMap",
        "device spec_algo req_to_token_pool needs_cpu_seq_lens needs_confidence_relay",
        "the scheduler asks every algorithm for one",
    ),
)

_WORKER = (
    _srt("speculative.base_spec_worker.BaseSpecWorker.alloc_memory_pool", "", "the worker's life cycle"),
    _srt("speculative.base_spec_worker.BaseSpecWorker.init_cuda_graphs", "", "the worker's life cycle"),
    _srt("speculative.base_spec_worker.BaseSpecWorker.weight_update_runners", "", "new weights on a running server"),
    _srt("speculative.base_spec_worker.BaseSpecWorker.clear_cache_pool", "", "new weights on a running server"),
    _srt(
        "managers.tp_worker.TpModelWorker.forward_batch_generation",
        "batch is_verify capture_hidden_mode",
        "the target's prefill, decode and verify forwards",
    ),
    _srt(
        "managers.scheduler.GenerationBatchResult",
        "logits_output next_token_ids accept_lens can_run_cuda_graph next_draft_input "
        "speculative_num_draft_tokens new_seq_lens",
        "what a round returns to the scheduler",
    ),
    _srt("runtime_context.get_spec", "", "the speculative settings in force"),
    _srt("runtime_context.get_parallel", "", "agreeing across tensor-parallel ranks"),
    _srt("runtime_context.get_exec", "", "whether CUDA graphs or deterministic inference are wanted"),
    _srt("runtime_context.get_schedule", "", "whether the scheduler overlaps with the device"),
    _srt("runtime_context.get_observability", "", "whether the server has metrics"),
    _srt("speculative.spec_info.SpecInput", "", "what a batch carries between rounds"),
    _srt("speculative.spec_info.SpecInputType.DFLASH_DRAFT", "", "what a batch carries between rounds"),
    _srt("speculative.spec_info.SpecInputType.DFLASH_VERIFY", "", "the verify batch"),
    _srt("speculative.eagle_utils.eagle_prepare_for_decode", "batch", "reserving KV for a verify"),
    _srt("mem_cache.kv_loc_plan.IdSpaceKind.FULL", "", "FlashInfer's KV indices"),
    _srt("layers.logprob_processor.compute_spec_logprobs", "batch logits_output accept_index", "logprobs of a round"),
)

_FORWARD = (
    _srt(
        "model_executor.runner.DecodeCudaGraphRunner.__init__",
        "model_runner attn_backend speculative_num_steps speculative_num_draft_tokens",
        "CUDA graphs of a round",
    ),
    _srt("model_executor.runner.DecodeCudaGraphRunner.can_run_graph", "forward_batch", "CUDA graphs of a round"),
    _srt(
        "model_executor.runner.DecodeCudaGraphRunner.execute",
        "forward_batch pp_proxy_tensors",
        "CUDA graphs of a round",
    ),
    _srt(
        "model_executor.runner.DecodeCudaGraphRunner.get_spec_info",
        "num_tokens",
        "what a verify graph is captured with",
    ),
    _srt(
        "layers.attention.flashinfer_backend.FlashInferAttnBackend.init_cuda_graph_state",
        "max_bs max_num_tokens kv_indices_buf",
        "one room for the indices and masks of all graphs",
    ),
    _srt("model_executor.graph_shared_output.GraphSharedOutput.__init__", "device max_rows", "CUDA graphs of a round"),
    _srt("model_executor.model_runner.ModelRunner._get_attention_backend", "", "an attention plan for each width"),
    _srt("model_executor.forward_batch_info.CaptureHiddenMode.FULL", "", "the target's hidden states"),
    _srt("model_executor.forward_batch_info.ForwardMode.TARGET_VERIFY", "", "the verify forward"),
    _srt("model_executor.forward_batch_info.ForwardMode.DECODE", "", "a round without speculation; a draft's step"),
    _srt("model_executor.forward_batch_info.ForwardMode.EXTEND", "", "an autoregressive draft's context"),
    _srt(
        "model_executor.forward_batch_info.ForwardBatch",
        "forward_mode batch_size input_ids req_pool_indices seq_lens out_cache_loc seq_lens_sum seq_lens_cpu "
        "positions spec_info capture_hidden_mode extend_num_tokens extend_seq_lens extend_prefix_lens extend_start_loc "
        "extend_seq_lens_cpu extend_prefix_lens_cpu",
        "the draft's forwards",
    ),
    _srt("layers.logits_processor.LogitsProcessorOutput", "hidden_states last_hidden_states", "the draft's features"),
    _srt(
        "layers.logits_processor.LogitsProcessor.forward",
        "input_ids hidden_states lm_head aux_hidden_states hidden_states_before_norm",
        "an autoregressive draft's features, in place of its logits",
    ),
    _srt(
        "speculative.eagle_info.EagleDraftExtendInput",
        "hidden_states num_tokens_per_req",
        "what an autoregressive draft reads beside its tokens",
    ),
    _srt("models.llama_eagle3.LlamaForCausalLMEagle3.set_embed_and_head", "embed head", "the target's embedding"),
    _srt("models.mimo_mtp.MiMoMTP.set_embed_and_head", "embed head", "the target's embedding"),
    _srt("models.llama.LlamaForCausalLM.get_embed_and_head", "", "the target's embedding"),
    _srt("managers.schedule_batch.Req.refresh_fill_ids", "", "the token after a prefill chunk"),
    _srt("mem_cache.memory_pool.KVWriteLoc", "", "writing the draft's context KV"),
)

_CONSTRAINTS = (
    _srt("constrained.base_grammar_backend.BaseGrammarObject.rollback", "k", "knowing which grammars go back"),
    _srt("sampling.penaltylib.repetition_penalty.apply_scaling_penalties", "", "repetition penalties on verify rows"),
    _srt("speculative.spec_utils.GrammarTree.from_host", "", "grammars over a tree"),
    _srt("speculative.spec_utils.generate_token_bitmask", "", "grammars over a tree"),
    _srt("utils.async_probe.sanitize_nan_logits", "", "NaN of the target, on verify rows"),
)

_DRAFT = (
    _srt(
        "speculative.draft_worker_common.build_draft_tp_worker",
        "server_args gpu_id nccl_port target_model_config algo_label random_seed",
        "the draft's own model runner",
    ),
    _srt("speculative.spec_utils.draft_pp_context", "", "the draft's own model runner"),
    _srt("environ.envs", "", "having SGLang build the confidence head"),
    _srt("speculative.dspark_components.dspark_config.parse_dspark_draft_config", "draft_hf_config", "draft configs"),
    _srt("speculative.dflash_utils.parse_dflash_draft_config", "draft_hf_config", "draft configs"),
    _srt(
        "speculative.dflash_info.DFlashVerifyInput",
        "draft_token positions draft_token_num custom_mask capture_hidden_mode",
        "the draft's block pass",
    ),
    _srt("speculative.dflash_utils.can_dflash_slice_qkv_weight", "", "the draft's context KV"),
    _srt("models.dflash.DFlashAttention.kv_proj_only", "hidden_states", "the draft's context KV"),
    _srt("models.dflash.DFlashAttention.apply_k_norm", "k", "the draft's context KV"),
    _srt("models.dflash.DFlashAttention.apply_k_rope", "positions k", "the draft's context KV"),
    _srt("mem_cache.kv_index_translator.KVIndexTranslator.bind_own_plan", "", "the draft's block pass"),
    _srt("mem_cache.kv_index_translator.KVIndexTranslator.pack_read_stream", "", "FlashInfer's KV indices"),
    _srt("models.dspark.Qwen3DSparkModel.project_target_hidden", "target_hidden", "the draft's context KV"),
    _srt("models.dspark.Qwen3DSparkModel.attach_shared_modules", "embed_tokens lm_head", "the target's lm_head"),
    _srt("models.dspark.gather_and_crop_vocab", "", "base logits of a draft"),
    _srt("models.dspark.project_through_lm_head", "", "base logits of a draft"),
    _srt("lora.layers.unwrap_lora_layer", "", "the target's lm_head"),
)

_CPU = (
    _srt("layers.attention.base_attn_backend.AttentionBackend.init_forward_metadata", "forward_batch", "CPU attention"),
    _srt("layers.attention.base_attn_backend.AttentionBackend.forward_extend", "", "CPU attention"),
    _srt("layers.attention.base_attn_backend.AttentionBackend.forward_decode", "", "CPU attention"),
    _srt("layers.attention.attention_registry.register_attention_backend", "name", "CPU attention"),
    _srt("layers.radix_attention.AttentionType.ENCODER_ONLY", "", "CPU attention of the draft block"),
    _srt("mem_cache.swa_memory_pool.SWAKVPool", "", "CPU attention with a sliding window"),
    _srt("layers.attention.attention_registry.ATTENTION_BACKENDS", "", "CPU attention"),
    _srt("arg_groups.choices.add_attention_backend_choices", "", "CPU attention by name"),
    _srt("arg_groups.choices.add_draft_attention_backend_choices", "", "CPU attention of the draft by name"),
    _srt("arg_groups.choices.add_deterministic_attention_backend_choices", "", "deterministic inference on a CPU"),
    _srt(
        "arg_groups.choices.add_radix_supported_deterministic_attention_backend_choices",
        "",
        "deterministic inference on a CPU",
    ),
    _srt(
        "model_executor.model_runner.ModelRunner.maybe_enable_batch_invariant_mode",
        "",
        "deterministic inference without SGLang's kernels for it",
    ),
    _srt("layers.sampler.multinomial_with_seed", "logprobs seed positions", "seeded draws without a GPU kernel"),
    _srt("layers.sampler.sampling_from_probs_torch", "probs sampling_seed positions", "seeded draws of a round"),
    _srt(
        "layers.sampler.top_k_top_p_min_p_sampling_from_probs_torch",
        "probs top_ks top_ps min_ps need_min_p_sampling sampling_seed positions",
        "seeded draws of a round",
    ),
    HostName(
        "sglang.kernels.fused_op.BaseFusedOp.register_oot_forward",
        ("op_cls", "fn", "platform_key"),
        "rotary embedding in few calls",
    ),
    _srt("platforms.interface.SRTPlatform.get_dispatch_key_name", "", "rotary embedding in few calls"),
    _srt(
        "layers.rotary_embedding.RotaryEmbedding.forward_native", "positions query key", "rotary embedding in few calls"
    ),
    _srt("platforms.interface.SRTPlatform.get_default_attention_backend", "", "serving without a GPU"),
    _srt("platforms.interface.PlatformCapabilities", "supports_triton", "serving without a GPU"),
    _srt("platforms.device_mixin.PlatformEnum.OOT", "", "serving without a GPU"),
    _srt("platforms.cpu.CpuDeviceMixin", "", "serving without a GPU"),
    _srt("platforms.current_platform", "", "knowing whether our CPU platform is in charge"),
    _srt("model_executor.cuda_graph_config.Backend.DISABLED", "", "no graphs on a CPU; ours elsewhere"),
    _srt("model_executor.cuda_graph_config.Phase.PREFILL", "", "no graphs on a CPU"),
    _srt("model_executor.cuda_graph_config.Phase.DECODE", "", "graphs of our own"),
    _srt("model_executor.cuda_graph_config.with_phase", "backend", "no graphs on a CPU"),
    _srt("mem_cache.memory_pool.MHATokenToKVPool.move_kv_cache", "", "keeping the accepted path's KV on a CPU"),
    _srt("mem_cache.memory_pool.MHATokenToKVPool._init_kv_copy_and_warmup", "", "no Triton copy on a CPU"),
    _srt("platforms.interface.SRTPlatform.get_kv_pool_cls", "kind", "no Triton copy on a CPU"),
    _srt("layers.quantization.unquant.UnquantizedLinearMethod.apply", "layer x bias", "linear layers over few rows"),
    _srt("layers.quantization.unquant.UnquantizedEmbeddingMethod.apply", "layer x bias", "the head over few rows"),
    _srt(
        "layers.quantization.base_config.QuantizeMethodBase.process_weights_after_loading",
        "layer",
        "packed weights that follow an update",
    ),
    _srt("mem_cache.allocation.assign_req_to_token_pool_func", "", "slots of a request without a GPU kernel"),
    _srt("mem_cache.allocation.get_last_loc", "", "pages of more than one slot without a GPU kernel"),
)

_BENCH = (HostName("sglang.benchmark.serving.cli_main", (), "the client of `bench load`"),)

SURFACE: tuple[HostName, ...] = (
    *_PLUGIN,
    *_DEEPSEEK_V4,
    *_ALGORITHM,
    *_WORKER,
    *_FORWARD,
    *_CONSTRAINTS,
    *_DRAFT,
    *_CPU,
    *_BENCH,
)

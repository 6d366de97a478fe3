"""Targets, settings and requests of SGLang's that our worker does not serve, each refused in one line.

What is not named here is served, or refused by SGLang itself. Loads nothing: it reads a config.json, the server's
arguments, and what SGLang says of a target that it has loaded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from dspark_sgl.policies.requests import parse_request_options

from .draft_config import DraftError, read_json

_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
_SINKS = {"gpt_oss", "granite_swa", "granitemoe_swa"}
"""Model types whose attention has sinks, where no field of the config says so."""
_RECURRENT = (
    "conv_L_cache",
    "hybrid_override_pattern",
    "layers_block_type",
    "lightning",
    "linear_attn",
    "linear_num_",
    "mamba",
    "ssm_",
)
"""How fields begin that only a model with recurrent layers has: Mamba, linear attention, short convolutions."""
_WINDOWS = "has sliding windows, and SGLang's FlashInfer backend would show its verify rows too much"

SWITCHES = {
    "enable_mis": "scores",
    "enable_pdmux": "prefill in pieces",
    "enable_return_indexer_topk": "such output",
    "enable_return_routed_experts": "such output",
    "enable_two_batch_overlap": "halves",
    "is_embedding": "embeddings",
}
"""Switches of SGLang's, each for something that a round does not have."""
_FIELDS = (
    *("return_hidden_states", "return_sampling_mask", "return_routed_experts", "return_indexer_topk"),
    *("token_indices_to_pool", "multi_item_delimiter_indices"),
)
"""Of a request: outputs that a round does not keep, and scores by position, which SGLang omits when speculating."""


def refuse_settings(args: Any, algorithm: str) -> None:
    """Raises DraftError for what the server was started with."""
    for option, why in _settings(args):
        raise DraftError(f"{algorithm} does not run with {option}: {why}; remove it")
    preferred = args.preferred_sampling_params or {}
    try:
        parse_request_options((json.loads(preferred) if isinstance(preferred, str) else preferred).get("custom_params"))
    except ValueError as error:
        raise DraftError(f"--preferred-sampling-params: {error}") from None


def _settings(args: Any) -> Iterator[tuple[str, str]]:
    """Options that are set and cannot be served, with the reason."""
    for name, what in SWITCHES.items():
        if getattr(args, name):
            yield f"--{name.replace('_', '-')}", f"a round has no {what}"
    if args.tokenizer_worker_num > 1:
        yield "--tokenizer-worker-num", "SGLang loads no plugins in these processes, and they ask for the algorithm"
    if args.pp_size != 1:
        yield f"--pp-size {args.pp_size}", "a round is one forward of the whole target"
    if args.attn_dp_size > 1:
        yield "data-parallel attention", "a rank without requests would have to join the rounds of the others"
    if args.disaggregation_mode != "null":
        yield f"--disaggregation-mode {args.disaggregation_mode}", "KV comes without the drafter's context"
    for name, served in (("moe_a2a_backend", {"none"}), ("moe_dense_tp_size", {None, args.tp_size}), ("dcp_size", {1})):
        if getattr(args, name) not in served:
            yield (
                f"--{name.replace('_', '-')} {getattr(args, name)}",
                "it assumes the same number of rows for every request",
            )


def refuse_request(request: Any, deterministic: bool = False) -> None:
    """Raises ValueError, which SGLang answers as a 400. deterministic: of `--enable-deterministic-inference`"""
    params = request.sampling_params
    if deterministic and isinstance(params, dict) and params.get("min_p"):
        raise ValueError(
            "min_p is not available under --enable-deterministic-inference, where SGLang would draw wrongly"
        )
    for name in _FIELDS:
        if getattr(request, name, None):
            raise ValueError(
                f"{name} is not available with this speculative algorithm; start the server without "
                "--speculative-algorithm"
            )


def refuse_target(folder: Path, algorithm: str, on_gpu: bool = False) -> None:
    """Raises DraftError for a target whose layers our verify, or on a GPU FlashInfer's backend, cannot serve."""
    file = folder / "config.json"
    if not file.is_file():
        return  # SGLang says so
    whole = read_json(file)
    text = whole["text_config"] if isinstance(whole.get("text_config"), Mapping) else whole
    for problem in chain(_problems(text), _problems_on_gpu(text) if on_gpu else ()):
        raise DraftError.at(file, problem, f"start without --speculative-algorithm {algorithm}")


def refuse_runner(target: Any, algorithm: str) -> None:
    """Raises DraftError for what only the loaded target shows, of which this is SGLang's model runner."""
    if target.device == "cuda" and target.sliding_window_size not in (None, -1):
        raise DraftError(f"the target {_WINDOWS}; start without --speculative-algorithm {algorithm}")


def _problems_on_gpu(config: Mapping[str, Any]) -> Iterator[str]:
    # It places the window by a request's first row, and ignores it under a mask.
    if "sliding_attention" in (config.get("layer_types") or ()):
        yield f"the target {_WINDOWS}"


def _problems(config: Mapping[str, Any]) -> Iterator[str]:
    if config.get("is_encoder_decoder"):
        yield "the target has an encoder beside its decoder, which a verify row knows nothing of"
    if config.get("kv_lora_rank") or config.get("compress_ratios"):
        yield "the target has latent or compressed attention (MLA), which takes no mask of ours"
    if config.get("attention_chunk_size"):
        yield "the target has attention in chunks, where ours looks back at everything"
    if config.get("model_type") in _SINKS or any("attention_sink" in name for name, on in config.items() if on):
        yield "the target has attention sinks, of which our attention knows nothing"
    kinds = set(config.get("layer_types") or ()) - _ATTENTION
    recurrent = sorted(name for name, value in config.items() if value and name.startswith(_RECURRENT))
    if kinds or recurrent:
        named = ", ".join(sorted(map(str, kinds)) or recurrent[:1])
        yield f"the target has recurrent layers ({named}), whose state a rejected draft would change"
    if any("mrope_section" in (config.get(name) or ()) for name in ("rope_scaling", "rope_parameters")):
        yield "the target has rotary positions in three dimensions (M-RoPE), of which a verify row has one"

"""Targets and settings of SGLang's that our worker does not serve, each refused in one line before anything is loaded.

What is not named here is served, or refused by SGLang itself. Reads a config.json and the server's arguments only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .draft_config import DraftError, read_json

_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
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


def refuse_settings(args: Any, algorithm: str) -> None:
    """Raises DraftError for what the server was started with."""
    if args.pp_size != 1:
        raise DraftError(f"{algorithm} does not run with pipeline parallelism; remove --pp-size {args.pp_size}")
    if args.attn_dp_size > 1:
        # A rank without requests would have to join the others' rounds with an empty one.
        raise DraftError(f"{algorithm} does not run with data-parallel attention; use --dp-size without it")
    if args.disaggregation_mode != "null":
        # A decode server is handed KV and no context of the drafter.
        raise DraftError(f"{algorithm} does not run with --disaggregation-mode {args.disaggregation_mode}; remove it")


def refuse_target(folder: Path, algorithm: str) -> None:
    """Raises DraftError for a target whose layers a verify of ours does not fit."""
    file = folder / "config.json"
    if not file.is_file():
        return  # SGLang says so
    whole = read_json(file)
    text = whole["text_config"] if isinstance(whole.get("text_config"), Mapping) else whole
    for problem in _problems(text):
        raise DraftError.at(file, problem, f"start without --speculative-algorithm {algorithm}")


def _problems(config: Mapping[str, Any]) -> Iterator[str]:
    if config.get("kv_lora_rank") or config.get("compress_ratios"):
        yield "the target has latent or compressed attention (MLA), which takes no mask of ours"
    kinds = set(config.get("layer_types") or ()) - _ATTENTION
    recurrent = sorted(name for name, value in config.items() if value and name.startswith(_RECURRENT))
    if kinds or recurrent:
        named = ", ".join(sorted(map(str, kinds)) or recurrent[:1])
        yield f"the target has recurrent layers ({named}), whose state a rejected draft would change"
    if any("mrope_section" in (config.get(name) or ()) for name in ("rope_scaling", "rope_parameters")):
        yield "the target has rotary positions in three dimensions (M-RoPE), of which a verify row has one"

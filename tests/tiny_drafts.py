"""DSpark, DFlash, Eagle3 and MTP drafts for the twelve-token target: real formats, random weights, bad on purpose."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from .tiny_models import CONTEXT, HEADS, HIDDEN, KV_HEADS, LAYERS, VOCAB

RANK, GAMMA, MASK_TOKEN = 4, 4, 11
HEAD_DIM, MIDDLE = HIDDEN // HEADS, 64
EAGLE3_LAYERS = (0, 1, 2)
EAGLE3_VOCAB = (1, 2, 3, 5, 6, 7, 8, 10, 11)  # a draft over part of the vocabulary, as the released ones are
MTP_VOCAB = (0, 2, 3, 4, 6, 7, 9, 10, 11)
DFLASH_VOCAB = (0, 1, 2, 4, 5, 6, 8, 9, 11)

_SIZES: dict[str, Any] = {
    "torch_dtype": "float32",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": MIDDLE,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "hidden_act": "silu",
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}


def write_dspark(folder: Path, head: str = "vanilla", layers: int = 1) -> None:
    """`Qwen3DSparkModel` as DeepSpec writes it, over all twelve tokens. head: `vanilla`, `gated` or `rnn`"""
    g = torch.Generator().manual_seed(1)
    tensors = {
        **_backbone(g, layers),
        "markov_head.markov_w1.weight": _random(g, VOCAB, RANK) * 4,
        "markov_head.markov_w2.weight": _random(g, VOCAB, RANK) * 4,
        "confidence_head.proj.weight": _random(g, 1, HIDDEN + RANK),
        "confidence_head.proj.bias": torch.zeros(1),
    }
    if head == "gated":
        tensors["markov_head.gate_proj.weight"] = _random(g, RANK, HIDDEN + RANK) * 4
        tensors["markov_head.gate_proj.bias"] = _random(g, RANK)
    if head == "rnn":
        tensors["markov_head.joint_proj.weight"] = _random(g, 3 * RANK, HIDDEN + 2 * RANK) * 4
        tensors["markov_head.joint_proj.bias"] = _random(g, 3 * RANK)
    config = _block_config(layers) | {
        "architectures": ["Qwen3DSparkModel"],
        "block_size": GAMMA,
        "markov_rank": RANK,
        "markov_head_type": head,
        "enable_confidence_head": True,
        "confidence_head_with_markov": True,
    }
    _write(folder, config, tensors)


def write_dflash(folder: Path, deepspec: bool = False) -> None:
    """`DFlashDraftModel`, where the anchor's row predicts nothing; or, as DeepSpec releases it, a `Qwen3DSparkModel`
    without a head, where it does. Both draft GAMMA tokens, over nine of the twelve."""
    tensors = _backbone(torch.Generator().manual_seed(4), layers=1)
    tensors["norm.weight"] *= 3
    if deepspec:
        said = {"architectures": ["Qwen3DSparkModel"], "block_size": GAMMA}
        said |= {"markov_rank": 0, "enable_confidence_head": False}
    else:
        said = {"architectures": ["DFlashDraftModel"], "block_size": GAMMA + 1}
    _write(folder, _block_config(layers=1) | said, tensors)
    (folder / "hot_vocab.json").write_text(json.dumps(DFLASH_VOCAB))


def write_eagle3(folder: Path) -> None:
    """`LlamaForCausalLMEagle3`, over nine of the twelve tokens."""
    g = torch.Generator().manual_seed(2)
    ids = torch.tensor(EAGLE3_VOCAB)
    tensors = {
        "fc.weight": _random(g, HIDDEN, len(EAGLE3_LAYERS) * HIDDEN),
        **_layer(g, "midlayer.", attention_in=2 * HIDDEN),
        "midlayer.hidden_norm.weight": _norm(g),
        "norm.weight": _norm(g),
        "lm_head.weight": _random(g, len(ids), HIDDEN) * 3,
        "d2t": ids - torch.arange(len(ids)),
        "t2d": torch.zeros(VOCAB, dtype=torch.bool).index_fill_(0, ids, True),
    }
    config = _SIZES | {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "head_dim": HEAD_DIM,
        "draft_vocab_size": len(ids),
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": list(EAGLE3_LAYERS), "use_aux_hidden_state": True},
    }
    _write(folder, config, tensors)


def write_mtp(folder: Path, hot_vocab: bool = True) -> None:
    """`MiMoForCausalLM`'s prediction module, over nine of the twelve tokens or all."""
    g = torch.Generator().manual_seed(8)  # of twenty, the one that is right most often
    at = "model.mtp_layers.0."
    tensors = {
        f"{at}input_proj.weight": _random(g, HIDDEN, 2 * HIDDEN),
        **_layer(g, at, attention_in=HIDDEN),
        **{f"{at}self_attn.{name}_proj.bias": _random(g, rows) for name, rows in (("q", HIDDEN), ("k", 16), ("v", 16))},
        **{f"{at}{name}_layernorm.weight": _norm(g) for name in ("token", "hidden")},
        f"{at}final_layernorm.weight": _norm(g),
    }
    config = _SIZES | {"architectures": ["MiMoForCausalLM"], "model_type": "qwen2", "num_nextn_predict_layers": 1}
    _write(folder, config, tensors)
    if hot_vocab:
        (folder / "hot_vocab.json").write_text(json.dumps(MTP_VOCAB))


def _backbone(g: torch.Generator, layers: int) -> dict[str, Tensor]:
    """What reads the target's hidden states and a block of masks."""
    tensors = {
        "fc.weight": _random(g, HIDDEN, 2 * HIDDEN),
        "hidden_norm.weight": _norm(g),
        "norm.weight": _norm(g),
    }
    for at in (f"layers.{layer}." for layer in range(layers)):
        tensors |= _layer(g, at, attention_in=HIDDEN)
        tensors |= {f"{at}self_attn.{name}_norm.weight": _norm(g)[:HEAD_DIM] for name in ("q", "k")}
    return tensors


def _block_config(layers: int) -> dict[str, Any]:
    return _SIZES | {
        "model_type": "qwen3",
        "head_dim": HEAD_DIM,
        "num_hidden_layers": layers,
        "layer_types": ["full_attention"] * layers,
        "mask_token_id": MASK_TOKEN,
        "target_layer_ids": [0, 2],
        "num_target_layers": LAYERS,
    }


def _layer(g: torch.Generator, at: str, attention_in: int) -> dict[str, Tensor]:
    """One decoder layer under the prefix `at`."""
    kv = HEAD_DIM * KV_HEADS
    shapes = {
        "self_attn.q_proj": (HIDDEN, attention_in),
        "self_attn.k_proj": (kv, attention_in),
        "self_attn.v_proj": (kv, attention_in),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (MIDDLE, HIDDEN),
        "mlp.up_proj": (MIDDLE, HIDDEN),
        "mlp.down_proj": (HIDDEN, MIDDLE),
    }
    weights = {f"{at}{name}.weight": _random(g, *shape) for name, shape in shapes.items()}
    return weights | {f"{at}{name}_layernorm.weight": _norm(g) for name in ("input", "post_attention")}


def _random(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=g) * 0.2


def _norm(g: torch.Generator) -> Tensor:
    """Not all ones, so that a norm left out or put elsewhere shows."""
    return 1 + torch.rand(HIDDEN, generator=g)


def _write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))

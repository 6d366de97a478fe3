"""Makes tiny draft checkpoints for tests: the real file format, no weights worth the name, no torch."""

import json
import struct
from pathlib import Path
from typing import Any

TARGET = {"hidden_size": 8, "vocab_size": 32, "num_hidden_layers": 6}

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3DSparkModel"],
    "hidden_size": 8,
    "vocab_size": 32,
    "intermediate_size": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 2,
    "num_hidden_layers": 2,
    "num_target_layers": 6,
    "block_size": 5,
    "mask_token_id": 31,
    "target_layer_ids": [1, 4],
    "markov_rank": 3,
    "markov_head_type": "vanilla",
    "enable_confidence_head": True,
    "confidence_head_with_markov": True,
}

_HEADS = ("markov_rank", "markov_head_type", "enable_confidence_head", "confidence_head_with_markov")

# The same backbone without heads, in SGLang's layout and in DeepSpec's.
DFLASH: dict[str, Any] = {name: value for name, value in CONFIG.items() if name not in _HEADS} | {
    "architectures": ["DFlashDraftModel"]
}
DEEPSPEC_DFLASH: dict[str, Any] = CONFIG | {"markov_rank": 0, "enable_confidence_head": False}

Shapes = dict[str, tuple[int, ...]]


def tensors(head: str = "vanilla") -> Shapes:
    """What a checkpoint of CONFIG holds, written out by hand so that the code under test is not its own judge."""
    shapes: Shapes = {"fc.weight": (8, 16), "hidden_norm.weight": (8,), "norm.weight": (8,)}
    for layer in ("layers.0.", "layers.1."):
        shapes |= {f"{layer}self_attn.{name}.weight": (4, 8) for name in ("k_proj", "v_proj")}
        shapes |= {f"{layer}self_attn.{name}.weight": (8, 8) for name in ("q_proj", "o_proj")}
        shapes |= {f"{layer}self_attn.{name}.weight": (2,) for name in ("q_norm", "k_norm")}
        shapes |= {f"{layer}mlp.{name}.weight": (12, 8) for name in ("gate_proj", "up_proj")}
        shapes |= {f"{layer}mlp.down_proj.weight": (8, 12)}
        shapes |= {f"{layer}{name}.weight": (8,) for name in ("input_layernorm", "post_attention_layernorm")}
    shapes |= {"markov_head.markov_w1.weight": (32, 3), "markov_head.markov_w2.weight": (32, 3)}
    if head == "gated":
        shapes |= {"markov_head.gate_proj.weight": (3, 11), "markov_head.gate_proj.bias": (3,)}
    if head == "rnn":
        shapes |= {"markov_head.joint_proj.weight": (9, 14), "markov_head.joint_proj.bias": (9,)}
    return shapes | {"confidence_head.proj.weight": (1, 11), "confidence_head.proj.bias": (1,)}


def dflash_tensors() -> Shapes:
    return {name: shape for name, shape in tensors().items() if not name.startswith(("markov_", "confidence_"))}


def write_draft(folder: Path, config: dict[str, Any] | None = None, shapes: Shapes | None = None) -> Path:
    """A draft folder with one safetensors file of bf16 zeros."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    write_safetensors(folder / "model.safetensors", tensors() if shapes is None else shapes)
    return folder


def write_safetensors(file: Path, shapes: Shapes) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        size = 2
        for n in shape:
            size *= n
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))

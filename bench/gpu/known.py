"""A target of any size, and a draft that is right as often as wished: what speculation brings at that size.

Nobody has to bring weights of a large model. The target's decoder layers multiply by zeros, which takes as long as
multiplying by anything, so the next token is a fixed permutation of the last one; the draft's Markov head knows it with
a known error. Everything between the two, which is what is measured, is the real thing. Of random codes c_v, |c_v| = 1:

    target   embed[v] = c_v,  lm_head[next(v)] = c_v
    draft    W2[next(v)] = c_v,  W1[v] = a c_first(v) + b c_second(v)

first(v) = v for a share `right` of the tokens, second(v) = v for a share `second` of all; a and b are such that the
draft's own probabilities of its two choices say the same. Never says anything about how good a draft is.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

RANK = 256
MASK_TOKEN = 0


@dataclass(frozen=True)
class Size:
    """Of a Qwen3 model and of the draft that DeepSeek released for it."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int


@dataclass(frozen=True)
class DraftSize:
    """layers: of the backbone; right, second: the shares of tokens whose successor is its first and second choice"""

    block: int
    layers: int
    right: float
    second: float

    @property
    def length(self) -> float:
        """The accepted length of a chain, the bonus included: `1 + right + .. + right^block`."""
        return sum(self.right**k for k in range(self.block + 1))


QWEN3_8B = Size(4096, 36, 32, 8, 128, 12288, 151936)
QWEN3_8B_DRAFT = DraftSize(block=7, layers=5, right=0.75, second=0.1)


def write_target(folder: Path, size: Size) -> Tensor:
    """A checkpoint in `folder`; returns `next`, int64 `[V]`."""
    codes, successor = _codes(size)
    shapes = {
        "model.embed_tokens.weight": (size.vocab_size, size.hidden_size),
        "model.norm.weight": (size.hidden_size,),
        "lm_head.weight": (size.vocab_size, size.hidden_size),
        **_layers("model.layers.", size, size.num_hidden_layers),
    }
    head = torch.empty_like(codes)
    head[successor] = codes
    values = {"model.embed_tokens.weight": codes, "lm_head.weight": head, **_ones(shapes)}
    _write(folder, _config(size, "Qwen3ForCausalLM", size.num_hidden_layers), shapes, values)
    return successor


def write_draft(folder: Path, size: Size, draft: DraftSize) -> None:
    """The draft for the target of the same size, in DeepSpec's format."""
    codes, successor = _codes(size)
    rank, layers, seen = codes.shape[1], draft.layers, size.num_hidden_layers
    shapes = {
        "fc.weight": (size.hidden_size, layers * size.hidden_size),
        "hidden_norm.weight": (size.hidden_size,),
        "norm.weight": (size.hidden_size,),
        **_layers("layers.", size, layers),
        "markov_head.markov_w1.weight": (size.vocab_size, rank),
        "markov_head.markov_w2.weight": (size.vocab_size, rank),
        "confidence_head.proj.weight": (1, size.hidden_size + rank),
        "confidence_head.proj.bias": (1,),
    }
    w2 = torch.empty_like(codes)
    w2[successor] = codes
    values = {
        **_ones(shapes),
        "markov_head.markov_w1.weight": _choices(codes, draft),
        "markov_head.markov_w2.weight": w2,
        "confidence_head.proj.bias": torch.tensor([math.log(draft.right / (1 - draft.right))]),
    }
    del values["norm.weight"]  # of zeros: base logits say nothing, the Markov head everything
    config = _config(size, "Qwen3DSparkModel", layers) | {
        "block_size": draft.block,
        "mask_token_id": MASK_TOKEN,
        "target_layer_ids": [1 + k * (seen - 2) // layers for k in range(layers)],
        "num_target_layers": seen,
        "markov_rank": rank,
        "markov_head_type": "vanilla",
        "enable_confidence_head": True,
        "confidence_head_with_markov": True,
        "layer_types": ["full_attention"] * layers,
    }
    _write(folder, config, shapes, values)


def _codes(size: Size) -> tuple[Tensor, Tensor]:
    """c_v, bfloat16 `[V, r]` of length 1, and the permutation: one cycle through all tokens."""
    g = torch.Generator().manual_seed(0)
    rank = min(RANK, size.hidden_size)
    codes = torch.nn.functional.normalize(torch.randn(size.vocab_size, rank, generator=g)).bfloat16()
    cycle = torch.randperm(size.vocab_size, generator=g)
    return codes, torch.empty_like(cycle).scatter_(0, cycle, cycle.roll(-1))


def _choices(codes: Tensor, draft: DraftSize) -> Tensor:
    """W1. The rows that are no choice sum up to `V e^{(a^2 + b^2) / 2r}` on average, as products of random codes do."""
    vocabulary, rank = codes.shape
    g = torch.Generator().manual_seed(1)
    a = b = 0.0
    for _ in range(20):
        rest = math.log(vocabulary) + (a * a + b * b) / (2 * rank) - math.log(1 - draft.right - draft.second)
        a, b = rest + math.log(draft.right), rest + math.log(draft.second)
    wrong = torch.randint(vocabulary, (2, vocabulary), generator=g)
    luck, own = torch.rand(vocabulary, generator=g), torch.arange(vocabulary)
    first = own.where(luck < draft.right, wrong[0])
    second = own.where((luck >= draft.right) & (luck < draft.right + draft.second), wrong[1])
    return (a * codes[first].float() + b * codes[second].float()).bfloat16()


def _config(size: Size, architecture: str, layers: int) -> dict[str, Any]:
    return asdict(size) | {
        "architectures": [architecture],
        "model_type": "qwen3",
        "num_hidden_layers": layers,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "max_position_embeddings": 40960,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 1,
    }


def _layers(prefix: str, size: Size, count: int) -> dict[str, tuple[int, ...]]:
    hidden, middle, dim = size.hidden_size, size.intermediate_size, size.head_dim
    queries, keys = size.num_attention_heads * dim, size.num_key_value_heads * dim
    shapes: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "self_attn.q_norm": (dim,),
        "self_attn.k_norm": (dim,),
        "mlp.gate_proj": (middle, hidden),
        "mlp.up_proj": (middle, hidden),
        "mlp.down_proj": (hidden, middle),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    return {f"{prefix}{n}.{name}.weight": shape for n in range(count) for name, shape in shapes.items()}


def _ones(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {name: torch.ones(shape) for name, shape in shapes.items() if name.endswith("norm.weight")}


def _write(folder: Path, config: dict[str, Any], shapes: dict[str, tuple[int, ...]], values: dict[str, Tensor]) -> None:
    """Checkpoint in bfloat16. What is not among the values is zero, a hole in the file that takes no room on the disk;
    a value narrower than its tensor is padded."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    said = json.dumps(header).encode()
    said += b" " * (-len(said) % 8)
    file = folder / "model.safetensors"
    with file.open("wb") as stream:
        stream.write(len(said).to_bytes(8, "little") + said)
        stream.truncate(8 + len(said) + end)
    for name, value in values.items():
        offset = 8 + len(said) + header[name]["data_offsets"][0]
        place = np.memmap(file, np.int16, "r+", offset, shapes[name])
        place[..., : value.shape[-1]] = value.bfloat16().view(torch.int16).numpy()
        place.flush()

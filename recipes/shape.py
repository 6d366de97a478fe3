"""The sizes a draft shares with its target, and the small modules all drafts are made of. Trains nothing by itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.llama import FrozenLlama


@dataclass(frozen=True)
class Shape:
    """Of a Llama target; a draft layer is one of the same width."""

    vocab: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    theta: float
    max_positions: int
    target_layers: int

    @classmethod
    def of(cls, target: FrozenLlama) -> Shape:
        c = target.config
        return cls(
            vocab=c.vocab_size, hidden=c.hidden_size, intermediate=c.intermediate_size, heads=c.num_attention_heads,
            kv_heads=c.num_key_value_heads, head_dim=c.head_dim, eps=float(c.rms_norm_eps), theta=target.theta,
            max_positions=c.max_position_embeddings, target_layers=c.num_hidden_layers,
        )  # fmt: skip

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> Shape:
        """Out of a draft's `config.json` as `hf` below wrote it."""
        return cls(
            vocab=hf["vocab_size"], hidden=hf["hidden_size"], intermediate=hf["intermediate_size"],
            heads=hf["num_attention_heads"], kv_heads=hf["num_key_value_heads"], head_dim=hf["head_dim"],
            eps=hf["rms_norm_eps"], theta=hf["rope_theta"], max_positions=hf["max_position_embeddings"],
            target_layers=hf["num_target_layers"],
        )  # fmt: skip

    def hf(self) -> dict[str, Any]:
        """The fields every draft's `config.json` has."""
        return {
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": self.eps,
            "rope_theta": self.theta,
            "rope_parameters": {"rope_theta": self.theta, "rope_type": "default"},
            "max_position_embeddings": self.max_positions,
            "num_target_layers": self.target_layers,
            "attention_bias": False,
            "dtype": "bfloat16",
            "torch_dtype": "bfloat16",
        }


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.down_proj = nn.Linear(shape.intermediate, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Projections(nn.Module):
    """q, k, v from `width` inputs and o back: what attention multiplies with; how it attends is the draft's own."""

    def __init__(self, shape: Shape, width: int) -> None:
        super().__init__()
        self.shape = shape
        self.q_proj = nn.Linear(width, shape.heads * shape.head_dim, bias=False)
        self.k_proj = nn.Linear(width, shape.kv_heads * shape.head_dim, bias=False)
        self.v_proj = nn.Linear(width, shape.kv_heads * shape.head_dim, bias=False)
        self.o_proj = nn.Linear(shape.heads * shape.head_dim, shape.hidden, bias=False)

    def heads(self, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (-1, self.shape.head_dim))

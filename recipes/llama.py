"""The frozen Llama target as the recipes need it: fused weights, one layer at a time, the residual stream in the open.

Shared by the sampler (with a slot cache) and by the trainer (whole sequences, layer outputs as features). It never
trains and never changes the target, and refuses one that it would compute wrongly (biases, scaled rotary embeddings).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Layer:
    """Weights of one layer, projections of the same input stacked."""

    norm1: Tensor
    qkv: Tensor
    out: Tensor
    norm2: Tensor
    gate_up: Tensor
    down: Tensor


def rope_tables(positions: int, head_dim: int, theta: float, device: str | torch.device) -> tuple[Tensor, Tensor]:
    """cos, sin [positions, head_dim], float32, the half-split (NeoX) layout."""
    inv = theta ** (-torch.arange(0, head_dim, 2, device=device).float() / head_dim)
    angle = torch.arange(positions, device=device).float()[:, None] * inv
    return torch.cat([angle, angle], -1).cos(), torch.cat([angle, angle], -1).sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE: x*cos + rotate_half(x)*sin, over the last dimension."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


def check_config(config: Any) -> None:
    """Ends the program where a Llama's config asks for more than is computed here: it would be left out unsaid."""
    rope = getattr(config, "rope_parameters", None) or {}
    for name, value, known in (
        ("model_type", config.model_type, "llama"),
        ("rope_type", rope.get("rope_type", "default"), "default"),
        ("hidden_act", getattr(config, "hidden_act", None), "silu"),
        ("attention_bias", getattr(config, "attention_bias", False), False),
        ("mlp_bias", getattr(config, "mlp_bias", False), False),
    ):
        if value != known:
            where = config.name_or_path or "the target"
            raise SystemExit(f"error: {where}: {name} is {value!r}; the recipes read a Llama of {name} {known!r} only")


class FrozenLlama:
    """A Llama checkpoint as plain tensors. Every method is without gradient and safe to call from several threads.

    embedding, head: `[V, H]`, in the dtype and on the device of the model; length: positions there are tables for
    """

    def __init__(self, model: PreTrainedModel, length: int) -> None:
        check_config(model.config)
        cfg, weight = model.config, model.model.embed_tokens.weight.detach()
        self.config, self.device, self.dtype = cfg, weight.device, weight.dtype
        self.heads, self.kv_heads, self.head_dim = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim
        self.theta, self.eps = float(cfg.rope_parameters["rope_theta"]), float(cfg.rms_norm_eps)
        tables = rope_tables(length, self.head_dim, self.theta, weight.device)
        self.cos, self.sin = (t.to(weight.dtype) for t in tables)
        self.embedding, self.head = weight, model.lm_head.weight.detach()
        self.norm = model.model.norm.weight.detach()
        self.layers = [self._fuse(layer) for layer in model.model.layers]

    @classmethod
    def from_pretrained(cls, path: str, length: int, device: str, dtype: torch.dtype = torch.bfloat16) -> FrozenLlama:
        return cls(AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device).eval(), length)

    @staticmethod
    def _fuse(layer: Any) -> Layer:
        """layer: a `LlamaDecoderLayer` of transformers. qkv: `[(heads + 2 kv_heads) d, H]`; gate_up: `[2 I, H]`"""
        att, mlp = layer.self_attn, layer.mlp
        qkv = torch.cat([att.q_proj.weight, att.k_proj.weight, att.v_proj.weight]).detach()
        gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]).detach()
        return Layer(
            layer.input_layernorm.weight.detach(),
            qkv,
            att.o_proj.weight.detach(),
            layer.post_attention_layernorm.weight.detach(),
            gate_up,
            mlp.down_proj.weight.detach(),
        )

    def rms(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, self.eps)

    @torch.no_grad()
    def run(self, ids: Tensor, positions: Tensor, attend: Attend, keep: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
        """Run ids [n, t] at `positions` [n, t].

        `attend(layer, q, k, v)` gets rotated q [n, t, heads, d], k, v [n, t, kv_heads, d] and returns [n, t, heads*d].
        Returns the final normed states [n, t, hidden] and the OUTPUTS of the layers `keep`, before any norm,
        concatenated: [n, t, len(keep)*hidden].
        """
        n, t = ids.shape
        cos, sin = self.cos[positions][:, :, None], self.sin[positions][:, :, None]
        x, kept = F.embedding(ids, self.embedding), {}
        for i, layer in enumerate(self.layers):
            heads = F.linear(self.rms(x, layer.norm1), layer.qkv).view(n, t, -1, self.head_dim)
            q, k, v = heads.split([self.heads, self.kv_heads, self.kv_heads], 2)
            x = x + F.linear(attend(i, rotate(q, cos, sin), rotate(k, cos, sin), v), layer.out)
            gate, up = F.linear(self.rms(x, layer.norm2), layer.gate_up).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, layer.down)
            if i in keep:
                kept[i] = x
        features = torch.cat([kept[i] for i in keep], -1) if keep else x[..., :0]
        return self.rms(x, self.norm), features

    def read(self, ids: Tensor, keep: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Whole right-padded sequences [n, t] from position 0, causal: final states and features as in `run`."""

        def attend(_: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(2)

        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        return self.run(ids, positions, attend, keep)

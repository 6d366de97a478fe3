"""What an Eagle3 or MTP draft must say, recomputed in plain torch: no SGLang, no KV cache, every row from the start.

Row i is made of the target's hidden state of position i and the token at i + 1; behind the last token a row's hidden
state is the module's own output. The equations are those of `spec_algos/eagle3.py` and `spec_algos/mtp.py`.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import linear, silu
from transformers import LlamaForCausalLM

EPS, THETA = 1e-6, 10000.0


class DraftReference(ABC):
    """A draft folder and its target."""

    prefix: str

    def __init__(self, target: LlamaForCausalLM, folder: Path) -> None:
        self.target, self.folder = target, folder
        self.w = load_file(folder / "model.safetensors")
        self.config = json.loads((folder / "config.json").read_text())
        self.heads, self.kv_heads = self.config["num_attention_heads"], self.config["num_key_value_heads"]

    @torch.no_grad()
    def rounds(self, prompt: Sequence[int], written: Sequence[int], depth: int) -> list[int]:
        """Drafts accepted in each verify round of a request that wrote `written`, drafting greedily at fixed `depth`.

        Its first token comes from prefill. Causality lets one pass of the target serve all rounds.
        """
        text = [*prompt, *written]
        hidden = self.enter(self.target_hidden(text))
        known, accepted = len(prompt) + 1, []
        while known < len(text):
            drafts = self.chain(text[:known], hidden[: known - 1], depth)
            pairs = list(zip(drafts, text[known:], strict=False))
            hits = next((k for k, (draft, token) in enumerate(pairs) if draft != token), len(pairs))
            accepted.append(hits)
            known += hits + 1
        return accepted

    def chain(self, text: Sequence[int], hidden: Tensor, depth: int) -> list[int]:
        """The greedy drafts after `text`, of whose last token `hidden` `[n - 1, H]` knows nothing yet."""
        tokens, drafts = list(text), list[int]()
        for _ in range(depth):
            features, carry = self.rows(hidden, torch.tensor(tokens[1:]))
            drafts.append(int(self.vocabulary()[self.logits(features[-1]).argmax()]))
            tokens.append(drafts[-1])
            hidden = torch.cat([hidden, carry[-1:]])
        return drafts

    @abstractmethod
    def target_hidden(self, tokens: list[int]) -> Tensor:
        """`[n, K * H]`: what the draft is told of each position."""

    @abstractmethod
    def enter(self, hidden: Tensor) -> Tensor:
        """`[n, H]`: the target's hidden states as the module's own outputs would stand in their place."""

    @abstractmethod
    def rows(self, hidden: Tensor, successors: Tensor) -> tuple[Tensor, Tensor]:
        """`[n, H]` twice: what the head reads, and what the next row feeds on."""

    @abstractmethod
    def logits(self, features: Tensor) -> Tensor: ...

    @abstractmethod
    def vocabulary(self) -> list[int]: ...

    def embed(self, tokens: Tensor) -> Tensor:
        return self.target.model.embed_tokens(tokens)

    def norm(self, name: str, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * self.w[f"{name}.weight"]

    def project(self, name: str, x: Tensor) -> Tensor:
        name = f"{self.prefix}{name}"
        return linear(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))

    def mlp(self, x: Tensor) -> Tensor:
        gate, up = self.project("mlp.gate_proj", x), self.project("mlp.up_proj", x)
        return self.project("mlp.down_proj", silu(gate) * up)

    def attention(self, x: Tensor) -> Tensor:
        """Causal over the rows, RoPE by row number; x `[n, d]` -> `[n, H]`."""
        n = x.shape[0]
        q, k, v = (self.project(f"self_attn.{name}_proj", x) for name in ("q", "k", "v"))
        q = q.view(n, self.heads, -1).transpose(0, 1)
        k, v = (t.view(n, self.kv_heads, -1).transpose(0, 1) for t in (k, v))
        q, k = rope(q), rope(k)
        k, v = (t.repeat_interleave(self.heads // self.kv_heads, 0) for t in (k, v))
        scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
        scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), float("-inf"))
        return self.project("self_attn.o_proj", (scores.softmax(-1) @ v).transpose(0, 1).reshape(n, -1))


class Eagle3Reference(DraftReference):
    prefix = "midlayer."

    def target_hidden(self, tokens: list[int]) -> Tensor:
        layers = self.config["eagle_config"]["eagle_aux_hidden_state_layer_ids"]
        states = self.target(torch.tensor([tokens]), output_hidden_states=True).hidden_states
        return torch.cat([states[layer + 1][0] for layer in layers], dim=-1)

    def enter(self, hidden: Tensor) -> Tensor:
        return linear(hidden, self.w["fc.weight"])

    def rows(self, hidden: Tensor, successors: Tensor) -> tuple[Tensor, Tensor]:
        both = self.norm("midlayer.input_layernorm", self.embed(successors)), self.norm("midlayer.hidden_norm", hidden)
        r = hidden + self.attention(torch.cat(both, dim=-1))
        y = r + self.mlp(self.norm("midlayer.post_attention_layernorm", r))
        return self.norm("norm", y), y

    def logits(self, features: Tensor) -> Tensor:
        return linear(features, self.w["lm_head.weight"])

    def vocabulary(self) -> list[int]:
        return [column + int(offset) for column, offset in enumerate(self.w["d2t"])]


class MTPReference(DraftReference):
    prefix = "model.mtp_layers.0."

    def target_hidden(self, tokens: list[int]) -> Tensor:
        return self.target.model(torch.tensor([tokens])).last_hidden_state[0]

    def enter(self, hidden: Tensor) -> Tensor:
        return hidden

    def rows(self, hidden: Tensor, successors: Tensor) -> tuple[Tensor, Tensor]:
        at = self.prefix
        embedded = self.embed(successors).clone()
        embedded[0] = 0
        both = self.norm(f"{at}hidden_layernorm", hidden), self.norm(f"{at}token_layernorm", embedded)
        x = self.project("input_proj", torch.cat(both, dim=-1))
        r = x + self.attention(self.norm(f"{at}input_layernorm", x))
        y = self.norm(f"{at}final_layernorm", r + self.mlp(self.norm(f"{at}post_attention_layernorm", r)))
        return y, y

    def logits(self, features: Tensor) -> Tensor:
        return linear(features, self.target.lm_head.weight)[self.vocabulary()]

    def vocabulary(self) -> list[int]:
        file = self.folder / "hot_vocab.json"
        return json.loads(file.read_text()) if file.is_file() else list(range(self.config["vocab_size"]))


def rope(x: Tensor) -> Tensor:
    """Rotary embedding of x `[heads, n, d]`, row r at position r, halves rotated against each other."""
    half = x.shape[-1] // 2
    angles = torch.outer(torch.arange(x.shape[1]), THETA ** (-torch.arange(half) / half))
    cos, sin = angles.cos(), angles.sin()
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

"""What a draft must say, recomputed in plain torch: no SGLang, no KV cache, every row from the start.

A block draft (DSpark, DFlash) reads the target's hidden states of all positions before the anchor and fills a block of
masks at once. A recurrent one (EAGLE-3, MTP) has a row per token: row i is made of the target's hidden state of
position i and the token at i + 1; behind the last token a row's hidden state is the module's own output. The equations
are those of `spec_algos/`, written out anew.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import linear, silu
from transformers import LlamaForCausalLM

from . import tiny_drafts

if TYPE_CHECKING:
    from .trials import Answered

EPS, THETA = 1e-6, 10000.0


class DraftReference(ABC):
    """A draft folder and its target."""

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

    @abstractmethod
    def chain(self, text: Sequence[int], hidden: Tensor, depth: int) -> list[int]:
        """The greedy drafts after `text`, of whose last token `hidden` `[n - 1, H]` knows nothing yet."""

    @abstractmethod
    def target_hidden(self, tokens: list[int]) -> Tensor:
        """`[n, K * H]`: what the draft is told of each position."""

    @abstractmethod
    def enter(self, hidden: Tensor) -> Tensor:
        """`[n, H]`: what the draft makes of it, for each position by itself."""

    def layers_of_target(self, tokens: list[int], layers: Sequence[int]) -> Tensor:
        """`[n, K * H]`: the outputs of these layers, side by side."""
        states = self.target(torch.tensor([tokens]), output_hidden_states=True).hidden_states
        return torch.cat([states[layer + 1][0] for layer in layers], dim=-1)

    def embed(self, tokens: Tensor) -> Tensor:
        return self.target.model.embed_tokens(tokens)

    @cached_property
    def vocabulary(self) -> list[int]:
        """The tokens that the draft proposes."""
        file = self.folder / "hot_vocab.json"
        return json.loads(file.read_text()) if file.is_file() else list(range(self.config["vocab_size"]))

    def norm(self, name: str, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * self.w[f"{name}.weight"]

    def project(self, name: str, x: Tensor) -> Tensor:
        return linear(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))

    def mlp(self, at: str, x: Tensor) -> Tensor:
        gate, up = self.project(f"{at}mlp.gate_proj", x), self.project(f"{at}mlp.up_proj", x)
        return self.project(f"{at}mlp.down_proj", silu(gate) * up)

    def heads_of(self, name: str, x: Tensor) -> Tensor:
        """x `[n, d]` -> `[heads, n, head_dim]`."""
        heads = self.heads if name.endswith("q_proj") else self.kv_heads
        return self.project(name, x).view(x.shape[0], heads, -1).transpose(0, 1)

    def attend(self, at: str, q: Tensor, k: Tensor, v: Tensor, sees: Tensor) -> Tensor:
        """q `[heads, m, d]`, k and v `[kv_heads, n, d]`, sees bool `[m, n]` -> `[m, H]`."""
        k, v = (t.repeat_interleave(self.heads // self.kv_heads, 0) for t in (k, v))
        scores = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).masked_fill(~sees, float("-inf"))
        mixed = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
        return self.project(f"{at}self_attn.o_proj", mixed)


class BlockReference(DraftReference):
    """The anchor and masks through the layers at once.

    skip: rows that predict nothing; they come first
    """

    skip: int

    @abstractmethod
    def drafts(self, base: Tensor, features: Tensor, anchor: int) -> list[int]:
        """Columns of the vocabulary, from base logits `[D, Vq]` and features `[D, H]`."""

    def target_hidden(self, tokens: list[int]) -> Tensor:
        return self.layers_of_target(tokens, self.config["target_layer_ids"])

    def enter(self, hidden: Tensor) -> Tensor:
        return self.norm("hidden_norm", self.project("fc", hidden))

    def chain(self, text: Sequence[int], hidden: Tensor, depth: int) -> list[int]:
        masks = [self.config["mask_token_id"]] * (self.config["block_size"] - 1)
        x = self.embed(torch.tensor([text[-1], *masks]))
        for layer in range(self.config["num_hidden_layers"]):
            at = f"layers.{layer}."
            x = x + self.attention(at, self.norm(f"{at}input_layernorm", x), hidden)
            x = x + self.mlp(at, self.norm(f"{at}post_attention_layernorm", x))
        features = self.norm("norm", x)[self.skip :][:depth]
        base = linear(features, self.target.lm_head.weight)[:, self.vocabulary]
        return [self.vocabulary[column] for column in self.drafts(base, features, text[-1])]

    def attention(self, at: str, x: Tensor, context: Tensor) -> Tensor:
        """Block rows `[rows, H]`, at the positions behind `context` `[n, H]`, see all of it and one another."""
        both = torch.cat([context, x])
        q = self.norm(f"{at}self_attn.q_norm", self.heads_of(f"{at}self_attn.q_proj", x))
        k = self.norm(f"{at}self_attn.k_norm", self.heads_of(f"{at}self_attn.k_proj", both))
        v = self.heads_of(f"{at}self_attn.v_proj", both)
        everything = torch.ones(x.shape[0], both.shape[0], dtype=torch.bool)
        return self.attend(at, rope(q, context.shape[0]), rope(k), v, everything)


class DSparkReference(BlockReference):
    """`x_k = argmax(U_k + W2 l_k)`, and `l_k` of `W1[x_{k-1}]` by the kind of head."""

    skip = 0

    def drafts(self, base: Tensor, features: Tensor, anchor: int) -> list[int]:
        w1, w2 = (self.w[f"markov_head.markov_{name}.weight"] for name in ("w1", "w2"))
        step = {"vanilla": self.vanilla, "gated": self.gated, "rnn": self.rnn}[self.config["markov_head_type"]]
        previous, columns, state = anchor, list[int](), torch.zeros(w1.shape[1])
        for logits, h in zip(base, features, strict=True):
            latent, state = step(w1[previous], h, state)
            columns.append(int((logits + w2[self.vocabulary] @ latent).argmax()))
            previous = self.vocabulary[columns[-1]]
        return columns

    def vanilla(self, w: Tensor, h: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        return w, s

    def gated(self, w: Tensor, h: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        return self.project("markov_head.gate_proj", torch.cat([h, w])).sigmoid() * w, s

    def rnn(self, w: Tensor, h: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        gate, candidate, output = self.project("markov_head.joint_proj", torch.cat([s, w, h])).chunk(3)
        return output.tanh(), gate.sigmoid() * s + (1 - gate.sigmoid()) * candidate.tanh()


class DFlashReference(BlockReference):
    """SGLang's layout: the anchor's row predicts nothing."""

    skip = 1

    def drafts(self, base: Tensor, features: Tensor, anchor: int) -> list[int]:
        return base.argmax(-1).tolist()


class ReleasedDFlashReference(DFlashReference):
    """DeepSpec's: it predicts the first draft."""

    skip = 0


class RecurrentReference(DraftReference):
    """Token by token: every draft is the last row's, and its output the next row's hidden state."""

    prefix: str

    def chain(self, text: Sequence[int], hidden: Tensor, depth: int) -> list[int]:
        tokens, drafts = list(text), list[int]()
        for _ in range(depth):
            features, carry = self.module(hidden, torch.tensor(tokens[1:]))
            drafts.append(int(self.vocabulary[self.logits(features[-1]).argmax()]))
            tokens.append(drafts[-1])
            hidden = torch.cat([hidden, carry[-1:]])
        return drafts

    @abstractmethod
    def module(self, hidden: Tensor, successors: Tensor) -> tuple[Tensor, Tensor]:
        """`[n, H]` twice: what the head reads, and what the next row feeds on."""

    @abstractmethod
    def logits(self, features: Tensor) -> Tensor: ...

    def attention(self, x: Tensor) -> Tensor:
        """Causal over the rows, RoPE by row number; x `[n, d]` -> `[n, H]`."""
        q, k, v = (self.heads_of(f"{self.prefix}self_attn.{name}_proj", x) for name in ("q", "k", "v"))
        causal = torch.ones(x.shape[0], x.shape[0], dtype=torch.bool).tril()
        return self.attend(self.prefix, rope(q), rope(k), v, causal)


class Eagle3Reference(RecurrentReference):
    prefix = "midlayer."

    def target_hidden(self, tokens: list[int]) -> Tensor:
        return self.layers_of_target(tokens, self.config["eagle_config"]["eagle_aux_hidden_state_layer_ids"])

    def enter(self, hidden: Tensor) -> Tensor:
        return linear(hidden, self.w["fc.weight"])

    def module(self, hidden: Tensor, successors: Tensor) -> tuple[Tensor, Tensor]:
        both = self.norm("midlayer.input_layernorm", self.embed(successors)), self.norm("midlayer.hidden_norm", hidden)
        r = hidden + self.attention(torch.cat(both, dim=-1))
        y = r + self.mlp(self.prefix, self.norm("midlayer.post_attention_layernorm", r))
        return self.norm("norm", y), y

    def logits(self, features: Tensor) -> Tensor:
        return linear(features, self.w["lm_head.weight"])

    @cached_property
    def vocabulary(self) -> list[int]:
        return [column + int(offset) for column, offset in enumerate(self.w["d2t"])]


class MTPReference(RecurrentReference):
    prefix = "model.mtp_layers.0."

    def target_hidden(self, tokens: list[int]) -> Tensor:
        return self.target.model(torch.tensor([tokens])).last_hidden_state[0]

    def enter(self, hidden: Tensor) -> Tensor:
        return hidden

    def module(self, hidden: Tensor, successors: Tensor) -> tuple[Tensor, Tensor]:
        at = self.prefix
        embedded = self.embed(successors).clone()
        embedded[0] = 0
        both = self.norm(f"{at}hidden_layernorm", hidden), self.norm(f"{at}token_layernorm", embedded)
        x = self.project(f"{at}input_proj", torch.cat(both, dim=-1))
        r = x + self.attention(self.norm(f"{at}input_layernorm", x))
        y = self.norm(f"{at}final_layernorm", r + self.mlp(at, self.norm(f"{at}post_attention_layernorm", r)))
        return y, y

    def logits(self, features: Tensor) -> Tensor:
        return linear(features, self.target.lm_head.weight)[self.vocabulary]


def rope(x: Tensor, start: int = 0) -> Tensor:
    """Rotary embedding of x `[heads, n, d]`, row r at position start + r, halves rotated against each other."""
    half = x.shape[-1] // 2
    angles = torch.outer(torch.arange(start, start + x.shape[1]), THETA ** (-torch.arange(half) / half))
    cos, sin = angles.cos(), angles.sin()
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def expect_rounds_of(reference: DraftReference, answers: Sequence[Answered]) -> None:
    """Under `accept: match` drafts are greedy whatever the target samples, hence a function of the text alone: the text
    a request wrote says how many drafts each of its rounds must have accepted."""
    accepted = 0
    for answer in answers:
        expected = reference.rounds(answer.prompt, answer.written, tiny_drafts.GAMMA)
        # The last round may have accepted more than the request was allowed to write.
        last = Counter(expected[:-1])
        extra = Counter({hits: n - last[hits] for hits, n in enumerate(answer.histogram)})
        assert min(extra.values()) >= 0 and extra.total() == 1, (expected, answer.histogram)
        assert next(hits for hits, n in extra.items() if n) >= expected[-1]
        accepted += sum(expected)
    assert accepted > len(answers) / 2, "a draft that is never right proves nothing"
    assert any(answer.cached > 0 for answer in answers)

"""The autoregressive drafts: EAGLE-3 and MTP, one layer that reads a hidden state and the token after it.

Row i pairs the target's hidden state of position i with the token at i + 1 and predicts the token at i + 2. An anchor
at position a begins with the true row a - 1; every further row is fed the draft's own output and the next token.
Training unrolls just that from many anchors at once: the context's keys come from true rows, each anchor's further rows
see their own predecessors besides ("training-time test").
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.data import Record
from recipes.draft import Blocks, Draft, copy_layer, scaled_identity
from recipes.llama import FrozenLlama, rotate
from recipes.shape import MLP, Projections, RMSNorm, Shape
from recipes.states import Reading


class RecurrentDraft(Draft):
    """The unroll; what goes into the layer and what comes out of it is the subclass's.

    enter(hidden, token embedding) -> the residual, and what q, k and v are projected from
    leave(sum after the MLP) -> what the head reads, and the hidden state fed to the next row
    """

    def __init__(self, shape: Shape, steps: int, layer_ids: tuple[int, ...], hot: Tensor, width: int) -> None:
        super().__init__(shape, steps, layer_ids, hot)
        self.self_attn, self.mlp = Projections(shape, width), MLP(shape)
        self.post_attention_layernorm = RMSNorm(shape.hidden, shape.eps)

    @abstractmethod
    def context(self, reading: Reading, dtype: torch.dtype) -> Tensor:
        """`[n, t, H]`: the hidden state of every true row."""

    @abstractmethod
    def enter(self, hidden: Tensor, embedded: Tensor) -> tuple[Tensor, Tensor]:
        """hidden, embedded: `[.., H]`; returns `[.., H]` and `[.., width]`"""

    @abstractmethod
    def leave(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: `[.., H]`, as are both that are returned"""

    def forward(self, reading: Reading, anchors: Tensor, embedding: Tensor) -> Blocks:
        dtype, last = embedding.dtype, reading.ids.shape[1] - 1
        hidden = self.context(reading, dtype)[:, :last]
        _, entered = self.enter(hidden, F.embedding(reading.ids[:, 1:], embedding))
        true = torch.arange(last, device=anchors.device)
        past = self._keys_values(entered, true)
        blind = true > (anchors - 1)[..., None]
        bias = torch.zeros(blind.shape, dtype=dtype, device=anchors.device).masked_fill_(blind, -torch.inf)
        hidden = hidden.gather(1, (anchors - 1)[..., None].expand(-1, -1, hidden.shape[-1]))
        own: list[tuple[Tensor, Tensor]] = []
        outputs = []
        for step in range(self.steps):
            tokens = reading.ids.gather(1, (anchors + step).clamp(max=last))
            residual, entered = self.enter(hidden, F.embedding(tokens, embedding))
            positions = anchors - 1 + step
            if step > 0:  # the first row is a true one and stands in the context
                own.append(self._keys_values(entered, positions))
            x = residual + self.self_attn.o_proj(self._attend(entered, positions, past, bias, own))
            output, hidden = self.leave(x + self.mlp(self.post_attention_layernorm(x)))
            outputs.append(output)
        flat = torch.stack(outputs, 2).flatten(0, 2)
        return Blocks(flat, flat[:, :0])

    def _keys_values(self, entered: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Rotated keys and values `[n, kv_heads, rows, d]`."""
        attention = self.self_attn
        keys = rotate(attention.heads(attention.k_proj(entered)), *self.rope(positions, entered.dtype))
        return keys.transpose(1, 2), attention.heads(attention.v_proj(entered)).transpose(1, 2)

    def _attend(
        self,
        entered: Tensor,
        positions: Tensor,
        past: tuple[Tensor, Tensor],
        bias: Tensor,
        own: list[tuple[Tensor, Tensor]],
    ) -> Tensor:
        """One row per anchor over the context up to its anchor and over its own rows: `[n, a, heads * d]`."""
        shape = self.shape
        q = rotate(self.self_attn.heads(self.self_attn.q_proj(entered)), *self.rope(positions, entered.dtype))
        # [n, kv_heads, group, a, d]: the query heads of one KV head share its keys.
        q = (q * shape.head_dim**-0.5).unflatten(2, (shape.kv_heads, -1)).permute(0, 2, 3, 1, 4)
        groups, anchors = q.shape[2], q.shape[3]
        scores = (q.flatten(2, 3) @ past[0].transpose(2, 3)).unflatten(2, (groups, anchors)) + bias[:, None, None]
        mine = [(q * keys[:, :, None]).sum(-1, keepdim=True) for keys, _ in own]
        weights = torch.cat([scores, *mine], -1).softmax(-1)
        seen = past[0].shape[2]
        out = (weights[..., :seen].flatten(2, 3) @ past[1]).unflatten(2, (groups, anchors))
        for i, (_, values) in enumerate(own):
            out = out + weights[..., seen + i, None] * values[:, :, None]
        return out.permute(0, 3, 1, 2, 4).flatten(2)


class Eagle3Draft(RecurrentDraft):
    """Three target layers, projected; the token's embedding and the hidden state side by side into q, k and v."""

    kind: ClassVar[str] = "eagle3"
    architecture: ClassVar[str] = "LlamaForCausalLMEagle3"

    def __init__(self, shape: Shape, steps: int, layer_ids: tuple[int, ...], hot: Tensor, scale: Tensor) -> None:
        super().__init__(shape, steps, layer_ids, hot, width=2 * shape.hidden)
        self.fc = nn.Linear(len(layer_ids) * shape.hidden, shape.hidden, bias=False)
        self.hidden_norm, self.input_layernorm = RMSNorm(shape.hidden, shape.eps), RMSNorm(shape.hidden, shape.eps)
        self.norm = RMSNorm(shape.hidden, shape.eps)
        self.register_buffer("feature_scale", scale)

    def context(self, reading: Reading, dtype: torch.dtype) -> Tensor:
        return self.fc(reading.features.to(dtype) * self.feature_scale.to(dtype))

    def enter(self, hidden: Tensor, embedded: Tensor) -> tuple[Tensor, Tensor]:
        return hidden, torch.cat([self.input_layernorm(embedded), self.hidden_norm(hidden)], -1)

    def leave(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.norm(x), x

    @torch.no_grad()
    def initialise(self, target: FrozenLlama, records: list[Record]) -> None:
        """The target's last layer reads the hidden state, its first the embedding; `fc` as the last feature."""
        first, last, hidden = target.layers[0], target.layers[-1], self.shape.hidden
        copy_layer(first, self.self_attn, self.mlp, self.shape, slice(0, hidden))
        copy_layer(last, self.self_attn, self.mlp, self.shape, slice(hidden, None))
        self.input_layernorm.weight.copy_(first.norm1)
        self.hidden_norm.weight.copy_(last.norm1)
        self.post_attention_layernorm.weight.copy_(last.norm2)
        self.norm.weight.copy_(target.norm)
        scaled_identity(self.fc, self.feature_scale, hidden)

    def config(self) -> dict[str, Any]:
        return {
            "architectures": [self.architecture],
            "model_type": "llama",
            "num_hidden_layers": 1,
            "draft_vocab_size": len(self.hot),
            "eagle_config": {"eagle_aux_hidden_state_layer_ids": list(self.layer_ids), "use_aux_hidden_state": True},
            "ttt_length": self.steps,
            "tie_word_embeddings": False,
        }

    def checkpoint(self, head: Tensor) -> dict[str, Tensor]:
        """`d2t`: how far a target's id lies from the draft's; `t2d`: which of the target's tokens have one."""
        inner = ("self_attn.", "mlp.", "hidden_norm.", "input_layernorm.", "post_attention_layernorm.")
        state = self.state_dict()
        hot = self.hot.cpu()
        return {
            **{f"midlayer.{name}": tensor for name, tensor in state.items() if name.startswith(inner)},
            "norm.weight": self.norm.weight,
            "fc.weight": self.fc.weight * self.feature_scale,
            "lm_head.weight": head[self.hot],
            "d2t": hot - torch.arange(len(hot)),
            "t2d": torch.zeros(self.shape.vocab, dtype=torch.bool).index_fill_(0, hot, True),
        }

    @classmethod
    def from_checkpoint(cls, hf: dict[str, Any], tensors: dict[str, Tensor], hot: Tensor) -> Eagle3Draft:
        layer_ids = tuple(hf["eagle_config"]["eagle_aux_hidden_state_layer_ids"])
        draft = cls(Shape.from_hf(hf), hf["ttt_length"], layer_ids, hot, torch.ones(len(layer_ids) * hf["hidden_size"]))
        own = {
            name.removeprefix("midlayer."): tensor
            for name, tensor in tensors.items()
            if name not in ("lm_head.weight", "d2t", "t2d")
        }
        draft.load_state_dict(own | {"hot": hot, "feature_scale": draft.feature_scale})
        return draft


class MTPDraft(RecurrentDraft):
    """The target's final state and the token's embedding, each normed, projected into the residual stream."""

    kind: ClassVar[str] = "mtp"
    architecture: ClassVar[str] = "MiMoForCausalLM"

    def __init__(self, shape: Shape, steps: int, hot: Tensor) -> None:
        super().__init__(shape, steps, (), hot, width=shape.hidden)
        self.hidden_layernorm, self.token_layernorm = (RMSNorm(shape.hidden, shape.eps) for _ in range(2))
        self.input_proj = nn.Linear(2 * shape.hidden, shape.hidden, bias=False)
        self.input_layernorm, self.final_layernorm = (RMSNorm(shape.hidden, shape.eps) for _ in range(2))

    def context(self, reading: Reading, dtype: torch.dtype) -> Tensor:
        return reading.final.to(dtype)

    def enter(self, hidden: Tensor, embedded: Tensor) -> tuple[Tensor, Tensor]:
        x = self.input_proj(torch.cat([self.hidden_layernorm(hidden), self.token_layernorm(embedded)], -1))
        return x, self.input_layernorm(x)

    def leave(self, x: Tensor) -> tuple[Tensor, Tensor]:
        output = self.final_layernorm(x)
        return output, output

    @torch.no_grad()
    def initialise(self, target: FrozenLlama, records: list[Record]) -> None:
        """The target's last layer; its input the mean of state and embedding."""
        last, hidden = target.layers[-1], self.shape.hidden
        copy_layer(last, self.self_attn, self.mlp, self.shape)
        self.input_proj.weight.mul_(0.3)
        self.input_proj.weight[:, :hidden] += torch.eye(hidden)
        self.input_proj.weight[:, hidden:] += 0.5 * torch.eye(hidden)
        self.input_layernorm.weight.copy_(last.norm1)
        self.post_attention_layernorm.weight.copy_(last.norm2)
        self.final_layernorm.weight.copy_(target.norm)

    def config(self) -> dict[str, Any]:
        return {
            "architectures": [self.architecture],
            "model_type": "qwen2",
            "num_hidden_layers": 1,
            "num_nextn_predict_layers": 1,
            "ttt_length": self.steps,
            "tie_word_embeddings": True,
        }

    def checkpoint(self, head: Tensor) -> dict[str, Tensor]:
        """SGLang's layer has biases on q, k and v; ours are 0."""
        state = {name: t for name, t in self.state_dict().items() if name != "hot"}
        state |= {
            f"self_attn.{name}.bias": torch.zeros(len(state[f"self_attn.{name}.weight"]))
            for name in ("q_proj", "k_proj", "v_proj")
        }
        return {f"model.mtp_layers.0.{name}": tensor for name, tensor in state.items()}

    @classmethod
    def from_checkpoint(cls, hf: dict[str, Any], tensors: dict[str, Tensor], hot: Tensor) -> MTPDraft:
        draft = cls(Shape.from_hf(hf), hf["ttt_length"], hot)
        own = {n.removeprefix("model.mtp_layers.0."): t for n, t in tensors.items() if not n.endswith(".bias")}
        draft.load_state_dict(own | {"hot": hot})
        return draft

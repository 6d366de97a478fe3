"""The block drafts: DSpark and DFlash, one backbone that sees the target's features and drafts every position at once.

    H_ctx = hidden_norm(fc([h_i1; h_i2; ...])),   block = anchor, mask, mask, ...   not causal within itself

DFlash reads its tokens off the mask rows, each position on its own. DSpark reads them off the anchor's row and the
masks, and its Markov head adds `B_k = W2 W1[x_{k-1}]`, so that a token knows which one it follows.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.corpus import bigram_factors
from recipes.data import Record
from recipes.draft import Blocks, Draft, copy_layer, scaled_identity
from recipes.llama import FrozenLlama, rotate
from recipes.shape import MLP, Projections, RMSNorm, Shape
from recipes.states import Reading

# Logit bias of the tokens outside the hot vocabulary: never drafted, and finite in every dtype.
COLD_BIAS = -30.0

# Query rows, how much context they may need, and their bias [n, 1, rows, seen + rows]: 0 or, where blind, -inf.
Chunk = tuple[slice, int, Tensor]


def attention_chunks(anchors: Tensor, rows: int, size: int = 24) -> list[Chunk]:
    """Group the blocks of ascending `anchors` [n, a] so that no group meets keys that none of it may see.

    One dense mask over all blocks would spend most of the attention on other blocks' keys and on later context.
    """
    chunks = []
    for first in range(0, anchors.shape[1], size):
        part = anchors[:, first : first + size]
        seen, count = int(part.max()), part.shape[1]
        owner = torch.arange(count, device=anchors.device).repeat_interleave(rows)
        before = torch.arange(seen, device=anchors.device) < part.repeat_interleave(rows, 1)[..., None]
        own = (owner[:, None] == owner).expand(len(anchors), -1, -1)
        span = slice(first * rows, (first + count) * rows)
        blind = ~torch.cat([before, own], -1)[:, None]
        chunks.append((span, seen, torch.zeros(blind.shape, device=anchors.device).masked_fill_(blind, -torch.inf)))
    return chunks


class BlockAttention(Projections):
    """Queries and own keys from the block, further keys and values from the projected context."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape, shape.hidden)
        self.q_norm, self.k_norm = RMSNorm(shape.head_dim, shape.eps), RMSNorm(shape.head_dim, shape.eps)

    def forward(self, x: Tensor, context: Tensor, rope: tuple[Tensor, ...], chunks: list[Chunk]) -> Tensor:
        """x [n, q, h] the blocks, context [n, t, h]; returns [n, q, h]."""
        cos, sin, context_cos, context_sin = rope
        q = rotate(self.q_norm(self.heads(self.q_proj(x))), cos, sin) * self.shape.head_dim**-0.5
        own_k = rotate(self.k_norm(self.heads(self.k_proj(x))), cos, sin)
        past_k = rotate(self.k_norm(self.heads(self.k_proj(context))), context_cos, context_sin)
        own_v, past_v = self.heads(self.v_proj(x)), self.heads(self.v_proj(context))
        # [n, kv_heads, tokens, d]; the query heads of one KV head become further query rows.
        own_k, past_k, own_v, past_v = (t.transpose(1, 2) for t in (own_k, past_k, own_v, past_v))
        q = q.unflatten(2, (self.shape.kv_heads, -1)).permute(0, 2, 3, 1, 4)
        parts = []
        for rows, seen, bias in chunks:
            k = torch.cat([past_k[:, :, :seen], own_k[:, :, rows]], 2)
            v = torch.cat([past_v[:, :, :seen], own_v[:, :, rows]], 2)
            # Plain products: on a CPU they are twice as fast, with gradients, as the fused kernel at this size.
            score = q[:, :, :, rows].flatten(2, 3) @ k.transpose(2, 3)
            score = score.unflatten(2, (-1, bias.shape[2])) + bias[:, :, None].to(score.dtype)
            out = score.softmax(-1).flatten(2, 3) @ v
            parts.append(out.unflatten(2, (-1, bias.shape[2])))
        return self.o_proj(torch.cat(parts, 3).permute(0, 3, 1, 2, 4).flatten(2))


class BlockLayer(nn.Module):
    """Pre-norm attention and MLP, each with a residual."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm, self.self_attn = RMSNorm(shape.hidden, shape.eps), BlockAttention(shape)
        self.post_attention_layernorm, self.mlp = RMSNorm(shape.hidden, shape.eps), MLP(shape)

    def forward(self, x: Tensor, context: Tensor, rope: tuple[Tensor, ...], chunks: list[Chunk]) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), context, rope, chunks)
        return x + self.mlp(self.post_attention_layernorm(x))


class BlockDraft(Draft):
    """The backbone. `feature_scale` [K * H] whitens the target's features in training and is folded into `fc`."""

    unused_rows: ClassVar[int]
    """Rows of a block, from its anchor on, that predict nothing."""

    def __init__(
        self, shape: Shape, steps: int, layer_ids: tuple[int, ...], hot: Tensor, layers: int, mask: int, scale: Tensor
    ) -> None:
        super().__init__(shape, steps, layer_ids, hot)
        self.mask = mask
        self.fc = nn.Linear(len(layer_ids) * shape.hidden, shape.hidden, bias=False)
        self.hidden_norm, self.norm = RMSNorm(shape.hidden, shape.eps), RMSNorm(shape.hidden, shape.eps)
        self.layers = nn.ModuleList(BlockLayer(shape) for _ in range(layers))
        self.register_buffer("feature_scale", scale)

    @property
    def rows(self) -> int:
        return self.steps + self.unused_rows

    def backbone(self, reading: Reading, anchors: Tensor, embedding: Tensor) -> Tensor:
        """`[n, a, steps, H]`, normed: block b stands at anchors[b] .. and sees the context strictly before it."""
        t, dtype = reading.features.shape[1], embedding.dtype
        blocks = torch.full((*anchors.shape, self.rows), self.mask, device=anchors.device)
        blocks[..., 0] = reading.ids.gather(1, anchors)
        positions = (anchors[..., None] + torch.arange(self.rows, device=anchors.device)).flatten(1)
        chunks = attention_chunks(anchors, self.rows)
        rope = (*self.rope(positions, dtype), *self.rope(torch.arange(t, device=anchors.device), dtype))
        context = self.hidden_norm(self.fc(reading.features.to(dtype) * self.feature_scale.to(dtype)))
        x = F.embedding(blocks.flatten(1), embedding)
        for layer in self.layers:
            x = layer(x, context, rope, chunks)
        return self.norm(x).unflatten(1, (-1, self.rows))[:, :, self.unused_rows :]

    @torch.no_grad()
    def initialise(self, target: FrozenLlama, records: list[Record]) -> None:
        """Layers from the target's first and last, `fc` as its last captured feature."""
        sources = [target.layers[0], *target.layers[len(target.layers) - len(self.layers) + 1 :]]
        for layer, source in zip(self.layers, sources, strict=True):
            copy_layer(source, layer.self_attn, layer.mlp, self.shape)
            layer.input_layernorm.weight.copy_(source.norm1)
            layer.post_attention_layernorm.weight.copy_(source.norm2)
        self.hidden_norm.weight.copy_(sources[-1].norm1)
        self.norm.weight.copy_(target.norm)
        scaled_identity(self.fc, self.feature_scale, self.shape.hidden)

    def config(self) -> dict[str, Any]:
        return {
            "architectures": [self.architecture],
            "model_type": "qwen3",
            "num_hidden_layers": len(self.layers),
            "block_size": self.rows,
            "mask_token_id": self.mask,
            "target_layer_ids": list(self.layer_ids),
            "tie_word_embeddings": True,
            "layer_types": ["full_attention"] * len(self.layers),
            "use_sliding_window": False,
        }

    def checkpoint(self, head: Tensor) -> dict[str, Tensor]:
        own = ("hidden_norm.", "norm.", "layers.")
        tensors = {name: tensor for name, tensor in self.state_dict().items() if name.startswith(own)}
        return tensors | {"fc.weight": self.fc.weight * self.feature_scale}

    @classmethod
    def _sizes(cls, hf: dict[str, Any]) -> dict[str, Any]:
        """Constructor arguments out of a config; the feature scale is in `fc` already."""
        layer_ids = tuple(hf["target_layer_ids"])
        return {
            "shape": Shape.from_hf(hf),
            "steps": hf["block_size"] - cls.unused_rows,
            "layer_ids": layer_ids,
            "layers": hf["num_hidden_layers"],
            "mask": hf["mask_token_id"],
            "scale": torch.ones(len(layer_ids) * hf["hidden_size"]),
        }


class DFlashDraft(BlockDraft):
    """Positions drafted in parallel, none knowing what the others chose."""

    kind: ClassVar[str] = "dflash"
    architecture: ClassVar[str] = "DFlashDraftModel"
    unused_rows: ClassVar[int] = 1

    def forward(self, reading: Reading, anchors: Tensor, embedding: Tensor) -> Blocks:
        hidden = self.backbone(reading, anchors, embedding).flatten(0, 2)
        return Blocks(hidden, hidden[:, :0])

    @classmethod
    def from_checkpoint(cls, hf: dict[str, Any], tensors: dict[str, Tensor], hot: Tensor) -> DFlashDraft:
        draft = cls(hot=hot, **cls._sizes(hf))
        draft.load_state_dict(tensors | {"hot": hot, "feature_scale": draft.feature_scale})
        return draft


class DSparkDraft(BlockDraft):
    """The backbone, a vanilla Markov head and a confidence head.

    The last Markov dimension is constant (W1[:, -1] = 1), so that W2[:, -1] is a unigram bias: it is what keeps a
    full-vocabulary runtime off the untrained, cold rows.
    """

    kind: ClassVar[str] = "dspark"
    architecture: ClassVar[str] = "Qwen3DSparkModel"
    unused_rows: ClassVar[int] = 0

    def __init__(self, *, rank: int, **sizes: Any) -> None:
        super().__init__(**sizes)
        self.markov_w1 = nn.Parameter(torch.randn(self.shape.vocab, rank - 1) * 0.1)
        self.markov_w2 = nn.Parameter(torch.zeros(len(self.hot), rank))
        self.confidence = nn.Linear(self.shape.hidden + rank, 1)

    @property
    def w2(self) -> Tensor:
        return self.markov_w2

    def forward(self, reading: Reading, anchors: Tensor, embedding: Tensor) -> Blocks:
        hidden = self.backbone(reading, anchors, embedding).flatten(0, 2)
        before = anchors[..., None] + torch.arange(self.steps, device=anchors.device)
        previous = reading.ids.gather(1, before.clamp(max=reading.ids.shape[1] - 1).flatten(1)).flatten()
        w1 = F.embedding(previous, self.markov_w1)
        return Blocks(hidden, torch.cat([w1, torch.ones_like(w1[:, :1])], -1))

    def confidence_logit(self, blocks: Blocks) -> Tensor:
        return self.confidence(torch.cat([blocks.hidden, blocks.latent.to(blocks.hidden.dtype)], -1))[:, 0]

    @torch.no_grad()
    def initialise(self, target: FrozenLlama, records: list[Record]) -> None:
        """And the Markov head from an SVD of bigram counts."""
        super().initialise(target, records)
        rank = self.markov_w2.shape[1]
        w1, w2, unigram = bigram_factors(records, self.hot.cpu(), self.shape.vocab, rank - 1)
        self.markov_w1.copy_(w1 + 0.01 * torch.randn_like(w1))
        self.markov_w2[:, :-1].copy_(w2)
        self.markov_w2[:, -1].copy_(0.5 * (unigram - unigram.mean()))

    def config(self) -> dict[str, Any]:
        return super().config() | {
            "markov_rank": self.markov_w2.shape[1],
            "markov_head_type": "vanilla",
            "enable_confidence_head": True,
            "confidence_head_with_markov": True,
        }

    def checkpoint(self, head: Tensor) -> dict[str, Tensor]:
        """W2 over the whole vocabulary, its cold rows a bias that keeps them from being drafted."""
        w2 = torch.zeros(self.shape.vocab, self.markov_w2.shape[1])
        w2[:, -1] = COLD_BIAS
        w2[self.hot.cpu()] = self.markov_w2.detach().float().cpu()
        return super().checkpoint(head) | {
            "markov_head.markov_w1.weight": torch.cat([self.markov_w1, torch.ones_like(self.markov_w1[:, :1])], 1),
            "markov_head.markov_w2.weight": w2,
            "confidence_head.proj.weight": self.confidence.weight,
            "confidence_head.proj.bias": self.confidence.bias,
        }

    @classmethod
    def from_checkpoint(cls, hf: dict[str, Any], tensors: dict[str, Tensor], hot: Tensor) -> DSparkDraft:
        draft = cls(rank=hf["markov_rank"], hot=hot, **cls._sizes(hf))
        tensors = dict(tensors)
        tensors["markov_w1"] = tensors.pop("markov_head.markov_w1.weight")[:, :-1]
        tensors["markov_w2"] = tensors.pop("markov_head.markov_w2.weight")[hot]
        for part in ("weight", "bias"):
            tensors[f"confidence.{part}"] = tensors.pop(f"confidence_head.proj.{part}")
        draft.load_state_dict(tensors | {"hot": hot, "feature_scale": draft.feature_scale})
        return draft

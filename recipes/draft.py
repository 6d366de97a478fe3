"""The DSpark draft as a trainable module, and its checkpoint in the released format.

Mathematics and tensor names are those a serving engine expects of a `Qwen3DSparkModel` checkpoint with a vanilla Markov
head. This file knows nothing of data, losses or optimisers, and it never holds the target's embedding or head.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from recipes.llama import rope_tables, rotate

# Logit bias of the tokens outside the hot vocabulary: never drafted, and finite in every dtype.
COLD_BIAS = -30.0


@dataclass(frozen=True)
class DraftConfig:
    """Shape of the draft; all but the first six fields are the target's."""

    layers: int
    block: int
    markov_rank: int
    target_layer_ids: tuple[int, ...]
    mask_token_id: int
    num_target_layers: int
    vocab: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    theta: float
    max_positions: int

    def to_hf(self) -> dict:
        """The `config.json` of the released format."""
        return {
            "architectures": ["Qwen3DSparkModel"],
            "model_type": "qwen3",
            "num_hidden_layers": self.layers,
            "block_size": self.block,
            "mask_token_id": self.mask_token_id,
            "target_layer_ids": list(self.target_layer_ids),
            "num_target_layers": self.num_target_layers,
            "markov_rank": self.markov_rank,
            "markov_head_type": "vanilla",
            "enable_confidence_head": True,
            "confidence_head_with_markov": True,
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
            "attention_bias": False,
            "tie_word_embeddings": True,
            "layer_types": ["full_attention"] * self.layers,
            "use_sliding_window": False,
            "dtype": "bfloat16",
            "torch_dtype": "bfloat16",
        }


# Query rows, how much context they may need, and their bias [n, 1, rows, seen + rows]: 0 or, where blind, -inf.
Chunk = tuple[slice, int, Tensor]


def attention_chunks(anchors: Tensor, block: int, size: int = 24) -> list[Chunk]:
    """Group the blocks of ascending `anchors` [n, a] so that no group meets keys that none of it may see.

    One dense mask over all blocks would spend most of the attention on other blocks' keys and on later context.
    """
    chunks = []
    for first in range(0, anchors.shape[1], size):
        part = anchors[:, first : first + size]
        seen, count = int(part.max()), part.shape[1]
        owner = torch.arange(count, device=anchors.device).repeat_interleave(block)
        before = torch.arange(seen, device=anchors.device) < part.repeat_interleave(block, 1)[..., None]
        own = (owner[:, None] == owner).expand(len(anchors), -1, -1)
        rows = slice(first * block, (first + count) * block)
        blind = ~torch.cat([before, own], -1)[:, None]
        chunks.append((rows, seen, torch.zeros(blind.shape, device=anchors.device).masked_fill_(blind, -torch.inf)))
    return chunks


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Queries and own keys from the block, further keys and values from the projected context."""

    def __init__(self, cfg: DraftConfig):
        super().__init__()
        self.cfg = cfg
        self.q_proj = nn.Linear(cfg.hidden, cfg.heads * cfg.head_dim, bias=False)
        self.k_proj = nn.Linear(cfg.hidden, cfg.kv_heads * cfg.head_dim, bias=False)
        self.v_proj = nn.Linear(cfg.hidden, cfg.kv_heads * cfg.head_dim, bias=False)
        self.o_proj = nn.Linear(cfg.heads * cfg.head_dim, cfg.hidden, bias=False)
        self.q_norm, self.k_norm = RMSNorm(cfg.head_dim, cfg.eps), RMSNorm(cfg.head_dim, cfg.eps)

    def keys(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        k = self.k_proj(x).unflatten(-1, (self.cfg.kv_heads, self.cfg.head_dim))
        return rotate(self.k_norm(k), cos, sin)

    def forward(self, x: Tensor, context: Tensor, rope: tuple[Tensor, ...], chunks: list[Chunk]) -> Tensor:
        """x [n, q, h] the blocks, context [n, t, h]; returns [n, q, h]."""
        cos, sin, context_cos, context_sin = rope
        q = self.q_proj(x).unflatten(-1, (self.cfg.heads, self.cfg.head_dim))
        q = rotate(self.q_norm(q), cos, sin) * self.cfg.head_dim**-0.5
        own_k, past_k = self.keys(x, cos, sin), self.keys(context, context_cos, context_sin)
        own_v, past_v = (self.v_proj(s).unflatten(-1, (self.cfg.kv_heads, self.cfg.head_dim)) for s in (x, context))
        # [n, kv_heads, tokens, d]; the query heads of one KV head become further query rows.
        own_k, past_k, own_v, past_v = (t.transpose(1, 2) for t in (own_k, past_k, own_v, past_v))
        q = q.unflatten(2, (self.cfg.kv_heads, -1)).permute(0, 2, 3, 1, 4)
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


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, cfg: DraftConfig):
        super().__init__()
        self.gate_proj = nn.Linear(cfg.hidden, cfg.intermediate, bias=False)
        self.up_proj = nn.Linear(cfg.hidden, cfg.intermediate, bias=False)
        self.down_proj = nn.Linear(cfg.intermediate, cfg.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Pre-norm attention and MLP, each with a residual."""

    def __init__(self, cfg: DraftConfig):
        super().__init__()
        self.input_layernorm, self.self_attn = RMSNorm(cfg.hidden, cfg.eps), Attention(cfg)
        self.post_attention_layernorm, self.mlp = RMSNorm(cfg.hidden, cfg.eps), MLP(cfg)

    def forward(self, x: Tensor, context: Tensor, rope: tuple[Tensor, ...], chunks: list[Chunk]) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), context, rope, chunks)
        return x + self.mlp(self.post_attention_layernorm(x))


class Draft(nn.Module):
    """DSpark: a block-parallel backbone over target features, a Markov head, a confidence head.

    `hot` [v] are the sorted token ids the draft may propose. The last Markov dimension is constant (W1[:, -1] = 1), so
    that W2[:, -1] is a unigram bias: it is what keeps a full-vocabulary runtime off the untrained, cold rows.
    `feature_scale` [len(target_layer_ids) * hidden] whitens the target features during training and is folded into `fc`
    in the checkpoint.
    """

    def __init__(self, cfg: DraftConfig, hot: Tensor, feature_scale: Tensor):
        super().__init__()
        self.cfg = cfg
        self.fc = nn.Linear(len(cfg.target_layer_ids) * cfg.hidden, cfg.hidden, bias=False)
        self.hidden_norm, self.norm = RMSNorm(cfg.hidden, cfg.eps), RMSNorm(cfg.hidden, cfg.eps)
        self.layers = nn.ModuleList(Layer(cfg) for _ in range(cfg.layers))
        self.markov_w1 = nn.Parameter(torch.randn(cfg.vocab, cfg.markov_rank - 1) * 0.1)
        self.markov_w2 = nn.Parameter(torch.zeros(len(hot), cfg.markov_rank))
        self.confidence = nn.Linear(cfg.hidden + cfg.markov_rank, 1)
        self.register_buffer("hot", hot)
        self.register_buffer("feature_scale", feature_scale)
        cos, sin = rope_tables(2048, cfg.head_dim, cfg.theta, hot.device)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def latent(self, previous: Tensor) -> Tensor:
        """W1[x_{k-1}] with its constant last dimension: [...] -> [..., r]."""
        w1 = F.embedding(previous, self.markov_w1)
        return torch.cat([w1, torch.ones_like(w1[..., :1])], -1)

    def backbone(self, embedded: Tensor, anchors: Tensor, features: Tensor) -> Tensor:
        """h_1..h_gamma of many blocks of one sequence each row.

        embedded [n, a*gamma, h]: anchor and mask embeddings; anchors [n, a]: ascending positions, block b is at
        anchors[b] .. anchors[b] + gamma - 1 and sees the context strictly before anchors[b] and itself;
        features [n, t, f]. Returns [n, a*gamma, h], normed: what lm_head reads.
        """
        t, dtype = features.shape[1], embedded.dtype
        offsets = torch.arange(self.cfg.block, device=anchors.device)
        positions = (anchors[..., None] + offsets).flatten(1)
        chunks = attention_chunks(anchors, self.cfg.block)
        tables = (self.cos[positions], self.sin[positions], self.cos[:t], self.sin[:t])
        rope = tuple(table.to(dtype).unsqueeze(-2) for table in tables)
        context = self.hidden_norm(self.fc(features * self.feature_scale.to(dtype)))
        x = embedded
        for layer in self.layers:
            x = layer(x, context, rope, chunks)
        return self.norm(x)

    def confidence_logit(self, hidden: Tensor, latent: Tensor) -> Tensor:
        return self.confidence(torch.cat([hidden, latent.to(hidden.dtype)], -1))[..., 0]

    def checkpoint(self) -> dict[str, Tensor]:
        """The released tensor names, bf16; `fc` with the feature scale folded in, W2 over the whole vocabulary."""
        own = ("fc.", "hidden_norm.", "norm.", "layers.")
        out = {k: v for k, v in self.state_dict().items() if k.startswith(own)}
        out["fc.weight"] = self.fc.weight * self.feature_scale
        ones = torch.ones_like(self.markov_w1[:, :1])
        w2 = torch.zeros(self.cfg.vocab, self.cfg.markov_rank)
        w2[:, -1] = COLD_BIAS
        w2[self.hot.cpu()] = self.markov_w2.detach().float().cpu()
        out["markov_head.markov_w1.weight"] = torch.cat([self.markov_w1, ones], 1)
        out["markov_head.markov_w2.weight"] = w2
        out["confidence_head.proj.weight"] = self.confidence.weight
        out["confidence_head.proj.bias"] = self.confidence.bias
        return {k: v.detach().to("cpu", torch.bfloat16).contiguous() for k, v in out.items()}

    def export(self, folder: Path) -> None:
        """Write config.json, model.safetensors and hot_vocab.json; each file appears whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        staged = {name: folder / f".{name}.part" for name in ("model.safetensors", "config.json", "hot_vocab.json")}
        save_file(self.checkpoint(), staged["model.safetensors"], metadata={"format": "pt"})
        staged["config.json"].write_text(json.dumps(self.cfg.to_hf(), indent=2) + "\n")
        staged["hot_vocab.json"].write_text(json.dumps(self.hot.tolist()) + "\n")
        for name, path in staged.items():
            path.replace(folder / name)

    @classmethod
    def load(cls, folder: Path) -> Draft:
        """Read an exported folder back, without the training-time feature scale (it is folded in)."""
        hf = json.loads((folder / "config.json").read_text())
        hot = torch.tensor(json.loads((folder / "hot_vocab.json").read_text()))
        cfg = DraftConfig(
            layers=hf["num_hidden_layers"], block=hf["block_size"], markov_rank=hf["markov_rank"],
            target_layer_ids=tuple(hf["target_layer_ids"]), mask_token_id=hf["mask_token_id"],
            num_target_layers=hf["num_target_layers"], vocab=hf["vocab_size"], hidden=hf["hidden_size"],
            intermediate=hf["intermediate_size"], heads=hf["num_attention_heads"],
            kv_heads=hf["num_key_value_heads"], head_dim=hf["head_dim"], eps=hf["rms_norm_eps"],
            theta=hf["rope_theta"], max_positions=hf["max_position_embeddings"],
        )  # fmt: skip
        draft = cls(cfg, hot, torch.ones(len(cfg.target_layer_ids) * cfg.hidden))
        state = {k: v.float() for k, v in load_file(folder / "model.safetensors").items()}
        state["markov_w1"] = state.pop("markov_head.markov_w1.weight")[:, :-1]
        state["markov_w2"] = state.pop("markov_head.markov_w2.weight")[hot]
        for part in ("weight", "bias"):
            state[f"confidence.{part}"] = state.pop(f"confidence_head.proj.{part}")
        draft.load_state_dict(state | {"hot": hot, "feature_scale": draft.feature_scale})
        return draft

    def describe(self) -> dict:
        return asdict(self.cfg)

"""A Llama with twelve tokens and a DSpark draft for it, both random: the probability of every text is known."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB, HIDDEN, LAYERS, HEADS, KV_HEADS, RANK, GAMMA = 12, 32, 4, 4, 2, 4, 4
MASK_TOKEN = 11
CONTEXT = 256


def write_target(folder: Path, seed: int = 0) -> LlamaForCausalLM:
    """Random weights, large enough that a text 40 tokens long decides about its next token: the distribution moves by
    0.6 when all but the last three are others, by 0.15 when one in the middle is. With the usual ones only the last
    token counts (0.002), and a wrong KV cache, position or mask would go unseen."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=CONTEXT,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=False,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config).float().eval()
    with torch.no_grad():
        model.lm_head.weight.normal_(std=0.35)
        model.model.embed_tokens.weight.normal_()
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def greedy(model: LlamaForCausalLM, prompts: Tensor, count: int) -> Tensor:
    """int64 `[n, count]`: the likeliest token after token of prompts `[n, p]`, each from the whole text anew."""
    texts = prompts
    for _ in range(count):
        texts = torch.cat([texts, model(texts).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return texts[:, prompts.shape[1] :]


def write_draft(folder: Path, head: str = "vanilla", layers: int = 1) -> None:
    """A DeepSpec checkpoint of random weights: it drafts badly, and must not bias anything.

    head: `vanilla`, `gated` or `rnn`
    """
    g, others = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g) * 0.2

    def norm(size: int) -> Tensor:
        """Not all ones, so that a norm left out or put elsewhere shows."""
        return 1 + torch.rand(size, generator=others)

    head_dim, kv = HIDDEN // HEADS, HIDDEN // HEADS * KV_HEADS
    tensors = {
        "fc.weight": random(HIDDEN, 2 * HIDDEN),
        "hidden_norm.weight": norm(HIDDEN),
        "norm.weight": norm(HIDDEN),
        "markov_head.markov_w1.weight": random(VOCAB, RANK) * 4,
        "markov_head.markov_w2.weight": random(VOCAB, RANK) * 4,
        "confidence_head.proj.weight": random(1, HIDDEN + RANK),
        "confidence_head.proj.bias": torch.zeros(1),
    }
    matrices = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (kv, HIDDEN),
        "self_attn.v_proj": (kv, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (64, HIDDEN),
        "mlp.up_proj": (64, HIDDEN),
        "mlp.down_proj": (HIDDEN, 64),
    }
    norms = {
        "self_attn.q_norm": head_dim,
        "self_attn.k_norm": head_dim,
        "input_layernorm": HIDDEN,
        "post_attention_layernorm": HIDDEN,
    }
    for layer in range(layers):
        tensors |= {f"layers.{layer}.{name}.weight": random(*shape) for name, shape in matrices.items()}
        tensors |= {f"layers.{layer}.{name}.weight": norm(size) for name, size in norms.items()}
    if head == "gated":
        tensors["markov_head.gate_proj.weight"] = random(RANK, HIDDEN + RANK) * 4
        tensors["markov_head.gate_proj.bias"] = random(RANK)
    if head == "rnn":
        tensors["markov_head.joint_proj.weight"] = random(3 * RANK, HIDDEN + 2 * RANK) * 4
        tensors["markov_head.joint_proj.bias"] = random(3 * RANK)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["Qwen3DSparkModel"],
        "model_type": "qwen3",
        "torch_dtype": "float32",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": head_dim,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "block_size": GAMMA,
        "mask_token_id": MASK_TOKEN,
        "target_layer_ids": [0, 2],
        "num_target_layers": LAYERS,
        "markov_rank": RANK,
        "markov_head_type": head,
        "enable_confidence_head": True,
        "confidence_head_with_markov": True,
        "layer_types": ["full_attention"] * layers,
    }
    (folder / "config.json").write_text(json.dumps(config))

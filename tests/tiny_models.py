"""A Llama with twelve tokens and random weights: the probability of every text is known."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB, HIDDEN, LAYERS, HEADS, KV_HEADS = 12, 32, 4, 4, 2
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

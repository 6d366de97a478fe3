"""DeepSeek-V4 with the draft bundled in its checkpoint, tiny and of random weights: is it served, and does it draft?

    python -m bench.gpu.deepseek_v4

For a GPU on which SGLang serves DeepSeek-V4 (Hopper or newer, with all of SGLang's kernels installed). There is nothing
to bring: SGLang makes the weights from the config alone (`--load-format dummy`). Plain decoding first, then
`DSPARK_SGL`, which is handed over to SGLang's own class and worker (`dspark_sgl/deepseek_v4.py`). Prints answers that
came whole, accepted length, and how many answers are plain decoding's. Exits 1 where a server does not start or an
answer is short. Says nothing about speed, and of a draft only that it drafts: random weights agree by chance.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dspark_sgl.ending import unwind_when_told_to_end
from dspark_sgl.server import Answer, Server, ServerError

from ..common import ask_all

VOCABULARY, TOKENS, USERS = 1024, 64, 8
CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "model_type": "deepseek_v4",
    "torch_dtype": "bfloat16",
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 4096,
    "hidden_size": 512,
    "num_hidden_layers": 4,
    # Attention as released: its kernels are made for these numbers.
    "num_attention_heads": 64,
    "num_key_value_heads": 1,
    "head_dim": 512,
    "qk_nope_head_dim": 448,
    "qk_rope_head_dim": 64,
    "q_lora_rank": 256,
    "o_lora_rank": 256,
    "o_groups": 8,
    "sliding_window": 128,
    "compress_ratios": [0, 0, 4, 128],
    "index_head_dim": 128,
    "index_n_heads": 64,
    "index_topk": 512,
    "rope_theta": 10000,
    "rope_scaling": {
        "rope_type": "yarn",
        "type": "yarn",
        "factor": 4,
        "original_max_position_embeddings": 1024,
        "beta_fast": 32,
        "beta_slow": 1,
    },
    "hc_mult": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_hash_layers": 1,
    "intermediate_size": 256,
    "moe_intermediate_size": 256,
    "dspark_block_size": 5,
    "dspark_markov_rank": 64,
    "dspark_noise_token_id": 1,
    "dspark_target_layer_ids": [1, 2, 3],
}


def write_config(folder: Path) -> Path:
    """The whole of the checkpoint."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=1))
    return folder


def answers(model: Path, prompts: Sequence[Sequence[int]], more: Sequence[str] = ()) -> list[Answer]:
    """Of a server of its own."""
    arguments = ["--model-path", str(model), "--load-format", "dummy", "--skip-tokenizer-init", *more]
    with Server(arguments) as server:
        ways = {"temperature": 0, "max_new_tokens": TOKENS, "ignore_eos": True}
        return ask_all(lambda prompt: server.generate(prompt, **ways), prompts, USERS)


def main() -> int:
    unwind_when_told_to_end()
    dice = random.Random(0)
    prompts = [[dice.randrange(2, VOCABULARY) for _ in range(48)] for _ in range(2 * USERS)]
    with tempfile.TemporaryDirectory() as folder:
        model = write_config(Path(folder) / "deepseek-v4")
        try:
            plain = answers(model, prompts)
            drafted = answers(model, prompts, ("--speculative-algorithm", "DSPARK_SGL"))
        except ServerError as error:
            print(error)
            return 1
    whole = sum(len(answer.tokens) == TOKENS for answer in drafted)
    same = sum(ours.tokens == theirs.tokens for ours, theirs in zip(drafted, plain, strict=True))
    rounds = sum(answer.meta.get("spec_verify_ct") or TOKENS for answer in drafted)
    print(f"{whole} of {len(prompts)} answers whole, {same} as plain decoding's")
    print(f"accepted length {sum(len(answer.tokens) for answer in drafted) / rounds:.2f}")
    return int(whole < len(prompts))


if __name__ == "__main__":
    raise SystemExit(main())

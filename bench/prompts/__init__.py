"""The evaluation prompts: 240, in three domains, never trained on."""

from __future__ import annotations

from pathlib import Path

from dspark_sgl.prompts import Prompt, read_prompts

FILE = Path(__file__).parent / "eval.jsonl"
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


def eval_prompts(limit: int | None = None) -> list[Prompt]:
    """The first `limit` prompts, domains in turn, as SmolLM2's chat template renders one user turn."""
    return [Prompt(prompt.domain, _chat(prompt.text)) for prompt in read_prompts(FILE, limit)]


def _chat(prompt: str) -> str:
    return f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"

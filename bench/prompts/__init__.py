"""The evaluation prompts: 240, in three domains, never trained on."""

from __future__ import annotations

from pathlib import Path

from dspark_sgl.prompts import Prompt, read_prompts
from dspark_sgl.target import chat

FILE = Path(__file__).parent / "eval.jsonl"


def eval_prompts(limit: int | None = None) -> list[Prompt]:
    """The first `limit` prompts, domains in turn, as SmolLM2's chat template renders one user turn."""
    return [Prompt(prompt.domain, chat(prompt.text)) for prompt in read_prompts(FILE, limit)]

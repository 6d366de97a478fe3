"""The evaluation prompts: 240, in three domains, never trained on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

FILE = Path(__file__).parent / "eval.jsonl"
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


@dataclass(frozen=True)
class Prompt:
    """domain: math, code or chat; text: as SmolLM2's chat template renders one user turn"""

    domain: str
    text: str


def eval_prompts(limit: int | None = None) -> list[Prompt]:
    """The first `limit` prompts, domains in turn."""
    rows = [json.loads(line) for line in FILE.read_text().splitlines()]
    domains = {row["domain"]: [r for r in rows if r["domain"] == row["domain"]] for row in rows}
    turns = zip(*domains.values(), strict=True)
    return [Prompt(row["domain"], _chat(row["prompt"])) for turn in turns for row in turn][:limit]


def _chat(prompt: str) -> str:
    return f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"

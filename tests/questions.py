"""What the tests ask of servers of the real model, and how."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from dspark_sgl.server import Answer, Server
from dspark_sgl.target import chat

PROMPT = chat("Write a python function to sort a list.")
LONG_PROMPT = range(1000, 1330)
"""Token ids, whatever they say: not far from the end of the context."""


SHAPING: dict[str, dict[str, Any]] = {
    "frequency": {"frequency_penalty": 0.7},
    "presence": {"presence_penalty": 0.7},
    "repetition": {"repetition_penalty": 1.3},
    "minimum": {"min_new_tokens": 20, "stop": ["\n"]},
    "bias": {"logit_bias": {"198": -3.0, "30": 2.0}},
    "stop": {"stop": ["\n\n"]},
    "regex": {"regex": r"(yes|no), because [a-z ]{10,40}\."},
    "schema": {
        "json_schema": json.dumps({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})
    },
}


def shaped(server: Server) -> dict[str, tuple[int, ...]]:
    """What every way of shaping the logits makes of one prompt, all of them in one batch."""
    with ThreadPoolExecutor(len(SHAPING)) as pool:
        answers = pool.map(
            lambda params: server.generate(PROMPT, temperature=0, max_new_tokens=40, **params), SHAPING.values()
        )
        return {name: answer.tokens for name, answer in zip(SHAPING, answers, strict=True)}


def together(server: Server, prompts: Sequence[str], **sampling: Any) -> list[Answer]:
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda prompt: server.generate(prompt, **sampling), prompts))

"""The servers the tests share: one start per configuration, because a start costs most of a minute.

float32, so that greedy outputs can be compared token for token; chunks of 64 tokens and a small KV pool, so that
chunked prefill, radix eviction and retraction happen on the way.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from dspark_sgl.server import Server
from dspark_sgl.settings import RECORD_VARIABLE
from dspark_sgl.target import make_target

PROMPTS = Path(__file__).parent.parent / "bench" / "prompts" / "eval.jsonl"
SHARED = (
    *("--dtype", "float32", "--chunked-prefill-size", "64", "--context-length", "384"),
    *("--max-total-tokens", "3000", "--max-running-requests", "16", "--log-level", "info"),
)


@pytest.fixture(scope="session")
def target() -> Path:
    return make_target()


@pytest.fixture(scope="session")
def record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `spec_server` records its verify rounds."""
    return tmp_path_factory.mktemp("record") / "rounds.jsonl"


@pytest.fixture(scope="session")
def spec_server(target: Path, record: Path) -> Iterator[Server]:
    """DSpark at the full block; a request lowers its own depth with `max_depth`."""
    arguments = ["--model-path", str(target), "--speculative-algorithm", "DSPARK_SGL", "--dspark-policy", "fixed-7"]
    with Server([*arguments, *SHARED], {RECORD_VARIABLE: str(record)}) as server:
        yield server


@pytest.fixture(scope="session")
def plain_server(target: Path) -> Iterator[Server]:
    """SGLang without speculation, on the same attention backend. Synchronous as ours is: overlapped, SGLang counts a
    token for the penalties one step late."""
    with Server(["--model-path", str(target), "--disable-overlap-schedule", *SHARED]) as server:
        yield server


@pytest.fixture(scope="session")
def prompts() -> list[str]:
    """Twelve evaluation prompts, four of each domain, as the chat template renders them."""
    rows = [json.loads(line) for line in PROMPTS.read_text().splitlines()]
    chosen = [row for domain in ("math", "code", "chat") for row in [r for r in rows if r["domain"] == domain][:4]]
    return [chat(row["prompt"]) for row in chosen]


def chat(prompt: str) -> str:
    """SmolLM2's chat template for one user turn."""
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    return f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"

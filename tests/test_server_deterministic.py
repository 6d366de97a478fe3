"""`--enable-deterministic-inference` on a CPU: speculated answers are plain decoding's to the bit, in any company.

Plain decoding is SGLang's own decode step in the same server: a request's `max_depth: 0`, asked alone. This is of
bfloat16, where ties are frequent; `python -m bench.exactness --deterministic` is of float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from dspark_sgl.server import Server, ServerError

from .conftest import SHARED

pytestmark = [pytest.mark.server, pytest.mark.timeout(1200)]

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "sampled": {"temperature": 1.0},
    "filtered": {"temperature": 0.8, "top_p": 0.9, "top_k": 50},
}
Written = Sequence[tuple[int, float]]
"""Tokens with their log-probabilities."""


@pytest.fixture(scope="module")
def server(target: Path) -> Iterator[Server]:
    speculate = ("--speculative-algorithm", "DSPARK_SGL", "--dspark-policy", "fixed-5")
    exactly = ("--enable-deterministic-inference", "--dtype", "bfloat16")
    with Server(["--model-path", str(target), *SHARED, *speculate, *exactly]) as running:
        yield running


def write(server: Server, prompt: str, seed: int, depth: int | None, **how: Any) -> tuple[Written, int]:
    """The answer, and how many verify rounds it took."""
    sampling = {"max_new_tokens": 40, "sampling_seed": seed, "custom_params": {"dspark": {"max_depth": depth}}, **how}
    body = {"text": prompt, "return_logprob": True, "sampling_params": sampling}
    meta = server.post("/generate", body)["meta_info"]
    written = [(token, logprob) for logprob, token, _ in meta["output_token_logprobs"]]
    return written, meta.get("spec_verify_ct") or 0


@pytest.mark.parametrize("way", WAYS)
def test_speculated_answers_are_plain_decodings_to_the_bit(server: Server, prompts: list[str], way: str) -> None:
    asked = list(enumerate(prompts[::3]))
    plain = [write(server, prompt, seed, 0, **WAYS[way])[0] for seed, prompt in asked]
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda one: write(server, one[1], one[0], 5, **WAYS[way]), asked))
    assert [written for written, _ in answers] == plain
    assert sum(rounds for _, rounds in answers) < sum(len(written) for written in plain) - 2 * len(plain)


def test_a_seed_decides(server: Server, prompts: list[str]) -> None:
    written = [[token for token, _ in write(server, prompts[0], seed, 5, temperature=1.0)[0]] for seed in (1, 2, 1)]
    assert written[0] == written[2] != written[1]


def test_what_sglang_would_draw_wrongly_is_refused(server: Server, prompts: list[str]) -> None:
    with pytest.raises(ServerError, match="400.*min_p"):
        server.generate(prompts[0], min_p=0.1, max_new_tokens=4)

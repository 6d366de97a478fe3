"""What several tests ask of servers, and how."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import pytest

from dspark_sgl.scrape import Scrape
from dspark_sgl.server import Answer, Server
from dspark_sgl.target import chat

PROMPT = chat("Write a python function to sort a list.")
LONG_PROMPT = range(1000, 1330)
"""Token ids, whatever they say: not far from the end of the context."""


SHAPING: dict[str, dict[str, Any]] = {
    "nothing": {},
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


Argument, Result = TypeVar("Argument"), TypeVar("Result")


def once(function: Callable[[Argument], Result]) -> Callable[[Argument], Result]:
    """Like `functools.cache`, failures included: what has taken minutes to fail is not tried again by every test."""
    done: dict[Argument, Future[Result]] = {}

    def asked(argument: Argument) -> Result:
        if argument not in done:
            done[argument] = Future()
            try:
                done[argument].set_result(function(argument))
            except Exception as error:
                done[argument].set_exception(error)
        return done[argument].result()

    return asked


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


def expect_logprobs_of_plain_decoding(server: Server, plain_server: Server, limit: dict[str, Any]) -> None:
    """Of input and output tokens, and the two likeliest at each place. limit: sampling parameters of the request"""
    body = {
        "text": PROMPT,
        "return_logprob": True,
        "logprob_start_len": 0,
        "top_logprobs_num": 2,
        "sampling_params": {"temperature": 0, "max_new_tokens": 20, **limit},
    }
    wanted, got = plain_server.post("/generate", body)["meta_info"], server.post("/generate", body)["meta_info"]
    for name in ("output_token_logprobs", "input_token_logprobs"):
        assert len(got[name]) == len(wanted[name])
        for (value, token, _), (other, same, _) in zip(got[name], wanted[name], strict=True):
            assert token == same
            if value is not None:
                assert value == pytest.approx(other, abs=1e-3)
    tops = zip(got["output_top_logprobs"], wanted["output_top_logprobs"], strict=True)
    assert all([t for _, t, _ in a] == [t for _, t, _ in b] for a, b in tops)


def metric(server: Server, series: str, **labels: str) -> float:
    """The value of one series on `/metrics`; 0 where it does not exist yet."""
    return Scrape.of(server.get("/metrics"), time.monotonic()).total(f"dspark_{series}", **labels) or 0.0

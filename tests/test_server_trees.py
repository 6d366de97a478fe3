"""A real server that drafts trees against the same server without speculation: same tokens, whatever is asked."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from bench import soak
from dspark_sgl.server import Answer, Server

from .questions import LONG_PROMPT, PROMPT, SHAPING, expect_logprobs_of_plain_decoding, once, shaped, together

pytestmark = [pytest.mark.server, pytest.mark.timeout(1200)]

SHAPES = {
    "whole trees of 32": "schedule: {kind: fixed, depth: 64}\nshape: {kind: tree, max_nodes: 32, branch: 4}\n",
    "the best 7 of 32 each": "schedule: {kind: fixed, nodes: 7}\nshape: {kind: tree, max_nodes: 32, branch: 4}\n",
    "chains": "schedule: {kind: fixed, depth: 64}\n",
    "what pays": "schedule: {kind: throughput}\nshape: {kind: auto, max_nodes: 32}\n",
    "not below depth 2": "schedule: {kind: threshold, confidence: 0.3}\ndepth: {min: 2}\nshape: {kind: tree}\n",
}


UNLIKE: list[dict[str, Any]] = [
    {},
    {"frequency_penalty": 0.6},
    {"regex": r"[a-z ]{20,60}\."},
    {"custom_params": {"dspark": {"max_depth": 2}}},
]


def policy_text(shape: str) -> str:
    return f"version: 1\nname: trees\n{SHAPES[shape]}"


@pytest.fixture(scope="module")
def tree_server(spec_server: Server, policy: Path) -> Iterator[Server]:
    """The shared server, which drafts trees as long as this file's tests run."""
    before = policy.read_text()
    yield spec_server
    spec_server.edit_policy(policy, before)


@pytest.fixture(scope="module")
def tree_answers(
    tree_server: Server, policy: Path, prompts: list[str]
) -> Callable[[str], tuple[list[list[Answer]], int]]:
    """Of a shape: six answers at a time, and how many drafts were verified for them. Whole trees are asked twice: the
    second time prompts and answers are in the radix cache, the draft's context too."""

    @once
    def answers(shape: str) -> tuple[list[list[Answer]], int]:
        tree_server.edit_policy(policy, policy_text(shape))
        tree_server.flush()
        before = tree_server.report()["counts"].get("drafted", 0)
        passes = 2 if shape == "whole trees of 32" else 1
        found = [together(tree_server, prompts[::2], temperature=0, max_new_tokens=64) for _ in range(passes)]
        return found, tree_server.report()["counts"]["drafted"] - before

    return answers


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_tokens_are_those_of_plain_decoding(
    tree_answers: Callable[[str], tuple[list[list[Answer]], int]], plain_answers: list[Answer], shape: str
) -> None:
    passes, drafted = tree_answers(shape)
    for answers in passes:
        assert [a.tokens for a in answers] == [a.tokens for a in plain_answers[::2]]
    assert drafted > 0


def test_a_tree_saves_more_rounds_than_a_chain(
    tree_answers: Callable[[str], tuple[list[list[Answer]], int]],
) -> None:
    def rounds(shape: str) -> int:
        return sum(answer.meta["spec_verify_ct"] for answer in tree_answers(shape)[0][0])

    assert rounds("whole trees of 32") < 0.9 * rounds("chains")


@pytest.fixture
def whole_trees(tree_server: Server, policy: Path) -> Server:
    tree_server.edit_policy(policy, policy_text("whole trees of 32"))
    return tree_server


@pytest.fixture(scope="module")
def tree_shaped(tree_server: Server, policy: Path) -> dict[str, tuple[int, ...]]:
    tree_server.edit_policy(policy, policy_text("whole trees of 32"))
    return shaped(tree_server)


@pytest.mark.parametrize("name", SHAPING)
def test_what_shapes_the_logits_shapes_them_the_same(
    plain_shaped: dict[str, tuple[int, ...]], tree_shaped: dict[str, tuple[int, ...]], name: str
) -> None:
    assert tree_shaped[name] == plain_shaped[name]


@pytest.mark.parametrize("shape", ["chains", "whole trees of 32"])
def test_unlike_requests_share_a_batch(
    tree_server: Server,
    policy: Path,
    plain_unlike: list[tuple[int, ...]],
    prompts: list[str],
    shape: str,
) -> None:
    """Penalties (no drafts), a grammar, sampling and a depth limit beside requests that want nothing special."""
    tree_server.edit_policy(policy, policy_text(shape))
    with ThreadPoolExecutor(12) as pool:
        sampled = [pool.submit(unlike, tree_server, prompts, index, temperature=1.0) for index in range(4)]
        got = list(pool.map(lambda index: unlike(tree_server, prompts, index), range(8)))
    assert got == plain_unlike
    assert all(future.result() for future in sampled)


@pytest.fixture(scope="module")
def plain_unlike(plain_server: Server, prompts: list[str]) -> list[tuple[int, ...]]:
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda index: unlike(plain_server, prompts, index), range(8)))


def unlike(server: Server, prompts: list[str], index: int, temperature: float = 0.0) -> tuple[int, ...]:
    special = UNLIKE[index % len(UNLIKE)]
    return server.generate(prompts[index % 8], temperature=temperature, max_new_tokens=32, **special).tokens


def test_logprobs_are_those_of_plain_decoding(whole_trees: Server, plain_server: Server) -> None:
    expect_logprobs_of_plain_decoding(whole_trees, plain_server, {})


def test_generation_up_to_the_context_length(whole_trees: Server, plain_server: Server) -> None:
    """The last tree does not fit any more; its rows past the end must not touch a neighbour's slots."""
    wanted = plain_server.generate(LONG_PROMPT, temperature=0, max_new_tokens=52, ignore_eos=True)
    got = whole_trees.generate(LONG_PROMPT, temperature=0, max_new_tokens=52, ignore_eos=True)
    assert len(LONG_PROMPT) + len(wanted.tokens) >= 382 and got.tokens == wanted.tokens


def test_a_larger_tree_than_there_is_room_for_is_cut(tree_server: Server, policy: Path) -> None:
    tree_server.edit_policy(policy, "version: 1\nschedule: {kind: throughput}\nshape: {kind: tree, max_nodes: 99}\n")
    answer = tree_server.generate(PROMPT, temperature=0, max_new_tokens=16)
    assert len(answer.tokens) == 16
    assert tree_server.log.count("trees of 99 nodes are cut to 32") == 1


def test_mixed_traffic_under_moving_policies(
    tree_server: Server, policy: Path, plain_server: Server, prompts: list[str]
) -> None:
    """`bench.soak` in small: answers are plain decoding's, and nothing leaks. SGLang's own check of KV and request
    slots runs whenever the server is idle, and ends it when one is missing."""
    longest, known = 48, tree_server.report()["reloads"]
    wanted = soak.plain_answers(plain_server, prompts[:6], longest)
    traffic = soak.Traffic(tree_server, prompts[:6], wanted, longest, seed=0)
    tree_server.edit_policy(policy, policy_text("whole trees of 32"))
    with soak.edited(policy, every_s=1.5):
        early, late = soak.run(traffic, requests=40, minutes=None, concurrency=16)
    assert traffic.problems == []
    assert set(traffic.done) == {"dropped", "sampled", *soak.WAYS}
    assert 0 < late < soak.MAY_GROW * early
    reloads = tree_server.report()["reloads"]
    assert all(reloads[outcome] > known[outcome] for outcome in ("accepted", "refused"))
    time.sleep(3)
    tree_server.flush()
    assert tree_server.generate(PROMPT, temperature=0, max_new_tokens=8).tokens
    assert "leak" not in tree_server.log

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

from .conftest import SHARED
from .questions import LONG_PROMPT, PROMPT, SHAPING, chat, shaped, together
from .test_server import expect_logprobs_of_plain_decoding

pytestmark = [pytest.mark.server, pytest.mark.timeout(1200)]

SHAPES = {
    "whole trees of 32": "schedule: {kind: fixed, depth: 64}\nshape: {kind: tree, max_nodes: 32, branch: 4}\n",
    "the best 7 of 32 each": "schedule: {kind: fixed, nodes: 7}\nshape: {kind: tree, max_nodes: 32, branch: 4}\n",
    "what pays": "schedule: {kind: throughput}\nshape: {kind: auto, max_nodes: 32}\n",
    "not below depth 2": "schedule: {kind: threshold, confidence: 0.3}\ndepth: {min: 2}\nshape: {kind: tree}\n",
}


def policy_text(shape: str) -> str:
    return f"version: 1\nname: trees\n{SHAPES[shape]}"


@pytest.fixture(scope="module")
def tree_policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("trees") / "trees.yaml"
    file.write_text(policy_text("whole trees of 32"))
    return file


@pytest.fixture(scope="module")
def tree_server(target: Path, tree_policy: Path) -> Iterator[Server]:
    speculate = ["--speculative-algorithm", "DSPARK_SGL", "--dspark-policy", str(tree_policy)]
    with Server(["--model-path", str(target), *SHARED, *speculate]) as server:
        yield server


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_tokens_are_those_of_plain_decoding(
    tree_server: Server, tree_policy: Path, plain_answers: list[Answer], prompts: list[str], shape: str
) -> None:
    """Six at a time, twice: the second time prompts and answers are in the radix cache, the draft's context too."""
    tree_server.edit_policy(tree_policy, policy_text(shape))
    tree_server.flush()
    for _ in range(2):
        answers = together(tree_server, prompts[::2], temperature=0, max_new_tokens=64)
        assert [a.tokens for a in answers] == [a.tokens for a in plain_answers[::2]]


def test_a_tree_saves_more_rounds_than_a_chain(tree_server: Server, tree_policy: Path, prompts: list[str]) -> None:
    tree_server.edit_policy(tree_policy, policy_text("whole trees of 32"))

    def rounds() -> int:
        answers = together(tree_server, prompts[::2], temperature=0, max_new_tokens=64)
        return sum(answer.meta["spec_verify_ct"] for answer in answers)

    tree = rounds()
    tree_server.edit_policy(tree_policy, "version: 1\nname: chains\nschedule: {kind: fixed, depth: 64}\n")
    assert tree < 0.9 * rounds()


@pytest.fixture
def whole_trees(tree_server: Server, tree_policy: Path) -> Server:
    tree_server.edit_policy(tree_policy, policy_text("whole trees of 32"))
    return tree_server


@pytest.fixture(scope="module")
def tree_shaped(tree_server: Server, tree_policy: Path) -> dict[str, tuple[int, ...]]:
    tree_server.edit_policy(tree_policy, policy_text("whole trees of 32"))
    return shaped(tree_server)


@pytest.mark.parametrize("name", SHAPING)
def test_what_shapes_the_logits_shapes_them_the_same(
    plain_shaped: dict[str, tuple[int, ...]], tree_shaped: dict[str, tuple[int, ...]], name: str
) -> None:
    assert tree_shaped[name] == plain_shaped[name]


def test_unlike_requests_share_a_batch(whole_trees: Server, plain_server: Server, prompts: list[str]) -> None:
    """Penalties (no drafts), a grammar, sampling and a depth limit beside requests that want nothing special."""
    special: list[dict[str, Any]] = [
        {},
        {"frequency_penalty": 0.6},
        {"regex": r"[a-z ]{20,60}\."},
        {"custom_params": {"dspark": {"max_depth": 2}}},
    ]

    def ask(server: Server, sampled: bool) -> Callable[[int], tuple[int, ...]]:
        def one(index: int) -> tuple[int, ...]:
            warm = 1.0 if sampled and index >= 8 else 0.0
            asked = {"temperature": warm, "max_new_tokens": 32, **special[index % 4]}
            return server.generate(prompts[index % 8], **asked).tokens

        return one

    with ThreadPoolExecutor(12) as pool:
        wanted = list(pool.map(ask(plain_server, False), range(8)))
        got = list(pool.map(ask(whole_trees, True), range(12)))
    assert got[:8] == wanted


def test_logprobs_are_those_of_plain_decoding(whole_trees: Server, plain_server: Server) -> None:
    expect_logprobs_of_plain_decoding(whole_trees, plain_server, {})


def test_generation_up_to_the_context_length(whole_trees: Server, plain_server: Server) -> None:
    """The last tree does not fit any more; its rows past the end must not touch a neighbour's slots."""
    wanted = plain_server.generate(LONG_PROMPT, temperature=0, max_new_tokens=52, ignore_eos=True)
    got = whole_trees.generate(LONG_PROMPT, temperature=0, max_new_tokens=52, ignore_eos=True)
    assert len(LONG_PROMPT) + len(wanted.tokens) >= 382 and got.tokens == wanted.tokens


def test_retracted_requests_come_back_as_they_were(
    tree_server: Server, tree_policy: Path, plain_server: Server
) -> None:
    """More requests than the KV pool can hold to their end."""
    tree_server.edit_policy(tree_policy, policy_text("the best 7 of 32 each"))
    asked = [chat(f"Count upwards from {start}.") for start in range(1, 15)]

    def answers(server: Server) -> list[tuple[int, ...]]:
        with ThreadPoolExecutor(len(asked)) as pool:
            sampling = {"temperature": 0, "max_new_tokens": 160, "ignore_eos": True}
            return list(pool.map(lambda prompt: server.generate(prompt, **sampling).tokens, asked))

    assert answers(tree_server) == answers(plain_server)


def test_a_larger_tree_than_there_is_room_for_is_cut(tree_server: Server, tree_policy: Path) -> None:
    tree_server.edit_policy(
        tree_policy, "version: 1\nschedule: {kind: throughput}\nshape: {kind: tree, max_nodes: 99}\n"
    )
    answer = tree_server.generate(PROMPT, temperature=0, max_new_tokens=16)
    assert len(answer.tokens) == 16
    assert tree_server.log.count("trees of 99 nodes are cut to 32") == 1


def test_mixed_traffic_under_moving_policies(
    tree_server: Server, tree_policy: Path, plain_server: Server, prompts: list[str]
) -> None:
    """`bench.soak` in small: answers are plain decoding's, and nothing leaks. SGLang's own check of KV and request
    slots runs whenever the server is idle, and ends it when one is missing."""
    longest, known = 96, tree_server.report()["reloads"]
    wanted = soak.plain_answers(plain_server, prompts[:6], longest)
    traffic = soak.Traffic(tree_server, prompts[:6], wanted, longest, seed=0)
    tree_server.edit_policy(tree_policy, policy_text("whole trees of 32"))
    with soak.edited(tree_policy):
        early, late = soak.run(traffic, requests=80, minutes=None, concurrency=16)
    assert traffic.problems == []
    assert set(traffic.done) == {"dropped", "sampled", *soak.WAYS}
    assert 0 < late < soak.MAY_GROW * early
    reloads = tree_server.report()["reloads"]
    assert all(reloads[outcome] > known[outcome] for outcome in ("accepted", "refused"))
    assert "etract" in tree_server.log, "the KV pool was large enough for everyone; the test proves nothing"
    time.sleep(3)
    tree_server.flush()
    assert tree_server.generate(PROMPT, temperature=0, max_new_tokens=8).tokens
    assert "leak" not in tree_server.log

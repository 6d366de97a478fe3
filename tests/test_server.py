"""A real server with DSpark against the same server without it: same tokens, same behaviour, whatever is asked."""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest

from dspark_sgl.server import Answer, Server, ServerError

from .conftest import seconds_until
from .questions import LONG_PROMPT, PROMPT, SHAPING, chat, expect_logprobs_of_plain_decoding, metric, shaped, together

pytestmark = [pytest.mark.server, pytest.mark.timeout(1200)]


def depth(limit: int) -> dict[str, Any]:
    return {"custom_params": {"dspark": {"max_depth": limit}}}


@pytest.mark.parametrize("limit", [0, 1, 3, 7])
def test_greedy_tokens_are_those_of_plain_decoding(
    spec_server: Server, plain_answers: list[Answer], prompts: list[str], limit: int
) -> None:
    """Eight at a time, at every depth; 0 is plain decoding inside the speculating server."""
    every = 1 if limit == 7 else 2
    before = Counter(spec_server.report()["counts"])
    answers = together(spec_server, prompts[::every], temperature=0, max_new_tokens=64, **depth(limit))
    assert [a.tokens for a in answers] == [a.tokens for a in plain_answers[::every]]
    counts = Counter(spec_server.report()["counts"])
    counts.subtract(before)
    if limit:
        assert min(limit, 4) - 1 < counts["drafted"] / counts["request_rounds"] <= limit
    else:
        assert counts["drafted"] == counts["request_rounds"] == 0


def test_greedy_tokens_alone(spec_server: Server, plain_answers: list[Answer], prompts: list[str]) -> None:
    """They are the same, and speculation saves rounds."""
    answers = [spec_server.generate(prompt, temperature=0, max_new_tokens=64) for prompt in prompts[::3]]
    assert [answer.tokens for answer in answers] == [answer.tokens for answer in plain_answers[::3]]
    assert sum(len(a.tokens) for a in answers) / sum(a.meta["spec_verify_ct"] for a in answers) > 1.3


def test_a_cached_prefix_drafts_as_well_as_a_fresh_one(spec_server: Server) -> None:
    """The context KV of a radix hit was written by another request; it must serve as well as one's own."""
    spec_server.flush()
    first = spec_server.generate(PROMPT, temperature=0, max_new_tokens=48)
    second = spec_server.generate(PROMPT, temperature=0, max_new_tokens=48)
    assert first.meta["cached_tokens"] == 0 and second.meta["cached_tokens"] > 20
    assert second.tokens == first.tokens
    assert second.meta["spec_verify_ct"] == first.meta["spec_verify_ct"]


def test_metrics_add_up_to_what_an_answer_says_of_itself(spec_server: Server) -> None:
    """A request alone on the server, whose every step is a round of the full block."""

    def counters() -> Counter[str]:
        """With what a step adds to; a gauge is not among them."""
        at = {"steps": {"kind": "round"}, "emitted_tokens": {"kind": "round"}}
        names = ["steps", "emitted_tokens", "tokens_saved", "draft_tokens", "survival_predicted", "survival_observed"]
        counts = {name: metric(spec_server, f"{name}_total", **at.get(name, {})) for name in names}
        return Counter(counts | {name: metric(spec_server, f"accepted_length_{name}") for name in ("count", "sum")})

    before, verified = counters(), metric(spec_server, "phase_seconds_total", phase="verify")
    answer = spec_server.generate(PROMPT, temperature=0, max_new_tokens=40)
    rounds, accepted = answer.meta["spec_verify_ct"], answer.meta["spec_correct_drafts_histogram"]
    assert rounds == sum(accepted)
    seconds_until(lambda: counters()["steps"] == before["steps"] + rounds)
    counts = counters()
    counts.subtract(before)
    saved = sum(hits * n for hits, n in enumerate(accepted))
    assert counts["tokens_saved"] == counts["survival_observed"] == saved > 0
    assert counts["emitted_tokens"] == counts["sum"] == saved + rounds and counts["count"] == rounds
    assert counts["draft_tokens"] == 6 * rounds and 0 < counts["survival_predicted"] < 6 * rounds
    assert [metric(spec_server, name) for name in ("depth", "width", "rows")] == [6, 6, 7]
    assert metric(spec_server, "phase_seconds_total", phase="verify") > verified


def test_streaming_brings_what_plain_decoding_writes(spec_server: Server, plain_server: Server) -> None:
    pieces = list(spec_server.stream(PROMPT, temperature=0, max_new_tokens=40))
    whole = plain_server.generate(PROMPT, temperature=0, max_new_tokens=40)
    assert len(pieces) > 3 and pieces[-1].text == whole.text
    assert all(later.text.startswith(earlier.text) for earlier, later in pairwise(pieces))


def test_generation_up_to_the_context_length(spec_server: Server, plain_server: Server) -> None:
    """The last block does not fit any more; its rows past the end must not touch a neighbour's slots."""
    wanted = plain_server.generate(LONG_PROMPT, temperature=0, max_new_tokens=52, ignore_eos=True)
    got = spec_server.generate(LONG_PROMPT, temperature=0, max_new_tokens=52, ignore_eos=True)
    assert len(LONG_PROMPT) + len(wanted.tokens) >= 382 and got.tokens == wanted.tokens


@pytest.mark.parametrize("count", [1, 2, 3, 5, 9, 17])
def test_max_new_tokens_inside_a_block(spec_server: Server, plain_server: Server, count: int) -> None:
    wanted = plain_server.generate(PROMPT, temperature=0, max_new_tokens=count)
    got = spec_server.generate(PROMPT, temperature=0, max_new_tokens=count)
    assert got.tokens == wanted.tokens and len(got.tokens) == count


def test_stops_inside_a_block(spec_server: Server, plain_server: Server) -> None:
    whole = plain_server.generate(PROMPT, temperature=0, max_new_tokens=40)
    for stop in (
        {"stop": whole.text[30:36]},
        {"stop_token_ids": [whole.tokens[14]]},
        {"stop_regex": re.escape(whole.text[20:24])},
    ):
        wanted = plain_server.generate(PROMPT, temperature=0, max_new_tokens=40, **stop)
        got = spec_server.generate(PROMPT, temperature=0, max_new_tokens=40, **stop)
        assert (got.text, got.meta["finish_reason"]) == (wanted.text, wanted.meta["finish_reason"])


@pytest.fixture(scope="module")
def spec_shaped(spec_server: Server) -> dict[str, tuple[int, ...]]:
    return shaped(spec_server)


@pytest.mark.parametrize("name", SHAPING)
def test_what_shapes_the_logits_shapes_them_the_same(
    plain_shaped: dict[str, tuple[int, ...]], spec_shaped: dict[str, tuple[int, ...]], name: str
) -> None:
    assert spec_shaped[name] == plain_shaped[name]
    assert plain_shaped[name] != plain_shaped["nothing"] or name == "nothing", "what is asked for makes a difference"


@pytest.mark.parametrize("limit", [0, 7])
def test_logprobs_are_those_of_plain_decoding(spec_server: Server, plain_server: Server, limit: int) -> None:
    expect_logprobs_of_plain_decoding(spec_server, plain_server, depth(limit))


def test_several_samples_of_one_prompt(spec_server: Server) -> None:
    answers = spec_server.post(
        "/generate",
        {"text": PROMPT, "sampling_params": {"n": 4, "temperature": 1.0, "max_new_tokens": 24}},
    )
    assert len(answers) == 4 and len({answer["text"] for answer in answers}) > 1


def test_one_kept_token_is_the_greedy_one(spec_server: Server, plain_server: Server) -> None:
    answer = spec_server.generate(PROMPT, temperature=0.8, max_new_tokens=32, top_k=1)
    assert answer.tokens == plain_server.generate(PROMPT, temperature=0, max_new_tokens=32).tokens


def test_the_openai_endpoint(spec_server: Server, plain_server: Server) -> None:
    def content(server: Server, **limits: Any) -> str:
        body = {"model": "default", "messages": [{"role": "user", "content": "Say hello."}]}
        limits = {"temperature": 0, "max_tokens": 16, **limits}
        return str(server.post("/v1/chat/completions", body | limits)["choices"][0]["message"]["content"])

    limits = {"max_depth": 3, "tier": "interactive"}
    assert content(spec_server, custom_params={"dspark": limits}) == content(plain_server) != ""
    with pytest.raises(ServerError, match="^400.*max_depth must be a whole number"):
        content(spec_server, **depth(-1))


def test_a_frontend_program(spec_server: Server, plain_server: Server) -> None:
    import sglang as sgl

    @sgl.function
    def program(s: Any, topic: str) -> None:
        s += chat(f"Name two facts about {topic}.")
        forks = s.fork(2)
        for number, fork in enumerate(forks):
            fork += f"Fact {number + 1}: " + sgl.gen("fact", max_tokens=12, temperature=0)
        s += "The answer is " + sgl.select("choice", choices=["yes", "no"]) + ". "
        s += sgl.gen("rest", max_tokens=8, temperature=0) + forks[0]["fact"]

    servers = (spec_server, plain_server)
    states = [program.run(topic="the sea", backend=sgl.RuntimeEndpoint(server.url)) for server in servers]
    got, wanted = [(state.text(), state["choice"], state["rest"]) for state in states]
    assert got == wanted and wanted[2]


@pytest.mark.parametrize(
    ("params", "reason"),
    [
        ({"custom_params": {"dspark": {"max_depth": -1}}}, "max_depth must be a whole number"),
        ({"custom_params": {"dspark": {"max_depht": 1}}}, "did you mean"),
        ({"custom_params": {"dspark": {"tier": ["x"]}}}, "tier must be text"),
    ],
)
def test_a_wrong_request_is_a_400_with_a_reason(spec_server: Server, params: dict[str, Any], reason: str) -> None:
    with pytest.raises(ServerError, match=reason) as error:
        spec_server.generate(PROMPT, max_new_tokens=4, **params)
    assert str(error.value).startswith("400")

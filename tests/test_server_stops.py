"""Answers and sessions end on a real server where plain decoding's do, wherever in a round that is."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dspark_sgl.server import Server, ServerError

from .questions import PROMPT

pytestmark = [pytest.mark.server, pytest.mark.timeout(1200)]


def test_a_stop_string_behind_a_stop_token_is_never_seen(spec_server: Server, plain_server: Server) -> None:
    """Both may be in one accepted run. Whatever follows the token, plain decoding never wrote it."""
    written = plain_server.generate(PROMPT, temperature=0, max_new_tokens=40).tokens
    lone = [i for i, token in enumerate(written[:-1]) if token not in written[:i]]
    for i in lone[::3]:
        after = plain_server.post("/detokenize", {"model": "default", "tokens": [written[i + 1]]})["text"]
        how = {"temperature": 0, "max_new_tokens": 40, "stop_token_ids": [written[i]], "stop": [after]}
        answers = [server.generate(PROMPT, **how) for server in (spec_server, plain_server)]
        got, wanted = [(a.text, a.tokens, a.meta["finish_reason"], a.meta["completion_tokens"]) for a in answers]
        assert got == wanted


@pytest.mark.parametrize("stop", ["string", "token", "length"])
def test_a_session_goes_on_from_where_it_stopped(spec_server: Server, plain_server: Server, stop: str) -> None:
    whole = plain_server.generate(PROMPT, temperature=0, max_new_tokens=40)
    how: dict[str, Any] = {
        "string": {"max_new_tokens": 40, "stop": [whole.text[30:36]]},
        "token": {"max_new_tokens": 40, "stop_token_ids": [whole.tokens[14]]},
        "length": {"max_new_tokens": 14},
    }[stop]
    turns = [two_turns(server, how) for server in (spec_server, plain_server)]
    assert turns[0] == turns[1]


def two_turns(server: Server, how: dict[str, Any]) -> list[tuple[str, int]]:
    """Texts, and how long the prompts were that the server made of both turns."""
    session = json.loads(server.post("/open_session", {"capacity_of_str_len": 1000}))
    said, rid = [], None
    for text in (PROMPT, " And then?"):
        turn = {"id": session, "rid": rid}
        body = {"text": text, "session_params": turn, "sampling_params": {"temperature": 0, **how}}
        answer = server.post("/generate", body)
        rid = answer["meta_info"]["id"]
        said.append((answer["text"], answer["meta_info"]["prompt_tokens"]))
    server.post("/close_session", {"session_id": session})
    return said


@pytest.mark.parametrize(
    "asked", [{"return_hidden_states": True}, {"token_indices_to_pool": [1]}, {"return_routed_experts": True}]
)
def test_what_a_round_does_not_keep_is_refused(spec_server: Server, asked: dict[str, Any]) -> None:
    with pytest.raises(ServerError, match=f"400.*{next(iter(asked))}"):
        spec_server.post("/generate", {"text": PROMPT, "sampling_params": {"max_new_tokens": 4}, **asked})

"""Where an accepted run ends: with the token at which plain decoding would have stopped.

A round may accept more than that. SGLang hides what comes after a stop, and yet looks for stop strings in it, counts it
as reasoning and, in a session, goes on from it. Never looks for stop strings itself.
"""

from __future__ import annotations

from itertools import chain
from typing import Any


def until_stop(request: Any, run: list[int]) -> list[int]:
    """Of tokens that a round accepted for an unfinished SGLang request, those that it may emit."""
    params = request.sampling_params
    run = run[: params.max_new_tokens - len(request.output_ids)]
    if params.ignore_eos:
        return run
    tokenizer = request.tokenizer
    ends = set(chain(params.stop_token_ids or (), request.eos_token_ids or ()))
    if tokenizer is not None:
        ends.update((tokenizer.eos_token_id, *(tokenizer.additional_stop_token_ids or ())))
    return run[: next((i + 1 for i, token in enumerate(run) if token in ends), len(run))]


def cut_runs(runs: list[list[int]], requests: list[Any]) -> list[list[int]]:
    """`until_stop` of every request that is still running; the KV that SGLang holds committed for it follows."""
    cut = []
    for request, run in zip(requests, runs, strict=True):
        kept = run if request.finished() or request.is_retracted else until_stop(request, run)
        request.kv.kv_committed_len -= len(run) - len(kept)
        cut.append(kept)
    return cut


def trim_turn(session: Any, rid: str | None) -> None:
    """Before a session goes on from its request `rid`: what that one wrote ends where it stopped, at a string too."""
    node = session.req_nodes.get(rid)
    if node is not None and node.req.finished():
        node.req.output_ids = node.req.output_ids_through_stop

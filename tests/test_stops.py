"""Where an answer ends: a round may accept more than plain decoding would have written."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from dspark_sgl.stops import cut_runs, until_stop


def request(**changes: Any) -> SimpleNamespace:
    """A running request of SGLang's, as far as a run's end depends on it."""
    params = {"max_new_tokens": 10, "ignore_eos": False, "stop_token_ids": {7}} | changes
    return SimpleNamespace(
        sampling_params=SimpleNamespace(**params),
        output_ids=[1, 2, 3],
        eos_token_ids={0},
        tokenizer=SimpleNamespace(eos_token_id=5, additional_stop_token_ids=[6]),
        kv=SimpleNamespace(kv_committed_len=20),
        is_retracted=False,
        finished=lambda: False,
    )


@pytest.mark.parametrize("end", [0, 5, 6, 7])
def test_a_run_ends_with_the_first_token_that_stops(end: int) -> None:
    assert until_stop(request(), [8, end, 9, 5]) == [8, end]
    assert until_stop(request(ignore_eos=True), [8, end, 9, 5]) == [8, end, 9, 5]


def test_a_run_is_no_longer_than_a_request_may_write() -> None:
    assert until_stop(request(max_new_tokens=5), [8, 9, 8, 5]) == [8, 9]
    assert until_stop(request(stop_token_ids=None), [8, 7]) == [8, 7]


def test_kv_behind_the_end_is_not_committed() -> None:
    """Of requests that still run; what ended before is left as it is."""
    running, ended = request(), request()
    ended.finished = lambda: True
    assert cut_runs([[8, 7, 9], [8, 7, 9]], [running, ended]) == [[8, 7], [8, 7, 9]]
    assert (running.kv.kv_committed_len, ended.kv.kv_committed_len) == (19, 20)

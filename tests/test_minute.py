"""The log line of a minute: full after sixty seconds of decoding, and every figure in it what the steps were."""

from __future__ import annotations

from dspark_sgl.clock import PLAIN, ROUND
from dspark_sgl.load import Step
from dspark_sgl.minute import LENGTH_S, Minute

VERIFY = Step(kind=ROUND, requests=4, rows=13, context=400, offered=9, speculating=3, emitted=8, gained=7, depth=4)
DECODE = Step(kind=PLAIN, requests=2, rows=2, context=200, offered=0, speculating=0, emitted=2, gained=0, depth=0)


def test_the_figures_are_those_of_the_steps() -> None:
    minute = Minute()
    for _ in range(3):
        minute.add(VERIFY, 15.0, 10.0)
    assert not minute.is_full
    minute.add(DECODE, LENGTH_S - 45.0, None)
    assert minute.is_full
    assert minute.line == (
        "26 tokens in 60 s of decoding; 0.4 a second, 0.1 for each of 3.5 requests; 4 steps, 25% plain; depth 1.93; "
        "length 2.33, 44% of drafts accepted; steps took 1.50 of the expected time"
    )


def test_a_server_that_never_drafts_has_no_length() -> None:
    minute = Minute()
    minute.add(DECODE, 60.0, None)
    assert minute.line == (
        "2 tokens in 60 s of decoding; 0.0 a second, 0.0 for each of 2.0 requests; 1 steps, 100% plain; depth 0.00"
    )

"""What becomes of a step's plan: learned from at its end, or, where the scheduler overlaps, while the next one runs."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dspark_sgl.clock import PLAIN, PREFILL, ROUND
from dspark_sgl.kernels.layout import chain_layout
from dspark_sgl.kernels.staging import Fetched
from dspark_sgl.plan import Plan
from dspark_sgl.seen import Seen
from dspark_sgl.spec_algos.protocol import Proposal
from dspark_sgl.steps import Steps

DEPTH, LENGTH = 3, 9


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside a server SGLang does not know how many there are."""
    monkeypatch.setattr("dspark_sgl.steps.agree", lambda decision: decision)


class Request:
    """As far as the book reads one."""

    def __init__(self, name: str) -> None:
        self.rid, self.origin_input_ids, self.output_ids = name, [0] * LENGTH, [1]
        self.ended = self.is_retracted = False
        self.grammar = None
        self.sampling_params = SimpleNamespace(
            custom_params=None,
            top_k=1,
            temperature=0.0,
            frequency_penalty=0.0,
            presence_penalty=0.0,
            repetition_penalty=1.0,
            min_new_tokens=0,
        )

    def finished(self) -> bool:
        return self.ended


class Governor:
    """Plans chains of one depth and writes down what it is asked and told, by the number of the plan."""

    def __init__(self, settled: bool) -> None:
        self.settled, self.said = settled, list[str]()
        self._plans = 0

    def plan(self, loads: Any) -> Any:
        self._plans += 1
        self.said.append(f"plan {self._plans}")
        plan = Plan([0 if load.max_depth == 0 else DEPTH for load in loads], "match", None, self.settled)
        return SimpleNamespace(number=self._plans, plan=plan)

    def started(self, record: Any) -> None:
        self.said.append(f"start {record.number}")

    def select(self, record: Any, *_: Any) -> Any:
        self.said.append(f"select {record.number}")
        return (torch.arange(DEPTH) < DEPTH).expand(len(record.plan.depths), DEPTH).numpy()

    def learn(self, record: Any, path: Any) -> None:
        self.said.append(f"learn {record.number}")
        self.live = record.live.tolist()

    def timed(self, record: Any, seconds: float) -> None:
        assert seconds > 0
        self.said.append(f"timed {record.number}")

    def publish(self, record: Any, phases: Any) -> None:
        self.said.append(f"publish {record.number}")


def batch_of(*requests: Request, seed: bool = False, processor: bool = False) -> Any:
    info = SimpleNamespace(has_custom_logit_processor=processor, sampling_seed=[1] if seed else None)
    lens = torch.full((len(requests),), LENGTH)
    return SimpleNamespace(reqs=list(requests), sampling_info=info, seq_lens_cpu=lens, after_idle_gap=False)


def step(steps: Steps, governor: Governor, batch: Any, kind: str = ROUND) -> list[str]:
    """One step through the worker's calls; what the governor heard of it."""
    governor.said.clear()
    steps.begin(batch)
    if kind != PREFILL:
        plan = steps.plan(batch)
        if max(plan.depths) == 0:
            kind = PLAIN
        else:
            tokens = torch.zeros(len(batch.reqs), DEPTH, dtype=torch.int64)
            seen = Seen(Proposal(tokens))
            if not plan.settled:
                steps.select(seen)
            governor.said.append("asked")
            layout = chain_layout(tokens[:, 0], tokens, plan.depths)
            steps.enqueued(layout, seen, Fetched(torch.tensor([[0, 1, -1, -1]] * len(batch.reqs))))
    steps.end(kind, batch)
    return list(governor.said)


def steps_of(ahead: bool, settled: bool, seeds: bool = False) -> tuple[Steps, Governor]:
    steps, governor = Steps(ahead, "cpu", seeds), Governor(settled)
    steps.governor = governor  # type: ignore[assignment]
    return steps, governor


def test_in_step_with_the_scheduler() -> None:
    steps, governor = steps_of(ahead=False, settled=False)
    batch = batch_of(Request("a"), Request("b"))
    assert step(steps, governor, batch) == ["plan 1", "start 1", "select 1", "asked", "learn 1", "publish 1"]
    assert step(steps, governor, batch) == ["timed 1", "plan 2", "start 2", "select 2", "asked", "learn 2", "publish 2"]
    assert step(steps, governor, batch, PREFILL) == ["timed 2"]
    assert steps.clock.report()["accepted_length"] == 2


def test_ahead_of_what_the_last_step_brought() -> None:
    steps, governor = steps_of(ahead=True, settled=True)
    batch = batch_of(Request("a"), Request("b"))
    assert step(steps, governor, batch) == ["plan 1", "start 1", "asked", "plan 2"]
    # A settled plan's drafts are looked at when they are learned from.
    assert step(steps, governor, batch) == ["start 2", "asked", "select 1", "learn 1", "publish 1", "timed 1", "plan 3"]
    assert step(steps, governor, batch, PREFILL) == ["select 2", "learn 2", "publish 2", "timed 2"]


@pytest.mark.parametrize("plainly", [{}, {"seed": True}, {"processor": True}], ids=["nothing", "seed", "processor"])
def test_another_batch_is_planned_anew(plainly: dict[str, bool]) -> None:
    """A seed promises plain decoding's tokens, and what a processor of the request's own does nobody knows."""
    steps, governor = steps_of(ahead=True, settled=True)
    request = Request("a")
    step(steps, governor, batch_of(request))
    other = batch_of(request, **plainly) if plainly else batch_of(request, Request("b"))
    said = step(steps, governor, other)
    assert said[:2] == ["plan 3", "start 3"] and "start 2" not in said
    assert ("asked" in said) != bool(plainly)


def test_a_seed_is_speculated_where_a_round_draws_what_a_plain_step_would() -> None:
    steps, governor = steps_of(ahead=False, settled=False, seeds=True)
    assert "asked" in step(steps, governor, batch_of(Request("a"), seed=True))
    assert "asked" not in step(steps, governor, batch_of(Request("a"), seed=True, processor=True))


def test_a_request_that_had_ended_teaches_nothing() -> None:
    """The scheduler read its end when it was in the next round already. One that ends with a round has a part in it,
    and where the scheduler reads that at once (a grammar makes it wait) it looks ended as well."""
    steps, governor = steps_of(ahead=True, settled=True)
    one, other = Request("a"), Request("b")
    step(steps, governor, batch_of(one, other))
    one.ended, one.output_ids = True, [1, 2, 3]
    step(steps, governor, batch_of(one, other))
    assert governor.live == [True, True]
    one.output_ids = [1]
    step(steps, governor, batch_of(other))
    assert governor.live == [False, True]
    other.is_retracted = True
    step(steps, governor, batch_of(Request("c")))
    assert governor.live == [False]
    assert steps.clock.report()["counts"]["request_rounds"] == 3  # type: ignore[index]


class Moment:
    """A `Mark` that passes when the test says."""

    coming: Iterator[float] = iter(())

    def __init__(self, _device: object) -> None:
        self.at = next(Moment.coming)

    def since(self, earlier: Moment) -> float:
        return self.at - earlier.at


def test_steps_that_overlap_are_timed_by_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the end of the step before to its own; from its beginning where the device had been idle."""
    monkeypatch.setattr("dspark_sgl.steps.Mark", Moment)
    Moment.coming = iter([100.0, 107.0, 112.0, 119.0, 500.0, 507.0, 514.0])
    steps, governor = steps_of(ahead=True, settled=True)
    times: list[tuple[int, float]] = []
    monkeypatch.setattr(governor, "timed", lambda record, seconds: times.append((record.number, seconds)))
    request = Request("a")
    for batch in (batch_of(request), batch_of(request, seed=True), batch_of(request)):  # a round, a plain step, a round
        step(steps, governor, batch)
    idle = batch_of(request)
    idle.after_idle_gap = True
    step(steps, governor, idle)
    step(steps, governor, batch_of(request))
    assert [seconds for _, seconds in times] == [7.0, 5.0, 7.0, 7.0]

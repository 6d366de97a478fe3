"""A server that does not exist, step by step: a policy under a workload, on a machine whose costs are known.

Discrete events, one per engine step: a prefill of whatever was admitted, or a decode step of the running batch, planned
by the real rule book and the real scheduler. What is simulated is the machine (`CostModel`, `Machine`) and luck: each
request's drafts are accepted by its own chances, drawn from a seed. The same seed gives the same run.

Assumes calibrated confidence: a scheduler is told the true chances, not each draft's own; a tree is the one expected of
such chances, at a chain's price of drafting. Never imports an engine.
"""

import math
from bisect import bisect_right
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from .batch import Batch, Bools, Floats, Scheduler, nodes_depth
from .cost import CostModel
from .expected_round import ExpectedRound, ExpectedRounds
from .expected_tree import path_chances
from .language import DEFAULT_TIER, Policy, Schedule
from .rules import Active, RuleBook
from .scheduler import make_scheduler
from .shape import most_nodes
from .signals import RequestSignals, Snapshot
from .timeline import Timeline
from .workload import Workload

CONTEXT_LEVEL = math.log(1.02)
"""A decision holds while the context grows by so little: what a step takes is not known better."""
MOST_KNOWN = 100_000
REFRESH = 8
"""Steps for which the limits of a batch that does not change are kept, where rules read requests."""


@dataclass(frozen=True)
class Machine:
    """What a server has besides the price of its decode steps.

    cost: of plain steps and rounds; prefill_s, prefill_token_s: seconds of a prefill, and of each of its tokens
    kv_tokens: slots of the KV pool; max_running: requests at once; block: the drafter's deepest path
    believed: what schedulers take steps to cost, where that is not the truth
    """

    cost: CostModel
    block: int
    prefill_s: float
    prefill_token_s: float
    kv_tokens: int
    max_running: int
    believed: CostModel | None = None


@dataclass(frozen=True)
class Result:
    """What a run came to. Speeds in tokens per second; user_tps: mean over requests of output / time to write it

    seconds: simulated; depth: draft tokens verified per request and step; plain_share: of decode steps
    accepted_length: tokens per request and verify round, bonus included; ttft_s: median seconds to the first token
    timeline: float64 `[T, 4]`: end of a stretch in seconds, depth, requests running, output tokens per second
    """

    requests: int
    seconds: float
    steps: int
    output_tps: float
    user_tps: float
    depth: float
    plain_share: float
    accepted_length: float
    ttft_s: float
    timeline: Floats = field(repr=False)


def simulate(policy: Policy, workload: Workload, machine: Machine, seed: int = 0) -> Result:
    """Serve the whole workload."""
    return _Run(policy, workload, machine, seed).result()


@dataclass(frozen=True)
class _Decision:
    """One way to run a step; that of a round is kept while nothing that it depends on has changed.

    chances: float64 `[n, D]`, that paths of 1, 2, .. verified drafts are accepted, or None for a plain step
    """

    chances: Floats | None
    seconds: float
    nodes: int
    spoken: Bools


REQUEST, CONTEXT, LEFT, ROUNDS, GAINED = range(5)
"""Rows of the running batch: which request, its KV tokens, tokens to go, its verify rounds and what they emitted."""


class _Run:
    """The state of one simulation. `_batch`: int64 `[5, n]`, the running requests, sorted by kind."""

    def __init__(self, policy: Policy, workload: Workload, machine: Machine, seed: int) -> None:
        self._policy, self._work, self._machine = policy, workload, machine
        self._rules = RuleBook(policy, machine.block)
        self._schedulers: dict[Schedule, Scheduler] = {}
        self._known: dict[tuple[object, ...], _Decision] = {}
        self._dice = np.random.default_rng([seed, 2])
        self._luck, self._used = np.empty(0), 0
        self._survival = np.ascontiguousarray(workload.survival[:, : machine.block])
        self._rounds = ExpectedRounds(self._survival, workload.side, machine.block, most_nodes(policy))
        self._batch = np.empty((5, 0), np.int64)
        self._limits, self._limits_age = np.empty((0, 3)), REFRESH
        self._limits_of: Active | None = None
        self._now, self._next, self._steps = 0.0, 0, 0
        self._first, self._last = np.zeros((2, workload.size))
        self._asked = workload.arrival.astype(np.float64).copy()
        # When the next question of each user who waits for nothing reaches the scheduler; rising.
        self._free = deque(workload.pause * place for place in range(workload.users or 0))
        self._totals = np.zeros(6)  # decode steps, plain steps, nodes, requests, speculating requests, their tokens
        self._pace = {"step.ms": 0.0, "tps.total": 0.0, "tps.user": 0.0, "batch.tokens": 0.0}
        self._timeline = Timeline()

    def result(self) -> Result:
        work = self._work
        while self._next < work.size or self._batch.shape[1]:
            if self._admit():
                continue
            if self._batch.shape[1]:
                self._decode()
            else:
                self._now = max(self._now, self._free[0] if work.users else float(work.arrival[self._next]))
        wrote = (work.output - 1)[work.output > 1] / (self._last - self._first)[work.output > 1]
        steps, plain, nodes, requests, speculating, gained = self._totals.tolist()
        return Result(
            requests=work.size,
            seconds=self._now,
            steps=self._steps,
            output_tps=float(work.output.sum()) / self._now,
            user_tps=float(wrote.mean()) if len(wrote) else math.nan,
            depth=nodes / requests if requests else 0.0,
            plain_share=plain / steps if steps else 0.0,
            accepted_length=gained / speculating if speculating else 1.0,
            ttft_s=float(np.median(self._first - self._asked)),
            timeline=self._timeline.rows(),
        )

    # -- One step ----------------------------------------------------------------------------------------------------

    def _admit(self) -> bool:
        """Prefill whoever has arrived and fits; False when nobody does."""
        work, machine, running = self._work, self._machine, self._batch.shape[1]
        room = min(machine.max_running - running, self._waiting())
        if room <= 0:
            return False
        free = machine.kv_tokens - int(self._batch[CONTEXT].sum())
        first = end = self._next
        while end - first < room:
            need = int(work.prompt[end] + work.output[end])
            # One that is alone is let in, however long: it would wait for ever.
            if need > free and (end > first or running):
                break
            free, end = free - need, end + 1
        if end == first:
            return False
        if work.users:
            self._asked[first:end] = [self._free.popleft() for _ in range(end - first)]
        self._now += machine.prefill_s + machine.prefill_token_s * int(work.prompt[first:end].sum())
        self._first[first:end] = self._last[first:end] = self._now
        self._steps, self._next = self._steps + 1, end
        new = np.arange(first, end)[work.output[first:end] > 1]  # prefill gives the first token, to some the only one
        nothing = np.zeros_like(new)
        joined = np.stack([new, work.prompt[new], work.output[new] - 1, nothing, nothing])
        batch = np.concatenate([self._batch, joined], axis=1)
        self._batch = batch[:, np.argsort(work.kind[batch[REQUEST]], kind="stable")]
        self._limits_age = REFRESH
        self._answered(end - first - len(new))
        return True

    def _waiting(self) -> int:
        """Requests that have come and have not been admitted."""
        work = self._work
        if work.users:
            return min(bisect_right(self._free, self._now), work.size - self._next)
        return int(np.searchsorted(work.arrival, self._now, side="right")) - self._next

    def _decode(self) -> None:
        batch, n = self._batch, self._batch.shape[1]
        decision = self._decide()
        spoken, gained = 0, 0
        if decision.chances is None:
            emitted = np.ones(n, np.int64)
        else:
            emitted = 1 + (self._random(n)[:, None] < decision.chances).sum(1)
            spoken, gained = int(decision.spoken.sum()), int(emitted[decision.spoken].sum())
            batch[ROUNDS] += decision.spoken
            batch[GAINED] += emitted * decision.spoken
            emitted = np.minimum(emitted, batch[LEFT])
        batch[CONTEXT] += emitted
        batch[LEFT] -= emitted
        wrote = int(emitted.sum())
        self._now += decision.seconds
        self._steps += 1
        self._totals += (1, decision.chances is None, decision.nodes, n, spoken, gained)
        self._timeline.add(decision.seconds, decision.nodes, n, wrote)
        self._pace = {
            "step.ms": 1e3 * decision.seconds,
            "tps.total": wrote / decision.seconds,
            "tps.user": wrote / n / decision.seconds,
            "batch.tokens": n + decision.nodes,
        }
        going = batch[LEFT] > 0
        if not going.all():
            self._last[batch[REQUEST][~going]] = self._now
            self._answered(int((~going).sum()))
            self._batch = batch[:, going]
            self._limits_age = REFRESH

    def _answered(self, count: int) -> None:
        """So many requests have ended now, and whoever asked them asks again, one after the other."""
        for _ in range(count if self._work.users else 0):
            free = max(self._now, self._free[-1]) if self._free else self._now
            self._free.append(free + self._work.pause)

    def _random(self, count: int) -> Floats:
        """So many uniform numbers; drawn in bulk, which is what makes them cheap."""
        if self._used + count > len(self._luck):
            self._luck, self._used = self._dice.random(max(count, 1 << 16)), 0
        self._used += count
        return self._luck[self._used - count : self._used]

    # -- What the server's governor would decide ---------------------------------------------------------------------

    def _decide(self) -> _Decision:
        n, context = self._batch.shape[1], int(self._batch[CONTEXT].sum())
        snapshot = self._snapshot(n, context)
        active = self._rules.batch(snapshot)
        limits = self._limits_now(active, snapshot)
        kinds = self._work.kind[self._batch[REQUEST]]
        scheduler = self._scheduler(active.schedule)
        bounds = limits.astype(np.int64)
        batch = Batch(bounds[:, 0], bounds[:, 1], limits[:, 2], context, snapshot.values)
        # Asked every time: a scheduler counts steps to know when to try the other kind.
        planned = self._rounds.plan(scheduler, batch, active.shape, kinds)
        scheduler.started()
        if planned.plain:
            return _Decision(None, self._machine.cost.plain_seconds(n, context), 0, np.zeros(n, np.bool_))
        level = int(math.log(max(context, 1)) / CONTEXT_LEVEL)
        key = (active.schedule, planned.tree, planned.drafted.tobytes(), level, limits.tobytes(), kinds.tobytes())
        known = self._known.get(key)
        if known is None:
            if len(self._known) >= MOST_KNOWN:
                self._known.clear()
            known = self._known[key] = self._choose(scheduler, batch, planned)
        if known.spoken.any():
            self._rounds.learn(known.nodes / int(known.spoken.sum()))
        return known

    def _choose(self, scheduler: Scheduler, batch: Batch, planned: ExpectedRound) -> _Decision:
        at = nodes_depth(planned.survival, planned.depth)
        kept = planned.select(scheduler, batch)
        nodes = int(kept.sum())
        rows = np.array([batch.size + nodes])
        seconds = self._machine.cost.round_seconds(batch.size, rows, batch.context, int(planned.drafted.max()))
        chances = path_chances(planned.survival, at, kept, self._survival.shape[1])
        return _Decision(chances, float(seconds[0]), nodes, kept.sum(1) > 0)

    def _scheduler(self, schedule: Schedule) -> Scheduler:
        if schedule not in self._schedulers:
            believed, margin = self._machine.believed or self._machine.cost, self._policy.cost.margin
            self._schedulers[schedule] = make_scheduler(schedule, believed, margin, "early_stop")
        return self._schedulers[schedule]

    def _limits_now(self, active: Active, snapshot: Snapshot) -> Floats:
        """float64 `[n, 3]`: least and greatest depth and weight of each request. Rules about requests are asked for the
        whole batch when it changes, else every few steps."""
        n = self._batch.shape[1]
        if self._limits_age >= REFRESH or active is not self._limits_of:
            requests = self._requests() if self._rules.per_request else [_signals(0, 0, 0, 0)]
            found = [self._rules.request(active, snapshot, request) for request in requests]
            rows = np.array([(limit.min_depth, limit.max_depth, limit.weight) for limit in found])
            self._limits, self._limits_age, self._limits_of = np.broadcast_to(rows, (n, 3)), 0, active
        self._limits_age += self._rules.per_request
        return self._limits

    def _requests(self) -> list[RequestSignals]:
        """What rules can know about each of the batch."""
        which, context, left, rounds, gained = self._batch
        written = self._work.output[which] - left
        return [_signals(*row) for row in np.stack([context, written, rounds, gained], axis=1).tolist()]

    def _snapshot(self, n: int, context: int) -> Snapshot:
        values = {
            **self._pace,
            "batch.size": n,
            "context.mean": context / n,
            "context.max": int(self._batch[CONTEXT].max()),
            "kv.usage": context / self._machine.kv_tokens,
            "queue.length": self._waiting(),
        }
        return Snapshot(values)


def _signals(context: int, written: int, rounds: int, gained: int) -> RequestSignals:
    return RequestSignals(DEFAULT_TIER, context, written, gained / rounds if rounds else math.nan, 1.0)

"""The schedules that weigh: `throughput` (the paper's Algorithm 1) and `slo`. Both price a round before they buy it.

With survival a of the drafts and weights w of the requests, a round that verifies the set S is worth

    Theta(S) = (sum_r w_r + sum_{i in S} w_i a_i) / seconds(n + |S|)

tokens per second. Drafts enter in falling order of w a, so a set is a prefix of that order and closed under parents.
What stops the search decides whether rejection sampling stays unbiased, see `causality.py`:

    early_stop   at the first draft that does not raise Theta: nothing behind it, which may have read it, was looked at
    lagged       a budget from the round before last; this round's best drafts fill it
    global       the best prefix of all; for match and for temperature 0 only

How deep to draft is weighed before anything is drafted, and plain decoding with it, since drafting itself is what a
shallow round saves: the depth whose best round, as history predicts it, is worth most. `turns.py` says when the other
kind is tried. A round among plain steps verifies at least one draft of each request, whatever that is expected to
bring.

Early stop finds that best round only if Theta rises up to it. What rows take has steps, behind which Theta falls and
rises again. Where history predicts such a fall on the way, its best number of drafts is a budget settled before
anything is drafted: this round's best drafts fill it, nothing drawn is looked at, and early stop begins behind it. A
promise to the slowest user (`slo`) has such a budget always, and no more: nothing improves until everybody has one more
draft.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from .batch import Batch, Bools, Floats, Ints, clipped, nodes_depth, required
from .cost import CostModel
from .turns import Turn

UNMEASURED_DEPTHS = (0, 0, 0, 1, 1, 1, 2, 2, 2)
"""In turn, while a cost model has no points: cheap, and steps of each kind become its points."""
SETTLED = 7
"""Once rounds pay, so many more are taken unasked while batch and drafts keep their kind; a plain step always asks."""
FREE = 1e-3
"""Drafting one deeper is for nothing where it takes less than this share of a plain step."""
WORTH_A_LOOK = 0.05
"""The share of a round that verifying none of its drafts has to save. Where all of them take less than that, as in a
small batch on a GPU, choosing among them saves less than a GPU loses that waits for the choice."""


@dataclass(frozen=True)
class _Planned:
    """A step as decided. deep: how deep the best round drafts; budget: how many drafts it verifies at least

    settled: rounds for which this goes on holding for such a batch; unmeasured: steps so far that had no price
    """

    turn: Turn = field(default_factory=Turn)
    deep: int = 0
    budget: int = 0
    settled: int = 0
    settled_for: tuple[int, bool] = (0, False)
    unmeasured: int = 0


class ValueScheduler:
    """`speed`: tokens per second promised to every user (`slo`), or None (`throughput`)."""

    def __init__(self, cost: CostModel, margin: float, causality: str, speed: float | None) -> None:
        self._cost, self._margin, self._causality, self._speed = cost, margin, causality, speed
        self._run = self._planned = _Planned()
        self._budgets: list[float] = []

    def draft_depths(self, batch: Batch, expected: Floats, depth: Ints | None = None) -> Ints:
        """As deep as pays, or a plain step where no drafting is expected to."""
        self._planned = self._run
        if not batch.max_depth.any():
            return np.zeros_like(batch.max_depth)  # whatever pays: nothing is waited for, or tried
        if not self._cost.ready:
            at = self._run.unmeasured
            self._planned = replace(self._run, unmeasured=at + 1)
            return clipped(UNMEASURED_DEPTHS[at % len(UNMEASURED_DEPTHS)], batch)
        self._planned = self._after(self._run, batch, expected, depth)
        return clipped(self._planned.deep if self._planned.turn.is_round else 0, batch)

    def started(self) -> bool:
        self._run = self._planned
        return self._run.turn.is_probe

    def _after(self, run: _Planned, batch: Batch, expected: Floats, depth: Ints | None) -> _Planned:
        what = (batch.size, depth is None)
        if run.settled > 0 and run.settled_for == what:
            turn = replace(run.turn, waited=run.turn.waited + 1)
            return replace(run, settled=run.settled - 1, turn=turn)
        seconds = np.array([self._cost.plain_seconds(batch.size, batch.context)])
        plain = float(self._score(batch.weight.sum() / seconds, 1 / seconds)[0])
        best, probe, deep, budget = -np.inf, -np.inf, 0, 0
        depths = self._depths(batch, float(seconds[0]), depth)
        # A tree's nodes are all given depth 1 before it is drafted: none of them would be deep enough.
        least = batch.min_depth if depth is None else np.minimum(batch.min_depth, 1)
        for limit, line in zip(depths, self._lines(batch, expected, depth, least, depths), strict=True):
            if line.score.max() > best:
                best, deep, budget = float(line.score.max()), limit, self._budget(line)
                probe = float(line.score[min(max(budget, batch.size), len(line.order))])
        turn = run.turn.next(best, probe, plain, self._margin, bool(batch.min_depth.any()))
        settled = SETTLED if turn.is_round and not turn.on_trial else 0
        return _Planned(turn, deep, budget, settled, what)

    def _budget(self, line: "_Line") -> int:
        """Drafts that the best round verifies, the forced ones included; 0 where early stop gets there by itself."""
        most = int(line.score.argmax())
        reached = self._speed is None and bool((np.diff(line.score[: most + 1]) > 0).all())
        return 0 if reached else most + int(np.count_nonzero(line.forced))

    def _depths(self, batch: Batch, seconds: float, depth: Ints | None) -> list[int]:
        """How deep the round may draft, the deepest first: where one more would make it longer. A tree has one size."""
        deepest, least = int(batch.max_depth.max()), max(1, int(batch.min_depth.max()))
        if depth is not None:
            return [deepest]
        all_depths = np.arange(1, deepest + 1)
        longer = np.diff(self._cost.draft_seconds(batch.size, all_depths, batch.context)) > FREE * seconds
        return [deepest, *(int(d) for d in all_depths[:-1][longer][::-1] if d >= least)]

    def takes_all(self, batch: Batch) -> bool:
        if not self._cost.ready:
            return True
        rows = batch.size + np.array([0, int(batch.max_depth.sum())])
        none, every = self._cost.round_seconds(batch.size, rows, batch.context, int(batch.max_depth.max()))
        return bool(every - none <= WORTH_A_LOOK * every)

    def select(self, batch: Batch, survival: Floats, depth: Ints | None = None) -> Bools:
        if not self._cost.ready:
            at = nodes_depth(survival, depth)
            return (at > 0) & (at <= batch.max_depth[:, None])
        least = batch.min_depth
        if self._planned.turn.is_probe:
            least = np.maximum(least, np.minimum(batch.max_depth, 1))
        (line,) = self._lines(batch, survival, depth, least, [int(batch.max_depth.max())])
        chosen = line.forced
        chosen.ravel()[line.order[: self._stop(line, batch.size)]] = True
        return chosen

    def _lines(
        self, batch: Batch, survival: Floats, depth: Ints | None, least: Ints, depths: Sequence[int]
    ) -> Iterator["_Line"]:
        """For rounds that draft no deeper than each of `depths`: the drafts in the order in which they would enter, and
        what every prefix of them is worth."""
        at = nodes_depth(survival, depth)
        allowed = (at > 0) & (at <= batch.max_depth[:, None])
        forced = required(least, survival, at, allowed)
        gain = batch.weight[:, None] * survival
        free = allowed & ~forced
        # A child is worth at most its parent; the tiny term per depth puts the parent first where they are equal.
        # Siblings that are equal enter in the order they were drawn in, which rejection goes by: a stable sort.
        order = np.argsort(np.where(free, 1e-12 * at - gain, np.inf), axis=None, kind="stable")[
            : np.count_nonzero(free)
        ]
        rows = np.arange(len(order) + 1) + (batch.size + np.count_nonzero(forced))
        kind = "round" if depth is None else "tree"
        seconds = self._cost.round_seconds(batch.size, rows, batch.context, np.array(depths)[:, None], kind)
        start = float(batch.weight.sum() + gain[forced].sum())
        for deep, whole in zip(depths, seconds, strict=True):
            mine = order[at.ravel()[order] <= deep]
            taken, value = whole[: len(mine) + 1], _running(start, gain.ravel()[mine])
            slowest = np.ones(1) if self._speed is None else _slowest(survival, forced, mine)
            yield _Line(forced, mine, self._score(value / taken, slowest / taken))

    def _score(self, throughput: Floats, slowest: Floats) -> Floats:
        """What is maximised: throughput; below 0, how near the slowest user comes to a promise that is not kept."""
        if self._speed is None:
            return throughput
        return np.where(slowest >= self._speed, throughput, slowest / self._speed - 1)

    def _stop(self, line: "_Line", requests: int) -> int:
        """How many drafts enter, beside the forced ones."""
        if self._causality == "global":
            return int(line.score.argmax())
        settled = min(max(0, self._planned.budget - int(np.count_nonzero(line.forced))), len(line.order))
        if self._speed is not None:
            return settled
        if self._causality == "lagged":
            self._budgets = [*self._budgets[-2:], int(line.score.argmax()) / requests]
            if len(self._budgets) == 3:
                return min(round(self._budgets[0] * requests), len(line.order))
        falls = line.score[settled + 1 :] <= line.score[settled:-1]
        return settled + int(falls.argmax()) if falls.any() else len(line.order)


@dataclass(frozen=True)
class _Line:
    """forced: bool `[n, N]`, whatever they are worth; order: int64 `[K]`, the others, flat; score: float64 `[K + 1]`"""

    forced: Bools
    order: Ints
    score: Floats


def _running(start: float, gains: Floats) -> Floats:
    """float64 `[K + 1]`: the running sum, from its start on."""
    sums = np.empty(len(gains) + 1)
    sums[0] = start
    np.cumsum(gains, out=sums[1:])
    sums[1:] += start
    return sums


def _slowest(survival: Floats, forced: Bools, order: Ints) -> Floats:
    """float64 `[K + 1]`: tokens of the slowest user after each entry.

    What a user has before an entry of his own, he has had at most all along. So the slowest after k entries has the
    least of what anybody has before an entry that comes later, or in the end.
    """
    n, nodes = survival.shape
    owner = (order // nodes).astype(np.min_scalar_type(n))
    by_user = np.argsort(owner, kind="stable")
    gains = survival.ravel()[order[by_user]]
    sums = _running(0.0, gains)
    ends = np.cumsum(np.bincount(owner, minlength=n))
    begins = np.concatenate([[0], ends[:-1]])
    start = 1 + np.where(forced, survival, 0.0).sum(axis=1)
    least = np.empty(len(order) + 1)
    least[by_user] = sums[:-1] + (start - sums[begins])[owner[by_user]]
    least[-1] = (start + sums[ends] - sums[begins]).min()
    slowest: Floats = np.minimum.accumulate(least[::-1])[::-1]
    return slowest

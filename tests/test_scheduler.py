"""Schedulers against what they promise: the best choice by brute force, exact limits, decisions that leak nothing."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_sgl.policies.batch import Batch, Scheduler
from dspark_sgl.policies.calibration import Calibration
from dspark_sgl.policies.cost import CostModel, CostPoint
from dspark_sgl.policies.forest import Forest
from dspark_sgl.policies.history import probe_weight
from dspark_sgl.policies.language import (
    FixedSchedule,
    Schedule,
    SloSchedule,
    TableSchedule,
    ThresholdSchedule,
    ThroughputSchedule,
)
from dspark_sgl.policies.scheduler import make_scheduler
from dspark_sgl.policies.turns import CHANGE, SHARE, TRIAL

SCHEDULES: tuple[Schedule, ...] = (
    FixedSchedule(depth=2),
    FixedSchedule(nodes=3),
    ThresholdSchedule(0.3),
    TableSchedule("batch.size", ((1, 3), (2, 1), (3, 0))),
    ThroughputSchedule(),
    ThroughputSchedule("global"),
    ThroughputSchedule("lagged"),
    SloSchedule(20.0),
    SloSchedule(20.0, "global"),
)


def cost_of(verify: list[float], plain: float = 0.03, draft: float = 0.005) -> CostModel:
    """A machine whose verify of 1, 2, 3, .. rows takes these seconds."""
    points = [CostPoint("verify", 1, rows, 0, seconds) for rows, seconds in enumerate(verify, 1)]
    return CostModel.from_points([*points, CostPoint("plain", 1, 1, 0, plain), CostPoint("draft", 1, 7, 0, draft)])


def approx1(figure: float) -> object:
    return pytest.approx(figure, abs=1)


def batch_of(low: list[int], high: list[int], weight: list[float]) -> Batch:
    return Batch(np.array(low), np.array(high), np.array(weight), 0, {"batch.size": len(high)})


def chance(low: float = 0.01, high: float = 1.0) -> st.SearchStrategy[float]:
    return st.floats(low, high)


@st.composite
def situations(draw: st.DrawFn) -> tuple[Batch, np.ndarray, CostModel]:
    """One to three requests with chains of one to three drafts, on a machine whose verify time never falls."""
    n, depth = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    high = [draw(st.integers(0, depth)) for _ in range(n)]
    low = [draw(st.integers(0, most)) for most in high] if draw(st.booleans()) else [0] * n
    weight = [draw(st.sampled_from([0.5, 1.0, 2.0])) for _ in range(n)]
    survival = np.array([[draw(chance()) for _ in range(depth)] for _ in range(n)]).cumprod(1)
    steps = [draw(st.floats(0, 0.02)) for _ in range(n * (depth + 1))]
    return batch_of(low, high, weight), survival, cost_of(list(0.03 + np.cumsum(steps)))


def choices(batch: Batch, depth: int) -> list[tuple[int, ...]]:
    """Every set of depths within the limits."""
    ranges = [range(low, min(high, depth) + 1) for low, high in zip(batch.min_depth, batch.max_depth, strict=True)]
    return list(product(*ranges))


def throughput(batch: Batch, survival: np.ndarray, depths: tuple[int, ...], cost: CostModel) -> float:
    gained = sum(w * (1 + row[:k].sum()) for w, row, k in zip(batch.weight, survival, depths, strict=True))
    rows = batch.size + sum(depths)
    return float(gained / cost.round_seconds(batch.size, np.array([rows]), batch.context)[0])


def slowest(batch: Batch, survival: np.ndarray, depths: tuple[int, ...], cost: CostModel) -> float:
    rows = batch.size + sum(depths)
    least = min(1 + row[:k].sum() for row, k in zip(survival, depths, strict=True))
    return float(least / cost.round_seconds(batch.size, np.array([rows]), batch.context)[0])


def selected(scheduler: Scheduler, batch: Batch, survival: np.ndarray) -> tuple[int, ...]:
    return tuple(scheduler.select(batch, survival).sum(1).tolist())


@settings(max_examples=300, deadline=None)
@given(situations())
def test_the_global_search_finds_the_best_of_all_choices(situation: tuple[Batch, np.ndarray, CostModel]):
    batch, survival, cost = situation
    found = selected(make_scheduler(ThroughputSchedule("global"), cost, 0.0, "global"), batch, survival)
    best = max(throughput(batch, survival, depths, cost) for depths in choices(batch, survival.shape[1]))
    assert throughput(batch, survival, found, cost) == pytest.approx(best)


@settings(max_examples=300, deadline=None)
@given(situations())
def test_early_stop_is_algorithm_1(situation: tuple[Batch, np.ndarray, CostModel]):
    """Written out one draft at a time, as the paper has it."""
    batch, survival, cost = situation
    depths = batch.min_depth.tolist()
    while True:
        ways = []
        for r in range(batch.size):
            if depths[r] < min(batch.max_depth[r], survival.shape[1]):
                ways.append((batch.weight[r] * survival[r, depths[r]], r))
        if not ways:
            break
        _, r = max(ways, key=lambda way: way[0])
        deeper = [depth + (i == r) for i, depth in enumerate(depths)]
        if throughput(batch, survival, tuple(deeper), cost) <= throughput(batch, survival, tuple(depths), cost):
            break
        depths = deeper
    found = selected(make_scheduler(ThroughputSchedule(), cost, 0.0, "early_stop"), batch, survival)
    assert throughput(batch, survival, found, cost) == pytest.approx(
        throughput(batch, survival, tuple(depths), cost), rel=1e-9
    )


@settings(max_examples=300, deadline=None)
@given(situations(), st.floats(5, 40))
def test_a_promise_is_kept_where_some_prefix_keeps_it(situation: tuple[Batch, np.ndarray, CostModel], speed: float):
    """Among the prefixes of the order by weighted survival: the most throughput of those that keep the promise."""
    batch, survival, cost = situation
    found = selected(make_scheduler(SloSchedule(speed, "global"), cost, 0.0, "global"), batch, survival)
    prefixes = []
    depths = batch.min_depth.tolist()
    order = sorted(
        (-batch.weight[r] * survival[r, j], j, r)
        for r in range(batch.size)
        for j in range(batch.min_depth[r], min(batch.max_depth[r], survival.shape[1]))
    )
    prefixes.append(tuple(depths))
    for _, _, r in order:
        depths[r] += 1
        prefixes.append(tuple(depths))
    keeping = [p for p in prefixes if slowest(batch, survival, p, cost) >= speed]
    if keeping:
        assert slowest(batch, survival, found, cost) >= speed
        best = max(throughput(batch, survival, p, cost) for p in keeping)
        assert throughput(batch, survival, found, cost) == pytest.approx(best)
    else:
        fastest = max(slowest(batch, survival, p, cost) for p in prefixes)
        assert slowest(batch, survival, found, cost) == pytest.approx(fastest)


@settings(max_examples=300, deadline=None)
@given(situations(), st.sampled_from(SCHEDULES))
def test_limits_are_exact_and_selections_are_prefixes(
    situation: tuple[Batch, np.ndarray, CostModel], schedule: Schedule
):
    batch, survival, cost = situation
    scheduler = make_scheduler(schedule, cost, 0.02, "early_stop")
    depth = survival.shape[1]
    for _ in range(3):
        drafted = scheduler.draft_depths(batch, survival)
        assert (drafted <= batch.max_depth).all()
        assert (drafted >= batch.min_depth).all() or (not drafted.any() and not batch.min_depth.any())
        kept = scheduler.select(batch, survival)
        counts = kept.sum(1)
        assert (kept == (np.arange(depth) < counts[:, None])).all()
        assert (counts <= batch.max_depth).all()
        assert (counts >= np.minimum(batch.min_depth, depth)).all()


@settings(max_examples=200, deadline=None)
@given(situations(), st.randoms(use_true_random=False), st.sampled_from(SCHEDULES))
def test_the_order_of_requests_does_not_matter(situation, random, schedule: Schedule):
    batch, survival, cost = situation
    order = list(range(batch.size))
    random.shuffle(order)
    moved = Batch(batch.min_depth[order], batch.max_depth[order], batch.weight[order], batch.context, batch.signals)
    here = selected(make_scheduler(schedule, cost, 0.02, "early_stop"), batch, survival)
    there = selected(make_scheduler(schedule, cost, 0.02, "early_stop"), moved, survival[order])
    assert throughput(batch, survival, here, cost) == pytest.approx(throughput(moved, survival[order], there, cost))


@settings(max_examples=300, deadline=None)
@given(situations(), st.integers(0, 2), st.integers(0, 2), chance())
def test_early_stop_never_looks_at_what_a_draft_decides(situation, request: int, position: int, other: float):
    """Whether a draft is verified does not change with the confidences behind it, which may have read it."""
    batch, survival, cost = situation
    n, depth = survival.shape
    r, j = request % n, position % depth
    changed = survival.copy()
    changed[r, j + 1 :] = changed[r, j] * np.cumprod(np.full(depth - j - 1, other))
    history = np.tile(other ** np.arange(1, depth + 1), (n, 1))
    for schedule in (ThroughputSchedule("early_stop"), SloSchedule(20.0, "early_stop"), ThresholdSchedule(0.3)):
        for planned in (False, True):  # with a budget from history, and without
            scheduler = make_scheduler(schedule, cost, 0.0, "early_stop")
            if planned:
                scheduler.draft_depths(batch, history)
            before, after = scheduler.select(batch, survival), scheduler.select(batch, changed)
            assert (before[r, : j + 1] == after[r, : j + 1]).all()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), chance()), min_size=1, max_size=6), st.sampled_from(SCHEDULES))
def test_trees_are_cut_below_a_node_never_above(nodes: list[tuple[int, float]], schedule: Schedule):
    """nodes: (parent among those before, conditional chance)."""
    parents, survival, depth = [], [], []
    for index, (parent, conditional) in enumerate(nodes):
        parent = min(parent, index)  # 0 is the anchor, m + 1 is node m
        parents.append(parent)
        survival.append(conditional * (survival[parent - 1] if parent else 1.0))
        depth.append(1 + (depth[parent - 1] if parent else 0))
    batch = batch_of([0], [3], [1.0])
    cost = cost_of([0.03 + 0.002 * rows for rows in range(8)])
    kept = make_scheduler(schedule, cost, 0.0, "early_stop").select(batch, np.array([survival]), np.array([depth]))[0]
    for index, parent in enumerate(parents):
        assert not kept[index] or (depth[index] <= 3 and (parent == 0 or kept[parent - 1]))


def rounds_of(scheduler: Scheduler, batch: Batch, expected: np.ndarray, steps: int, dropped: int = 0) -> np.ndarray:
    """bool `[steps]`: which steps draft. dropped: plans before each that are not carried out"""
    rounds = np.zeros(steps, bool)
    for step in range(steps):
        for _ in range(1 + dropped):
            rounds[step] = scheduler.draft_depths(batch, expected).any()
        scheduler.started()
    return rounds


def runs(kinds: np.ndarray) -> list[int]:
    """How many steps of one kind in a row, then of the other, and so on; the last run is cut off."""
    return np.diff([0, *(np.flatnonzero(np.diff(kinds)) + 1)]).tolist()


@pytest.mark.parametrize("dropped", [0, 2])
def test_plain_decoding_is_taken_where_it_pays_and_left_again(dropped: int):
    """Drafts that are never accepted: plain steps and ever rarer probes. Drafts get good: back to drafting at once, and
    ever rarer plain steps, to see what those take. Plans that are dropped do not count."""
    cost = cost_of([0.03, 0.031, 0.032, 0.033, 0.034])
    batch = batch_of([0], [4], [1.0])
    scheduler = make_scheduler(ThroughputSchedule(), cost, 0.02, "early_stop")
    useless, useful = np.full((1, 4), 0.01), np.array([[0.8, 0.6, 0.5, 0.4]])
    probed = runs(rounds_of(scheduler, batch, useless, 1200, dropped))
    # A probe takes 36 ms for 1.01 tokens, a plain step 30 ms.
    rarest = (TRIAL * (0.036 / 0.03 / 1.01 - 1) + CHANGE) / SHARE
    assert probed[1::2] == [TRIAL] * len(probed[1::2])
    assert probed[:6:2] == [approx1(rarest / 4), approx1(rarest / 2), approx1(rarest)]
    assert probed[4::2] == [approx1(rarest)] * len(probed[4::2])
    drafted = rounds_of(scheduler, batch, useful, 2000, dropped)
    assert drafted[:20].all()
    between = np.array(runs(drafted))
    assert (between[1::2] == TRIAL).all() and (np.diff(between[:6:2]) > 0).all()
    assert TRIAL * len(between[1::2]) < 2000 * SHARE * 2


def test_who_cannot_be_drafted_uses_up_no_probe():
    scheduler = make_scheduler(ThroughputSchedule(), cost_of([0.03, 0.031, 0.032]), 0.02, "early_stop")
    nobody, one = batch_of([0], [0], [1.0]), batch_of([0], [2], [1.0])
    useless = np.full((1, 2), 0.01)
    assert not rounds_of(scheduler, nobody, useless, 500).any()
    fresh = make_scheduler(ThroughputSchedule(), cost_of([0.03, 0.031, 0.032]), 0.02, "early_stop")
    assert (rounds_of(scheduler, one, useless, 300) == rounds_of(fresh, one, useless, 300)).all()


def test_early_stop_gets_over_a_step_in_what_rows_take():
    """Rows come by four: the second one doubles nothing, the fifth costs as much as four."""
    stairs = cost_of([0.03, 0.06, 0.06, 0.06, 0.06, 0.06, 0.06, 0.06], plain=0.031, draft=0.001)
    batch, survival = batch_of([0], [7], [1.0]), 0.95 ** np.arange(1, 8)[None]
    scheduler = make_scheduler(ThroughputSchedule(), stairs, 0.02, "early_stop")
    assert not scheduler.select(batch, survival).any(), "the first draft alone does not pay"
    assert scheduler.draft_depths(batch, survival).tolist() == [7]
    assert scheduler.select(batch, survival).all()


def test_a_promise_is_kept_for_many_users_alike():
    """One more draft each is what raises the slowest; no single draft does. The budget comes from history."""
    cost = cost_of([0.02 + 0.0002 * rows for rows in range(1, 65)], plain=0.021, draft=0.001)
    batch = batch_of([0] * 8, [7] * 8, [1.0] * 8)
    survival = np.tile(0.8 ** np.arange(1, 8), (8, 1))
    scheduler = make_scheduler(SloSchedule(100.0), cost, 0.0, "early_stop")
    assert (scheduler.draft_depths(batch, survival) == 7).all()
    depths = tuple(scheduler.select(batch, survival).sum(1).tolist())
    assert slowest(batch, survival, depths, cost) >= 100.0


@pytest.mark.parametrize("requests", [1, 8, 32])
def test_a_drafter_without_confidence_comes_back_when_its_drafts_get_good(requests: int):
    """All it has is history, and plain steps write none: its probes must verify something, and follow up success."""
    cost = cost_of([0.040 + 0.0005 * rows for rows in range(1, 9 * requests)], plain=0.039 + 0.0005 * requests)
    scheduler, calibration = make_scheduler(ThroughputSchedule(), cost, 0.02, "early_stop"), Calibration()
    batch = batch_of([0] * requests, [4] * requests, [1.0] * requests)
    dice = np.random.default_rng(0)

    def drafted(chance: float, steps: int) -> np.ndarray:
        rounds = np.zeros(steps, bool)
        for step in range(steps):
            expected = calibration.expected(requests, 4)
            depth = scheduler.draft_depths(batch, expected)
            probe = scheduler.started()
            rounds[step] = depth.any()
            if rounds[step]:
                offered = np.minimum(scheduler.select(batch, expected).sum(1), depth)
                accepted = (dice.random((requests, 4)) < chance).cumprod(1).sum(1)
                chains = Forest.chains(requests, 4)
                survived = chains.depth <= np.minimum(accepted, offered)[:, None]
                tested = chains.tested(chains.depth <= offered[:, None], survived)
                calibration.observe(None, chains.depth, tested, survived, probe_weight(requests) if probe else 1)
        return rounds

    assert drafted(0.0, 6000)[1000:].mean() < 0.03
    assert np.count_nonzero(~drafted(0.8, 4000)[-500:]) <= 4 * TRIAL, "all rounds but plain steps on trial"


def test_the_least_depth_of_a_tree_takes_its_likeliest_nodes_until_one_is_deep_enough():
    """Children of the anchor with 0.5 and 0.4; below each of them one with half its chance."""
    survival, depth = np.array([[0.5, 0.4, 0.25, 0.2]]), np.array([[1, 1, 2, 2]])
    batch = batch_of([2], [2], [1.0])
    dear = cost_of([0.03 + 0.03 * rows for rows in range(8)])
    for schedule in (ThroughputSchedule(), ThresholdSchedule(0.9), FixedSchedule(nodes=1)):
        kept = make_scheduler(schedule, dear, 0.0, "early_stop").select(batch, survival, depth)
        assert kept.tolist() == [[True, True, True, False]]


def test_a_least_depth_does_not_ask_what_hangs_from_a_draft():
    """Two children of the anchor; the second has a child, or none. A drawn draft must be kept or not all the same."""
    batch = batch_of([2], [2], [1.0])
    scheduler = make_scheduler(ThresholdSchedule(0.9), cost_of([0.03, 0.04]), 0.0, "early_stop")
    with_child = scheduler.select(batch, np.array([[0.5, 0.4, 0.2]]), np.array([[1, 1, 2]]))
    without = scheduler.select(batch, np.array([[0.5, 0.4, 0.0]]), np.array([[1, 1, 0]]))
    assert with_child.tolist() == [[True, True, True]] and without.tolist() == [[True, True, False]]


def test_the_drafts_own_cost_counts():
    survival = np.array([[0.5, 0.3]])
    batch = batch_of([0], [2], [1.0])
    cheap, dear = cost_of([0.03, 0.031, 0.032], draft=0.002), cost_of([0.03, 0.031, 0.032], draft=0.05)
    assert make_scheduler(ThroughputSchedule(), cheap, 0.02, "early_stop").draft_depths(batch, survival).any()
    assert not make_scheduler(ThroughputSchedule(), dear, 0.02, "early_stop").draft_depths(batch, survival).any()


def test_the_papers_counter_example():
    """A global search that reads c_2 decides on x_1 by what x_1 turned out to be: A comes out 0.85 instead of 0.7.

    Steps per second 1.0, 0.5, 0.45 for 1, 2, 3 rows; a_1 = 0.8; the target says A with 0.7, the draft with 0.5; c_2 is
    0.9 after A and 0 after B.
    """
    draft_free = [CostPoint("draft", 1, 2, 0, 1e-12), CostPoint("plain", 1, 1, 0, 1.0)]
    steps = [CostPoint("verify", 1, rows, 0, 1 / speed) for rows, speed in ((1, 1.0), (2, 0.5), (3, 0.45))]
    cost = CostModel.from_points([*steps, *draft_free])
    batch = batch_of([0], [2], [1.0])

    def first_is_a(causality: str) -> float:
        """The exact probability that the first token emitted is A."""
        total = 0.0
        for drafted, confidence in (("A", 0.9), ("B", 0.0)):
            survival = np.array([[0.8, 0.8 * confidence]])
            depth = make_scheduler(ThroughputSchedule(causality), cost, 0.0, causality).select(batch, survival).sum()
            if depth == 0:  # not offered: the target draws by itself
                total += 0.5 * 0.7
            else:  # accept A with min(1, 0.7 / 0.5), B with 0.3 / 0.5; a rejected B becomes A
                total += 0.5 * (1.0 if drafted == "A" else 1 - 0.3 / 0.5)
        return total

    assert first_is_a("global") == pytest.approx(0.85)
    assert first_is_a("early_stop") == pytest.approx(0.7)


@settings(max_examples=100, deadline=None)
@given(situations(), st.lists(st.floats(0, 0.05), min_size=3, max_size=3))
def test_a_round_drafts_as_deep_as_is_worth_most(situation: tuple[Batch, np.ndarray, CostModel], longer: list[float]):
    """Of all choices within a depth, priced with the drafting of it; where drafting deeper is free, all the way."""
    batch, survival, priced = situation
    most = survival.shape[1]
    drafts = [CostPoint("draft", 1, d, 0, 0.005 + sum(longer[:d])) for d in range(1, most + 1)]
    cost = CostModel.from_points([*(point for point in priced.points if point.kind != "draft"), *drafts])
    found = make_scheduler(ThroughputSchedule(), cost, -1.0, "global").draft_depths(batch, survival)
    if not batch.max_depth.any():
        assert not found.any()
        return

    def best(deep: int) -> float:
        within = batch.within(np.full(batch.size, deep))
        gained = [(throughput(within, survival, depths, cost), sum(depths)) for depths in choices(within, most)]
        seconds = {rows: cost.round_seconds(batch.size, np.array([batch.size + rows]), 0) for _, rows in gained}
        drafted = {rows: cost.round_seconds(batch.size, np.array([batch.size + rows]), 0, deep) for _, rows in gained}
        return max(float((worth * seconds[rows] / drafted[rows])[0]) for worth, rows in gained)

    deepest, least = int(batch.max_depth.max()), max(1, int(batch.min_depth.max()))
    wanted = max(best(deep) for deep in range(least, deepest + 1))
    assert best(int(found.max())) >= wanted * (1 - 0.01)
    if sum(longer[1:deepest]) == 0:
        assert found.max() == deepest


@settings(max_examples=200)
@given(situations(), st.sampled_from(SCHEDULES[:4]))
def test_who_says_that_all_is_taken_takes_all(situation: tuple[Batch, np.ndarray, CostModel], schedule: Schedule):
    """Before anything is drafted, of schedules that do not weigh."""
    batch, survival, cost = situation
    scheduler = make_scheduler(schedule, cost, 0.0, "early_stop")
    drafted = scheduler.draft_depths(batch, survival)
    within = batch.within(drafted)
    if scheduler.takes_all(within):
        at = np.arange(1, survival.shape[1] + 1)
        assert (scheduler.select(within, survival) == (at <= drafted[:, None])).all()


@pytest.mark.parametrize(("rows", "all_taken"), [([1.0, 1.0, 1.01, 1.02], True), ([1.0, 1.2, 1.4, 1.6], False)])
def test_drafts_that_cost_next_to_nothing_are_not_looked_at_first(rows: list[float], all_taken: bool) -> None:
    scheduler = make_scheduler(ThroughputSchedule(), cost_of(rows, draft=0.1), 0.0, "early_stop")
    assert scheduler.takes_all(batch_of([0], [3], [1.0])) == all_taken


def test_a_least_depth_does_not_buy_a_whole_tree() -> None:
    """Before drafting nobody knows how deep a tree's nodes will be, so none of them may count as too shallow."""
    n, nodes = 4, 16
    survival = np.tile(0.9 ** np.arange(1, nodes + 1), (n, 1))
    cost = CostModel.from_points(
        [CostPoint("plain", k, k, 0, 0.02) for k in (1, 8)]
        + [CostPoint("draft", k, k * d, 0, 0.001) for k in (1, 8) for d in (1, 4)]
        + [CostPoint("verify", k, rows, 0, 0.02 + 0.004 * rows) for k, rows in ((1, 1), (1, 16), (8, 128))]
    )
    verified = []
    for least in (0, 2):
        batch = Batch(np.full(n, least), np.full(n, 4), np.ones(n), 0, {})
        scheduler = make_scheduler(SloSchedule(1.0), cost, 0.02, "early_stop")
        scheduler.draft_depths(batch, survival, np.ones((n, nodes), dtype=np.int64))
        scheduler.started()
        depth = np.tile(np.repeat([1, 2, 3, 4], 4), (n, 1))
        verified.append(int(scheduler.select(batch, survival, depth).sum()))
    assert verified[1] <= verified[0] + 2 * n

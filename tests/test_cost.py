"""The cost model: what a profile says, what steps teach, what a file keeps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspark_sgl.policies.cost import DISTURBED, ENOUGH, CostModel, CostPoint, disturbance


def profile(noise: float = 0.0) -> list[CostPoint]:
    """A machine: 40 ms, 0.5 ms per row, 1 us per KV token; a draft of 5 ms and 0.2 ms per request."""
    points = []
    dice = np.random.default_rng(0)

    def noisy(seconds: float) -> float:
        return seconds * (1 + noise * float(dice.standard_normal()))

    for requests in (1, 2, 4, 8, 16):
        for context in (64 * requests, 1024 * requests):
            base = 0.040 + 1e-6 * context
            points.append(CostPoint("plain", requests, requests, context, noisy(base + 0.0005 * requests)))
            points.append(CostPoint("draft", requests, 7 * requests, context, noisy(0.005 + 0.0002 * requests)))
            for width in (2, 4, 8):
                rows = requests * width
                points.append(CostPoint("verify", requests, rows, context, noisy(base + 0.0005 * rows)))
    return points


def round_of(cost: CostModel, requests: int, rows: int, context: int) -> float:
    return float(cost.round_seconds(requests, np.array([rows]), context)[0])


@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_a_profile_is_read_between_and_beyond_its_points(noise: float):
    cost = CostModel.from_points(profile(noise))
    assert cost.ready and cost.source == "profiled"
    close = 2 * noise + 1e-6
    assert cost.plain_seconds(3, 0) == pytest.approx(0.0415, rel=close)
    assert round_of(cost, 4, 12, 1000) == pytest.approx(0.040 + 0.006 + 0.001 + 0.0058, rel=close)
    assert round_of(cost, 32, 256, 10_000) == pytest.approx(0.040 + 0.128 + 0.010 + 0.0114, rel=close + 0.02)


@given(
    st.lists(st.tuples(st.sampled_from([1, 2, 4, 8]), st.floats(1e-4, 1.0)), min_size=3, max_size=30),
    st.integers(1, 600),
)
def test_more_rows_never_cost_less_and_nothing_is_free(measured: list[tuple[int, float]], rows: int):
    """However noisy the measurements."""
    kinds = ("plain", "draft", "verify")
    points = [CostPoint(kind, size, size, 64 * size, s) for kind in kinds for size, s in measured]
    cost = CostModel.from_points(points)
    seconds = cost.round_seconds(4, np.arange(1, rows + 1), 1000)
    assert (seconds > 0).all()
    assert (np.diff(seconds) >= -1e-12).all()


def test_a_shallow_draft_is_priced_as_one():
    """A draft of 5 ms and 0.1 ms for each of its tokens, measured at depths 1 and 7; never below a shallower one."""
    points = [point for point in profile() if point.kind != "draft"]
    drafts = [CostPoint("draft", n, n * d, 64 * n, 0.005 + 0.0001 * n * d) for n in (1, 4, 16) for d in (1, 7)]
    cost = CostModel.from_points([*points, *drafts])
    deep = float(cost.round_seconds(4, np.array([12]), 1000)[0])
    for depth in (1, 3, 7):
        seconds = float(cost.round_seconds(4, np.array([12]), 1000, depth)[0])
        assert deep - seconds == pytest.approx(0.0004 * (7 - depth))
    noisy = CostModel.from_points([*points, CostPoint("draft", 4, 4, 0, 0.006), CostPoint("draft", 4, 28, 0, 0.005)])
    assert (np.diff(noisy.draft_seconds(4, np.arange(1, 8), 0)) >= 0).all()


def test_one_step_ten_times_too_slow_moves_little():
    cost = CostModel.from_points(profile())
    before = round_of(cost, 4, 16, 1000)
    cost.observe("round", 4, 16, 1000, 10 * before)
    assert round_of(cost, 4, 16, 1000) < 1.03 * before


def test_a_lasting_change_is_followed_within_fifty_steps():
    """A clock that drops by a third: every step takes 1.5 times as long, whatever its size."""
    cost, fresh = CostModel.from_points(profile()), CostModel.from_points(profile())
    dice = np.random.default_rng(1)
    for _ in range(50):
        rows = int(dice.choice([8, 16, 32]))
        cost.observe("round", 4, rows, 1000, 1.5 * round_of(fresh, 4, rows, 1000))
    for rows in (8, 16, 32):
        assert round_of(cost, 4, rows, 1000) == pytest.approx(1.5 * round_of(fresh, 4, rows, 1000), rel=0.05)
    # Plain steps, not seen meanwhile, are believed to have become dearer with it.
    assert cost.plain_seconds(4, 1000) == pytest.approx(1.5 * fresh.plain_seconds(4, 1000), rel=0.15)


def test_now_and_then_some_of_the_other_kind_tell_them_apart():
    """The profile has plain steps 30 % too dear and rounds right; after every 32 rounds there are three plain steps,
    and the first round after those takes twice as long."""
    cost, truth = CostModel.from_points(profile()), CostModel.from_points(profile())
    dice = np.random.default_rng(1)
    for step in range(35 * 6):
        noise = dice.normal(1, 0.05)
        if step % 35 >= 32:
            cost.observe("plain", 4, 4, 1000, noise * truth.plain_seconds(4, 1000) / 1.3)
        else:
            cost.observe("round", 4, 16, 1000, (1 + (step % 35 == 0)) * noise * round_of(truth, 4, 16, 1000))
    assert cost.plain_seconds(4, 1000) == pytest.approx(truth.plain_seconds(4, 1000) / 1.3, rel=0.07)
    assert round_of(cost, 4, 16, 1000) == pytest.approx(round_of(truth, 4, 16, 1000), rel=0.07)


@pytest.mark.parametrize("slow", [0, 1, 2])
def test_one_slow_step_after_a_change_of_kind_tells_nothing(slow: int):
    """Ten times too slow, the first, second or third after a plain trial: the two kinds stay priced as they were."""
    cost, truth = CostModel.from_points(profile()), CostModel.from_points(profile())
    right = round_of(truth, 4, 16, 1000)
    for _ in range(3):
        cost.observe("round", 4, 16, 1000, right)
    for _ in range(3):
        cost.observe("plain", 4, 4, 1000, truth.plain_seconds(4, 1000))
    for step in range(3):
        cost.observe("round", 4, 16, 1000, right * (10 if step == slow else 1))
    ratio = round_of(cost, 4, 16, 1000) / cost.plain_seconds(4, 1000)
    assert ratio == pytest.approx(right / truth.plain_seconds(4, 1000), rel=0.01)


def test_a_profile_measured_beside_other_work_contradicts_itself() -> None:
    def points(first: float) -> list[CostPoint]:
        plain = [CostPoint("plain", n, n, 64 * n, seconds) for n, seconds in ((1, first), (2, 0.053), (4, 0.055))]
        return [*plain, CostPoint("verify", 1, 2, 64, 0.06), CostPoint("draft", 1, 1, 64, 0.01)]

    assert disturbance(points(0.05)) == 0
    assert disturbance(points(0.08)) == pytest.approx(0.08 / 0.053 - 1) and disturbance(points(0.08)) > DISTURBED


def test_beyond_its_points_a_curve_goes_on_as_it_ends():
    """Flat up to 64 rows, then 0.1 ms a row."""
    drafts = [CostPoint("draft", 8, 56, 0, 0.001), CostPoint("plain", 8, 8, 0, 0.01)]
    verify = [CostPoint("verify", 8, rows, 0, 0.01 + 1e-4 * max(0, rows - 64)) for rows in (16, 32, 64, 128, 256)]
    cost = CostModel.from_points([*drafts, *verify])
    assert round_of(cost, 8, 512, 0) == pytest.approx(0.001 + 0.01 + 1e-4 * (512 - 64))


def test_without_a_profile_steps_become_one():
    cost = CostModel()
    assert not cost.ready and cost.source == "none"
    for _ in range(ENOUGH):
        cost.observe("plain", 2, 2, 500, 0.041)
        assert not cost.ready
        cost.observe("round", 2, 6, 500, 0.049)
    assert cost.ready and cost.source == "online"
    assert cost.plain_seconds(2, 500) == pytest.approx(0.041)
    assert round_of(cost, 2, 6, 500) == pytest.approx(0.049)


def test_a_file_keeps_it_and_a_damaged_one_is_no_model(tmp_path: Path):
    file = tmp_path / "costs" / "x.json"
    cost = CostModel.from_points(profile())
    cost.save(file, {"device": "test"})
    again = CostModel.load(file)
    assert again is not None and again.source == "cached"
    assert again.points == cost.points
    assert list(file.parent.iterdir()) == [file]
    point = '{"kind": "plain", "requests": %s, "rows": 1, "context": 0, "seconds": %s}'
    bad = [point % values for values in (("0", "1"), ("1", "NaN"), ("1", "-1"), ("1", '"a"'), ("true", "1"))]
    whole = [f'{{"version": 3, "points": [{each}]}}' for each in (*bad, '{"kind": "plain"}')]
    other = ['{"version": 3, "about": "me", "points": [%s]}' % (point % ("1", "1"))]
    for damage in ("", "{", "[]", '{"version": 99, "points": []}', *whole, *other):
        file.write_text(damage)
        assert CostModel.load(file) is None, damage
    file.write_text('{"version": 3, "points": [%s]}' % (point % ("1", "1")))
    assert CostModel.load(file) is not None

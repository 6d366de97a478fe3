"""Sequential temperature scaling: finds temperatures that are known, keeps order, never makes its own data worse."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_sgl.policies.calibration import sigmoid
from dspark_sgl.policies.reliability import Reliability, Tally, auc
from dspark_sgl.policies.sts import LEAST_SAMPLES, Rounds, fit, judge


def drafter(temperatures: list[float], count: int, seed: int = 0) -> Rounds:
    """Rounds of a drafter whose logits are T_k times the true ones."""
    dice = np.random.default_rng(seed)
    logits = dice.normal(0.7, 1.5, (count, len(temperatures)))
    accepted = (dice.random(logits.shape) < sigmoid(logits)).cumprod(1).sum(1)
    return Rounds(logits * temperatures, np.full(count, len(temperatures)), accepted)


@pytest.mark.parametrize("true", [[1.0, 1.0, 1.0], [0.4, 0.6, 0.5], [2.0, 3.0, 1.5]])
def test_known_temperatures_are_found(true: list[float]):
    assert fit(drafter(true, 30_000)) == pytest.approx(true, rel=0.15)


def test_survival_is_calibrated_on_rounds_it_has_not_seen():
    temperatures = fit(drafter([2.0, 3.0, 2.5, 2.0], 20_000))
    before, after = (judge(drafter([2.0, 3.0, 2.5, 2.0], 20_000, seed=1), t) for t in ([1.0], temperatures))
    for raw, scaled in zip(before, after, strict=True):
        assert raw.ece > 0.04
        assert scaled.ece < 2 * scaled.floor
        assert scaled.accepted == raw.accepted and scaled.samples == 20_000


def test_a_position_is_fitted_with_the_rounds_it_was_offered_in():
    rounds = drafter([2.0, 2.0, 2.0], 30_000)
    offered = np.where(np.arange(len(rounds)) % 10, 1, 3)
    cut = Rounds(np.where(np.arange(3) < offered[:, None], rounds.logits, np.nan), offered, rounds.accepted)
    cut = Rounds(cut.logits, offered, np.minimum(cut.accepted, offered))
    assert fit(cut) == pytest.approx([2.0, 2.0, 2.0], rel=0.25)
    assert [row.samples for row in judge(cut, [1.0])] == [30_000, 3_000, 3_000]


def test_too_few_rounds_are_no_reason_for_a_temperature():
    rounds = drafter([2.0, 2.0], LEAST_SAMPLES - 1)
    assert fit(rounds) == [1.0]
    more = drafter([2.0, 2.0], 5000)
    deep = Rounds(more.logits, np.where(np.arange(5000) < LEAST_SAMPLES - 1, 2, 1), np.minimum(more.accepted, 1))
    assert len(fit(deep)) == 1


@settings(max_examples=15, deadline=None)
@given(
    st.integers(0, 10_000),
    st.lists(st.floats(0.2, 5), min_size=1, max_size=4),
    st.floats(-2, 2),
    st.integers(LEAST_SAMPLES, 600),
)
def test_the_data_it_is_fitted_on_never_get_worse(seed: int, true: list[float], bias: float, count: int):
    """Whatever the confidence is worth, a bias included that no temperature removes."""
    rounds = drafter(true, count, seed)
    rounds = Rounds(rounds.logits + bias, rounds.offered, rounds.accepted)
    temperatures = fit(rounds)
    assert all(0 < t < 100 for t in temperatures)
    for k in range(len(true)):
        # With the earlier positions fixed, as the fit sees it.
        alone = [*temperatures[:k], 1.0]
        assert judge(rounds, temperatures)[k].ece <= judge(rounds, alone)[k].ece + 1e-12
        order = np.argsort(rounds.logits[:, k])
        assert (np.diff(sigmoid(rounds.logits[order, k] / temperatures[k])) >= 0).all()


def test_a_perfect_prediction_has_the_error_of_the_floor():
    dice = np.random.default_rng(3)
    chance = dice.random(4000) ** 2
    found = [Reliability.of(chance, dice.random(4000) < chance) for _ in range(40)]
    assert np.mean([bins.ece for bins in found]) == pytest.approx(found[0].floor, rel=0.15)
    many = np.tile(chance, 16)
    assert Reliability.of(many, many > 1).floor == pytest.approx(found[0].floor / 4)


def test_bins_hold_equally_many_and_all():
    chance = np.arange(1, 8) / 10
    bins = Reliability.of(chance[::-1], chance[::-1] > 0.35, bins=3)
    assert bins.count.tolist() == [2, 2, 3]
    assert bins.predicted == pytest.approx([0.15, 0.35, 0.6])
    assert bins.observed == pytest.approx([0, 0.5, 1])
    assert bins.ece == pytest.approx((2 * 0.15 + 2 * 0.15 + 3 * 0.4) / 7)
    assert Reliability.of(np.array([0.25]), np.array([True])).ece == 0.75


def test_a_tally_counts_as_samples_come():
    tally = Tally(bins=4)
    tally.add(np.array([0.1, 0.2, 0.3, 1.0]), np.array([False, True, True, True]))
    tally.add(np.array([0.0, 0.99]), np.array([False, False]))
    assert tally.report == {
        "predicted": pytest.approx([0.3, 0.3, 0, 1.99]),
        "happened": [1, 1, 0, 1],
        "count": [3, 1, 0, 2],
    }


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=30))
def test_auc_is_the_share_of_pairs_in_order(samples: list[tuple[int, bool]]):
    chance, happened = np.array([c / 5 for c, _ in samples]), np.array([y for _, y in samples])
    pairs = [(a > b) + (a == b) / 2 for a in chance[happened] for b in chance[~happened]]
    found = auc(chance, happened)
    assert found == pytest.approx(np.mean(pairs)) if pairs else np.isnan(found)

"""Calibration: chances from confidences, learned from acceptance, and nothing bought on the strength of a NaN."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspark_sgl.policies.calibration import Calibration
from dspark_sgl.policies.errors import PolicyError
from dspark_sgl.policies.forest import Forest


def sigmoid(value: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-value))


def observe(calibration: Calibration, confidence: np.ndarray | None, offered: list[int], accepted: list[int]) -> None:
    """A round of chains: so many drafts offered, so many accepted."""
    chains = Forest.chains(len(offered), max(offered))
    verified = chains.depth <= np.array(offered)[:, None]
    survived = chains.depth <= np.array(accepted)[:, None]
    calibration.observe(confidence, chains.depth, chains.tested(verified, survived), survived)


def rounds(calibration: Calibration, sharpness: float, count: int, seed: int = 0) -> None:
    """Rounds of four drafts by a drafter whose logits are `sharpness` times the true ones."""
    dice = np.random.default_rng(seed)
    for _ in range(count):
        logits = dice.normal(0.5, 1.2, (8, 4))
        lucky = dice.random((8, 4)) < sigmoid(logits)
        accepted = lucky.cumprod(1).sum(1)
        observe(calibration, sigmoid(sharpness * logits), [4] * 8, accepted.tolist())


@pytest.mark.parametrize("sharpness", [0.5, 1.0, 2.0])
def test_temperatures_follow_a_drafter_that_is_too_sure_or_too_shy(sharpness: float):
    calibration = Calibration()
    rounds(calibration, sharpness, 3000)
    assert calibration.temperatures[:4] == pytest.approx(sharpness, rel=0.2)


def test_survival_is_what_is_accepted():
    """After learning: predicted and observed acceptance of new rounds agree, position by position."""
    calibration = Calibration()
    rounds(calibration, 2.0, 3000)
    dice = np.random.default_rng(7)
    logits = dice.normal(0.5, 1.2, (40_000, 4))
    survived = (dice.random((40_000, 4)) < sigmoid(logits)).cumprod(1)
    assert calibration.apply(sigmoid(2.0 * logits)).mean(0) == pytest.approx(survived.mean(0), abs=0.02)


def test_a_shift_follows_where_no_temperature_can():
    """Every draft claims 0.5, and 0.15 of them are accepted."""
    calibration, dice = Calibration(), np.random.default_rng(3)
    for _ in range(1000):
        accepted = (dice.random((4, 2)) < 0.15).cumprod(1).sum(1)
        observe(calibration, np.full((4, 2), 0.5), [2] * 4, accepted.tolist())
    claimed = np.full((1, 1), 0.5)
    assert calibration.apply(claimed)[0, 0] == pytest.approx(0.15, abs=0.05)
    for _ in range(3000):  # rounds that verify nothing, as a threshold of 0.3 would have it, must not go on for ever
        observe(calibration, claimed, [0], [0])
    assert calibration.apply(claimed)[0, 0] == pytest.approx(0.5, abs=0.02)


def test_expected_is_the_running_acceptance():
    calibration = Calibration()
    for _ in range(200):
        observe(calibration, None, [3, 3, 3, 3], [3, 1, 0, 0])
    assert calibration.expected(2, 3)[1] == pytest.approx([0.5, 0.25, 0.25], abs=0.03)


def test_it_forgets():
    calibration = Calibration()
    for accepted in (4, 0):
        for _ in range(500):
            observe(calibration, None, [4] * 8, [accepted] * 8)
    assert calibration.expected(1, 1)[0, 0] < 0.05


def test_a_position_where_nothing_is_drafted_is_believed_in_again():
    """What was poor there is slowly forgotten, or it would never be tried again."""
    calibration = Calibration()
    known = calibration.follow(2)[1]
    for _ in range(300):
        observe(calibration, None, [2] * 4, [1] * 4)
    assert calibration.follow(2)[1] < 0.05
    for _ in range(3000):
        observe(calibration, None, [1] * 4, [1] * 4)
    assert calibration.follow(2)[1] == pytest.approx(known, abs=0.02)


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=1, max_size=8))
def test_what_is_no_probability_counts_as_nothing(confidence: list[float]):
    calibration = Calibration()
    survival = calibration.apply(np.array([confidence]))[0]
    wrong = [not 0 <= c <= 1 for c in confidence]
    assert calibration.bad == sum(wrong)
    assert ((survival >= 0) & (survival <= 1)).all()
    assert (np.diff(survival) <= 0).all()
    if any(wrong):
        assert (survival[wrong.index(True) :] < 1e-5).all()
    observe(calibration, np.array([confidence]), [len(confidence)], [0])
    assert np.isfinite(calibration.temperatures).all()


def test_the_order_within_a_position_is_kept():
    ladder, learned = np.linspace(0.01, 0.99, 50)[:, None], Calibration([2.5])
    rounds(learned, 2.0, 100)
    for calibration in (Calibration([2.5]), learned):
        assert (np.diff(calibration.apply(ladder)[:, 0]) > 0).all()


def test_temperatures_beside_a_draft(tmp_path: Path):
    file = tmp_path / "sts.json"
    file.write_text('{"version": 1, "temperatures": [1.5, 2.0]}')
    assert Calibration.from_json(file).temperatures[:4] == pytest.approx([1.5, 2.0, 2.0, 2.0])
    for damage in ("", "{}", '{"version": 1, "temperatures": []}', '{"version": 1, "temperatures": [0]}'):
        file.write_text(damage)
        with pytest.raises(PolicyError, match=r"sts\.json: holds no temperatures"):
            Calibration.from_json(file)

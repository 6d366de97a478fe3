"""What is expected of drafts before they are made, from what the latest rounds made."""

from __future__ import annotations

import numpy as np
import pytest

from dspark_sgl.policies.history import LATEST, Chains

FOLLOW = np.array([0.5, 0.4, 0.3])


def taught(requests: int, depth: int, seed: int = 0) -> tuple[Chains, np.ndarray]:
    """Chains that have seen as many drafts as they remember, all so deep, and these."""
    chains, dice = Chains(3), np.random.default_rng(seed)
    seen = []
    while not chains.known:
        seen.append(dice.random((requests, 3)).cumprod(1))
        chains.observe(seen[-1][:, :depth], np.full(requests, depth), FOLLOW)
    return chains, np.concatenate(seen)


@pytest.mark.parametrize("requests", [1, 2, 5, 16])
def test_chains_are_spread_as_they_were(requests: int) -> None:
    chains, seen = taught(requests, 3)
    latest = seen[-LATEST:]
    for asked in (1, 4, LATEST, 3 * LATEST):
        expected = chains.expected(asked)
        assert expected.shape == (asked, 3)
        assert expected.mean(0) == pytest.approx(latest.mean(0)), "on average what they were"
        assert (np.diff(expected, axis=0) >= -1e-12).all() and (np.diff(expected, axis=1) <= 1e-12).all()
    assert chains.expected(LATEST) == pytest.approx(np.sort(latest, axis=0))


def test_a_draft_that_was_not_made_is_taken_to_follow_as_such_drafts_have() -> None:
    chains, seen = taught(4, 1)
    first = seen[-LATEST:, 0].mean()
    assert chains.expected(1)[0] == pytest.approx(first * np.array([1, 0.4, 0.12]))


def test_a_large_batch_does_not_push_out_all_that_came_before() -> None:
    chains, _ = taught(16, 3)
    chains.observe(np.zeros((512, 3)), np.full(512, 3), FOLLOW)
    assert 0 < (chains.expected(LATEST)[:, 0] > 0).sum() < LATEST


def test_requests_that_were_not_drafted_say_nothing() -> None:
    chains, _ = taught(4, 3)
    before = chains.expected(8)
    chains.observe(np.zeros((8, 3)), np.zeros(8, dtype=np.int64), FOLLOW)
    assert (chains.expected(8) == before).all()

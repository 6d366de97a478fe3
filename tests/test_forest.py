"""Forests as policies see them: survival, closure and what a round put to the test, against definitions by path."""

from __future__ import annotations

import numpy as np
import pytest

from dspark_sgl.policies.forest import NOTHING, Forest


def random_forest(seed: int) -> Forest:
    """Up to three trees of up to nine drafts, the last ones of some absent."""
    dice = np.random.default_rng(seed)
    n, nodes = 1 + seed % 3, 1 + seed % 9
    parents = np.stack([dice.integers(0, draft + 1, n) for draft in range(nodes)], axis=1)
    return Forest.trees(np.where(np.arange(nodes) < dice.integers(1, nodes + 1, (n, 1)), parents, NOTHING))


def ancestry(forest: Forest, request: int, draft: int) -> list[int]:
    """The draft and all above it."""
    found = []
    while draft >= 0:
        found.append(draft)
        draft = int(forest.parents[request, draft]) - 1
    return found


@pytest.mark.parametrize("seed", range(30))
def test_depth_survival_and_closure_follow_the_path(seed: int) -> None:
    forest, dice = random_forest(seed), np.random.default_rng(seed)
    chance = dice.random(forest.parents.shape)
    survival, closed = forest.survival(chance), forest.closed(chance > 0.4)
    for (request, draft), parent in np.ndenumerate(forest.parents):
        if parent == NOTHING:
            assert forest.depth[request, draft] == 0 == survival[request, draft]
            assert not closed[request, draft]
            continue
        path = ancestry(forest, request, draft)
        assert forest.depth[request, draft] == len(path)
        assert survival[request, draft] == pytest.approx(chance[request, path].prod())
        assert closed[request, draft] == (chance[request, path] > 0.4).all()


@pytest.mark.parametrize("seed", range(10))
def test_a_chain_is_a_tree_whose_drafts_follow_one_another(seed: int) -> None:
    chance = np.random.default_rng(seed).random((2, 1 + seed % 5))
    chain = Forest.chains(*chance.shape)
    tree = Forest.trees(chain.parents.copy())
    assert (chain.depth == tree.depth).all()
    assert chain.survival(chance) == pytest.approx(tree.survival(chance))


def test_what_a_round_put_to_the_test() -> None:
    """0 -+- d0 -+- d2      d1 is not verified, so rows are d0: 1, d2: 2, d3: 3; d0 and d3 are accepted.
    |      +- d3 - d4   d4 was not verified either; d2 was tested and failed.
    +- d1
    """
    forest = Forest.trees(np.array([[0, 0, 1, 1, 4]]))
    verified = np.array([[True, False, True, True, False]])
    accepted = forest.on_path(verified, np.array([[0, 1, 3, NOTHING]]))
    assert accepted.tolist() == [[True, False, False, True, False]]
    assert forest.tested(verified, accepted).tolist() == [[True, False, True, True, False]]
    assert forest.ranks(accepted) == [[0, 1]]


def test_below_a_rejected_draft_nothing_is_tested() -> None:
    forest = Forest.trees(np.array([[0, 1, 2], [0, 1, 2]]))
    verified = np.ones((2, 3), dtype=bool)
    accepted = forest.on_path(verified, np.array([[0, NOTHING], [0, 1]]))
    assert accepted.tolist() == [[False] * 3, [True, False, False]]
    assert forest.tested(verified, accepted).tolist() == [[True, False, False], [True, True, False]]

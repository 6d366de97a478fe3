"""The tree expected of chances: the best of all nodes there could be, by trying them all."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_sgl.policies.expected_tree import expected_trees, path_chances

CHANCES = st.lists(st.floats(0, 1), min_size=1, max_size=4)


def every_node(likeliest: list[float], side: float, branch: int) -> dict[tuple[int, ...], float]:
    """Survival by path; a path names each step's place among its siblings."""
    ladders = []
    for chance in likeliest:
        ladder, left = [chance], 1 - chance
        while len(ladder) < branch:
            ladder.append(min(ladder[-1], side * left))
            left -= ladder[-1]
        ladders.append(ladder)
    return {
        path: float(np.prod([ladder[place] for ladder, place in zip(ladders, path, strict=False)]))
        for depth in range(1, len(likeliest) + 1)
        for path in product(range(branch), repeat=depth)
    }


@settings(deadline=None)
@given(CHANCES, st.floats(0, 1), st.integers(1, 20), st.integers(1, 3))
def test_it_holds_the_best_nodes_of_all(likeliest: list[float], side: float, nodes: int, branch: int) -> None:
    chain = np.cumprod(likeliest)[None]
    before = np.concatenate([[1.0], chain[0, :-1]])
    known = [c for c, b in zip(likeliest, before, strict=True) if b > 0]  # what follows the impossible has no chance
    every = every_node(known, side, branch)
    survival, depth = expected_trees(chain, side, nodes, branch)
    best = sorted(every.values(), reverse=True)[:nodes]
    assert survival[0, : len(best)] == pytest.approx(best, abs=1e-12)
    assert not survival[0, len(best) :].any()
    assert ((survival > 0) == (depth > 0)).all()
    for level in range(2, len(known) + 1):
        if level in depth[0]:
            assert level - 1 in depth[0, : depth[0].tolist().index(level)]


def test_chances_of_a_path_add_up_over_siblings() -> None:
    """0.5 and 0.25 for the first token; after the likelier, 0.5 again."""
    survival, depth = np.array([[0.5, 0.25, 0.25]]), np.array([[1, 2, 1]])
    every = np.ones_like(depth, dtype=bool)
    assert path_chances(survival, depth, every, 3).tolist() == [[0.75, 0.25, 0.0]]
    assert path_chances(survival, depth, every & (depth < 2), 3).tolist() == [[0.75, 0.0, 0.0]]

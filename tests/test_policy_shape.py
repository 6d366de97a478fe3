"""Which shape a round drafts: as the policy says, within the KV that was reserved, and `auto` by what is bought."""

from __future__ import annotations

import pytest

from dspark_sgl.policies.language import Shape
from dspark_sgl.policies.reader import parse_policy
from dspark_sgl.policies.shape import LAST_WAIT, TRIAL, ShapeChooser, most_nodes

BLOCK, ROOM = 6, 32
AUTO = Shape("auto", max_nodes=24, branch=3)


def after(verified: float, rounds: int = 50) -> ShapeChooser:
    chooser = ShapeChooser(BLOCK, ROOM)
    for _ in range(rounds):
        chooser.learn(verified)
    return chooser


def test_a_shape_by_name_is_drafted_within_the_room() -> None:
    chooser = ShapeChooser(BLOCK, ROOM)
    assert chooser.settle(Shape("chain")) is None
    assert chooser.settle(Shape("tree", 16, 2)) == Shape("tree", 16, 2)
    assert chooser.settle(Shape("tree", 100, 2)) == Shape("tree", ROOM, 2)


def test_a_drafter_without_trees_drafts_chains() -> None:
    for kind in ("chain", "tree", "auto"):
        assert ShapeChooser(BLOCK, 0).settle(Shape(kind)) is None


def test_auto_is_as_large_as_twice_what_is_verified() -> None:
    assert ShapeChooser(BLOCK, ROOM).settle(AUTO) == AUTO
    bought = after(5).settle(AUTO)
    assert bought is not None and bought.max_nodes == 16 and bought.branch == 3
    assert after(2).settle(AUTO) is None, "no more than a chain"


def test_auto_comes_back_to_trees_when_whole_chains_are_verified() -> None:
    chooser = after(1)
    for _ in range(20):
        chooser.learn(BLOCK)
    tree = chooser.settle(AUTO)
    assert tree is not None and tree.max_nodes > BLOCK


def drafted(chooser: ShapeChooser, requests: int, tree_rate: float, rounds: int, late: int) -> list[bool]:
    """Whether each round drafts trees, where a round of chains brings one token a second and one of trees that many.
    What a round brought is known that many rounds later; between rounds lie plans of plain steps."""
    kinds: list[bool] = []
    for number in range(rounds + late):
        for _ in range(3):
            chooser.settle(AUTO, requests)
        kinds.append(chooser.settle(AUTO, requests) is not None)
        if number >= late:
            tree = kinds[number - late]
            brought = tree_rate if tree else 1.0
            chooser.paid(tree, requests, brought, brought, 1.0)
    return kinds[:rounds]


@pytest.mark.parametrize("late", [0, 2])
@pytest.mark.parametrize("tree_rate", [0.7, 1.3])
def test_the_kind_that_brings_more_is_drafted_and_the_other_tried_now_and_then(tree_rate: float, late: int) -> None:
    kinds = drafted(ShapeChooser(BLOCK, ROOM), 3, tree_rate, 6000, late)
    first = TRIAL + late
    assert kinds[:first] == [True] * first and kinds[first : first + TRIAL] == [False] * TRIAL
    share = sum(kinds[-2000:]) / 2000
    tried = 1 - share if tree_rate > 1 else share
    assert TRIAL / LAST_WAIT / 2 < tried < 3 * TRIAL / LAST_WAIT


def test_batches_of_another_size_are_another_contest() -> None:
    chooser = ShapeChooser(BLOCK, ROOM)
    assert not all(drafted(chooser, 2, 0.5, 100, 0)[60:])
    assert all(drafted(chooser, 32, 1.5, TRIAL, 0))
    assert sum(drafted(chooser, 2, 0.5, 50, 0)) <= TRIAL


def test_trees_that_promise_more_than_they_bring_do_not_win() -> None:
    """By their promises they bring a third more, in truth a third less."""
    chooser = ShapeChooser(BLOCK, ROOM)
    kinds = []
    for _ in range(400):
        tree = chooser.settle(AUTO, 1) is not None
        kinds.append(tree)
        chooser.paid(tree, 1, 4.0 if tree else 3.0, 2.0 if tree else 3.0, 1.0)
    assert sum(kinds[-200:]) <= TRIAL


def test_a_gpu_records_trees_of_few_sizes() -> None:
    sizes = {tree.max_nodes for k in range(4, 33) if (tree := after(k / 2).settle(AUTO)) is not None}
    assert sizes == {8, 16, AUTO.max_nodes}


def test_a_change_of_what_they_bring_is_noticed() -> None:
    chooser = ShapeChooser(BLOCK, ROOM)
    drafted(chooser, 1, 0.8, 300, 0)
    assert sum(drafted(chooser, 1, 1.5, 3000, 0)[-500:]) > 400


def test_the_room_to_reserve_is_that_of_the_largest_tree_named() -> None:
    text = "version: 1\nschedule: {kind: throughput}\nshape: {kind: %s}\nrules:\n"
    rule = "  - when: batch.size < 3\n    set: {shape: {kind: tree, max_nodes: 20}}\n"
    assert most_nodes(parse_policy((text % "auto, max_nodes: 8" + rule).encode(), "a")) == 20
    assert most_nodes(parse_policy((text % "chain" + rule).encode(), "a")) == 20
    assert most_nodes(parse_policy((text % "auto, max_nodes: 8").replace("rules:\n", "").encode(), "a")) == 8
    assert most_nodes(parse_policy((text % "chain").replace("rules:\n", "").encode(), "a")) == 0

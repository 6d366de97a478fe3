"""Which shape a round drafts: as the policy says, within the KV that was reserved, and `auto` by what is bought."""

from __future__ import annotations

from dspark_sgl.policies.language import Shape
from dspark_sgl.policies.reader import parse_policy
from dspark_sgl.policies.shape import ShapeChooser, most_nodes

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
    assert bought is not None and bought.max_nodes == 10 and bought.branch == 3
    assert after(2).settle(AUTO) is None, "no more than a chain"


def test_auto_comes_back_to_trees_when_whole_chains_are_verified() -> None:
    chooser = after(1)
    for _ in range(20):
        chooser.learn(BLOCK)
    tree = chooser.settle(AUTO)
    assert tree is not None and tree.max_nodes > BLOCK


def test_the_room_to_reserve_is_that_of_the_largest_tree_named() -> None:
    text = "version: 1\nschedule: {kind: throughput}\nshape: {kind: %s, max_nodes: 8}\nrules:\n"
    rule = "  - when: batch.size < 3\n    set: {shape: {kind: tree, max_nodes: 20}}\n"
    assert most_nodes(parse_policy((text % "auto" + rule).encode(), "a")) == 20
    assert most_nodes(parse_policy((text % "chain" + rule).encode(), "a")) == 20
    assert most_nodes(parse_policy((text % "auto").replace("rules:\n", "").encode(), "a")) == 8
    assert most_nodes(parse_policy((text % "chain").replace("rules:\n", "").encode(), "a")) == 0

"""Chain or tree: what a round drafts, settled before it drafts.

    chain   one token after another
    tree    at most `max_nodes` of the likeliest continuations, at most `branch` after each token
    auto    a tree of up to twice as many drafts as rounds lately verified of a request; a chain where that is no more
            than a block

A tree costs the drafter more than a chain, and costs it whether or not its drafts are verified. So its size follows
what the schedule buys: under light load it grows to `max_nodes`, under heavy load it becomes a chain. Never looks at a
draft.
"""

from dataclasses import replace

from .language import Policy, Shape

HEADROOM = 2.0
"""A schedule can only choose well among more than it buys."""
FOLLOW = 0.2
"""Share of the latest round in what rounds lately verified."""


class ShapeChooser:
    """block: the drafter's deepest path; room: the most drafts of one request that KV is kept for, 0 without trees."""

    def __init__(self, block: int, room: int) -> None:
        self._block, self._room = block, room
        self._verified = float(room)

    def settle(self, said: Shape) -> Shape | None:
        """The tree to draft, or None for chains."""
        if said.kind == "chain" or self._room == 0:
            return None
        size = min(said.max_nodes, self._room)
        if said.kind == "auto":
            size = min(size, round(HEADROOM * self._verified))
            if size <= self._block:
                return None
        return replace(said, max_nodes=size)

    def learn(self, verified: float) -> None:
        """A round verified so many drafts of each request that had any, on average."""
        self._verified += FOLLOW * (verified - self._verified)


def most_nodes(policy: Policy) -> int:
    """The largest tree that the policy or a rule of it asks for; 0 where all are chains."""
    shapes = [policy.shape, *(rule.shape for rule in policy.rules if rule.shape is not None)]
    return max((shape.max_nodes for shape in shapes if shape.kind != "chain"), default=0)

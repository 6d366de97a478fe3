"""Chain or tree: what a round drafts, settled before it drafts.

    chain   one token after another
    tree    at most `max_nodes` of the likeliest continuations, at most `branch` after each token
    auto    a tree of about twice as many drafts as rounds lately verified of a request; a chain where that is no more
            than a block

A tree costs the drafter more than a chain, and costs it whether or not its drafts are verified. So its size follows
what the schedule buys: under light load it grows to `max_nodes`, under heavy load it becomes a chain. And whether it
is worth that at all, only rounds of both kinds on this machine can tell: where they are timed, the kind that brings
more tokens per second at a batch's size is drafted, and the other is tried again now and then.

What a round brought is what its drafts promised, times how promises of its kind have been kept over `LONG_MEMORY`
rounds: eight rounds of one request emit too few tokens to tell kinds apart by a few per cent, and promises alone would
be won by the kind that overrates itself. Both are taken relative to a plain step of as many requests, since batches of
several sizes share a contest. Settling a shape changes nothing; only rounds that were drafted and timed count.
"""

from collections import defaultdict
from dataclasses import dataclass, field, replace

from .language import Policy, Shape

HEADROOM = 2.0
"""A schedule can only choose well among more than it buys."""
FOLLOW = 0.2
"""Share of the latest round in what rounds lately verified."""
TRIAL = 8
"""Rounds of the other kind at a time, and of the first kind before them."""
LAST_WAIT = 1024
"""Rounds of the better kind between two trials, at most; doubled with every trial that changed nothing."""
MEMORY = 64
"""Rounds of one kind after which what one of them brought counts for a third."""
LONG_MEMORY = 512
"""The same, for how promises are kept; as many kept ones are believed in from the start as trials have rounds."""
WARM_UP = 2
"""Rounds of one kind that do not count: the first ones record graphs, or pay for memory."""
MARGIN = 0.02
"""By which the other kind must be better."""


@dataclass
class _Ratio:
    """Of two sums over the latest rounds. memory: rounds after which what one of them brought counts for a third"""

    memory: int
    above: float = 0.0
    below: float = 0.0

    def add(self, above: float, below: float) -> None:
        keep = 1 - 1 / self.memory
        self.above, self.below = keep * self.above + above, keep * self.below + below


@dataclass
class _Kind:
    """Rounds of one kind. worth: tokens over seconds, each as multiples of a plain step's"""

    rounds: int = 0
    worth: _Ratio = field(default_factory=lambda: _Ratio(MEMORY))

    def add(self, tokens: float, seconds: float) -> None:
        self.rounds += 1
        if self.rounds > WARM_UP:
            self.worth.add(tokens, seconds)


@dataclass
class _Contest:
    """Trees against chains, for batches of about one size.

    trees: they are the better ones; rounds: of those since the last trial; wait: until the next; left: of one going on
    """

    of_trees: _Kind = field(default_factory=_Kind)
    of_chains: _Kind = field(default_factory=_Kind)
    trees: bool = True
    rounds: int = 0
    wait: int = TRIAL
    left: int = 0

    @property
    def next_is_tree(self) -> bool:
        return self.trees != (self.left > 0)

    def paid(self, tree: bool, tokens: float, seconds: float) -> None:
        (self.of_trees if tree else self.of_chains).add(tokens, seconds)
        if self.left:
            self.left -= tree != self.trees
        else:
            self.rounds += tree == self.trees
        if self.left:
            return
        self._judge()
        if self.rounds >= self.wait:
            self.rounds, self.left, self.wait = 0, TRIAL, min(2 * self.wait, LAST_WAIT)

    def _judge(self) -> None:
        mine, other = (self.of_trees, self.of_chains) if self.trees else (self.of_chains, self.of_trees)
        if min(mine.rounds, other.rounds) < TRIAL:
            return
        if other.worth.above * mine.worth.below > (1 + MARGIN) * mine.worth.above * other.worth.below:
            self.trees, self.rounds, self.wait = not self.trees, 0, TRIAL


class ShapeChooser:
    """block: the drafter's deepest path; room: the most drafts of one request that KV is kept for, 0 without trees."""

    def __init__(self, block: int, room: int) -> None:
        self._block, self._room = block, room
        self._verified = float(room)
        self._contests: defaultdict[int, _Contest] = defaultdict(_Contest)
        self._kept = {tree: _Ratio(LONG_MEMORY, TRIAL, TRIAL) for tree in (True, False)}

    def settle(self, said: Shape, requests: int | None = None) -> Shape | None:
        """The tree to draft, or None for chains. requests: of the batch, where rounds are timed"""
        if said.kind == "chain" or self._room == 0:
            return None
        size = min(said.max_nodes, self._room)
        if said.kind == "auto":
            size = min(size, round(HEADROOM * self._verified))
            if size <= self._block or (requests is not None and not self._contest(requests).next_is_tree):
                return None
            # A GPU records what follows a draft pass for every size of tree, and keeps the memory: few of them.
            size = min(said.max_nodes, self._room, 1 << (size - 1).bit_length())
        return replace(said, max_nodes=size)

    def learn(self, verified: float) -> None:
        """A round verified so many drafts of each request that had any, on average."""
        self._verified += FOLLOW * (verified - self._verified)

    def paid(self, tree: bool, requests: int, promised: float, emitted: float, seconds: float) -> None:
        """A round that drafted trees, or chains, for so many requests.

        promised, emitted: tokens, as survival said and as it came, and seconds: all in multiples of a plain step's
        """
        kept = self._kept[tree]
        kept.add(emitted, promised)
        self._contest(requests).paid(tree, promised * kept.above / kept.below, seconds)

    def _contest(self, requests: int) -> _Contest:
        """Of batches up to the next power of two, which is also as many as a GPU records graphs for."""
        return self._contests[(requests - 1).bit_length()]


def most_nodes(policy: Policy) -> int:
    """The largest tree that the policy or a rule of it asks for; 0 where all are chains."""
    shapes = [policy.shape, *(rule.shape for rule in policy.rules if rule.shape is not None)]
    return max((shape.max_nodes for shape in shapes if shape.kind != "chain"), default=0)

"""Chain or tree: what a round drafts, settled before it drafts.

    chain   one token after another
    tree    at most `max_nodes` of the likeliest continuations, at most `branch` after each token
    auto    a tree of up to twice as many drafts as rounds lately verified of a request; a chain where that is no more
            than a block

A tree costs the drafter more than a chain, and costs it whether or not its drafts are verified. So its size follows
what the schedule buys: under light load it grows to `max_nodes`, under heavy load it becomes a chain. And whether it
is worth that at all, only rounds of both kinds on this machine can tell: where they are timed, the kind that brings
more tokens per second at a batch's size is drafted, and the other is tried again now and then. Never looks at a draft.
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
WARM_UP = 2
"""Rounds of one kind that do not count: the first ones record graphs, or pay for memory."""
MARGIN = 0.02
"""By which the other kind must be better."""


@dataclass
class _Yield:
    """Tokens and seconds of the latest rounds of one kind."""

    rounds: int = 0
    tokens: float = 0.0
    seconds: float = 0.0

    def add(self, tokens: float, seconds: float) -> None:
        keep = 1 - 1 / MEMORY
        self.rounds += 1
        if self.rounds > WARM_UP:
            self.tokens, self.seconds = keep * self.tokens + tokens, keep * self.seconds + seconds


@dataclass
class _Contest:
    """Trees against chains, for batches of about one size. of_trees, of_chains: what they have brought

    trees: they are the better ones; rounds: since the last trial; wait: until the next; left: of the one that goes on
    """

    of_trees: _Yield = field(default_factory=_Yield)
    of_chains: _Yield = field(default_factory=_Yield)
    trees: bool = True
    rounds: int = 0
    wait: int = TRIAL
    left: int = 0

    def next(self) -> bool:
        """Whether the next round drafts trees."""
        if self.left:
            self.left -= 1
            return not self.trees
        self._judge()
        self.rounds += 1
        if self.rounds <= self.wait:
            return self.trees
        self.rounds, self.left, self.wait = 0, TRIAL - 1, min(2 * self.wait, LAST_WAIT)
        return not self.trees

    def _judge(self) -> None:
        mine, other = (self.of_trees, self.of_chains) if self.trees else (self.of_chains, self.of_trees)
        # Rounds may still be on their way: half a trial is enough.
        if min(mine.rounds, other.rounds) < TRIAL // 2:
            return
        if other.tokens * mine.seconds > (1 + MARGIN) * mine.tokens * other.seconds:
            self.trees, self.wait = not self.trees, TRIAL


class ShapeChooser:
    """block: the drafter's deepest path; room: the most drafts of one request that KV is kept for, 0 without trees."""

    def __init__(self, block: int, room: int) -> None:
        self._block, self._room = block, room
        self._verified = float(room)
        self._contests: defaultdict[int, _Contest] = defaultdict(_Contest)

    def settle(self, said: Shape, requests: int | None = None) -> Shape | None:
        """The tree to draft, or None for chains. requests: of the batch, where rounds are timed"""
        if said.kind == "chain" or self._room == 0:
            return None
        size = min(said.max_nodes, self._room)
        if said.kind == "auto":
            size = min(size, round(HEADROOM * self._verified))
            if size <= self._block or (requests is not None and not self._contest(requests).next()):
                return None
        return replace(said, max_nodes=size)

    def learn(self, verified: float) -> None:
        """A round verified so many drafts of each request that had any, on average."""
        self._verified += FOLLOW * (verified - self._verified)

    def paid(self, tree: bool, requests: int, tokens: float, seconds: float) -> None:
        """A round that drafted trees, or chains, for so many requests brought so many tokens and took so long."""
        contest = self._contest(requests)
        (contest.of_trees if tree else contest.of_chains).add(tokens, seconds)

    def _contest(self, requests: int) -> _Contest:
        """Of batches up to the next power of two, which is also as many as a GPU records graphs for."""
        return self._contests[(requests - 1).bit_length()]


def most_nodes(policy: Policy) -> int:
    """The largest tree that the policy or a rule of it asks for; 0 where all are chains."""
    shapes = [policy.shape, *(rule.shape for rule in policy.rules if rule.shape is not None)]
    return max((shape.max_nodes for shape in shapes if shape.kind != "chain"), default=0)

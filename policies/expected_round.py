"""A round without a draft model: what the governor decides where only the chances of drafts are known.

For the simulator and for `explain`. Never draws anything.
"""

from dataclasses import dataclass

from .batch import Batch, Bools, Floats, Ints, Scheduler
from .expected_tree import ExpectedDrafts, before_drafting
from .language import Shape
from .shape import ShapeChooser


@dataclass(frozen=True)
class ExpectedRound:
    """What is drafted for the n requests of a batch.

    tree: None for chains; survival: float64 `[n, N]`, and depth: int64 `[n, N]`, None for chains, of its nodes
    drafted: int64 `[n]`, how deep; all 0 is a plain step
    """

    tree: Shape | None
    survival: Floats
    depth: Ints | None
    drafted: Ints

    @property
    def plain(self) -> bool:
        return not self.drafted.any()

    def select(self, scheduler: Scheduler, batch: Batch) -> Bools:
        """bool `[n, N]`: what is verified."""
        return scheduler.select(batch.within(self.drafted), self.survival, self.depth)


class ExpectedRounds:
    """Rounds of requests of K kinds.

    survival: float64 `[K, D]`, of chains; side: as in `expected_trees`
    block: the drafter's deepest path; room: the largest tree there will be, 0 without trees
    """

    def __init__(self, survival: Floats, side: float, block: int, room: int) -> None:
        self._drafts = ExpectedDrafts(survival, side, room)
        self._shape = ShapeChooser(block, room)

    def plan(self, scheduler: Scheduler, batch: Batch, shape: Shape, kinds: Ints) -> ExpectedRound:
        """The next round. kinds: int64 `[n]`, of the requests"""
        tree = self._shape.settle(shape)
        survival, depth = self._drafts.of(tree)
        survival, depth = survival[kinds], None if depth is None else depth[kinds]
        return ExpectedRound(tree, survival, depth, scheduler.draft_depths(batch, *before_drafting(survival, depth)))

    def learn(self, verified: float) -> None:
        """A round verified so many drafts of each request that had any, on average."""
        self._shape.learn(verified)

"""The tree that a drafter is expected to grow where only its chances are known: for the simulator and for `explain`.

    chance(likeliest child at depth k)  = a_k
    chance(any further child)           = side * (1 - chances of its elder siblings), never above the elder one's
    survival(v)                         = survival(parent(v)) chance(v | parent(v))

A real tree differs from request to request and knows its own tokens; this one is what they come to on average. A branch
that begins with a second choice is taken to go on as well as any other. Never sees a draft.
"""

from heapq import heappop, heappush

import numpy as np

from .batch import Bools, Floats, Ints
from .language import Shape


class ExpectedDrafts:
    """What is drafted for requests of K kinds: a chain, or the tree of a shape.

    survival: float64 `[K, D]`, of the chain; side: as in `expected_trees`; room: the largest tree there will be
    """

    def __init__(self, survival: Floats, side: float, room: int) -> None:
        self._chain, self._side, self._room = survival, side, room
        self._grown: dict[int, tuple[Floats, Ints]] = {}

    def of(self, tree: Shape | None) -> tuple[Floats, Ints | None]:
        """Survival and depth `[K, N]`; no depth for chains."""
        if tree is None:
            return self._chain, None
        if tree.branch not in self._grown:
            self._grown[tree.branch] = expected_trees(self._chain, self._side, self._room, tree.branch)
        survival, depth = self._grown[tree.branch]
        return survival[:, : tree.max_nodes], depth[:, : tree.max_nodes]


def expected_trees(survival: Floats, side: float, nodes: int, branch: int) -> tuple[Floats, Ints]:
    """The best nodes of one tree per kind of request: their survival float64 `[K, nodes]` in falling order, parents
    before their children, and their depth int64 `[K, nodes]`, 0 where there is no node. The first m are the tree of m.

    survival: float64 `[K, D]`, of a chain of likeliest drafts; side: 0 where a second choice is never right
    branch: most children of a node
    """
    before = np.concatenate([np.ones((len(survival), 1)), survival[:, :-1]], axis=1)
    conditional = np.divide(survival, before, out=np.zeros_like(survival), where=before > 0)
    best, depth = np.zeros((len(survival), nodes)), np.zeros((len(survival), nodes), dtype=np.int64)
    for kind, likeliest in enumerate(conditional.tolist()):
        for node, (own, level) in enumerate(_best_first(likeliest, side, nodes, branch)):
            best[kind, node], depth[kind, node] = own, level
    return best, depth


def _best_first(likeliest: list[float], side: float, nodes: int, branch: int) -> list[tuple[float, int]]:
    """Survival and depth of the best nodes. likeliest: a_1, a_2, .."""
    found: list[tuple[float, int]] = []
    # Not yet taken, the best first: -survival, depth, the parent's survival, own chance, what siblings leave, rank.
    heap: list[tuple[float, int, float, float, float, int]] = []

    def offer(parent: float, depth: int, chance: float, left: float, rank: int) -> None:
        if parent * chance > 0 and rank < branch:
            heappush(heap, (-parent * chance, depth, parent, chance, left - chance, rank))

    if likeliest:
        offer(1.0, 1, likeliest[0], 1.0, 0)
    while heap and len(found) < nodes:
        negative, depth, parent, chance, left, rank = heappop(heap)
        found.append((-negative, depth))
        offer(parent, depth, min(chance, side * left), left, rank + 1)
        if depth < len(likeliest):
            offer(-negative, depth + 1, likeliest[depth], 1.0, 0)
    return found


def before_drafting(survival: Floats, depth: Ints | None) -> tuple[Floats, Ints | None]:
    """What a server expects of drafts before it has them: of a tree, its best nodes on average, at unknown depths.

    survival, depth: `[n, N]`; no depth for chains
    """
    if depth is None:
        return survival, None
    return np.broadcast_to(survival.mean(0), survival.shape), np.ones_like(depth)


def path_chances(survival: Floats, depth: Ints, kept: Bools, block: int) -> Floats:
    """float64 `[n, block]`: that a round which verifies the kept nodes accepts a path of k drafts or more, k = 1, 2, ..

    Siblings exclude each other, so the chances of all kept nodes of one depth add up.
    """
    kept_survival = np.where(kept, survival, 0.0)
    return np.stack([np.where(depth == k, kept_survival, 0.0).sum(1) for k in range(1, block + 1)], axis=1)

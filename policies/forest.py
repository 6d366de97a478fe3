"""What was drafted for a batch, as policies see it: of every draft its parent and its depth, and what became of it.

A chain is a tree whose every draft follows the one before. Never knows a token.
"""

from dataclasses import dataclass

import numpy as np

from .batch import Bools, Floats, Ints

NOTHING = -1


@dataclass(frozen=True)
class Forest:
    """One tree per request, parents before their children.

    parents: int64 `[n, N]`: 0 = the anchor, `m + 1` = draft `m`, `NOTHING` = no draft
    depth: int64 `[n, N]`: 1 for children of the anchor, 0 where there is no draft
    """

    parents: Ints
    depth: Ints
    is_chain: bool

    @classmethod
    def chains(cls, requests: int, depth: int) -> "Forest":
        places = np.broadcast_to(np.arange(depth), (requests, depth))
        return cls(places, places + 1, True)

    @classmethod
    def trees(cls, parents: Ints) -> "Forest":
        depth = np.zeros((len(parents), parents.shape[1] + 1), dtype=np.int64)
        exists = parents != NOTHING
        for level in range(1, parents.shape[1] + 1):
            # After each pass one more level knows its depth.
            deeper = (np.take_along_axis(depth, parents.clip(min=0), axis=1) + 1) * exists
            if deeper.max(initial=0) < level:
                break
            depth[:, 1:] = deeper
        return cls(parents, depth[:, 1:], False)

    def survival(self, conditional: Floats) -> Floats:
        """float64 `[n, N]`: of a draft and all above it. conditional: `[n, N]`, given that its parent survives"""
        if self.is_chain:
            return np.cumprod(conditional, axis=1, dtype=np.float64)
        whole = np.ones((len(conditional), conditional.shape[1] + 1))
        exists, up = self.parents != NOTHING, self.parents.clip(min=0)
        for _ in range(int(self.depth.max(initial=0))):  # after each pass one more level is right
            whole[:, 1:] = np.where(exists, conditional * np.take_along_axis(whole, up, axis=1), 0.0)
        return np.where(exists, whole[:, 1:], 0.0)

    def closed(self, wanted: Bools) -> Bools:
        """bool `[n, N]`: the wanted drafts whose every ancestor is wanted."""
        return self.survival(wanted.astype(np.float64)) > 0

    def on_path(self, verified: Bools, path: Ints) -> Bools:
        """bool `[n, N]`: the drafts that were accepted.

        path: int64 `[n, P]`, accepted rows of each request, where row 0 is the anchor and row k the k-th verified
        draft; negative after the end
        """
        row = np.where(verified, verified.cumsum(1), 0)
        accepted = np.zeros((len(path), max(row.max(initial=0), path.max(initial=0)) + 1), dtype=bool)
        np.put_along_axis(accepted, path.clip(min=0), True, axis=1)
        accepted[:, 0] = False  # the anchor, and where there is no row
        found: Bools = np.take_along_axis(accepted, row, axis=1)
        return found

    def tested(self, verified: Bools, on_path: Bools) -> Bools:
        """bool `[n, N]`: the verified drafts whose parent was accepted: the target chose for or against them."""
        survived = np.concatenate([np.ones((len(on_path), 1), dtype=bool), on_path], axis=1)
        tested: Bools = verified & np.take_along_axis(survived, self.parents.clip(min=0), axis=1)
        return tested

    def ranks(self, on_path: Bools) -> list[list[int]]:
        """Each accepted draft's place among its siblings, from the anchor down."""
        found = []
        for parents, path in zip(self.parents, on_path, strict=True):
            drafts = np.flatnonzero(path)
            found.append([int((parents[:draft] == parents[draft]).sum()) for draft in drafts])
        return found

"""What the host sees of a proposal: asked of the device as soon as it is drafted, waited for when somebody looks.

Decides nothing.
"""

from __future__ import annotations

from functools import cached_property

from torch import Tensor

from dspark_sgl.kernels.staging import Fetched
from dspark_sgl.policies.batch import Bools, Floats
from dspark_sgl.policies.forest import Forest
from dspark_sgl.spec_algos.protocol import Proposal


class Seen:
    """A `Proposal`, as policies take it."""

    def __init__(self, proposal: Proposal) -> None:
        self.shape = proposal.tokens.shape
        self._parents = _fetched(proposal.parents)
        self._confidence = _fetched(proposal.confidence)
        self._unsound = _fetched(proposal.unsound)

    @cached_property
    def parents(self) -> Tensor | None:
        """int64 `[bs, N]`, or None of chains."""
        return None if self._parents is None else self._parents.get()

    @property
    def drafts(self) -> tuple[Forest, Floats | None, Bools | None]:
        """What `Governor.select` chooses among: the drafts, float64 `[bs, N]` their confidence, and bool `[bs, N]`
        which of them are unsound."""
        confidence = None if self._confidence is None else self._confidence.get().double().numpy()
        return self._forest, confidence, None if self._unsound is None else self._unsound.get().numpy()

    @property
    def _forest(self) -> Forest:
        return Forest.chains(*self.shape) if self.parents is None else Forest.trees(self.parents.numpy())


def _fetched(tensor: Tensor | None) -> Fetched | None:
    return None if tensor is None else Fetched(tensor)

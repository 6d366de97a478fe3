"""A drafter as somebody else would write it: repeats what followed the last two tokens when they came before."""

from typing import ClassVar

import torch

from dspark_sgl.spec_algos.protocol import Drafter, Proposal, Round


class RepeatDrafter(Drafter):
    """Prompt look-up; no weights, no target hidden states."""

    algorithm: ClassVar[str] = "REPEAT_SGL"

    @property
    def block(self) -> int:
        return 4

    def propose(self, round: Round) -> Proposal:
        rows = [self._continuation(history.tail(256)) for history in round.histories]
        return Proposal(torch.tensor(rows, device=round.anchors.device))

    def _continuation(self, tokens: list[int]) -> list[int]:
        for start in range(len(tokens) - 3, -1, -1):
            if tokens[start : start + 2] == tokens[-2:]:
                found = tokens[start + 2 : start + 2 + self.block]
                return found + [0] * (self.block - len(found))
        return [0] * self.block


class BranchingDrafter(RepeatDrafter):
    """The same, in every other round as a tree: a wrong branch first, so that an accepted path has to be compacted."""

    algorithm: ClassVar[str] = "BRANCH_SGL"
    _as_tree = False

    @property
    def max_nodes(self) -> int:
        return self.block + 1

    def propose(self, round: Round) -> Proposal:
        chain = super().propose(round).tokens
        self._as_tree = not self._as_tree
        if not self._as_tree:
            return Proposal(chain)
        wrong = torch.full_like(chain[:, :1], 7)
        parents = torch.tensor([0, 0, 2, 3, 4], device=chain.device).expand(len(chain), -1)
        return Proposal(torch.cat([wrong, chain], dim=1), parents)

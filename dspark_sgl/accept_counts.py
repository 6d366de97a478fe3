"""What verify rounds accepted, counted: accepted length, and acceptance by position. Plain numbers, no server.

Lengths count the bonus token. The last round of an answer counts whole, also where the answer ends inside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .recorder import RecordedRound


@dataclass(frozen=True)
class Share:
    """So many of so many."""

    part: int
    whole: int

    @property
    def value(self) -> float | None:
        return self.part / self.whole if self.whole else None


@dataclass(frozen=True)
class Branches:
    """What the branches of trees were good for.

    nodes: drafts verified, mean per round
    side: places where the likeliest child was not what the target chose, and another child was
    after_first, after_side: accepted drafts, likeliest child or not, with a child that was accepted, of those with any
    """

    nodes: float
    side: Share
    after_first: Share
    after_side: Share

    @classmethod
    def of(cls, rounds: Iterable[RecordedRound]) -> Branches | None:
        """None where no round was a tree."""
        trees = [(r.nodes, r.offered, r.ranks) for r in rounds if r.nodes is not None and r.ranks is not None]
        if not trees:
            return None
        sides = sum(rank > 0 for _, _, ranks in trees for rank in ranks)
        missed = sum(len(ranks) < offered for _, offered, ranks in trees)
        # Draft k was followed by another that was put to the test where k + 1 were offered.
        followed = [(ranks[k] > 0, k + 1 < len(ranks)) for _, n, ranks in trees for k in range(min(len(ranks), n - 1))]
        first, side = ([further for was_side, further in followed if was_side == which] for which in (False, True))
        return cls(
            nodes=sum(nodes for nodes, _, _ in trees) / len(trees),
            side=Share(sides, sides + missed),
            after_first=Share(sum(first), len(first)),
            after_side=Share(sum(side), len(side)),
        )

    def entry(self) -> dict[str, Any]:
        return {
            "nodes": self.nodes,
            "side_accepted": self.side.value,
            "continued_after_first": self.after_first.value,
            "continued_after_side": self.after_side.value,
        }


@dataclass(frozen=True)
class AcceptCounts:
    """rounds: of one request each; tokens: they emitted; reached, accepted: `[D]`, drafts by position

    Draft k was reached where k or more were offered and those before it were accepted. branches: None without trees
    """

    rounds: int
    tokens: int
    reached: tuple[int, ...]
    accepted: tuple[int, ...]
    branches: Branches | None

    @classmethod
    def of(cls, rounds: Iterable[RecordedRound]) -> AcceptCounts:
        found = list(rounds)
        depth = range(1, 1 + max((r.offered for r in found), default=0))
        return cls(
            rounds=len(found),
            tokens=sum(r.accepted + 1 for r in found),
            reached=tuple(sum(r.offered >= k and r.accepted >= k - 1 for r in found) for k in depth),
            accepted=tuple(sum(r.accepted >= k for r in found) for k in depth),
            branches=Branches.of(found),
        )

    @property
    def accepted_length(self) -> float | None:
        return self.tokens / self.rounds if self.rounds else None

    @property
    def by_position(self) -> list[float | None]:
        """Share of draft k accepted where it was reached."""
        return [a / r if r else None for a, r in zip(self.accepted, self.reached, strict=True)]

    def entry(self) -> dict[str, Any]:
        return {
            "accepted_length": self.accepted_length,
            "rounds": self.rounds,
            "tokens": self.tokens,
            "acceptance_by_position": self.by_position,
            "reached_by_position": list(self.reached),
            **({} if self.branches is None else {"tree": self.branches.entry()}),
        }


def by_domain(domains: Mapping[str, Iterable[RecordedRound]]) -> dict[str, Any]:
    """`overall`, `domains` and `macro`, the mean of the domains' accepted lengths."""
    counted = {name: AcceptCounts.of(rounds) for name, rounds in domains.items()}
    lengths = [a.accepted_length for a in counted.values() if a.accepted_length is not None]
    return {
        "overall": AcceptCounts.of(r for rounds in domains.values() for r in rounds).entry(),
        "domains": {name: found.entry() for name, found in counted.items()},
        "macro": sum(lengths) / len(lengths) if lengths else None,
    }

"""What verify rounds accepted, counted: accepted length, and acceptance by position. Plain numbers, no server.

Lengths count the bonus token. The last round of an answer counts whole, also where the answer ends inside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .recorder import RecordedRound


@dataclass(frozen=True)
class Acceptance:
    """rounds: of one request each; tokens: they emitted; reached, accepted: `[D]`, drafts by position

    Draft k was reached where k or more were offered and those before it were accepted.
    """

    rounds: int
    tokens: int
    reached: tuple[int, ...]
    accepted: tuple[int, ...]

    @classmethod
    def of(cls, rounds: Iterable[RecordedRound]) -> Acceptance:
        found = list(rounds)
        depth = range(1, 1 + max((r.offered for r in found), default=0))
        return cls(
            rounds=len(found),
            tokens=sum(r.accepted + 1 for r in found),
            reached=tuple(sum(r.offered >= k and r.accepted >= k - 1 for r in found) for k in depth),
            accepted=tuple(sum(r.accepted >= k for r in found) for k in depth),
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
        }


def by_domain(domains: Mapping[str, Iterable[RecordedRound]]) -> dict[str, Any]:
    """`overall`, `domains` and `macro`, the mean of the domains' accepted lengths."""
    counted = {name: Acceptance.of(rounds) for name, rounds in domains.items()}
    lengths = [a.accepted_length for a in counted.values() if a.accepted_length is not None]
    return {
        "overall": Acceptance.of(r for rounds in domains.values() for r in rounds).entry(),
        "domains": {name: found.entry() for name, found in counted.items()},
        "macro": sum(lengths) / len(lengths) if lengths else None,
    }

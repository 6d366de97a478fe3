"""What a scheduler may do with one request: everybody's bounds, folded into one."""

from dataclasses import dataclass

from .language import Depth, Tier


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """Bounds on a request's depth in a round that speculates, and what its tokens count in the objective."""

    max_depth: int
    min_depth: int = 0
    weight: float = 1.0


def fold(depth: Depth, tier: Tier, asked: int | None, block: int) -> RequestLimits:
    """The tightest maximum of all, the largest minimum under it: a maximum always beats a minimum.

    `depth`: the policy's bounds with the rule's. `asked`: the request's own max_depth. `block`: the drafter's.
    """
    most = min(limit for limit in (depth.max, tier.max_depth, asked, block) if limit is not None)
    return RequestLimits(most, min(max(depth.min or 0, tier.min_depth), most), tier.weight)

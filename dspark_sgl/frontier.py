"""What an arm of `bench load` can do at all: its frontier of throughput against speed for one user, in two figures.

    T(v) = the most output tokens per second at which every user still gets v
    area = integral of T(v) dv
    speed at matched throughput = the v at which T(v) is what another arm makes

Between two loads that were measured the frontier is taken to be straight; where one load is worse in both figures than
another it is not part of it. Draws and measures nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MEANING = (
    "Over {first}: the area under the frontier of throughput against speed for one user, and the speed for one user "
    "where both make the tokens per second that {first} makes with so many users."
)


@dataclass(frozen=True)
class Frontier:
    """Ascending speeds for one user, and the throughput at each, which falls."""

    speeds: tuple[float, ...]
    throughputs: tuple[float, ...]

    @classmethod
    def of(cls, points: Sequence[dict[str, Any]]) -> Frontier:
        """Of one arm's points of a report."""
        best: list[tuple[float, float]] = []
        for speed, throughput in sorted(((p["tps_per_user"], p["output_tps"]) for p in points), reverse=True):
            if not best or throughput > best[-1][1]:
                best.append((speed, throughput))
        speeds, throughputs = zip(*reversed(best), strict=True)
        return cls(speeds, throughputs)

    @property
    def area(self) -> float:
        """Slower users than those of the heaviest load get no more throughput, faster ones than the fastest none."""
        return float(np.trapezoid((self.throughputs[0], *self.throughputs), (0.0, *self.speeds)))

    def speed_at(self, throughput: float) -> float | None:
        """What a user gets where the arm makes so many tokens per second; None where it cannot."""
        if throughput > self.throughputs[0]:
            return None
        return float(np.interp(-throughput, [-t for t in self.throughputs], self.speeds))


def compare(points: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of every arm: `area`, over that of the first arm; `matched`, its speed for a user over the first arm's at the
    throughput of each of the first arm's loads, None where it cannot make as much."""
    arms = list(dict.fromkeys(point["arm"] for point in points))
    mine = {arm: [point for point in points if point["arm"] == arm] for arm in arms}
    frontiers = {arm: Frontier.of(mine[arm]) for arm in arms}
    first = arms[0]
    return {
        arm: {
            "area": frontier.area / frontiers[first].area,
            "matched": [_ratio(frontier, point) for point in mine[first]],
        }
        for arm, frontier in frontiers.items()
    }


def _ratio(frontier: Frontier, point: dict[str, Any]) -> float | None:
    speed = frontier.speed_at(point["output_tps"])
    return None if speed is None else speed / point["tps_per_user"]

"""What a decode step costs in seconds, as a function of its requests, the rows verified and the context.

    plain(n, C)       = p g_plain(n) (P(n) + s C)
    round(n, d, m, C) = p g_round(m) (D(n, d) + V(m) + (s_draft + s_verify) C)

for n requests that are drafted d deep, of which m rows are verified. P, D and V are piecewise linear and never fall; C
is the KV tokens of the batch, and s are seconds for one of them.
A profile (`CostPoint`) gives all of them. The factors follow what steps really take, so engine overhead, clocks and
neighbours are in them. The pace p is the machine's: a surprise among steps of one kind is mostly its doing, and a kind
that has not been seen for long is priced at it too. The g tell the kinds apart: there goes what the second and third
step after a change of kind agree on. The first one pays for memory that went back to the system meanwhile, up to twice
its price: it is not counted. One slow step alone is not believed, since the pace would hide what it did to a g. Nothing
here reads a clock, and a model that knows nothing says so (`ready`).
"""

import json
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from .batch import Floats, Ints

VERSION = 3

FOLLOW = 0.1
"""Share of a surprise that the factors take over per step: half of a lasting change within seven steps."""
MOST = 0.25
"""The largest surprise, in logarithm, that one step may claim: a step ten times too slow moves the pace by 2.5 %."""
TELLING = (2, 3)
"""The steps after a change of kind, that one included, whose surprise tells the kinds apart."""
TELL, MOST_TOLD = 0.5, 0.7
"""Share of what both of them say that the kind takes over, and the most they may say: such steps are rare."""
DISTURBED = 0.3
"""From here on a `disturbance` is not chance: on a quiet machine it is a tenth."""
OWN = 0.25
"""Of a surprise within a kind, what goes to its size and not to the pace."""
POWERS = 32
"""Sizes are told apart by their power of two."""
ENOUGH = 20
"""Steps of each kind that stand in for a profile."""


@dataclass(frozen=True)
class CostPoint:
    """One measurement. rows: of the target's forward; of a draft, requests times depth
    context: KV tokens summed over the batch
    """

    kind: str
    requests: int
    rows: int
    context: int
    seconds: float

    def is_part_of(self, other: "CostPoint") -> bool:
        """Whether the other step does all that this one does: it must take as long at least."""
        mine, its = ((point.requests, point.rows, point.context) for point in (self, other))
        return self.kind == other.kind and all(m <= i for m, i in zip(mine, its, strict=True))


def disturbance(points: Iterable[CostPoint]) -> float:
    """The most by which a smaller step was measured slower than a larger one, 0 for none: other work's doing.

    Drafting, which may take next to nothing, is not looked at.
    """
    steps = [point for point in points if point.kind != "draft"]
    pairs = ((small, large) for small in steps for large in steps if small.is_part_of(large))
    return max((small.seconds / large.seconds for small, large in pairs), default=1.0) - 1


@dataclass(frozen=True)
class Curve:
    """Seconds over one size, piecewise linear and never falling, plus seconds per KV token."""

    sizes: Floats
    seconds: Floats
    per_token: float

    def at(self, size: Floats, context: int) -> Floats:
        """Between the points as they say; beyond the last, on along the last slope, or along the mean one where the
        last is less: two noisy points that were pooled would make rows free."""
        inside = np.interp(size, self.sizes, self.seconds)
        if len(self.sizes) > 1:
            rise, run = self.seconds[-1] - self.seconds, self.sizes[-1] - self.sizes
            slope = max(rise[0] / run[0], rise[-2] / run[-2])
            inside = inside + slope * np.maximum(size - self.sizes[-1], 0)
        return inside + self.per_token * context

    @classmethod
    def fit(cls, points: Sequence[tuple[float, int, float]]) -> "Curve":
        """points: (size, context, seconds)."""
        per_token = _per_token(points)
        by_size: defaultdict[float, list[float]] = defaultdict(list)
        for size, context, seconds in points:
            by_size[size].append(seconds - per_token * context)
        sizes = sorted(by_size)
        medians = [float(np.median(by_size[size])) for size in sizes]
        weights = [len(by_size[size]) for size in sizes]
        smallest = min(seconds for _, _, seconds in points)
        return cls(np.array(sizes), np.maximum(_never_falling(medians, weights), 0.1 * smallest), per_token)


class CostModel:
    """Seconds of a step: a profile, times what has been learned since.

    source: `profiled` (measured by this process), `cached` (by an earlier one), `online` (learned only), `none`
    """

    def __init__(self, points: Iterable[CostPoint] = (), source: str = "none") -> None:
        self._factors = {kind: _Factor() for kind in ("plain", "round", "tree")}
        self._pace = 0.0
        self._latest: str | None = None
        self._run = TELLING[-1]  # steps of the latest kind in a row
        self._told = 0.0
        self._gathered: dict[str, list[CostPoint]] = {"plain": [], "verify": []}
        self._adopt(tuple(points), source)

    def _adopt(self, points: tuple[CostPoint, ...], source: str) -> None:
        self.points = points
        self.source = source if points else "none"
        sized: defaultdict[str, list[tuple[float, int, float]]] = defaultdict(list)
        drafts: defaultdict[int, list[tuple[float, int, float]]] = defaultdict(list)
        for point in self.points:
            size = point.rows if point.kind == "verify" else point.requests
            found = drafts[point.rows // point.requests] if point.kind == "draft" else sized[point.kind]
            found.append((float(size), point.context, point.seconds))
        self._curves = {kind: Curve.fit(sized[kind]) for kind in sized}
        self._drafts = {depth: Curve.fit(drafts[depth]) for depth in sorted(drafts)}

    @property
    def ready(self) -> bool:
        """Whether both a plain step and a round can be priced."""
        return bool(self._drafts) and all(kind in self._curves for kind in ("plain", "verify"))

    def plain_seconds(self, requests: int, context: int) -> float:
        """A step in which nothing is drafted."""
        size = np.array([float(requests)])
        return float((self._curves["plain"].at(size, context) * self._factor("plain", size))[0])

    def draft_seconds(self, requests: int, depths: Ints, context: int) -> Floats:
        """Drafting everybody so deep, as the profile has it."""
        size = np.array([float(requests)])
        known = [float(curve.at(size, context)[0]) for curve in self._drafts.values()]
        seconds: Floats = np.interp(depths, list(self._drafts), np.maximum.accumulate(known))
        return seconds

    def round_seconds(
        self, requests: int, rows: Ints, context: int, depth: Ints | int | None = None, kind: str = "round"
    ) -> Floats:
        """Rounds that verify so many rows, anchors included; the draft pass is part of them.

        depth: how deep they draft everybody, None for the whole block; of any shape that goes with that of `rows`
        kind: `tree` where they draft trees, which the profile prices as chains, and rounds then tell apart
        """
        deep = max(self._drafts) if depth is None else depth
        draft = self.draft_seconds(requests, np.asarray(deep), context)
        size = rows.astype(np.float64)
        return (draft + self._curves["verify"].at(size, context)) * self._factor(kind, size)

    def step_seconds(self, kind: str, requests: int, rows: int, context: int, depth: int | None) -> float:
        """A step of any kind, as in `observe`."""
        if kind == "plain":
            return self.plain_seconds(requests, context)
        return float(self.round_seconds(requests, np.array([rows]), context, depth, kind)[0])

    def _factor(self, kind: str, size: Floats) -> Floats:
        whole: Floats = np.exp(self._pace + self._factors[kind].at(size))
        return whole

    def observe(
        self, kind: str, requests: int, rows: int, context: int, seconds: float, depth: int | None = None
    ) -> None:
        """A step as it was: `plain`, or a `round` or `tree` with its draft pass and all around it; depth: as above"""
        if not self.ready:
            self._gather(kind, requests, rows, context, seconds)
            return
        size, expected = rows, self.step_seconds(kind, requests, rows, context, depth)
        surprise = math.log(max(seconds / expected, 1e-9))
        changed = self._latest not in (None, kind)
        self._latest, self._run = kind, 1 if changed else self._run + 1
        if self._run > TELLING[-1]:
            surprise = min(max(surprise, -MOST), MOST)
            self._pace += (1 - OWN) * FOLLOW * surprise
            self._factors[kind].learn(size, OWN * FOLLOW * surprise)
        elif self._run == TELLING[0]:
            self._told = surprise
        elif self._run == TELLING[1]:
            self._factors[kind].shift(TELL * _agreed(self._told, surprise))

    def _gather(self, kind: str, requests: int, rows: int, context: int, seconds: float) -> None:
        """Without a profile the first steps become the points; a round is priced whole, its draft as part of it."""
        name = "plain" if kind == "plain" else "verify"
        points = self._gathered[name]
        points.append(CostPoint(name, requests, rows, context, seconds))
        del points[: -4 * ENOUGH]
        if all(len(points) >= ENOUGH for points in self._gathered.values()):
            free = CostPoint("draft", 1, 1, 0, 0.0)
            self._adopt((*self._gathered["plain"], *self._gathered["verify"], free), "online")

    # -- On disk ----

    @classmethod
    def from_points(cls, points: Iterable[CostPoint]) -> "CostModel":
        """A model from a profile of this process."""
        return cls(points, "profiled")

    @classmethod
    def load(cls, file: Path) -> "CostModel | None":
        """The model an earlier process saved; None when the file is not one that this version reads."""
        try:
            saved = json.loads(file.read_text())
            if saved["version"] != VERSION or not isinstance(saved.get("about") or {}, dict):
                return None
            points = [CostPoint(**point) for point in saved["points"]]
            return cls(points, "cached") if all(map(_sound, points)) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def save(self, file: Path, about: dict[str, object]) -> None:
        """about: what was measured, for whoever reads the file. OSError where it cannot be written."""
        file.parent.mkdir(parents=True, exist_ok=True)
        content = {"version": VERSION, "about": about, "points": [asdict(point) for point in self.points]}
        new = file.with_suffix(f".{os.getpid()}.new")  # replicas that start at once save the same file
        new.write_text(json.dumps(content, indent=1))
        new.replace(file)


def _sound(point: CostPoint) -> bool:
    """Whether it can have been measured."""
    counts, seconds = (point.requests, point.rows, point.context), point.seconds
    if point.kind not in ("plain", "draft", "verify") or not all(type(count) is int for count in counts):
        return False
    least = point.requests >= 1 and point.rows >= point.requests and point.context >= 0
    return least and isinstance(seconds, float | int) and math.isfinite(seconds) and seconds > 0


class _Factor:
    """A correction of one kind, in logarithm: one for all sizes, one for each power of two; between those, a line."""

    def __init__(self) -> None:
        self._all = 0.0
        self._own = np.zeros(POWERS)

    def at(self, size: Floats) -> Floats:
        low, share = _between(size)
        correction: Floats = self._all + (1 - share) * self._own[low] + share * self._own[low + 1]
        return correction

    def learn(self, size: float, more: float) -> None:
        """Steps of this size take more than others of their kind."""
        self._own *= 0.999  # what is not seen again falls back to what all sizes say
        low, share = _between(np.array([float(size)]))
        self._own[low] += (1 - share) * more
        self._own[low + 1] += share * more

    def shift(self, more: float) -> None:
        """Steps of this kind take more."""
        self._all += more


def _agreed(one: float, other: float) -> float:
    """What two surprises both say: the lesser of two of one sign. Of noise alone it has no bias to either side."""
    least = min(abs(one), abs(other), MOST_TOLD)
    return math.copysign(least, one) if one * other > 0 else 0.0


def _between(size: Floats) -> tuple[Ints, Floats]:
    """The power of two at or below each size, and how far towards the next it lies, in logarithm."""
    power = np.log2(np.clip(size, 1, 2.0 ** (POWERS - 2)))
    low: Ints = np.floor(power).astype(np.int64)
    return low, power - low


def _per_token(points: Sequence[tuple[float, int, float]]) -> float:
    """Median slope over context between points of one size; at least 0."""
    slopes = [(b[2] - a[2]) / (b[1] - a[1]) for a in points for b in points if a[0] == b[0] and b[1] > a[1]]
    return max(0.0, float(np.median(slopes))) if slopes else 0.0


def _never_falling(values: Sequence[float], weights: Sequence[int]) -> Floats:
    """The nearest non-decreasing sequence in least squares: neighbours that fall are pooled."""
    pools: list[tuple[float, int, int]] = []
    for value, weight in zip(values, weights, strict=True):
        pools.append((value, weight, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (a, wa, na), (b, wb, nb) = pools[-2], pools[-1]
            pools[-2:] = [((a * wa + b * wb) / (wa + wb), wa + wb, na + nb)]
    return np.repeat([pool[0] for pool in pools], [pool[2] for pool in pools]).astype(np.float64)

"""What a policy file says, as frozen dataclasses. `reader.py` makes them from YAML; `docs/policies.md` explains them.

`None` means "not said". Depths are draft tokens on the longest path of a request, nodes are all its draft tokens; the
two are equal on a chain.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from types import MappingProxyType

MAX_DEPTH = 64  # deeper than any drafter's block; `block` in a file reads as this
MAX_NODES = 256

ACCEPT_METHODS = ("auto", "rejection", "match")
CALIBRATIONS = ("sts", "none")
CAUSALITIES = ("auto", "early_stop", "lagged", "global")
COST_SOURCES = ("profiled", "online")
INTERPOLATIONS = ("step", "linear")
REFINEMENTS = ("online", "off")
SHAPES = ("chain", "tree", "auto")

DEFAULT_TIER = "default"


@dataclass(frozen=True)
class FixedSchedule:
    """The same for every request, whatever the load: `depth` tokens on a chain, or `nodes` of a tree. Exactly one."""

    depth: int | None = None
    nodes: int | None = None


@dataclass(frozen=True)
class ThresholdSchedule:
    """The longest prefix whose calibrated survival stays at or above `confidence`, in (0, 1)."""

    confidence: float


@dataclass(frozen=True)
class TableSchedule:
    """Depth straight from one signal. `points`: (value of `by`, depth), increasing; below the first, the first."""

    by: str
    points: tuple[tuple[float, int], ...]
    interpolate: str = "step"


@dataclass(frozen=True)
class ThroughputSchedule:
    """The depths that maximise tokens per second (Algorithm 1 of the paper). `causality`: see causality.py."""

    causality: str = "auto"


@dataclass(frozen=True)
class SloSchedule:
    """The most throughput that keeps every user at this speed; the fastest point when none does."""

    tokens_per_second_per_user: float
    causality: str = "auto"


Schedule = FixedSchedule | ThresholdSchedule | TableSchedule | ThroughputSchedule | SloSchedule

SCHEDULES: Mapping[str, type[Schedule]] = MappingProxyType(
    {
        "fixed": FixedSchedule,
        "threshold": ThresholdSchedule,
        "table": TableSchedule,
        "throughput": ThroughputSchedule,
        "slo": SloSchedule,
    }
)


@dataclass(frozen=True)
class Shape:
    """What is drafted. A tree has at most `max_nodes` nodes and `branch` children per node."""

    kind: str = "chain"
    max_nodes: int = 32
    branch: int = 4


@dataclass(frozen=True)
class Depth:
    """Bounds on the depth of a request; None is 0 for `min` and the drafter's block for `max`."""

    min: int | None = None
    max: int | None = None


@dataclass(frozen=True)
class Accept:
    """How draft tokens are judged; `auto` leaves the choice between the exact methods to the engine."""

    method: str = "auto"


@dataclass(frozen=True)
class Cost:
    """Where the price of a step comes from. Speculation must promise (1 + margin) times what plain decoding gives."""

    source: str = "profiled"
    refine: str = "online"
    margin: float = 0.02


@dataclass(frozen=True)
class Calibration:
    """How the drafter's confidence becomes a chance: sequential temperature scaling, learning on, or as it comes."""

    method: str = "sts"
    online: bool = True


@dataclass(frozen=True)
class Tier:
    """A class of requests: its weight in the objective and its bounds on depth."""

    weight: float = 1.0
    min_depth: int = 0
    max_depth: int | None = None


@dataclass(frozen=True)
class Rule:
    """What is different while `when` holds; None: as the policy says. `line`: where it stands in the file."""

    when: str
    schedule: Schedule | None = None
    shape: Shape | None = None
    depth: Depth | None = None
    line: int = 0


def _no_tiers() -> Mapping[str, Tier]:
    return MappingProxyType({})


@dataclass(frozen=True)
class Policy:
    """A whole policy. `digest`: the first 12 hex digits of the SHA-256 of the file; two copies of a text are equal."""

    name: str
    schedule: Schedule
    accept: Accept = Accept()
    description: str = ""
    shape: Shape = Shape()
    depth: Depth = Depth()
    cost: Cost = Cost()
    calibration: Calibration = Calibration()
    tiers: Mapping[str, Tier] = field(default_factory=_no_tiers)
    rules: tuple[Rule, ...] = ()
    digest: str = field(default="", compare=False)


def as_json(value: object) -> object:
    """A policy or a part of one as JSON can hold it, without what is not said; a schedule names its kind."""
    if is_dataclass(value):
        kinds = [("kind", kind) for kind, cls in SCHEDULES.items() if type(value) is cls]
        said = [(entry.name, as_json(getattr(value, entry.name))) for entry in fields(value)]
        return dict(kinds + [(name, entry) for name, entry in said if entry is not None])
    if isinstance(value, Mapping):
        return {str(key): as_json(entry) for key, entry in value.items()}
    if isinstance(value, tuple):
        return [as_json(entry) for entry in value]
    return value

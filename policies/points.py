"""The points of a `table` schedule: a mapping from values of a signal to depths, in increasing order."""

from collections.abc import Mapping
from dataclasses import dataclass

from .language import MAX_DEPTH, TableSchedule
from .nodes import Located
from .signals import SIGNALS

MAX_POINTS = 64
_LARGEST = 1e9


@dataclass(frozen=True)
class Points:
    """Reads `{1: 7, 16: 4, 64: 0}`; a share such as kv.usage takes keys like 0.5."""

    def read(self, value: Located) -> tuple[tuple[float, int], ...]:
        entries = value.entries()
        if not 1 <= len(entries) <= MAX_POINTS:
            raise value.error(f"{value.path} must have 1 to {MAX_POINTS} entries, not {len(entries)}")
        points: list[tuple[float, int]] = []
        for key, depth in entries:
            at = key.number(0, _LARGEST)
            if points and at <= points[-1][0]:
                raise key.error(f"{value.path} must increase; {at:g} comes after {points[-1][0]:g}")
            points.append((at, depth.integer(0, MAX_DEPTH)))
        return tuple(points)

    def schema(self) -> dict[str, object]:
        return {
            "type": "object",
            "propertyNames": {"pattern": r"^[0-9]+(\.[0-9]+)?([eE][-+]?[0-9]+)?$"},
            "additionalProperties": {"type": "integer", "minimum": 0, "maximum": MAX_DEPTH},
            "minProperties": 1,
            "maxProperties": MAX_POINTS,
        }


def check_table(table: TableSchedule, entries: Mapping[str, Located], _: Located) -> None:
    """A point that the signal can never reach is a mistake about its unit."""
    if table.points[-1][0] > SIGNALS[table.by].highest:
        raise entries["points"].error(f"{table.by} goes from 0 to 1, so it never reaches {table.points[-1][0]:g}")

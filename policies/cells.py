"""Where rules cannot tell two requests apart, so that one answer serves both.

A condition that compares a number with constants can change its mind only where the number crosses one of them. The
constants cut the line into cells: below the first, on it, between two, ... Requests of one cell get one evaluation.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from operator import attrgetter

from .expressions import Node
from .signals import SIGNALS, RequestSignals

_COMPARISONS = ("<", "<=", ">", ">=", "==", "!=", "in")


class Cells:
    """The cells that these conditions cut the numbers of a request into."""

    def __init__(self, conditions: Iterable[Node]) -> None:
        cuts: dict[str, list[float] | None] = {}
        for tree in conditions:
            _cut(tree, cuts)
        # None: a number that is computed with, so every value is a cell of its own.
        self._cuts = [None if cut is None else sorted(set(cut)) for cut in cuts.values()]
        names = [name.removeprefix("request.") for name in cuts]
        # attrgetter returns a bare value for one name; asking for one twice makes it a tuple, zip drops the surplus.
        self._values = attrgetter(*names, *names[:1]) if names else lambda request: ()

    def of(self, request: RequestSignals) -> tuple[float, ...]:
        """Equal for requests that no condition can tell apart by their numbers."""
        return tuple([_cell(value, cut) for value, cut in zip(self._values(request), self._cuts, strict=False)])


def _cell(value: float, cuts: list[float] | None) -> float:
    if value != value:  # NaN, hence absent
        return -math.inf
    return value if cuts is None else bisect_left(cuts, value) + bisect_right(cuts, value)


def _cut(node: Node, cuts: dict[str, list[float] | None]) -> None:
    compared = node.parts if node.op in _COMPARISONS else ()
    constants = [float(leaf.value or 0) for part in compared for leaf in part.walk() if _is_number(leaf)]
    direct = all(part.op in ("signal", "literal", "list") for part in compared)
    lone = sum(part.op == "signal" for part in compared) == 1
    for part in node.parts:
        if part.op != "signal":
            _cut(part, cuts)
        elif _is_request_number(part):
            known = cuts.setdefault(str(part.value), [])
            if compared and direct and lone and known is not None:
                known.extend(constants)
            else:
                cuts[str(part.value)] = None


def _is_number(node: Node) -> bool:
    return node.op == "literal" and node.kind == "number"


def _is_request_number(node: Node) -> bool:
    signal = SIGNALS[str(node.value)]
    return signal.scope == "request" and signal.kind == "number"

"""Whether a condition can hold at all, and whether only where another one does: how a dead rule is found.

Sound, not complete: it knows equal trees, `&&`, `||` and comparisons of one signal with constants, which is what people
write. It never says that a reachable rule is unreachable.
"""

from collections.abc import Iterable, Iterator

from .expressions import Node
from .signals import SIGNALS

_MIRRORED = {"<": ">", "<=": ">=", ">": "<", ">=": "<=", "==": "=="}


def implies(narrow: Node, wide: Node) -> bool:
    """Whether `wide` is known to hold wherever `narrow` does, absent signals included."""
    if narrow == wide:
        return True
    if wide.op == "&&":
        return all(implies(narrow, part) for part in wide.parts)
    if narrow.op == "||":
        return all(implies(part, wide) for part in narrow.parts)
    if wide.op == "||":
        return any(implies(narrow, part) for part in wide.parts)
    if narrow.op == "&&":
        return any(implies(part, wide) for part in narrow.parts)
    return _interval_implies(narrow, wide)


def _interval_implies(narrow: Node, wide: Node) -> bool:
    inner, outer = _bound(narrow), _bound(wide)
    if not inner or not outer or inner[0] != outer[0]:
        return False
    (_, inside, x), (_, outside, y) = inner, outer
    match outside:
        case ">":
            return (inside == ">" and x >= y) or (inside in (">=", "==") and x > y)
        case ">=":
            return inside in (">", ">=", "==") and x >= y
        case "<":
            return (inside == "<" and x <= y) or (inside in ("<=", "==") and x < y)
        case "<=":
            return inside in ("<", "<=", "==") and x <= y
    return False


def impossible(tree: Node) -> tuple[Node, str] | None:
    """A comparison in the tree that no load can change, or an `&&` that no load satisfies, and why."""
    for node in tree.walk():
        bound = _bound(node)
        if bound and (why := _settled(*bound)):
            return node, why
    for node in tree.walk():
        found = [bound for part in _joined(node) if (bound := _bound(part))]
        for signal in dict.fromkeys(name for name, _, _ in found):
            if not _satisfiable(signal, [(op, constant) for name, op, constant in found if name == signal]):
                return node, f"no value of {signal} satisfies all of this"
    return None


def _settled(signal: str, op: str, constant: float) -> str | None:
    """Why a comparison never holds, or always does since its constant is out of reach."""
    highest = SIGNALS[signal].highest
    span = "is never below 0" if constant <= 0 else f"goes from 0 to {highest:g}"
    if not _satisfiable(signal, [(op, constant)]):
        return f"{signal} {span}, so this never holds"
    # `gpu.util <= 1` asks whether the signal is there at all.
    return f"{signal} {span}, so this always holds" if not 0 <= constant <= highest else None


def _satisfiable(signal: str, bounds: Iterable[tuple[str, float]]) -> bool:
    """Whether a value of the signal meets all of these comparisons."""
    # An end is (value, how far beyond it): 1 makes a lower end open, -1 an upper one.
    low, high = (0.0, 0), (SIGNALS[signal].highest, 0)
    for op, constant in bounds:
        if op in (">", ">=", "=="):
            low = max(low, (constant, int(op == ">")))
        if op in ("<", "<=", "=="):
            high = min(high, (constant, -int(op == "<")))
    return low <= high


def _joined(node: Node) -> Iterator[Node]:
    """The conditions that all have to hold."""
    if node.op != "&&":
        yield node
        return
    for part in node.parts:
        yield from _joined(part)


def _bound(node: Node) -> tuple[str, str, float] | None:
    """(signal, comparison, constant) of a comparison of a number with a constant, whichever side it stands on."""
    if node.op not in _MIRRORED or node.parts[0].kind != "number":
        return None
    left, right = node.parts
    if left.op == "signal" and right.op == "literal":
        return str(left.value), node.op, float(right.value or 0)
    if left.op == "literal" and right.op == "signal":
        return str(right.value), _MIRRORED[node.op], float(left.value or 0)
    return None

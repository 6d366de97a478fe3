"""Whether a condition can hold only where another one holds: how a rule that nobody can reach is found.

Sound, not complete: it knows equal trees, `&&`, `||` and comparisons of one signal with constants, which is what people
write. It never says that a reachable rule is unreachable.
"""

from .expressions import Node

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

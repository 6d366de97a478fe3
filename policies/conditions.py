"""Conditions: CEL expressions over signals, compiled once and evaluated every step.

`expressions.py` has typed and bounded the text by then, so evaluation can fail in one way only: a signal is absent. It
follows CEL: `||` with one side true holds and `&&` with one side false does not, whatever is absent on the other.
"""

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.machinery import PathFinder
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import Any

from .expressions import TOKEN, Node, parse_condition
from .signals import SIGNALS, Value

# CEL has no dotted variables, only members of maps, and building maps at every step is what would take the time.
_VARIABLES = {name: name.replace(".", "_") for name in SIGNALS}
_SIGNALS = {variable: name for name, variable in _VARIABLES.items()}


@dataclass(frozen=True)
class Condition:
    """A condition, ready to be asked. `signals`: those it reads; `tree`: its typed form."""

    text: str
    tree: Node
    signals: frozenset[str]
    _program: Any

    @property
    def per_request(self) -> bool:
        return any(SIGNALS[name].scope == "request" for name in self.signals)

    @property
    def constant(self) -> bool | None:
        """Its value when it reads no signal."""
        return None if self.signals else self.holds(Surroundings(lambda name: None))

    def holds(self, surroundings: "Surroundings") -> bool:
        """Whether it is known to be true; False when a signal that it depends on is absent or is no number."""
        try:
            return self._program.execute(surroundings.context) is True
        except (RuntimeError, TypeError):  # CEL's "undefined variable", and what it says of a comparison with 0/0
            return False


class Surroundings:
    """Where conditions look signals up: `lookup(name)` is a value, or None when it is absent. For one thread."""

    def __init__(self, lookup: Callable[[str], Value | None]) -> None:
        self.context = _cel().Context(variables={})
        self.context.set_variable_resolver(lambda variable: lookup(_SIGNALS[variable]))


def compile_condition(text: str) -> Condition:
    """Raises ConditionError, with the place in the text."""
    tree = parse_condition(text)
    return Condition(text, tree, tree.signals, _cel().compile(_source(text)))


def _source(text: str) -> str:
    """The text as CEL. Numbers become doubles, since CEL mixes no types: `batch.size + 1` means what it says."""
    return TOKEN.sub(_word, text)


def _word(found: re.Match[str]) -> str:
    if found.lastgroup == "number":
        return repr(float(found.group()))
    return _VARIABLES.get(found.group(), found.group()) if found.lastgroup == "name" else found.group()


def _cel() -> ModuleType:
    """The compiled part of the CEL package, without the package: its `__init__` also loads a command line of its own,
    half a second of terminal libraries."""
    name = "cel.cel"
    if name not in sys.modules:
        package = find_spec("cel")
        spec = PathFinder.find_spec(name, package.submodule_search_locations) if package else None
        if spec is None or spec.loader is None:
            raise ModuleNotFoundError("conditions need the package common-expression-language")
        module = sys.modules[name] = module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]

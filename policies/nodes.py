"""YAML values that remember where they stand, read strictly.

PyYAML composes the node tree and nothing more: tags, anchors and aliases are refused, nesting is bounded, and every
value is checked by the one who asks for it.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import yaml

from .errors import PolicyError
from .suggest import did_you_mean, short

MAX_BYTES = 64 * 1024
MAX_NESTING = 16

_NUMBER = r"-?(0|[1-9][0-9]{0,17})(\.[0-9]{1,18})?([eE][-+]?[0-9]{1,3})?"
_WHOLE = r"-?(0|[1-9][0-9]*)"
_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "timestamp": "a date",
    "null": "nothing",
}


@dataclass(frozen=True)
class Located:
    """One value of the file: its node, and the dotted path that error messages call it by."""

    file: str
    path: str
    node: yaml.Node

    def error(self, message: str) -> PolicyError:
        mark = self.node.start_mark
        return PolicyError(self.file, mark.line + 1, mark.column + 1, message)

    def error_at(self, offset: int, message: str) -> PolicyError:
        """Points at a character of the value, as nearly as YAML's quoting and folding let one say."""
        if not isinstance(self.node, yaml.ScalarNode):
            return self.error(message)
        line, column = _place(self.node, offset)
        return PolicyError(self.file, line + 1, column + 1, message)

    def fields(self, known: Iterable[str], *, required: Iterable[str] = ()) -> dict[str, "Located"]:
        """The entries of a mapping with these keys."""
        known = tuple(known)
        found: dict[str, Located] = {}
        for key, value in self.entries():
            name = key.node.value
            if name not in known:
                hint = did_you_mean(name, known) or f"; {self._name} takes {', '.join(known)}"
                raise key.error(f"unknown key {short(name)} in {self._name}{hint}")
            found[name] = value
        for name in required:
            if name not in found:
                raise self.error(f"{self._name} needs the key {name!r}")
        return found

    def entries(self) -> list[tuple["Located", "Located"]]:
        """Keys and values of a mapping, whatever the keys; none is given twice."""
        if not isinstance(self.node, yaml.MappingNode):
            raise self._wrong("a mapping (key: value)")
        found: dict[str, tuple[Located, Located]] = {}
        for key_node, value_node in self.node.value:
            here = Located(self.file, self.path, key_node)
            if not isinstance(key_node, yaml.ScalarNode):
                raise here.error(f"a key of {self._name} must be a word")
            key = str(key_node.value)
            if key in found:
                raise here.error(f"{short(key)} is given twice in {self._name}")
            path = f"{self.path}.{key if len(key) < 64 else short(key)}".lstrip(".")
            found[key] = (Located(self.file, f"a key of {self._name}", key_node), Located(self.file, path, value_node))
        return list(found.values())

    def items(self, most: int) -> list["Located"]:
        """The values of a list with at most so many of them."""
        if not isinstance(self.node, yaml.SequenceNode):
            raise self._wrong("a list")
        if len(self.node.value) > most:
            raise self.error(f"{self._name} may have {most} entries, not {len(self.node.value)}")
        return [Located(self.file, f"{self.path}[{i}]", node) for i, node in enumerate(self.node.value)]

    def text(self, max_length: int) -> str:
        node = self.node
        if not isinstance(node, yaml.ScalarNode) or _kind(node) == "null":
            raise self._wrong("text")
        if _kind(node) != "str":
            read = f"YAML reads {short(node.value)} as {_said(node)}"
            raise self.error(f"{self._wanted('text')}; {read}: put it in quotes")
        if not 1 <= len(node.value) <= max_length:
            raise self.error(f"{self._name} must have 1 to {max_length} characters, not {len(node.value)}")
        if not all(c.isprintable() or c in "\n\t" for c in node.value):
            raise self.error(f"{self._name} holds a character that cannot be printed")
        return str(node.value)

    def integer(self, low: int, high: int) -> int:
        node, wanted = self.node, f"a whole number from {low} to {high}"
        if not isinstance(node, yaml.ScalarNode):
            raise self._wrong(wanted)
        # Decimal only: YAML 1.1 would read 010 as eight and 1:30 as ninety, which nobody means here.
        if not re.fullmatch(_WHOLE, node.value):
            if _kind(node) == "int":
                raise self.error(f"{self._wanted(wanted)} in plain decimal digits, not {short(node.value)}")
            raise self._wrong(wanted)
        if _kind(node) != "int":
            raise self.error(f"{self._wanted(wanted)}, without quotes")
        if len(node.value) > 18 or not low <= int(node.value) <= high:
            raise self.error(f"{self._name} must be from {low} to {high}, not {node.value[:40]}")
        return int(node.value)

    def number(self, low: float, high: float, *, above: bool = False) -> float:
        """A number from `low` to `high`; `above`: more than `low`, and less than `high`."""
        node = self.node
        wanted = f"{'above' if above else 'from'} {low:g} {'and below' if above else 'to'} {high:g}"
        # What YAML 1.1 takes for text, 1e-3 for instance, is a number to everybody else.
        if not isinstance(node, yaml.ScalarNode):
            raise self._wrong(f"a number {wanted}")
        if not re.fullmatch(_NUMBER, node.value):
            plain = _plain_spelling(node)
            raise self.error(f"{self._name}: write {plain}") if plain else self._wrong(f"a number {wanted}")
        if node.style is not None:
            raise self.error(f"{self._wanted(f'a number {wanted}')}, without quotes")
        value = float(node.value)
        if not (low < value < high if above else low <= value <= high):
            raise self.error(f"{self._name} must be {wanted}, not {short(node.value)}")
        return value

    def flag(self) -> bool:
        words = {"true": True, "false": False}
        if not isinstance(self.node, yaml.ScalarNode) or _kind(self.node) != "bool":
            raise self._wrong("true or false")
        if self.node.value not in words:  # YAML 1.1's yes, no, on and off
            raise self.error(f"{self._name}: write true or false, not {self.node.value}")
        return words[self.node.value]

    def condition(self, max_length: int) -> str:
        """Text; also a bare `true` or `false`, which YAML takes for something else."""
        if _kind(self.node) == "bool" and self.node.value in ("true", "false"):
            return str(self.node.value)
        return self.text(max_length)

    def choice(self, options: Iterable[str]) -> str:
        options = tuple(options)
        if not isinstance(self.node, yaml.ScalarNode):
            raise self._wrong("a word")
        value = str(self.node.value)
        if value not in options:
            hint = did_you_mean(value, options)
            known = "one of " + ", ".join(options) if len(options) < 8 or not hint else "a known word"
            raise self.error(f"{self._wanted(known)}, not {short(value) if value else 'empty'}{hint}")
        return value

    @property
    def _name(self) -> str:
        return self.path or "the policy"

    def _wanted(self, expected: str) -> str:
        return f"{self._name} must be {expected}"

    def _wrong(self, expected: str) -> PolicyError:
        return self.error(f"{self._wanted(expected)}, not {_describe(self.node)}")


def _place(node: yaml.ScalarNode, offset: int) -> tuple[int, int]:
    """Line and column, from 0, of a character of a scalar: the written text is followed along with the value."""
    start, end = node.start_mark, node.end_mark
    written = str(start.buffer)[start.pointer : end.pointer]
    at = written.find("\n") if node.style in ("|", ">") else 0
    for index, character in enumerate(node.value):
        if not character.isspace():  # folding changes spaces only
            found = max(written.find(character, at), at)
            if index >= offset:
                at = found
                break
            at = found + 1
    lines = written[:at].split("\n")
    return start.line + len(lines) - 1, len(lines[-1]) + (start.column if len(lines) == 1 else 0)


def _kind(node: yaml.Node) -> str:
    return str(node.tag).rpartition(":")[2]


def _describe(node: yaml.Node) -> str:
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    if not node.value:
        return "empty"
    return "nothing" if _kind(node) == "null" else f"{short(node.value)}, which is {_said(node)}"


def _said(node: yaml.Node) -> str:
    if node.value in (".nan", ".inf", "-.inf"):
        return "no finite number"
    return _KINDS.get(_kind(node), "a word of its own")


def _plain_spelling(node: yaml.ScalarNode) -> str | None:
    """What YAML takes for a number and we do not, such as .5 or +0.5, as it should be written."""
    if _kind(node) not in ("int", "float"):
        return None
    try:
        value = float(node.value)
    except ValueError:
        return None
    return f"{value:.15g}" if math.isfinite(value) else None


class _Refused(yaml.MarkedYAMLError):
    """Valid YAML that a policy does without."""


class _Loader(yaml.SafeLoader):
    """Composes plain trees only: an alias could make a small file describe an endless or enormous one."""

    nesting = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event: yaml.Event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise _refusal("anchors and aliases are not allowed", event)
        if getattr(event, "tag", None) is not None:
            raise _refusal("tags are not allowed; text that begins with '!' is one to YAML: put it in quotes", event)
        self.nesting += 1
        if self.nesting > MAX_NESTING:
            raise _refusal("nested too deeply", event)
        node: yaml.Node | None = super().compose_node(parent, index)
        self.nesting -= 1
        return node


def _refusal(problem: str, event: yaml.Event) -> _Refused:
    return _Refused(problem=problem, problem_mark=cast(yaml.Mark, event.start_mark))


def compose(data: bytes, file: str) -> Located:
    """The root value of one YAML document, or a located PolicyError; never any other exception."""
    if len(data) > MAX_BYTES:
        raise PolicyError(file, 0, 0, f"larger than {MAX_BYTES // 1024} KiB: surely not a policy")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        column = error.start - data.rfind(b"\n", 0, error.start)
        raise PolicyError(file, line, column, "not valid UTF-8 text") from None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        context = f" ({error.context})" if error.context else ""
        problem = error.problem if isinstance(error, _Refused) else f"not valid YAML: {error.problem}{context}"
        raise PolicyError(file, line, column, str(problem)) from None
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        place = before.count("\n") + 1, len(before) - before.rfind("\n")
        raise PolicyError(file, *place, "holds a control character that YAML does not allow") from None
    except (ValueError, OverflowError):  # PyYAML's scanner on escapes such as "\UFFFFFFFF"
        raise PolicyError(file, 1, 1, "not valid YAML: it holds an impossible number or escape") from None
    if node is None:
        raise PolicyError(file, 1, 1, "the policy is empty")
    return Located(file, "", node)

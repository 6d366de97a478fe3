"""YAML values that remember where they stand, read strictly.

PyYAML composes the node tree and nothing more: no Python object is ever constructed from a tag, anchors and
aliases are refused, nesting is bounded, and every value is checked by the one who asks for it.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import cast

import yaml

from .errors import PolicyError
from .suggest import did_you_mean, short

MAX_BYTES = 64 * 1024
MAX_NESTING = 16

_KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}


@dataclass(frozen=True)
class Located:
    """One value of the file: its node, and the dotted path that error messages call it by."""

    file: str
    path: str
    node: yaml.Node

    def error(self, message: str) -> PolicyError:
        mark = self.node.start_mark
        return PolicyError(self.file, mark.line + 1, mark.column + 1, message)

    def fields(
        self, known: Iterable[str], *, required: Iterable[str] = (), later: Mapping[str, str] | None = None
    ) -> dict[str, "Located"]:
        """The entries of a mapping. `later`: keys of the full language that this version refuses, and why."""
        known, later = tuple(known), later or {}
        if not isinstance(self.node, yaml.MappingNode):
            raise self._wrong("a mapping (key: value)")
        found: dict[str, Located] = {}
        for key_node, value_node in self.node.value:
            here = Located(self.file, self.path, key_node)
            if not isinstance(key_node, yaml.ScalarNode):
                raise here.error(f"a key of {self._name} must be a word")
            key = key_node.value
            if key in later:
                raise here.error(f"{short(key)} is not supported yet: {later[key]}")
            if key not in known:
                hint = did_you_mean(key, known) or f"; {self._name} takes {', '.join(known)}"
                raise here.error(f"unknown key {short(key)} in {self._name}{hint}")
            if key in found:
                raise here.error(f"{short(key)} is given twice in {self._name}")
            found[key] = Located(self.file, f"{self.path}.{key}".lstrip("."), value_node)
        for key in required:
            if key not in found:
                raise self.error(f"{self._name} needs the key {key!r}")
        return found

    def text(self, max_length: int) -> str:
        node = self.node
        if not isinstance(node, yaml.ScalarNode) or _kind(node) != "str":
            raise self._wrong("text")
        if not 1 <= len(node.value) <= max_length:
            raise self.error(f"{self._name} must have 1 to {max_length} characters, not {len(node.value)}")
        if not all(c.isprintable() or c in "\n\t" for c in node.value):
            raise self.error(f"{self._name} holds a character that cannot be printed")
        return str(node.value)

    def integer(self, low: int, high: int) -> int:
        node = self.node
        # Decimal only: YAML 1.1 would read 010 as eight and 1:30 as ninety, which nobody means here.
        if not isinstance(node, yaml.ScalarNode) or not re.fullmatch(r"-?(0|[1-9][0-9]{0,17})", node.value):
            raise self._wrong(f"a whole number from {low} to {high}")
        if _kind(node) != "int":
            raise self._wrong(f"a whole number from {low} to {high}, without quotes")
        value = int(node.value)
        if not low <= value <= high:
            raise self.error(f"{self._name} must be from {low} to {high}, not {value}")
        return value

    def choice(self, options: Iterable[str], *, later: Mapping[str, str] | None = None) -> str:
        options, later = tuple(options), later or {}
        if not isinstance(self.node, yaml.ScalarNode):
            raise self._wrong("a word")
        value = str(self.node.value)
        if value in later:
            raise self.error(f"{self._name} {short(value)} is not supported yet: {later[value]}")
        if value not in options:
            hint = did_you_mean(value, options)
            raise self.error(f"{self._name} must be one of {', '.join(options)}, not {short(value)}{hint}")
        return value

    @property
    def _name(self) -> str:
        return self.path or "the policy"

    def _wrong(self, expected: str) -> PolicyError:
        return self.error(f"{self._name} must be {expected}, not {_describe(self.node)}")


def _kind(node: yaml.Node) -> str:
    return str(node.tag).rpartition(":")[2]


def _describe(node: yaml.Node) -> str:
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    kind = _KINDS.get(_kind(node), f"of type {short(node.tag)}")
    quoting = " (YAML reads it so; put it in quotes)" if kind == "true or false" else ""
    return f"{short(node.value)}, which is {kind}{quoting}" if node.value else "empty"


class _Loader(yaml.SafeLoader):
    """Composes plain trees only: an alias could make a small file describe an endless or enormous one."""

    nesting = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event: yaml.Event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise _refusal("anchors and aliases are not allowed", event)
        self.nesting += 1
        if self.nesting > MAX_NESTING:
            raise _refusal("nested too deeply", event)
        node: yaml.Node | None = super().compose_node(parent, index)
        self.nesting -= 1
        return node


def _refusal(problem: str, event: yaml.Event) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=cast(yaml.Mark, event.start_mark))


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
        raise PolicyError(file, line, column, f"not valid YAML: {error.problem}{context}") from None
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        place = before.count("\n") + 1, len(before) - before.rfind("\n")
        raise PolicyError(file, *place, "holds a control character that YAML does not allow") from None
    except (ValueError, OverflowError):  # PyYAML's scanner on escapes such as "\UFFFFFFFF"
        raise PolicyError(file, 1, 1, "not valid YAML: it holds an impossible number or escape") from None
    if node is None:
        raise PolicyError(file, 1, 1, "the policy is empty")
    return Located(file, "", node)

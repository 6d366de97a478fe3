"""The pieces that the policy language is declared with. Each reads a located YAML value and describes itself as JSON
Schema, so the parser and the schema that editors complete from cannot drift apart. They know no policy.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Generic, Protocol, TypeVar

from .language import MAX_DEPTH
from .nodes import Located

Json = dict[str, Any]
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Reader(Protocol[T_co]):
    """Something that a value of the file can be read as."""

    def read(self, value: Located) -> T_co: ...

    def schema(self) -> Json: ...


@dataclass(frozen=True)
class Integer:
    low: int
    high: int

    def read(self, value: Located) -> int:
        return value.integer(self.low, self.high)

    def schema(self) -> Json:
        return {"type": "integer", "minimum": self.low, "maximum": self.high}


@dataclass(frozen=True)
class DepthOrBlock:
    """A depth, or the word `block`: as deep as the drafter goes."""

    def read(self, value: Located) -> int:
        return MAX_DEPTH if value.node.value == "block" else value.integer(0, MAX_DEPTH)

    def schema(self) -> Json:
        return {"anyOf": [{"const": "block"}, Integer(0, MAX_DEPTH).schema()]}


@dataclass(frozen=True)
class Number:
    """From `low` to `high`; with `above`, the ends themselves are out."""

    low: float
    high: float
    above: bool = False

    def read(self, value: Located) -> float:
        return value.number(self.low, self.high, above=self.above)

    def schema(self) -> Json:
        kind = "exclusive{}imum" if self.above else "{}imum"
        low, high = (kind.format(end if not self.above else end.capitalize()) for end in ("min", "max"))
        return {"type": "number", low: self.low, high: self.high}


@dataclass(frozen=True)
class Text:
    """1 to `limit` printable characters; `pattern` with the reason that a reader of the error needs."""

    limit: int
    pattern: str = ""
    rule: str = ""

    def read(self, value: Located) -> str:
        text = value.text(self.limit)
        if not self.fits(text):
            raise value.error(f"{value.path} {self.rule}")
        return text

    def fits(self, text: str) -> bool:
        """Whether this could be read, from wherever it comes."""
        return 1 <= len(text) <= self.limit and (not self.pattern or re.fullmatch(self.pattern, text) is not None)

    def schema(self) -> Json:
        pattern = {"pattern": f"^{self.pattern}$"} if self.pattern else {}
        return {"type": "string", "minLength": 1, "maxLength": self.limit, **pattern}


@dataclass(frozen=True)
class Word:
    options: tuple[str, ...]

    def read(self, value: Located) -> str:
        return value.choice(self.options)

    def schema(self) -> Json:
        return {"enum": list(self.options)}


@dataclass(frozen=True)
class Flag:
    def read(self, value: Located) -> bool:
        return value.flag()

    def schema(self) -> Json:
        return {"type": "boolean"}


@dataclass(frozen=True)
class Key:
    """One key of a mapping; `doc` is what an editor shows."""

    name: str
    type: Reader[Any]
    doc: str
    required: bool = False


Check = Callable[[Any, Mapping[str, Located], Located], None]


class Record(Generic[T]):
    """A mapping with known keys, made into `make(**values)`; `check(made, fields, value)` may refuse combinations."""

    def __init__(self, make: Callable[..., T], *keys: Key, check: Check | None = None) -> None:
        self.make = make
        self.keys = keys
        self._check = check

    def read(self, value: Located) -> T:
        return self.build(value, self.open(value))

    def open(self, value: Located, besides: Iterable[str] = ()) -> dict[str, Located]:
        """The entries, unread. `besides`: keys that are somebody else's."""
        required = [key.name for key in self.keys if key.required]
        return value.fields((*besides, *(key.name for key in self.keys)), required=required)

    def build(self, value: Located, entries: Mapping[str, Located]) -> T:
        made = self.make(**{key.name: key.type.read(entries[key.name]) for key in self.keys if key.name in entries})
        if self._check:
            self._check(made, entries, value)
        return made

    def schema(self) -> Json:
        defaults = _defaults(self.make)
        return {
            "type": "object",
            "properties": {
                key.name: {**key.type.schema(), "description": key.doc, **defaults.get(key.name, {})}
                for key in self.keys
            },
            "required": [key.name for key in self.keys if key.required],
            "additionalProperties": False,
        }


class Variants(Generic[T]):
    """Mappings of several kinds; the key `kind` says which keys belong beside it."""

    def __init__(self, kinds: Mapping[str, Record[Any]]) -> None:
        self.kinds = kinds

    def read(self, value: Located) -> T:
        everything = {key.name: None for record in self.kinds.values() for key in record.keys}
        said = value.fields(("kind", *everything))
        if "kind" not in said:
            raise value.error(f"{value.path} needs the key 'kind', one of {', '.join(self.kinds)}")
        kind = said["kind"].choice(self.kinds)
        record = self.kinds[kind]
        made: T = record.build(value, record.open(value, besides=("kind",)))
        return made

    def schema(self) -> Json:
        return {"oneOf": [_with_kind(kind, record.schema()) for kind, record in self.kinds.items()]}


class Named(Generic[T]):
    """A mapping from names of the user's own to records."""

    def __init__(self, name: Text, entry: Record[T], most: int) -> None:
        self.name = name
        self.entry = entry
        self.most = most

    def read(self, value: Located) -> dict[str, T]:
        entries = value.entries()
        if len(entries) > self.most:
            raise value.error(f"{value.path} may have {self.most} entries, not {len(entries)}")
        return {self.name.read(key): self.entry.read(item) for key, item in entries}

    def schema(self) -> Json:
        names = {"propertyNames": self.name.schema(), "maxProperties": self.most}
        return {"type": "object", "additionalProperties": self.entry.schema(), **names}


def _with_kind(kind: str, schema: Json) -> Json:
    return {
        **schema,
        "properties": {"kind": {"const": kind}, **schema["properties"]},
        "required": ["kind", *schema["required"]],
    }


def _defaults(make: Callable[..., Any]) -> dict[str, Json]:
    """What a key means when it is left out, where the dataclass says so."""
    if not is_dataclass(make):
        return {}
    return {e.name: {"default": e.default} for e in fields(make) if isinstance(e.default, (str, int, float))}

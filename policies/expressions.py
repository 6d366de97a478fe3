"""The part of CEL that a condition may use: read, typed and bounded before anything evaluates it.

    condition  := either ["?" condition ":" condition]        either   := both {"||" both}
    both       := relation {"&&" relation}                     relation := sum [("<" | "<=" | ... | "in") sum]
    sum        := product {("+" | "-") product}                product  := unary {("*" | "/") unary}
    unary      := {"!" | "-"} (literal | signal | "(" condition ")" | "[" literals "]")

No functions, no macros, no loops: what this accepts ends after as many operations as it has operators. It decides types
and finds mistakes with their place; it never evaluates. Meaning is left to the CEL library (see conditions.py).
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from .signals import SIGNALS, Kind, Value
from .suggest import did_you_mean, short

MAX_LENGTH = 1000  # characters
MAX_WORDS = 100
MAX_NESTING = 40

TOKEN = re.compile(
    r"""(?P<space>\s+) | (?P<number>(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\w*) | (?P<name>[A-Za-z_]\w*(\.\w+)*)
    | (?P<text>'[^'\\\n]*'|"[^"\\\n]*") | (?P<symbol>\|\||&&|[<>=!]=|[-+*/<>!?:()\[\],])""",
    re.VERBOSE,
)
_NUMBER = re.compile(r"(\d+(\.\d+)?|\.\d+)([eE][+-]?\d+)?")
_MISTAKES = {"=": "==", "|": "||", "&": "&&", "and": "&&", "or": "||", "not": "!"}
_ORDER = ("<", "<=", ">", ">=")
_WORDS: dict[Kind, str] = {"number": "a number", "bool": "true or false", "text": "text"}


class ConditionError(ValueError):
    """What is wrong with a condition, and at which of its characters (from 0)."""

    def __init__(self, offset: int, message: str) -> None:
        self.offset = offset
        self.message = message
        super().__init__(message)


@dataclass(frozen=True)
class Node:
    """One operation, literal or signal. `value`: the literal, or the signal's name."""

    op: str
    kind: Kind
    offset: int = field(compare=False)
    parts: tuple["Node", ...] = ()
    value: Value | None = None

    def walk(self) -> Iterator["Node"]:
        """This node and everything below it."""
        yield self
        for part in self.parts:
            yield from part.walk()

    @property
    def signals(self) -> frozenset[str]:
        return frozenset(str(node.value) for node in self.walk() if node.op == "signal")


@dataclass(frozen=True)
class _Token:
    sort: str
    text: str
    offset: int


def parse_condition(text: str) -> Node:
    """The tree of a condition; raises ConditionError."""
    if len(text) > MAX_LENGTH:
        raise ConditionError(0, f"a condition may have {MAX_LENGTH} characters, not {len(text)}")
    tokens = list(_tokens(text))
    if len(tokens) > MAX_WORDS:
        raise ConditionError(tokens[MAX_WORDS].offset, f"a condition may have {MAX_WORDS} words and signs")
    reader = _Reader(tokens)
    node = reader.condition()
    end = reader.peek()
    if end.sort != "end":
        near = f"; did you mean {_MISTAKES[end.text]!r}?" if end.text in _MISTAKES else ""
        raise ConditionError(end.offset, f"expected an operator before {short(end.text)}{near}")
    if node.kind != "bool":
        raise ConditionError(node.offset, f"a condition must be true or false; this is {_WORDS[node.kind]}")
    return node


def _tokens(text: str) -> Iterator[_Token]:
    at = 0
    while at < len(text):
        found = TOKEN.match(text, at)
        if not found:
            raise ConditionError(at, _unreadable(text, at))
        sort = str(found.lastgroup)
        if sort != "space":
            yield _Token(sort, found.group(), at)
        at = found.end()
    yield _Token("end", "the end", len(text))


def _unreadable(text: str, at: int) -> str:
    character = text[at]
    if character in _MISTAKES:
        return f"{character!r} is no operator; did you mean {_MISTAKES[character]!r}?"
    if character in "'\"":
        return "text must end on its line with the quote it began with, and hold no backslash"
    return f"unexpected {short(character)} in a condition"


class _Reader:
    """Recursive descent over the tokens; every method returns a typed node."""

    def __init__(self, tokens: list[_Token]) -> None:
        self._tokens = tokens
        self._at = 0
        self._nesting = 0

    def peek(self) -> _Token:
        return self._tokens[self._at]

    def _take(self, *texts: str) -> _Token | None:
        token = self.peek()
        if token.sort in ("symbol", "name") and token.text in texts:
            self._at += 1
            return token
        return None

    def _expect(self, text: str) -> None:
        if not self._take(text):
            raise ConditionError(self.peek().offset, f"expected {text!r}, not {short(self.peek().text)}")

    def condition(self) -> Node:
        self._deeper()
        node = self._choice()
        self._nesting -= 1
        return node

    def _deeper(self) -> None:
        self._nesting += 1
        if self._nesting > MAX_NESTING:
            raise ConditionError(self.peek().offset, f"nested more than {MAX_NESTING} deep")

    def _choice(self) -> Node:
        test = self._either()
        mark = self._take("?")
        if not mark:
            return test
        _require(test, "bool", mark)
        yes = self.condition()
        self._expect(":")
        no = self.condition()
        if yes.kind != no.kind:
            raise ConditionError(no.offset, f"both branches of '?' must be of one type, not {_both(yes, no)}")
        return Node("?", yes.kind, test.offset, (test, yes, no))

    def _either(self) -> Node:
        node = self._both()
        while mark := self._take("||"):
            node = _logical(mark, node, self._both())
        return node

    def _both(self) -> Node:
        node = self._relation()
        while mark := self._take("&&"):
            node = _logical(mark, node, self._relation())
        return node

    def _relation(self) -> Node:
        left = self._sum()
        mark = self._take("==", "!=", *_ORDER, "in")
        if not mark:
            return left
        right = self._list() if mark.text == "in" else self._sum()
        if again := self._take("==", "!=", *_ORDER, "in"):
            raise ConditionError(again.offset, "comparisons do not chain; join two of them with '&&'")
        return _comparison(mark, left, right)

    def _sum(self) -> Node:
        node = self._product()
        while mark := self._take("+", "-"):
            node = _arithmetic(mark, node, self._product())
        return node

    def _product(self) -> Node:
        node = self._unary()
        while mark := self._take("*", "/"):
            node = _arithmetic(mark, node, self._unary())
        return node

    def _unary(self) -> Node:
        self._deeper()
        mark = self._take("!", "-")
        if mark:
            kind: Kind = "bool" if mark.text == "!" else "number"
            part = self._unary()
            _require(part, kind, mark)
            node = Node(mark.text, kind, mark.offset, (part,))
        else:
            node = self._operand()
        self._nesting -= 1
        return node

    def _operand(self) -> Node:
        token = self.peek()
        self._at += 1
        if token.text == "(":
            node = self.condition()
            self._expect(")")
            return node
        if token.sort == "number":
            return Node("literal", "number", token.offset, value=_number(token))
        if token.sort == "text":
            return Node("literal", "text", token.offset, value=token.text[1:-1])
        if token.text in ("true", "false"):
            return Node("literal", "bool", token.offset, value=token.text == "true")
        if token.sort == "name":
            return self._signal(token)
        raise ConditionError(token.offset, f"expected a signal or a value, not {short(token.text)}")

    def _signal(self, token: _Token) -> Node:
        if self.peek().text == "(" and token.text not in _MISTAKES:
            raise ConditionError(token.offset, f"{short(token.text)}: conditions take operators, no functions")
        if token.text not in SIGNALS:
            raise ConditionError(token.offset, f"unknown signal {short(token.text)}{_hint(token.text)}")
        return Node("signal", SIGNALS[token.text].kind, token.offset, value=token.text)

    def _list(self) -> Node:
        start = self.peek()
        if not self._take("["):
            raise ConditionError(start.offset, "'in' needs a list such as [1, 2] behind it")
        parts = [self._operand()]
        while self._take(","):
            parts.append(self._operand())
        self._expect("]")
        for part in parts:
            if part.op != "literal" or part.kind != parts[0].kind:
                raise ConditionError(part.offset, "a list holds plain values of one type")
        return Node("list", parts[0].kind, start.offset, tuple(parts))


def _hint(name: str) -> str:
    if name in _MISTAKES:
        return f"; did you mean {_MISTAKES[name]!r}?"
    if near := did_you_mean(name, SIGNALS):
        return near
    return "; docs/policies.md lists the signals" if "." in name else "; text needs quotes"


def _number(token: _Token) -> float:
    if not _NUMBER.fullmatch(token.text) or not math.isfinite(value := float(token.text)):
        raise ConditionError(token.offset, f"{short(token.text)} is not a number that a condition can hold")
    return value


def _require(node: Node, kind: Kind, mark: _Token) -> None:
    if node.kind != kind:
        what = f"{mark.text!r} needs {_WORDS[kind]}; {_called(node)} is {_WORDS[node.kind]}"
        raise ConditionError(node.offset, what)


def _logical(mark: _Token, left: Node, right: Node) -> Node:
    _require(left, "bool", mark)
    _require(right, "bool", mark)
    return Node(mark.text, "bool", left.offset, (left, right))


def _arithmetic(mark: _Token, left: Node, right: Node) -> Node:
    _require(left, "number", mark)
    _require(right, "number", mark)
    return Node(mark.text, "number", left.offset, (left, right))


def _comparison(mark: _Token, left: Node, right: Node) -> Node:
    if mark.text in _ORDER:
        _require(left, "number", mark)
        _require(right, "number", mark)
    elif left.kind != right.kind:
        raise ConditionError(right.offset, f"cannot compare values of two types: {_both(left, right)}")
    return Node(mark.text, "bool", left.offset, (left, right))


def _called(node: Node) -> str:
    return str(node.value) if node.op == "signal" else short(node.value) if node.op == "literal" else "this"


def _both(left: Node, right: Node) -> str:
    return f"{_called(left)} is {_WORDS[left.kind]}, {_called(right)} is {_WORDS[right.kind]}"

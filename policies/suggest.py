"""Helpful words for error messages: the nearest known word, and a value shown short and on one line."""

import difflib
import reprlib
from collections.abc import Iterable

_REPR = reprlib.Repr()  # looks at the beginning of a container only: a request may carry megabytes
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 200


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean X?` when a known word is close, else nothing."""
    near = difflib.get_close_matches(word[:64], list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


def short(value: object, limit: int = 40) -> str:
    """The value as Python writes it, cut to `limit` characters: one printable line, whatever a user typed."""
    text = _REPR.repr(value[: limit + 1] if isinstance(value, str) else value)
    return text if len(text) <= limit else text[: limit - 1] + "…"

"""The policy language: one YAML file becomes one frozen `Policy`, or one located error.

This version reads the part of the language that a fixed depth needs. Keys and kinds of the rest are refused
by name (never ignored), so a policy written for a later version does not quietly mean something else here.
To add a kind of schedule: a frozen dataclass, a reader in `_SCHEDULES`, and its scheduler in `scheduler.py`.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .errors import PolicyError
from .nodes import MAX_BYTES, Located, compose

MAX_DEPTH = 64
ACCEPT_METHODS = ("auto", "rejection", "match")

_LATER = "this version knows a fixed depth only"
_LATER_KEYS = dict.fromkeys(("shape", "depth", "cost", "calibration", "tiers", "rules"), _LATER)
_LATER_SCHEDULES = dict.fromkeys(("threshold", "table", "throughput", "slo"), _LATER)


@dataclass(frozen=True)
class FixedSchedule:
    """Every request drafts and verifies `depth` tokens a round; 0 is plain decoding."""

    depth: int


@dataclass(frozen=True)
class Accept:
    """How draft tokens are judged; `auto` leaves the choice between the exact methods to the engine."""

    method: str = "auto"


@dataclass(frozen=True)
class Policy:
    name: str
    schedule: FixedSchedule
    accept: Accept = Accept()
    description: str = ""


def load_policy(path: str | Path) -> Policy:
    """Reads a policy file."""
    return parse_policy(read_policy_file(path), str(path))


def read_policy_file(path: str | Path) -> bytes:
    """The content of a file, as much of it as could be a policy; a PolicyError when it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise PolicyError(str(path), 0, 0, f"cannot be read: {reason}") from None


def parse_policy(data: str | bytes, file: str = "<policy>") -> Policy:
    """Reads a policy from text; `file` is what errors call it; its stem names a nameless policy."""
    if isinstance(data, str):
        data = data.encode("utf-8", "surrogatepass")
    root = compose(data, file)
    keys = ("version", "name", "description", "schedule", "accept")
    fields = root.fields(keys, required=("version", "schedule"), later=_LATER_KEYS)
    _check_version(fields["version"])
    return Policy(
        name=_read_name(fields["name"]) if "name" in fields else Path(file).stem,
        description=fields["description"].text(2000).strip() if "description" in fields else "",
        schedule=_read_schedule(fields["schedule"]),
        accept=_read_accept(fields["accept"]) if "accept" in fields else Accept(),
    )


def _check_version(value: Located) -> None:
    version = value.integer(0, 10**6)
    if version != 1:
        raise value.error(f"version {version} of the language is not known; this release reads 1")


def _read_name(value: Located) -> str:
    name = value.text(64)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise value.error("name may hold letters, digits, '.', '_' and '-' only: it becomes a metrics label")
    return name


def _read_schedule(value: Located) -> FixedSchedule:
    # The kind decides which other keys belong here, so it is read before them.
    everything = {"kind", *(key for keys, _ in _SCHEDULES.values() for key in keys)}
    kind = value.fields(sorted(everything), required=("kind",), later={"nodes": _LATER})["kind"]
    keys, read = _SCHEDULES[kind.choice(_SCHEDULES, later=_LATER_SCHEDULES)]
    return read(value.fields(("kind", *keys), required=keys))


def _read_fixed(fields: dict[str, Located]) -> FixedSchedule:
    return FixedSchedule(depth=fields["depth"].integer(0, MAX_DEPTH))


_SCHEDULES: dict[str, tuple[tuple[str, ...], Callable[[dict[str, Located]], FixedSchedule]]] = {
    "fixed": (("depth",), _read_fixed),
}


def _read_accept(value: Located) -> Accept:
    fields = value.fields(("method",), required=("method",))
    return Accept(method=fields["method"].choice(ACCEPT_METHODS))

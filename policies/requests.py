"""What a single request may ask for: `custom_params={"dspark": {"max_depth": 3, "tier": "interactive"}}`.

Validated when the request arrives; a bad value is one line that a server can send back as a 400.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from .language import MAX_DEPTH
from .suggest import did_you_mean, short

KEY = "dspark"
MAX_TIER_LENGTH = 64

_FIELDS = ("max_depth", "tier")


@dataclass(frozen=True, slots=True)
class RequestOptions:
    """`None` means that the request does not care."""

    max_depth: int | None = None
    tier: str | None = None


def parse_request_options(custom_params: Mapping[str, object] | None) -> RequestOptions:
    """Reads the `dspark` entry; other entries are left alone. Raises a one-line ValueError."""
    given = custom_params.get(KEY) if isinstance(custom_params, Mapping) else None
    if given is None:
        return RequestOptions()
    if not isinstance(given, Mapping):
        raise ValueError(f"custom_params.{KEY} must be an object, not {short(given)}")
    for key in given:
        if key not in _FIELDS:
            hint = did_you_mean(str(key), _FIELDS) or f"; known are {', '.join(_FIELDS)}"
            raise ValueError(f"custom_params.{KEY} has an unknown field {short(key)}{hint}")
    return RequestOptions(_max_depth(given.get("max_depth")), _tier(given.get("tier")))


def _max_depth(value: object) -> int | None:
    if value is None:
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # gRPC knows no whole numbers
    # True is an int in Python, and not a depth.
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_DEPTH:
        raise ValueError(
            f"custom_params.{KEY}.max_depth must be a whole number from 0 to {MAX_DEPTH}, not {short(value)}"
        )
    return value


def _tier(value: object) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or not 1 <= len(value) <= MAX_TIER_LENGTH or not value.isprintable():
        raise ValueError(
            f"custom_params.{KEY}.tier must be text of 1 to {MAX_TIER_LENGTH} characters, not {short(value)}"
        )
    return value

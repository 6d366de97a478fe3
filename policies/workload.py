"""What a simulated server is asked to do: requests with arrivals, lengths and how well they can be drafted.

From a recorded trace or made up from a seed. Never knows a policy.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from .batch import Floats, Ints
from .errors import PolicyError

MOST_TOKENS = 10**9
"""Of a request; longer ones are typing errors, and sums of them would not fit 64 bits."""


@dataclass(frozen=True)
class Workload:
    """R requests of K kinds.

    arrival: float64 `[R]`, seconds, never falling; prompt, output: int64 `[R]`, tokens, at least 1
    kind: int64 `[R]`, a row of survival; survival: float64 `[K, D]`, the chance that drafts 1..k are all accepted
    users: closed loop, so many requests at once and arrivals ignored; None: open loop
    pause: closed loop, seconds from an answer to the scheduler's sight of that user's next request; whoever takes
        requests in takes them one at a time, so those who are answered together come one after the other
    side: of trees, the chance that the next likeliest draft is the one, where those before it are not
    """

    arrival: Floats
    prompt: Ints
    output: Ints
    kind: Ints
    survival: Floats
    users: int | None = None
    pause: float = 0.0
    side: float = 0.0

    @property
    def size(self) -> int:
        return len(self.output)


def closed_loop(
    users: int,
    requests: int,
    prompt: int,
    output: int,
    acceptance: Sequence[float],
    seed: int = 0,
    spread: float = 0.3,
    pause: float = 0.0,
) -> Workload:
    """So many users who ask again once they are answered. Lengths vary by `spread` around their means."""
    return replace(_made_up(np.zeros(requests), prompt, output, acceptance, seed, spread, users), pause=pause)


def open_loop(
    rate: float,
    requests: int,
    prompt: int,
    output: int,
    acceptance: Sequence[float],
    seed: int = 0,
    spread: float = 0.3,
) -> Workload:
    """Poisson arrivals, `rate` requests per second."""
    gaps = np.random.default_rng([seed, 1]).exponential(1 / rate, requests)
    return _made_up(np.cumsum(gaps), prompt, output, acceptance, seed, spread, None)


def _made_up(
    arrival: Floats, prompt: int, output: int, acceptance: Sequence[float], seed: int, spread: float, users: int | None
) -> Workload:
    """acceptance: of each position, given the one before; one kind of request."""
    dice = np.random.default_rng([seed, 0])
    survival: Floats = np.cumprod(np.array(acceptance, dtype=np.float64), dtype=np.float64)[None]
    prompts, outputs = (_lengths(dice, mean, spread, len(arrival)) for mean in (prompt, output))
    return Workload(arrival, prompts, outputs, np.zeros(len(arrival), np.int64), survival, users)


def _lengths(dice: np.random.Generator, mean: int, spread: float, count: int) -> Ints:
    """Gamma-distributed: positive, skewed to the right as real lengths are."""
    if spread == 0:
        return np.full(count, mean, np.int64)
    shape = 1 / spread**2
    lengths: Ints = np.maximum(1, np.rint(dice.gamma(shape, mean / shape, count))).astype(np.int64)
    return lengths


def load_trace(file: Path) -> Workload:
    """One JSON object a line: `{"arrival": 0.5, "prompt": 210, "output": 90, "acceptance": [0.6, 0.5, ..]}`."""
    arrival, prompt, output, kind = [], [], [], []
    kinds: dict[tuple[float, ...], int] = {}
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PolicyError(str(file), 0, 0, f"cannot be read: {getattr(error, 'strerror', error)}") from None
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            at, chances = _number(entry["arrival"], math.inf), [_number(each, 1) for each in _list(entry["acceptance"])]
            sizes = [_tokens(entry[name]) for name in ("prompt", "output")]
        except (ValueError, KeyError, TypeError, RecursionError):
            shape = '{"arrival": seconds, "prompt": tokens, "output": tokens, "acceptance": [0 to 1, ..]}'
            raise PolicyError(str(file), number, 1, f"not a request of a trace; expected {shape}") from None
        arrival.append(at)
        prompt.append(sizes[0])
        output.append(sizes[1])
        kind.append(kinds.setdefault(tuple(chances), len(kinds)))
    if not arrival:
        raise PolicyError(str(file), 0, 0, "the trace holds no request")
    order = np.argsort(arrival, kind="stable")
    depth = max(map(len, kinds))
    survival = np.array([np.cumprod([*chances, *[0.0] * (depth - len(chances))]) for chances in kinds])
    times, prompts, outputs, sorts = (np.array(column)[order] for column in (arrival, prompt, output, kind))
    return Workload(times, prompts, outputs, sorts, survival)


def _number(value: object, most: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most or math.isinf(value):
        raise ValueError
    return float(value)


def _tokens(value: object) -> int:
    if type(value) is not int or not 1 <= value <= MOST_TOKENS:
        raise ValueError
    return value


def _list(value: object) -> list[object]:
    if not isinstance(value, list) or not value:
        raise ValueError
    return value

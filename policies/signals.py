"""What a policy can know about the moment: every signal by name, with unit, source and scope.

This table is the single list: conditions are checked against it, `table` schedules choose from it, the documentation
and the schema are tested against it. A signal that a machine cannot read is absent from a snapshot, never 0.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

Kind = Literal["number", "bool", "text"]
Scope = Literal["batch", "request"]
Value = float | bool | str


@dataclass(frozen=True)
class Signal:
    """One signal. `source` says who measures it, `doc` what it means; `kind` is its type in a condition."""

    name: str
    kind: Kind
    unit: str
    source: str
    doc: str
    scope: Scope = "batch"

    @property
    def highest(self) -> float:
        """What a number never exceeds; none falls below 0."""
        return 1.0 if self.unit == "0 to 1" else math.inf


_ENGINE, _NVML, _REQUEST = "scheduler", "NVML", "request"

SIGNALS: Mapping[str, Signal] = MappingProxyType(
    {
        signal.name: signal
        for signal in (
            Signal("batch.size", "number", "requests", _ENGINE, "running requests that this step decodes"),
            Signal("batch.tokens", "number", "tokens", _ENGINE, "rows of the last target forward, drafts included"),
            Signal("queue.length", "number", "requests", _ENGINE, "requests waiting for their first step"),
            Signal("kv.usage", "number", "0 to 1", _ENGINE, "share of the KV pool in use"),
            Signal("step.ms", "number", "milliseconds", _ENGINE, "wall time of a decode step, running mean"),
            Signal("tps.user", "number", "tokens/s", _ENGINE, "output speed of one request, mean over the batch"),
            Signal("tps.total", "number", "tokens/s", _ENGINE, "output speed of the whole server"),
            Signal(
                "accept.length", "number", "tokens", _ENGINE, "tokens emitted per request and round, bonus included"
            ),
            Signal("accept.rate", "number", "0 to 1", _ENGINE, "share of verified draft tokens that were accepted"),
            Signal("context.mean", "number", "tokens", _ENGINE, "mean length of the running requests"),
            Signal("context.max", "number", "tokens", _ENGINE, "length of the longest running request"),
            Signal("gpu.util", "number", "0 to 1", _NVML, "time in which a kernel ran; mean over the GPUs"),
            Signal("gpu.memory_util", "number", "0 to 1", _NVML, "device memory in use; the fullest GPU"),
            Signal("gpu.power_w", "number", "watts", _NVML, "power drawn; sum over the GPUs"),
            Signal("gpu.power_limit_w", "number", "watts", _NVML, "enforced power limit; sum over the GPUs"),
            Signal("gpu.sm_clock_mhz", "number", "MHz", _NVML, "SM clock; the slowest GPU"),
            Signal("gpu.temp_c", "number", "degrees Celsius", _NVML, "temperature; the hottest GPU"),
            Signal(
                "gpu.throttled",
                "bool",
                "",
                _NVML,
                "whether heat or the power supply slows any GPU; not its power limit",
            ),
            Signal("cpu.util", "number", "0 to 1", "psutil", "processor time in use, mean over the cores"),
            Signal("request.tier", "text", "", _REQUEST, "the request's tier; untagged: default", "request"),
            Signal("request.context_len", "number", "tokens", _REQUEST, "prompt and output so far", "request"),
            Signal("request.output_len", "number", "tokens", _REQUEST, "output so far", "request"),
            Signal(
                "request.accept_length", "number", "tokens", _REQUEST, "its tokens per round, running mean", "request"
            ),
            Signal("request.temperature", "number", "", _REQUEST, "its sampling temperature; 0: greedy", "request"),
        )
    }
)

BATCH_NUMBERS = tuple(name for name, signal in SIGNALS.items() if signal.scope == "batch" and signal.kind == "number")


@dataclass(frozen=True)
class Snapshot:
    """The batch-wide signals of one moment, by name; what cannot be read is missing."""

    values: Mapping[str, float | bool]


@dataclass(frozen=True, slots=True)
class RequestSignals:
    """The signals of one request; NaN in a number: not known yet, hence absent."""

    tier: str
    context_len: int
    output_len: int
    accept_length: float
    temperature: float

    def get(self, name: str) -> Value | None:
        """The value of `request.<field>`, or None where it is not known."""
        value: Value = getattr(self, name.removeprefix("request."))
        if isinstance(value, str):
            return value
        return None if math.isnan(value) else float(value)

"""Prometheus metrics on SGLang's own `/metrics`: what speculation does, what the policy decided and what it believed.

`METRICS` is the whole list (docs/metrics.md is tested against it). Written by the scheduler process of rank 0, one
value per step; never decides anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

PREFIX = "dspark_"


@dataclass(frozen=True)
class Metric:
    """kind: counter, gauge or histogram; labels: beside `dp_rank`, which all have."""

    name: str
    kind: str
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


METRICS = (
    Metric("steps", "counter", "Decode steps, by kind: plain or round.", ("kind",)),
    Metric("depth", "gauge", "Draft tokens verified per request in the last decode step, mean over its batch."),
    Metric("width", "gauge", "Nodes verified per request that had any in the last decode step; 0: a plain step."),
    Metric("rows", "gauge", "Rows of the target's forward in the last decode step, anchors included."),
    Metric("draft_tokens", "counter", "Draft tokens verified, by outcome: accepted or rejected.", ("outcome",)),
    Metric("emitted_tokens", "counter", "Tokens emitted by decode steps, by kind of step: plain or round.", ("kind",)),
    Metric("tokens_saved", "counter", "Tokens emitted beyond one per request and round: steps of the target saved."),
    Metric(
        "accepted_length",
        "histogram",
        "Tokens per request and verify round, bonus included.",
        buckets=tuple(range(1, 17)),
    ),
    Metric("phase_seconds", "counter", "Host seconds by part of a step: plan, draft, select, ...", ("phase",)),
    Metric("survival_predicted", "counter", "Draft tokens that calibrated confidence expected to be accepted."),
    Metric("survival_observed", "counter", "Draft tokens that were accepted where confidence had an expectation."),
    Metric("calibration_error", "counter", "Per round |predicted - observed| accepted draft tokens, added up."),
    Metric("step_seconds_predicted", "counter", "Seconds that the cost model expected of decode steps.", ("kind",)),
    Metric("step_seconds_observed", "counter", "Seconds that the same decode steps took.", ("kind",)),
    Metric("cost_ready", "gauge", "1 when the cost model has measured points, 0 while schedules do without."),
    Metric("active_rule", "gauge", "The policy's batch-wide rule in force, counted from 1; 0: none."),
    Metric("policy", "gauge", "1 for the policy in force.", ("name", "digest")),
    Metric("policy_reloads", "counter", "Saved versions of the policy, by result: accepted or refused.", ("result",)),
    Metric("bad_confidences", "counter", "Confidences that were NaN or outside 0 to 1, and taken as 0."),
    Metric("unsound_drafts", "counter", "Draft tokens drawn from a distribution of NaN; none is accepted."),
)


class Metrics:
    """The metrics of one scheduler. Created after SGLang has said where its processes share their values."""

    def __init__(self, dp_rank: int) -> None:
        # Only now: the client picks its shared memory folder when it is first imported.
        from prometheus_client import Counter, Gauge, Histogram

        self._rank = str(dp_rank)
        self._series: dict[tuple[str, ...], Any] = {}
        self._families: dict[str, Any] = {}
        for metric in METRICS:
            name, labels = PREFIX + metric.name, ("dp_rank", *metric.labels)
            if metric.kind == "counter":
                self._families[metric.name] = Counter(name, metric.help, labels)
            elif metric.kind == "gauge":
                self._families[metric.name] = Gauge(name, metric.help, labels, multiprocess_mode="mostrecent")
            else:
                self._families[metric.name] = Histogram(name, metric.help, labels, buckets=metric.buckets)
        self._policy: tuple[str, str] | None = None
        self._phases: dict[str, float] = {}
        self._totals: dict[str, float] = {}

    def add(self, name: str, value: float, *labels: str) -> None:
        """Increase a counter."""
        if value > 0:
            self._of(name, *labels).inc(value)

    def set(self, name: str, value: float, *labels: str) -> None:
        """Set a gauge."""
        self._of(name, *labels).set(value)

    def observe(self, name: str, values: Sequence[float]) -> None:
        """Put values into a histogram."""
        series = self._of(name)
        for value in values:
            series.observe(value)

    def total(self, name: str, total: float) -> None:
        """Bring a counter up to a total kept elsewhere."""
        self.add(name, total - self._totals.get(name, 0.0))
        self._totals[name] = total

    def phases(self, totals: Mapping[str, float]) -> None:
        """Seconds per phase since the server started."""
        for phase, total in totals.items():
            self.add("phase_seconds", total - self._phases.get(phase, 0.0), phase)
        self._phases = dict(totals)

    def policy(self, name: str, digest: str) -> None:
        """The policy in force; the one before it falls to 0."""
        if self._policy is not None:
            self.set("policy", 0, *self._policy)
        self._policy = (name, digest)
        self.set("policy", 1, name, digest)

    def _of(self, name: str, *labels: str) -> Any:
        key = (name, *labels)
        if key not in self._series:
            self._series[key] = self._families[name].labels(self._rank, *labels)
        return self._series[key]

"""What a step puts on `/metrics`, once it has been learned from. Decides nothing."""

from __future__ import annotations

from collections.abc import Mapping

from .bad_drafts import BadDrafts
from .metrics import Metrics
from .plan import StepRecord


def publish_step(metrics: Metrics, record: StepRecord, bad: BadDrafts, phases: Mapping[str, float]) -> None:
    """phases: host seconds since the server started"""
    step = record.step
    metrics.phases(phases)
    metrics.add("steps", 1, step.kind)
    metrics.add("emitted_tokens", step.emitted, step.kind)
    metrics.set("depth", step.offered / step.requests)
    metrics.set("width", step.offered / max(1, step.speculating))
    metrics.set("rows", step.rows)
    metrics.set("active_rule", 0 if record.active.rule is None else record.active.rule + 1)
    if step.offered:
        accepted = step.gained - step.speculating
        metrics.add("draft_tokens", accepted, "accepted")
        metrics.add("draft_tokens", step.offered - accepted, "rejected")
        metrics.observe("accepted_length", [n for n, k in zip(record.lengths, record.offered, strict=True) if k])
        predicted = float(record.predicted.sum())
        metrics.add("survival_predicted", predicted)
        metrics.add("survival_observed", accepted)
        metrics.add("calibration_error", abs(predicted - accepted))
        metrics.add("tokens_saved", accepted)
    metrics.total("bad_confidences", bad.confidences)
    metrics.total("unsound_drafts", bad.unsound)


def publish_seconds(metrics: Metrics, kind: str, seconds: float, expected: float | None) -> None:
    """What a step took, and what the cost model expected of it: None while that cannot tell."""
    metrics.set("cost_ready", expected is not None)
    if expected is not None:
        metrics.add("step_seconds_observed", seconds, kind)
        metrics.add("step_seconds_predicted", expected, kind)

"""A server's `/metrics` at one moment, and what happened between two of them. Reads text; never asks a server."""

from __future__ import annotations

from dataclasses import dataclass

Labels = frozenset[tuple[str, str]]


@dataclass(frozen=True)
class Scrape:
    """seconds: when, on any clock; series: every sample by name and labels"""

    seconds: float
    series: dict[str, dict[Labels, float]]

    @classmethod
    def of(cls, text: str, seconds: float) -> Scrape:
        """Raises ValueError where the text is not Prometheus's."""
        from prometheus_client.parser import text_string_to_metric_families  # SGLang's; other commands do without

        series: dict[str, dict[Labels, float]] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                series.setdefault(sample.name, {})[frozenset(sample.labels.items())] = sample.value
        return cls(seconds, series)

    def total(self, name: str, /, **labels: str) -> float | None:
        """The sum over all ranks of the series with these labels; None where there is none."""
        found = self._matching(name, labels)
        return sum(found) if found else None

    def greatest(self, name: str, /, **labels: str) -> float | None:
        """The greatest over all ranks."""
        return max(self._matching(name, labels), default=None)

    def values(self, name: str, label: str) -> dict[str, float]:
        """By the value of one label, summed over the others."""
        found: dict[str, float] = {}
        for labels, value in self.series.get(name, {}).items():
            key = dict(labels).get(label)
            if key is not None:
                found[key] = found.get(key, 0.0) + value
        return found

    def _matching(self, name: str, labels: dict[str, str]) -> list[float]:
        wanted = labels.items()
        return [value for have, value in self.series.get(name, {}).items() if wanted <= have]


@dataclass(frozen=True)
class Span:
    """From one scrape to a later one of the same server."""

    before: Scrape
    after: Scrape

    @property
    def seconds(self) -> float:
        return self.after.seconds - self.before.seconds

    def grown(self, name: str, /, **labels: str) -> float:
        """How much a counter grew; one that did not exist before counts from 0, one that fell began anew."""
        now, then = self.after.total(name, **labels) or 0.0, self.before.total(name, **labels) or 0.0
        return now - then if now >= then else now

    def rate(self, name: str, /, **labels: str) -> float:
        """The same per second."""
        return self.grown(name, **labels) / self.seconds

    def ratio(self, part: str, whole: str) -> float | None:
        """Growth of one counter over that of another; None where the other stood still."""
        grown = self.grown(whole)
        return self.grown(part) / grown if grown else None

    def grown_by(self, name: str, label: str) -> dict[str, float]:
        """Growth by the value of one label."""
        then = self.before.values(name, label)
        return {key: value - then.get(key, 0.0) for key, value in self.after.values(name, label).items()}

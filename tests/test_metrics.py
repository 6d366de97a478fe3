"""Every metric is documented under the name and labels that a scraper sees."""

import re
from pathlib import Path

from dspark_sgl import metrics
from dspark_sgl.metrics import METRICS, PREFIX

DOCS = Path(__file__).parent.parent / "docs" / "metrics.md"


def test_the_documentation_lists_exactly_what_is_exported():
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| ([^|]*)\|", DOCS.read_text(), re.MULTILINE)
    documented = {(name, kind, tuple(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}
    suffix = {"counter": "_total"}
    exported = {(PREFIX + m.name + suffix.get(m.kind, ""), m.kind, m.labels) for m in METRICS}
    assert documented == exported


def test_every_metric_the_code_writes_is_declared_and_the_other_way_round():
    sources = [Path(metrics.__file__).with_name(f"{name}.py") for name in ("step_metrics", "metrics", "policy_watch")]
    text = "\n".join(source.read_text() for source in sources)
    written = set(re.findall(r"\.(?:add|set|observe|total)\(\s*\"(\w+)\"", text))
    assert written == {metric.name for metric in METRICS}

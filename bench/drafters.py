"""Several drafters side by side: a table and the picture of acceptance by position, out of `bench accept` reports.

    dspark-sgl bench accept --algorithm A --prompts bench/prompts/eval.jsonl \\
        --temperature 0,1 --json A.json
    python -m bench.drafters dspark=A.json dflash=B.json [--plot OUT.svg]

Runs nothing. The first file is what the others are compared with.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Report = Mapping[str, Any]
DOMAINS = ("math", "code", "chat")
FEWEST = 30
"""A position reached in fewer rounds than this is left out of the picture."""


def by_temperature(file: Path) -> dict[str, Report]:
    """The reports of one file, by temperature."""
    found = json.loads(file.read_text())
    return found["temperatures"] if "temperatures" in found else {f"{found['run']['temperature']:g}": found}


def table(arms: Mapping[str, Mapping[str, Report]], temperature: str) -> list[str]:
    """Markdown rows: accepted lengths, the gain of the first arm over each, acceptance by position."""
    reports = {name: reports[temperature] for name, reports in arms.items() if temperature in reports}
    first = next(iter(reports.values()))
    lines = [
        f"| temperature {temperature} | macro | {' | '.join(DOMAINS)} | gain of the first | draft k accepted, "
        "given those before it |",
        f"|---|{'---:|' * (len(DOMAINS) + 2)}---|",
    ]
    for name, report in reports.items():
        lengths = [f"{report['domains'][domain]['accepted_length']:.2f}" for domain in DOMAINS]
        gain = "" if report is first else f"{100 * (first['macro'] / report['macro'] - 1):+.1f} %"
        shares = " ".join(f"{share:.2f}" for share in report["overall"]["acceptance_by_position"] if share is not None)
        lines.append(f"| {name} | {report['macro']:.2f} | {' | '.join(lengths)} | {gain} | {shares} |")
    return lines


def plot(arms: Mapping[str, Mapping[str, Report]], file: Path) -> None:
    """Conditional acceptance against position, a panel per temperature."""
    from matplotlib import pyplot

    temperatures = sorted({t for reports in arms.values() for t in reports})
    figure, axes = pyplot.subplots(
        1, len(temperatures), figsize=(4.5 * len(temperatures), 3.6), sharey=True, squeeze=False
    )
    for axis, temperature in zip(axes[0], temperatures, strict=True):
        for name, reports in arms.items():
            if temperature not in reports:
                continue
            overall = reports[temperature]["overall"]
            pairs = zip(overall["acceptance_by_position"], overall["reached_by_position"], strict=True)
            shares = [share for share, reached in pairs if reached >= FEWEST]
            axis.plot(range(1, 1 + len(shares)), shares, marker="o", label=name)
        axis.set_title(f"temperature {temperature}")
        axis.set_xlabel("position in the block")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("accepted, given those before")
    axes[0][0].set_ylim(0, 1)
    axes[0][-1].legend()
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "arms", nargs="+", metavar="NAME=FILE", help="a name for the table and a report of `bench accept`"
    )
    parser.add_argument("--plot", type=Path, metavar="OUT.svg", help="draw acceptance by position")
    options = parser.parse_args()
    arms = {name: by_temperature(Path(file)) for name, _, file in (arm.partition("=") for arm in options.arms)}
    for temperature in sorted({t for reports in arms.values() for t in reports}):
        print("\n".join([*table(arms, temperature), ""]))
    if options.plot:
        plot(arms, options.plot)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

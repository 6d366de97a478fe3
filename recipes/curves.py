"""Training runs side by side: expected accepted length on held-out text over response tokens read, as a picture.

    python -m recipes.curves NAME=RUN [NAME=RUN ...] --out OUT.svg

RUN is a folder of `recipes.train`. Trains nothing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def read_curve(run: Path) -> list[dict[str, Any]]:
    """The held-out figures of a run, earliest first."""
    return [json.loads(line) for line in (run / "curve.jsonl").read_text().splitlines()]


def draw(lines: Mapping[str, Sequence[tuple[float, float]]], xlabel: str, ylabel: str, out: Path) -> None:
    """One line of points (x, y) per name; the same file for the same points."""
    from matplotlib import pyplot, rc_context

    figure, axis = pyplot.subplots(figsize=(6, 4))
    for name, points in lines.items():
        axis.plot(*zip(*points, strict=True), marker="o", label=name)
    axis.set_xlabel(xlabel)
    axis.set_ylabel(ylabel)
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    with rc_context({"svg.hashsalt": "dspark"}):  # ids are drawn at random otherwise
        figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN", help="a name for the legend and the folder of its run")
    parser.add_argument("--out", type=Path, required=True, help="the picture, in the format that its ending says")
    args = parser.parse_args()
    runs = {name: read_curve(Path(run)) for name, _, run in (run.partition("=") for run in args.runs)}
    lines = {name: [(p["tokens"], p["expected_t1"]) for p in curve] for name, curve in runs.items()}
    draw(lines, "response tokens read in training", "expected accepted length, temperature 1", args.out)


if __name__ == "__main__":
    main()

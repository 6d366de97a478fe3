"""Training runs side by side: expected accepted length on held-out text over response tokens read, as a picture.

    python -m recipes.curves NAME=RUN [NAME=RUN ...] --out OUT.svg

RUN is a folder of `recipes.train`. Trains nothing.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 4))
    for name, _, run in (run.partition("=") for run in args.runs):
        curve = [json.loads(line) for line in (Path(run) / "curve.jsonl").read_text().splitlines()]
        axis.plot([p["tokens"] for p in curve], [p["expected_t1"] for p in curve], marker="o", label=name)
    axis.set_xlabel("response tokens read in training")
    axis.set_ylabel("expected accepted length, temperature 1")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    figure.savefig(args.out, metadata={"Date": None} if args.out.suffix == ".svg" else None)


if __name__ == "__main__":
    main()

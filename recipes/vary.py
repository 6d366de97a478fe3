"""One size of the training changed at a time: does the gap between two drafts come from it?

    python -m recipes.vary --model $TARGET --cache cache --out varied [--tokens 200000]

Every variation trains each draft that it concerns from the start, on the same readings in the same order, for the same
number of tokens. The table has the expected accepted length on held-out text at temperature 1, and DSpark's gain over
each of the others under that variation. A run that is done is not done again, one that was cut short goes on.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from recipes.curves import read_curve

COMPARED = ("dspark", "dflash", "eagle3")
UNCHANGED = "unchanged"
VARIATIONS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    UNCHANGED: ((), COMPARED),
    "half the learning rate": (("--lr", "4e-3"), COMPARED),
    "a quarter of the learning rate": (("--lr", "2e-3"), COMPARED),
    "twice the learning rate": (("--lr", "16e-3"), COMPARED),
    "4 layers": (("--layers", "4"), ("dspark", "dflash")),
    "rank 128": (("--rank", "128"), ("dspark",)),
    "rank 8": (("--rank", "8"), ("dspark",)),
    "twice the anchors": (("--anchor-share", "0.5"), COMPARED),
    "cross entropy alone": (("--l1", "0", "--ce", "1"), COMPARED),
    "1 layer": (("--layers", "1"), ("dspark", "dflash")),
}
"""What changes against the defaults of `recipes.train`, and the drafts that it changes."""


def folder(out: Path, variation: str, algorithm: str) -> Path:
    """Of the run; where a variation does not concern a draft, of the unchanged one."""
    concerns = algorithm in VARIATIONS[variation][1]
    return out / (variation if concerns else UNCHANGED).replace(" ", "-") / algorithm


def expected(run: Path, tokens: int) -> float | None:
    """Expected accepted length, bonus included, after all `tokens`; None while there is more to read."""
    curve = read_curve(run) if (run / "curve.jsonl").exists() else []
    return float(curve[-1]["expected_t1"]) if curve and curve[-1]["tokens"] >= tokens else None


def table(lengths: Mapping[str, Mapping[str, float]]) -> str:
    """Markdown of {variation: {algorithm: expected length}}; a dash for what is not there yet."""
    rows = [["", *COMPARED, *(f"gain over {other}" for other in COMPARED[1:])]]
    rows += [["---", *["---:"] * (len(rows[0]) - 1)]]
    for variation, of in lengths.items():
        found = [of.get(algorithm) for algorithm in COMPARED]
        mine, *others = found
        gains = [f"{100 * (mine / other - 1):+.1f} %" if mine and other else "-" for other in others]
        rows.append([variation, *("-" if length is None else f"{length:.3f}" for length in found), *gains])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of the target checkpoint")
    parser.add_argument("--cache", required=True, help="folder of recipes.states")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--tokens", type=int, default=200_000, help="that each run reads (default: %(default)s)")
    parser.add_argument("--table", action="store_true", help="of the runs that there are, and train nothing")
    args = parser.parse_args()
    command = [sys.executable, "-m", "recipes.train", "--model", args.model, "--cache", args.cache]
    command += ["--tokens", str(args.tokens), "--resume"]
    for variation, (changed, concerned) in VARIATIONS.items():
        for algorithm in concerned:
            run = folder(args.out, variation, algorithm)
            if not args.table and expected(run, args.tokens) is None:
                print(f"{variation}: {algorithm}", flush=True)
                subprocess.run([*command, "--algorithm", algorithm, "--out", str(run), *changed], check=True)
    lengths: dict[str, dict[str, float]] = {}
    for variation in VARIATIONS:
        found = {algorithm: expected(folder(args.out, variation, algorithm), args.tokens) for algorithm in COMPARED}
        lengths[variation] = {algorithm: length for algorithm, length in found.items() if length is not None}
    print(table(lengths))


if __name__ == "__main__":
    main()

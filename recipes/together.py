"""Every draft at once, for whoever has a GPU for a few minutes: the target writes the data, four trainers read it.

    python -m recipes.together --model $TARGET --prompts $PROMPTS --exclude $PROMPTS/eval.jsonl --out run

A draft this small keeps a GPU waiting for its host, and four of them keep it busy. They are given the same records in
the same order, as ever. Nothing is trained here; what is done already in `--out` is not done again.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from recipes.data import read_records
from recipes.drafts import ALGORITHMS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of the target checkpoint")
    parser.add_argument("--prompts", required=True, help="folder with train-{chat,code,math}.jsonl")
    parser.add_argument("--exclude", nargs="*", default=[], help="prompt files that must never be answered")
    parser.add_argument("--data", nargs="*", default=[], help="response files that there are already")
    parser.add_argument("--out", type=Path, required=True, help="folder for responses.jsonl and a run per algorithm")
    parser.add_argument("--write", type=int, default=6_000_000, help="response tokens that the target writes")
    parser.add_argument("--tokens", type=int, default=12_000_000, help="response tokens that each draft reads")
    parser.add_argument("--minutes", type=float, help="of training, at most")
    parser.add_argument("--slots", type=int, default=1024, help="responses written at once")
    parser.add_argument("--sequences", type=int, default=16, help="responses in a training step")
    parser.add_argument("--report-every", type=float, default=0.5, help="minutes")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    responses = args.out / "responses.jsonl"
    write_responses(args, responses)
    print(f"responses: {time.monotonic() - start:.0f} s", flush=True)
    trainers = [start_trainer(algorithm, args, responses) for algorithm in ALGORITHMS]
    failed = [algorithm for algorithm, trainer in zip(ALGORITHMS, trainers, strict=True) if trainer.wait()]
    print(f"drafts: {time.monotonic() - start:.0f} s", flush=True)
    for algorithm in failed:
        print(f"error: {algorithm} has not been trained: see {args.out / algorithm}.log", file=sys.stderr)
    return 1 if failed else 0


def write_responses(args: argparse.Namespace, responses: Path) -> None:
    written = sum(len(r.response_ids) for r in read_records(responses)) if responses.exists() else 0
    if written >= args.write:
        return
    command = [sys.executable, "-m", "recipes.generate", "--model", args.model, "--prompts", args.prompts]
    command += ["--exclude", *args.exclude, "--seen", *args.data, "--out", str(responses)]
    command += ["--tokens", str(args.write - written), "--slots", str(args.slots)]
    subprocess.run(command, check=True)


def start_trainer(algorithm: str, args: argparse.Namespace, responses: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "recipes.train", "--algorithm", algorithm, "--model", args.model, "--resume"]
    command += ["--data", *args.data, str(responses), "--out", str(args.out / algorithm)]
    command += ["--tokens", str(args.tokens), "--sequences", str(args.sequences), "--accumulate", "1"]
    command += ["--workers", "1", "--report-every", str(args.report_every)]
    if args.minutes is not None:
        command += ["--minutes", str(args.minutes)]
    with (args.out / f"{algorithm}.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


if __name__ == "__main__":
    raise SystemExit(main())

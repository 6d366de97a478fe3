"""Traces of decode rounds at Qwen3-8B's size, for a reader of `chrome://tracing`: where the host is, and the GPU idle.

    python -m bench.gpu.trace --bundle build/gpu --out DIR

Beside the runner, not part of it: a trace says why a round takes as long as `bench/gpu/run` has found it to.
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from .bundle import Bundle
from .fleet import Fleet
from .serving import known, measure_serving, phase_table, serving_table

STEPS = 8


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--bundle", type=Path, required=True, metavar="PARTS")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--logs", type=Path, default=Path("/tmp"))
    parser.add_argument("--users", type=int, nargs="*", default=[1, 64])
    parser.add_argument("--arms", nargs="*", default=["SGLang's DSPARK", "ours, fixed-7"])
    parser.add_argument("--patience", type=float, default=200, help="seconds for servers to start (default: 200)")
    parser.add_argument("--seconds", type=float, default=30, help="speeds are measured too, so long (default: 30)")
    options = parser.parse_args()
    bundle = Bundle.unpacked(options.bundle)
    target = known(bundle.site.parent / "qwen3-8b-in-size")
    target = replace(target, arms={arm: target.arms[arm] for arm in options.arms})
    fleet = Fleet(target, bundle.environment, options.logs, 32000)
    try:
        fleet.wait(options.patience)
        points = measure_serving(fleet, options.seconds)
        print(
            "\n".join([*serving_table(target.title, points), "", *phase_table(points), *fleet.failures()]), flush=True
        )
        for number, arm in enumerate(fleet.ready):
            for users in options.users:
                for stack in (False, True):
                    trace(fleet, arm, users, options.out, f"{number}-{users}-{'stack' if stack else 'plain'}", stack)
    finally:
        fleet.stop()
    return 0


def trace(fleet: Fleet, arm: str, users: int, out: Path, name: str, stack: bool) -> None:
    """A trace of `STEPS` steps amid the answers of so many users; `stack`: with the Python functions, which slows it"""
    with ThreadPoolExecutor(users) as crowd:
        answers = [crowd.submit(fleet.ask, arm, prompt, fleet.target.tokens) for prompt in fleet.target.prompts[:users]]
        time.sleep(0.5 + users / 32)
        fleet.profile(arm, {"output_dir": str(out), "profile_prefix": name, "num_steps": STEPS, "with_stack": stack})
        for answer in answers:
            answer.result()


if __name__ == "__main__":
    raise SystemExit(main())

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

from dspark_sgl.ending import unwind_when_told_to_end

from .bundle import Bundle
from .servers import GpuServers
from .serving import known, measure_serving, phase_table, serving_table

STEPS = 8


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--bundle", type=Path, required=True, metavar="PARTS", help="the folder that bench/gpu/pack has filled"
    )
    parser.add_argument("--out", type=Path, required=True, help="the folder for the traces")
    parser.add_argument("--logs", type=Path, default=Path("/tmp"), help="where servers' logs go (default: /tmp)")
    parser.add_argument("--users", type=int, nargs="*", default=[1, 64], help="at once (default: 1 64)")
    parser.add_argument("--arms", nargs="*", default=["SGLang's DSPARK", "ours, fixed-7"], help="default: both DSparks")
    parser.add_argument("--patience", type=float, default=200, help="seconds for servers to start (default: 200)")
    parser.add_argument("--seconds", type=float, default=30, help="speeds are measured too, so long (default: 30)")
    options = parser.parse_args()
    unwind_when_told_to_end()
    bundle = Bundle.unpacked(options.bundle)
    target = known(bundle.site.parent / "qwen3-8b-in-size")
    target = replace(target, arms={arm: target.arms[arm] for arm in options.arms})
    servers = GpuServers(target, bundle.environment, options.logs, 32000)
    try:
        servers.wait(options.patience)
        points = measure_serving(servers, options.seconds)
        print(
            "\n".join([*serving_table(target.title, points), "", *phase_table(points), *servers.failures()]), flush=True
        )
        for number, arm in enumerate(servers.ready):
            for users in options.users:
                for stack in (False, True):
                    trace(servers, arm, users, options.out, f"{number}-{users}-{'stack' if stack else 'plain'}", stack)
    finally:
        servers.stop()
    return 0


def trace(servers: GpuServers, arm: str, users: int, out: Path, name: str, stack: bool) -> None:
    """A trace of `STEPS` steps amid the answers of so many users; `stack`: with the Python functions, which slows it"""
    with ThreadPoolExecutor(users) as crowd:
        answers = [
            crowd.submit(servers.ask, arm, prompt, servers.target.tokens) for prompt in servers.target.prompts[:users]
        ]
        time.sleep(0.5 + users / 32)
        servers.profile(arm, {"output_dir": str(out), "profile_prefix": name, "num_steps": STEPS, "with_stack": stack})
        for answer in answers:
            answer.result()


if __name__ == "__main__":
    raise SystemExit(main())

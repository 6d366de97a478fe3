"""What a policy's rules cost per step: microseconds for the batch, and per request where rules read `request.*`.

    python -m bench.rules [--policy NAME|FILE] [--requests N] [--json OUT]

Every measured step has another load, as in a server, so nothing is answered from the step before.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from dspark_sgl.policies import RequestSignals, RuleBook, Snapshot, find_policy

STEPS = 2000


def measure(policy: str, requests: int) -> dict[str, float]:
    """Medians over the steps, in microseconds."""
    book = RuleBook(find_policy(policy), block=7)
    loads = [_load(step) for step in range(STEPS)]
    signals = [RequestSignals("interactive", 900 + 10 * i, 40 + i, 1.1 + 0.01 * i, 0.0) for i in range(requests)]
    active = book.batch(loads[0])
    batch = _median(lambda step: book.batch(loads[step]), STEPS)
    each = _median(lambda step: [book.request(active, loads[step], request) for request in signals], STEPS // 20)
    return {"batch_us": batch, "requests": requests, "requests_us": each, "request_us": each / requests}


def _load(step: int) -> Snapshot:
    share = step / STEPS
    gpu: dict[str, float | bool] = {"gpu.util": share, "gpu.temp_c": 40 + 40 * share, "gpu.throttled": False}
    return Snapshot({"batch.size": float(step % 64), "kv.usage": share, "queue.length": float(step % 3), **gpu})


def _median(work: Callable[[int], object], steps: int) -> float:
    times = []
    for step in range(steps):
        start = time.perf_counter_ns()
        work(step)
        times.append(time.perf_counter_ns() - start)
    return statistics.median(times) / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policy", default="adaptive", metavar="NAME|FILE", help="default: %(default)s")
    parser.add_argument("--requests", type=int, default=256, help="in the batch (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures there")
    options = parser.parse_args()
    found = measure(options.policy, options.requests)
    print(
        f"{options.policy}: batch {found['batch_us']:.1f} us, {options.requests} requests {found['requests_us']:.0f} us"
    )
    if options.json:
        options.json.write_text(json.dumps({"policy": options.policy, **found}, indent=2) + "\n")


if __name__ == "__main__":
    main()

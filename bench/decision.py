"""What a policy's own work costs: select alone, and everything the governor does for a step, without a model.

    python -m bench.decision [--requests 512] [--block 7] [--policy adaptive] [--passes 300]

One core, real schedulers, random confidences. Prints median and 99th percentile in microseconds; the target of `select`
is a median under 300 for 512 requests and a block of 7.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np

from dspark_sgl.policies.batch import Batch
from dspark_sgl.policies.calibration import Calibration
from dspark_sgl.policies.forest import Forest
from dspark_sgl.policies.reference import reference_cost
from dspark_sgl.policies.rules import RuleBook
from dspark_sgl.policies.scheduler import make_scheduler
from dspark_sgl.policies.shipped import find_policy, shipped_names
from dspark_sgl.policies.signals import RequestSignals, Snapshot


def timed(label: str, passes: int, step: Callable[[], object]) -> None:
    for _ in range(20):
        step()
    taken = []
    for _ in range(passes):
        start = time.perf_counter()
        step()
        taken.append((time.perf_counter() - start) * 1e6)
    print(f"{label:34} {np.median(taken):8.0f} {np.percentile(taken, 99):8.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--requests", type=int, default=512, help="in the batch (default: %(default)s)")
    parser.add_argument("--block", type=int, default=7, help="drafts a request (default: %(default)s)")
    parser.add_argument("--policy", metavar="NAME|FILE", help="default: all that ship")
    parser.add_argument("--passes", type=int, default=300, help="of each operation (default: %(default)s)")
    options = parser.parse_args()
    n, block = options.requests, options.block
    dice = np.random.default_rng(0)
    confidence = dice.uniform(0.3, 0.99, (n, block))
    signals = [RequestSignals("default", int(c), 100, 2.0, 1.0) for c in dice.integers(100, 4000, n)]
    snapshot = Snapshot({"batch.size": n, "kv.usage": 0.5, "queue.length": 0, "context.mean": 2000.0})
    cost, calibration = reference_cost(), Calibration()
    batch = Batch(np.zeros(n, np.int64), np.full(n, block), np.ones(n), 2000 * n, snapshot.values)
    print(f"{n} requests, block {block}; microseconds{'median':>14}{'p99':>9}")
    timed("calibrate", options.passes, lambda: calibration.apply(confidence))
    chains = Forest.chains(n, block)
    path = np.where(np.arange(block + 1) <= dice.integers(0, block + 1, (n, 1)), np.arange(block + 1), -1)
    verified = np.ones((n, block), dtype=bool)

    def learn() -> None:
        survived = chains.on_path(verified, path)
        calibration.observe(confidence, chains.depth, chains.tested(verified, survived), survived)

    timed("learn", options.passes, learn)
    survival = calibration.apply(confidence)
    for name in [options.policy] if options.policy else shipped_names():
        policy = find_policy(name)
        rules = RuleBook(policy, block)
        scheduler = make_scheduler(policy.schedule, cost, policy.cost.margin, "early_stop")

        def limits(rules: RuleBook = rules) -> object:
            active = rules.batch(snapshot)
            return [rules.request(active, snapshot, request) for request in signals]

        timed(f"{name}: limits", options.passes, limits)
        timed(f"{name}: draft_depths", options.passes, lambda s=scheduler: s.draft_depths(batch, survival))  # type: ignore[misc]
        timed(f"{name}: select", options.passes, lambda s=scheduler: s.select(batch, survival))  # type: ignore[misc]


if __name__ == "__main__":
    main()

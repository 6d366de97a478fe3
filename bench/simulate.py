"""How fast the simulator is: a million requests through one policy, on one core.

python -m bench.simulate [--requests 1000000] [--policy throughput] [--users 64]
"""

from __future__ import annotations

import argparse
import time

from dspark_sgl.policies.reference import PREFILL_S, PREFILL_TOKEN_S, reference_cost
from dspark_sgl.policies.shipped import find_policy
from dspark_sgl.policies.simulator import Machine, simulate
from dspark_sgl.policies.workload import closed_loop


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--requests", type=int, default=1_000_000, help="default: %(default)s")
    parser.add_argument("--policy", default="throughput", metavar="NAME|FILE", help="default: %(default)s")
    parser.add_argument("--users", type=int, default=64, help="at once (default: %(default)s)")
    parser.add_argument("--output-tokens", type=int, default=64, help="of an answer (default: %(default)s)")
    options = parser.parse_args()
    work = closed_loop(options.users, options.requests, 500, options.output_tokens, [0.8] * 7)
    machine = Machine(reference_cost(), 7, PREFILL_S, PREFILL_TOKEN_S, 1_000_000, options.users)
    start = time.perf_counter()
    result = simulate(find_policy(options.policy), work, machine)
    seconds = time.perf_counter() - start
    print(
        f"{result.requests} requests, {result.steps} steps in {seconds:.1f} s: {seconds / result.steps * 1e6:.0f} us "
        f"each; {result.output_tps:.0f} tokens/s simulated, depth {result.depth:.2f}"
    )


if __name__ == "__main__":
    main()

"""What the simulator predicts for many GPUs: replicas of one model behind a router that does not spread load evenly.

    python -m bench.fleet [--gpus 8,64,512] [--policies off,fixed-1,fixed-3,fixed-7,adaptive]

Each GPU is the reference machine of `dspark-sgl policy simulate` and serves its own share of Poisson arrivals. A router
that keeps prefixes together gives some replicas more than others: shares are lognormal with `--skew` as deviation of
their logarithm. No GPU is involved, and nothing here was measured on one.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dspark_sgl.policies.language import Policy
from dspark_sgl.policies.reference import PREFILL_S, PREFILL_TOKEN_S, reference_cost
from dspark_sgl.policies.shipped import find_policy
from dspark_sgl.policies.simulator import Machine, Result, simulate
from dspark_sgl.policies.workload import open_loop

MACHINE = Machine(reference_cost(), 7, PREFILL_S, PREFILL_TOKEN_S, 1_000_000, 256)


@dataclass(frozen=True)
class Replicas:
    """One policy on every replica. `results` in the order of their load, lightest first."""

    results: tuple[Result, ...]

    @property
    def user_tps(self) -> float:
        """Mean speed of a request, whichever replica served it."""
        requests = sum(result.requests for result in self.results)
        return sum(result.user_tps * result.requests for result in self.results) / requests

    def share(self, least: float, most: float) -> tuple[Result, ...]:
        """The replicas between two quantiles of load."""
        n = len(self.results)
        return self.results[math.floor(least * n) : math.ceil(most * n)]


def shares(gpus: int, skew: float, seed: int) -> np.ndarray:
    """float64 `[gpus]`: load of each replica over the mean, ascending."""
    drawn = np.random.default_rng([seed, gpus]).lognormal(0, skew, gpus)
    return np.sort(drawn / drawn.mean())


def run(policy: Policy, load: np.ndarray, seconds: float, acceptance: Sequence[float]) -> Replicas:
    """load: float64 `[gpus]`, requests a second for each"""
    works = [
        open_loop(float(rate), max(8, round(rate * seconds)), 500, 200, acceptance, seed)
        for seed, rate in enumerate(load)
    ]
    return Replicas(tuple(simulate(policy, work, MACHINE, seed) for seed, work in enumerate(works)))


def mean_depth(results: Sequence[Result]) -> float:
    return sum(result.depth for result in results) / len(results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gpus", default="8,64,512", metavar="N,..", help="how many (default: %(default)s)")
    parser.add_argument(
        "--rates", default="10,30,50", metavar="R,..", help="requests a second per GPU (default: %(default)s)"
    )
    parser.add_argument(
        "--policies", default="off,fixed-1,fixed-3,fixed-7,adaptive", metavar="P,..", help="default: %(default)s"
    )
    parser.add_argument(
        "--acceptance", type=float, default=0.8, help="of a draft after the one before (default: %(default)s)"
    )
    parser.add_argument("--skew", type=float, default=0.4, help="of the load (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=20, help="of arrivals (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of shares of load (default: %(default)s)")
    options = parser.parse_args()
    policies = [find_policy(name) for name in options.policies.split(",")]
    names = " | ".join(policy.name for policy in policies)
    print(
        f"An 8B model per GPU (policies/reference.py), each draft accepted with {options.acceptance} after the one "
        f"before; prompts of 500 tokens, 200 written; shares of load lognormal({options.skew})."
    )
    print(
        "Tokens per second for a user, by policy, and the last policy's depth where load is light and where it is not\n"
    )
    print(f"| GPUs | requests/s | {names} | lightest tenth | fullest tenth |")
    print("|" + "---:|" * (4 + len(policies)))
    for gpus in map(int, options.gpus.split(",")):
        load = shares(gpus, options.skew, options.seed)
        for rate in map(float, options.rates.split(",")):
            chances = [options.acceptance] * MACHINE.block
            served = [run(policy, rate * load, options.seconds, chances) for policy in policies]
            depths = (mean_depth(served[-1].share(*tenth)) for tenth in ((0, 0.1), (0.9, 1)))
            cells = [f"{replicas.user_tps:.0f}" for replicas in served] + [f"{depth:.1f}" for depth in depths]
            print(f"| {gpus} | {rate * gpus:g} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()

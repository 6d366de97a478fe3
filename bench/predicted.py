"""The simulator against the real server: output tokens/s predicted and measured, closed loop, three policies.

    python -m bench.predicted [--concurrency 1,4,8,16] [--per-user 4] [--tokens 64] [--json OUT]

One server; its policy file is rewritten between arms. What the simulator is told is measured first, on other prompts:
the profile the server took at its start and how far real steps lie from it, the line of a prefill over its tokens, and
acceptance by position. Exits 1 when a point is off by more than 10 %.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dspark_sgl.policies.cost import CostModel
from dspark_sgl.policies.reader import parse_policy
from dspark_sgl.policies.simulator import Machine, simulate
from dspark_sgl.policies.workload import closed_loop
from dspark_sgl.server import Server
from dspark_sgl.target import make_target

from .prompts import eval_prompts

SCHEDULES = {
    "off": "{kind: fixed, depth: 0}",
    "fixed-3": "{kind: fixed, depth: 3}",
    "throughput": "{kind: throughput}",
}
FULL = "{kind: fixed, depth: 64}"
SPECULATE = ("--speculative-algorithm", "DSPARK_SGL", "--dspark-policy")


def policy_text(schedule: str) -> str:
    """A policy that does not refine the cost: the simulator is to be told what the profile says."""
    return f"version: 1\nname: arm\nschedule: {schedule}\ncost: {{refine: off}}\n"


def ask(server: Server, prompts: Sequence[str], users: int, tokens: int) -> tuple[float, float]:
    """Seconds until everybody is answered, and prompt tokens that the radix cache did not have, mean."""
    start = time.perf_counter()
    with ThreadPoolExecutor(users) as pool:
        ways = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
        answers = list(pool.map(lambda prompt: server.generate(prompt, **ways), prompts))
    seconds = time.perf_counter() - start
    return seconds, float(np.mean([a.meta["prompt_tokens"] - a.meta["cached_tokens"] for a in answers]))


def step_seconds(server: Server) -> dict[str, np.ndarray]:
    """Predicted and observed seconds of steps so far, by kind."""
    totals: dict[str, np.ndarray] = {}
    for which, kind, value in re.findall(
        r'^dspark_step_seconds_(predicted|observed)_total\{.*kind="(\w+)".*\} (\S+)$', server.get("/metrics"), re.M
    ):
        totals.setdefault(kind, np.zeros(2))[which == "observed"] = float(value)
    return totals


def learn(server: Server, file: Path, prompts: Sequence[str], block: int) -> tuple[list[float], dict[str, float]]:
    """Acceptance by position, and how far steps lie from the profile, on prompts that are not measured later."""
    ratios = {}
    for kind, schedule in (("plain", SCHEDULES["off"]), ("round", FULL)):
        server.edit_policy(file, policy_text(schedule))
        before = step_seconds(server).get(kind, np.zeros(2))
        for users in (1, 8):
            ask(server, prompts[: 2 * users], users, 48)
        predicted, observed = step_seconds(server)[kind] - before
        ratios[kind] = observed / predicted
    histogram = {int(length): n for length, n in server.report()["accepted_histogram"].items()}
    reached = [sum(n for length, n in histogram.items() if length > k) for k in range(block + 1)]
    return [reached[k + 1] / reached[k] if reached[k] else 0.0 for k in range(block)], ratios


def prefill_line(server: Server, prompts: Sequence[str]) -> tuple[float, float]:
    """Seconds of a prefill, and of each of its tokens: a line through single requests of several lengths."""
    points = []
    for prompt in prompts:
        start = time.perf_counter()
        answer = server.generate(prompt, temperature=0, max_new_tokens=1)
        fresh = answer.meta["prompt_tokens"] - answer.meta["cached_tokens"]
        points.append((fresh, time.perf_counter() - start))
    slope, base = np.polyfit(*zip(*points, strict=True), 1)
    return max(0.0, float(base)), max(0.0, float(slope))


def profile_in(cache: Path) -> CostModel:
    """The one profile that a server with this cache folder has taken."""
    (file,) = cache.rglob("costs/*.json")
    cost = CostModel.load(file)
    assert cost is not None
    return cost


def scaled(cost: CostModel, ratios: dict[str, float]) -> CostModel:
    """The profile, times how far real steps lie from it."""
    ratio = {"plain": ratios["plain"], "draft": ratios["round"], "verify": ratios["round"]}
    return CostModel.from_points([replace(p, seconds=p.seconds * ratio[p.kind]) for p in cost.points])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--concurrency", default="1,4,8,16")
    parser.add_argument("--per-user", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    prompts = [prompt.text for prompt in eval_prompts(240)]
    measured, others = prompts[::2], prompts[1::2]
    folder = Path(tempfile.mkdtemp())
    file = folder / "arm.yaml"
    file.write_text(policy_text(FULL))
    points: list[dict[str, Any]] = []
    arguments = ["--model-path", str(make_target()), *SPECULATE, str(file)]
    # A cache of its own, so that it takes its profile now and not on the machine as it was last week.
    with Server(arguments, {"XDG_CACHE_HOME": str(folder)}) as server:
        block = int(server.get("/server_info")["speculative_num_steps"])
        ask(server, others[:2], 2, 16)  # warm
        base, per_token = prefill_line(server, others[-24:])
        acceptance, ratios = learn(server, file, others, block)
        cost = scaled(profile_in(folder), ratios)
        print(f"acceptance {[round(a, 2) for a in acceptance]}, steps against the profile {ratios}, ", end="")
        print(f"prefill {1e3 * base:.1f} ms + {1e6 * per_token:.0f} us a token\n")
        print("policy        users   predicted    measured    ratio")
        for name, schedule in SCHEDULES.items():
            server.edit_policy(file, policy_text(schedule))
            policy = parse_policy(file.read_text())
            for users in map(int, options.concurrency.split(",")):
                chosen = measured[: users * options.per_user]
                server.flush()
                seconds, fresh = ask(server, chosen, users, options.tokens)
                work = closed_loop(users, len(chosen), round(fresh), options.tokens, acceptance, spread=0)
                machine = Machine(cost, block, base, per_token, 131_072, 256)
                speeds = [simulate(policy, work, machine, seed).output_tps for seed in range(5)]
                point = {
                    "policy": name,
                    "users": users,
                    "predicted_tps": float(np.median(speeds)),
                    "measured_tps": len(chosen) * options.tokens / seconds,
                }
                points.append(point)
                ratio = point["predicted_tps"] / point["measured_tps"]
                print(f"{name:12} {users:6} {point['predicted_tps']:11.1f} {point['measured_tps']:11.1f} {ratio:8.2f}")
    if options.json:
        options.json.write_text(json.dumps({"acceptance": acceptance, "ratios": ratios, "points": points}, indent=1))
    return int(any(not 0.9 <= p["predicted_tps"] / p["measured_tps"] <= 1.1 for p in points))


if __name__ == "__main__":
    raise SystemExit(main())

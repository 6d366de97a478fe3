"""The simulator against the real server: output tokens/s predicted and measured, closed loop, three policies.

    python -m bench.predicted [--concurrency 1,4,8,16] [--per-user 3] [--tokens 64] [--passes 3] [--json OUT]

One server; its policy file is rewritten between arms. What the simulator is told: the profile the server took at its
start, by which its scheduler decides; how far real steps lie from it, measured anew in every pass on other prompts,
since a machine's speed moves; the line of a prefill over its tokens; how soon a client asks again; and, as of any
workload, how the drafts of each prompt fare by position, counted once with the whole block offered: some prompts take
twice the rounds of others, and the last to finish run alone. Arms take turns; a point is the median ratio of its
passes. Exits 1 when one is off by more than 10 %.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dspark_sgl.policies.cost import CostModel, CostPoint
from dspark_sgl.policies.reader import parse_policy
from dspark_sgl.policies.simulator import Machine, simulate
from dspark_sgl.policies.workload import Floats, Ints, Workload
from dspark_sgl.scrape import Scrape
from dspark_sgl.server import Server
from dspark_sgl.target import make_target

from .prompts import eval_prompts

SCHEDULES = {
    "off": "{kind: fixed, depth: 0}",
    "fixed-3": "{kind: fixed, depth: 3}",
    "throughput": "{kind: throughput}",
}
FULL = "{kind: fixed, depth: 64}"
LEARN_AT = (1, 4, 8, 16)
"""Users at once, when the profile is compared with real steps."""
Ratios = dict[int, list[float]]
"""Observed over predicted seconds at each of these loads, by rows of a request: 1 is a plain step."""
SPECULATE = ("--speculative-algorithm", "DSPARK_SGL", "--dspark-policy")


@dataclass(frozen=True)
class Point:
    """Output tokens/s of one policy under one load, in one pass."""

    predicted: float
    measured: float

    @property
    def ratio(self) -> float:
        return self.predicted / self.measured


def middle(passes: Sequence[Point]) -> float:
    return float(np.median([point.ratio for point in passes]))


def policy_text(schedule: str) -> str:
    """A policy that does not refine the cost: the simulator is to be told what the profile says."""
    return f"version: 1\nname: arm\nschedule: {schedule}\ncost: {{refine: off}}\n"


def ask(server: Server, prompts: Sequence[str], users: int, tokens: int) -> tuple[float, Ints]:
    """Seconds until everybody is answered, and each prompt's tokens that the radix cache did not have."""
    start = time.perf_counter()
    with ThreadPoolExecutor(users) as pool:
        ways = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
        answers = list(pool.map(lambda prompt: server.generate(prompt, **ways), prompts))
    seconds = time.perf_counter() - start
    return seconds, np.array([a.meta["prompt_tokens"] - a.meta["cached_tokens"] for a in answers])


def step_seconds(server: Server, kind: str) -> np.ndarray:
    """Predicted and observed seconds of steps of this kind so far."""
    now = Scrape.of(server.get("/metrics"), time.monotonic())
    names = (f"dspark_step_seconds_{which}_total" for which in ("predicted", "observed"))
    return np.array([now.total(name, kind=kind) or 0.0 for name in names])


def drift(server: Server, file: Path, prompts: Sequence[str], block: int) -> Ratios:
    """How far real steps lie from the profile now."""
    ratios: Ratios = {}
    for depth in (0, 1, 3, block):
        server.edit_policy(file, policy_text(f"{{kind: fixed, depth: {depth}}}"))
        kind = "round" if depth else "plain"
        for users in LEARN_AT:
            before = step_seconds(server, kind)
            ask(server, prompts[: max(2, users)], users, 48)
            predicted, observed = step_seconds(server, kind) - before
            ratios.setdefault(1 + depth, []).append(float(observed / predicted))
    return ratios


def prefill_line(server: Server, prompts: Sequence[str]) -> tuple[float, float]:
    """Seconds of a prefill, and of each of its tokens: a line through single requests of several lengths. One through
    prefills of many requests says too little of the small ones."""
    points = []
    for prompt in prompts:
        start = time.perf_counter()
        answer = server.generate(prompt, temperature=0, max_new_tokens=1)
        fresh = answer.meta["prompt_tokens"] - answer.meta["cached_tokens"]
        points.append((fresh, time.perf_counter() - start))
    slope, base = np.polyfit(*zip(*points, strict=True), 1)
    return max(0.0, float(base)), max(0.0, float(slope))


def turnaround(server: Server, prompts: Sequence[str]) -> float:
    """Seconds from the end of an answer to the scheduler's sight of the next question: what of a request's time is
    nobody's step, median."""
    found = []
    for prompt in prompts:
        before = server.report()["seconds"]["prefill"]
        start = time.perf_counter()
        server.generate(prompt, temperature=0, max_new_tokens=1)
        found.append(time.perf_counter() - start - (server.report()["seconds"]["prefill"] - before))
    return max(0.0, float(np.median(found)))


def acceptance(server: Server, file: Path, prompts: Sequence[str], tokens: int, block: int) -> Floats:
    """float64 `[R, block]`: the chance that drafts 1..k of a prompt all survive, when the whole block is offered. What
    one prompt shows of a late position is little: the share among all prompts counts as one more round of it."""
    server.edit_policy(file, policy_text(FULL))
    reached = np.zeros((len(prompts), block + 1))
    for row, prompt in zip(reached, tqdm(prompts, desc="acceptance by prompt"), strict=True):
        before = Counter(server.report()["accepted_histogram"])
        ask(server, [prompt], 1, tokens)
        for length, rounds in (Counter(server.report()["accepted_histogram"]) - before).items():
            row[: int(length)] += rounds
    everybody = reached.sum(0)
    share = everybody[1:] / np.maximum(everybody[:-1], 1)
    return np.cumprod((reached[:, 1:] + share) / (reached[:, :-1] + 1), axis=1)


def workload(fresh: Ints, tokens: int, survival: Floats, users: int, pause: float) -> Workload:
    """So many users who take the next prompt as soon as they are answered; each prompt is a kind of its own."""
    n = len(fresh)
    lengths = np.full(n, tokens, np.int64)
    return Workload(np.zeros(n), fresh, lengths, np.arange(n), survival[:n], users, pause)


def profile_in(cache: Path) -> CostModel:
    """The one profile that a server with this cache folder has taken."""
    (file,) = cache.rglob("costs/*.json")
    cost = CostModel.load(file)
    assert cost is not None
    return cost


def scaled(cost: CostModel, ratios: Ratios) -> CostModel:
    """The profile, with steps as long as they are now: the engine works for each request, clients share the cores here,
    and one measurement of each point at the start has its own error. What a round's draft takes stays as it was."""
    drafts = {(p.requests, p.context): p.seconds for p in cost.points if p.kind == "draft"}

    def now(point: CostPoint) -> CostPoint:
        if point.kind == "draft":
            return point
        ratio = float(np.interp(np.log2(point.requests), np.log2(LEARN_AT), ratios[point.rows // point.requests]))
        draft = drafts[point.requests, point.context] if point.kind == "verify" else 0.0
        return replace(point, seconds=ratio * (draft + point.seconds) - draft)

    return CostModel.from_points([now(point) for point in cost.points])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--concurrency", default="1,4,8,16")
    parser.add_argument("--per-user", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    prompts = [prompt.text for prompt in eval_prompts(240)]
    measured, others = prompts[::2], prompts[1::2]
    loads = {users: measured[: users * options.per_user] for users in map(int, options.concurrency.split(","))}
    folder = Path(tempfile.mkdtemp())
    file = folder / "arm.yaml"
    file.write_text(policy_text(FULL))
    points: dict[tuple[str, int], list[Point]] = {(name, users): [] for name in SCHEDULES for users in loads}
    arguments = ["--model-path", str(make_target()), *SPECULATE, str(file)]
    # A cache of its own, so that it takes its profile now and not on the machine as it was last week.
    with Server(arguments, {"XDG_CACHE_HOME": str(folder)}) as server:
        block = int(server.get("/server_info")["speculative_num_steps"])
        ask(server, others[:2], 2, 16)  # warm
        base, per_token = prefill_line(server, others[-24:])
        pause = turnaround(server, others[-36:-24])
        survival = acceptance(server, file, max(loads.values(), key=len), options.tokens, block)
        print(
            f"prefill {1e3 * base:.1f} ms + {1e6 * per_token:.0f} us a token; a user asks again after "
            f"{1e3 * pause:.1f} ms; survival by position {survival.mean(0).round(2)}"
        )
        for _ in tqdm(range(options.passes), desc="passes"):
            ratios = drift(server, file, others, block)
            profile = profile_in(folder)
            # The server's scheduler goes by its profile, and steps take what they take.
            machine = Machine(scaled(profile, ratios), block, base, per_token, 131_072, 256, believed=profile)
            for name, schedule in SCHEDULES.items():
                server.edit_policy(file, policy_text(schedule))
                policy = parse_policy(file.read_text())
                for users, chosen in loads.items():
                    server.flush()
                    seconds, fresh = ask(server, chosen, users, options.tokens)
                    work = workload(fresh, options.tokens, survival, users, pause)
                    speeds = [simulate(policy, work, machine, seed).output_tps for seed in range(5)]
                    points[name, users].append(Point(float(np.median(speeds)), len(chosen) * options.tokens / seconds))
    print("policy        users   predicted    measured    ratio (all passes)")
    for (name, users), found in points.items():
        predicted, real = (np.median([getattr(p, which) for p in found]) for which in ("predicted", "measured"))
        every = ", ".join(f"{p.ratio:.2f}" for p in found)
        print(f"{name:12} {users:6} {predicted:11.1f} {real:11.1f} {middle(found):8.2f} ({every})")
    if options.json:
        entries = [
            {"policy": name, "users": users, "ratio": middle(found), "passes": [asdict(p) for p in found]}
            for (name, users), found in points.items()
        ]
        options.json.write_text(json.dumps({"survival": survival.tolist(), "points": entries}, indent=1))
    return int(any(not 0.9 <= middle(found) <= 1.1 for found in points.values()))


if __name__ == "__main__":
    raise SystemExit(main())

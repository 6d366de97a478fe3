"""The simulator against the real server: output tokens/s predicted and measured, closed loop, three policies.

    python -m bench.predicted [--concurrency 1,4,8,16] [--per-user 3] [--tokens 64] [--passes 3] [--json OUT]

One server; its policy file is rewritten between arms. What the simulator is told: the profile the server took at its
start, by which its scheduler decides; the line of a lone prefill over its tokens; how soon a client asks again; and, as
of any workload, how the drafts of each prompt fare by position, counted once: some prompts take twice the rounds of
others, and the last to finish run alone.

A shared machine's speed moves by half within minutes. So plain steps, rounds and prefills are each priced at the pace
the machine had in that very run: observed over expected seconds, one number a kind, as a server refines its own cost.
What is put to the test is the rest: how many steps of which size there are, who waits for whom, and what they decide.
Arms take turns; a point is the median ratio of its passes. Exits 1 when one is off by more than 10 %.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dspark_sgl.ending import unwind_when_told_to_end
from dspark_sgl.policies.batch import Floats, Ints
from dspark_sgl.policies.cost import CostModel
from dspark_sgl.policies.reader import parse_policy
from dspark_sgl.policies.simulator import Machine, simulate
from dspark_sgl.policies.workload import Workload
from dspark_sgl.scrape import Scrape
from dspark_sgl.server import Server
from dspark_sgl.target import make_target

from .common import SPECULATE, ask_all
from .prompts import eval_prompts

SCHEDULES = {
    "off": "{kind: fixed, depth: 0}",
    "fixed-3": "{kind: fixed, depth: 3}",
    "throughput": "{kind: throughput}",
}
FULL = "{kind: fixed, depth: 64}"
KINDS = ("plain", "round")


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
    ways = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
    answers = ask_all(lambda prompt: server.generate(prompt, **ways), prompts, users)
    seconds = time.perf_counter() - start
    return seconds, np.array([a.meta["prompt_tokens"] - a.meta["cached_tokens"] for a in answers])


@dataclass(frozen=True)
class Prefill:
    """Seconds of a prefill and of each of its tokens; `pause`, between answer and next question, is nobody's step."""

    base: float
    per_token: float
    pause: float


def lone_prefill(server: Server, prompts: Sequence[str]) -> Prefill:
    """A line through single requests of several lengths, as the scheduler sees them."""
    points = []
    for prompt in prompts:
        before, start = server.report()["seconds"]["prefill"], time.perf_counter()
        answer = server.generate(prompt, temperature=0, max_new_tokens=1)
        whole = time.perf_counter() - start
        inside = server.report()["seconds"]["prefill"] - before
        points.append((answer.meta["prompt_tokens"] - answer.meta["cached_tokens"], inside, whole - inside))
    fresh, inside, outside = np.array(points).T
    slope, base = np.polyfit(fresh, inside, 1)
    return Prefill(max(0.0, float(base)), max(0.0, float(slope)), float(np.median(outside)))


@dataclass(frozen=True)
class Spent:
    """Totals of a server. steps: float64 `[2, 2]`, seconds of each kind, expected and observed"""

    steps: Floats
    prefills: int
    prefill_seconds: float

    @classmethod
    def of(cls, server: Server) -> Spent:
        now, report = Scrape.of(server.get("/metrics"), time.monotonic()), server.report()
        steps = [
            [now.total(f"dspark_step_seconds_{which}_total", kind=kind) or 0.0 for which in ("predicted", "observed")]
            for kind in KINDS
        ]
        return cls(np.array(steps), report["counts"].get("prefill", 0), report["seconds"].get("prefill", 0.0))

    def __sub__(self, before: Spent) -> Spent:
        seconds = self.prefill_seconds - before.prefill_seconds
        return Spent(self.steps - before.steps, self.prefills - before.prefills, seconds)

    @property
    def pace(self) -> dict[str, float]:
        """Observed over expected seconds of a step; of a kind that did not occur, as of the other."""
        known = {kind: row[1] / row[0] for kind, row in zip(KINDS, self.steps, strict=True) if row[0] > 0}
        return {kind: float(known.get(kind, next(iter(known.values())))) for kind in KINDS}


def acceptance(server: Server, file: Path, prompts: Sequence[str], tokens: int, depths: Sequence[int]) -> Floats:
    """float64 `[R, D]`: the chance that drafts 1..k of a prompt all survive. A position is counted with as many drafts
    offered as the first of `depths` that reaches it: a round cut short leaves easy text to the next one's first drafts.

    What one prompt shows of a position is little: the share among all prompts counts as one more round of it.
    """
    chances: Floats = np.zeros((len(prompts), 0))
    for depth in depths:
        server.edit_policy(file, policy_text(f"{{kind: fixed, depth: {depth}}}"))
        reached = np.zeros((len(prompts), depth + 1))
        for row, prompt in zip(reached, tqdm(prompts, desc=f"acceptance of {depth} drafts"), strict=True):
            before = Counter(server.report()["accepted_histogram"])
            ask(server, [prompt], 1, tokens)
            for length, rounds in (Counter(server.report()["accepted_histogram"]) - before).items():
                row[: int(length)] += rounds
        everybody = reached.sum(0)
        share = everybody[1:] / np.maximum(everybody[:-1], 1)
        known = (reached[:, 1:] + share) / (reached[:, :-1] + 1)
        chances = np.concatenate([chances, known[:, chances.shape[1] :]], axis=1)
    return np.cumprod(chances, axis=1, dtype=np.float64)


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


def machine(profile: CostModel, block: int, lone: Prefill, spent: Spent, fresh: Ints) -> Machine:
    """The machine at the pace of a run, whose scheduler goes by the profile all the same."""
    pace = spent.pace
    points = [replace(p, seconds=p.seconds * pace["plain" if p.kind == "plain" else "round"]) for p in profile.points]
    expected = spent.prefills * lone.base + float(fresh.sum()) * lone.per_token
    slower = spent.prefill_seconds / expected
    prices = slower * lone.base, slower * lone.per_token
    return Machine(CostModel.from_points(points), block, *prices, 131_072, 256, believed=profile)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--concurrency", default="1,4,8,16", metavar="N,..", help="users at once (default: %(default)s)"
    )
    parser.add_argument("--per-user", type=int, default=3, help="questions (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer (default: %(default)s)")
    parser.add_argument("--passes", type=int, default=3, help="of every arm (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures there")
    options = parser.parse_args()
    unwind_when_told_to_end()
    prompts = [prompt.text for prompt in eval_prompts(240)]
    measured, others = prompts[::2], prompts[1::2]
    loads = {users: measured[: users * options.per_user] for users in map(int, options.concurrency.split(","))}
    points: dict[tuple[str, int], list[Point]] = {(name, users): [] for name in SCHEDULES for users in loads}
    arguments = ["--model-path", str(make_target()), *SPECULATE]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        file = folder / "arm.yaml"
        file.write_text(policy_text(FULL))
        # A cache of its own, so that it takes its profile now and not on the machine as it was last week.
        server = stack.enter_context(Server([*arguments, str(file)], {"XDG_CACHE_HOME": str(folder)}))
        block = int(server.get("/server_info")["speculative_num_steps"])
        ask(server, others[:2], 2, 16)  # warm
        lone = lone_prefill(server, others[-24:])
        survival = acceptance(server, file, max(loads.values(), key=len), options.tokens, (3, block))
        print(
            f"prefill {1e3 * lone.base:.1f} ms + {1e6 * lone.per_token:.0f} us a token; a user asks again after "
            f"{1e3 * lone.pause:.1f} ms; survival by position {survival.mean(0).round(2)}"
        )
        profile = profile_in(folder)
        for _ in tqdm(range(options.passes), desc="passes"):
            for name, schedule in SCHEDULES.items():
                server.edit_policy(file, policy_text(schedule))
                policy = parse_policy(file.read_text())
                for users, chosen in loads.items():
                    server.flush()
                    before = Spent.of(server)
                    seconds, fresh = ask(server, chosen, users, options.tokens)
                    then = machine(profile, block, lone, Spent.of(server) - before, fresh)
                    work = workload(fresh, options.tokens, survival, users, lone.pause)
                    speeds = [simulate(policy, work, then, seed).output_tps for seed in range(5)]
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

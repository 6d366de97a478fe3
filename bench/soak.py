"""Mixed traffic for a while, checked against plain decoding and for leaks of slots and memory.

    python -m bench.soak [--requests 500 | --minutes 30] [--concurrency 16] [--seed 0]

Random lengths and shared prefixes, greedy and sampled, penalties and grammars, a third hung up on half-way, on a KV
pool too small for everyone, float32, chunks of 64 tokens; meanwhile the policy is edited every few seconds: chains,
trees, by cost, off, and a broken one. What is greedy must be a prefix of what plain SGLang writes. Exits 1 when one is
not, when a request fails, when SGLang finds a KV or request slot missing, or when the scheduler's memory grows.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from tqdm import tqdm

from dspark_sgl.ending import unwind_when_told_to_end
from dspark_sgl.server import Server
from dspark_sgl.target import make_target

from .common import SPECULATE, ask_all
from .prompts import eval_prompts

ARGUMENTS = ("--dtype", "float32", "--chunked-prefill-size", "64", "--max-total-tokens", "3000")
PROMPTS, LONGEST = 24, 160
WAYS: dict[str, dict[str, Any]] = {
    "plainly asked": {},
    "penalties": {"frequency_penalty": 0.6},
    "grammar": {"regex": r"[A-Za-z ,.']{40,200}\n"},
    "no deeper than 2": {"custom_params": {"dspark": {"max_depth": 2}}},
}
"""Greedy requests; what each writes is known from plain decoding."""
POLICIES = (
    "schedule: {kind: fixed, depth: 64}",
    "schedule: {kind: fixed, nodes: 7}\nshape: {kind: tree, max_nodes: 16}",
    "schedule: {kind: throughput}\nshape: {kind: auto, max_nodes: 16}",
    "schedule: {kind: fixed, depth: 0}",
    "schedule: {kind: fixed, depht: 3}",
)
EDIT_S = 5.0
MAY_GROW = 1.1


Wanted = dict[tuple[int, str], tuple[int, ...]]
"""What plain decoding writes, by prompt and way."""


@dataclass
class Traffic:
    """longest: tokens of an answer, which `wanted` has all of; problems: what went wrong, a line each"""

    server: Server
    prompts: Sequence[str]
    wanted: Wanted
    longest: int
    seed: int
    done: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    def ask(self, index: int) -> None:
        """One request; which it is, its number and the seed say."""
        dice = random.Random(f"{self.seed} {index}")
        which, count = dice.randrange(len(self.prompts)), dice.randint(1, self.longest)
        kind = dice.choices(("dropped", "sampled", *WAYS), weights=(30, 10, 30, 10, 10, 10))[0]
        try:
            if kind == "dropped":
                drop(self.server, self.prompts[which], dice.randint(1, 30), self.longest)
            elif kind == "sampled":
                ways = {"temperature": dice.choice((0.7, 1.0)), "top_p": dice.choice((0.9, 1.0)), "n": 2}
                body = {"text": self.prompts[which], "sampling_params": {**ways, "max_new_tokens": count}}
                assert len(self.server.post("/generate", body)) == 2
            else:
                got = greedy(self.server, self.prompts[which], kind, count)
                if got != self.wanted[which, kind][: len(got)] or len(got) < min(count, len(self.wanted[which, kind])):
                    self.problems.append(f"request {index}: prompt {which}, {kind}, {count} tokens: not plain's")
        except Exception as error:
            self.problems.append(f"request {index}: {kind}: {error}")
        self.done[kind] += 1


def greedy(server: Server, prompt: str, way: str, count: int) -> tuple[int, ...]:
    ends = {} if "regex" in WAYS[way] else {"ignore_eos": True}
    return server.generate(prompt, temperature=0, max_new_tokens=count, **ends, **WAYS[way]).tokens


def drop(server: Server, prompt: str, lines: int, longest: int) -> None:
    """Start to stream and hang up after a few lines."""
    params = {"temperature": 0.8, "max_new_tokens": longest, "ignore_eos": True}
    body = json.dumps({"text": prompt, "stream": True, "sampling_params": params}).encode()
    request = urllib.request.Request(server.url + "/generate", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as response:
        for _ in range(lines):
            response.readline()


def plain_answers(server: Server, prompts: Sequence[str], longest: int) -> Wanted:
    """server: of plain SGLang"""
    asked = [(which, way) for which in range(len(prompts)) for way in WAYS]
    answers = ask_all(lambda ask: greedy(server, prompts[ask[0]], ask[1], longest), asked, 16, "plain")
    return dict(zip(asked, answers, strict=True))


@contextmanager
def edited(file: Path, every_s: float = EDIT_S) -> Iterator[None]:
    """Meanwhile, one policy after another is saved there."""
    done = threading.Event()

    def edit() -> None:
        turn = 0
        while not done.wait(every_s):
            turn += 1
            file.write_text(f"version: 1\nname: soak\n{POLICIES[turn % len(POLICIES)]}\n")

    editor = threading.Thread(target=edit)
    editor.start()
    try:
        yield
    finally:
        done.set()
        editor.join()


def numbers(requests: int, minutes: float | None) -> Iterator[int]:
    """So many, or for so long."""
    end = time.monotonic() + 60 * (minutes or 0)
    index = 0
    while index < requests if minutes is None else time.monotonic() < end:
        yield index
        index += 1


def resident(server: Server) -> int:
    """Bytes that the scheduler holds."""
    assert server.pid is not None
    found = [p for p in psutil.Process(server.pid).children(recursive=True) if "scheduler" in p.name()]
    return sum(process.memory_info().rss for process in found)


def run(traffic: Traffic, requests: int, minutes: float | None, concurrency: int) -> tuple[int, int]:
    """All of it. Bytes that the scheduler held after the first tenth, and at the end."""
    gate = threading.Semaphore(2 * concurrency)  # the next number is drawn when there is somebody to take it
    early = 0
    start = time.monotonic()
    with ThreadPoolExecutor(concurrency) as pool, tqdm(desc="mixed", total=None if minutes else requests) as bar:
        for index in numbers(requests, minutes):
            gate.acquire()
            work = pool.submit(traffic.ask, index)
            work.add_done_callback(lambda _: gate.release())
            work.add_done_callback(lambda _: bar.update())
            passed = index / requests if minutes is None else (time.monotonic() - start) / (60 * minutes)
            if not early and passed > 0.1:
                early = resident(traffic.server)
    return early, resident(traffic.server)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--requests", type=int, default=500, help="default: %(default)s")
    parser.add_argument("--minutes", type=float, help="for so long, instead of so many requests")
    parser.add_argument("--concurrency", type=int, default=16, help="requests at once (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of what is asked (default: %(default)s)")
    options = parser.parse_args()
    unwind_when_told_to_end()
    prompts = [prompt.text for prompt in eval_prompts(PROMPTS)]
    model = ["--model-path", str(make_target()), *ARGUMENTS]
    # Synchronous as ours is: overlapped, SGLang counts a token for the penalties one step late.
    with Server([*model, "--disable-overlap-schedule"]) as server:
        wanted = plain_answers(server, prompts, LONGEST)

    with ExitStack() as stack:
        policy = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "soak.yaml"
        policy.write_text(f"version: 1\nname: soak\n{POLICIES[1]}\n")  # the one that needs most room
        server = stack.enter_context(Server([*model, *SPECULATE, str(policy)]))
        traffic = Traffic(server, prompts, wanted, LONGEST, options.seed)
        with edited(policy):
            early, late = run(traffic, options.requests, options.minutes, options.concurrency)
        time.sleep(5)  # idle: SGLang now counts its slots, and ends the server when one is missing
        server.generate(prompts[0], temperature=0, max_new_tokens=8)
        server.flush()
        reloads, retractions = server.report()["reloads"], server.log.count("#retracted_reqs")
    problems = traffic.problems
    if late > MAY_GROW * early:
        problems.append(f"the scheduler held {early >> 20} MiB after a tenth and {late >> 20} MiB at the end")
    print("\n".join(problems))
    print(", ".join(f"{count} {kind}" for kind, count in traffic.done.items()))
    print(
        f"{sum(traffic.done.values())} requests, {len(problems)} problems; policies {reloads['accepted']} taken over, "
        f"{reloads['refused']} refused; scheduler {early >> 20} MiB early, {late >> 20} MiB late; "
        f"retracted {retractions} times"
    )
    return int(bool(problems))


if __name__ == "__main__":
    raise SystemExit(main())

"""Policies against each other under a load that never pauses, in turns of one server: which is best at so many users?

    python -m bench.turns [--arms off,fixed-1,fixed-3,adaptive] [--concurrency 4,8,16,32] [--turns 8] [--tokens 64]
                          [--json OUT] [-- arguments of the server]

So many users ask one prompt after another out of a list that has no end and repeats itself, and stream the answers.
Each time the list begins anew the policy file is rewritten, so a turn of any policy is the same work, nobody starts
from an empty batch, and a slow minute of the machine is divided among all: a turn takes some twelve seconds. What comes
in the first two of a turn is not counted: the policy finds the last one's answers under way.

Prints, per load and policy, output tokens/s (median of its turns), and its ratio to `--against` (the first arm) in the
same round of turns, median and quartiles: now and then another guest of the machine has one turn for itself. `off` is
plain decoding on this server.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from dspark_sgl.ending import unwind_when_told_to_end
from dspark_sgl.load_client import answer_length
from dspark_sgl.policies.reader import parse_policy
from dspark_sgl.policies.shape import most_nodes
from dspark_sgl.policies.shipped import policy_source
from dspark_sgl.server import Server
from dspark_sgl.target import make_target

from .common import SPECULATE
from .prompts import eval_prompts

SETTLE_S = 2.0
FOR_ONE = 8
"""Prompts in the list for one user: three domains, short answers and long ones."""


@dataclass(frozen=True)
class Turn:
    """What one policy made of one turn. depth: drafts verified per request and step"""

    tokens: int
    seconds: float
    depth: float

    @property
    def speed(self) -> float:
        return self.tokens / self.seconds


@dataclass
class Users:
    """So many of them, each of whom asks again when answered.

    received: tokens that all of them have; begun: prompts asked; problem: the first that went wrong
    """

    server: Server
    work: Sequence[tuple[str, int]]
    received: int = 0
    begun: int = 0
    problem: Exception | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _over: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def asking(self, users: int) -> Iterator[None]:
        """Meanwhile they ask."""
        threads = [threading.Thread(target=self._ask_on) for _ in range(users)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._over.set()
            for thread in threads:
                thread.join()

    def wait_for(self, begun: int) -> None:
        """Until so many prompts have been asked. Raises what went wrong for one of them."""
        while self.begun < begun and self.problem is None:
            time.sleep(0.02)
        if self.problem is not None:
            raise self.problem

    def _ask_on(self) -> None:
        while not self._over.is_set():
            with self._lock:
                prompt, tokens = self.work[self.begun % len(self.work)]
                self.begun += 1
            try:
                self._ask(prompt, tokens)
            except Exception as error:
                self.problem = error
                return

    def _ask(self, prompt: str, tokens: int) -> None:
        had = 0
        for answer in self.server.stream(prompt, temperature=0, max_new_tokens=tokens, ignore_eos=True):
            with self._lock:
                self.received += len(answer.tokens) - had
            had = len(answer.tokens)


def work_of(users: int, tokens: int) -> list[tuple[str, int]]:
    """The list: prompts with the lengths of their answers, `tokens` in the mean.

    As many as take about as long whatever the load: here tokens per second grow as the square root of the users."""
    prompts = [prompt.text for prompt in eval_prompts(round(FOR_ONE * math.sqrt(users)))]
    return [(prompt, answer_length(place, tokens)) for place, prompt in enumerate(prompts)]


def play(
    server: Server, file: Path, texts: dict[str, str], users: int, work: Sequence[tuple[str, int]], turns: int
) -> dict[str, list[Turn]]:
    """`turns` of each policy, in order and back, after one of each that is not counted."""
    found: dict[str, list[Turn]] = {name: [] for name in texts}
    asking = Users(server, work)
    order = list(texts)
    with asking.asking(users):
        for turn, begins in zip(range(-1, turns), itertools.count(0, len(order) * len(work))):
            for place, name in enumerate(order if turn % 2 else reversed(order)):
                asking.wait_for(begins + place * len(work))
                server.edit_policy(file, texts[name])
                time.sleep(SETTLE_S)
                counts, tokens, start = server.report()["counts"], asking.received, time.perf_counter()
                asking.wait_for(begins + (place + 1) * len(work))
                tokens, seconds = asking.received - tokens, time.perf_counter() - start
                done = {key: count - counts.get(key, 0) for key, count in server.report()["counts"].items()}
                steps = done.get("round_requests", 0) + done.get("plain_requests", 0)
                if turn >= 0:
                    found[name].append(Turn(tokens, seconds, done.get("drafted", 0) / steps))
    return found


def compared(turns: Sequence[Turn], others: Sequence[Turn]) -> tuple[float, float, float]:
    """Quartiles of the speeds' ratios, turn by turn, the median in the middle."""
    low, middle, high = np.quantile([t.speed / o.speed for t, o in zip(turns, others, strict=True)], (0.25, 0.5, 0.75))
    return float(low), float(middle), float(high)


def show(users: int, found: dict[str, list[Turn]], against: str) -> None:
    for name, turns in found.items():
        low, middle, high = compared(turns, found[against])
        speed, depth = (statistics.median(getattr(t, which) for t in turns) for which in ("speed", "depth"))
        print(f"{users:5}  {name:16} {speed:10.1f} {middle:8.2f}  ({low:.2f} to {high:.2f}) {depth:8.2f}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arms", default="off,fixed-1,fixed-3,adaptive", metavar="P,..", help="default: %(default)s")
    parser.add_argument("--against", metavar="P", help="the arm that the others are compared with (default: the first)")
    parser.add_argument("--concurrency", default="4,8,16,32", metavar="N,..", help="users (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=8, help="of every policy (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer, mean (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures there")
    parser.add_argument("server", nargs="*", help="further arguments of the server, after --")
    options = parser.parse_args()
    unwind_when_told_to_end()
    texts: dict[str, str] = {}
    nodes: dict[str, int] = {}
    for name in options.arms.split(","):
        source, content = policy_source(name)
        arm = Path(name).stem
        texts[arm], nodes[arm] = content.decode(), most_nodes(parse_policy(content, source))
    against = Path(options.against).stem if options.against else next(iter(texts))
    points: dict[int, dict[str, list[Turn]]] = {}
    with ExitStack() as stack:
        file = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "turn.yaml"
        file.write_text(texts[max(nodes, key=nodes.__getitem__)])  # the one that needs most room
        arguments = ["--model-path", str(make_target()), *SPECULATE, str(file), "--disable-radix-cache"]
        server = stack.enter_context(Server([*arguments, *options.server]))
        print(f"users  policy            tokens/s  over {against}, quartiles    depth")
        for users in map(int, options.concurrency.split(",")):
            work = work_of(users, options.tokens)
            points[users] = play(server, file, texts, users, work, options.turns)
            show(users, points[users], against)
    if options.json:
        entries = {
            users: {name: [asdict(turn) for turn in turns] for name, turns in arms.items()}
            for users, arms in points.items()
        }
        options.json.write_text(json.dumps({"tokens": options.tokens, "points": entries}, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

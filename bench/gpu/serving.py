"""Real servers on the GPU, all at once but measured one at a time: plain SGLang, its own DSPARK, and ours.

Every arm answers the same questions greedily with answers of one length, so that tokens per second compare. Answers of
an arm are compared with plain SGLang's: in bfloat16 a tie falls one way or the other, so not all of them are equal.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TOKENS = 96
USERS = (1, 8, 32, 64)
PASSES = 2
COMMON = (
    *("--attention-backend", "flashinfer", "--disable-prefill-cuda-graph", "--max-total-tokens", "200000"),
    *("--mem-fraction-static", "0.6", "--cuda-graph-max-bs-decode", "64", "--max-running-requests", "64"),
)
OURS = ("--speculative-algorithm", "DSPARK_SGL", "--dspark-policy")
ARMS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "SGLang's DSPARK": ("--speculative-algorithm", "DSPARK", "--speculative-draft-model-path", "{draft}"),
    "ours, off": (*OURS, "off"),
    "ours, fixed-5 without graphs": (*OURS, "fixed-5", "--cuda-graph-backend-decode", "disabled"),
    "ours, fixed-5": (*OURS, "fixed-5"),
    "ours, tree-16": (*OURS, str(ROOT / "bench/policies/tree-16.yaml")),
    "ours, adaptive": (*OURS, "adaptive"),
}


@dataclass(frozen=True)
class Answer:
    text: str
    tokens: int
    rounds: int


@dataclass(frozen=True)
class Point:
    """One arm at so many users: tokens per second of each pass, mean accepted length, answers as plain SGLang's."""

    arm: str
    users: int
    speeds: list[float]
    length: float
    same: int
    answers: int


class Fleet:
    """The arms' servers. `logs`: the folder of what they print."""

    def __init__(self, model: Path, draft: Path, environment: Mapping[str, str], logs: Path) -> None:
        self._processes: dict[str, tuple[int, subprocess.Popen[bytes], Path]] = {}
        for number, (arm, arguments) in enumerate(ARMS.items()):
            port, log = 31000 + 50 * number, logs / f"server-{number}.log"
            given = [argument.format(draft=draft) for argument in arguments]
            command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(model), *COMMON, *given]
            with log.open("wb") as stream:
                process = subprocess.Popen(
                    [*command, "--port", str(port)],
                    stdout=stream,
                    stderr=stream,
                    env=environment,
                    cwd=logs,
                    start_new_session=True,
                )
            self._processes[arm] = port, process, log
        self.ready: list[str] = []

    def wait(self, seconds: float) -> None:
        """Until every server answers or has ended, or that long."""
        until = time.monotonic() + seconds
        pending = set(self._processes)
        while pending and time.monotonic() < until:
            for arm in sorted(pending):
                port, process, _ = self._processes[arm]
                if process.poll() is not None:
                    pending.discard(arm)
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
                    pending.discard(arm)
            time.sleep(0.5)
        self.ready = [
            arm for arm, (_, process, _) in self._processes.items() if arm not in pending and process.poll() is None
        ]

    def stop(self) -> None:
        for _, process, _ in self._processes.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def failures(self) -> list[str]:
        """The last line with an error of each server that never answered."""
        lines = []
        for arm, (_, _, log) in self._processes.items():
            if arm not in self.ready:
                said = [line for line in log.read_text(errors="replace").splitlines() if "Error" in line] or ["slow"]
                lines.append(f"{arm}: {said[-1][:200]}")
        return lines

    def ask(self, arm: str, question: str, tokens: int = TOKENS) -> Answer:
        port = self._processes[arm][0]
        body = {
            "text": f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n",
            "sampling_params": {"max_new_tokens": tokens, "temperature": 0, "ignore_eos": True},
        }
        data, kind = json.dumps(body).encode(), {"Content-Type": "application/json"}
        request = urllib.request.Request(f"http://127.0.0.1:{port}/generate", data, kind)
        with urllib.request.urlopen(request, timeout=30) as response:
            answer: dict[str, Any] = json.load(response)
        meta = answer["meta_info"]
        return Answer(answer["text"], meta["completion_tokens"], meta.get("spec_verify_ct") or tokens)


def measure_serving(fleet: Fleet, seconds: float) -> list[Point]:
    """Every arm at every number of users, in turn; `PASSES` passes, or as many as begin within that long."""
    lines = (ROOT / "bench/prompts/eval.jsonl").read_text().splitlines()
    questions = [json.loads(line)["prompt"] for line in lines]
    speeds: dict[tuple[str, int], list[float]] = {}
    said: dict[tuple[str, int], list[Answer]] = {}
    until = time.monotonic() + seconds
    with ThreadPoolExecutor(max(USERS)) as users:
        # What is compiled at first use, at every size of batch. An arm that fails here is not measured.
        for arm in list(fleet.ready):
            try:
                for count in USERS:
                    list(users.map(lambda question, arm=arm: fleet.ask(arm, question, 24), questions[:count]))
            except OSError:
                fleet.ready.remove(arm)
        for number in range(PASSES):
            for count in USERS:
                asked = questions[:: len(questions) // max(2 * count, 6)][: max(2 * count, 6)]
                for arm in fleet.ready:
                    if number and time.monotonic() > until:
                        continue
                    start = time.perf_counter()
                    with ThreadPoolExecutor(count) as crowd:
                        answers = list(crowd.map(lambda question, arm=arm: fleet.ask(arm, question), asked))
                    speed = sum(answer.tokens for answer in answers) / (time.perf_counter() - start)
                    speeds.setdefault((arm, count), []).append(speed)
                    print(f"{arm}, {count} users: {speed:.0f} tokens/s", flush=True)
                    said[arm, count] = answers
    points = []
    for (arm, count), passes in speeds.items():
        answers, plain = said[arm, count], said.get(("plain", count), [])
        same = sum(mine.text == theirs.text for mine, theirs in zip(answers, plain, strict=False))
        length = statistics.mean(answer.tokens / answer.rounds for answer in answers)
        points.append(Point(arm, count, passes, length, same, len(answers)))
    return points


def serving_table(points: list[Point]) -> list[str]:
    """Markdown: tokens per second, the ratio to plain SGLang at the same users, accepted length, equal answers."""
    plain = {point.users: statistics.median(point.speeds) for point in points if point.arm == "plain"}
    lines = [
        "| arm | users | tokens/s | of plain | accepted length | answers as plain's |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for point in points:
        speed = statistics.median(point.speeds)
        spread = f"{min(point.speeds):.0f} to {max(point.speeds):.0f}" if len(point.speeds) > 1 else f"{speed:.0f}"
        ratio = f"{speed / plain[point.users]:.2f}" if point.users in plain else ""
        length = "" if point.arm == "plain" else f"{point.length:.2f}"
        lines.append(
            f"| {point.arm} | {point.users} | {spread} | {ratio} | {length} | {point.same} of {point.answers} |"
        )
    return lines

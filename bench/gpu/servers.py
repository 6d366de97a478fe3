"""Servers of one target on one GPU, all at once: the arms of a comparison. Starts, asks and stops; measures nothing."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COMMON = (
    *("--attention-backend", "flashinfer", "--disable-prefill-cuda-graph", "--disable-radix-cache"),
    *("--mem-fraction-static", "0.95", "--cuda-graph-max-bs-decode", "64", "--max-running-requests", "64"),
    "--sleep-on-idle",
)
"""`mem-fraction-static` is of what is free when a server looks, and its neighbours take theirs meanwhile: each is held
to its KV by `--max-total-tokens` instead."""


@dataclass(frozen=True)
class Answer:
    """said: the text, or the tokens where there is no tokenizer; rounds: decode steps of this request"""

    said: Any
    tokens: int
    rounds: int


@dataclass(frozen=True)
class Target:
    """What is served. arms: server arguments by name; prompts: one field of a request each, `text` or `input_ids`

    tokens: of every answer
    wanted: what each prompt is answered with, where that is known beforehand
    """

    title: str
    model: Path
    arms: Mapping[str, tuple[str, ...]]
    prompts: list[dict[str, Any]]
    tokens: int
    wanted: list[list[int]] | None = None


class GpuServers:
    """One server per arm. logs: the folder of what they print; port: the first"""

    def __init__(self, target: Target, environment: Mapping[str, str], logs: Path, port: int) -> None:
        self.target = target
        self._processes: dict[str, tuple[int, subprocess.Popen[bytes], Path]] = {}
        for number, (arm, arguments) in enumerate(target.arms.items()):
            mine, log = port + 50 * number, logs / f"server-{port + 50 * number}.log"
            command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(target.model), *COMMON]
            with log.open("wb") as stream:
                process = subprocess.Popen(
                    [*command, *arguments, "--port", str(mine)],
                    stdout=stream,
                    stderr=stream,
                    env=environment,
                    cwd=logs,
                    start_new_session=True,
                )
            self._processes[arm] = mine, process, log
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
        """The last line with an error of each server that has not been measured."""
        lines = []
        for arm, (_, _, log) in self._processes.items():
            if arm not in self.ready:
                said = [line for line in log.read_text(errors="replace").splitlines() if "Error" in line] or ["slow"]
                lines.append(f"{arm}: {said[-1][:200]}")
        return lines

    def ask(self, arm: str, prompt: dict[str, Any], tokens: int) -> Answer:
        """A greedy answer of so many tokens."""
        sampling = {"max_new_tokens": tokens, "temperature": 0, "ignore_eos": True}
        answer = json.loads(self._get(arm, "generate", {**prompt, "sampling_params": sampling}))
        meta, said = answer["meta_info"], answer["text" if "text" in prompt else "output_ids"]
        return Answer(said, meta["completion_tokens"], meta.get("spec_verify_ct") or tokens)

    def clock(self, arm: str) -> dict[str, Any]:
        """Of a server of ours: counts and host seconds per phase of its rounds since it started; {} of another."""
        state: dict[str, Any] = json.loads(self._get(arm, "server_info"))["internal_states"][0]
        return dict(state.get("dspark", {}))

    def profile(self, arm: str, wanted: dict[str, Any]) -> None:
        """SGLang's own profiler, of the steps that follow."""
        self._get(arm, "start_profile", {**wanted, "activities": ["CPU", "GPU"]})

    def _get(self, arm: str, path: str, body: dict[str, Any] | None = None) -> bytes:
        port = self._processes[arm][0]
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{port}/{path}", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as response:
            return bytes(response.read())

"""Starts a real SGLang server in a process of its own and talks to it: for the demo, the benchmarks and the tests.

Only the standard library, the policy reader and `sglang.launch_server`, started as a user would start it. Never used by
the engine itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from .policies.reader import parse_policy

START_TIMEOUT_S, RELOAD_TIMEOUT_S = 600, 60


class ServerError(RuntimeError):
    """The server did not start or answered an error; the message carries its last lines."""


class NotReady(ServerError):
    """It had not ended either."""


@dataclass(frozen=True)
class Answer:
    """One generation. text: what it wrote, empty without a tokenizer; tokens: output ids; meta: SGLang's `meta_info`"""

    text: str
    tokens: tuple[int, ...]
    meta: dict[str, Any]

    @property
    def accepted_length(self) -> float | None:
        """Tokens per verify round, bonus included; None from a server that does not speculate."""
        rounds = self.meta.get("spec_verify_ct")
        # The first token comes from prefill, not from a round.
        return (self.meta["completion_tokens"] - 1) / rounds if rounds else None


class Server:
    """`with Server([...]) as server:` runs `python -m sglang.launch_server` until the block ends.

    port: None for any that is free. What the server prints goes to `log_file`, which is kept where the block, or the
    start, ends with an error.
    """

    def __init__(
        self, arguments: Sequence[str], environment: dict[str, str] | None = None, port: int | None = None
    ) -> None:
        self.port = port or _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log_file = Path(tempfile.gettempdir(), f"dspark-server-{secrets.token_hex(6)}.log")
        self._command = [
            *(sys.executable, "-m", "sglang.launch_server"),
            *("--host", "127.0.0.1", "--port", str(self.port), *arguments),
        ]
        self._environment = {**os.environ, **(environment or {})}
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Server:
        try:
            # A Ctrl-C interrupts the main thread; between the fork and the assignment it would leave a server behind.
            with ThreadPoolExecutor(1) as starter:
                starter.submit(self._start).result()
            self._wait_until_ready()
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        if not isinstance(error, Exception):  # one that was told to end has nothing to explain either
            self.log_file.unlink(missing_ok=True)
        elif str(self.log_file) not in str(error):
            print(f"the server's log: {self.log_file}", file=sys.stderr)

    def stop(self) -> None:
        """End the server and its children at once; SGLang asked politely sleeps five seconds over a crash report."""
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        # The children end with their parent; last goes multiprocessing's tracker, which clears their shared memory.
        with contextlib.suppress(ProcessLookupError):
            for _ in range(50):
                os.killpg(self._process.pid, 0)
                time.sleep(0.1)
            os.killpg(self._process.pid, signal.SIGKILL)

    @property
    def pid(self) -> int | None:
        """Of the process that was started; the scheduler is a child of it."""
        return None if self._process is None else self._process.pid

    @property
    def log(self) -> str:
        """Everything the server has printed."""
        return self.log_file.read_text(errors="replace")

    def wait(self, timeout: float | None = None) -> int:
        """Block until the server ends by itself; its exit code. Raises `subprocess.TimeoutExpired`."""
        assert self._process is not None
        return self._process.wait(timeout)

    def get(self, path: str) -> Any:
        """The JSON, or the text, that the server answers at `path`."""
        with urllib.request.urlopen(self.url + path, timeout=60) as response:
            body = response.read().decode()
        try:
            return json.loads(body)
        except json.JSONDecodeError:
            return body

    def post(self, path: str, body: dict[str, Any], timeout: float = 600) -> Any:
        """Raises ServerError with the status and the server's reason."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                text = response.read().decode()
        except urllib.error.HTTPError as error:
            raise ServerError(f"{error.code}: {error.read().decode()[:500]}") from None
        return json.loads(text) if text.startswith(("{", "[")) else text

    def generate(self, prompt: str | Sequence[int], **sampling: Any) -> Answer:
        """One prompt, text or token ids, to the end."""
        key = "text" if isinstance(prompt, str) else "input_ids"
        value = prompt if isinstance(prompt, str) else list(prompt)
        answer = self.post("/generate", {key: value, "sampling_params": sampling})
        return Answer(answer.get("text", ""), tuple(answer["output_ids"]), answer["meta_info"])

    def stream(self, prompt: str, **sampling: Any) -> Iterator[Answer]:
        """The same, answer so far after answer so far."""
        body = {"text": prompt, "sampling_params": sampling, "stream": True}
        request = urllib.request.Request(
            self.url + "/generate", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=600) as response:
            for line in response:
                data = line.decode().strip().removeprefix("data:").strip()
                if data and data != "[DONE]":
                    piece = json.loads(data)
                    yield Answer(piece["text"], tuple(piece["output_ids"]), piece["meta_info"])

    def flush(self) -> None:
        """Empty the radix cache. SGLang refuses while a request is being put away, so this asks again for a while."""
        for attempt in range(50):
            try:
                self.post("/flush_cache", {})
                return
            except ServerError:
                if attempt == 49:
                    raise
                time.sleep(0.2)

    def report(self) -> dict[str, Any]:
        """Our own section of `/server_info`."""
        state = self.get("/server_info")["internal_states"][0]
        return dict(state.get("dspark", {}))

    def edit_policy(self, file: Path, text: str) -> None:
        """Save the policy file that the server follows and wait until this very text is in force.

        Raises PolicyError for one that no server would take, ServerError where it is not in force after a minute.
        """
        content = text.encode()
        digest = parse_policy(content, str(file)).digest
        file.write_bytes(content)
        end = time.monotonic() + RELOAD_TIMEOUT_S
        while self.report()["digest"] != digest:
            if time.monotonic() > end:
                raise ServerError(f"{file}: not in force after {RELOAD_TIMEOUT_S} s:\n{self._tail()}")
            time.sleep(0.05)

    def _start(self) -> None:
        # For the user's eyes only: it may hold what was asked.
        with open(os.open(self.log_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as log:
            self._process = subprocess.Popen(
                self._command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,
                # SGLang starts from any folder; this one must not put the checkout's folders on its path.
                cwd=tempfile.gettempdir(),
            )

    def _wait_until_ready(self) -> None:
        assert self._process is not None
        end = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < end:
            if self._process.poll() is not None:
                raise ServerError(f"the server ended with {self._process.returncode}:\n{self._tail()}")
            with contextlib.suppress(OSError, urllib.error.HTTPError):
                urllib.request.urlopen(self.url + "/health_generate", timeout=30).close()
                return
            time.sleep(0.5)
        raise NotReady(f"the server was not ready after {START_TIMEOUT_S} s:\n{self._tail()}")

    def _tail(self) -> str:
        return "\n".join([*self.log.splitlines()[-25:], f"(all of it: {self.log_file})"])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

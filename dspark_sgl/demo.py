"""`make demo`: a real model here answers three questions without speculation and with it, and says what that saved.

    python -m dspark_sgl.demo            both arms, then the servers end
    python -m dspark_sgl.demo --serve    the speculating server, left running on port 30000

Two servers one after the other, started as a user would start them; every figure comes from their answers.
"""

from __future__ import annotations

import argparse
import shutil
import socket
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from .ending import unwind_when_told_to_end
from .launch import policy_from_anywhere
from .policies.errors import PolicyError
from .policies.shipped import find_policy, policy_file
from .server import Server, ServerError
from .settings import policy_name
from .target import TargetError, chat, make_target

# One of each kind: how much speculation saves depends on how predictable the answer is.
QUESTIONS = {
    "arithmetic": "A farmer has 24 apples and gives 5 apples to each of 3 friends. How many apples are left?",
    "code": "Write a python function that returns the largest number in a list.",
    "chat": "Explain step by step how to bake a simple loaf of bread at home.",
}
TOKENS = 96
REPEATS = 3
PORT = 30000
"""Where `dspark-sgl top` looks."""


@dataclass(frozen=True)
class Arm:
    """One server's measurements. speed: tokens/s, median; first_token_ms: median; accepted: tokens per round or None"""

    speed: float
    first_token_ms: float
    accepted: float | None


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m dspark_sgl.demo", description=__doc__.split("\n")[0])
    parser.add_argument("--serve", action="store_true", help="leave the speculating server running")
    parser.add_argument("--port", type=int, default=PORT, help="with --serve (default: %(default)s)")
    options = parser.parse_args()
    unwind_when_told_to_end()
    try:
        find_policy(policy_name())  # a mistake in it is said now and not in a minute
        if options.serve:
            check_port(options.port)
        model = ["--model-path", str(make_target())]
        return serve(model, options.port) if options.serve else compare(model)
    except (PolicyError, ServerError, TargetError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def speculating() -> list[str]:
    """Server arguments, with the policy that the environment names."""
    return ["--speculative-algorithm", "DSPARK_SGL", "--dspark-policy", policy_from_anywhere(policy_name())]


def compare(model: list[str]) -> int:
    """Both arms and the difference."""
    print("Starting SGLang without speculation (about a minute) ...", flush=True)
    with Server(model) as server:
        plain = measure(server, show=False)
    print("Starting SGLang with DSpark (about a minute) ...", flush=True)
    with Server([*model, *speculating()]) as server:
        dspark = measure(server, show=True)
    print(f"\n{'':>12} {'plain':>16} {'DSpark':>16} {'faster':>8} {'accepted':>9}   first token, ms")
    for kind in QUESTIONS:
        before, after = plain[kind], dspark[kind]
        print(
            f"{kind:>12} {before.speed:>10.1f} tok/s {after.speed:>10.1f} tok/s {after.speed / before.speed:>7.2f}x "
            f"{after.accepted or 1:>9.2f}   {before.first_token_ms:.0f} -> {after.first_token_ms:.0f}"
        )
    seconds = [sum(1 / arm.speed for arm in arms.values()) for arms in (plain, dspark)]
    passes = sum(TOKENS / (arm.accepted or 1) for arm in dspark.values())
    print(
        f"\nWith speculation {seconds[0] / seconds[1]:.2f} times as fast: about {passes:.0f} forward passes "
        f"for {TOKENS * len(QUESTIONS)} tokens."
    )
    return 0


def measure(server: Server, *, show: bool) -> dict[str, Arm]:
    """Every question's arm, in order."""
    return {kind: measure_one(server, question, show=show) for kind, question in QUESTIONS.items()}


def measure_one(server: Server, question: str, *, show: bool) -> Arm:
    """Stream the answer a few times; the first time is warm-up, shown when asked."""
    prompt = chat(question)
    speeds, first_tokens, accepted = [], [], []
    if show:
        print(f"\n\n> {question}\n", flush=True)
    for attempt in range(REPEATS + 1):
        server.flush()
        start, first, shown, answer = time.perf_counter(), None, 0, None
        for answer in server.stream(prompt, temperature=0, max_new_tokens=TOKENS, ignore_eos=True):
            first = first or time.perf_counter()
            if show and attempt == 0:
                print(answer.text[shown:], end="", flush=True)
                shown = len(answer.text)
        end = time.perf_counter()
        if attempt == 0 or answer is None or first is None:
            continue
        speeds.append((len(answer.tokens) - 1) / (end - first))
        first_tokens.append((first - start) * 1000)
        if answer.accepted_length is not None:
            accepted.append(answer.accepted_length)
    return Arm(
        statistics.median(speeds), statistics.median(first_tokens), statistics.median(accepted) if accepted else None
    )


def check_port(port: int) -> None:
    """Raises ServerError where something else listens there."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError):
            raise ServerError(f"port {port} cannot be used; choose another with --port (make serve PORT=N)") from None


def serve(model: list[str], port: int) -> int:
    """Run the server until it is interrupted."""
    ours = "dspark-sgl" if shutil.which("dspark-sgl") else Path(sys.executable).with_name("dspark-sgl")
    print("Starting SGLang with DSpark (about a minute) ...", flush=True)
    with Server([*model, *speculating()], port=port) as server:
        print(f"""Serving at {server.url}  (Ctrl-C ends it). Try:

  curl -s {server.url}/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{{"messages": [{{"role": "user", "content": "{QUESTIONS["chat"]}"}}], "max_tokens": 100}}'
  {ours} top{"" if port == PORT else f" --url {server.url}"}    # its speculation, live
  curl -s {server.url}/server_info    # the section `dspark`: policy, accepted length, seconds per phase""")
        if file := policy_file(policy_name()):
            print(f"\nEdit {file} while it runs, ask again, and see the depth:\n")
            print(f"  curl -s {server.url}/metrics | grep ^dspark_depth")
            if policy_name() != str(file):  # one that ships
                print("\nServers started later read that file too; in a checkout, this brings it back:\n")
                print(f"  git -C {file.parent} checkout {file.name}")
        sys.stdout.flush()
        if code := server.wait():
            raise ServerError(f"the server ended with {code}; its log: {server.log_file}")
        return 0


if __name__ == "__main__":
    raise SystemExit(main())

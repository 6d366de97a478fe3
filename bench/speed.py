"""Single stream: output tokens/s and time to first token, DSpark against plain SGLang, arms in alternation.

    python -m bench.speed [--passes 5] [--prompts 6] [--tokens 128] [--policy adaptive] [--json OUT]

Both servers run at once and take turns, so that a slow minute of the machine hits both; only one works at a time.
Prints medians with their spread, where a round's time goes, and how far the ratio is from what the accepted length
allows.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dspark_sgl.ending import unwind_when_told_to_end
from dspark_sgl.launch import policy_from_anywhere
from dspark_sgl.server import Server
from dspark_sgl.target import make_target

from .common import PHASES, SPECULATE
from .prompts import eval_prompts


@dataclass(frozen=True)
class Pass:
    """One pass over the prompts. speed: tokens/s after the first; first_token_ms: median"""

    speed: float
    first_token_ms: float


def one_pass(server: Server, prompts: Sequence[str], tokens: int) -> Pass:
    server.flush()
    seconds, count, first_tokens = 0.0, 0, []
    for prompt in prompts:
        start, first = time.perf_counter(), 0.0
        for answer in server.stream(prompt, temperature=0, max_new_tokens=tokens, ignore_eos=True):
            first = first or time.perf_counter()
            emitted = len(answer.tokens)
        seconds += time.perf_counter() - first
        count += emitted - 1
        first_tokens.append((first - start) * 1000)
    return Pass(count / seconds, statistics.median(first_tokens))


def spread(values: Sequence[float], digits: int = 1) -> str:
    middle, least, most = (f"{value:.{digits}f}" for value in (statistics.median(values), min(values), max(values)))
    return f"{middle:>7}  ({least} to {most})"


def breakdown(report: dict[str, Any]) -> dict[str, float]:
    """Milliseconds per round, by phase."""
    rounds, seconds = report["counts"]["round"], report["seconds"]
    named = {phase: seconds.get(phase, 0.0) / rounds * 1000 for phase in PHASES}
    named["rest of the round"] = (seconds["round"] - sum(seconds.get(phase, 0.0) for phase in PHASES)) / rounds * 1000
    named["engine around it"] = seconds.get("engine", 0.0) / rounds * 1000
    return named


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--passes", type=int, default=5, help="of both arms (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=6, help="how many (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=128, help="of an answer (default: %(default)s)")
    parser.add_argument("--policy", default="adaptive", metavar="NAME|FILE", help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures there")
    options = parser.parse_args()
    unwind_when_told_to_end()
    prompts = [prompt.text for prompt in eval_prompts(options.prompts)]
    model = ["--model-path", str(make_target())]
    with Server(model) as plain, Server([*model, *SPECULATE, policy_from_anywhere(options.policy)]) as dspark:
        for server in (plain, dspark):
            one_pass(server, prompts[:1], 32)
        passes: dict[str, list[Pass]] = {"plain": [], "dspark": []}
        for _ in range(options.passes):
            passes["plain"].append(one_pass(plain, prompts, options.tokens))
            passes["dspark"].append(one_pass(dspark, prompts, options.tokens))
        report = dspark.report()
    for name, arm in passes.items():
        print(
            f"{name:>7}: tokens/s {spread([p.speed for p in arm])}   first token ms "
            f"{spread([p.first_token_ms for p in arm])}"
        )
    ratios = [d.speed / p.speed for p, d in zip(passes["plain"], passes["dspark"], strict=True)]
    print(f"  ratio: {spread(ratios, 2)}   accepted length {report['accepted_length']:.2f}")
    print("  a round, ms: " + ", ".join(f"{name} {ms:.1f}" for name, ms in breakdown(report).items()))
    print(f"  the accepted length alone would allow {report['accepted_length']:.2f} times the speed")
    if options.json:
        arms = {name: [asdict(p) for p in arm] for name, arm in passes.items()}
        options.json.write_text(json.dumps({"passes": arms, "ratios": ratios, "report": report}, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Depth against load: a policy under 1 to 32 users at once, its outputs compared with plain decoding token for token.

    python -m bench.adaptive [--policy adaptive] [--concurrency 1,2,4,8,16,32] [--plot OUT.png] [--json OUT]

float32 on both servers. Prints, per point, the mean depth verified, the share of plain steps, output tokens/s and how
many outputs are identical; exits 1 when one is not.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dspark_sgl.ending import unwind_when_told_to_end
from dspark_sgl.launch import policy_from_anywhere
from dspark_sgl.server import Answer, Server
from dspark_sgl.target import make_target

from .common import SPECULATE, ask_all
from .prompts import eval_prompts


def ask(server: Server, prompts: Sequence[str], concurrency: int, tokens: int) -> list[Answer]:
    sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
    return ask_all(lambda prompt: server.generate(prompt, **sampling), prompts, concurrency)


def measure(server: Server, wanted: dict[str, tuple[int, ...]], concurrency: int, tokens: int) -> dict[str, Any]:
    """One point of the curve: every user asks twice."""
    prompts = [prompt for prompt, _ in zip(wanted, range(max(4, 2 * concurrency)), strict=False)]
    server.flush()
    before, start = server.report()["counts"], time.perf_counter()
    answers = ask(server, prompts, concurrency, tokens)
    seconds, after = time.perf_counter() - start, server.report()["counts"]
    done = {key: after[key] - before.get(key, 0) for key in after}
    requests = done.get("round_requests", 0) + done.get("plain_requests", 0)
    return {
        "concurrency": concurrency,
        "depth": done.get("drafted", 0) / requests,
        "plain_share": done.get("plain_requests", 0) / requests,
        "output_tps": len(prompts) * tokens / seconds,
        "identical": sum(answer.tokens == wanted[prompt] for answer, prompt in zip(answers, prompts, strict=True)),
        "of": len(prompts),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--policy", default="adaptive", metavar="NAME|FILE", help="default: %(default)s")
    parser.add_argument(
        "--concurrency", default="1,2,4,8,16,32", metavar="N,..", help="users at once (default: %(default)s)"
    )
    parser.add_argument("--tokens", type=int, default=64, help="of an answer (default: %(default)s)")
    parser.add_argument("--plot", type=Path, metavar="OUT.png", help="draw depth and speed over the users")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures there")
    options = parser.parse_args()
    unwind_when_told_to_end()
    loads = [int(load) for load in options.concurrency.split(",")]
    prompts = [prompt.text for prompt in eval_prompts(max(4, 2 * max(loads)))]
    model = ["--model-path", str(make_target()), "--dtype", "float32"]
    with Server(model) as server:
        answers = ask(server, prompts, 16, options.tokens)
    wanted = {prompt: answer.tokens for prompt, answer in zip(prompts, answers, strict=True)}
    points = []
    print("users   depth   plain steps   tokens/s   identical")
    with Server([*model, *SPECULATE, policy_from_anywhere(options.policy)]) as server:
        ask(server, prompts[:4], 4, options.tokens)  # warm
        for load in loads:
            point = measure(server, wanted, load, options.tokens)
            points.append(point)
            share = f"{100 * point['plain_share']:.0f} %"
            print(
                f"{load:5}   {point['depth']:5.2f}   {share:>11}   {point['output_tps']:8.1f}"
                f"   {point['identical']} of {point['of']}",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps({"policy": options.policy, "points": points}, indent=1))
    if options.plot:
        plot(points, options.plot)
    return int(any(point["identical"] < point["of"] for point in points))


def plot(points: Sequence[dict[str, Any]], file: Path) -> None:
    """Depth and throughput against concurrency, one over the other."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 1, sharex=True, figsize=(6, 6))
    users = [point["concurrency"] for point in points]
    for axis, key, label in (
        (axes[0], "depth", "draft tokens verified per request"),
        (axes[1], "output_tps", "tokens/s"),
    ):
        axis.plot(users, [point[key] for point in points], marker="o")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[1].set_xscale("log", base=2)
    axes[1].set_xticks(users, [str(user) for user in users])
    axes[1].set_xlabel("users at once")
    figure.tight_layout()
    figure.savefig(file)


if __name__ == "__main__":
    raise SystemExit(main())
